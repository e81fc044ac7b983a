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

// The outputs of every row, which `make(row, h, tag)` writes as floats to h; they are numbers of tag's type.
template <typename Make>
void quantizeRows(Ort::KernelContext& context, const QuantizeCall& call, int64_t rank, const Quantized& to, Make make) {
  const auto v = asFloats(call.activation.v, call.type(), call.k * rank);
  parallelFor(context, call.m, [&](int64_t row) {
    withType(call.type(), [&](auto* tag) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(tag)>>;
      std::vector<float> h(static_cast<size_t>(call.k));
      make(row, h.data(), tag);
      const float* scale = call.activation.scale;
      const float a = quantizeRow(h.data(), call.k, scale, static_cast<uint8_t*>(to.x8) + row * call.k);
      if (to.a != nullptr) to.a[row] = a;
      if (rank > 0) projectRow(h.data(), v.data(), call.k, rank, static_cast<T*>(to.xv) + row * rank);
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

// Writes one row of h; `tag` points to the type of its operands.
template <typename T>
void plainRow(const QuantizeCall& call, int64_t row, float* h, const T*) {
  toFloat(rowOf<T>(call.activation.x, row, call.k), call.k, h);
}

template <typename T>
void siluMulRow(const QuantizeCall& call, int64_t row, float* h, const T* tag) {
  std::vector<float> up(static_cast<size_t>(call.k));
  plainRow(call, row, h, tag);
  toFloat(rowOf<T>(call.activation.other, row, call.k), call.k, up.data());
  for (int64_t i = 0; i < call.k; ++i) h[i] = rounded<T>(siluMul(h[i], up[i]));
}

template <typename T>
void rmsNormRow(const QuantizeCall& call, int64_t row, const float* gamma, float* h, const T* tag) {
  const zqfpActivation& from = call.activation;
  plainRow(call, row, h, tag);
  if (from.sum != nullptr) {
    addSkip(h, rowOf<T>(from.other, row, call.k), call.k, static_cast<T*>(from.sum) + row * call.k);
  }
  normalize<T>(h, gamma, call.k, from.epsilon);
}

void quantize(Ort::KernelContext& context, const QuantizeNode& node, const QuantizeCall& call, const Quantized& to) {
  const auto run = [&](auto make) { quantizeRows(context, call, node.rank, to, make); };
  if (node.source == ZQFP_PLAIN) {
    return run([&](int64_t row, float* h, auto* tag) { plainRow(call, row, h, tag); });
  }
  if (node.source == ZQFP_SILU_MUL) {
    return run([&](int64_t row, float* h, auto* tag) { siluMulRow(call, row, h, tag); });
  }
  const auto gamma = asFloats(call.activation.gamma, call.type(), call.k);
  run([&](int64_t row, float* h, auto* tag) { rmsNormRow(call, row, gamma.data(), h, tag); });
}

}  // namespace

void CpuQuantizer::compute(Ort::KernelContext& context) const {
  const QuantizeCall call(node_, context, node_.outputs() - 1);
  quantize(context, node_, call, makeOutputs(node_, call, context));
}

void CpuQuantizedLinear::compute(Ort::KernelContext& context) const {
  QuantizedLinearCall call(node_, context);
  const int64_t m = call.linear.m, k = call.quantizer.k, rank = node_.quantizer.rank;
  std::vector<uint8_t> x8(static_cast<size_t>(m * k));
  std::vector<float> a(static_cast<size_t>(m));
  std::vector<float> xv(static_cast<size_t>(m * rank));  // room for any type
  const Quantized to{x8.data(), node_.quantizer.tokens ? a.data() : nullptr, xv.data()};
  quantize(context, node_.quantizer, call.quantizer, to);
  zqfpLinearArgs& args = call.linear.args;
  args.x8 = x8.data();
  args.a = node_.quantizer.tokens ? a.data() : call.quantizer.activation.scale;
  args.xv = xv.data();
  linear_.multiply(call.linear, context);
}

}  // namespace zqfp
