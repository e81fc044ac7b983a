// What the host knows of the kernel for few tokens (strip_kernel.cuh).
#pragma once

#include <cstdint>

#include "decode.h"

namespace zqfp {

constexpr int kStripRows = 16;
// x8 arrives in chunks of so many blocks of K; no fewer than warps, so that where there is one chunk the first piece of
// each warp tells of all.
constexpr int kChunkBlocks = 20;
constexpr int kMaxChunks = 16;
constexpr int kMaxStripColumns = kMaxChunks * kChunkBlocks * kBlockColumns;

// Bytes from token to token of x8 in shared memory, padded against bank conflicts.
ZQFP_HOST_DEVICE int strip_pitch(int k_blocks) { return k_blocks * kBlockColumns + 16; }

}  // namespace zqfp
