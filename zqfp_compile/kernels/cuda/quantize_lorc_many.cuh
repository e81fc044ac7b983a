// x -> E4M3 and its scale, and x @ V in the same pass over x, of many tokens.
//
// The blocks of a cluster have the same tokens and share them along K. A block copies stages of its columns to shared
// memory, kAhead of them ahead: x, and of V the same columns. A warp has eight tokens and 64 columns of a stage: thread
// 4q + c has columns 16c..16c+15 of token q, to quantise and as operand B of four m16n8k16 steps, whose 16 columns are
// 16c + 4s + {0, 1, 2, 3} for the four c: a sum does not mind the order. V is operand A. So no token's sums are in more
// warps than a stage has 64 columns, and there are few of them in a thread.
//
// Per token all is multiplied first, then quantised from the last column back: what came last is still in shared memory,
// the rest comes once more out of the cache.
#pragma once

#include "quantize_value.cuh"

#ifndef ZQFP_TOKEN_ONE
#define ZQFP_TOKEN_ONE 0
#endif
#ifndef ZQFP_AHEAD
#define ZQFP_AHEAD 3
#endif
#ifndef ZQFP_OCTETS
#define ZQFP_OCTETS 8
#endif
#ifndef ZQFP_MANY
#define ZQFP_MANY 512
#endif

namespace zqfp {

template <typename Number, int Pairs, bool PerToken>
struct ManyTokens {
  using T = Number;
  static constexpr int kPairs = Pairs;  // of eight ranks
  static constexpr bool kPerToken = PerToken;
  static constexpr int kBlocks = Pairs <= ZQFP_OCTETS / 4 && !(PerToken && ZQFP_TOKEN_ONE) ? 2 : 1;  // that a processor has room for
  static constexpr int kAhead = PerToken && kBlocks == 2 ? 2 : ZQFP_AHEAD;
  static constexpr int kOctets = ZQFP_OCTETS, kTokens = 8 * kOctets;
  static constexpr int kParts = 16 / kOctets, kColumns = 64 * kParts;  // of a stage
  static constexpr int kThreads = 32 * kOctets * kParts;
  static constexpr int kXBytes = 2 * kTokens * kColumns, kVBytes = 32 * kPairs * kColumns;  // of a stage
  static constexpr int kVCopies = kVBytes / 16 / kThreads < 1 ? 1 : kVBytes / 16 / kThreads;  // of a thread
  static constexpr int kSums = 32 * kOctets * kPairs;  // of a stage's part, in fours
};

struct ManyTokensParams : QuantizeParams {
  int slots;  // stages of x in shared memory: more than kAhead
};

constexpr int kMaxManyBlocks = 8;  // of a cluster, a power of two; at least 2

// Of a block, without x. The blocks of a cluster write to each other's `sum` and `range`, and count the bytes on the
// barriers; so nobody reads what is not there, and no block needs to outlive another.
template <class S>
struct ManyTokensShared {
  char v[S::kAhead + 1][S::kVBytes];
  alignas(16) float sum[S::kParts * S::kSums][4];  // from each part of each block, the numbers that this one adds up
  float range[S::kPerToken ? kMaxManyBlocks * S::kParts : 1][S::kTokens];
  uint64_t sum_barrier, range_barrier;
};

// Where x begins: rows of 128 bytes, each of them in all banks once.
template <class S>
constexpr int kManyTokensX = (int(sizeof(ManyTokensShared<S>)) + 127) / 128 * 128;

// Stages of x that fit where a processor has all its blocks: 1 KB of each block's shared memory is the driver's.
template <class S>
constexpr int kMostSlots = ((228 / S::kBlocks - 1) * 1024 - kManyTokensX<S>) / S::kXBytes;

// One thread's part.
template <class S>
class ManyTokensQuantizer {
  using T = typename S::T;

 public:
  __device__ __forceinline__ ManyTokensQuantizer(const ManyTokensParams& p, char* raw)
      : p_(p), shared_(*reinterpret_cast<ManyTokensShared<S>*>(raw)) {
    lane_ = threadIdx.x % 32;
    octet_ = threadIdx.x / 32 % S::kOctets;
    part_ = threadIdx.x / 32 / S::kOctets;
    block_ = blockIdx.x & (p.share - 1);
    first_token_ = (blockIdx.x >> (31 - __clz(p.share))) * S::kTokens;
    const int stages = (p.k + S::kColumns - 1) / S::kColumns;
    first_stage_ = stages * block_ / p.share;
    stages_ = stages * (block_ + 1) / p.share - first_stage_;
    x_ = ptx::shared_address(raw) + kManyTokensX<S> + threadIdx.x / 32 * 1024;
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
      copy_x(stage, stage, kFirstRead);
      ptx::commit_copies();
    }
    multiply_all(Divisor(scale));
    ptx::cluster_wait();  // every block has opened its barriers
    send_sums();
    if constexpr (S::kPerToken) {
      send_ranges();
      write_all(Divisor(find_scale()));
    } else if (blockIdx.x == 0 && threadIdx.x == 0 && p_.a != nullptr) {
      p_.a[0] = scale;
    }
    store_product();
  }

 private:
  // What is read twice should stay in the cache.
  static constexpr int kNone = -(1 << 30);
  static constexpr uint64_t kFirstRead = S::kPerToken ? ptx::kEvictNormal : ptx::kEvictFirst;

  const ManyTokensParams& p_;
  ManyTokensShared<S>& shared_;
  int lane_, octet_, part_, block_, first_token_, first_stage_, stages_;
  uint32_t x_;  // of the warp in slot 0
  const T *x_from_, *v_from_;
  uint8_t* x8_to_;
  uint32_t x_to_, read_from_, v_to_[S::kVCopies], v_read_;
  int read_step_, v_step_;
  // Columns that there are from the place in the first stage on.
  int x_left_[2], v_left_[S::kVCopies], x8_left_;
  float range_ = kSmallestRange;
  float sums_[S::kPairs][4] = {};  // [p][2h + i]: token 2c + i of the eight, rank 16p + 8h + q

  __device__ __forceinline__ int q() const { return lane_ / 4; }
  __device__ __forceinline__ int c() const { return lane_ % 4; }
  __device__ __forceinline__ int token() const { return first_token_ + 8 * octet_ + q(); }
  __device__ __forceinline__ int column(int stage) const {
    return (first_stage_ + stage) * S::kColumns + 64 * part_;
  }
  __device__ __forceinline__ static int v_slot(int stage) { return stage % (S::kAhead + 1); }
  __device__ __forceinline__ int next(int slot) const { return slot + 1 == p_.slots ? 0 : slot + 1; }

  __device__ __forceinline__ void open_barriers() {
    if (threadIdx.x != 0) return;
    open(shared_.sum_barrier, sizeof shared_.sum);
    if constexpr (S::kPerToken) open(shared_.range_barrier, p_.share * S::kParts * sizeof shared_.range[0]);
    ptx::fence_barrier_init();
  }
  __device__ __forceinline__ static void open(uint64_t& barrier, uint32_t bytes) {
    ptx::barrier_init(ptx::shared_address(&barrier), 1);
    ptx::barrier_expect(ptx::shared_address(&barrier), bytes);
  }

  // What does not change from stage to stage, kept in registers: the compiler would find it anew each time.
  __device__ __forceinline__ void find_places() {
    const int row = lane_ / 8, piece = lane_ % 8, copied = first_token_ + 8 * octet_ + row;
    x_from_ = static_cast<const T*>(p_.x) + int64_t(copied) * p_.k + column(0) + 8 * piece;
    x_to_ = x_ + row * 128 + (piece ^ (row & 1)) * 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) x_left_[i] = copied + 4 * i < p_.m ? p_.k - column(0) - 8 * piece : 0;

    read_from_ = x_ + q() * 128 + (2 * c() + (q() & 1)) * 16;
    read_step_ = q() & 1 ? -16 : 16;
    x8_to_ = p_.x8 + int64_t(token()) * p_.k + column(0) + 16 * c();
    x8_left_ = token() < p_.m ? p_.k - column(0) - 16 * c() : 0;

    // V's pieces of 16 bytes follow each other in memory.
    const int first = first_stage_ * S::kColumns;
    v_from_ = static_cast<const T*>(p_.v) + int64_t(first) * p_.rank + 8 * threadIdx.x;
    v_step_ = S::kColumns * p_.rank;
    const unsigned pieces = p_.rank / 8;
#pragma unroll
    for (int i = 0; i < S::kVCopies; ++i) {
      const unsigned index = threadIdx.x + i * S::kThreads;
      const int at = index / pieces;
      v_to_[i] = ptx::shared_address(shared_.v) + v_place(at, index % pieces);
      v_left_[i] = at < S::kColumns ? p_.k - first - at : kNone;
      ptx::keep(v_to_[i]);
      ptx::keep(v_left_[i]);
    }
    // Of matrices (h, eight ranks) a lane has a row's address.
    const int matrix = (part_ * 8 + lane_ / 16) * 2 * S::kPairs + lane_ / 8 % 2;
    v_read_ = ptx::shared_address(shared_.v) + matrix * 128 + lane_ % 8 * 16;
    ptx::keep(x_from_);
    ptx::keep(x_to_);
    ptx::keep(x_left_[0]);
    ptx::keep(x_left_[1]);
    ptx::keep(read_from_);
    ptx::keep(read_step_);
    ptx::keep(x8_to_);
    ptx::keep(x8_left_);
    ptx::keep(v_from_);
    ptx::keep(v_read_);
  }

  // A stage's V are 8x8 matrices of columns and ranks, 128 bytes each: [part][s][h][eight ranks], where row 2c + i is
  // column 16c + 4s + 2h + i. Ranks that V lacks are left as they are, and what they give is not stored.
  __device__ __forceinline__ static int v_place(int column, int piece) {
    const int matrix = ((column / 64 * 4 + column % 16 / 4) * 2 + column % 4 / 2) * 2 * S::kPairs + piece;
    return matrix * 128 + (column % 64 / 16 * 2 + column % 2) * 16;
  }

  // The warp's x, each row's 16-byte pieces in the order that lets threads read theirs from different banks. Zeros
  // where there is none.
  __device__ __forceinline__ void copy_x(int stage, int slot, uint64_t policy) const {
    if (stage >= stages_) return;
    const T* from = x_from_ + stage * S::kColumns;
    const uint32_t to = x_to_ + slot * S::kXBytes;
    ptx::copy_ahead_or_clear(to, from, stage * S::kColumns < x_left_[0] ? 16 : 0, policy);
    ptx::copy_ahead_or_clear(to + 512, from + 4 * int64_t(p_.k), stage * S::kColumns < x_left_[1] ? 16 : 0, policy);
  }

  __device__ __forceinline__ void read_x(Eight<T> (&x)[2], int slot) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 words = ptx::load_16(read_from_ + slot * S::kXBytes + i * read_step_);
      x[i].word[0] = words.x;
      x[i].word[1] = words.y;
      x[i].word[2] = words.z;
      x[i].word[3] = words.w;
    }
  }

  // The block's, one stage after the other. The place is carried along: of a sum with the slot's ptxas 13.0 makes
  // LDGSTS [R + UR] with a cache hint, which is an illegal instruction.
  __device__ __forceinline__ void copy_v(int stage) {
    if (stage >= stages_) return;
    const T* from = v_from_ + int64_t(stage) * v_step_;
#pragma unroll
    for (int i = 0; i < S::kVCopies; ++i) {
      if (v_left_[i] == kNone) continue;
      ptx::copy_ahead_or_clear(v_to_[i], from + 8 * i * S::kThreads, stage * S::kColumns < v_left_[i] ? 16 : 0,
                               ptx::kEvictNormal);
      v_to_[i] += v_slot(stage) == S::kAhead ? -S::kAhead * S::kVBytes : S::kVBytes;
    }
  }

  // x @ V and ranges, and with a static scale all there is to do.
  __device__ __forceinline__ void multiply_all(const Divisor& divide) {
    for (int stage = 0, slot = 0, last = S::kAhead; stage < stages_; ++stage) {
      ptx::wait_copies<S::kAhead - 1>();
      __syncthreads();  // the stage is there, and the one before has served
      copy_x(stage + S::kAhead, last, kFirstRead);
      copy_v(stage + S::kAhead);
      ptx::commit_copies();
      Eight<T> x[2];
      read_x(x, slot);
      multiply(x, v_read_ + v_slot(stage) * S::kVBytes);
      if constexpr (S::kPerToken) {
        range_ = x[1].widen(x[0].widen(range_));
      } else {
        store(x, divide, stage);
      }
      slot = next(slot);
      last = next(last);
    }
  }

  __device__ __forceinline__ void multiply(const Eight<T> (&x)[2], uint32_t v) {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
#pragma unroll
      for (int p = 0; p < S::kPairs; ++p) {
        uint32_t a[4];
        ptx::load_transposed(v + (s * 4 * S::kPairs + 2 * p) * 128, a);
        ptx::mma(sums_[p], a, x[s / 2].word[s % 2 * 2], x[s / 2].word[s % 2 * 2 + 1], T());
      }
    }
  }

  __device__ __forceinline__ void store(const Eight<T> (&x)[2], const Divisor& divide, int stage) const {
    if (stage * S::kColumns >= x8_left_) return;
    *reinterpret_cast<uint4*>(x8_to_ + stage * S::kColumns) = {
        quantize_four(x[0].pair(0), x[0].pair(1), divide), quantize_four(x[0].pair(2), x[0].pair(3), divide),
        quantize_four(x[1].pair(0), x[1].pair(1), divide), quantize_four(x[1].pair(2), x[1].pair(3), divide)};
  }

  // Each block adds up as many of the tokens' sums as the others.
  __device__ __forceinline__ void send_sums() {
    const int share = S::kSums / p_.share;
#pragma unroll
    for (int p = 0; p < S::kPairs; ++p) {
      const int all = (octet_ * S::kPairs + p) * 32 + lane_, to = unsigned(all) / unsigned(share);
      const int place = (block_ * S::kParts + part_) * share + all - to * share;
      ptx::store_remote(shared_.sum[place], sums_[p], ptx::shared_address(&shared_.sum_barrier), to);
    }
  }

  // A token's largest number in the warp's columns, to all blocks.
  __device__ __forceinline__ void send_ranges() {
    range_ = fmaxf(range_, __shfl_xor_sync(~0u, range_, 1));
    range_ = fmaxf(range_, __shfl_xor_sync(~0u, range_, 2));
    const float* place = &shared_.range[block_ * S::kParts + part_][8 * octet_ + q()];
#pragma unroll 1
    for (int block = c(); block < p_.share; block += 4) {
      ptx::store_remote(place, range_, ptx::shared_address(&shared_.range_barrier), block);
    }
  }

  __device__ __forceinline__ float find_scale() {
    ptx::barrier_wait(ptx::shared_address(&shared_.range_barrier), 0);
    float largest = 0.f;
#pragma unroll 4
    for (int i = 0; i < p_.share * S::kParts; ++i) largest = fmaxf(largest, shared_.range[i][8 * octet_ + q()]);
    const float scale = __fdiv_rn(largest, kLargestE4m3);
    if (block_ == 0 && part_ == 0 && c() == 0 && token() < p_.m) p_.a[token()] = scale;
    return scale;
  }

  // A warp reads what it has copied itself.
  __device__ __forceinline__ void write_all(const Divisor& divide) {
    for (int stage = stages_ - 1, slot = stage % p_.slots; stage >= 0; --stage) {
      ptx::wait_copies<S::kAhead>();
      __syncwarp();
      Eight<T> x[2];
      read_x(x, slot);
      __syncwarp();
      if (stage >= p_.slots) copy_x(stage - p_.slots, slot, ptx::kEvictFirst);
      ptx::commit_copies();
      store(x, divide, stage);
      slot = slot == 0 ? p_.slots - 1 : slot - 1;
    }
  }

  // Adds up the block's share of the cluster's sums, always in the same order.
  __device__ __forceinline__ void store_product() const {
    ptx::barrier_wait(ptx::shared_address(&shared_.sum_barrier), 0);
    const int share = S::kSums / p_.share;
#pragma unroll 1
    for (int i = threadIdx.x; i < share; i += S::kThreads) {
      float sum[4] = {};
#pragma unroll 4
      for (int part = 0; part < p_.share * S::kParts; ++part) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] += shared_.sum[part * share + i][j];
      }
      store_numbers(block_ * share + i, sum);
    }
  }

  // Number `all` of the cluster's fours: 32 * (kPairs * octet + p) + lane.
  __device__ __forceinline__ void store_numbers(int all, const float (&sum)[4]) const {
    const int lane = all % 32, p = all / 32 % S::kPairs, octet = all / 32 / S::kPairs;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int token = first_token_ + 8 * octet + 2 * (lane % 4) + j % 2, rank = 16 * p + 8 * (j / 2) + lane / 4;
      if (token < p_.m && rank < p_.rank) static_cast<T*>(p_.xv)[int64_t(token) * p_.rank + rank] = T(sum[j]);
    }
  }
};

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    quantize_many_kernel(const __grid_constant__ ManyTokensParams p) {
  static_assert(kMostSlots<S> > S::kAhead);
  extern __shared__ char memory[];
  ManyTokensQuantizer<S>(p, memory).run();
}

}  // namespace zqfp
