// The shape of a kernel of strips, and where its shared memory goes.
#pragma once

#include "ptx.cuh"
#include "strips.h"

namespace zqfp {

constexpr int kBarriersReady = 1;  // named barrier

// 2, 8 or 16 tokens. Blocks: that a multiprocessor has room for, of this kernel and of the next one.
template <int Tokens, int Group, int Ahead, int Warpgroups = 4, int Blocks = 1>
struct StripConfig {
  static constexpr int kTokens = Tokens, kGroup = Group, kAhead = Ahead, kBlocks = Blocks;
  static constexpr int kOctets = (Tokens + 7) / 8;
  static constexpr int kColumns = kStripSlices * Tokens;  // of wgmma's B
  static constexpr int kWarpgroups = Warpgroups, kWarps = kWarpgroups * 4;
  static constexpr int kThreads = (kWarps + 1) * 32;
  // Strips whose sums have room. Where x @ V is made meanwhile, it comes later than the sums of the first strips, and other
  // blocks' part of it may be later still.
  static constexpr int kRing = Tokens < 8 ? 4 : Tokens == 8 ? 2 : 1;
  static constexpr int kSides = side_count(Tokens);
  static constexpr int kRankSteps = 4;  // of 16 ranks
  static constexpr int kRanks = 16 * kRankSteps;

  // Shared memory: barriers, factors and scales of tokens, sums, pieces; then x8 and sides of strips (layer_bytes).
  static constexpr int kBarrierBytes = 256;
  static constexpr int kTokenScaleOffset = kBarrierBytes - Tokens * 4;
  static constexpr int kTokenFactorOffset = kTokenScaleOffset - Tokens * 4;
  static_assert((kMaxStripChunks + 2 * kRing) * 8 <= kTokenFactorOffset);
  static constexpr int kSumOffset = kBarrierBytes;
  // Of a warp's lanes those that have sums of its quarter: 2c and 2c + 1 of eight tokens, or of two the ones with c = 0.
  static constexpr int kSumLanes = Tokens < 8 ? 8 : 32;
  static constexpr int kStripBytes = kWarps * kOctets * kSumLanes * 16;
  static constexpr int kPieceOffset = kSumOffset + kRing * kStripBytes;
  // Group scales of a thread's two rows: at least the 4 bytes that can be copied.
  static constexpr int kScaleBytes = scale_block_bytes(Group) / 32;
  static constexpr int kScaleCopy = kScaleBytes < 4 ? 4 : kScaleBytes;
  static constexpr int kCodeBytes = kStripRows * kBlockColumns / 2;
  static constexpr int kPieceBytes = kCodeBytes + 32 * kScaleCopy;
  static constexpr int kTokenOffset = (kPieceOffset + kWarps * Ahead * kPieceBytes + 1023) / 1024 * 1024;
  static constexpr int kAlignment = 1024;
  static constexpr int kSharedBytes = kTokenOffset + kAlignment;  // without layer_bytes
};

template <class C>
struct StripShared {
  uint32_t base;

  __device__ __forceinline__ uint32_t chunk(int index) const { return base + index * 8; }
  // In the kernels that make their tokens the first of them says that tokens are made.
  __device__ __forceinline__ uint32_t tokens_made() const { return chunk(0); }
  __device__ __forceinline__ uint32_t full(int stage) const { return base + (kMaxStripChunks + stage) * 8; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(C::kRing + stage); }
  // Of a kernel that quantises its tokens. The factor is a norm's.
  __device__ __forceinline__ float* token_scale(int token) const {
    return ptx::shared_pointer<float>(base + C::kTokenScaleOffset) + token;
  }
  __device__ __forceinline__ float* token_factor(int token) const {
    return ptx::shared_pointer<float>(base + C::kTokenFactorOffset) + token;
  }
  // A lane's part of a warp's sums of eight tokens, or of two.
  __device__ __forceinline__ float4* sums(int stage, int slot, int octet, int lane) const {
    return ptx::shared_pointer<float4>(base + C::kSumOffset + stage * C::kStripBytes) +
           (slot * C::kOctets + octet) * C::kSumLanes + lane / (32 / C::kSumLanes);
  }
  __device__ __forceinline__ uint32_t piece(int warp, int stage) const {
    return base + C::kPieceOffset + (warp * C::kAhead + stage) * C::kPieceBytes;
  }
  __device__ __forceinline__ uint32_t tokens() const { return base + C::kTokenOffset; }
  // Where 16 bytes of x8 lie that begin at a column: in tiles of eight rows of a block of K, in the swizzle of 128 bytes.
  // A tile's rows are eight tokens, the tiles in the order of K; or both tokens of four quarters, a tile for each column.
  __device__ __forceinline__ uint32_t token_place(int token, int column, int columns) const {
    int tile = column / kBlockColumns, row = token;
    if constexpr (C::kTokens < 8) {
      const int slice = (tile >= columns) + (tile >= 2 * columns) + (tile >= 3 * columns);
      tile -= slice * columns;
      row = slice * C::kTokens + token;
    }
    return tokens() + tile * 1024 + row * 128 + ((column / 16 % 8) ^ row) * 16;
  }
};

}  // namespace zqfp
