// Runs stripe_pool_reduce.cu on a CPU, for its tests: blocks one after another (all at once in a cooperative launch),
// the threads of a block as fibers that are switched where CUDA's threads wait: at __syncthreads, at a shuffle, at an
// mma. A launch that may overlap the one before does so as much as it may: when the last block of the one before has let
// it start, some of its blocks run until they wait, or to their end where they do not, before that one goes on.
//
// What it finds: wrong indexes and borders (with ASan, on shared memory of exactly the asked size), loads of 16 bytes
// off their alignment, barriers and shuffles that not all threads reach, arithmetic. Shared memory begins as NaN.
// With shim_order warps take turns at random, some running far ahead of others, which a missing barrier shows by
// other results. With MGN_MEMORY_MODEL blocks see no more of each other than fences make them (memory_model.cpp). What
// it cannot find: races inside a warp, missing fences inside a block, how fast anything is. An mma here adds its
// products in float32 one after another; the hardware's order is its own.
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

struct Launch {
    dim3 grid, block_size;
    size_t words;  // of 16 bytes, of shared memory
    int together, programmatic;
    unsigned cluster;
    std::function<void()> body;
};

struct Block {
    const Launch* launch;
    dim3 index;
    bool started = false;
    Barrier barrier;
    Block* cluster = nullptr;  // its first block, which has the barrier of all
    Barrier cluster_barrier;
    std::vector<Warp> warps;
    std::unique_ptr<uint4[]> shared;

    Block(const Launch& launch, size_t at) : launch(&launch), warps(launch.block_size.x / 32) {
        const dim3 grid = launch.grid;
        index = dim3(at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y);
        shared.reset(new uint4[launch.words]);
    }
};

struct Fiber {
    Block* block = nullptr;
    dim3 thread;
    bool started = false, done = false, spins = false, let_start = false;
    const unsigned* watched = nullptr;  // runs again when this is no more `seen`
    unsigned seen = 0, exchanges = 0;
    ucontext_t context;
    jmp_buf resume;
    char* stack = nullptr;
};

constexpr size_t kStack = 128 * 1024;
constexpr size_t kEarlyBlocks = 8;     // of a launch, beside the one before
constexpr long kMaxIdleSweeps = 1000;  // turns of all warps in which all that ran only looked again

struct Machine {
    Fiber* current = nullptr;
    ucontext_t scheduler;
    jmp_buf scheduler_resume;
    void* fake_stack = nullptr;  // ASan's, of the scheduler
    const void* scheduler_bottom = nullptr;
    size_t scheduler_size = 0;
    std::vector<Launch> launches;  // what shim_finish is to run
    // Of two launches side by side: threads of the first that have not ended, or not let the second start.
    const Launch *first = nullptr, *second = nullptr;
    size_t running = 0, holding = 0;
    bool held = false;  // some of the first wait, for what the second can do without them
    unsigned second_starts = 0, first_ended = 0, first_goes_on = 0;  // what threads wait for, counting up
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
    machine.current->block->launch->body();
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

inline void wait_for(const unsigned& count) {
    machine.current->watched = &count;
    machine.current->seen = count;
    to_scheduler();
}

inline void wait_at(Barrier& barrier, int members) {
    if (++barrier.arrived == members) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    wait_for(barrier.generation);
}

inline void let_start(Fiber& fiber) {
    if (fiber.block->launch != machine.first || fiber.let_start) return;
    fiber.let_start = true;
    if (--machine.holding == 0) ++machine.second_starts;
}

inline void run_blocks(std::vector<Block>& blocks) {
    size_t threads = 0, i = 0;
    for (const Block& block : blocks) threads += block.launch->block_size.x;
    std::vector<Fiber> fibers(threads);
    while (machine.stacks.size() < threads) machine.stacks.push_back(static_cast<char*>(std::malloc(kStack)));
    machine.first = blocks.front().launch, machine.second = blocks.back().launch;
    if (machine.first == machine.second) machine.first = machine.second = nullptr;
    machine.running = 0;
    for (Block& block : blocks) {
        block.cluster = &block - block.index.x % block.launch->cluster;
        for (unsigned thread = 0; thread < block.launch->block_size.x; ++thread, ++i) {
            Fiber& fiber = fibers[i];
            fiber.block = &block;
            fiber.thread = dim3(thread, 0, 0);
            fiber.stack = machine.stacks[i];
            machine.running += block.launch == machine.first;
            if (machine.first && block.launch == machine.second) {
                fiber.watched = &machine.second_starts, fiber.seen = machine.second_starts;
            }
            prepare(fiber);
        }
    }
    machine.holding = machine.running;
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
            if (!fiber.block->started) {
                fiber.block->started = true;
                std::memset(fiber.block->shared.get(), 0xff, fiber.block->launch->words * 16);
            }
            to_fiber(&fiber);
            ran = true;
            progress |= !fiber.spins;
            left -= fiber.done;
            if (fiber.done && fiber.block->launch == machine.first) {
                let_start(fiber);
                if (--machine.running == 0) ++machine.first_ended;
            }
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
        if (!progress && machine.held) {
            machine.held = false;
            ++machine.first_goes_on;
            continue;
        }
        if (!ran && !skipped) fail("deadlock: threads wait at a barrier or shuffle that others have passed by or left");
        idle = progress ? 0 : idle + 1;
        if (idle > kMaxIdleSweeps) fail("threads spin for ever");
    }
    for (const Block& block : blocks) {
        if (block.barrier.arrived) fail("a block ended with threads at a barrier");
    }
}

// A launch and those after it that may overlap it.
inline void run_launches() {
    std::vector<Launch>& launches = machine.launches;
    const auto size = [](const Launch& launch) { return size_t(launch.grid.x) * launch.grid.y * launch.grid.z; };
    model_begin(static_cast<int>(size(launches.front())), launches.front().together);
    size_t begun = 0;  // blocks of a launch that ran beside the one before
    for (const Launch& launch : launches) {
        const size_t count = size(launch), group = launch.together ? count : launch.cluster;
        const Launch* next = &launch == &launches.back() ? nullptr : &launch + 1;
        for (size_t i = begun; i < count; i += group) {
            std::vector<Block> blocks;
            const auto add = [&](const Launch& of, size_t at, size_t group) {
                const size_t first = machine.order % 2 ? size(of) - at - group : at;
                for (size_t k = 0; k < group; ++k) blocks.emplace_back(of, first + k);
            };
            add(launch, i, group);
            if (i + group == count) {
                begun = 0;
                // One group of the next is left for the launch after that to run beside.
                const size_t all = !next ? 0 : size(*next) - (next == &launches.back() ? 0 : next->cluster);
                for (; begun < std::min(all, kEarlyBlocks); begun += next->cluster) add(*next, begun, next->cluster);
            }
            run_blocks(blocks);
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
#define gridDim (shim::machine.current->block->launch->grid)
#define blockDim (shim::machine.current->block->launch->block_size)
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
inline void __syncthreads() { shim::wait_at(shim::machine.current->block->barrier, blockDim.x); }
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
inline float load_input(const float* from) {
    model_read_only(from, 4);
    return *from;
}
inline void prefetch_l2(const void*) {}

inline void let_next_launch_start() {
    shim::let_start(*shim::machine.current);
    if (shim::machine.current->block->launch != shim::machine.first) return;
    shim::machine.held = true;
    shim::wait_for(shim::machine.first_goes_on);
}
inline void wait_for_launch_before() {
    const bool overlaps = shim::machine.current->block->launch == shim::machine.second && shim::machine.running;
    if (overlaps) shim::wait_for(shim::machine.first_ended);
}
inline void cluster_sync() {
    const shim::Block* block = shim::machine.current->block;
    shim::wait_at(block->cluster->cluster_barrier, block->launch->cluster * blockDim.x);
}
inline void store_in_cluster(float* at, unsigned rank, float x) {  // lost where that block has not started
    shim::Block* block = shim::machine.current->block;
    const size_t offset = reinterpret_cast<char*>(at) - reinterpret_cast<char*>(block->shared.get());
    std::memcpy(reinterpret_cast<char*>(block->cluster[rank].shared.get()) + offset, &x, sizeof x);
}

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

extern "C" void shim_finish() {
    shim::run_launches();
    shim::machine.launches.clear();
}

// `params` is what the kernel takes, and lives until shim_finish; 1: there is no kernel of that name.
extern "C" int shim_launch(const char* name, const unsigned* grid, unsigned threads, size_t shared, int together,
                           int programmatic, unsigned cluster, const void* params) {
    const auto found = shim::kernels.find(name);
    if (found == shim::kernels.end()) return 1;
    if (threads % 32) shim::fail("blocks are whole warps");
    if (shared > 48 * 1024) shim::fail("more shared memory than a block gets without asking");
    if (grid[0] % cluster) shim::fail("a grid is whole clusters");
    if (!programmatic && !shim::machine.launches.empty()) shim_finish();
    shim::machine.launches.push_back({dim3(grid[0], grid[1], grid[2]), dim3(threads), (shared + 15) / 16, together,
                                      programmatic, cluster, [found, params] { found->second(params); }});
    return 0;
}

#endif
