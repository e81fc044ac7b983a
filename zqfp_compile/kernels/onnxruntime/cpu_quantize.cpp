#include <algorithm>
#include <cmath>

#include "cpu.h"
#include "numbers.h"

namespace zqfp {
namespace {

constexpr float kLargest = 448.0f;
constexpr float kSmallestRange = 1e-30f;

// xv of one row: float sums, rounded once.
template <typename T>
void projectRow(const float* x, const float* v, int64_t k, int64_t rank, T* xv) {
  std::vector<float> sums(static_cast<size_t>(rank));
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t r = 0; r < rank; ++r) sums[r] += x[i] * v[i * rank + r];
  }
  for (int64_t r = 0; r < rank; ++r) xv[r] = fromFloat<T>(sums[r]);
}

// The order of operations is that of the standard nodes: amax, Max, Div, Div, round.
float quantizeRow(const float* x, int64_t k, const float* scale, uint8_t* x8) {
  float a = scale == nullptr ? 0.0f : *scale;
  if (scale == nullptr) {
    for (int64_t i = 0; i < k; ++i) a = std::max(a, std::fabs(x[i]));
    a = std::max(a, kSmallestRange) / kLargest;
  }
  for (int64_t i = 0; i < k; ++i) x8[i] = encodeE4m3(x[i] / a);
  return a;
}

// Rounds a float to T and back.
template <typename T>
float rounded(float value) {
  const T number = fromFloat<T>(value);
  toFloat(&number, 1, &value);
  return value;
}

// The outputs of every row, which `make(row, h, tag)` writes as floats to h; they are numbers of tag's type.
template <typename Make>
void quantizeRows(Ort::KernelContext& context, const QuantizeNode& node, const QuantizeCall& call, Make make) {
  const auto v = asFloats(call.v, call.type, call.k * node.rank);
  parallelFor(context, call.m, [&](int64_t row) {
    withType(call.type, [&](auto* tag) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(tag)>>;
      std::vector<float> h(static_cast<size_t>(call.k));
      make(row, h.data(), tag);
      const float a = quantizeRow(h.data(), call.k, call.scale, static_cast<uint8_t*>(call.x8) + row * call.k);
      if (call.a != nullptr) call.a[row] = a;
      if (node.rank == 0) return;
      projectRow(h.data(), v.data(), call.k, node.rank, static_cast<T*>(call.xv) + row * node.rank);
    });
  });
}

// Row `row` of a matrix [m, k] of T.
template <typename T>
const T* rowOf(const void* matrix, int64_t row, int64_t k) {
  return static_cast<const T*>(matrix) + row * k;
}

// s in place of x, also written to `sum`.
template <typename T>
void addSkip(float* x, const T* skip, int64_t k, T* sum) {
  std::vector<float> other(static_cast<size_t>(k));
  toFloat(skip, k, other.data());
  for (int64_t i = 0; i < k; ++i) {
    sum[i] = fromFloat<T>(x[i] + other[i]);
    toFloat(sum + i, 1, x + i);
  }
}

// The sum is a double: a serial sum of floats is further from the GPU's, which adds in a tree.
template <typename T>
void normalize(float* s, const float* gamma, int64_t k, float epsilon) {
  double squares = 0;
  for (int64_t i = 0; i < k; ++i) squares += s[i] * s[i];
  const float scale = 1.0f / std::sqrt(static_cast<float>(squares / k) + epsilon);
  for (int64_t i = 0; i < k; ++i) s[i] = rounded<T>(s[i] * scale * gamma[i]);
}

}  // namespace

template <>
void CpuQuantizer<QuantizeNode>::compute(Ort::KernelContext& context) const {
  const QuantizeCall call(node_, context);
  quantizeRows(context, node_, call, [&](int64_t row, float* h, auto* tag) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(tag)>>;
    toFloat(rowOf<T>(call.x, row, call.k), call.k, h);
  });
}

template <>
void CpuQuantizer<SiluMulNode>::compute(Ort::KernelContext& context) const {
  const SiluMulCall call(node_, context);
  quantizeRows(context, node_, call, [&](int64_t row, float* h, auto* tag) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(tag)>>;
    std::vector<float> up(static_cast<size_t>(call.k));
    toFloat(rowOf<T>(call.x, row, call.k), call.k, h);
    toFloat(rowOf<T>(call.up, row, call.k), call.k, up.data());
    for (int64_t i = 0; i < call.k; ++i) h[i] = rounded<T>(h[i] / (1.0f + std::exp(-h[i])) * up[i]);
  });
}

template <>
void CpuQuantizer<RmsNormNode>::compute(Ort::KernelContext& context) const {
  const RmsNormCall call(node_, context);
  const auto gamma = asFloats(call.gamma, call.type, call.k);
  quantizeRows(context, node_, call, [&](int64_t row, float* h, auto* tag) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(tag)>>;
    toFloat(rowOf<T>(call.x, row, call.k), call.k, h);
    if (node_.skip) addSkip(h, rowOf<T>(call.skip, row, call.k), call.k, static_cast<T*>(call.sum) + row * call.k);
    normalize<T>(h, gamma.data(), call.k, node_.epsilon);
  });
}

}  // namespace zqfp
