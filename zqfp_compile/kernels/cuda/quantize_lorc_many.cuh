// x -> E4M3 and its scale, and x @ V in the same pass over x, of many tokens.
//
// The blocks of a cluster have the same 64 tokens and share them along K. A block copies stages of 128 columns, kAhead of
// them ahead: x, and V's rows of the same columns, both as wgmma reads them. A stage has two parts of 64 columns, which
// are two warpgroups each: a warpgroup multiplies 32 tokens with V (operand A, rows of 64 ranks, however many there
// are), and meanwhile its warps quantise them, eight tokens each: thread 4q + c columns 16c..16c+15 of token q.
//
// Per token all is multiplied first, then quantised from the last column back: what came last is still in shared memory,
// the rest comes once more out of the cache.
#pragma once

#include "decode.h"
#include "quantize_value.cuh"
#include "wgmma.cuh"

namespace zqfp {

struct StagedParams : QuantizeParams {
  int slots;  // stages of x in shared memory: more than kAhead
};

template <typename Number, bool PerToken>
struct StagedShape {
  using T = Number;
  static constexpr bool kPerToken = PerToken;
  static constexpr int kAhead = 2;
  static constexpr int kTokens = 64, kGroupTokens = 32;
  static constexpr int kParts = 2, kColumns = 64 * kParts;
  static constexpr int kThreads = 512;
  static constexpr int kXBytes = 2 * kTokens * kColumns;  // of a stage
  static constexpr int kVBytes = 128 * kColumns;
  static constexpr int kAlignment = 1024 - 16;

  // Sums travel in fours: those of a thread of eight tokens and 16 ranks.
  ZQFP_HOST_DEVICE static int fours(int rank) { return 32 * kTokens / 8 * ((rank + 15) / 16); }

  // Shared memory: V, x, the fours that the block adds up, from each block as many; ranges, from each block; barriers.
  ZQFP_HOST_DEVICE static int sum_offset(int slots) { return (kAhead + 1) * kVBytes + slots * kXBytes; }
  ZQFP_HOST_DEVICE static int range_offset(int slots, int rank) { return sum_offset(slots) + 16 * fours(rank); }
  ZQFP_HOST_DEVICE static int barrier_offset(int slots, int rank) {
    return range_offset(slots, rank) + (kPerToken ? kMaxClusterBlocks * kTokens * 4 : 0);
  }
  ZQFP_HOST_DEVICE static int shared_bytes(int slots, int rank) {
    return kAlignment + barrier_offset(slots, rank) + 16;
  }
};

// One thread's part. The blocks of a cluster write to each other's sums and ranges, and count the bytes on the barriers;
// so nobody reads what is not there, and no block needs to outlive another.
template <class S>
class StagedQuantizer {
  using T = typename S::T;

 public:
  __device__ __forceinline__ StagedQuantizer(const StagedParams& p, char* raw) : p_(p) {
    lane_ = threadIdx.x % 32;
    group_ = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the compiler learns that all lanes have the same
    octet_ = threadIdx.x / 32 % 8;
    part_ = threadIdx.x / 256;
    block_ = blockIdx.x & (p.share - 1);
    first_token_ = (blockIdx.x >> (31 - __clz(p.share))) * S::kTokens;
    const int stages = (p.k + S::kColumns - 1) / S::kColumns;
    first_stage_ = stages * block_ / p.share;
    stages_ = stages * (block_ + 1) / p.share - first_stage_;
    // Every block aligns in the same way: what one block writes lies at the same offset in the others.
    v_ = (ptx::shared_address(raw) + 1023u) & ~1023u;
    x_ = v_ + (S::kAhead + 1) * S::kVBytes;
    sum_barrier_ = v_ + S::barrier_offset(p.slots, p.rank);
    range_barrier_ = sum_barrier_ + 8;
    find_places();
  }

  __device__ __forceinline__ void run() {
    ptx::release_kernel_after();
    open_barriers();
    ptx::cluster_arrive();
    // A weight: it may be read before the kernel before has ended.
#pragma unroll
    for (int stage = 0; stage < S::kAhead; ++stage) copy_v(stage);
    ptx::wait_for_kernel_before();
    const float scale = S::kPerToken ? 1.f : *p_.scale;
#pragma unroll
    for (int stage = 0; stage < S::kAhead; ++stage) {
      copy_x(stage, x_to_ + stage * S::kXBytes, kFirstRead);
      ptx::commit_copies();
    }
    multiply_all(Divisor(scale));
    ptx::cluster_wait();  // every block has opened its barriers
    add_parts();
    if constexpr (S::kPerToken) {
      write_all(Divisor(find_scale()));
    } else if (blockIdx.x == 0 && threadIdx.x == 0 && p_.a != nullptr) {
      p_.a[0] = scale;
    }
    store_product();
  }

 private:
  // What is read twice should stay in the cache.
  static constexpr uint64_t kFirstRead = S::kPerToken ? ptx::kEvictNormal : ptx::kEvictFirst;

  const StagedParams& p_;
  int lane_, group_, octet_, part_, block_, first_token_, first_stage_, stages_;
  uint32_t v_, x_, sum_barrier_, range_barrier_;
  const T *x_from_, *v_from_;
  uint8_t* x8_to_;
  uint32_t x_to_, read_from_, v_to_;
  // Columns that there are from the place in the first stage on.
  int x_left_[2], v_left_, x8_left_;
  float range_ = kSmallestRange;
  float sums_[S::kGroupTokens / 2] = {};  // [4j + 2h + i]: token 8j + 2c + i of the warpgroup, rank 16 * warp + 8h + q

  __device__ __forceinline__ int q() const { return lane_ / 4; }
  __device__ __forceinline__ int c() const { return lane_ % 4; }
  __device__ __forceinline__ int token() const { return first_token_ + 8 * octet_ + q(); }
  __device__ __forceinline__ static int v_slot(int stage) { return stage % (S::kAhead + 1); }
  __device__ __forceinline__ int next(int slot) const { return slot + 1 == p_.slots ? 0 : slot + 1; }
  __device__ __forceinline__ int pairs() const { return (p_.rank + 15) / 16; }  // of eight ranks
  __device__ __forceinline__ float* sum(int four) const {
    return ptx::shared_pointer<float>(v_ + S::sum_offset(p_.slots) + 16 * four);
  }
  __device__ __forceinline__ float* range(int block) const {
    return ptx::shared_pointer<float>(v_ + S::range_offset(p_.slots, p_.rank)) + block * S::kTokens + 8 * octet_ + q();
  }

  __device__ __forceinline__ void open_barriers() const {
    if (threadIdx.x != 0) return;
    ptx::barrier_open(sum_barrier_, 16 * S::fours(p_.rank));
    if constexpr (S::kPerToken) ptx::barrier_open(range_barrier_, p_.share * S::kTokens * 4);
    ptx::fence_barrier_init();
  }

  // What does not change from stage to stage, kept in registers: the compiler would find it anew each time. Places to
  // copy to are no sums with numbers that all threads share: of those ptxas 13.0 makes LDGSTS [R + UR], which with a
  // cache hint is an illegal instruction.
  __device__ __forceinline__ void find_places() {
    const int row = lane_ / 8, piece = lane_ % 8, first_column = first_stage_ * S::kColumns;
    // A warp copies the x that it quantises, a row of 128 bytes for each token.
    const int copied = first_token_ + 8 * octet_ + row, column = first_column + 64 * part_;
    x_from_ = static_cast<const T*>(p_.x) + int64_t(copied) * p_.k + column + 8 * piece;
    x_to_ = (x_ + threadIdx.x / 32 * 1024) ^ (row * 128 + (piece ^ row) * 16);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      x_left_[i] = copied + 4 * i < p_.m ? p_.k - column - 8 * piece : 0;
      ptx::keep(x_left_[i]);
    }
    read_from_ = x_ + threadIdx.x / 32 * 1024 + q() * 128 + (2 * c() ^ q()) * 16;
    x8_to_ = p_.x8 + int64_t(token()) * p_.k + column + 16 * c();
    x8_left_ = token() < p_.m ? p_.k - column - 16 * c() : 0;
    // The block copies V, a row of up to 128 bytes for each column. What lies behind it gives ranks that nobody stores.
    const int v_row = threadIdx.x / 8;
    v_from_ = static_cast<const T*>(p_.v) + int64_t(first_column + v_row) * p_.rank + 8 * piece;
    v_to_ = (v_ + v_row / 8 * 1024) ^ (v_row % 8 * 128 + (piece ^ v_row % 8) * 16);
    v_left_ = p_.k - first_column - v_row;
    ptx::keep(x_from_);
    ptx::keep(x_to_);
    ptx::keep(read_from_);
    ptx::keep(x8_to_);
    ptx::keep(x8_left_);
    ptx::keep(v_from_);
    ptx::keep(v_to_);
    ptx::keep(v_left_);
  }

  // Zeros where there is no x.
  __device__ __forceinline__ void copy_x(int stage, uint32_t to, uint64_t policy) const {
    if (stage >= stages_) return;
    const T* from = x_from_ + stage * S::kColumns;
    ptx::copy_ahead_or_clear(to, from, stage * S::kColumns < x_left_[0] ? 16 : 0, policy);
    ptx::copy_ahead_or_clear((to + 512) ^ 64, from + 4 * int64_t(p_.k), stage * S::kColumns < x_left_[1] ? 16 : 0,
                             policy);
  }

  // One stage after the other.
  __device__ __forceinline__ void copy_v(int stage) {
    if (stage >= stages_) return;
    if (int(threadIdx.x % 8) < p_.rank / 8) {
      const T* from = v_from_ + int64_t(stage) * (S::kColumns * p_.rank);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        ptx::copy_ahead_or_clear(v_to_ + i * S::kVBytes / 2, from + i * int64_t(S::kColumns / 2 * p_.rank),
                                 stage * S::kColumns + i * S::kColumns / 2 < v_left_ ? 16 : 0, ptx::kEvictNormal);
      }
    }
    v_to_ += v_slot(stage) == S::kAhead ? -S::kAhead * S::kVBytes : S::kVBytes;
  }

  __device__ __forceinline__ void read_x(Eight<T> (&x)[2], int slot) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 words = ptx::load_16((read_from_ + slot * S::kXBytes) ^ 16 * i);
      x[i].word[0] = words.x;
      x[i].word[1] = words.y;
      x[i].word[2] = words.z;
      x[i].word[3] = words.w;
    }
  }

  // x @ V and ranges, and with a static scale all there is to do.
  __device__ __forceinline__ void multiply_all(const Divisor& divide) {
    uint32_t to = x_to_ + S::kAhead * S::kXBytes;
    for (int stage = 0, slot = 0; stage < stages_; ++stage) {
      ptx::wgmma_wait<0>();
      ptx::pin(sums_);
      ptx::wait_copies<S::kAhead - 1>();
      ptx::publish_to_wgmma();
      __syncthreads();  // the stage is there, and the one before has served
      multiply(stage, slot);
      copy_x(stage + S::kAhead, to, kFirstRead);
      to += slot == p_.slots - S::kAhead - 1 ? (1 - p_.slots) * S::kXBytes : S::kXBytes;
      copy_v(stage + S::kAhead);
      ptx::commit_copies();
      Eight<T> x[2];
      read_x(x, slot);
      if constexpr (S::kPerToken) {
        range_ = x[1].widen(x[0].widen(range_));
      } else {
        store(x, divide, stage);
      }
      slot = next(slot);
    }
    ptx::wgmma_wait<0>();
    ptx::pin(sums_);
  }

  __device__ __forceinline__ void multiply(int stage, int slot) {
    constexpr uint64_t kVStep = 16 * 128 >> 4, kXStep = 16 * 2 >> 4;  // 16 columns
    const uint64_t v = ptx::descriptor_transposed(v_ + v_slot(stage) * S::kVBytes + group_ / 2 * (S::kVBytes / 2));
    const uint64_t x = ptx::descriptor(x_ + slot * S::kXBytes + group_ * (S::kGroupTokens * 128));
    ptx::wgmma_fence();
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      if constexpr (std::is_same_v<T, __half>) {
        Wgmma<S::kGroupTokens>::half(sums_, v + s * kVStep, x + s * kXStep);
      } else {
        Wgmma<S::kGroupTokens>::bfloat(sums_, v + s * kVStep, x + s * kXStep);
      }
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void store(const Eight<T> (&x)[2], const Divisor& divide, int stage) const {
    if (stage * S::kColumns >= x8_left_) return;
    *reinterpret_cast<uint4*>(x8_to_ + stage * S::kColumns) = {
        quantize_four(x[0].pair(0), x[0].pair(1), divide), quantize_four(x[0].pair(2), x[0].pair(3), divide),
        quantize_four(x[1].pair(0), x[1].pair(1), divide), quantize_four(x[1].pair(2), x[1].pair(3), divide)};
  }

  // Adds the second part to the first, through the memory of V, and sends what the block has to the cluster.
  __device__ __forceinline__ void add_parts() {
    float* const ranges = ptx::shared_pointer<float>(v_) + 8 * octet_ + q();
    float* const fours = ptx::shared_pointer<float>(v_ + 1024) + threadIdx.x % 256 * 4;
    if constexpr (S::kPerToken) {
      range_ = fmaxf(range_, __shfl_xor_sync(~0u, range_, 1));
      range_ = fmaxf(range_, __shfl_xor_sync(~0u, range_, 2));
    }
    __syncthreads();
    if (part_ == 1) {
      if (S::kPerToken && c() == 0) *ranges = range_;
#pragma unroll
      for (int i = 0; i < S::kGroupTokens / 2; ++i) fours[i / 4 * 1024 + i % 4] = sums_[i];
    }
    __syncthreads();
    if (part_ == 1) return;
    if constexpr (S::kPerToken) send_range(fmaxf(range_, *ranges));
#pragma unroll
    for (int i = 0; i < S::kGroupTokens / 2; ++i) sums_[i] += fours[i / 4 * 1024 + i % 4];
    send_sums();
  }

  // A token's largest number in the block's columns, to all blocks.
  __device__ __forceinline__ void send_range(float largest) const {
#pragma unroll 1
    for (int block = c(); block < p_.share; block += 4) ptx::store_remote(range(block_), largest, range_barrier_, block);
  }

  // Each block adds up as many of the tokens' sums as the others.
  __device__ __forceinline__ void send_sums() const {
    const int warp = threadIdx.x / 32 % 4;
    if (warp >= pairs()) return;
    const int share = S::fours(p_.rank) / p_.share;
#pragma unroll
    for (int j = 0; j < S::kGroupTokens / 8; ++j) {
      const int octet = group_ * (S::kGroupTokens / 8) + j;
      const int all = (octet * pairs() + warp) * 32 + lane_, to = unsigned(all) / unsigned(share);
      const float four[4] = {sums_[4 * j], sums_[4 * j + 1], sums_[4 * j + 2], sums_[4 * j + 3]};
      ptx::store_remote(sum(block_ * share + all - to * share), four, sum_barrier_, to);
    }
  }

  __device__ __forceinline__ float find_scale() const {
    ptx::barrier_wait(range_barrier_, 0);
    float largest = 0.f;
#pragma unroll 4
    for (int block = 0; block < p_.share; ++block) largest = fmaxf(largest, *range(block));
    const float scale = __fdiv_rn(largest, kLargestE4m3);
    if (block_ == 0 && part_ == 0 && c() == 0 && token() < p_.m) p_.a[token()] = scale;
    return scale;
  }

  // A warp reads what it has copied itself.
  __device__ __forceinline__ void write_all(const Divisor& divide) const {
    int slot = (stages_ - 1) % p_.slots;
    uint32_t to = x_to_ + slot * S::kXBytes;
    for (int stage = stages_ - 1; stage >= 0; --stage) {
      ptx::wait_copies<S::kAhead>();
      __syncwarp();
      Eight<T> x[2];
      read_x(x, slot);
      __syncwarp();
      if (stage >= p_.slots) copy_x(stage - p_.slots, to, ptx::kEvictFirst);
      ptx::commit_copies();
      store(x, divide, stage);
      to += slot == 0 ? (p_.slots - 1) * S::kXBytes : -S::kXBytes;
      slot = slot == 0 ? p_.slots - 1 : slot - 1;
    }
  }

  // Adds up the block's share of the cluster's sums, always in the same order.
  __device__ __forceinline__ void store_product() const {
    ptx::barrier_wait(sum_barrier_, 0);
    const int share = S::fours(p_.rank) / p_.share;
#pragma unroll 1
    for (int i = threadIdx.x; i < share; i += S::kThreads) {
      float4 total = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
      for (int block = 0; block < p_.share; ++block) {
        const float4 four = *reinterpret_cast<const float4*>(sum(block * share + i));
        total = {total.x + four.x, total.y + four.y, total.z + four.z, total.w + four.w};
      }
      const int all = block_ * share + i, c = all % 4, q = all % 32 / 4, tile = all / 32;
      const int token = first_token_ + 8 * (tile / pairs()) + 2 * c, rank = 16 * (tile % pairs()) + q;
      store_number(token, rank, total.x);
      store_number(token + 1, rank, total.y);
      store_number(token, rank + 8, total.z);
      store_number(token + 1, rank + 8, total.w);
    }
  }

  __device__ __forceinline__ void store_number(int token, int rank, float number) const {
    if (token < p_.m && rank < p_.rank) static_cast<T*>(p_.xv)[int64_t(token) * p_.rank + rank] = T(number);
  }
};

template <class S>
__global__ void __launch_bounds__(S::kThreads, 2) quantize_staged_kernel(const __grid_constant__ StagedParams p) {
  extern __shared__ char raw[];
  StagedQuantizer<S>(p, raw).run();
}

}  // namespace zqfp
