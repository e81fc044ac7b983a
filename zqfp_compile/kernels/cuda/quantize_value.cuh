// What the quantizer kernels share: numbers of x as they are loaded, divided by a scale and stored as E4M3.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

#include "ptx.cuh"
#include "quantize_params.h"

namespace zqfp {

constexpr float kLargestE4m3 = 448.f;
constexpr float kSmallestRange = 1e-30f;
constexpr int kMaxClusterBlocks = 8;

// Divides by one number many times. power * x / divisor, where power brings the divisor near 1, so that nothing on the
// way over- or underflows that matters to E4M3; then the product with the correctly rounded reciprocal, and one
// correction with fused multiply-adds, is the correctly rounded quotient (Brisebarre, Muller and Raina, "Accelerating
// correctly rounded floating-point division when the divisor is known in advance", IEEE TC 2004, algorithm 1).
class Divisor {
 public:
  __device__ __forceinline__ explicit Divisor(float divisor) {
    const int exponent = int(__float_as_uint(divisor) >> 23 & 255);
    const bool special = exponent == 255 || divisor == 0.f;  // x / infinity and x / 0: x times 0 and infinity
    const int near = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
    power_ = special ? __fdiv_rn(1.f, divisor) : __uint_as_float(uint32_t(254 - near) << 23);
    divisor_ = special ? 1.f : divisor * power_;
    reciprocal_ = __fdiv_rn(1.f, divisor_);
  }

  // The quotient in float32, as far as rounding it to E4M3 can tell: beyond 1024 and below 2^-100 it may be another.
  __device__ __forceinline__ float operator()(float x) const {
    const float near = ptx::limit(x * power_, 4096.f);
    const float quotient = near * reciprocal_;
    const float excess = fmaf(quotient, divisor_, -near);  // this way round -0 stays -0
    return fmaf(excess, -reciprocal_, quotient);
  }

 private:
  float power_, divisor_, reciprocal_;
};

__device__ __forceinline__ float2 unpack_pair(uint32_t word, __half) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}
__device__ __forceinline__ float2 unpack_pair(uint32_t word, __nv_bfloat16) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&word));
}

template <typename T>
using PairOf = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

template <typename Pair>
__device__ __forceinline__ uint32_t word_of(const Pair& pair) {
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ uint32_t round_pair(float2 pair, __half) {
  return word_of(__floats2half2_rn(pair.x, pair.y));
}
__device__ __forceinline__ uint32_t round_pair(float2 pair, __nv_bfloat16) {
  return word_of(__floats2bfloat162_rn(pair.x, pair.y));
}

// Eight neighbours of one token, as they lie in memory.
template <typename T>
struct Eight {
  uint32_t word[2 * sizeof(T)] = {};

  // Rounds to T.
  __device__ __forceinline__ void set_pair(int i, float2 pair) {
    if constexpr (sizeof(T) == 4) {
      word[2 * i] = __float_as_uint(pair.x);
      word[2 * i + 1] = __float_as_uint(pair.y);
    } else {
      word[i] = round_pair(pair, T());
    }
  }

  __device__ __forceinline__ float2 pair(int i) const {
    if constexpr (sizeof(T) == 4) {
      return {__uint_as_float(word[2 * i]), __uint_as_float(word[2 * i + 1])};
    } else {
      return unpack_pair(word[i], T());
    }
  }

  // The sum, rounded once. Of two 16-bit numbers float32 has the sum exactly, or near enough to round it to the same.
  __device__ __forceinline__ Eight add(const Eight& other) const {
    Eight sum;
#pragma unroll
    for (int i = 0; i < int(2 * sizeof(T)); ++i) {
      if constexpr (sizeof(T) == 4) {
        sum.word[i] = __float_as_uint(__uint_as_float(word[i]) + __uint_as_float(other.word[i]));
      } else {
        sum.word[i] = add_pairs(word[i], other.word[i]);
      }
    }
    return sum;
  }

  __device__ __forceinline__ static uint32_t add_pairs(uint32_t a, uint32_t b) {
    using Pair = PairOf<T>;
    return word_of(__hadd2_rn(*reinterpret_cast<const Pair*>(&a), *reinterpret_cast<const Pair*>(&b)));
  }

  // The largest magnitude, or `range` if that is larger. NaN is none.
  __device__ __forceinline__ float widen(float range) const {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < 8; ++i) range = fmaxf(range, fabsf(__uint_as_float(word[i])));
      return range;
    } else {
      const float2 largest = unpack_pair(larger(larger(word[0], word[1]), larger(word[2], word[3])), T());
      return fmaxf(range, fmaxf(fabsf(largest.x), fabsf(largest.y)));
    }
  }

  // Of each half the larger magnitude.
  __device__ __forceinline__ static uint32_t larger(uint32_t a, uint32_t b) {
    using Pair = PairOf<T>;
    return word_of(__hmax2(__habs2(*reinterpret_cast<const Pair*>(&a)), __habs2(*reinterpret_cast<const Pair*>(&b))));
  }
};

// Words of `outside`, zeros, if not `inside`. Not __ldg: that may be read from before the kernel began, and an overlapping
// kernel begins while x is made.
template <typename T>
__device__ __forceinline__ Eight<T> load_eight(const T* from, bool inside, uint32_t outside = 0) {
  Eight<T> eight;
#pragma unroll
  for (uint32_t& word : eight.word) word = outside;
  if (!inside) return eight;
#pragma unroll
  for (int i = 0; i < int(sizeof(T)) / 2; ++i) {
    const uint4 words = reinterpret_cast<const uint4*>(from)[i];
    eight.word[4 * i] = words.x;
    eight.word[4 * i + 1] = words.y;
    eight.word[4 * i + 2] = words.z;
    eight.word[4 * i + 3] = words.w;
  }
  return eight;
}

template <typename T>
__device__ __forceinline__ void store_eight(const Eight<T>& eight, T* to) {
#pragma unroll
  for (int i = 0; i < int(sizeof(T)) / 2; ++i) {
    reinterpret_cast<uint4*>(to)[i] = {eight.word[4 * i], eight.word[4 * i + 1], eight.word[4 * i + 2],
                                       eight.word[4 * i + 3]};
  }
}

// Of a warp, always in the same order, so that the result is.
__device__ __forceinline__ float add_lanes(float number) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) number += __shfl_xor_sync(~0u, number, mask);
  return number;
}

// Of a warp. None is negative, so that their order is that of their bits.
__device__ __forceinline__ float largest_of_lanes(float range) {
  return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(range)));
}

__device__ __forceinline__ float scale_of_range(float range) {
  return __fdiv_rn(fmaxf(kSmallestRange, range), kLargestE4m3);
}

// Rounds to nearest even, as the reference does.
__device__ __forceinline__ uint32_t quantize_four(float2 low, float2 high, const Divisor& divide) {
  const float2 quotient[2] = {{divide(low.x), divide(low.y)}, {divide(high.x), divide(high.y)}};
  return uint32_t(__nv_cvt_float2_to_fp8x2(quotient[0], __NV_SATFINITE, __NV_E4M3)) |
         uint32_t(__nv_cvt_float2_to_fp8x2(quotient[1], __NV_SATFINITE, __NV_E4M3)) << 16;
}

template <typename T>
__device__ __forceinline__ uint2 quantize_eight(const Eight<T>& eight, const Divisor& divide) {
  return {quantize_four(eight.pair(0), eight.pair(1), divide), quantize_four(eight.pair(2), eight.pair(3), divide)};
}

template <typename T>
__device__ __forceinline__ void store_quantized(const Eight<T>& eight, const Divisor& divide, uint8_t* to) {
  *reinterpret_cast<uint2*>(to) = quantize_eight(eight, divide);
}

}  // namespace zqfp
