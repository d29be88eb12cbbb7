/* Stripe-pool-reduce on CUDA: the C API. `kernels/reference.py` defines what it computes; `example.cu` uses it.
 *
 *   1. fill an mgn_spr_problem (what to compute: types, sizes, choices)
 *   2. mgn_spr_plan_for(&problem, &plan)        once for a problem and the current device; sizes the workspace
 *   3. allocate plan.workspace_bytes on the device and set its first MGN_SPR_BARRIER_BYTES to zero, once
 *   4. mgn_spr_launch(&problem, &plan, &pointers, stream)   as often as wanted; allocates nothing, can be captured in a
 *      CUDA graph after one plain launch: CUDA loads a kernel when it is first launched, which a capture may refuse
 *
 * A workspace serves one stream at a time. Functions return MGN_SPR_OK, one of the codes below, or MGN_SPR_CUDA_ERROR
 * + a cudaError_t; mgn_spr_error() makes a sentence of it.
 */
#ifndef MGN_STRIPE_POOL_REDUCE_H
#define MGN_STRIPE_POOL_REDUCE_H

#ifdef __cplusplus
extern "C" {
#endif

struct CUstream_st; /* a cudaStream_t is a CUstream_st* */

#define MGN_SPR_MAX_BRANCHES 4
#define MGN_SPR_MAX_STRIPES 8
#define MGN_SPR_MAX_BATCH 1024
#define MGN_SPR_BARRIER_BYTES 256

enum mgn_spr_dtype { MGN_SPR_FLOAT32 = 0, MGN_SPR_FLOAT16 = 1, MGN_SPR_BFLOAT16 = 2 };
enum mgn_spr_layout { MGN_SPR_NCHW = 0, MGN_SPR_NHWC = 1 };
enum mgn_spr_pooling { MGN_SPR_MAX = 0, MGN_SPR_AVG = 1, MGN_SPR_GEM = 2 };
enum mgn_spr_neck { MGN_SPR_RELU = 0, MGN_SPR_LINEAR = 1, MGN_SPR_RELU_NORM = 2 };

enum mgn_spr_output {
    MGN_SPR_FEATURES = 0,         /* [batch, F * R] of the maps' type, one rounding after float32 sums */
    MGN_SPR_EMBEDDINGS = 1,       /* [batch, F * R] float32 unit rows */
    MGN_SPR_MIRROR_EMBEDDINGS = 2 /* [batch / 2, F * R] float32 unit rows: image n's mirror is row n + batch / 2 */
};

/* How: AUTO takes FUSED up to a batch of 8 (ROWS where the device has no cooperative launch) and TILES above. No
 * measurement has set that border. */
enum mgn_spr_path {
    MGN_SPR_AUTO = 0,
    MGN_SPR_FUSED = 1, /* one cooperative launch; batch <= 8 */
    MGN_SPR_ROWS = 2,  /* the same arithmetic in three launches; batch <= 8 */
    MGN_SPR_TILES = 3  /* three launches; the reduction in matrix tiles, on tensor cores for 16-bit maxima */
};

enum mgn_spr_status {
    MGN_SPR_OK = 0,
    MGN_SPR_BAD_DTYPE = 1,
    MGN_SPR_BAD_LAYOUT = 2,
    MGN_SPR_BAD_POOLING = 3,
    MGN_SPR_BAD_NECK = 4,
    MGN_SPR_BAD_OUTPUT = 5,
    MGN_SPR_BAD_PATH = 6,     /* not a path, or FUSED or ROWS for a batch over 8 */
    MGN_SPR_BAD_BRANCHES = 7, /* 1 to 4 branches of 1 to 8 stripes */
    MGN_SPR_BAD_BATCH = 8,    /* 1 to 1024; even for MIRROR_EMBEDDINGS */
    MGN_SPR_BAD_CHANNELS = 9, /* a positive multiple of 8 */
    MGN_SPR_BAD_REDUCED = 10, /* a positive multiple of 16 */
    MGN_SPR_BAD_MAP = 11,     /* height and width at least 1, height * width at most 2^24 */
    MGN_SPR_BAD_POINTER = 12, /* a needed pointer is null, or maps, weight or workspace are not 16-byte aligned */
    MGN_SPR_NOT_COOPERATIVE = 13, /* FUSED was asked for where blocks cannot wait for each other */
    MGN_SPR_CUDA_ERROR = 1000
};

/* F features, R = reduced: one for a branch of one stripe, 1 + stripes (the whole map first) for the others. */
typedef struct mgn_spr_problem {
    int dtype; /* of maps and weight */
    int layout;
    int pooling;
    int neck;
    int output;
    int path;
    int batch;
    int channels;
    int reduced;
    int branches;
    int stripes[MGN_SPR_MAX_BRANCHES]; /* of each branch */
    int heights[MGN_SPR_MAX_BRANCHES]; /* of each branch's map */
    int widths[MGN_SPR_MAX_BRANCHES];
} mgn_spr_problem;

typedef struct mgn_spr_plan {
    int path;                   /* never AUTO */
    int tensor_cores;           /* whether TILES multiplies with mma */
    int splits;                 /* parts of the sum over channels, each by its own block; 1 but for TILES */
    int depth;                  /* channels a part */
    int fused_blocks;           /* of FUSED: all that fit on the device together, or fewer */
    int reserved;
    long long pooled_offset;    /* bytes from the workspace's start */
    long long partial_offset;
    long long workspace_bytes;
} mgn_spr_plan;

typedef struct mgn_spr_pointers { /* all on the device */
    const void* maps[MGN_SPR_MAX_BRANCHES]; /* [batch, C, H, W] or [batch, H, W, C], dense */
    const void* weight;  /* [F, R, C] of the maps' type: each feature's 1x1 convolution with its norm folded in */
    const float* bias;   /* [F, R] */
    const float* scale;  /* [F, R], for RELU_NORM */
    const float* shift;  /* [F, R], for RELU_NORM */
    const float* power;  /* [F], for GEM */
    void* workspace;
    void* output;
} mgn_spr_pointers;

#ifndef __CUDACC_RTC__ /* NVRTC takes device code alone */
int mgn_spr_plan_for(const mgn_spr_problem* problem, mgn_spr_plan* plan);
int mgn_spr_launch(const mgn_spr_problem* problem, const mgn_spr_plan* plan, const mgn_spr_pointers* pointers,
                   struct CUstream_st* stream);
const char* mgn_spr_error(int status);
#endif

#ifdef __cplusplus
}
#endif
#endif
