// Stands in for cuda/wgmma.cuh on the host: fragments and descriptors as the PTX ISA defines them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "ptx.cuh"

namespace zqfp {

// E4M3 of finite numbers.
inline float from_e4m3(uint8_t byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  const float size = exponent ? std::ldexp(8.f + mantissa, exponent - 10) : std::ldexp(float(mantissa), -9);
  return byte & 0x80 ? -size : size;
}

// The fields of a matrix descriptor; only 128-byte swizzle is known here.
struct Matrix {
  uint32_t start, stride;

  explicit Matrix(uint64_t descriptor)
      : start(uint32_t(descriptor & 0x3fff) << 4), stride(uint32_t(descriptor >> 32 & 0x3fff) << 4) {
    if (descriptor >> 62 != 1) abort();
  }
  // Byte `byte` of line `line`: lines of 128 bytes, eight to a swizzle pattern, patterns `stride` apart.
  const char* at(int line, int byte) const {
    return ptx::block->at(emulator::swizzle(start + line / 8 * stride + line % 8 * 128 + byte));
  }
};

template <int kTokens>
struct Wgmma {
  using Sums = float[kTokens / 2];

  // A[64][32]: thread 32w + 4q + c holds in a[2b + h] row 16w + 8h + q, columns 16b + 4c + 0..3.
  static void e4m3(Sums& d, const uint32_t* a, uint64_t b) {
    ptx::open_group.push_back([&d, a, b] { run_e4m3(d, a, b); });
  }

  static void half(Sums& d, uint64_t a, uint64_t b) {
    ptx::open_group.push_back([&d, a, b] { sixteen<__half>(d, a, b); });
  }
  static void bfloat(Sums& d, uint64_t a, uint64_t b) {
    ptx::open_group.push_back([&d, a, b] { sixteen<__nv_bfloat16>(d, a, b); });
  }

 private:
  static void run_e4m3(Sums& d, const uint32_t* a, uint64_t b) {
    emulator::Exchange& group = ptx::block->warpgroups[threadIdx.x / 128];
    const int thread = threadIdx.x % 128;
    for (int i = 0; i < 4; ++i) group.words[thread][i] = a[i];
    group.barrier.sync(128);
    const Matrix tokens(b);
    add(d, [&](int row, int token, int k) {
      const uint32_t word = group.words[row / 16 * 32 + row % 8 * 4 + k % 16 / 4][k / 16 * 2 + row % 16 / 8];
      return from_e4m3(uint8_t(word >> (k % 4 * 8))) * from_e4m3(uint8_t(*tokens.at(token, k)));
    }, 32);
    group.barrier.sync(128);
  }

  template <typename T>
  static float number(const char* from) {
    T value;
    std::memcpy(&value, from, 2);
    return float(value);
  }

  template <typename T>
  static void sixteen(Sums& d, uint64_t a, uint64_t b) {
    const Matrix rows(a), tokens(b);
    add(d, [&](int row, int token, int k) {
      return number<T>(rows.at(k, row * 2)) * number<T>(tokens.at(token, k * 2));
    }, 16);
    ptx::block->warpgroups[threadIdx.x / 128].barrier.sync(128);
  }

  // d[4j + 2h + i] is row 16w + 8h + q of column 8j + 2c + i.
  template <typename Product>
  static void add(Sums& d, Product product, int columns) {
    const int thread = threadIdx.x % 128, w = thread / 32, q = thread % 32 / 4, c = thread % 4;
    for (int index = 0; index < kTokens / 2; ++index) {
      const int row = 16 * w + index / 2 % 2 * 8 + q, token = index / 4 * 8 + 2 * c + index % 2;
      for (int k = 0; k < columns; ++k) d[index] += product(row, token, k);
    }
  }
};

}  // namespace zqfp
