// E4M3 and half-precision numbers on the CPU, and the threads that compute with them.
#ifndef ZQFP_ORT_NUMBERS_H
#define ZQFP_ORT_NUMBERS_H

#include <cmath>
#include <cstdint>
#include <cstring>

#include "api.h"

namespace zqfp {

template <typename To, typename From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Exact, without branches: the exponent is corrected by a product, which makes subnormal numbers right as well.
// The two NaN codes become +-480.
inline float decodeE4m3(uint8_t code) {
  const float magnitude = bits<float>(static_cast<uint32_t>(code & 0x7f) << 20) * 0x1p120f;
  return bits<float>(bits<uint32_t>(magnitude) | static_cast<uint32_t>(code & 0x80) << 24);
}

// To nearest even, saturating at 448; NaN stays NaN. What QuantizeLinear does.
inline uint8_t encodeE4m3(float value) {
  constexpr uint32_t kInfinity = 0x7f800000, kLargest = 0x43e00000 /* 448 */, kNormal = 0x3c800000 /* 2^-6 */;
  const uint32_t all = bits<uint32_t>(value), magnitude = all & 0x7fffffff;
  const uint8_t sign = static_cast<uint8_t>(all >> 24) & 0x80;
  if (magnitude > kInfinity) return sign | 0x7f;
  if (magnitude >= kLargest) return sign | 0x7e;
  if (magnitude < kNormal) {
    // Adding 2^14 leaves multiples of 2^-9, the smallest subnormal number, in the last bits.
    const uint32_t rounded = bits<uint32_t>(bits<float>(magnitude) + 16384.0f) - bits<uint32_t>(16384.0f);
    return sign | static_cast<uint8_t>(rounded);
  }
  const uint32_t rounded = (magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20;
  return sign | static_cast<uint8_t>(rounded - ((127 - 7) << 3));
}

inline void toFloat(const float* from, int64_t count, float* to) { std::memcpy(to, from, count * sizeof(float)); }

template <typename T>
inline void toFloat(const T* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i].ToFloat();
}

template <typename T>
inline T fromFloat(float value) {
  return T(value);
}

// Rounds a float to T and back.
template <typename T>
inline float rounded(float value) {
  const T number = fromFloat<T>(value);
  toFloat(&number, 1, &value);
  return value;
}

// silu(gate) * up
inline float siluMul(float gate, float up) { return gate / (1.0f + std::exp(-gate)) * up; }

// Calls `body` with a null pointer to the C++ type of `type`.
template <typename Body>
inline void withType(zqfpDataType type, Body&& body) {
  if (type == ZQFP_FLOAT16) return body(static_cast<const Ort::Float16_t*>(nullptr));
  if (type == ZQFP_BFLOAT16) return body(static_cast<const Ort::BFloat16_t*>(nullptr));
  body(static_cast<const float*>(nullptr));
}

// Floats of a tensor of any of the types.
inline std::vector<float> asFloats(const void* data, zqfpDataType type, int64_t count) {
  std::vector<float> result(static_cast<size_t>(count));
  withType(type, [&](auto* tag) { toFloat(static_cast<decltype(tag)>(data), count, result.data()); });
  return result;
}

// Runs `body(i)` for i < count on ONNX Runtime's threads.
template <typename Body>
void parallelFor(Ort::KernelContext& context, int64_t count, Body body) {
  const auto call = [](void* data, size_t index) { (*static_cast<Body*>(data))(static_cast<int64_t>(index)); };
  context.ParallelFor(call, static_cast<size_t>(count), 0, &body);
}

}  // namespace zqfp

#endif
