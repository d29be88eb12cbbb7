// Runs stripe_pool_reduce.cu on a CPU, for its tests: blocks one after another (all at once in a cooperative launch),
// the threads of a block as fibers that are switched where CUDA's threads wait: at __syncthreads, at a shuffle, at an
// mma.
//
// What it finds: wrong indexes and borders (with ASan, on shared memory of exactly the asked size), loads of 16 bytes
// off their alignment, barriers and shuffles that not all threads reach, arithmetic. Shared memory begins as NaN.
// With shim_order warps take turns at random, some running far ahead of others, which a missing barrier shows by
// other results. With MGN_MEMORY_MODEL blocks see no more of each other than fences make them (memory_model.cpp). What
// it cannot find: races inside a warp, missing fences inside a block, how fast anything is. An mma here adds its products in float32 one after another; the hardware's order is
// its own.
#ifndef MGN_HOST_SHIM_H
#define MGN_HOST_SHIM_H

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define SHIM_ASAN 1
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
using std::min;

#ifdef MGN_MEMORY_MODEL
extern "C" {
void model_allocated(void* base, size_t bytes);
void model_freed(void* base);
void model_begin(int blocks, int together);
void model_switch(int block);
void model_fence();
void model_end();
unsigned model_atomic_add(unsigned* at, unsigned x);
void model_read_only(const void* at, size_t bytes);
}
#else  // all accesses in one order, which every block sees
inline void model_allocated(void*, size_t) {}
inline void model_freed(void*) {}
inline void model_begin(int, int) {}
inline void model_switch(int) {}
inline void model_fence() {}
inline void model_end() {}
inline unsigned model_atomic_add(unsigned* at, unsigned x) {
    const unsigned before = *at;
    *at += x;
    return before;
}
inline void model_read_only(const void*, size_t) {}
#endif

namespace shim {

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "host shim: %s\n", what);
    std::abort();
}

// Where threads wait for each other: the last to come opens it.
struct Barrier {
    unsigned generation = 0;
    int arrived = 0;
};

struct Warp {
    Barrier barrier;
    uint32_t slot[2][32][12];  // what each lane shows the others; two, so that one wait an exchange is enough
};

struct Block {
    dim3 index;
    int threads = 0;
    Barrier barrier;
    std::vector<Warp> warps;
    std::unique_ptr<uint4[]> shared;
};

struct Fiber {
    Block* block = nullptr;
    dim3 thread;
    bool started = false, done = false, spins = false;
    const unsigned* watched = nullptr;  // runs again when this is no more `seen`
    unsigned seen = 0, exchanges = 0;
    ucontext_t context;
    jmp_buf resume;
    char* stack = nullptr;
};

constexpr size_t kStack = 128 * 1024;
constexpr long kMaxIdleSweeps = 1000;  // turns of all warps in which all that ran only looked again

struct Machine {
    Fiber* current = nullptr;
    ucontext_t scheduler;
    jmp_buf scheduler_resume;
    void* fake_stack = nullptr;  // ASan's, of the scheduler
    const void* scheduler_bottom = nullptr;
    size_t scheduler_size = 0;
    std::function<void()> body;
    dim3 grid, block_size;
    unsigned order = 0;  // 0: one after another; else a seed
    std::mt19937 random;
    std::vector<char*> stacks;  // kept from launch to launch
    ~Machine() {
        for (char* stack : stacks) std::free(stack);
    }
};

// Not inline, as `kernels` below: libraries that a process loads side by side would share one.
static Machine machine;

#ifdef SHIM_ASAN
inline void to_scheduler(bool for_ever = false) {
    Fiber* fiber = machine.current;
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &fake, machine.scheduler_bottom, machine.scheduler_size);
    swapcontext(&fiber->context, &machine.scheduler);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}
inline void to_fiber(Fiber* fiber) {
    __sanitizer_start_switch_fiber(&machine.fake_stack, fiber->stack, kStack);
    swapcontext(&machine.scheduler, &fiber->context);
    __sanitizer_finish_switch_fiber(machine.fake_stack, nullptr, nullptr);
}
inline void entered() { __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_bottom, &machine.scheduler_size); }
#else
// swapcontext makes a system call; once a fiber has begun, a jump does.
inline void to_scheduler(bool = false) {
    if (!_setjmp(machine.current->resume)) _longjmp(machine.scheduler_resume, 1);
}
inline void to_fiber(Fiber* fiber) {
    if (_setjmp(machine.scheduler_resume)) return;
    if (fiber->started) _longjmp(fiber->resume, 1);
    fiber->started = true;
    setcontext(&fiber->context);
}
inline void entered() {}
#endif

inline void fiber_main() {
    entered();
    machine.body();
    machine.current->done = true;
    to_scheduler(true);
}

__attribute__((noinline)) inline void prepare(Fiber& fiber) {  // getcontext returns twice: it wants a frame of its own
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
}

inline void wait_at(Barrier& barrier, int members) {
    Fiber* fiber = machine.current;
    if (++barrier.arrived == members) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    fiber->watched = &barrier.generation;
    fiber->seen = barrier.generation;
    to_scheduler();
}

inline void run_blocks(std::vector<Block>& blocks) {
    std::vector<Fiber> fibers;
    const unsigned threads = machine.block_size.x;
    fibers.resize(blocks.size() * threads);
    while (machine.stacks.size() < fibers.size()) machine.stacks.push_back(static_cast<char*>(std::malloc(kStack)));
    for (size_t i = 0; i < fibers.size(); ++i) {
        Fiber& fiber = fibers[i];
        fiber.block = &blocks[i / threads];
        fiber.thread = dim3(i % threads, 0, 0);
        fiber.stack = machine.stacks[i];
        prepare(fiber);
    }
    size_t left = fibers.size();
    std::vector<size_t> warps(fibers.size() / 32);
    for (size_t i = 0; i < warps.size(); ++i) warps[i] = i;
    // One turn of a warp: each of its threads runs until it waits. Returns whether one got on; one that spins does not.
    const auto turn = [&](size_t warp, bool backwards, bool& ran) {
        bool progress = false;
        for (size_t i = 0; i < 32; ++i) {
            Fiber& fiber = fibers[warp * 32 + (backwards ? 31 - i : i)];
            if (fiber.done || (fiber.watched && *fiber.watched == fiber.seen)) continue;
            fiber.watched = nullptr;
            fiber.spins = false;
            machine.current = &fiber;
            model_switch(static_cast<int>(fiber.block - blocks.data()));
            to_fiber(&fiber);
            ran = true;
            progress |= !fiber.spins;
            left -= fiber.done;
        }
        return progress;
    };
    for (long idle = 0; left;) {
        bool ran = false, skipped = false, progress = false;
        if (machine.order) std::shuffle(warps.begin(), warps.end(), machine.random);
        for (size_t warp : warps) {
            if (!machine.order) {
                progress |= turn(warp, false, ran);
            } else if (machine.random() % 2) {
                skipped = true;
            } else {  // this one alone, as far as it can get
                while (turn(warp, machine.random() % 2, ran)) progress = true;
            }
        }
        if (!ran && !skipped) fail("deadlock: threads wait at a barrier or shuffle that others have passed by or left");
        idle = progress ? 0 : idle + 1;
        if (idle > kMaxIdleSweeps) fail("threads spin for ever");
    }
    for (const Block& block : blocks) {
        if (block.barrier.arrived) fail("a block ended with threads at a barrier");
    }
}

inline void run_grid(dim3 grid, dim3 block_size, size_t shared, bool together, std::function<void()> body) {
    if (block_size.x % 32 || block_size.y != 1 || block_size.z != 1) fail("blocks are whole warps, in one dimension");
    if (shared > 48 * 1024) fail("more shared memory than a block gets without asking");
    machine.grid = grid, machine.block_size = block_size, machine.body = std::move(body);
    const size_t count = size_t(grid.x) * grid.y * grid.z, words = (shared + 15) / 16;
    std::vector<Block> blocks;
    model_begin(static_cast<int>(count), together);
    for (size_t i = 0; i < count; ++i) {
        const size_t at = machine.order % 2 && !together ? count - 1 - i : i;
        Block block;
        block.index = dim3(at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y);
        block.warps = std::vector<Warp>(block_size.x / 32);
        block.shared.reset(new uint4[words]);
        std::memset(block.shared.get(), 0xff, words * 16);
        blocks.push_back(std::move(block));
        if (!together || i + 1 == count) {
            run_blocks(blocks);
            blocks.clear();
        }
    }
    model_end();
}

// What shim_launch can start, by name; `host.py` writes a Kernel for each that a plan may name.
static std::map<std::string, std::function<void(const void*)>> kernels;

struct Kernel {
    template <class P>
    Kernel(const char* name, void (*kernel)(P)) {
        kernels[name] = [kernel](const void* params) { kernel(*static_cast<const P*>(params)); };
    }
};

// Every lane shows its words and gets a view of all lanes'.
inline const uint32_t (*exchange(const uint32_t* words, int count))[12] {
    Fiber* fiber = machine.current;
    Warp& warp = fiber->block->warps[fiber->thread.x / 32];
    uint32_t(*slot)[12] = warp.slot[fiber->exchanges++ % 2];
    std::memcpy(slot[fiber->thread.x % 32], words, count * 4);
    wait_at(warp.barrier, 32);
    return slot;
}

inline float half_to_float(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float size;
    if (exponent == 31) {
        size = fraction ? NAN : INFINITY;
    } else {
        size = exponent ? std::ldexp(float(1024 + fraction), exponent - 25) : std::ldexp(float(fraction), -24);
    }
    return std::copysign(size, bits & 0x8000 ? -1.0f : 1.0f);
}

inline uint16_t float_to_half(float x) {  // to nearest even: ldexp and nearbyint are exact and round so
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const float size = std::fabs(x);
    if (std::isnan(x)) return 0x7fff;
    if (size >= 65520.0f) return sign | 0x7c00;
    if (size == 0.0f) return sign;
    int exponent;
    std::frexp(size, &exponent);                     // size = [0.5, 1) * 2^exponent
    const int unit = std::max(exponent - 11, -24);   // of the last place
    const int steps = int(std::nearbyint(std::ldexp(size, -unit)));
    return sign | uint16_t(steps + (unit > -24 ? (unit + 24) * 1024 : 0));
}

}  // namespace shim

#define threadIdx (shim::machine.current->thread)
#define blockIdx (shim::machine.current->block->index)
#define gridDim (shim::machine.grid)
#define DYNAMIC_SHARED(name) uint4* name = shim::machine.current->block->shared.get()

inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline void __syncthreads() { shim::wait_at(shim::machine.current->block->barrier, shim::machine.block_size.x); }
inline void __threadfence() { model_fence(); }
inline unsigned atomicAdd(unsigned* at, unsigned x) { return model_atomic_add(at, x); }
inline unsigned __shfl_xor_sync(unsigned mask, unsigned x, int apart) {
    if (mask != 0xffffffffu) shim::fail("a shuffle of part of a warp");
    const int lane = threadIdx.x % 32;
    return shim::exchange(&x, 1)[lane ^ apart][0];
}
inline float __shfl_xor_sync(unsigned mask, float x, int apart) {
    return __uint_as_float(__shfl_xor_sync(mask, __float_as_uint(x), apart));
}

// ---- The instructions that the kernels use by name.

namespace {

inline float to_float(Half x) { return shim::half_to_float(x.bits); }
inline float to_float(Bfloat x) { return __uint_as_float(unsigned(x.bits) << 16); }
inline Half round_to(float x, Half) { return {shim::float_to_half(x)}; }
inline Bfloat round_to(float x, Bfloat) {
    const unsigned bits = __float_as_uint(x);
    if (x != x) return {0x7fff};
    const unsigned cut = bits & 0xffff, up = cut > 0x8000 || (cut == 0x8000 && bits >> 16 & 1);
    return {uint16_t((bits >> 16) + up)};
}
inline float max_nan(float a, float b) {  // the larger of zeros is +0
    if (a != a || b != b) return NAN;
    return a > b || (a == b && !std::signbit(a)) ? a : b;
}
template <class T>
inline unsigned max_nan(unsigned a, unsigned b, T type) {
    const auto larger = [&](unsigned a, unsigned b) {
        return round_to(max_nan(to_float(T{uint16_t(a)}), to_float(T{uint16_t(b)})), type).bits;
    };
    return larger(a & 0xffff, b & 0xffff) | unsigned(larger(a >> 16, b >> 16)) << 16;
}

inline uint4 load16(const void* from) {
    if (reinterpret_cast<size_t>(from) % 16) shim::fail("a load of 16 bytes off its alignment");
    uint4 raw;
    std::memcpy(&raw, from, 16);
    return raw;
}
inline uint4 load_input16(const void* from) {
    model_read_only(from, 16);
    return load16(from);
}
inline uint4 load_written16(const void* from) { return load16(from); }
inline void prefetch_l2(const void*) {}

template <class T>
inline void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], T) {
    const uint32_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const auto lanes = shim::exchange(words, 6);
    const auto number = [](uint32_t word, int k) { return to_float(T{uint16_t(k % 2 ? word >> 16 : word & 0xffff)}); };
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            const uint32_t x = lanes[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
            const uint32_t y = lanes[column * 4 + k % 8 / 2][4 + k / 8];
            d[i] += number(x, k) * number(y, k);
        }
    }
}

inline void wait_a_little() {
    shim::machine.current->spins = true;
    shim::to_scheduler();
}

}  // namespace

extern "C" void shim_order(unsigned order) {
    shim::machine.order = order;
    shim::machine.random.seed(order);
}
extern "C" void* shim_allocate(size_t bytes) {
    void* memory = std::malloc(bytes);
    model_allocated(memory, bytes);
    return memory;
}
extern "C" void shim_free(void* memory) {
    model_freed(memory);
    std::free(memory);
}

// `params` is what the kernel takes; 1: there is no kernel of that name.
extern "C" int shim_launch(const char* name, const unsigned* grid, unsigned threads, size_t shared, int together,
                           const void* params) {
    const auto found = shim::kernels.find(name);
    if (found == shim::kernels.end()) return 1;
    shim::run_grid(dim3(grid[0], grid[1], grid[2]), dim3(threads), shared, together, [&] { found->second(params); });
    return 0;
}

#endif
