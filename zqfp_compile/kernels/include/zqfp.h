/* libzqfp: W4A8 linear layers on the FP8 tensor cores of sm_90a. The one interface of all hosts.
 *
 *   w8[n,k] = E4M3( e2m1(codes[n,k]) * s[n, k / group_size] )        exact FP8 numbers
 *   y[m,n]  = a[m] * row_scales[n] * sum_k x8[m,k] * w8[n,k]  +  sum_r xv[m,r] * u[r,n]  +  bias[n]
 *
 * A gated layer has two of these, gate and up, and writes h = dtype( silu(dtype(gate)) * dtype(up) ), where silu(g) =
 * g / (1 + exp(-g)): the h that zqfpQuantizeSiluMul computes of their y.
 *
 * Conventions: pointers are device pointers unless a comment says host. Matrices are row-major and dense; every
 * device pointer is aligned to 16 bytes. Nothing is allocated and nothing waits inside a call: launches go to the
 * given stream and can be captured in a CUDA graph. A call that fails launches nothing, returns a code other than
 * ZQFP_SUCCESS and leaves a sentence in zqfpGetLastErrorString() of the same thread.
 */
#ifndef ZQFP_H
#define ZQFP_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define ZQFP_API __attribute__((visibility("default")))
#else
#define ZQFP_API
#endif

#define ZQFP_ABI_VERSION 5

#ifdef __cplusplus
extern "C" {
#endif

typedef enum zqfpStatus {
  ZQFP_SUCCESS = 0,
  ZQFP_INVALID_VALUE = 1,     /* null or misaligned pointer, negative size, unknown enumerator */
  ZQFP_NOT_SUPPORTED = 2,     /* a legal layer that no kernel here computes: group size, N, rank */
  ZQFP_WRONG_ARCHITECTURE = 3 /* the current device is not sm_90 */,
  ZQFP_WORKSPACE_TOO_SMALL = 4,
  ZQFP_CUDA_ERROR = 5
} zqfpStatus;

typedef enum zqfpDataType { ZQFP_FLOAT16 = 1, ZQFP_BFLOAT16 = 2, ZQFP_FLOAT32 = 3 } zqfpDataType;

/* One linear layer, or several of one input as one: their rows below each other. */
#define ZQFP_MAX_OUTPUTS 4
typedef struct zqfpLinearDesc {
  int64_t n;           /* output features, a multiple of 8 */
  int64_t k;           /* input features, a multiple of 16; codes are padded to whole groups and tiles */
  int32_t group_size;  /* weights along k per group scale: 32, 64 or 128 */
  int32_t lorc_rank;   /* 0 (no LoRC) or a multiple of 8, at most 64 */
  int32_t dtype;       /* zqfpDataType of y, bias, xv and u: FLOAT16 or BFLOAT16 */
  int32_t per_token;   /* 1: a is [m]; 0: a is one number */
  int32_t gated;       /* 1: rows are eight of gate, eight of up, and so on, n a multiple of 16, and y is h; else 0 */
  int64_t outputs[ZQFP_MAX_OUTPUTS]; /* n of each layer, all but the last multiples of 64, then 0; all 0: one, of n, as
                                      it is where gated */
} zqfpLinearDesc;

/* The activations and outputs of one call. */
typedef struct zqfpLinearArgs {
  const void* x8;            /* E4M3 [m, k] */
  const float* a;            /* [m] or [1] */
  const void* codes;         /* packed E2M1, zqfpGetPackedSizes */
  const void* group_scales;  /* packed E4M3 */
  const float* row_scales;   /* [n] */
  const void* bias;          /* [n] or null */
  const void* xv;            /* x @ V [m, lorc_rank] or null */
  const void* u;             /* [lorc_rank, n] or null */
  void* y[ZQFP_MAX_OUTPUTS]; /* [m, n], or [m, outputs[i]] for each output; gated: [m, n / 2] */
} zqfpLinearArgs;

/* The ABI version of the library; compare with ZQFP_ABI_VERSION. */
ZQFP_API int zqfpGetVersion(void);

/* The last error of this thread, one English sentence; "" when there was none. Never null. */
ZQFP_API const char* zqfpGetLastErrorString(void);

/* Check that a layer can be computed, and return the bytes of its packed codes and group scales (host). */
ZQFP_API zqfpStatus zqfpGetPackedSizes(const zqfpLinearDesc* desc, size_t* codes_bytes, size_t* scales_bytes);

/* Decode packed weights on the host: w8 as E4M3 bytes [n, k]. What the CPU kernel multiplies with, and a check of
 * the packer that needs no GPU. All pointers are host pointers. */
ZQFP_API zqfpStatus zqfpDecodeHost(const zqfpLinearDesc* desc, const void* codes, const void* group_scales,
                                   uint8_t* w8);

/* Bytes of workspace that zqfpLinear needs for any number of rows up to m. Its first ZQFP_WORKSPACE_ZEROED_BYTES
 * must be zero before a call and are zero again after it: zero them once, or before each call where the memory is
 * shared with others. Calls that may run at the same time need workspaces of their own. */
#define ZQFP_WORKSPACE_ZEROED_BYTES 16384
ZQFP_API zqfpStatus zqfpGetWorkspaceSize(const zqfpLinearDesc* desc, int64_t m, size_t* bytes);

/* y of m rows; m = 0 does nothing. `stream` is a cudaStream_t. */
ZQFP_API zqfpStatus zqfpLinear(const zqfpLinearDesc* desc, const zqfpLinearArgs* args, int64_t m, void* workspace,
                               size_t workspace_bytes, void* stream);

/* x [m, k] of x_dtype (FLOAT16, BFLOAT16 or FLOAT32) -> x8 E4M3 [m, k] = round(x / a).
 * scale null: a[m] = max(max |x[m]|, 1e-30) / 448 is written, per token. Otherwise scale [1] is used and a[0]
 * receives it (a may be null then). v [k, rank] and xv [m, rank], both of x_dtype (FLOAT16 or BFLOAT16), are null or
 * get xv = x @ v. */
ZQFP_API zqfpStatus zqfpQuantizeActivation(const void* x, int32_t x_dtype, int64_t m, int64_t k, const float* scale,
                                           void* x8, float* a, const void* v, int32_t rank, void* xv,
                                           void* stream);

/* The same of what usually comes before a linear layer, without writing it: h = silu(gate) * up, where silu(g) =
 * g / (1 + exp(-g)). gate, up [m, k], v and xv have the type x_dtype. h is computed in float32 and rounded to x_dtype
 * once; x8, a and xv are those that zqfpQuantizeActivation makes of this h. */
ZQFP_API zqfpStatus zqfpQuantizeSiluMul(const void* gate, const void* up, int32_t x_dtype, int64_t m, int64_t k,
                                        const float* scale, void* x8, float* a, const void* v, int32_t rank, void* xv,
                                        void* stream);

/* The same of a root mean square norm, of x or of the sum of x and skip:
 *   s = x_dtype(x + skip), or x where skip is null        h = x_dtype(s / sqrt(mean_k(s * s) + epsilon) * gamma)
 * x, skip, sum [m, k] and gamma [k] have the type x_dtype; h is computed in float32 and rounded once. sum receives s, or
 * is null; it may be x or skip itself. With v these are two launches, the others one. */
ZQFP_API zqfpStatus zqfpQuantizeRmsNorm(const void* x, const void* skip, const void* gamma, float epsilon,
                                        int32_t x_dtype, int64_t m, int64_t k, const float* scale, void* x8, float* a,
                                        void* sum, const void* v, int32_t rank, void* xv, void* stream);

/* What a quantizer computes h from: the operands of zqfpQuantizeActivation, ...SiluMul or ...RmsNorm. */
typedef enum zqfpSource { ZQFP_PLAIN = 1, ZQFP_SILU_MUL = 2, ZQFP_RMS_NORM = 3 } zqfpSource;

typedef struct zqfpActivation {
  int32_t source;     /* zqfpSource */
  int32_t x_dtype;    /* zqfpDataType of x, other, gamma, sum and v */
  const void* x;      /* [m, k]: x or gate */
  const void* other;  /* [m, k]: up; skip of a norm or null */
  const void* gamma;  /* [k] of a norm, a weight: it is not made by a kernel shortly before on the stream */
  float epsilon;      /* of a norm */
  const float* scale; /* [1] of a layer that is not per token, else null; not made shortly before either */
  void* sum;          /* [m, k], written, of a norm, or null; it may be x or skip */
  const void* v;      /* [k, lorc_rank] with LoRC, where x_dtype is the layer's dtype, else null */
} zqfpActivation;

/* Quantizer and linear layer in one call, for tokens that no other layer needs quantized: zqfpLinear of what the
 * quantizer makes. x8, a and xv of args are not read: these lie in the workspace, which is one of zqfpLinear and more.
 * y is none of the activation's tensors. One token is one launch, but of a norm whose sum is x or skip, of a layer that has
 * another dtype than x, and of k above 26000 to 33000, by rank and group size; there x @ v is summed in another order
 * than the quantizer's, always the same one. */
ZQFP_API zqfpStatus zqfpGetQuantizedWorkspaceSize(const zqfpLinearDesc* desc, int64_t m, size_t* bytes);
ZQFP_API zqfpStatus zqfpQuantizedLinear(const zqfpLinearDesc* desc, const zqfpActivation* activation,
                                        const zqfpLinearArgs* args, int64_t m, void* workspace, size_t workspace_bytes,
                                        void* stream);

#ifdef __cplusplus
}
#endif
#endif /* ZQFP_H */
