// What a kernel quantises: eights of h, of which x, gate and up, or x, skip and gamma are loaded. Loading and computing
// are two steps, so that a thread can have many loads under way.
#pragma once

#include "gated.cuh"

namespace zqfp {

struct Nothing {};

// Of sources that have them: what eight columns have in common, whatever the token (a weight), and what the columns of a
// token have in common.
struct NothingInCommon {
  using Column = Nothing;
  using Row = Nothing;
  __device__ __forceinline__ static Column load_column(const QuantizeParams&, int, bool) { return {}; }
  __device__ __forceinline__ static Row load_row(const QuantizeParams&, int, int, bool) { return {}; }
};

// h = x.
template <typename Number>
class Plain : public NothingInCommon {
 public:
  using T = Number;
  using Raw = Eight<T>;
  static constexpr int kLoads = 1;  // eights that one of h takes

  // Places count from `start`.
  __device__ __forceinline__ explicit Plain(const QuantizeParams& p, int64_t start = 0)
      : x_(static_cast<const T*>(p.x) + start) {}

  __device__ __forceinline__ Raw load(int64_t place, bool inside) const { return load_eight(x_ + place, inside); }
  __device__ __forceinline__ static Eight<T> compute(const Raw& x, Column = {}, Row = {}) { return x; }
  // Puts h in the place of what it was computed from.
  __device__ __forceinline__ static void keep(const Eight<T>& h, Raw& x) { x = h; }
  __device__ __forceinline__ static const Eight<T>& kept(const Raw& x) { return x; }

 private:
  const T* x_;
};

// h = silu(gate) * up.
template <typename Number>
class SiluMul : public NothingInCommon {
 public:
  using T = Number;
  struct Raw {
    Eight<T> gate, up;
  };
  static constexpr int kLoads = 2;

  __device__ __forceinline__ explicit SiluMul(const QuantizeParams& p, int64_t start = 0)
      : gate_(static_cast<const T*>(p.x) + start), up_(static_cast<const T*>(p.other) + start) {}

  __device__ __forceinline__ Raw load(int64_t place, bool inside) const {
    return {load_eight(gate_ + place, inside), load_eight(up_ + place, inside)};
  }

  __device__ __forceinline__ static Eight<T> compute(const Raw& raw, Column = {}, Row = {}) {
    return silu_mul(raw.gate, raw.up);
  }
  __device__ __forceinline__ static void keep(const Eight<T>& h, Raw& raw) { raw.gate = h; }
  __device__ __forceinline__ static const Eight<T>& kept(const Raw& raw) { return raw.gate; }

 private:
  const T *gate_, *up_;
};

// Where the norm leaves a token's factor for those who compute ranks from `rank` on.
template <typename T>
__device__ __forceinline__ float* factor_place(const QuantizeParams& p, int64_t token, int rank) {
  return reinterpret_cast<float*>(static_cast<T*>(p.xv) + token * p.rank + rank);
}

// h = s * gamma * factor, where s = x or x + skip and the factor is 1 / sqrt(mean(s * s) + epsilon). The factors of a token
// lie where x @ V will (quantize_norm.cuh): one where each group of ranks begins, which is read by those alone that
// overwrite it afterwards.
template <typename Number>
class Norm {
 public:
  using T = Number;
  struct Raw {
    Eight<T> x, skip;
  };
  static constexpr int kLoads = 3;
  using Column = Eight<T>;  // gamma
  using Row = float;        // factor
  // What changes no x that it is added to: -0.
  static constexpr uint32_t kNothing = sizeof(T) == 4 ? 0x80000000u : 0x80008000u;

  __device__ __forceinline__ explicit Norm(const QuantizeParams& p, int64_t start = 0)
      : x_(static_cast<const T*>(p.x) + start),
        skip_(static_cast<const T*>(p.other) + start),
        has_skip_(p.other != nullptr) {}

  __device__ __forceinline__ Raw load(int64_t place, bool inside) const {
    return {load_eight(x_ + place, inside), load_eight(skip_ + place, inside && has_skip_, kNothing)};
  }
  __device__ __forceinline__ static Column load_column(const QuantizeParams& p, int column, bool inside) {
    return load_eight(static_cast<const T*>(p.gamma) + column, inside);
  }
  __device__ __forceinline__ static Row load_row(const QuantizeParams& p, int token, int rank, bool inside) {
    return inside ? *factor_place<T>(p, token, rank) : 0.f;
  }

  // s: the sum, rounded to T.
  __device__ __forceinline__ static Eight<T> add(const Raw& raw) { return raw.x.add(raw.skip); }

  __device__ __forceinline__ static float add_squares(const Eight<T>& s, float squares) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 numbers = s.pair(i);
      squares = fmaf(numbers.x, numbers.x, squares);
      squares = fmaf(numbers.y, numbers.y, squares);
    }
    return squares;
  }

  __device__ __forceinline__ static float factor_of(float squares, int k, float epsilon) {
    return __frsqrt_rn(__fdiv_rn(squares, float(k)) + epsilon);
  }

  // The scale of a token from its largest |s * gamma|: rounding and the factor keep the order of numbers.
  __device__ __forceinline__ static float scale_of(float range, float factor) {
    Eight<T> largest;
    largest.set_pair(0, {range * factor, 0.f});
    return scale_of_range(largest.pair(0).x);
  }

  // Makes raw that of s alone.
  __device__ __forceinline__ static void keep_sum(const Eight<T>& s, Raw& raw) {
    raw.x = s;
    for (uint32_t& word : raw.skip.word) word = kNothing;
  }

  // s * gamma in float32. The factor comes last: then the largest h of a token is that of its largest s * gamma.
  __device__ __forceinline__ static float2 scale_pair(const Eight<T>& s, const Column& gamma, int i) {
    const float2 a = s.pair(i), b = gamma.pair(i);
    return {a.x * b.x, a.y * b.y};
  }

  // The largest |s * gamma|, or `range` if that is larger.
  __device__ __forceinline__ static float widen(const Eight<T>& s, const Column& gamma, float range) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 scaled = scale_pair(s, gamma, i);
      range = fmaxf(range, fmaxf(fabsf(scaled.x), fabsf(scaled.y)));
    }
    return range;
  }

  __device__ __forceinline__ Eight<T> compute(const Raw& raw, const Column& gamma, Row factor) const {
    const Eight<T> s = add(raw);
    Eight<T> h;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 scaled = scale_pair(s, gamma, i);
      h.set_pair(i, {scaled.x * factor, scaled.y * factor});
    }
    return h;
  }

 private:
  const T *x_, *skip_;
  bool has_skip_;
};

}  // namespace zqfp
