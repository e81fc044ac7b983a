// Packed weights -> E4M3 on the host, by the very code of the kernel: what thread t of a warpgroup would hold.
#include "check.h"
#include "decode.h"

namespace zqfp {
namespace {

int blocks(int64_t size, int block) { return int((size + block - 1) / block); }

struct HostWeight {
  const uint32_t* codes;
  const uint8_t* scales;
  uint8_t* w8;
  int64_t n, k;

  void put(int64_t row, int64_t column, uint32_t four) const {
    if (row >= n) return;
    for (int i = 0; i < 4; ++i) {
      if (column + i < k) w8[row * k + column + i] = uint8_t(four >> (8 * i));
    }
  }
};

template <int kGroup>
void decode_thread(const HostWeight& w, int64_t row_block, int64_t block, int64_t column, int thread) {
  constexpr int kBytes = scale_block_bytes(kGroup) / 32;
  const uint8_t* bytes = w.scales + block * scale_block_bytes(kGroup) + thread / 4 * kBytes;
  uint32_t scales[ThreadTables<kGroup>::kWords] = {};
  for (int i = 0; i < kBytes; ++i) scales[i / 4] |= uint32_t(bytes[i]) << (8 * (i % 4));
  const ThreadTables<kGroup> tables(scales);

  const int64_t row = row_block * kBlockRows + thread / 32 * 16 + thread % 32 / 4;
  for (int step = 0; step < 4; ++step) {
    const uint32_t* words = w.codes + block * (kBlockBytes / 4) + (step / 2 * kThreads + thread) * 4 + step % 2 * 2;
    uint32_t fragment[4];
    decode_step<kGroup>(words[0], words[1], tables, step, fragment);
    for (int i = 0; i < 4; ++i) w.put(row + i % 2 * 8, column + step * 32 + thread % 4 * 4 + i / 2 * 16, fragment[i]);
  }
}

template <int kGroup>
void decode(const HostWeight& w) {
  const int row_blocks = blocks(w.n, kBlockRows), column_blocks = blocks(w.k, kBlockColumns);
  for (int row_block = 0; row_block < row_blocks; ++row_block) {
    for (int column_block = 0; column_block < column_blocks; ++column_block) {
      const int64_t block = int64_t(row_block) * column_blocks + column_block;
      for (int thread = 0; thread < kThreads; ++thread) {
        decode_thread<kGroup>(w, row_block, block, int64_t(column_block) * kBlockColumns, thread);
      }
    }
  }
}

}  // namespace
}  // namespace zqfp

zqfpStatus zqfpGetPackedSizes(const zqfpLinearDesc* desc, size_t* codes_bytes, size_t* scales_bytes) {
  using namespace zqfp;
  ZQFP_RETURN_IF_FAILED(check_desc(desc));
  if (codes_bytes == nullptr || scales_bytes == nullptr) return fail(ZQFP_INVALID_VALUE, "a result pointer is null");
  const size_t count = size_t(blocks(desc->n, kBlockRows)) * blocks(desc->k, kBlockColumns);
  *codes_bytes = count * kBlockBytes;
  *scales_bytes = count * scale_block_bytes(desc->group_size);
  return ZQFP_SUCCESS;
}

zqfpStatus zqfpDecodeHost(const zqfpLinearDesc* desc, const void* codes, const void* group_scales, uint8_t* w8) {
  using namespace zqfp;
  ZQFP_RETURN_IF_FAILED(check_desc(desc));
  if (codes == nullptr || group_scales == nullptr || w8 == nullptr) {
    return fail(ZQFP_INVALID_VALUE, "codes, group_scales or w8 is null");
  }
  if (reinterpret_cast<uintptr_t>(codes) % 4 != 0) return fail(ZQFP_INVALID_VALUE, "codes are not aligned to 4 bytes");
  const HostWeight weight{static_cast<const uint32_t*>(codes), static_cast<const uint8_t*>(group_scales), w8, desc->n,
                          desc->k};
  if (desc->group_size == 32) decode<32>(weight);
  if (desc->group_size == 64) decode<64>(weight);
  if (desc->group_size == 128) decode<128>(weight);
  return ZQFP_SUCCESS;
}
