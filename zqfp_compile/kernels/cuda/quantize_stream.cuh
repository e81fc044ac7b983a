// h -> E4M3 and its scale, without LoRC: a stream of eights, several of them under way in each thread.
#pragma once

#include "quantize_source.cuh"

namespace zqfp {

constexpr int kStreamThreads = 256;
constexpr int kMaxRowThreads = 1024;
constexpr int kHeld = 4;  // eights that a thread has at a time

// One scale: a block has p.share * kStreamThreads eights, whatever their token.
template <class Source>
__device__ __forceinline__ void quantize_static(const QuantizeParams& p) {
  ptx::release_kernel_after();
  ptx::wait_for_kernel_before();
  const float scale = *p.scale;
  const int64_t first = int64_t(blockIdx.x) * p.share * kStreamThreads + threadIdx.x, count = int64_t(p.m) * p.k / 8;
  const int64_t left = count - first;
  const Source source(p, 8 * first);
  uint8_t* x8 = p.x8 + 8 * first;
  typename Source::Raw held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    held[i] = source.load(8 * kStreamThreads * i, i < p.share && i * kStreamThreads < left);
  }
  const Divisor divide(scale);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (i >= p.share || i * kStreamThreads >= left) continue;
    store_quantized(Source::compute(held[i]), divide, x8 + 8 * kStreamThreads * i);
  }
  if (first == 0 && p.a != nullptr) p.a[0] = scale;
}

// The largest `range` of a block; none is negative, so that their order is that of their bits.
__device__ __forceinline__ float largest_of_block(float range, uint32_t* warp_range) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t largest = __reduce_max_sync(~0u, __float_as_uint(range));
  if (lane == 0) warp_range[warp] = largest;
  __syncthreads();
  return __uint_as_float(__reduce_max_sync(~0u, lane < int(blockDim.x) / 32 ? warp_range[lane] : 0u));
}

// A scale per token: a block has one token. Of a token with more than kHeld eights for each thread it reads the rest
// twice.
template <class Source>
__device__ __forceinline__ void quantize_token(const QuantizeParams& p, uint32_t* warp_range) {
  ptx::release_kernel_after();
  ptx::wait_for_kernel_before();
  const int64_t token = blockIdx.x;
  const Source source(p, token * p.k);
  uint8_t* x8 = p.x8 + token * p.k;
  const int first = threadIdx.x, threads = blockDim.x, count = p.k / 8;
  typename Source::Raw raw[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int at = first + i * threads;
    raw[i] = source.load(8 * at, at < count);
  }
  Eight<typename Source::T> held[kHeld];
  float range = kSmallestRange;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    held[i] = Source::compute(raw[i]);
    range = held[i].widen(range);
  }
  for (int at = first + kHeld * threads; at < count; at += threads) {
    range = Source::compute(source.load(8 * at, true)).widen(range);
  }
  const float scale = __fdiv_rn(largest_of_block(range, warp_range), kLargestE4m3);
  const Divisor divide(scale);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int at = first + i * threads;
    if (at < count) store_quantized(held[i], divide, x8 + 8 * at);
  }
  for (int at = first + kHeld * threads; at < count; at += threads) {
    store_quantized(Source::compute(source.load(8 * at, true)), divide, x8 + 8 * at);
  }
  if (first == 0) p.a[token] = scale;
}

template <class Source>
__global__ void __launch_bounds__(kStreamThreads) quantize_static_kernel(QuantizeParams p) {
  quantize_static<Source>(p);
}

template <class Source>
__global__ void __launch_bounds__(kMaxRowThreads) quantize_token_kernel(QuantizeParams p) {
  __shared__ uint32_t warp_range[kMaxRowThreads / 32];
  quantize_token<Source>(p, warp_range);
}

}  // namespace zqfp
