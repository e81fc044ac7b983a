// A weight matrix in FP8 on the CPU, and its product with rows of floats.
#ifndef ZQFP_ORT_MATRIX_H
#define ZQFP_ORT_MATRIX_H

#include <cstdint>
#include <vector>

namespace zqfp {

// w8 [n, k], one byte a weight, in panels of columns that one vector register holds.
class Fp8Matrix {
 public:
  static constexpr int64_t kWidth = 16;

  // From E4M3 codes [n, k], row-major.
  Fp8Matrix(const uint8_t* w8, int64_t n, int64_t k);

  int64_t panels() const { return panels_; }

  // sums[i][j] = sum over k of x[i][k] * w8[panel * kWidth + j][k] in float, for m rows of x [m, k];
  // columns beyond n are 0. `sums` is [m, kWidth].
  void multiply(int64_t panel, const float* x, int64_t m, float* sums) const;

 private:
  int64_t k_;
  int64_t panels_;
  std::vector<uint8_t> codes_;
};

}  // namespace zqfp

#endif
