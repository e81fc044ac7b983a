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

#include "ptx.cuh"

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

// Not __ldg: that may be read from before the kernel began, and an overlapping kernel begins while x is made.
template <typename T>
__device__ __forceinline__ Eight<T> load_eight(const T* from, bool inside) {
  Eight<T> eight{};
  if (!inside) return eight;
  if constexpr (sizeof(T) == 4) {
    const float4* four = reinterpret_cast<const float4*>(from);
    const float4 part[2] = {four[0], four[1]};
#pragma unroll
    for (int i = 0; i < 8; ++i) eight.value[i] = reinterpret_cast<const float*>(part)[i];
  } else {
    const uint4 words = *reinterpret_cast<const uint4*>(from);
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

// x @ V of 16 tokens. sums[b][t][2h + i] of thread 4q + c is rank 16b + 2(2c + i) + t of token q + 8h: neighbouring
// columns of V come in one load and go to the two tiles t.
template <typename T>
struct Projection {
  static constexpr int kBlocks = kMaxRank / 16;
  float sums[kBlocks][2][4] = {};

  __device__ __forceinline__ void add(const Eight<T>& upper, const Eight<T>& lower, const QuantizeParams& p,
                                      int column) {
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
        ptx::mma(sums[b][0], a, prmt(row[0], row[1], 0x5410), prmt(row[2], row[3], 0x5410), T());
        ptx::mma(sums[b][1], a, prmt(row[0], row[1], 0x7632), prmt(row[2], row[3], 0x7632), T());
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

// Shared memory of a block. `range` and the first of `parts` are read by the other blocks of the cluster.
template <typename T, bool kLorc>
struct QuantizeShared {
  float range[kQuantizeTokens];
  float warp_range[kQuantizeWarps][kQuantizeTokens];
  float parts[kLorc ? kQuantizeWarps / 2 : 1][kLorc ? Projection<T>::kFloats : 1][32];
};

// One thread's part: columns of two tokens.
template <typename T, bool kLorc>
class Quantizer {
 public:
  using Shared = QuantizeShared<T, kLorc>;
  using Cluster = cooperative_groups::cluster_group;

  __device__ __forceinline__ Quantizer(const QuantizeParams& p, Shared& shared, const Cluster& cluster)
      : p_(p), shared_(shared), cluster_(cluster), blocks_(cluster.num_blocks()) {
    q_ = threadIdx.x % 32 / 4;
    c_ = threadIdx.x % 4;
    warp_ = threadIdx.x / 32;
    first_token_ = blockIdx.x / blocks_ * kQuantizeTokens;
    first_column_ = (cluster.block_rank() * kQuantizeWarps + warp_) * kChunk + 8 * c_;
    stride_ = kQuantizeWarps * blocks_ * kChunk;
  }

  __device__ __forceinline__ void run() {
    ptx::release_kernel_after();
    ptx::wait_for_kernel_before();
    if (!per_token()) scale_[0] = scale_[1] = *p_.scale;
    read();
    if (per_token()) share_ranges();
    if constexpr (kLorc) projection_.add_warps(shared_.parts);
    cluster_.sync();
    if (per_token()) write_per_token();
    if (cluster_.block_rank() == 0 && warp_ == 0) {
      store_scales();
      if constexpr (kLorc) store_sum();
    }
    cluster_.sync();  // no block ends while another reads its shared memory
  }

 private:
  const QuantizeParams& p_;
  Shared& shared_;
  const Cluster& cluster_;
  int blocks_, q_, c_, warp_, first_token_, first_column_, stride_;
  float range_[2] = {0.f, 0.f};
  float scale_[2] = {1.f, 1.f};
  Projection<T> projection_;

  __device__ __forceinline__ bool per_token() const { return p_.scale == nullptr; }
  __device__ __forceinline__ int token(int h) const { return first_token_ + q_ + 8 * h; }
  __device__ __forceinline__ int64_t offset(int h, int column) const { return int64_t(token(h)) * p_.k + column; }
  __device__ __forceinline__ Eight<T> load(int h, int column) const {
    const bool inside = token(h) < p_.m && column < p_.k;
    return load_eight(static_cast<const T*>(p_.x) + (inside ? offset(h, column) : 0), inside);
  }
  __device__ __forceinline__ void store(const Eight<T>& eight, int h, int column) const {
    if (token(h) < p_.m && column < p_.k) store_quantized(eight, scale_[h], p_.x8 + offset(h, column));
  }

  // Ranges and x @ V, and with a static scale all there is to do. All lanes of a warp run the same chunks, as mma
  // needs them all.
  __device__ __forceinline__ void read() {
    for (int column = first_column_; column - 8 * c_ < p_.k; column += stride_) {
      Eight<T> eight[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        eight[h] = load(h, column);
#pragma unroll
        for (int i = 0; i < 8; ++i) range_[h] = fmaxf(range_[h], fabsf(eight[h].value[i]));
        if (!per_token()) store(eight[h], h, column);
      }
      if constexpr (kLorc) projection_.add(eight[0], eight[1], p_, column);
    }
  }

  // The block's largest number of each token, to shared memory.
  __device__ __forceinline__ void share_ranges() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      range_[h] = fmaxf(range_[h], __shfl_xor_sync(~0u, range_[h], 1));
      range_[h] = fmaxf(range_[h], __shfl_xor_sync(~0u, range_[h], 2));
      if (c_ == 0) shared_.warp_range[warp_][q_ + 8 * h] = range_[h];
    }
    __syncthreads();
    if (threadIdx.x >= kQuantizeTokens) return;
    float largest = kSmallestRange;
    for (int w = 0; w < kQuantizeWarps; ++w) largest = fmaxf(largest, shared_.warp_range[w][threadIdx.x]);
    shared_.range[threadIdx.x] = largest;
  }

  // x once more, now out of the cache.
  __device__ __forceinline__ void write_per_token() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float largest = 0.f;
      for (int b = 0; b < blocks_; ++b) {
        largest = fmaxf(largest, cluster_.map_shared_rank(shared_.range, b)[q_ + 8 * h]);
      }
      scale_[h] = __fdiv_rn(largest, kLargestE4m3);
      for (int column = first_column_; column < p_.k; column += stride_) store(load(h, column), h, column);
    }
  }

  __device__ __forceinline__ void store_scales() const {
    if (!per_token()) {
      if (first_token_ == 0 && threadIdx.x == 0 && p_.a != nullptr) p_.a[0] = scale_[0];
      return;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (c_ == 0 && token(h) < p_.m) p_.a[token(h)] = scale_[h];
    }
  }

  // Adds up the blocks in their order.
  __device__ __forceinline__ void store_sum() {
    for (int b = 1; b < blocks_; ++b) {
      const auto* other = cluster_.map_shared_rank(&shared_.parts[0][0], b);
      for (int i = 0; i < Projection<T>::kFloats; ++i) shared_.parts[0][i][threadIdx.x] += other[i][threadIdx.x];
    }
    store_projection<T>(shared_.parts[0], p_, first_token_);
  }
};

template <typename T, bool kLorc>
__global__ void __launch_bounds__(kQuantizeWarps * 32) quantize_kernel(QuantizeParams p) {
  __shared__ QuantizeShared<T, kLorc> shared;
  const cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
  Quantizer<T, kLorc>(p, shared, cluster).run();
}

}  // namespace zqfp
