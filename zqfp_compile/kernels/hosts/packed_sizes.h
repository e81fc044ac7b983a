// How large packed weights are, without libzqfp: the blocks of zqfp_compile/kernels/packing.py.
#ifndef ZQFP_HOSTS_PACKED_SIZES_H
#define ZQFP_HOSTS_PACKED_SIZES_H

#include <cstdint>
#include <stdexcept>
#include <string>

#include "zqfp.h"

namespace zqfp {

constexpr int64_t kBlockRows = 64, kBlockColumns = 128;

struct PackedSizes {
  int64_t codes = 0, scales = 0;  // bytes
};

// Throws std::runtime_error for a group size there is no order for.
inline PackedSizes packedSizes(const zqfpLinearDesc& desc) {
  if (desc.group_size != 32 && desc.group_size != 64 && desc.group_size != 128) {
    throw std::runtime_error("zqfp: attribute group_size is " + std::to_string(desc.group_size) +
                             ", it must be 32, 64 or 128");
  }
  const int64_t rows = (desc.n + kBlockRows - 1) / kBlockRows * kBlockRows;
  const int64_t columns = (desc.k + kBlockColumns - 1) / kBlockColumns * kBlockColumns;
  return {rows * columns / 2, rows * columns / desc.group_size};
}

}  // namespace zqfp

#endif
