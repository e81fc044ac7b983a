// x8 of few tokens, made by the warps of strips themselves: each block quantises all of x, which lies in L2, and so saves
// the way through a kernel of its own.
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
  float range;    // largest |h|, of a norm |s * gamma|
};

// One thread's part.
template <class C, class Source>
class TokenMaker {
 public:
  using T = typename Source::T;
  static constexpr int kMakers = C::kWarps * 32;
  static constexpr int kHeld = C::kWarpgroups > 2 ? 2 : 4;  // eights whose loads are under way together
  static constexpr bool kNorm = std::is_same_v<Source, Norm<T>>;
  static_assert(C::kTokens * (kMaxStripColumns / 8 / kMakers) * C::kWarps * sizeof(TokenStatistics) <=
                C::kRing * C::kStripBytes, "room among the sums");

  __device__ __forceinline__ TokenMaker(const QuantizedStripParams& p, StripShared<C> shared)
      : p_(p.from), by_blocks_(p.by_blocks), blocks_(p.blocks), columns_(p.columns), shared_(shared),
        count_(p_.k / 8), rounds_((count_ + kMakers - 1) / kMakers), source_(p_) {}

  __device__ __forceinline__ void run() {
    clear();
    if constexpr (kNorm) prefetch_gamma();
    ptx::wait_for_kernel_before();
    if (kNorm || p_.scale == nullptr) {
      for_slots([&](const Slot& slot, const Raw& raw, const Column& gamma) { leave(slot, look(slot, raw, gamma)); });
      ptx::sync_threads(kBarrierStatistics, kMakers);
    }
    for_slots([&](const Slot& slot, const Raw& raw, const Column& gamma) {
      if (slot.round == 0) begin_token(slot.token);
      if (inside(slot)) store(slot, source_.compute(raw, gamma, factor_));
    });
    ptx::publish_to_wgmma();
  }

 private:
  using Raw = typename Source::Raw;
  using Column = typename Source::Column;

  // An eight of each thread.
  struct Slot {
    int token, round;
  };

  const QuantizeParams& p_;
  const FastDivisor by_blocks_;
  const int blocks_, columns_;
  StripShared<C> shared_;
  const int count_, rounds_;  // of a token: eights, and how often they go round the threads
  const Source source_;
  typename Source::Row factor_{};
  Divisor divide_{1.f};

  __device__ __forceinline__ static int at(const Slot& slot) { return slot.round * kMakers + threadIdx.x; }
  __device__ __forceinline__ bool inside(const Slot& slot) const { return slot.token < p_.m && at(slot) < count_; }
  __device__ __forceinline__ int64_t place(const Slot& slot) const { return int64_t(slot.token) * p_.k + 8 * at(slot); }

  template <typename Body>
  __device__ __forceinline__ void for_slots(Body body) const {
    Slot next{0, 0};
#pragma unroll 1
    while (next.token < p_.m) {
      Slot slots[kHeld];
      Raw raw[kHeld];
      Column gamma[kHeld];
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        slots[i] = next;
        raw[i] = source_.load(place(next), inside(next));
        gamma[i] = Source::load_column(p_, 8 * at(next), inside(next));
        if (++next.round == rounds_) next = {next.token + 1, 0};
      }
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (slots[i].token < p_.m) body(slots[i], raw[i], gamma[i]);
      }
    }
  }

  __device__ __forceinline__ uint32_t shared_place(int token, int column) const {
    return shared_.token_place(token, column, columns_);
  }

  // What there is beyond the tokens, and beyond their columns.
  __device__ __forceinline__ void clear() const {
    const int width = kStripSlices * columns_ * kBlockColumns;
    for (int i = threadIdx.x; i < width / 16 * C::kTokens; i += kMakers) {
      const int token = i % C::kTokens, column = i / C::kTokens * 16;
      if (token >= p_.m || column >= p_.k) *ptx::shared_pointer<uint4>(shared_place(token, column)) = {};
    }
  }

  // A weight, which may be asked for before the wait.
  __device__ __forceinline__ void prefetch_gamma() const {
    for (int i = threadIdx.x; i < count_; i += kMakers) ptx::prefetch(static_cast<const T*>(p_.gamma) + 8 * i);
  }

  // Writes the sum as well: each block a part of it.
  __device__ __forceinline__ TokenStatistics look(const Slot& slot, const Raw& raw, const Column& gamma) const {
    TokenStatistics seen{0.f, 0.f};
    if (!inside(slot)) return seen;
    if constexpr (kNorm) {
      const Eight<T> s = source_.add(raw);
      seen.squares = Source::add_squares(s, seen.squares);
      seen.range = Source::widen(s, gamma, seen.range);
      const int owner = at(slot) - by_blocks_.divide(at(slot)) * blocks_;
      if (p_.sum != nullptr && owner == blockIdx.x) store_eight(s, static_cast<T*>(p_.sum) + place(slot));
    } else {
      seen.range = source_.compute(raw).widen(seen.range);
    }
    return seen;
  }

  __device__ __forceinline__ TokenStatistics* statistics(const Slot& slot) const {
    return reinterpret_cast<TokenStatistics*>(shared_.sums(0, 0, 0, 0)) +
           (slot.token * rounds_ + slot.round) * C::kWarps;
  }

  __device__ __forceinline__ void leave(const Slot& slot, TokenStatistics seen) const {
    if constexpr (kNorm) seen.squares = add_lanes(seen.squares);
    seen.range = largest_of_lanes(seen.range);
    if (threadIdx.x % 32 == 0) statistics(slot)[threadIdx.x / 32] = seen;
  }

  // Its scale and, of a norm, its factor.
  __device__ __forceinline__ void begin_token(int token) {
    float scale = p_.scale != nullptr ? *p_.scale : 0.f;
    if (kNorm || p_.scale == nullptr) {
      const int lane = threadIdx.x % 32;
      float squares = 0.f, range = 0.f;
      for (int round = 0; round < rounds_; ++round) {
        if (lane >= C::kWarps) break;
        const TokenStatistics seen = statistics({token, round})[lane];
        squares += seen.squares;
        range = fmaxf(range, seen.range);
      }
      range = largest_of_lanes(range);
      if constexpr (kNorm) {
        factor_ = Source::factor_of(add_lanes(squares), p_.k, p_.epsilon);
        if (p_.scale == nullptr) scale = Source::scale_of(range, factor_);
      } else {
        scale = scale_of_range(range);
      }
    }
    if (threadIdx.x == 0) *shared_.token_scale(token) = scale;
    divide_ = Divisor(scale);
  }

  __device__ __forceinline__ void store(const Slot& slot, const Eight<T>& h) const {
    const int column = 8 * at(slot);
    *ptx::shared_pointer<uint2>(shared_place(slot.token, column / 16 * 16) + column % 16) =
        quantize_eight(h, divide_);
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
