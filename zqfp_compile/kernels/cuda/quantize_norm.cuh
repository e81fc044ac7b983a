// RMS norm of x or of x + skip -> E4M3 and its scale: a block has one token and keeps it in registers.
#pragma once

#include "quantize_source.cuh"

namespace zqfp {

constexpr int kMaxNormThreads = 1024;
constexpr int kFactorRanks = 16;  // LoRC's smallest group of ranks (quantize_lorc.cuh)

// What a block adds up.
struct NormShared {
  float squares[kMaxNormThreads / 32];
  float range[kMaxNormThreads / 32];
};

// One thread's part. Of a token with more than kHeld eights for each thread it reads the rest twice.
template <typename T>
class NormQuantizer {
 public:
  static constexpr int kHeld = sizeof(T) == 4 ? 1 : 2;

  __device__ __forceinline__ NormQuantizer(const QuantizeParams& p, NormShared& shared)
      : p_(p), shared_(shared), token_(blockIdx.x), source_(p, token_ * p.k), count_(p.k / 8) {
    sum_ = p.sum == nullptr ? nullptr : static_cast<T*>(p.sum) + token_ * p.k;
  }

  __device__ __forceinline__ void run() {
    ptx::release_kernel_after();
    Eight<T> gamma[kHeld];
    for_held([&](int i, int at) { gamma[i] = load_gamma(at); });  // a weight: it may be read before the wait
    ptx::wait_for_kernel_before();
    const float given = p_.scale != nullptr ? *p_.scale : 0.f;
    typename Source::Raw raw[kHeld];
    for_held([&](int i, int at) { raw[i] = source_.load(8 * at, at < count_); });
    Scaled held[kHeld];
    for_held([&](int i, int at) {
      if (at < count_) held[i] = take(source_.add(raw[i]), gamma[i], at);
    });
#pragma unroll 1
    for (int at = first_left(); at < count_; at += blockDim.x) {
      take(source_.add(source_.load(8 * at, true)), load_gamma(at), at);
    }
    add_threads();
    const float scale = p_.scale != nullptr ? given : Source::scale_of(range_, factor_);
    const Divisor divide(scale);
    for_held([&](int i, int at) {
      if (at < count_) write(held[i], divide, at);
    });
#pragma unroll 1
    for (int at = first_left(); at < count_; at += blockDim.x) {
      write(scale_eight(load_again(at), load_gamma(at)), divide, at);
    }
    if (threadIdx.x == 0) write_token(scale);
  }

 private:
  using Source = Norm<T>;
  // s * gamma of eight columns.
  struct Scaled {
    float2 pair[4];
  };

  const QuantizeParams& p_;
  NormShared& shared_;
  const int64_t token_;
  const Source source_;
  const int count_;  // eights of a token
  T* sum_;
  float squares_ = 0.f, range_ = 0.f;  // sum of s * s and largest |s * gamma|: of the thread, then of the block
  float factor_;

  template <typename Body>
  __device__ __forceinline__ static void for_held(Body body) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) body(i, int(threadIdx.x + i * blockDim.x));
  }
  __device__ __forceinline__ static int first_left() { return threadIdx.x + kHeld * blockDim.x; }

  __device__ __forceinline__ Eight<T> load_gamma(int at) const { return Source::load_column(p_, 8 * at, at < count_); }

  __device__ __forceinline__ static Scaled scale_eight(const Eight<T>& s, const Eight<T>& gamma) {
    Scaled scaled;
#pragma unroll
    for (int i = 0; i < 4; ++i) scaled.pair[i] = Source::scale_pair(s, gamma, i);
    return scaled;
  }

  // Stores s, and takes it into the thread's sum and range.
  __device__ __forceinline__ Scaled take(const Eight<T>& s, const Eight<T>& gamma, int at) {
    if (sum_ != nullptr) store_eight(s, sum_ + 8 * at);
    const Scaled scaled = scale_eight(s, gamma);
    squares_ = Source::add_squares(s, squares_);
#pragma unroll
    for (const float2& pair : scaled.pair) range_ = fmaxf(range_, fmaxf(fabsf(pair.x), fabsf(pair.y)));
    return scaled;
  }

  // s once more: the sum may lie where x or skip was.
  __device__ __forceinline__ Eight<T> load_again(int at) const {
    return sum_ != nullptr ? load_eight(sum_ + 8 * at, true) : source_.add(source_.load(8 * at, true));
  }

  __device__ __forceinline__ void add_threads() {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float squares = add_lanes(squares_);
    const float range = largest_of_lanes(range_);
    if (lane == 0) {
      shared_.squares[warp] = squares;
      shared_.range[warp] = range;
    }
    __syncthreads();
    const bool is_warp = lane < int(blockDim.x) / 32;
    squares_ = add_lanes(is_warp ? shared_.squares[lane] : 0.f);
    range_ = largest_of_lanes(is_warp ? shared_.range[lane] : 0.f);
    factor_ = Source::factor_of(squares_, p_.k, p_.epsilon);
  }

  __device__ __forceinline__ void write(const Scaled& scaled, const Divisor& divide, int at) const {
    Eight<T> h;
#pragma unroll
    for (int i = 0; i < 4; ++i) h.set_pair(i, {scaled.pair[i].x * factor_, scaled.pair[i].y * factor_});
    store_quantized(h, divide, p_.x8 + token_ * p_.k + 8 * at);
  }

  // What a token has one of.
  __device__ __forceinline__ void write_token(float scale) const {
    if (p_.scale == nullptr) {
      p_.a[token_] = scale;
    } else if (token_ == 0 && p_.a != nullptr) {
      p_.a[0] = scale;
    }
    if constexpr (sizeof(T) == 2) {
#pragma unroll 1
      for (int rank = 0; rank < p_.rank; rank += kFactorRanks) *factor_place<T>(p_, token_, rank) = factor_;
    }
  }
};

// Makes the parameters of the norm those of the product that follows: a sum may have taken the place of x or skip.
inline void follow_norm(QuantizeParams* p) {
  if (p->sum == nullptr) return;
  p->x = p->sum;
  p->other = nullptr;
}

template <typename T>
__global__ void __launch_bounds__(kMaxNormThreads) quantize_norm_kernel(QuantizeParams p) {
  __shared__ NormShared shared;
  NormQuantizer<T>(p, shared).run();
}

}  // namespace zqfp
