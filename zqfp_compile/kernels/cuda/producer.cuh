// The producer: one thread that keeps the copy engine busy, a stage of shared memory after the other.
#pragma once

#include "config.h"
#include "params.h"
#include "ptx.cuh"

namespace zqfp {

// Position in the ring of stages; the parity flips each time round.
template <class C>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == C::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Addresses in shared memory.
template <class C>
struct Shared {
  uint32_t base;

  __device__ __forceinline__ uint32_t activations(int stage, int slice) const {
    return base + C::kActivationOffset + stage * C::kActivationBytes + slice * C::kTileBytes;
  }
  __device__ __forceinline__ uint32_t codes(int stage, int warpgroup) const {
    return base + C::kCodeOffset + stage * C::kCodeBytes + warpgroup * kBlockBytes;
  }
  __device__ __forceinline__ uint32_t scales(int stage, int warpgroup) const {
    return base + C::kScaleOffset + stage * C::kScaleBytes + warpgroup * scale_block_bytes(C::kGroup);
  }
  __device__ __forceinline__ uint32_t full(int stage) const { return base + C::kBarrierOffset + stage * 8; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(stage + C::kStages); }
};

// Where a block's tile lies in the matrices.
struct Tile {
  int row_block;   // first block of 64 rows
  int row_blocks;  // that exist, at most kRows; 0 for a block beyond the weight that only helps its cluster
  int token;
};

template <class C>
__device__ __forceinline__ Tile locate(const GemmParams& p, int tile, int rank) {
  const TilePosition at = tile_position(p.schedule, tile);
  const int row_block = (at.row_tile * C::kCluster + rank) * C::kRows;
  const int left = p.row_blocks - row_block;
  return {row_block, left < 0 ? 0 : (left < C::kRows ? left : C::kRows), at.token_tile * C::kTokens};
}

template <class C>
class Producer {
 public:
  __device__ __forceinline__ Producer(const GemmParams& p, Shared<C> shared, int rank)
      : p_(p),
        shared_(shared),
        rank_(rank),
        weight_policy_(p.schedule.token_tiles == 1 ? ptx::kEvictFirst : ptx::kEvictNormal),
        token_policy_(p.schedule.token_tiles == 1 ? ptx::kEvictLast : ptx::kEvictNormal) {}

  __device__ __forceinline__ void run(int worker) {
    Walk walk(p_.schedule, worker);
    Segment segment;
    for (bool first = true; walk.next(p_.schedule, segment); first = false) {
      const Tile tile = locate<C>(p_, segment.tile, rank_);
      const int weights_ready = segment.begin + (first ? start(tile, segment) : 0);
      for (int unit = segment.begin; unit < segment.end; ++unit) {
        if (unit >= weights_ready) load_weights(tile, unit);
        load_activations(tile, unit);
        ring_.advance();
      }
      if (segment.end < p_.schedule.units) continue;
      for (int step = 0; step < p_.lorc_steps; ++step) load_lorc(tile, step);
    }
  }

 private:
  // Fills the ring with weights while the kernel before may still be making the activations; returns the units.
  __device__ __forceinline__ int start(const Tile& tile, const Segment& segment) {
    const int length = segment.end - segment.begin;
    const int units = length < C::kStages ? length : C::kStages;
    for (int i = 0; i < units; ++i) {
      load_weights(tile, segment.begin + i);
      ring_.advance();
    }
    ring_ = Ring<C>();
    ptx::wait_for_kernel_before();
    return units;
  }

  // Waits for the stage and says what will come.
  __device__ __forceinline__ void acquire(uint32_t bytes) {
    ptx::barrier_wait(shared_.empty(ring_.stage), ring_.parity ^ 1);
    ptx::barrier_expect(shared_.full(ring_.stage), bytes);
  }

  // Of the kSlices blocks of K of a unit, those that exist: fewer at the end.
  __device__ __forceinline__ int slices_of(int unit) const {
    const int left = p_.k_blocks - unit * C::kSlices;
    return left < C::kSlices ? left : C::kSlices;
  }

  __device__ __forceinline__ void load_weights(const Tile& tile, int unit) {
    constexpr int kScaleBlock = scale_block_bytes(C::kGroup);
    const int slices = slices_of(unit);
    acquire(slices * C::kTileBytes + tile.row_blocks * slices * (kBlockBytes + kScaleBlock));
    const uint32_t barrier = shared_.full(ring_.stage);
#pragma unroll 1  // few registers are left to the producer
    for (int row = 0; row < tile.row_blocks; ++row) {
      const int64_t index = int64_t(tile.row_block + row) * p_.k_blocks + unit * C::kSlices;
      ptx::copy_bytes(shared_.codes(ring_.stage, row * C::kSlices), p_.codes + index * kBlockBytes,
                      slices * kBlockBytes, barrier, weight_policy_);
      ptx::copy_bytes(shared_.scales(ring_.stage, row * C::kSlices), p_.group_scales + index * kScaleBlock,
                      slices * kScaleBlock, barrier, weight_policy_);
    }
  }

  __device__ __forceinline__ void load_activations(const Tile& tile, int unit) {
    const int slices = slices_of(unit);
    for (int slice = 0; slice < slices; ++slice) {
      load_tokens(&p_.x8, slice, (unit * C::kSlices + slice) * kBlockColumns, tile.token);
    }
  }

  // kLorcStep ranks of u in place of codes and of xv in place of activations; u has a row of 128 bytes per rank.
  __device__ __forceinline__ void load_lorc(const Tile& tile, int step) {
    acquire(C::kTileBytes + tile.row_blocks * kBlockBytes);
#pragma unroll 1
    for (int row = 0; row < tile.row_blocks; ++row) {
      ptx::copy_box(shared_.codes(ring_.stage, row), &p_.u, (tile.row_block + row) * kBlockRows, step * kLorcStep,
                    shared_.full(ring_.stage), ptx::kEvictNormal);
    }
    load_tokens(&p_.xv, 0, step * kLorcStep, tile.token);
    ring_.advance();
  }

  // 128 bytes of each token of the tile; in a cluster each block loads its part for all.
  __device__ __forceinline__ void load_tokens(const CUtensorMap* map, int slice, int column, int token) {
    const uint32_t to = shared_.activations(ring_.stage, slice);
    const uint32_t barrier = shared_.full(ring_.stage);
    if constexpr (C::kCluster == 1) {
      ptx::copy_box(to, map, column, token, barrier, token_policy_);
    } else {
      constexpr int kPart = C::kTokens / C::kCluster;
      ptx::copy_box_to_cluster(to + rank_ * kPart * kBlockColumns, map, column, token + rank_ * kPart, barrier,
                               (1 << C::kCluster) - 1, token_policy_);
    }
  }

  const GemmParams& p_;
  Shared<C> shared_;
  int rank_;
  uint64_t weight_policy_, token_policy_;  // with one tile of tokens, each weight is read once
  Ring<C> ring_;
};

}  // namespace zqfp
