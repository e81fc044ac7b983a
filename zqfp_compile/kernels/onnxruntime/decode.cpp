#include "decode.h"

#include "numbers.h"

namespace zqfp {
namespace {

// The order of zqfp_compile/kernels/packing.py, which says where each number is and why.
constexpr int64_t kBlockRows = 64, kBlockColumns = 128, kWordsPerBlock = 1024;
constexpr float kE2m1[] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Where row n and column k (a multiple of 4) are: the word, and the half b of it.
struct Place {
  int64_t word;
  int half;
};

Place placeOf(int64_t n, int64_t k, int64_t blockColumns) {
  const int64_t block = n / kBlockRows * blockColumns + k / kBlockColumns;
  const int64_t w = n / 16 % 4, h = n / 8 % 2, q = n % 8;
  const int64_t j = k / 64 % 2, s = k / 32 % 2, b = k / 16 % 2, c = k / 4 % 4;
  const int64_t word = ((j * 128 + 32 * w + 4 * q + c) * 2 + s) * 2 + h;
  return {block * kWordsPerBlock + word, static_cast<int>(b)};
}

int64_t scaleIndex(int64_t n, int64_t k, int64_t groupSize, int64_t blockColumns) {
  const int64_t perBlock = kBlockColumns / groupSize;
  const int64_t block = n / kBlockRows * blockColumns + k / kBlockColumns;
  const int64_t w = n / 16 % 4, h = n / 8 % 2, q = n % 8, j = k % kBlockColumns / groupSize;
  return (block * 32 + 8 * w + q) * (2 * perBlock) + 2 * j + h;
}

}  // namespace

PackedSizes packedSizes(const zqfpLinearDesc& desc) {
  require(desc.group_size == 32 || desc.group_size == 64 || desc.group_size == 128,
          "attribute group_size is " + std::to_string(desc.group_size) + ", it must be 32, 64 or 128");
  const int64_t elements =
      blocks(desc.n, kBlockRows) * kBlockRows * blocks(desc.k, kBlockColumns) * kBlockColumns;
  return {static_cast<std::size_t>(elements / 2), static_cast<std::size_t>(elements / desc.group_size)};
}

void decodeWeights(const zqfpLinearDesc& desc, const void* codes, const void* groupScales, uint8_t* w8) {
  const auto* words = static_cast<const uint32_t*>(codes);
  const auto* scales = static_cast<const uint8_t*>(groupScales);
  const int64_t blockColumns = blocks(desc.k, kBlockColumns);
  for (int64_t n = 0; n < desc.n; ++n) {
    for (int64_t k = 0; k < desc.k; k += 4) {
      const Place place = placeOf(n, k, blockColumns);
      // Bit 7 is no sign: it helps the GPU decode.
      const float scale = decodeE4m3(scales[scaleIndex(n, k, desc.group_size, blockColumns)] & 0x7f);
      for (int e = 0; e < 4; ++e) {
        const uint32_t word = words[place.word];
        const float magnitude = kE2m1[word >> (4 * (4 * place.half + e)) & 7];
        const bool negative = word >> (8 * e + 7 - 4 * place.half) & 1;
        w8[n * desc.k + k + e] = encodeE4m3((negative ? -magnitude : magnitude) * scale);
      }
    }
  }
}

}  // namespace zqfp
