// Packed E2M1 weights -> E4M3 bytes, the same code on host and device. Layout: zqfp_compile/kernels/packing.py.
//
// The eight values e2m1(i) * s of a group are the bytes of two words, `low` for i = 0..3 and `high` for i = 4..7. As
// all but 0 are normal E4M3 numbers (s in [2^-5, 2^6]), a factor of two is 8 in the byte, and with b = bits of s
// and t = bits of E4M3(1.5 s) they are  0, b-8, b, t,  b+8, t+8, b+16, t+16.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ZQFP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ZQFP_HOST_DEVICE inline
#endif

namespace zqfp {

constexpr int kBlockRows = 64;
constexpr int kBlockColumns = 128;
constexpr int kBlockBytes = kBlockRows * kBlockColumns / 2;
constexpr int kThreads = 128;  // of a warpgroup, which multiplies one block

// Packed group scales of one block in bytes; a thread's own are 1/32 of them.
ZQFP_HOST_DEVICE constexpr int scale_block_bytes(int group_size) {
  return kBlockRows * (kBlockColumns / group_size);
}

// PRMT: byte i of the result is byte (selector nibble i & 7) of b:a, or, nibble bit 3 set, copies of its sign.
ZQFP_HOST_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
#else
  const uint64_t bytes = (uint64_t(b) << 32) | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> (4 * i);
    const uint32_t byte = uint32_t(bytes >> (8 * (nibble & 7))) & 0xff;
    result |= ((nibble & 8) ? ((byte & 0x80) ? 0xffu : 0u) : byte) << (8 * i);
  }
  return result;
#endif
}

struct Table {
  uint32_t low, high;
};

// Four packed scales as bits of s and of E4M3(1.5 s).
struct FourScales {
  uint32_t once, half_more;
};

ZQFP_HOST_DEVICE FourScales unpack_scales(uint32_t packed) {
  const uint32_t once = packed & 0x7f7f7f7fu;
  return {once, once + 0x04040404u + ((packed >> 7) & 0x01010101u)};
}

// The table of scale I (0..3).
template <int I>
ZQFP_HOST_DEVICE Table make_table(FourScales s) {
  constexpr uint32_t b = I, t = 4 + I, zero = 8 + I;  // the sign of s, which is 0
  constexpr uint32_t low = zero | b << 4 | b << 8 | t << 12;
  constexpr uint32_t high = b | t << 4 | b << 8 | t << 12;
  return {prmt(s.once, s.half_more, low) - 0x00000800u, prmt(s.once, s.half_more, high) + 0x10100808u};
}

// Eight codes of one word: `first` is columns 4c..4c+3 of a wgmma step, `second` columns 16+4c..16+4c+3.
struct EightValues {
  uint32_t first, second;
};

ZQFP_HOST_DEVICE EightValues decode_word(uint32_t word, Table table) {
  const uint32_t magnitudes = word & 0x77777777u;
  return {prmt(table.low, table.high, magnitudes) | (word & 0x80808080u),
          prmt(table.low, table.high, magnitudes >> 16) | ((word << 4) & 0x80808080u)};
}

// The tables that one thread needs for its block: [wgmma step of 32 columns][row, row + 8].
// `scales` are the thread's 2 * 128/kGroup bytes, in one or two words (upper bytes unused for kGroup = 128).
template <int kGroup>
struct ThreadTables {
  static constexpr int kGroups = kBlockColumns / kGroup;
  static constexpr int kWords = kGroups == 4 ? 2 : 1;
  Table table[kGroups][2];

  ZQFP_HOST_DEVICE explicit ThreadTables(const uint32_t (&scales)[kWords]) {
    const FourScales first = unpack_scales(scales[0]);
    table[0][0] = make_table<0>(first);
    table[0][1] = make_table<1>(first);
    if constexpr (kGroups > 1) {
      table[1][0] = make_table<2>(first);
      table[1][1] = make_table<3>(first);
    }
    if constexpr (kGroups > 2) {
      const FourScales second = unpack_scales(scales[1]);
      table[2][0] = make_table<0>(second);
      table[2][1] = make_table<1>(second);
      table[3][0] = make_table<2>(second);
      table[3][1] = make_table<3>(second);
    }
  }

  ZQFP_HOST_DEVICE Table of(int step, int row_half) const { return table[step * 32 / kGroup][row_half]; }
};

// Two words (row, row + 8) of one step -> the four registers of the wgmma fragment of A.
template <int kGroup>
ZQFP_HOST_DEVICE void decode_step(uint32_t upper, uint32_t lower, const ThreadTables<kGroup>& tables, int step,
                                  uint32_t* fragment) {
  const EightValues row = decode_word(upper, tables.of(step, 0));
  const EightValues row8 = decode_word(lower, tables.of(step, 1));
  fragment[0] = row.first;
  fragment[1] = row8.first;
  fragment[2] = row.second;
  fragment[3] = row8.second;
}

}  // namespace zqfp
