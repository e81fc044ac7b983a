// x8 of one token or two, made by the warps of strips themselves: each block quantises all of x, which lies in L2. That
// saves a launch, and the way through memory; the weights are on their way meanwhile.
#pragma once

#include "params.h"
#include "quantize_source.cuh"
#include "strip_config.cuh"
#include "zqfp.h"

namespace zqfp {

constexpr int kBarrierStatistics = 2;  // named barrier

// Of the part of a token that a warp has seen.
struct TokenStatistics {
  float squares;  // of a norm: sum of s * s
  float range;    // of a scale per token: largest |h|, of a norm |s * gamma|
};

// One thread's part. The threads go round a token's eights, one each.
//
// What follows the wait for the kernel before is time in which no memory is busy. So weights are loaded and divided by before
// it, and where the wait is long the first warp goes through the rest once with zeros, so that its instructions are there.
template <class C, class Source>
class TokenMaker {
 public:
  using T = typename Source::T;
  static constexpr int kMakers = C::kWarps * 32;
  static constexpr bool kNorm = std::is_same_v<Source, Norm<T>>;
  static constexpr int kHeld = kNorm ? 2 : 4;  // rounds whose loads are under way together
  static_assert(C::kTokens * C::kWarps * sizeof(TokenStatistics) <= C::kStripBytes, "room among the sums");

  __device__ __forceinline__ TokenMaker(const QuantizedStripParams& p, StripShared<C> shared)
      : all_(p), p_(p.from), shared_(shared), rounds_((p_.k / 8 + kMakers - 1) / kMakers), source_(p_) {}

  __device__ __forceinline__ void run() {
    clear();
    Batch batch;
    held() ? load_columns(0, batch) : prefetch_columns();
    const float scale = p_.scale != nullptr ? *p_.scale : 1.f;
    Divisor divide(scale);
    if (p_.scale != nullptr && threadIdx.x < p_.m) *shared_.token_scale(threadIdx.x) = scale;
#pragma unroll 1
    for (rehearses_ = all_.waits && threadIdx.x < 32;; rehearses_ = false) {
      if (!rehearses_) ptx::wait_for_kernel_before();
      const int tokens = rehearses_ ? 1 : p_.m;
      if (looks()) {
#pragma unroll 1
        for (int token = 0; token < tokens; ++token) look(token, batch);
        if (!rehearses_) ptx::sync_threads(kBarrierStatistics, kMakers);
      }
#pragma unroll 1
      for (int token = 0; token < tokens; ++token) quantize(token, divide, batch);
      if (!rehearses_) break;
    }
    ptx::publish_to_wgmma();
  }

 private:
  using Raw = typename Source::Raw;
  using Column = typename Source::Column;

  struct Batch {
    Raw raw[kHeld];
    Column gamma[kHeld];
  };

  const QuantizedStripParams& all_;
  const QuantizeParams& p_;
  StripShared<C> shared_;
  const int rounds_;
  const Source source_;
  bool rehearses_;

  // Whether a token is looked at before it is quantised; whether the batch has room for all of it meanwhile.
  __device__ __forceinline__ bool looks() const { return kNorm || p_.scale == nullptr; }
  __device__ __forceinline__ bool held() const { return p_.m == 1 && rounds_ <= kHeld; }

  __device__ __forceinline__ static int column(int round) { return 8 * (round * kMakers + threadIdx.x); }

  // Goes through a token's rounds; `loaded`: they are in the batch.
  template <typename Body>
  __device__ __forceinline__ void for_rounds(int token, Batch& batch, bool loaded, Body body) const {
#pragma unroll 1
    for (int first = 0; first < rounds_; first += kHeld) {
      if (!loaded) load(token, first, batch);
      if (!held()) load_columns(first, batch);
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (column(first + i) < p_.k) body(column(first + i), batch.raw[i], batch.gamma[i]);
      }
    }
  }

  __device__ __forceinline__ void load(int token, int first, Batch& batch) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int at = column(first + i);
      batch.raw[i] = source_.load(int64_t(token) * p_.k + at, at < p_.k && !rehearses_);
    }
  }

  __device__ __forceinline__ void load_columns(int first, Batch& batch) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      batch.gamma[i] = Source::load_column(p_, column(first + i), column(first + i) < p_.k);
    }
  }

  // Into L2.
  __device__ __forceinline__ void prefetch_columns() const {
    for (int round = 0; kNorm && round < rounds_; ++round) {
      if (column(round) < p_.k) ptx::prefetch(static_cast<const T*>(p_.gamma) + column(round));
    }
  }

  __device__ __forceinline__ uint32_t shared_place(int token, int column) const {
    return shared_.token_place(token, column, all_.columns);
  }

  // What there is beyond the tokens, and beyond their columns.
  __device__ __forceinline__ void clear() const {
    const int width = kStripSlices * all_.columns * kBlockColumns;
    for (int i = threadIdx.x; i < width / 16 * C::kTokens; i += kMakers) {
      const int token = i % C::kTokens, column = i / C::kTokens * 16;
      if (token >= p_.m || column >= p_.k) *ptx::shared_pointer<uint4>(shared_place(token, column)) = {};
    }
  }

  __device__ __forceinline__ TokenStatistics* statistics(int token) const {
    return reinterpret_cast<TokenStatistics*>(shared_.sums(0, 0, 0, 0)) + token * C::kWarps;
  }

  // Leaves the warp's statistics and, of a norm, x + skip in the place of both; writes the sum, each block a part of it.
  __device__ __forceinline__ void look(int token, Batch& batch) const {
    TokenStatistics seen{0.f, 0.f};
    for_rounds(token, batch, false, [&](int column, Raw& raw, const Column& gamma) {
      if constexpr (kNorm) {
        const Eight<T> s = Source::add(raw);
        Source::keep_sum(s, raw);
        seen.squares = Source::add_squares(s, seen.squares);
        if (p_.scale == nullptr) seen.range = Source::widen(s, gamma, seen.range);
        const int eight = column / 8, owner = eight - all_.by_blocks.divide(eight) * all_.blocks;
        if (p_.sum == nullptr || owner != int(blockIdx.x) || rehearses_) return;
        store_eight(s, static_cast<T*>(p_.sum) + int64_t(token) * p_.k + column);
      } else {
        seen.range = source_.compute(raw).widen(seen.range);
      }
    });
    if constexpr (kNorm) seen.squares = add_lanes(seen.squares);
    if (p_.scale == nullptr) seen.range = largest_of_lanes(seen.range);
    if (threadIdx.x % 32 == 0) statistics(token)[threadIdx.x / 32] = seen;
  }

  // Scale, if it is not given, and, of a norm, factor of a token.
  struct TokenNumbers {
    float scale;
    typename Source::Row factor;
  };

  __device__ __forceinline__ TokenNumbers numbers_of(int token) const {
    TokenNumbers numbers{};
    if (!looks()) return numbers;
    const int lane = threadIdx.x % 32;
    TokenStatistics seen{0.f, 0.f};
    if (lane < (rehearses_ ? 1 : C::kWarps)) seen = statistics(token)[lane];
    if constexpr (kNorm) {
      numbers.factor = Source::factor_of(add_lanes(seen.squares), p_.k, p_.epsilon);
      if (p_.scale == nullptr) numbers.scale = Source::scale_of(largest_of_lanes(seen.range), numbers.factor);
    } else {
      numbers.scale = scale_of_range(largest_of_lanes(seen.range));
    }
    return numbers;
  }

  __device__ __forceinline__ void quantize(int token, Divisor& divide, Batch& batch) const {
    const TokenNumbers numbers = numbers_of(token);
    if constexpr (kNorm) {
      if (threadIdx.x == 0) *shared_.token_factor(token) = numbers.factor;
    }
    if (p_.scale == nullptr) {
      if (threadIdx.x == 0) *shared_.token_scale(token) = numbers.scale;
      divide = Divisor(numbers.scale);
    }
    for_rounds(token, batch, looks() && held(), [&](int column, const Raw& raw, const Column& gamma) {
      const Eight<T> h = source_.compute(raw, gamma, numbers.factor);
      *ptx::shared_pointer<uint2>(shared_place(token, column / 16 * 16) + column % 16) = quantize_eight(h, divide);
    });
  }
};

template <class C, typename T>
__device__ __forceinline__ void make_tokens_of(const QuantizedStripParams& p, StripShared<C> shared) {
  switch (p.source) {
    case ZQFP_SILU_MUL: return TokenMaker<C, SiluMul<T>>(p, shared).run();
    case ZQFP_RMS_NORM: return TokenMaker<C, Norm<T>>(p, shared).run();
    default: return TokenMaker<C, Plain<T>>(p, shared).run();
  }
}

template <class C>
__device__ __forceinline__ void make_tokens(const QuantizedStripParams& p, StripShared<C> shared) {
  p.bfloat ? make_tokens_of<C, __nv_bfloat16>(p, shared) : make_tokens_of<C, __half>(p, shared);
}

}  // namespace zqfp
