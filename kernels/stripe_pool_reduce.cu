// Stripe-pool-reduce: the heads of an MGN (section 3.1 of Wang et al. 2018), from the branches' last maps to features
// or unit embeddings. `tests/emulator/reference.py` is the definition; `kernels/plan.py` says which of these kernels run
// for a problem, over what grids and with which Params; `kernels/nvrtc.py` compiles and launches them. `tests/emulator`
// runs them on a CPU.
//
//   map of branch b              pooled                  partial                     output
//   [n, C, H, W] or              [F, n, C]               [splits, n, F * R]          [n or n / 2, F * R]
//   [n, H, W, C]                 16 bit: maxima are      float32
//                                exact; else float32
//   +--------+  run 0 \                 weight [F, R, C]          bias, scale, shift [F, R]
//   |........|  run 1  } -> region 0 = whole map  --*-- dot over C --+-- neck -- mirror average -- L2 norm
//   |........|  run 2 /     region 1 = runs 0..1  --*--  products    |
//   +--------+              region 2 = runs 1..2  --*--              |
//          pool                                 reduce             epilogue
//
// A run is a range of rows that no stripe's border cuts. Stripes that share a row (H not divisible by their number)
// share a run, so every pixel is read once, whatever the cut; a generalised mean, whose power is each region's own,
// has a run for each region and reads twice. In both layouts a run of rows of one channel (or one group of channels)
// is one range of pixels, so H and W matter nowhere below but as the product.
//
// The three steps are three launches (TILES, ROWS) or the three phases of one cooperative launch (FUSED): at a batch
// of one or two the launches would cost more than the work, by estimate. AUTO takes FUSED up to 8 images; where another
// path overtakes it is not measured. From 9.0 the three launches overlap: a step's blocks start, and bring what no step
// writes nearer, while the last of the step before run. Nothing is summed by atomics: every sum has a fixed order, the
// results of a plan are the same bits on every run. The only atomic counts arrivals at FUSED's barrier.
//
// Sizes, and why (times on a device are estimates; SASS, registers and a CPU's simulation are what was looked at):
//   pool, NHWC   64 channels x 32 pixels a step of a block of 256 threads. A thread takes an octet, 8 channels: the
//                 granularity that C has, and 16 bytes of a 16-bit map. 8 octets side by side are a whole 128-byte
//                 line of 16-bit values; wider tiles would leave a batch of one with too few blocks (96 of them at
//                 2048 channels and 3 branches). A thread loads up to 64 bytes before it uses any: 4 steps, 128 pixels
//                 a block, of a 16-bit map, as long as the run has them (64 in the paper's branch 3, 96 in branch 2).
//   pool, NCHW   8 threads a channel, 32 channels a block: a run of the paper's 24x8 map, 64 values, is 8 loads of 16
//                 bytes of a 16-bit map, one a thread (two of float32). The 8 threads also hold the (up to) 8 stripes,
//                 one each.
//   rows         a warp a row of the weights, all (<= 8) images at once: the weights are read once, and to 4 images
//                 they are most of the bytes (in 16 bits 8.4 MB; an image's maps are 1.77 MB). A thread has up to 4
//                 loads of 16 bytes of weights under way, then an octet of every image, from L2.
//   tiles        64 images x 64 outputs x 64 channels (16 with plain multiply-adds) a step. 64 images are a batch of
//                 32 with its mirrors. Small tiles and split-K (`splits` parts of the sum over channels, a block each,
//                 added by the epilogue) keep every SM busy at such batches: the paper's MGN has 32 tiles of 64
//                 outputs, an H100 132 SMs. A warp has 32 x 32 of a tile, 32 accumulators a thread. Float32's plain
//                 multiply-adds are a phase of their own after the pool: by structure it cannot come to 85% of the
//                 copy bandwidth, however fast the pool is.
//   epilogue     256 threads a row of the output, 8 columns a thread: the paper's 2048 numbers stay in registers for
//                 the norm. They are one block, or where rows are few and the device has clusters 2 or 4 on as many
//                 SMs; each sum's order is the same. What counts is how often it waits for L2: an image's and its
//                 mirror's partial sums of 4 splits, 64 loads, go out together. Loads of 4 bytes side by side are whole
//                 lines as those of 16 would be, and bias and output need no alignment.

namespace {

// `kernels/plan.py` has the same numbers, names and structures; the build for the emulator compares them.
enum Layout { kNchw, kNhwc };
enum Pooling { kMax, kAvg, kGem };
enum Neck { kRelu, kLinear, kReluNorm };
enum Output { kFeatures, kEmbeddings, kMirrorEmbeddings };

constexpr int kMaxBranches = 4, kMaxStripes = 8;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTileChannels[2] = {32, 64};  // of the pool, NCHW and NHWC
constexpr int kMaxRegions = 1 + kMaxStripes;
constexpr int kMaxRuns = 2 * kMaxStripes - 1;  // 2N different borders at most
constexpr int kMaxImages = 8;                  // that the small-batch reduction takes
constexpr int kTile = 64;
constexpr int kMmaThreads = 128, kMmaDepth = 64, kMmaStride = kMmaDepth + 8;  // + 8: fragments from 32 different banks
constexpr int kFmaDepth = 16, kFmaStride = kTile + 4;
constexpr int kColumns = 8;           // of an output's row, in a thread's registers
constexpr float kGemEpsilon = 1e-6f;  // mgn_deploy/config.py
constexpr float kNormEpsilon = 1e-12f;

struct Half { unsigned short bits; };
struct Bfloat { unsigned short bits; };

// What a kernel is told, its only argument. Pointers are of the type that the kernel is for.
struct Branch {
    const void* map;
    int pixels;  // H * W
    int first_feature;
    int regions, runs;
    int run_begin[kMaxRuns], run_end[kMaxRuns];            // pixels
    int region_begin[kMaxRegions], region_end[kMaxRegions];  // runs
    int region_pixels[kMaxRegions];
};

struct Params {
    Branch branch[kMaxBranches];
    const void* weight;
    const float *bias, *scale, *shift, *power;
    unsigned* barrier;
    void* pooled;
    float* partial;
    void* output;
    int branches, batch, channels, reduced, features;
    int neck, output_kind;
    int channel_tiles, pool_items;  // blocks of the pool: image, branch, tile
    int splits, depth;
};

}  // namespace

// The instructions that C++ has no name for. The emulator's header has the same ones in plain C++; all else is shared.
#ifdef MGN_HOST_SHIM
#include "host_shim.h"
#else
#define DYNAMIC_SHARED(name) extern __shared__ uint4 name[]

namespace {

__device__ __forceinline__ float to_float(Half x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

__device__ __forceinline__ float to_float(Bfloat x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

__device__ __forceinline__ Half round_to(float x, Half) {
    Half y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

__device__ __forceinline__ Bfloat round_to(float x, Bfloat) {  // to nearest even; the instruction needs 8.0
    const unsigned bits = __float_as_uint(x);
    const unsigned rounded = bits + 0x7fffu + (bits >> 16 & 1u);
    return Bfloat{static_cast<unsigned short>(x == x ? rounded >> 16 : 0x7fffu)};
}

// Maximum that is NaN where one of them is, as torch's and NumPy's.
__device__ __forceinline__ float max_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
#else
    return a != a || a > b ? a : b;
#endif
}

// The same of both numbers of two words. From 8.0 the larger of zeros is +0 and a NaN comes out with all bits but the
// sign set, here as above; before, the second of equals is taken, and a NaN as it is.
__device__ __forceinline__ unsigned max_nan(unsigned a, unsigned b, Half) {
    unsigned y;
#if __CUDA_ARCH__ >= 800
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
#else
    unsigned nan;
    asm("set.gt.u32.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));  // masks
    asm("set.nan.u32.f16x2 %0, %1, %1;" : "=r"(nan) : "r"(a));
    y = (a & (y | nan)) | (b & ~(y | nan));
#endif
    return y;
}

__device__ __forceinline__ unsigned max_nan(unsigned a, unsigned b, Bfloat) {
#if __CUDA_ARCH__ >= 800
    unsigned y;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
#else
    const float low = max_nan(__uint_as_float(a << 16), __uint_as_float(b << 16));
    const float high = max_nan(__uint_as_float(a & 0xffff0000u), __uint_as_float(b & 0xffff0000u));
    return __float_as_uint(low) >> 16 | __float_as_uint(high);
#endif
}

// 16 bytes of what no kernel writes (ld.global.nc), and of what an earlier phase wrote (ld.global).
__device__ __forceinline__ uint4 load_input16(const void* from) { return __ldg(static_cast<const uint4*>(from)); }
__device__ __forceinline__ uint4 load_written16(const void* from) { return *static_cast<const uint4*>(from); }

// A line of 128 bytes to L2.
__device__ __forceinline__ void prefetch_l2(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// From 9.0, between launches that may overlap: the next one's blocks may start once all of this one's have come here or
// ended; and the one before has ended and what it wrote is seen. Both do nothing where the launches are plain.
__device__ __forceinline__ void let_next_launch_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Of a cluster, from 9.0; before, a cluster is one block. All its threads wait for each other; a store to the same spot
// of its block `rank`, which has to have started.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.aligned;\n barrier.cluster.wait.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}
__device__ __forceinline__ void store_in_cluster(float* at, unsigned rank, float x) {
#if __CUDA_ARCH__ >= 900
    unsigned there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(there) : "r"(static_cast<unsigned>(__cvta_generic_to_shared(at))), "r"(rank));
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(x) : "memory");
#else
    *at = x;
#endif
}

// d += a * b for tiles of 16x16 and 16x8: thread t of a warp has rows t / 4 and t / 4 + 8 of a and d, and column
// t / 4 of b.
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Half) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b[0]));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[2]), "r"(a[3]), "r"(b[1]));
#endif
}

__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Bfloat) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap();  // the plan has no tensor cores for bfloat16 there
#endif
}

__device__ __forceinline__ void wait_a_little() {}

}  // namespace
#endif

namespace {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float round_to(float x, float) { return x; }

__device__ __forceinline__ void unpack(unsigned word, float* x, Half) {
    x[0] = to_float(Half{static_cast<unsigned short>(word & 0xffffu)});
    x[1] = to_float(Half{static_cast<unsigned short>(word >> 16)});
}

__device__ __forceinline__ void unpack(unsigned word, float* x, Bfloat) {
    x[0] = __uint_as_float(word << 16);
    x[1] = __uint_as_float(word & 0xffff0000u);
}

__device__ __forceinline__ unsigned minus_infinities(Half) { return 0xfc00fc00u; }
__device__ __forceinline__ unsigned minus_infinities(Bfloat) { return 0xff80ff80u; }

// The numbers in 16 bytes: 4 or 8.
__device__ __forceinline__ void unpack(const uint4& raw, float* x, float) {
    x[0] = __uint_as_float(raw.x), x[1] = __uint_as_float(raw.y);
    x[2] = __uint_as_float(raw.z), x[3] = __uint_as_float(raw.w);
}

template <class T>
__device__ __forceinline__ void unpack(const uint4& raw, float* x, T type) {
    unpack(raw.x, x, type), unpack(raw.y, x + 2, type), unpack(raw.z, x + 4, type), unpack(raw.w, x + 6, type);
}

// 8 neighbours in memory as they come: one load of 16 bytes, two for float.
template <class T>
struct Octet {
    static constexpr int kLoads = sizeof(T) * 8 / 16;
    uint4 raw[kLoads];

    __device__ __forceinline__ void load_input(const T* from) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) raw[i] = load_input16(from + i * 8 / kLoads);
    }
    __device__ __forceinline__ void load_written(const T* from) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) raw[i] = load_written16(from + i * 8 / kLoads);
    }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) raw[i] = make_uint4(0, 0, 0, 0);
    }
    __device__ __forceinline__ void numbers(float (&x)[8]) const {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) unpack(raw[i], x + i * 8 / kLoads, T{});
    }
};

// A pooling: where an accumulator starts, a pixel added to it, two of them joined, and what is stored, in which type. A
// Sum accumulates kNumbers numbers: two where they are maxima of 16-bit numbers, which need no wider type.
template <class T, int POOLING>
struct Pool;

template <class T>
struct Pool<T, kMax> {
    using Stored = T;  // a maximum is one of the map's numbers
    using Sum = unsigned;
    static constexpr int kNumbers = 2;  // never converted, and half the instructions, shuffles and shared memory
    static __device__ __forceinline__ unsigned start() { return minus_infinities(T{}); }
    static __device__ __forceinline__ unsigned join(unsigned a, unsigned b) { return max_nan(a, b, T{}); }
    static __device__ __forceinline__ unsigned stored(unsigned sum, int, float) { return sum; }
};

struct FloatPool {
    using Stored = float;
    using Sum = float;
    static constexpr int kNumbers = 1;
    static __device__ __forceinline__ float start() { return 0.0f; }
    static __device__ __forceinline__ float join(float a, float b) { return a + b; }
};

template <>
struct Pool<float, kMax> : FloatPool {
    static __device__ __forceinline__ float start() { return __uint_as_float(0xff800000u); }  // -inf
    static __device__ __forceinline__ float add(float sum, float x, float) { return max_nan(sum, x); }
    static __device__ __forceinline__ float join(float a, float b) { return max_nan(a, b); }
    static __device__ __forceinline__ float stored(float sum, int, float) { return sum; }
};

template <class T>
struct Pool<T, kAvg> : FloatPool {
    static __device__ __forceinline__ float add(float sum, float x, float) { return sum + x; }
    static __device__ __forceinline__ float stored(float sum, int pixels, float) { return sum / pixels; }
};

template <class T>
struct Pool<T, kGem> : FloatPool {
    static __device__ __forceinline__ float add(float sum, float x, float power) {
        return sum + powf(max_nan(x, kGemEpsilon), power);
    }
    static __device__ __forceinline__ float stored(float sum, int pixels, float power) {
        return powf(sum / pixels, 1.0f / power);
    }
};

// 8 channels of a pixel to the sums of each.
template <class P, class T>
__device__ __forceinline__ void add_pixel(typename P::Sum (&sum)[8 / P::kNumbers], const Octet<T>& octet, float power) {
    if constexpr (P::kNumbers == 2) {
        const uint4 x = octet.raw[0];
        sum[0] = P::join(sum[0], x.x), sum[1] = P::join(sum[1], x.y);
        sum[2] = P::join(sum[2], x.z), sum[3] = P::join(sum[3], x.w);
    } else {
        float x[8];
        octet.numbers(x);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[j] = P::add(sum[j], x[j], power);
    }
}

// 16 bytes of one channel's pixels to its sum; of a Sum of two, each takes every other pixel.
template <class P, class T>
__device__ __forceinline__ typename P::Sum add_pixels(typename P::Sum sum, const uint4& x, float power) {
    if constexpr (P::kNumbers == 2) {
        return P::join(P::join(sum, P::join(x.x, x.y)), P::join(x.z, x.w));
    } else {
        float numbers[16 / sizeof(T)];
        unpack(x, numbers, T{});
#pragma unroll
        for (float number : numbers) sum = P::add(sum, number, power);
        return sum;
    }
}

// Loads of 16 bytes that a thread of the pool has under way. A generalised mean waits for its powers, not for memory,
// and each one unrolled takes registers.
template <int POOLING>
constexpr int kLoadsAhead = POOLING == kGem ? 1 : 4;

// ---- Pool: one block, one image, one branch, one tile of channels; all regions of it.

template <class T, int POOLING>
__device__ __forceinline__ void pool_nhwc(const Params& p, int item, void* memory) {
    using P = Pool<T, POOLING>;
    using Sum = typename P::Sum;
    constexpr int kTileC = kTileChannels[kNhwc], kPixels = kThreads / (kTileC / 8);
    constexpr int kSums = 8 / P::kNumbers, kTileSums = kTileC / P::kNumbers;
    constexpr int kAhead = (kLoadsAhead<POOLING> + Octet<T>::kLoads - 1) / Octet<T>::kLoads;
    const int tile = item % p.channel_tiles, image = item / p.channel_tiles / p.branches;
    const Branch& branch = p.branch[item / p.channel_tiles % p.branches];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int octet = lane % 8;                // of the tile: neighbouring threads read neighbouring octets
    const int pixel = warp * 4 + lane / 8;     // of kPixels that the block reads at a time
    Sum* shared = static_cast<Sum*>(memory);   // [runs][warps][tile]
    const int channel = tile * kTileC + octet * 8;
    const T* map =
        static_cast<const T*>(branch.map) + static_cast<long long>(image) * branch.pixels * p.channels + channel;
    const long long step = static_cast<long long>(kPixels) * p.channels;

    Octet<T> ahead[kAhead];  // loads first, so that all of them are under way together
    int first = branch.run_begin[0] + pixel, end = channel < p.channels ? branch.run_end[0] : 0;
    const auto load = [&] {
        const T* from = map + static_cast<long long>(first) * p.channels;
#pragma unroll
        for (int i = 0; i < kAhead; ++i, from += step) {
            if (first + i * kPixels < end) ahead[i].load_input(from);
        }
    };
    load();
#pragma unroll 1
    for (int run = 0; run < branch.runs; ++run) {
        const float power = POOLING == kGem ? p.power[branch.first_feature + run] : 0.0f;
        Sum sum[kSums];
#pragma unroll
        for (int j = 0; j < kSums; ++j) sum[j] = P::start();
#pragma unroll 1
        while (first < end) {
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                if (first + i * kPixels < end) add_pixel<P>(sum, ahead[i], power);
            }
            first += kAhead * kPixels;
            if (first < end) load();
        }
        if (run + 1 < branch.runs) {  // the next run's loads go out before this one's shuffles
            first = branch.run_begin[run + 1] + pixel, end = channel < p.channels ? branch.run_end[run + 1] : 0;
            load();
        }
#pragma unroll
        for (int j = 0; j < kSums; ++j) {  // the warp's four pixels
            sum[j] = P::join(sum[j], __shfl_xor_sync(0xffffffffu, sum[j], 8));
            sum[j] = P::join(sum[j], __shfl_xor_sync(0xffffffffu, sum[j], 16));
        }
        if (lane < 8) {
            Sum* mine = shared + (run * kWarps + warp) * kTileSums + octet * kSums;
#pragma unroll
            for (int j = 0; j < kSums; ++j) mine[j] = sum[j];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < branch.regions * kTileSums; i += kThreads) {
        const int region = i / kTileSums, s = i % kTileSums, feature = branch.first_feature + region;
        Sum sum = P::start();
        for (int run = branch.region_begin[region]; run < branch.region_end[region]; ++run) {
#pragma unroll
            for (int w = 0; w < kWarps; ++w) sum = P::join(sum, shared[(run * kWarps + w) * kTileSums + s]);
        }
        const int c = tile * kTileC + s * P::kNumbers;
        if (c < p.channels) {
            const float power = POOLING == kGem ? p.power[feature] : 0.0f;
            const long long row = static_cast<long long>(feature) * p.batch + image;
            static_cast<Sum*>(p.pooled)[(row * p.channels + c) / P::kNumbers] =
                P::stored(sum, branch.region_pixels[region], power);
        }
    }
    __syncthreads();  // FUSED comes again with the same shared memory
}

// The share of one of 8 neighbouring threads in `length` numbers from `from`, which may begin and end off 16 bytes.
template <class T, int POOLING>
__device__ __forceinline__ typename Pool<T, POOLING>::Sum sum_range(const T* from, int length, int lane, float power) {
    using P = Pool<T, POOLING>;
    constexpr int kVector = 16 / sizeof(T), kAhead = kLoadsAhead<POOLING>;
    const int off = static_cast<int>(reinterpret_cast<size_t>(from) / sizeof(T) % kVector);
    const int head = min(length, (kVector - off) % kVector);
    const int vectors = (length - head) / kVector, tail = head + vectors * kVector;
    auto sum = P::start();
    const auto add_one = [&](T x) {
        if constexpr (P::kNumbers == 2) {
            sum = P::join(sum, x.bits * 0x10001u);
        } else {
            sum = P::add(sum, to_float(x), power);
        }
    };
    if (lane < head) add_one(from[lane]);
    if (tail + lane < length) add_one(from[tail + lane]);
#pragma unroll 1
    for (int first = lane; first < vectors; first += kAhead * 8) {
        uint4 ahead[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (first + i * 8 < vectors) ahead[i] = load_input16(from + head + (first + i * 8) * kVector);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (first + i * 8 < vectors) sum = add_pixels<P, T>(sum, ahead[i], power);
        }
    }
    return sum;
}

template <class T, int POOLING>
__device__ __forceinline__ void pool_nchw(const Params& p, int item) {
    using P = Pool<T, POOLING>;
    const int tile = item % p.channel_tiles, image = item / p.channel_tiles / p.branches;
    const Branch& branch = p.branch[item / p.channel_tiles % p.branches];
    const int lane = threadIdx.x % 8, channel = tile * kTileChannels[kNchw] + threadIdx.x / 8;
    const bool inside = channel < p.channels;
    const T* plane = static_cast<const T*>(branch.map) +
                     (static_cast<long long>(image) * p.channels + (inside ? channel : 0)) * branch.pixels;
    const int mine = 1 + lane;  // the stripe that this thread keeps; all of them keep the whole map
    const int begin = mine < branch.regions ? branch.region_begin[mine] : 0;
    const int end = mine < branch.regions ? branch.region_end[mine] : 0;
    auto whole = P::start(), stripe = P::start();
    for (int run = 0; run < branch.runs; ++run) {
        const float power = POOLING == kGem ? p.power[branch.first_feature + run] : 0.0f;
        const int length = inside ? branch.run_end[run] - branch.run_begin[run] : 0;
        auto sum = sum_range<T, POOLING>(plane + branch.run_begin[run], length, lane, power);
#pragma unroll
        for (int apart = 4; apart; apart /= 2) sum = P::join(sum, __shfl_xor_sync(0xffffffffu, sum, apart));
        if (run < branch.region_end[0]) whole = P::join(whole, sum);
        if (begin <= run && run < end) stripe = P::join(stripe, sum);
    }
    const auto store = [&](typename P::Sum sum, int region) {
        const int feature = branch.first_feature + region;
        const long long at = (static_cast<long long>(feature) * p.batch + image) * p.channels + channel;
        auto* pooled = static_cast<typename P::Stored*>(p.pooled);
        if constexpr (P::kNumbers == 2) {
            pooled[at] = T{static_cast<unsigned short>(P::join(sum, sum >> 16))};
        } else {
            const float power = POOLING == kGem ? p.power[feature] : 0.0f;
            pooled[at] = P::stored(sum, branch.region_pixels[region], power);
        }
    };
    if (inside && lane == 0) store(whole, 0);
    if (inside && mine < branch.regions) store(stripe, mine);
}

template <class T, int LAYOUT, int POOLING>
__device__ __forceinline__ void pool_item(const Params& p, int item, void* shared) {
    if constexpr (LAYOUT == kNhwc) {
        pool_nhwc<T, POOLING>(p, item, shared);
    } else {
        pool_nchw<T, POOLING>(p, item);
    }
}

template <class T, int LAYOUT, int POOLING>
__global__ void __launch_bounds__(kThreads) pool_kernel(const __grid_constant__ Params p) {
    DYNAMIC_SHARED(shared);
    let_next_launch_start();
    pool_item<T, LAYOUT, POOLING>(p, blockIdx.x, shared);
}

// Weights come to L2 while what they are multiplied by is still being made: `rows` of `width` channels, by thread
// `thread` of `threads`.
template <class T>
__device__ __forceinline__ void prefetch_weights(const Params& p, const T* weight, int rows, int width, int thread,
                                                 int threads) {
    constexpr int kLine = 128 / sizeof(T);
    const int lines = (width + kLine - 1) / kLine;
    for (int i = thread; i < rows * lines; i += threads) {
        prefetch_l2(weight + static_cast<long long>(i / lines) * p.channels + i % lines * kLine);
    }
}

// ---- Reduce, few images: one warp, one output (a feature's r) of every image.

template <class T>
__device__ __forceinline__ void prefetch_row(const Params& p, int output) {
    const T* weight = static_cast<const T*>(p.weight) + static_cast<long long>(output) * p.channels;
    prefetch_weights(p, weight, 1, p.channels, threadIdx.x % 32, 32);
}

template <class T, class P>
__device__ __forceinline__ void reduce_row(const Params& p, int output) {
    // P is T or wider, and is what takes registers: all images' octets at once.
    constexpr int kAhead = 4 / Octet<P>::kLoads;
    const int lane = threadIdx.x % 32, dim = p.features * p.reduced;
    const T* weight = static_cast<const T*>(p.weight) + static_cast<long long>(output) * p.channels;
    const int feature = output / p.reduced;
    const P* pooled = static_cast<const P*>(p.pooled) + static_cast<long long>(feature) * p.batch * p.channels;
    float sum[kMaxImages] = {};
#pragma unroll 1
    for (int first = lane * 8; first < p.channels; first += kAhead * 256) {
        Octet<T> ahead[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (first + i * 256 < p.channels) ahead[i].load_input(weight + first + i * 256);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (first + i * 256 >= p.channels) break;
            Octet<P> octet[kMaxImages];
#pragma unroll
            for (int image = 0; image < kMaxImages; ++image) {
                if (image < p.batch) octet[image].load_written(pooled + image * p.channels + first + i * 256);
            }
            float w[8];
            ahead[i].numbers(w);
#pragma unroll
            for (int image = 0; image < kMaxImages; ++image) {
                if (image < p.batch) {
                    float x[8];
                    octet[image].numbers(x);
#pragma unroll
                    for (int j = 0; j < 8; ++j) sum[image] = fmaf(x[j], w[j], sum[image]);
                }
            }
        }
    }
#pragma unroll
    for (int image = 0; image < kMaxImages; ++image) {
        if (image < p.batch) {
#pragma unroll
            for (int apart = 16; apart; apart /= 2) sum[image] += __shfl_xor_sync(0xffffffffu, sum[image], apart);
            if (lane == 0) p.partial[static_cast<long long>(image) * dim + output] = sum[image];
        }
    }
}

template <class T, class P>
__global__ void __launch_bounds__(kThreads) rows_kernel(const __grid_constant__ Params p) {
    const int output = blockIdx.x * kWarps + threadIdx.x / 32;  // F * R is a multiple of 16: every warp has one
    let_next_launch_start();
    prefetch_row<T>(p, output);
    wait_for_launch_before();
    reduce_row<T, P>(p, output);
}

// ---- Reduce, many images: block (x, y, z) does columns x, images y and feature z / splits over part z % splits of C.

// On tensor cores, pooled and weight of one 16-bit type. What comes next is loaded to registers during the products.
template <class T>
__global__ void __launch_bounds__(kMmaThreads) mma_kernel(const __grid_constant__ Params p) {
    constexpr int kOctets = kTile * (kMmaDepth / 8) / kMmaThreads;  // of each operand, a thread
    DYNAMIC_SHARED(shared);
    unsigned short* images = reinterpret_cast<unsigned short*>(shared);  // [64 images][72]
    unsigned short* outputs = images + kTile * kMmaStride;               // [64 outputs][72]
    const int feature = blockIdx.z / p.splits, split = blockIdx.z % p.splits;
    const int first_image = blockIdx.y * kTile, first_output = blockIdx.x * kTile;
    const int begin = split * p.depth, end = min(p.channels, begin + p.depth);
    const T* pooled = static_cast<const T*>(p.pooled) + static_cast<long long>(feature) * p.batch * p.channels;
    const T* weight = static_cast<const T*>(p.weight) + static_cast<long long>(feature) * p.reduced * p.channels;
    const int octet = threadIdx.x % 8 * 8, row = threadIdx.x / 8;  // of the tile; further rows are 16 apart
    const long long row_size = p.channels;
    let_next_launch_start();
    prefetch_weights(p, weight + static_cast<long long>(first_output) * p.channels + begin,
                     min(kTile, p.reduced - first_output), end - begin, threadIdx.x, kMmaThreads);
    wait_for_launch_before();

    Octet<T> next_image[kOctets], next_output[kOctets];
    const auto load = [&](int channel) {
        const int c = channel + octet;
#pragma unroll
        for (int i = 0; i < kOctets; ++i) {
            const int image = first_image + row + i * 16, output = first_output + row + i * 16;
            next_image[i].clear(), next_output[i].clear();
            if (c < end && image < p.batch) next_image[i].load_written(pooled + image * row_size + c);
            if (c < end && output < p.reduced) next_output[i].load_input(weight + output * row_size + c);
        }
    };

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_image = warp / 2 * 32, warp_output = warp % 2 * 32;
    float sum[2][4][4] = {};  // 32 images by 2 tiles of 16, 32 outputs by 4 tiles of 8
    load(begin);
    for (int channel = begin; channel < end; channel += kMmaDepth) {
#pragma unroll
        for (int i = 0; i < kOctets; ++i) {
            const int at = (row + i * 16) * kMmaStride + octet;
            *reinterpret_cast<uint4*>(images + at) = next_image[i].raw[0];
            *reinterpret_cast<uint4*>(outputs + at) = next_output[i].raw[0];
        }
        __syncthreads();
        if (channel + kMmaDepth < end) load(channel + kMmaDepth);
#pragma unroll
        for (int k = 0; k < kMmaDepth; k += 16) {
            unsigned a[2][4], b[4][2];
            const int column = k + lane % 4 * 2;
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                const unsigned short* at = images + (warp_image + m * 16 + lane / 4) * kMmaStride + column;
                a[m][0] = *reinterpret_cast<const unsigned*>(at);
                a[m][1] = *reinterpret_cast<const unsigned*>(at + 8 * kMmaStride);
                a[m][2] = *reinterpret_cast<const unsigned*>(at + 8);
                a[m][3] = *reinterpret_cast<const unsigned*>(at + 8 * kMmaStride + 8);
            }
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const unsigned short* at = outputs + (warp_output + n * 8 + lane / 4) * kMmaStride + column;
                b[n][0] = *reinterpret_cast<const unsigned*>(at);
                b[n][1] = *reinterpret_cast<const unsigned*>(at + 8);
            }
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int n = 0; n < 4; ++n) mma(sum[m][n], a[m], b[n], T{});
        }
        __syncthreads();
    }
    const int dim = p.features * p.reduced;
    float* partial = p.partial + static_cast<long long>(split) * p.batch * dim + feature * p.reduced;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int image = first_image + warp_image + m * 16 + lane / 4 + i / 2 * 8;
                const int output = first_output + warp_output + n * 8 + lane % 4 * 2 + i % 2;
                if (image < p.batch && output < p.reduced) {
                    partial[static_cast<long long>(image) * dim + output] = sum[m][n][i];
                }
            }
}

// With plain multiply-adds, for everything else: 256 threads, each 4 images by 4 outputs.
template <class T, class P>
__global__ void __launch_bounds__(kThreads) fma_kernel(const __grid_constant__ Params p) {
    DYNAMIC_SHARED(shared);
    float* images = reinterpret_cast<float*>(shared);  // [16 channels][68]: read as 4 images of one channel
    float* outputs = images + kFmaDepth * kFmaStride;  // [16 channels][68]
    const int feature = blockIdx.z / p.splits, split = blockIdx.z % p.splits;
    const int first_image = blockIdx.y * kTile, first_output = blockIdx.x * kTile;
    const int begin = split * p.depth, end = min(p.channels, begin + p.depth);
    const P* pooled = static_cast<const P*>(p.pooled) + static_cast<long long>(feature) * p.batch * p.channels;
    const T* weight = static_cast<const T*>(p.weight) + static_cast<long long>(feature) * p.reduced * p.channels;
    const bool for_images = threadIdx.x < kThreads / 2;  // half of the threads bring the images, half the outputs
    const int octet = threadIdx.x % 2 * 8, row = threadIdx.x / 2 % kTile;
    let_next_launch_start();
    prefetch_weights(p, weight + static_cast<long long>(first_output) * p.channels + begin,
                     min(kTile, p.reduced - first_output), end - begin, threadIdx.x, kThreads);
    wait_for_launch_before();

    float next[8];
    const auto load = [&](int channel) {
        const int c = channel + octet, image = first_image + row, output = first_output + row;
        if (for_images) {
            Octet<P> x;
            x.clear();
            if (c < end && image < p.batch) x.load_written(pooled + static_cast<long long>(image) * p.channels + c);
            x.numbers(next);
        } else {
            Octet<T> w;
            w.clear();
            if (c < end && output < p.reduced) w.load_input(weight + static_cast<long long>(output) * p.channels + c);
            w.numbers(next);
        }
    };

    const int my_image = threadIdx.x / 16 * 4, my_output = threadIdx.x % 16 * 4;
    float sum[4][4] = {};
    load(begin);
    for (int channel = begin; channel < end; channel += kFmaDepth) {
#pragma unroll
        for (int j = 0; j < 8; ++j) (for_images ? images : outputs)[(octet + j) * kFmaStride + row] = next[j];
        __syncthreads();
        if (channel + kFmaDepth < end) load(channel + kFmaDepth);
#pragma unroll
        for (int k = 0; k < kFmaDepth; ++k) {
            const float4 x = *reinterpret_cast<const float4*>(images + k * kFmaStride + my_image);
            const float4 w = *reinterpret_cast<const float4*>(outputs + k * kFmaStride + my_output);
            const float xs[4] = {x.x, x.y, x.z, x.w}, ws[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(xs[i], ws[j], sum[i][j]);
        }
        __syncthreads();
    }
    const int dim = p.features * p.reduced;
    float* partial = p.partial + static_cast<long long>(split) * p.batch * dim + feature * p.reduced;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int image = first_image + my_image + i, output = first_output + my_output + j;
            if (image < p.batch && output < p.reduced) {
                partial[static_cast<long long>(image) * dim + output] = sum[i][j];
            }
        }
}

// ---- Epilogue: one block, one row of the output; APART from FUSED also a cluster of 2 or 4, which share its threads.

// A thread's columns first, first + 256, ... of an image's reduced row, 0 beyond its end; where `mirror` is another
// image, of the average of both. Some splits are under way together, as a fixed array: with an exit from the loop over
// splits the compiler would wait for each before it loads the next.
template <bool APART>
__device__ __forceinline__ void reduced_values(const Params& p, int image, int mirror, int first,
                                               float (&value)[kColumns]) {
    constexpr int kAhead = APART ? 4 : 1;
    const int dim = p.features * p.reduced, images = mirror == image ? 1 : 2;
    float bias[kColumns] = {}, scale[kColumns] = {}, shift[kColumns] = {}, sum[2][kColumns] = {};
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        const int column = first + c * kThreads;
        if (column < dim) bias[c] = p.bias[column];
        if (column < dim && p.neck == kReluNorm) scale[c] = p.scale[column], shift[c] = p.shift[column];
    }
    if constexpr (APART) wait_for_launch_before();
#pragma unroll 1
    for (int split = 0; split < p.splits; split += kAhead) {
        float ahead[kAhead][2][kColumns] = {};
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const long long row = static_cast<long long>(split + i) * p.batch + (k ? mirror : image);
                const float* partial = p.partial + row * dim + first;
#pragma unroll
                for (int c = 0; c < kColumns; ++c) {
                    const bool there = split + i < p.splits && k < images && first + c * kThreads < dim;
                    if (there) ahead[i][k][c] = partial[c * kThreads];
                }
            }
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
#pragma unroll
            for (int k = 0; k < 2; ++k)
#pragma unroll
                for (int c = 0; c < kColumns; ++c) sum[k][c] += ahead[i][k][c];
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            sum[k][c] += bias[c];
            if (p.neck != kLinear) sum[k][c] = max_nan(sum[k][c], 0.0f);
            if (p.neck == kReluNorm) sum[k][c] = fmaf(sum[k][c], scale[c], shift[c]);
        }
        value[c] = images == 1 ? sum[0][c] : 0.5f * (sum[0][c] + sum[1][c]);
    }
}

template <class T, bool APART>
__device__ __forceinline__ void finish_row(const Params& p, int row, float* shared) {
    constexpr int kStep = kColumns * kThreads;
    const int dim = p.features * p.reduced, blocks = APART ? kThreads / blockDim.x : 1;
    const int mine = APART ? blockIdx.x % blocks * blockDim.x + threadIdx.x : threadIdx.x;  // of a row's kThreads
    const int mirror = p.output_kind == kMirrorEmbeddings ? row + p.batch / 2 : row;
    T* features = static_cast<T*>(p.output) + static_cast<long long>(row) * dim;
    float* embedding = static_cast<float*>(p.output) + static_cast<long long>(row) * dim;
    float value[kColumns] = {}, squares = 0.0f;
#pragma unroll 1
    for (int first = mine; first < dim; first += kStep) {
        reduced_values<APART>(p, row, mirror, first, value);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) squares = fmaf(value[c], value[c], squares);  // 0 beyond the row
        if (p.output_kind == kFeatures) {
#pragma unroll
            for (int c = 0; c < kColumns; ++c) {
                if (first + c * kThreads < dim) features[first + c * kThreads] = round_to(value[c], T{});
            }
        } else if (first + kStep < dim) {  // wider than the registers: this thread reads it back below
#pragma unroll
            for (int c = 0; c < kColumns; ++c) embedding[first + c * kThreads] = value[c];
        }
    }
    if (p.output_kind == kFeatures) return;
#pragma unroll
    for (int apart = 16; apart; apart /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, apart);
    if (blocks > 1) {
        if (mine % 32 < blocks) store_in_cluster(shared + mine / 32, mine % 32, squares);
        cluster_sync();
    } else {
        if (mine % 32 == 0) shared[mine / 32] = squares;
        __syncthreads();
    }
    float total = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) total += shared[warp];
    const float inverse = 1.0f / max_nan(sqrtf(total), kNormEpsilon);  // one division, not one a number
    int first = mine;
#pragma unroll 1
    for (; first + kStep < dim; first += kStep) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) embedding[first + c * kThreads] *= inverse;
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        if (first + c * kThreads < dim) embedding[first + c * kThreads] = value[c] * inverse;
    }
    if constexpr (!APART) __syncthreads();  // FUSED comes again with the same shared memory
}

#if __CUDA_ARCH__ >= 1000  // ptxas keeps to 128 registers and spills, unless it is told that one block is enough
#define EPILOGUE_BOUNDS __launch_bounds__(kThreads, 1)
#else
#define EPILOGUE_BOUNDS __launch_bounds__(kThreads)
#endif

template <class T>
__global__ void EPILOGUE_BOUNDS epilogue_kernel(const __grid_constant__ Params p) {
    DYNAMIC_SHARED(shared);
    if (blockDim.x < kThreads) cluster_sync();  // all its blocks have started
    finish_row<T, true>(p, blockIdx.x / (kThreads / blockDim.x), reinterpret_cast<float*>(shared));
}

// ---- All three in one launch. The grid is on the device as a whole (a cooperative launch), so that blocks may wait.

// Every block adds 1 but the first, which adds what makes the sum 2^31: the top bit turns when all have come, and the
// other bits are again what they were, so that neither the grid's size nor the number of barriers passed matters.
__device__ __forceinline__ void wait_for_all_blocks(unsigned* barrier) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();  // what this block wrote, before its arrival
        const unsigned arrival = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u;
        const unsigned before = atomicAdd(barrier, arrival);
        while (((before ^ *static_cast<volatile unsigned*>(barrier)) & 0x80000000u) == 0) wait_a_little();
        __threadfence();  // and what the others wrote, after theirs
    }
    __syncthreads();
}

template <class T, int LAYOUT, int POOLING>
__global__ void __launch_bounds__(kThreads, 2) fused_kernel(const __grid_constant__ Params p) {
    DYNAMIC_SHARED(shared);
    const int first_output = blockIdx.x * kWarps + threadIdx.x / 32, outputs = p.features * p.reduced;
    if (first_output < outputs) prefetch_row<T>(p, first_output);
    // Not unrolled, here and below: three phases in one kernel have few registers to give.
#pragma unroll 1
    for (int item = blockIdx.x; item < p.pool_items; item += gridDim.x) pool_item<T, LAYOUT, POOLING>(p, item, shared);
    wait_for_all_blocks(p.barrier);
#pragma unroll 1
    for (int output = first_output; output < outputs; output += gridDim.x * kWarps) {
        reduce_row<T, typename Pool<T, POOLING>::Stored>(p, output);
    }
    wait_for_all_blocks(p.barrier);
    const int rows = p.output_kind == kMirrorEmbeddings ? p.batch / 2 : p.batch;
#pragma unroll 1
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        finish_row<T, false>(p, row, reinterpret_cast<float*>(shared));
    }
}

}  // namespace
