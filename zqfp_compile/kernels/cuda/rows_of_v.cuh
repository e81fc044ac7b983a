// V as operand A of mma, straight from memory: h, operand B, goes in as it lies there (quantize_lorc.cuh says how).
#pragma once

#include "decode.h"

namespace zqfp {

// What a thread has of 32 rows of V: of rows 8c + 4s + i the ranks 2 * kPairs * q + 2p + {0, 1}.
template <int kPairs>
struct RowsOfV {
  uint32_t word[2][4][kPairs];

  // Not __ldg: the compiler would move that behind the wait for the kernel before.
  template <typename T>
  __device__ __forceinline__ void load(const T* from, int rank, bool inside) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const T* row = from + (4 * s + i) * rank;
        if constexpr (kPairs == 1) {
          word[s][i][0] = inside ? *reinterpret_cast<const uint32_t*>(row) : 0;
        } else {
          const uint2 two = inside ? *reinterpret_cast<const uint2*>(row) : uint2{0, 0};
          word[s][i][0] = two.x;
          word[s][i][1] = two.y;
        }
      }
    }
  }

  // Operand A of mma: of columns 4s to 4s + 3 of each thread's eight, and pair p of its ranks.
  __device__ __forceinline__ void operand(int s, int p, uint32_t (&a)[4]) const {
    const uint32_t row[4] = {word[s][0][p], word[s][1][p], word[s][2][p], word[s][3][p]};
    a[0] = prmt(row[0], row[1], 0x5410);
    a[1] = prmt(row[0], row[1], 0x7632);
    a[2] = prmt(row[2], row[3], 0x5410);
    a[3] = prmt(row[2], row[3], 0x7632);
  }
};

}  // namespace zqfp
