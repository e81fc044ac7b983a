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

// The largest `range` of a block.
__device__ __forceinline__ float largest_of_block(float range, float* warp_range) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float largest = largest_of_lanes(range);
  if (lane == 0) warp_range[warp] = largest;
  __syncthreads();
  return largest_of_lanes(lane < int(blockDim.x) / 32 ? warp_range[lane] : 0.f);
}

// Of a block with a token, or a part of one: the blocks of a cluster share a token and write to each other's `range`.
struct TokenShared {
  uint64_t barrier;
  float range[kMaxClusterBlocks];
  float warp_range[kMaxRowThreads / 32];
};

__device__ __forceinline__ void open_cluster(const QuantizeParams& p, TokenShared& shared) {
  if (threadIdx.x == 0) {
    ptx::barrier_open(ptx::shared_address(&shared.barrier), p.share * sizeof(float));
    ptx::fence_barrier_init();
  }
  ptx::cluster_arrive();
}

__device__ __forceinline__ float largest_of_cluster(float range, const QuantizeParams& p, TokenShared& shared) {
  const int block = blockIdx.x & (p.share - 1);
  const uint32_t barrier = ptx::shared_address(&shared.barrier);
  ptx::cluster_wait();  // every block has opened its barrier
  if (int(threadIdx.x) < p.share) ptx::store_remote(&shared.range[block], range, barrier, threadIdx.x);
  ptx::barrier_wait(barrier, 0);
  for (int i = 0; i < p.share; ++i) range = fmaxf(range, shared.range[i]);
  return range;
}

// A scale per token. Many tokens: a block has one, and its threads several eights each. Few: each thread has an eight or
// two, and a cluster of p.share blocks, a power of two, has a token. What of a token the threads cannot hold is read
// twice.
template <class Source, bool kFew>
__device__ __forceinline__ void quantize_token(const QuantizeParams& p, TokenShared& shared) {
  constexpr int kEights = kFew ? 2 : kHeld;
  const int shift = kFew ? 31 - __clz(p.share) : 0;
  const bool spread = kFew && p.share > 1;
  ptx::release_kernel_after();
  if (spread) open_cluster(p, shared);
  ptx::wait_for_kernel_before();
  const int64_t token = blockIdx.x >> shift;
  const Source source(p, token * p.k);
  uint8_t* x8 = p.x8 + token * p.k;
  const int block = kFew ? blockIdx.x & (p.share - 1) : 0;
  const int first = block * blockDim.x + threadIdx.x, threads = blockDim.x << shift, count = p.k / 8;
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
  range = largest_of_block(range, shared.warp_range);
  if (spread) range = largest_of_cluster(range, p, shared);
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
  if (first == 0) p.a[token] = scale;
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
