// zqfpQuantizeActivation, zqfpQuantizeSiluMul and zqfpQuantizeRmsNorm.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "config.h"
#include "device.h"
#include "launch.h"
#include "quantize_activation.h"
#include "quantize_lorc.cuh"
#include "quantize_lorc_many.cuh"
#include "quantize_norm.cuh"
#include "quantize_stream.cuh"

namespace zqfp {
namespace {

zqfpStatus check_shape(int32_t x_dtype, int64_t m, int64_t k) {
  ZQFP_RETURN_IF_FAILED(check_dtype(x_dtype));
  ZQFP_RETURN_IF_FAILED(check_tokens(m));
  if (k <= 0 || k > kMaxColumns) {
    return fail(ZQFP_INVALID_VALUE, "k = %lld is not in 1..%lld", (long long)k, (long long)kMaxColumns);
  }
  if (k % 16 != 0) return fail(ZQFP_NOT_SUPPORTED, "k = %lld is not a multiple of 16", (long long)k);
  return ZQFP_SUCCESS;
}

zqfpStatus check_lorc(int32_t x_dtype, const void* v, int32_t rank, const void* xv) {
  if ((v == nullptr) != (xv == nullptr)) return fail(ZQFP_INVALID_VALUE, "v and xv must both be null or both be given");
  if (v == nullptr) return ZQFP_SUCCESS;
  if (rank <= 0) return fail(ZQFP_INVALID_VALUE, "rank = %d is not positive", rank);
  if (rank % 8 != 0 || rank > kMaxRank) {
    return fail(ZQFP_NOT_SUPPORTED, "no kernel for LoRC rank %d: multiples of 8 up to %d", rank, kMaxRank);
  }
  if (x_dtype == ZQFP_FLOAT32) return fail(ZQFP_NOT_SUPPORTED, "no kernel for x @ v in float32: float16 or bfloat16");
  ZQFP_RETURN_IF_FAILED(check_pointer(v, "v"));
  return check_pointer(xv, "xv");
}

// From so many tokens on reading V less often outweighs having fewer blocks.
constexpr int64_t kManyTokens = 512;

template <void (*kKernel)(QuantizeParams)>
zqfpStatus launch(int64_t blocks, int threads, int cluster, int device, QuantizeParams* p, void* stream) {
  static std::atomic<uint64_t> prepared{0};
  const void* function = reinterpret_cast<const void*>(kKernel);
  ZQFP_RETURN_IF_FAILED(prepare_once(function, 0, device, &prepared));
  return launch_kernel(function, {int(blocks), threads, 0, cluster}, p, stream, "launching the quantizer");
}

// Threads of a block of which so many have something to do.
int block_threads(int64_t busy, int most) { return int(std::min<int64_t>(divide_up(busy, 32) * 32, most)); }

// Of a block that has one token, of whose eights a thread can hold some: few tokens are done soonest by as many threads
// as there can be.
int row_threads(const QuantizeParams& p, int held, int most, int processors) {
  const int64_t eights = p.k / 8;
  return block_threads(p.m <= processors ? eights : divide_up(eights, held), most);
}

// Into how many blocks a cluster divides a token where h takes time to compute: until processors or eights are few.
int choose_parts(const QuantizeParams& p, int processors) {
  constexpr int kFewEights = 128;
  int parts = 1;
  while (parts < kMaxClusterBlocks && 2 * parts * p.m <= processors && p.k / 8 >= 2 * parts * kFewEights) parts *= 2;
  return parts;
}

template <class Source>
zqfpStatus quantize(QuantizeParams* p, int device, int processors, void* stream) {
  const int64_t eights = p->k / 8;  // of a token
  if (p->scale != nullptr) {
    // No more of them in a thread than leave each processor two blocks.
    const int64_t share = p->m * eights / (2 * processors * kStreamThreads);
    p->share = int(std::clamp<int64_t>(share, 1, kHeld));
    const int64_t blocks = divide_up(p->m * eights, p->share * kStreamThreads);
    return launch<quantize_static_kernel<Source>>(blocks, kStreamThreads, 1, device, p, stream);
  }
  if constexpr (Source::kLoads > 1) {
    if (p->m <= processors) {
      p->share = choose_parts(*p, processors);
      const int threads = block_threads(divide_up(eights, p->share), kMaxRowThreads);
      return launch<quantize_token_kernel<Source, true>>(p->m * p->share, threads, p->share, device, p, stream);
    }
  }
  const int threads = row_threads(*p, kHeld, kMaxRowThreads, processors);
  return launch<quantize_token_kernel<Source, false>>(p->m, threads, 1, device, p, stream);
}

// Into how many blocks a cluster divides K: more as long as each warp has a chunk and the processors have less to do.
// Of a scale per token always as many as there can be: x is read twice, and the fewer tokens are being worked on at a
// time, the surer it is still in the cache.
template <class S>
int choose_blocks(const QuantizeParams& p, int64_t clusters, int processors) {
  int64_t best = 1;
  for (int64_t blocks = 2; blocks <= kMaxClusterBlocks; blocks *= 2) {
    if (blocks / 2 * S::kWarps * kChunk >= p.k) break;
    const int64_t rounds = divide_up(clusters * blocks, processors), best_rounds = divide_up(clusters * best, processors);
    if (S::kPerToken || rounds * best < best_rounds * blocks) best = blocks;
  }
  return int(best);
}

template <class S>
zqfpStatus quantize_lorc(QuantizeParams* p, int device, int processors, void* stream) {
  const int64_t clusters = divide_up(p->m, S::kTokens) * divide_up(p->rank, S::kRanks);
  p->share = choose_blocks<S>(*p, clusters, processors);
  return launch<quantize_lorc_kernel<S>>(clusters * p->share, S::kThreads, p->share, device, p, stream);
}

// Into how many blocks a cluster divides K: more where the processors then have less to do, and per token, as then fewer
// tokens are being worked on at a time, and x is surer to be still in the cache.
template <class S>
int choose_staged_blocks(int64_t tiles, int64_t stages, int64_t room) {
  int64_t best = 2;
  for (int64_t blocks = 4; blocks <= std::min<int64_t>(kMaxClusterBlocks, stages); blocks *= 2) {
    const int64_t rounds = divide_up(tiles * blocks, room), best_rounds = divide_up(tiles * best, room);
    if (S::kPerToken || rounds * best < best_rounds * blocks) best = blocks;
  }
  return int(best);
}

// Stages of x in shared memory: as few as there can be where a processor then has room for two blocks; else, per token,
// as many as there can be, as those need not be read again.
template <class S>
int choose_slots(int rank, int64_t stages) {
  constexpr int kLeast = S::kAhead + 1;
  const int bytes = S::shared_bytes(kLeast, rank);
  if (!S::kPerToken || share_processor(bytes, bytes)) return kLeast;
  return int(std::clamp<int64_t>(stages, kLeast, kLeast + (kMaxSharedBytes - bytes) / S::kXBytes));
}

template <class S>
zqfpStatus quantize_staged(const QuantizeParams& base, int device, int processors, void* stream) {
  static std::atomic<uint64_t> prepared{0};
  const void* function = reinterpret_cast<const void*>(quantize_staged_kernel<S>);
  ZQFP_RETURN_IF_FAILED(prepare_once(function, kMaxSharedBytes, device, &prepared));
  StagedParams p{base, 0};
  const int64_t tiles = divide_up(p.m, S::kTokens), stages = divide_up(p.k, S::kColumns);
  p.share = choose_staged_blocks<S>(tiles, stages, 2 * processors);
  p.slots = choose_slots<S>(p.rank, divide_up(stages, p.share));
  const LaunchShape shape{int(tiles * p.share), S::kThreads, S::shared_bytes(p.slots, p.rank), p.share};
  return launch_kernel(function, shape, &p, stream, "launching the quantizer");
}

template <class Source, LorcTask kTask>
zqfpStatus choose_lorc(QuantizeParams* p, int device, int processors, void* stream) {
  if (p->m < kManyTokens) return quantize_lorc<FewTokens<Source, kTask>>(p, device, processors, stream);
  if constexpr (Source::kLoads == 1) {
    constexpr bool kPerToken = kTask == LorcTask::kPerToken;
    return quantize_staged<StagedShape<typename Source::T, kPerToken>>(*p, device, processors, stream);
  } else {
    return quantize_lorc<ManyTokens<Source, kTask>>(p, device, processors, stream);
  }
}

template <class Source>
zqfpStatus quantize_half(QuantizeParams* p, int device, int processors, void* stream) {
  if (p->v == nullptr) return quantize<Source>(p, device, processors, stream);
  return p->scale == nullptr ? choose_lorc<Source, LorcTask::kPerToken>(p, device, processors, stream)
                             : choose_lorc<Source, LorcTask::kStatic>(p, device, processors, stream);
}

template <template <typename> class Source>
zqfpStatus quantize_source(QuantizeParams* p, int32_t dtype, void* stream) {
  int device = 0, processors = 0;
  ZQFP_RETURN_IF_FAILED(find_device(&device, &processors));
  if (dtype == ZQFP_FLOAT32) return quantize<Source<float>>(p, device, processors, stream);
  if (dtype == ZQFP_FLOAT16) return quantize_half<Source<__half>>(p, device, processors, stream);
  return quantize_half<Source<__nv_bfloat16>>(p, device, processors, stream);
}

template <typename T>
zqfpStatus quantize_norm(QuantizeParams* p, int device, int processors, void* stream) {
  const int threads = row_threads(*p, NormQuantizer<T>::kHeld, kMaxNormThreads, processors);
  return launch<quantize_norm_kernel<T>>(p->m, threads, 1, device, p, stream);
}

// With LoRC in two launches: a token's factor must be known before its first product.
template <typename T>
zqfpStatus quantize_norm_half(QuantizeParams* p, int device, int processors, void* stream) {
  ZQFP_RETURN_IF_FAILED(quantize_norm<T>(p, device, processors, stream));
  if (p->v == nullptr) return ZQFP_SUCCESS;
  follow_norm(p);
  return choose_lorc<Norm<T>, LorcTask::kNothing>(p, device, processors, stream);
}

zqfpStatus quantize_norm_of(QuantizeParams* p, int32_t dtype, void* stream) {
  int device = 0, processors = 0;
  ZQFP_RETURN_IF_FAILED(find_device(&device, &processors));
  if (dtype == ZQFP_FLOAT32) return quantize_norm<float>(p, device, processors, stream);
  if (dtype == ZQFP_FLOAT16) return quantize_norm_half<__half>(p, device, processors, stream);
  return quantize_norm_half<__nv_bfloat16>(p, device, processors, stream);
}

// What all quantizers have: the operands, and the rest. Without tokens only the numbers are checked.
zqfpStatus check_call(const zqfpActivation& x, int64_t m, int64_t k, const void* x8, const float* a, int32_t rank,
                      const void* xv) {
  ZQFP_RETURN_IF_FAILED(check_shape(x.x_dtype, m, k));
  ZQFP_RETURN_IF_FAILED(check_lorc(x.x_dtype, x.v, rank, xv));
  if (m == 0) return ZQFP_SUCCESS;
  ZQFP_RETURN_IF_FAILED(check_operands(x));
  ZQFP_RETURN_IF_FAILED(check_pointer(x8, "x8"));
  if (x.scale == nullptr) ZQFP_RETURN_IF_FAILED(check_pointer(a, "a"));
  return check_alignment(a, "a");
}

QuantizeParams make_params(const zqfpActivation& x, int64_t m, int64_t k, void* x8, float* a, int32_t rank, void* xv) {
  const QuantizeInputs inputs{x.x, x.other, x.gamma, x.epsilon, x.sum};
  return {inputs, x.scale, static_cast<uint8_t*>(x8), a, x.v, xv, int(m), int(k), x.v == nullptr ? 0 : rank, 1};
}

}  // namespace

zqfpStatus quantize_activation(const zqfpActivation& x, int64_t m, int64_t k, void* x8, float* a, int32_t rank, void* xv,
                               void* stream) {
  ZQFP_RETURN_IF_FAILED(check_call(x, m, k, x8, a, rank, xv));
  if (m == 0) return ZQFP_SUCCESS;
  QuantizeParams p = make_params(x, m, k, x8, a, rank, xv);
  switch (x.source) {
    case ZQFP_SILU_MUL: return quantize_source<SiluMul>(&p, x.x_dtype, stream);
    case ZQFP_RMS_NORM: return quantize_norm_of(&p, x.x_dtype, stream);
    default: return quantize_source<Plain>(&p, x.x_dtype, stream);
  }
}

}  // namespace zqfp

zqfpStatus zqfpQuantizeActivation(const void* x, int32_t x_dtype, int64_t m, int64_t k, const float* scale, void* x8,
                                  float* a, const void* v, int32_t rank, void* xv, void* stream) {
  const zqfpActivation activation{ZQFP_PLAIN, x_dtype, x, nullptr, nullptr, 0.f, scale, nullptr, v};
  return zqfp::quantize_activation(activation, m, k, x8, a, rank, xv, stream);
}

zqfpStatus zqfpQuantizeSiluMul(const void* gate, const void* up, int32_t x_dtype, int64_t m, int64_t k,
                               const float* scale, void* x8, float* a, const void* v, int32_t rank, void* xv,
                               void* stream) {
  const zqfpActivation activation{ZQFP_SILU_MUL, x_dtype, gate, up, nullptr, 0.f, scale, nullptr, v};
  return zqfp::quantize_activation(activation, m, k, x8, a, rank, xv, stream);
}

zqfpStatus zqfpQuantizeRmsNorm(const void* x, const void* skip, const void* gamma, float epsilon, int32_t x_dtype,
                               int64_t m, int64_t k, const float* scale, void* x8, float* a, void* sum, const void* v,
                               int32_t rank, void* xv, void* stream) {
  const zqfpActivation activation{ZQFP_RMS_NORM, x_dtype, x, skip, gamma, epsilon, scale, sum, v};
  return zqfp::quantize_activation(activation, m, k, x8, a, rank, xv, stream);
}
