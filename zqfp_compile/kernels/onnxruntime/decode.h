// Packed weights back to FP8 on the host, without libzqfp.
#ifndef ZQFP_ORT_DECODE_H
#define ZQFP_ORT_DECODE_H

#include <cstddef>
#include <cstdint>

#include "zqfp.h"

namespace zqfp {

struct PackedSizes {
  std::size_t codes = 0, scales = 0;  // bytes
};

PackedSizes packedSizes(const zqfpLinearDesc& desc);

// w8 as E4M3 bytes [n, k], what zqfpDecodeHost returns.
void decodeWeights(const zqfpLinearDesc& desc, const void* codes, const void* groupScales, uint8_t* w8);

}  // namespace zqfp

#endif
