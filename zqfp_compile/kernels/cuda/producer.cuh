// The producer: two threads that keep the copy engine busy, a stage of shared memory after the other.
#pragma once

#include "config.h"
#include "params.h"
#include "ptx.cuh"
#include "trace.cuh"

namespace zqfp {

// Position in a ring of stages; the parity flips each time round.
template <int kCount>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kCount) {
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
  // What lies at an offset from the beginning.
  template <typename T>
  __device__ __forceinline__ T* at(int offset) const {
    return ptx::shared_pointer<T>(base + offset);
  }
  // Of the output's ring (output.cuh).
  __device__ __forceinline__ uint32_t out(int row, int slot) const {
    return base + C::kOutOffset + (row * C::kOutSlots + slot) * C::kOutSlotBytes;
  }
  __device__ __forceinline__ uint32_t out_full(int row, int slot) const {
    return full(2 * C::kStages + row * C::kOutSlots + slot);
  }
  __device__ __forceinline__ uint32_t out_empty(int row, int slot) const {
    return out_full(row, slot + C::kRows * C::kOutSlots);
  }
  // Of what the other of two blocks sends: it is there; there is room for it.
  __device__ __forceinline__ uint32_t peer_full(int row) const { return out_full(2 * C::kRows, row); }
  __device__ __forceinline__ uint32_t peer_empty(int row) const { return peer_full(row + C::kRows); }
};

template <class C>
__device__ __forceinline__ int this_worker() {
  return blockIdx.x / C::kGang;
}

// What a block has of a worker's segment: of two that share K, whose tiles are whole, a half. The second's is never empty.
template <class C>
__device__ __forceinline__ Segment part_of(Segment segment, int rank) {
  if constexpr (C::kSplit > 1) (rank == 0 ? segment.end : segment.begin) = segment.end / 2;
  return segment;
}

// Where a block's tile lies in the matrices.
struct Tile {
  int row_block;   // first block of 64 rows
  int row_blocks;  // that exist, at most kRows; 0 for a block beyond the weight that only helps its cluster
  int token;
};

template <class C>
__device__ __forceinline__ Tile locate(const GemmParams& p, int tile, int rank) {
  const TilePosition at = tile_position(p.schedule, tile);
  const int row_block = (at.row_tile * C::kCluster + (C::kCluster > 1 ? rank : 0)) * C::kRows;
  const int left = p.row_blocks - row_block;
  return {row_block, left < 0 ? 0 : (left < C::kRows ? left : C::kRows), at.token_tile * C::kTokens};
}

// The stages of one worker, one after the other: units of K, and behind the last of a tile the steps of LoRC.
template <class C>
class Cursor {
 public:
  __device__ __forceinline__ Cursor(const GemmParams& p, int rank) : walk_(p.schedule, this_worker<C>()), rank_(rank) {}

  // Goes to the next stage; false behind the last.
  __device__ __forceinline__ bool next(const GemmParams& p) {
    if (++unit < end_) return true;
    Segment segment;
    if (!walk_.next(p.schedule, this_worker<C>(), segment)) return false;
    segment = part_of<C>(segment, rank_);
    tile = locate<C>(p, segment.tile, rank_);
    unit = segment.begin;
    end_ = segment.end + (segment.end == p.schedule.units ? p.lorc_steps : 0);
    return true;
  }

  Tile tile{};
  int unit = 0;  // from Schedule::units on: steps of LoRC

 private:
  Walk walk_;
  int rank_;
  int end_ = 0;
};

// Two threads fill the stages, each saying what it will bring: one the weights, which no kernel before makes, and one
// the activations.
template <class C>
class Producer {
 public:
  __device__ __forceinline__ Producer(const GemmParams& p, Shared<C> shared, int rank)
      : p_(p),
        shared_(shared),
        rank_(rank),
        cursor_(p, rank),
        // With one tile of tokens, each weight is read once.
        weight_policy_(p.schedule.token_tiles == 1 ? ptx::kEvictFirst : ptx::kEvictNormal),
        token_policy_(p.schedule.token_tiles == 1 ? ptx::kEvictLast : ptx::kEvictNormal) {}

  // The first stages, for which it needs nobody. Not all: the block waits for this.
  __device__ __forceinline__ void start_weights() {
    constexpr int kEarly = 2;
    static_assert(kEarly <= C::kStages && kEarly <= C::kInFlight, "those wait for somebody");
    while (started_ < kEarly && (more_ = cursor_.next(p_))) {
      load_weights();
      ++started_;
    }
  }

  // At most kInFlight stages are on their way: copies share the bandwidth, and with more of them the first takes longer.
  __device__ __forceinline__ void run_weights() {
    while (more_ && cursor_.next(p_)) {
      if constexpr (C::kInFlight < C::kStages) {
        if (started_ == C::kInFlight) {
          ptx::barrier_wait(shared_.full(arriving_.stage), arriving_.parity);
          arriving_.advance();
        } else {
          ++started_;
        }
      }
      load_weights();
    }
  }

  __device__ __forceinline__ void run_tokens() {
    ptx::wait_for_kernel_before();
    while (cursor_.next(p_)) load_tokens();
  }

 private:
  const GemmParams& p_;
  Shared<C> shared_;
  int rank_;
  Cursor<C> cursor_;
  uint64_t weight_policy_, token_policy_;
  Ring<C::kStages> ring_, arriving_;
  int started_ = 0;
  bool more_ = true;

  // Waits for the stage and says what will come.
  __device__ __forceinline__ uint32_t acquire(uint32_t bytes) {
    const uint32_t barrier = shared_.full(ring_.stage);
    ptx::barrier_wait(shared_.empty(ring_.stage), ring_.parity ^ 1);
    ptx::barrier_expect(barrier, bytes);
    return barrier;
  }

  // Of the kSlices blocks of K of a unit, those that exist: fewer at the end.
  __device__ __forceinline__ int slices() const {
    const int left = p_.k_blocks - cursor_.unit * C::kSlices;
    return left < C::kSlices ? left : C::kSlices;
  }

  __device__ __forceinline__ void load_weights() {
    const int lorc_step = cursor_.unit - p_.schedule.units;
    lorc_step < 0 ? load_codes() : load_u(lorc_step);
    ring_.advance();
  }

  __device__ __forceinline__ void load_codes() {
    constexpr int kScaleBlock = scale_block_bytes(C::kGroup);
    const Tile& tile = cursor_.tile;
    const int count = slices();
    const uint32_t barrier = acquire(tile.row_blocks * count * (kBlockBytes + kScaleBlock));
#pragma unroll 1  // few registers are left to the producer
    for (int row = 0; row < tile.row_blocks; ++row) {
      const int64_t index = int64_t(tile.row_block + row) * p_.k_blocks + cursor_.unit * C::kSlices;
      ptx::copy_bytes(shared_.codes(ring_.stage, row * C::kSlices), p_.codes + index * kBlockBytes,
                      count * kBlockBytes, barrier, weight_policy_);
      ptx::copy_bytes(shared_.scales(ring_.stage, row * C::kSlices), p_.group_scales + index * kScaleBlock,
                      count * kScaleBlock, barrier, weight_policy_);
    }
  }

  // kLorcStep ranks of u in place of codes; u has a row of 128 bytes per rank.
  __device__ __forceinline__ void load_u(int step) {
    const Tile& tile = cursor_.tile;
    const uint32_t barrier = acquire(tile.row_blocks * kBlockBytes);
#pragma unroll 1
    for (int row = 0; row < tile.row_blocks; ++row) {
      ptx::copy_box(shared_.codes(ring_.stage, row), &p_.u, (tile.row_block + row) * kBlockRows, step * kLorcStep,
                    barrier, ptx::kEvictNormal);
    }
  }

  // x8 of every slice, or kLorcStep ranks of xv in place of the first.
  __device__ __forceinline__ void load_tokens() {
    const int lorc_step = cursor_.unit - p_.schedule.units;
    const int count = lorc_step < 0 ? slices() : 1;
    const uint32_t barrier = acquire(count * C::kCluster * p_.box_tokens * kBlockColumns);
    const CUtensorMap* map = lorc_step < 0 ? &p_.x8 : &p_.xv;
    const int column = lorc_step < 0 ? cursor_.unit * C::kSlices * kBlockColumns : lorc_step * kLorcStep;
#pragma unroll 1
    for (int slice = 0; slice < count; ++slice) {
      load_box(map, slice, column + slice * kBlockColumns, barrier);
    }
    ring_.advance();
  }

  // 128 bytes of each token of the tile; in a cluster each block loads its part for all.
  __device__ __forceinline__ void load_box(const CUtensorMap* map, int slice, int column, uint32_t barrier) {
    const uint32_t to = shared_.activations(ring_.stage, slice);
    const int token = cursor_.tile.token;
    if constexpr (C::kCluster == 1) {
      ptx::copy_box(to, map, column, token, barrier, token_policy_);
    } else {
      constexpr int kPart = C::kTokens / C::kCluster;
      ptx::copy_box_to_cluster(to + rank_ * kPart * kBlockColumns, map, column, token + rank_ * kPart, barrier,
                               (1 << C::kCluster) - 1, token_policy_);
    }
  }
};

}  // namespace zqfp
