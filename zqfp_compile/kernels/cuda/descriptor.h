// Matrix descriptors of wgmma.
#pragma once

#include "decode.h"

namespace zqfp::ptx {

// Descriptor of a tile in shared memory with rows of 128 bytes in 128-byte swizzle. `address` is aligned to 1024, or
// inside such a row by a multiple of 32 bytes. Along a row runs k (operand B here), or, for the transposed operand A,
// the 64 rows of the weight; `stride` bytes lie between the beginnings of eight rows of the other dimension and the next.
ZQFP_HOST_DEVICE uint64_t descriptor(uint32_t address, uint32_t stride = 1024) {
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  return kSwizzle128 | uint64_t(stride >> 4) << 32 | ((address & 0x3ffff) >> 4);
}

// The descriptor of what begins `bytes` later, a multiple of 16. An addition of 32 bits: addresses do not carry.
ZQFP_HOST_DEVICE uint64_t descriptor_after(uint64_t tile, int bytes) {
  return (tile & 0xffffffff00000000ull) | (uint32_t(tile) + uint32_t(bytes >> 4));
}

// A descriptor for the transposed operand; its one 128-byte row covers all 64 rows, so the leading stride is not used.
ZQFP_HOST_DEVICE uint64_t descriptor_transposed(uint32_t address) {
  constexpr uint64_t kLeading = 1024 >> 4;
  return descriptor(address) | kLeading << 16;
}

}  // namespace zqfp::ptx
