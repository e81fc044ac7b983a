// The kernel: a producer and consumer warpgroups of one persistent block.
#pragma once

#include "consumer.cuh"

namespace zqfp {

template <class C>
__device__ __forceinline__ void init_barriers(Shared<C> shared) {
  for (int stage = 0; stage < C::kStages; ++stage) {
    ptx::barrier_init(shared.full(stage), 1);
    ptx::barrier_init(shared.empty(stage), C::kWarpgroups * (kThreads / 32) * C::kCluster);
  }
  ptx::fence_barrier_init();
}

template <class C>
__device__ __forceinline__ void sync_blocks() {
  if constexpr (C::kCluster > 1) {
    ptx::cluster_sync();
  } else {
    __syncthreads();
  }
}

template <class C>
__device__ __forceinline__ void run_block(const GemmParams& p, char* raw) {
  // Every block aligns in the same way: what one block of a cluster writes lies at the same offset in the others.
  char* memory = raw + (-ptx::shared_address(raw) & 1023u);
  const Shared<C> shared{ptx::shared_address(memory)};
  const int rank = C::kCluster > 1 ? ptx::cluster_block() : 0;
  const int worker = blockIdx.x / C::kCluster;
  const int warpgroup = threadIdx.x / kThreads;

  ptx::release_kernel_after();
  if (threadIdx.x == 0) init_barriers<C>(shared);
  sync_blocks<C>();

  if (warpgroup == C::kWarpgroups) {
    ptx::fewer_registers<C::kProducerRegisters>();
    if (threadIdx.x == C::kWarpgroups * kThreads) {
      ptx::prefetch_map(&p.x8);
      Producer<C>(p, shared, rank).run(worker);
    }
    __syncwarp();
  } else {
    ptx::more_registers<C::kConsumerRegisters>();
    Consumer<C>(p, shared, memory, rank, warpgroup).run(worker);
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
