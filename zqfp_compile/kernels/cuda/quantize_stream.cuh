// h -> E4M3 and its scale, without LoRC: a stream of eights, several of them under way in each thread.
#pragma once

#include "quantize_cluster.cuh"
#include "quantize_source.cuh"

namespace zqfp {

constexpr int kStreamThreads = 256;
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

struct TokenShared {
  ClusterNumbers<1> range;
  uint32_t warp_range[kMaxRowThreads / 32];
};

// A scale per token. Many tokens: a block has one, and its threads several eights each. Few: each thread has an eight or
// two, and a cluster of p.share blocks, a power of two, has a token. What of a token the threads cannot hold is read
// twice.
template <class Source, bool kFew>
__device__ __forceinline__ void quantize_token(const QuantizeParams& p, TokenShared& shared) {
  constexpr int kEights = kFew ? 2 : kHeld;
  const int share = kFew ? p.share : 1;
  ptx::release_kernel_after();
  shared.range.open(share);
  ptx::wait_for_kernel_before();
  const TokenPlace place(share);
  const Source source(p, place.token * p.k);
  uint8_t* x8 = p.x8 + place.token * p.k;
  const int first = place.first, threads = place.threads, count = p.k / 8;
  typename Source::Raw raw[kEights];
#pragma unroll
  for (int i = 0; i < kEights; ++i) {
    const int at = first + i * threads;
    raw[i] = source.load(8 * at, at < count);
  }
  Eight<typename Source::T> held[kEights];
  float range = kSmallestRange;
#pragma unroll
  for (int i = 0; i < kEights; ++i) {
    if (kFew && first + i * threads >= count) continue;
    held[i] = Source::compute(raw[i]);
    range = held[i].widen(range);
  }
#pragma unroll 1
  for (int at = first + kEights * threads; at < count; at += threads) {
    range = Source::compute(source.load(8 * at, true)).widen(range);
  }
  const float largest[1] = {largest_of_block(range, shared.warp_range)};
  range = 0.f;
  shared.range.exchange(largest, place, share, [&](const float (&of_block)[1]) { range = fmaxf(range, of_block[0]); });
  const float scale = __fdiv_rn(range, kLargestE4m3);
  const Divisor divide(scale);
#pragma unroll
  for (int i = 0; i < kEights; ++i) {
    const int at = first + i * threads;
    if (at < count) store_quantized(held[i], divide, x8 + 8 * at);
  }
#pragma unroll 1
  for (int at = first + kEights * threads; at < count; at += threads) {
    store_quantized(Source::compute(source.load(8 * at, true)), divide, x8 + 8 * at);
  }
  if (first == 0) p.a[place.token] = scale;
}

template <class Source>
__global__ void __launch_bounds__(kStreamThreads) quantize_static_kernel(QuantizeParams p) {
  quantize_static<Source>(p);
}

template <class Source, bool kFew>
__global__ void __launch_bounds__(kMaxRowThreads) quantize_token_kernel(QuantizeParams p) {
  __shared__ TokenShared shared;
  quantize_token<Source, kFew>(p, shared);
}

}  // namespace zqfp
