// Of few tokens each is shared by the blocks of a cluster, as computing takes one processor longer than their meeting.
#pragma once

#include "quantize_value.cuh"

namespace zqfp {

// A thread's place among those that share a token: the threads of 1, 2, 4 or 8 blocks.
struct TokenPlace {
  int64_t token;
  int block;    // of the cluster
  int first;    // eight of the token that the thread begins with
  int threads;  // of the cluster

  __device__ __forceinline__ explicit TokenPlace(int share)
      : token(blockIdx.x >> ((share > 1) + (share > 2) + (share > 4))),
        block(blockIdx.x & (share - 1)),
        first(block * blockDim.x + threadIdx.x),
        threads(share * blockDim.x) {}
};

// Numbers that the blocks of a cluster tell each other, once: they write to each other's memory and count the bytes on the
// barriers, so that no block needs to outlive another. All threads call both.
template <int kCount>
struct ClusterNumbers {
  uint64_t barrier;
  float number[kCount][kMaxClusterBlocks];

  __device__ __forceinline__ void open(int share) {
    if (share == 1) return;  // launched without a cluster
    if (threadIdx.x == 0) {
      ptx::barrier_init(ptx::shared_address(&barrier), 1);
      ptx::barrier_expect(ptx::shared_address(&barrier), share * kCount * sizeof(float));
      ptx::fence_barrier_init();
    }
    ptx::cluster_arrive();
  }

  // Calls `take` for the numbers of each block, in their order.
  template <typename Take>
  __device__ __forceinline__ void exchange(const float (&mine)[kCount], const TokenPlace& at, int share, Take take) {
    if (share == 1) return take(mine);
    ptx::cluster_wait();  // every block has opened its barrier
    if (int(threadIdx.x) < share) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        ptx::store_remote(&number[i][at.block], mine[i], ptx::shared_address(&barrier), threadIdx.x);
      }
    }
    ptx::barrier_wait(ptx::shared_address(&barrier), 0);
#pragma unroll 1
    for (int block = 0; block < share; ++block) {
      float numbers[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) numbers[i] = number[i][block];
      take(numbers);
    }
  }
};

}  // namespace zqfp
