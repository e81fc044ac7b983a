// The kernel: a producer's and consumer warpgroups of one persistent block.
#pragma once

#include "consumer.cuh"

namespace zqfp {

template <class C>
__device__ __forceinline__ void init_barriers(Shared<C> shared) {
  for (int stage = 0; stage < C::kStages; ++stage) {
    ptx::barrier_init(shared.full(stage), 2);  // weights and activations
    ptx::barrier_init(shared.empty(stage), C::kWarpgroups * (kThreads / 32) * C::kCluster);
  }
  if constexpr (C::kStoreApart) {
    for (int row = 0; row < C::kRows; ++row) {
      for (int slot = 0; slot < C::kOutSlots; ++slot) {
        ptx::barrier_init(shared.out_full(row, slot), kThreads / 32);
        ptx::barrier_init(shared.out_empty(row, slot), 1);
      }
    }
  }
  if constexpr (C::kSplit > 1) {
    for (int row = 0; row < C::kRows; ++row) {
      ptx::barrier_init(shared.peer_full(row), 1);
      ptx::barrier_init(shared.peer_empty(row), kThreads / 32);
    }
  }
  ptx::fence_barrier_init();
}

template <class C>
__device__ __forceinline__ void sync_blocks() {
  if constexpr (C::kCluster > 1) {
    ptx::cluster_sync();
  } else {
    __syncthreads();
    if constexpr (C::kSplit > 1) ptx::cluster_arrive();  // who sends sums waits
  }
}

// The warps of the producer's warpgroup: weights, activations, and one for each row that stores apart. The weights are
// on their way before the block's threads have met.
template <class C>
__device__ __forceinline__ void run_producers(const GemmParams& p, Shared<C> shared, int rank, Trace& trace) {
  const int warp = threadIdx.x % kThreads / 32;
  const bool leader = threadIdx.x % 32 == 0;
  Producer<C> producer(p, shared, rank);
  if (leader && warp == 0) {
    init_barriers<C>(shared);
    producer.start_weights();
    trace.stamp(Step::kWeights);
  }
  if (leader && warp == 1) ptx::prefetch_map(&p.x8);
  __syncwarp();
  sync_blocks<C>();
  ptx::fewer_registers<C::kProducerRegisters>();
  if (leader && warp == 0) {
    producer.run_weights();
    trace.stamp(Step::kWeights);
  }
  if (leader && warp == 1) producer.run_tokens();
  if constexpr (C::kStoreApart) {
    if (warp >= 2 && warp - 2 < C::kRows) Storer<C>(p, shared, warp - 2).run();
  }
  __syncwarp();
}

template <class C>
__device__ __forceinline__ void run_block(const GemmParams& p, char* raw) {
  // Every block aligns in the same way: what one block of a cluster writes lies at the same offset in the others.
  const Shared<C> shared{(ptx::shared_address(raw) + 1023u) & ~1023u};
  const int rank = C::kGang > 1 ? ptx::cluster_block() : 0;
  const int warpgroup = threadIdx.x / kThreads;

  Trace trace;
  trace.stamp(Step::kEntered);
  ptx::release_kernel_after();
  if (warpgroup == C::kWarpgroups) {
    run_producers<C>(p, shared, rank, trace);
  } else {
    sync_blocks<C>();
    ptx::more_registers<C::kConsumerRegisters>();
    Consumer<C>(p, shared, rank, warpgroup).run(trace);
  }
  // No block of a cluster ends while another may still write to it.
  if constexpr (C::kCluster > 1) ptx::cluster_sync();
}

template <class C>
__global__ void __launch_bounds__(C::kBlockThreads, 1) gemm_kernel(const __grid_constant__ GemmParams p) {
  extern __shared__ char raw[];
  run_block<C>(p, raw);
}

}  // namespace zqfp
