// How large packed weights and outputs are, without libzqfp: the blocks of zqfp_compile/kernels/packing.py.
#ifndef ZQFP_HOSTS_PACKED_SIZES_H
#define ZQFP_HOSTS_PACKED_SIZES_H

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "zqfp.h"

namespace zqfp {

constexpr int64_t kBlockRows = 64, kBlockColumns = 128;
constexpr int64_t kGatedRows = 16;  // eight of gate, eight of up

struct PackedSizes {
  int64_t codes = 0, scales = 0;  // bytes
};

// Gives `desc` the outputs of a node's attribute output_n. Throws std::runtime_error when they do not make up n.
template <typename Integer>
void setOutputs(zqfpLinearDesc& desc, const std::vector<Integer>& outputs) {
  int64_t sum = 0;
  bool whole = outputs.size() <= ZQFP_MAX_OUTPUTS;
  for (size_t i = 0; whole && i < outputs.size(); ++i) {
    const bool last = i + 1 == outputs.size();
    whole = outputs[i] > 0 && (last || outputs[i] % kBlockRows == 0);
    desc.outputs[i] = outputs[i];
    sum += outputs[i];
  }
  if (!whole || (!outputs.empty() && sum != desc.n)) {
    throw std::runtime_error("zqfp: attribute output_n does not divide n = " + std::to_string(desc.n) + " into at most " +
                             std::to_string(ZQFP_MAX_OUTPUTS) + " parts, all but the last multiples of 64");
  }
}

// Gives `desc`, which has its n and its outputs, a node's attribute gated. Throws std::runtime_error when it cannot be.
inline void setGated(zqfpLinearDesc& desc, int64_t gated) {
  const auto refuse = [](const std::string& why) { throw std::runtime_error("zqfp: " + why); };
  if (gated != 0 && gated != 1) refuse("attribute gated is " + std::to_string(gated) + ", it must be 0 or 1");
  desc.gated = static_cast<int32_t>(gated);
  if (gated == 0) return;
  if (desc.outputs[0] != 0) refuse("a gated layer has one output, it cannot have the attribute output_n");
  if (desc.n % kGatedRows != 0) {
    refuse("attribute n of a gated layer is " + std::to_string(desc.n) + ", it must be a multiple of 16");
  }
}

// Columns of each output.
inline std::vector<int64_t> outputSizes(const zqfpLinearDesc& desc) {
  if (desc.outputs[0] == 0) return {desc.gated ? desc.n / 2 : desc.n};
  std::vector<int64_t> sizes;
  for (int i = 0; i < ZQFP_MAX_OUTPUTS && desc.outputs[i] > 0; ++i) sizes.push_back(desc.outputs[i]);
  return sizes;
}

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
