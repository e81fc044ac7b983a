// What the host knows of the kernel for few tokens (strip_kernel.cuh).
#pragma once

#include <cstdint>

#include "decode.h"

namespace zqfp {

constexpr int kStripRows = 16;
// The warps of a warpgroup have a quarter of K each.
constexpr int kStripSlices = 4;
// x8 arrives in chunks of so many columns of blocks, a block of each quarter.
constexpr int kStripChunk = 4;
constexpr int kMaxStripChunks = 8;
constexpr int kMaxStripColumns = kMaxStripChunks * kStripChunk * kStripSlices * kBlockColumns;

// Blocks of K in a quarter of it.
ZQFP_HOST_DEVICE constexpr int slice_blocks(int k_blocks) { return (k_blocks + kStripSlices - 1) / kStripSlices; }

// Bytes of x8 in shared memory, the last quarter filled up.
ZQFP_HOST_DEVICE constexpr int token_bytes(int tokens, int k_blocks) {
  return tokens * kStripSlices * slice_blocks(k_blocks) * kBlockColumns;
}

// What belongs to a strip's rows: their scales, bias and u, rank by rank, of which a step of mma takes 16. There is room
// for several strips' where x @ V is made meanwhile.
constexpr int kSideBiasOffset = kStripRows * 4, kSideFactorOffset = kSideBiasOffset + kStripRows * 2;
constexpr int kSideRankBytes = kStripRows * 2;
ZQFP_HOST_DEVICE constexpr int side_bytes(int rank) { return kSideFactorOffset + (rank + 15) / 16 * 16 * kSideRankBytes; }
ZQFP_HOST_DEVICE constexpr int side_count(int tokens) { return tokens < 8 ? 4 : 1; }

// Shared memory that depends on the layer: x8, and behind it the sides.
ZQFP_HOST_DEVICE constexpr int layer_bytes(int tokens, int k_blocks, int rank) {
  return token_bytes(tokens, k_blocks) + side_count(tokens) * side_bytes(rank);
}

}  // namespace zqfp
