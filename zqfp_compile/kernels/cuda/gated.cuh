// SiLU times up, in a quantizer and at the end of a gated layer: the same numbers.
#pragma once

#include "quantize_value.cuh"

namespace zqfp {

// Of a T. For 16 bits the product that takes the place of exp is exact enough: within 2^-16 where h is not next to 0.
template <typename T>
__device__ __forceinline__ float silu(float x) {
  constexpr float kLog2E = 1.44269504f;
  const float power = sizeof(T) == 4 ? expf(-x) : ptx::power_of_2(x * -kLog2E);
  return x * ptx::reciprocal(1.f + power);
}

template <typename T>
__device__ __forceinline__ float2 silu_mul(float2 gate, float2 up) {
  return {silu<T>(gate.x) * up.x, silu<T>(gate.y) * up.y};
}

// Rounded once.
template <typename T>
__device__ __forceinline__ Eight<T> silu_mul(const Eight<T>& gate, const Eight<T>& up) {
  Eight<T> h;
#pragma unroll
  for (int i = 0; i < 4; ++i) h.set_pair(i, silu_mul<T>(gate.pair(i), up.pair(i)));
  return h;
}

// Of a layer's sums, as of the numbers of 16 bits that they would be in memory; two of T.
template <typename T>
__device__ __forceinline__ uint32_t gate_pair(float2 gate, float2 up) {
  const T type{};
  return round_pair(silu_mul<T>(unpack_pair(round_pair(gate, type), type), unpack_pair(round_pair(up, type), type)), type);
}

}  // namespace zqfp
