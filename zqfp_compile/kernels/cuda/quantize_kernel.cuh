// Activations: x -> E4M3 and its scale, and with LoRC x @ V in the same pass over x.
//
// A block has 16 tokens; the blocks of a cluster share them along K. A warp takes chunks of 32 columns: thread 4q + c
// loads columns 8c..8c+7 of tokens q and q + 8 and uses them both as numbers to quantise and as operand A of two
// m16n8k16 steps, whose 16 columns are 8c + 4s + {0, 1, 2, 3} for the four c: a sum does not mind the order.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

namespace zqfp {

constexpr int kQuantizeWarps = 16;
constexpr int kQuantizeTokens = 16;
constexpr int kChunk = 32;
constexpr int kMaxRank = 64;
constexpr float kLargestE4m3 = 448.f;
constexpr float kSmallestRange = 1e-30f;

struct QuantizeParams {
  const void* x;
  const float* scale;  // or null: per token
  uint8_t* x8;
  float* a;  // or null
  const void* v;
  void* xv;
  int m, k, rank;
};

// Eight numbers of one token, in float32 and, for 16-bit types, as they came.
template <typename T>
struct Eight {
  float value[8];
  uint32_t word[4];
};

__device__ __forceinline__ float2 unpack_pair(uint32_t word, __half) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}
__device__ __forceinline__ float2 unpack_pair(uint32_t word, __nv_bfloat16) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&word));
}

template <typename T>
__device__ __forceinline__ Eight<T> load_eight(const T* from, bool inside) {
  Eight<T> eight{};
  if (!inside) return eight;
  if constexpr (sizeof(T) == 4) {
    const float4 low = __ldg(reinterpret_cast<const float4*>(from));
    const float4 high = __ldg(reinterpret_cast<const float4*>(from) + 1);
    eight = {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}, {}};
  } else {
    const uint4 words = __ldg(reinterpret_cast<const uint4*>(from));
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack_pair(word[i], T());
      eight.value[2 * i] = pair.x;
      eight.value[2 * i + 1] = pair.y;
      eight.word[i] = word[i];
    }
  }
  return eight;
}

// IEEE division and round to nearest even, as in the reference.
__device__ __forceinline__ uint32_t quantize_four(const float* value, float scale) {
  const float2 low{__fdiv_rn(value[0], scale), __fdiv_rn(value[1], scale)};
  const float2 high{__fdiv_rn(value[2], scale), __fdiv_rn(value[3], scale)};
  return uint32_t(__nv_cvt_float2_to_fp8x2(low, __NV_SATFINITE, __NV_E4M3)) |
         uint32_t(__nv_cvt_float2_to_fp8x2(high, __NV_SATFINITE, __NV_E4M3)) << 16;
}

template <typename T>
__device__ __forceinline__ void store_quantized(const Eight<T>& eight, float scale, uint8_t* to) {
  *reinterpret_cast<uint2*>(to) = {quantize_four(eight.value, scale), quantize_four(eight.value + 4, scale)};
}

template <typename T>
__device__ __forceinline__ void mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  if constexpr (sizeof(T) == 2 && __is_same(T, __half)) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// x @ V of 16 tokens. sums[b][t][2h + i] of thread 4q + c is rank 16b + 2(2c + i) + t of token q + 8h: neighbouring
// columns of V come in one load and go to the two tiles t.
template <typename T>
struct Projection {
  static constexpr int kBlocks = kMaxRank / 16;
  float sums[kBlocks][2][4] = {};

  __device__ __forceinline__ void add(const Eight<T>& upper, const Eight<T>& lower, const QuantizeParams& p, int column) {
    const int q = threadIdx.x % 32 / 4;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const uint32_t a[4] = {upper.word[2 * s], lower.word[2 * s], upper.word[2 * s + 1], lower.word[2 * s + 1]};
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        if (16 * b >= p.rank) break;
        uint32_t row[4] = {};
        const bool inside = column < p.k && 16 * b + 2 * q < p.rank;
        const T* v = static_cast<const T*>(p.v) + int64_t(column + 4 * s) * p.rank + 16 * b + 2 * q;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (inside) row[i] = __ldg(reinterpret_cast<const uint32_t*>(v + i * p.rank));
        }
        mma<T>(sums[b][0], a, __byte_perm(row[0], row[1], 0x5410), __byte_perm(row[2], row[3], 0x5410));
        mma<T>(sums[b][1], a, __byte_perm(row[0], row[1], 0x7632), __byte_perm(row[2], row[3], 0x7632));
      }
    }
  }

  static constexpr int kFloats = kBlocks * 2 * 4;

  // Adds up the warps, always in the same order, into `parts` [kFloats][32] of warp 0. All threads call it.
  __device__ __forceinline__ void add_warps(float (*parts)[kFloats][32]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float* mine = &sums[0][0][0];
    for (int half = kQuantizeWarps / 2; half > 0; half /= 2) {
      if (warp >= half && warp < 2 * half) {
#pragma unroll
        for (int i = 0; i < kFloats; ++i) parts[warp - half][i][lane] = mine[i];
      }
      __syncthreads();
      if (warp < half) {
#pragma unroll
        for (int i = 0; i < kFloats; ++i) mine[i] += parts[warp][i][lane];
      }
      __syncthreads();
    }
    if (warp == 0) {
#pragma unroll
      for (int i = 0; i < kFloats; ++i) parts[0][i][lane] = mine[i];
    }
  }
};

template <typename T>
__device__ __forceinline__ void store_projection(const float (*sum)[32], const QuantizeParams& p, int first_token) {
  const int lane = threadIdx.x, q = lane / 4, c = lane % 4;
  for (int i = 0; i < Projection<T>::kFloats; ++i) {
    const int rank = 16 * (i / 8) + 2 * (2 * c + i % 2) + i / 4 % 2;
    const int token = first_token + q + 8 * (i / 2 % 2);
    if (rank < p.rank && token < p.m) static_cast<T*>(p.xv)[int64_t(token) * p.rank + rank] = T(sum[i][lane]);
  }
}

template <typename T, bool kLorc>
__global__ void __launch_bounds__(kQuantizeWarps * 32) quantize_kernel(QuantizeParams p) {
  namespace cg = cooperative_groups;
  const cg::cluster_group cluster = cg::this_cluster();
  __shared__ float ranges[kQuantizeTokens];
  __shared__ float warp_ranges[kQuantizeWarps][kQuantizeTokens];
  __shared__ float parts[kLorc ? kQuantizeWarps / 2 : 1][kLorc ? Projection<T>::kFloats : 1][32];

  const int warp = threadIdx.x / 32, q = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  const int first_token = blockIdx.x / cluster.num_blocks() * kQuantizeTokens;
  const int blocks = cluster.num_blocks();
  const int stride = kQuantizeWarps * blocks * kChunk;
  const int start = (cluster.block_rank() * kQuantizeWarps + warp) * kChunk + 8 * c;
  const int chunks = (p.k + kChunk - 1) / kChunk;
  const bool token_inside[2] = {first_token + q < p.m, first_token + q + 8 < p.m};
  const T* x = static_cast<const T*>(p.x) + int64_t(first_token + q) * p.k;
  uint8_t* x8 = p.x8 + int64_t(first_token + q) * p.k;
  const bool per_token = p.scale == nullptr;

  float range[2] = {0.f, 0.f};
  float scale[2] = {per_token ? 1.f : __ldg(p.scale), per_token ? 1.f : __ldg(p.scale)};
  Projection<T> projection;
  // All lanes of a warp run the same chunks: mma needs them all.
  for (int column = start; column - 8 * c < chunks * kChunk; column += stride) {
    Eight<T> eight[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool inside = token_inside[h] && column < p.k;
      eight[h] = load_eight(x + int64_t(8 * h) * p.k + column, inside);
#pragma unroll
      for (int i = 0; i < 8; ++i) range[h] = fmaxf(range[h], fabsf(eight[h].value[i]));
      if (inside && !per_token) store_quantized(eight[h], scale[h], x8 + int64_t(8 * h) * p.k + column);
    }
    if constexpr (kLorc) projection.add(eight[0], eight[1], p, column);
  }

  if (per_token) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      range[h] = fmaxf(range[h], __shfl_xor_sync(~0u, range[h], 1));
      range[h] = fmaxf(range[h], __shfl_xor_sync(~0u, range[h], 2));
      if (c == 0) warp_ranges[warp][q + 8 * h] = range[h];
    }
    __syncthreads();
    if (threadIdx.x < kQuantizeTokens) {
      float largest = kSmallestRange;
      for (int w = 0; w < kQuantizeWarps; ++w) largest = fmaxf(largest, warp_ranges[w][threadIdx.x]);
      ranges[threadIdx.x] = largest;
    }
  }
  if constexpr (kLorc) projection.add_warps(parts);
  cluster.sync();

  if (per_token) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float largest = 0.f;
      for (int b = 0; b < blocks; ++b) largest = fmaxf(largest, cluster.map_shared_rank(ranges, b)[q + 8 * h]);
      scale[h] = __fdiv_rn(largest, kLargestE4m3);
      for (int column = start; column < p.k && token_inside[h]; column += stride) {
        const int64_t at = int64_t(8 * h) * p.k + column;
        store_quantized(load_eight(x + at, true), scale[h], x8 + at);
      }
    }
  }
  if (cluster.block_rank() == 0 && warp == 0) {
    if (per_token) {
      for (int h = 0; h < 2; ++h) {
        if (c == 0 && token_inside[h]) p.a[first_token + q + 8 * h] = scale[h];
      }
    } else if (first_token == 0 && threadIdx.x == 0 && p.a != nullptr) {
      p.a[0] = scale[0];
    }
    if constexpr (kLorc) {
      for (int b = 1; b < blocks; ++b) {
        const auto other = cluster.map_shared_rank(&parts[0][0], b);
        for (int i = 0; i < Projection<T>::kFloats; ++i) parts[0][i][threadIdx.x] += other[i][threadIdx.x];
      }
      store_projection<T>(parts[0], p, first_token);
    }
  }
  cluster.sync();  // no block ends while another reads its shared memory
}

}  // namespace zqfp
