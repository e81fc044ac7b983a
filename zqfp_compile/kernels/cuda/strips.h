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

// A kernel that quantises its tokens has a slot for each round of its threads, an eight each, and each token.
constexpr int kStripRoundColumns = 16 * 32 * 8;
constexpr int kMaxStripSlots = 8;

// Blocks of K in a quarter of it.
ZQFP_HOST_DEVICE int slice_blocks(int k_blocks) { return (k_blocks + kStripSlices - 1) / kStripSlices; }

// Bytes of eight tokens' x8 in shared memory: a tile of 1024 for each block of K, the last quarter filled up.
ZQFP_HOST_DEVICE int octet_bytes(int k_blocks) { return kStripSlices * slice_blocks(k_blocks) * 8 * kBlockColumns; }

}  // namespace zqfp
