#include "matrix.h"

#include <algorithm>
#include <cstring>

#include "numbers.h"

// One build runs everywhere and uses what the processor has.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ZQFP_CLONES __attribute__((target_clones("default", "arch=haswell", "arch=skylake-avx512")))
#else
#define ZQFP_CLONES
#endif

namespace zqfp {
namespace {

constexpr int64_t kWidth = Fp8Matrix::kWidth;
constexpr int64_t kDepth = 256;  // of k at once: 16 KiB of decoded weights stay in the first cache
constexpr int64_t kRows = 4;     // of x at once: their sums stay in registers
using Vector = float __attribute__((vector_size(kWidth * sizeof(float)), aligned(4)));

template <int64_t rows>
__attribute__((always_inline)) inline void multiplyRows(const float* weights, const float* x, int64_t k,
                                                        int64_t depth, float* sums) {
  Vector total[rows];
  for (int64_t i = 0; i < rows; ++i) std::memcpy(&total[i], sums + i * kWidth, sizeof(Vector));
  for (int64_t j = 0; j < depth; ++j) {
    Vector weight;
    std::memcpy(&weight, weights + j * kWidth, sizeof(Vector));
    for (int64_t i = 0; i < rows; ++i) total[i] += weight * x[i * k + j];
  }
  for (int64_t i = 0; i < rows; ++i) std::memcpy(sums + i * kWidth, &total[i], sizeof(Vector));
}

ZQFP_CLONES void multiplyPanel(const uint8_t* codes, const float* x, int64_t m, int64_t k, float* sums) {
  float weights[kDepth * kWidth];
  for (int64_t start = 0; start < k; start += kDepth) {
    const int64_t depth = std::min(kDepth, k - start);
    for (int64_t j = 0; j < depth * kWidth; ++j) weights[j] = decodeE4m3(codes[start * kWidth + j]);
    int64_t row = 0;
    for (; row + kRows <= m; row += kRows) {
      multiplyRows<kRows>(weights, x + row * k + start, k, depth, sums + row * kWidth);
    }
    for (; row < m; ++row) multiplyRows<1>(weights, x + row * k + start, k, depth, sums + row * kWidth);
  }
}

}  // namespace

Fp8Matrix::Fp8Matrix(const uint8_t* w8, int64_t n, int64_t k)
    : k_(k), panels_((n + kWidth - 1) / kWidth), codes_(static_cast<size_t>(panels_ * kWidth * k)) {
  for (int64_t row = 0; row < n; ++row) {
    uint8_t* panel = codes_.data() + row / kWidth * kWidth * k + row % kWidth;
    for (int64_t j = 0; j < k; ++j) panel[j * kWidth] = w8[row * k + j];
  }
}

void Fp8Matrix::multiply(int64_t panel, const float* x, int64_t m, float* sums) const {
  std::fill(sums, sums + m * kWidth, 0.0f);
  multiplyPanel(codes_.data() + panel * kWidth * k_, x, m, k_, sums);
}

}  // namespace zqfp
