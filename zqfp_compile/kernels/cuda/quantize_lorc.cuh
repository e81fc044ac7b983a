// h -> E4M3 and its scale, and h @ V in the same pass over what h is computed from (quantize_source.cuh).
//
// The blocks of a cluster have the same 16 * kTiles tokens and 16 * kPairs ranks and share them along K; of the clusters
// with the same tokens each quantises a part. A warp takes chunks of 32 columns: thread 4q + c loads columns 8c..8c+7 of
// tokens q + 8r and uses them both as numbers to quantise and as operand B of two m16n8k16 steps, whose 16 columns are
// 8c + 4s + {0, 1, 2, 3} for the four c: a sum does not mind the order. V is operand A: h goes in as it lies in memory.
#pragma once

#include "quantize_source.cuh"
#include "rows_of_v.cuh"

namespace zqfp {

constexpr int kChunk = 32;
constexpr int kMaxRank = 64;

// What there is to do beside h @ V.
enum class LorcTask { kStatic, kPerToken, kNothing };

// Few tokens: many blocks, each with little of V, all of it under way at once. Many tokens of h that must be computed (for
// x alone there is quantize_lorc_many.cuh): V is read once for 32 of them.
template <class From, int Tiles, int Pairs, int Batch, int Warps, LorcTask Task>
struct LorcShape {
  using Source = From;
  using T = typename Source::T;
  static constexpr int kTiles = Tiles, kPairs = Pairs, kWarps = Warps;
  static constexpr int kBatch = Batch;  // chunks that a warp has under way
  static constexpr bool kPerToken = Task == LorcTask::kPerToken, kStatic = Task == LorcTask::kStatic;
  static constexpr int kTokens = 16 * Tiles, kRanks = 16 * Pairs, kThreads = 32 * Warps;
  static constexpr int kRows = 2 * Tiles;         // tokens of a thread
  static constexpr int kSums = 8 * Tiles * Pairs;  // of a thread
  static constexpr int kRound = kSums < 16 ? kSums : 16;  // of them, added up at a time
};
template <class Source, LorcTask kTask>
using FewTokens = LorcShape<Source, 1, 1, 5 - Source::kLoads, 16, kTask>;
template <class Source, LorcTask kTask>
using ManyTokens = LorcShape<Source, 2, 2, 1, 16, kTask>;

// Of a block. The blocks of the cluster write to each other's `sum` and `range`, and count the bytes on the barriers; so
// nobody reads what is not there, and no block needs to outlive another.
template <class S>
struct LorcShared {
  uint64_t sum_barrier, range_barrier;
  float sum[32 * S::kSums];  // of each block the numbers that this one adds up
  float range[kMaxClusterBlocks][S::kTokens];
  float scale[S::kTokens];
  float warp_range[S::kWarps][S::kTokens];
  float parts[S::kWarps][32 * S::kRound];
};

// One thread's part.
template <class S>
class LorcQuantizer {
  using T = typename S::T;
  using Source = typename S::Source;
  using Raw = typename Source::Raw;

 public:
  __device__ __forceinline__ LorcQuantizer(const QuantizeParams& p, LorcShared<S>& shared) : p_(p), shared_(shared) {
    const unsigned groups = (p.rank + S::kRanks - 1) / S::kRanks;
    const int shift = 31 - __clz(p.share);  // a power of two
    const unsigned cluster = blockIdx.x >> shift;
    part_ = 32 * S::kSums >> shift;
    q_ = threadIdx.x % 32 / 4;
    c_ = threadIdx.x % 4;
    warp_ = threadIdx.x / 32;
    block_ = blockIdx.x & (p.share - 1);
    group_ = cluster % groups;
    groups_ = groups;
    first_token_ = cluster / groups * S::kTokens;
    first_column_ = (block_ * S::kWarps + warp_) * kChunk + 8 * c_;
    stride_ = p.share * S::kWarps * kChunk;
  }

  __device__ __forceinline__ void run() {
    ptx::release_kernel_after();
    open_barriers();
    ptx::cluster_arrive();
    RowsOfV<S::kPairs> v[S::kBatch];
    // Weights: they may be read before the kernel before has ended.
    load_first([&](int b, int column) {
      load_v(v[b], column);
      load_column(b, column);
    });
    ptx::wait_for_kernel_before();
    const float scale = S::kStatic ? *p_.scale : 1.f;
    Raw x[S::kBatch][S::kRows];
    read(x, v, scale);
    ptx::cluster_wait();  // every block has opened its barriers
    if constexpr (S::kPerToken) share_warp_ranges();
    add_warps();
    if constexpr (S::kPerToken) {
      send_ranges();
      find_scales();
      write_per_token(x);
    } else if (S::kStatic && blockIdx.x == 0 && threadIdx.x == 0 && p_.a != nullptr) {
      p_.a[0] = scale;
    }
    store_product();
  }

 private:
  const QuantizeParams& p_;
  LorcShared<S>& shared_;
  int q_, c_, warp_, block_, group_, groups_, first_token_, first_column_, stride_;
  int part_;  // sums that a block adds up for its cluster
  typename Source::Column columns_[S::kBatch];
  typename Source::Row rows_[S::kRows];
  float range_[S::kRows] = {};
  float sums_[S::kRows][S::kPairs][4] = {};  // [r][p][2h + i]: token 8r + 2c + i, rank 2 * kPairs * q + 2p + h

  __device__ __forceinline__ int token(int row) const { return first_token_ + q_ + 8 * row; }
  __device__ __forceinline__ int64_t offset(int row, int column) const { return int64_t(token(row)) * p_.k + column; }
  __device__ __forceinline__ bool inside(int row, int column) const { return token(row) < p_.m && column < p_.k; }
  // Of four chunks one after the other, each of the up to four clusters quantises as many as can be.
  __device__ __forceinline__ bool is_mine(int column) const {
    return (column / kChunk % 4u) * groups_ / 4u == unsigned(group_);
  }
  // Whether the warp's chunk at a thread's column is there; the thread's own part may lie outside.
  __device__ __forceinline__ bool has_chunk(int column) const { return column - 8 * c_ < p_.k; }

  __device__ __forceinline__ void open_barriers() {
    if (threadIdx.x != 0) return;
    ptx::barrier_open(ptx::shared_address(&shared_.sum_barrier), sizeof shared_.sum);
    if constexpr (S::kPerToken) {
      ptx::barrier_open(ptx::shared_address(&shared_.range_barrier), p_.share * sizeof shared_.range[0]);
    }
    ptx::fence_barrier_init();
  }

  // A number to a place in a block of the cluster. A block that is its own cluster is launched without one.
  __device__ __forceinline__ void send(float& place, float number, uint64_t& barrier, int block) const {
    if (p_.share == 1) {
      place = number;
    } else {
      ptx::store_remote(&place, number, ptx::shared_address(&barrier), block);
    }
  }
  // Waits for all that the blocks send on the barrier. All threads call it.
  __device__ __forceinline__ void receive(uint64_t& barrier) const {
    if (p_.share == 1) {
      __syncthreads();
    } else {
      ptx::barrier_wait(ptx::shared_address(&barrier), 0);
    }
  }

  __device__ __forceinline__ void load_v(RowsOfV<S::kPairs>& v, int column) const {
    const int rank = group_ * S::kRanks + 2 * S::kPairs * q_;
    const T* from = static_cast<const T*>(p_.v) + int64_t(column) * p_.rank + rank;
    v.load(from, p_.rank, column < p_.k && rank < p_.rank);
  }

  __device__ __forceinline__ void load_column(int batch, int column) {
    columns_[batch] = Source::load_column(p_, column, column < p_.k);
  }

  __device__ __forceinline__ Raw load_x(int row, int column) const {
    return Source(p_).load(offset(row, column), inside(row, column));
  }

  __device__ __forceinline__ void load_rows(Raw (&x)[S::kRows], int column) const {
#pragma unroll
    for (int r = 0; r < S::kRows; ++r) x[r] = load_x(r, column);
  }

  // Runs `load` for the thread's columns of the first chunks that the warp has under way.
  template <typename Load>
  __device__ __forceinline__ void load_first(Load load) {
#pragma unroll
    for (int b = 0; b < S::kBatch; ++b) {
      if (has_chunk(first_column_ + b * stride_)) load(b, first_column_ + b * stride_);
    }
  }

  // Ranges and h @ V, and with a static scale all there is to do. All lanes of a warp run the same chunks, as mma
  // needs them all.
  __device__ __forceinline__ void read(Raw (&x)[S::kBatch][S::kRows], RowsOfV<S::kPairs> (&v)[S::kBatch],
                                       float scale) {
    load_first([&](int b, int column) { load_rows(x[b], column); });
#pragma unroll
    for (int r = 0; r < S::kRows; ++r) {
      rows_[r] = Source::load_row(p_, token(r), group_ * S::kRanks, token(r) < p_.m);
    }
    const Divisor divide(scale);  // not before: the loads of x must not wait for the scale
    for (int column = first_column_; has_chunk(column); column += S::kBatch * stride_) {
#pragma unroll
      for (int b = 0; b < S::kBatch; ++b) {
        if (has_chunk(column + b * stride_)) use(b, x[b], v[b], column + b * stride_, divide);
      }
    }
  }

  // Uses a chunk, and puts the next one in the place of each part that has served.
  __device__ __forceinline__ void use(int batch, Raw (&x)[S::kRows], RowsOfV<S::kPairs>& v, int column,
                                      const Divisor& divide) {
    const int next = column + S::kBatch * stride_;
    const bool more = has_chunk(next);
    Eight<T> h[S::kRows];
#pragma unroll
    for (int r = 0; r < S::kRows; ++r) {
      if (Source::kLoads > 1 && first_token_ + 8 * r >= p_.m) continue;  // zeros; computing takes time
      h[r] = Source(p_).compute(x[r], columns_[batch], rows_[r]);
    }
    multiply(h, v);
    if (more) load_v(v, next);
    if (more) load_column(batch, next);
#pragma unroll
    for (int r = 0; r < S::kRows; ++r) {
      if constexpr (S::kPerToken) {
        range_[r] = h[r].widen(range_[r]);
        Source::keep(h[r], x[r]);
      } else if (S::kStatic && is_mine(column) && inside(r, column)) {
        store_quantized(h[r], divide, p_.x8 + offset(r, column));
      }
      if (more) x[r] = load_x(r, next);
    }
  }

  __device__ __forceinline__ void multiply(const Eight<T> (&h)[S::kRows], const RowsOfV<S::kPairs>& v) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int p = 0; p < S::kPairs; ++p) {
        uint32_t a[4];
        v.operand(s, p, a);
#pragma unroll
        for (int r = 0; r < S::kRows; ++r) {
          ptx::mma(sums_[r][p], a, h[r].word[2 * s], h[r].word[2 * s + 1], T());
        }
      }
    }
  }

  __device__ __forceinline__ void share_warp_ranges() {
#pragma unroll
    for (int r = 0; r < S::kRows; ++r) {
      range_[r] = fmaxf(range_[r], __shfl_xor_sync(~0u, range_[r], 1));
      range_[r] = fmaxf(range_[r], __shfl_xor_sync(~0u, range_[r], 2));
      if (c_ == 0) shared_.warp_range[warp_][q_ + 8 * r] = range_[r];
    }
  }

  // The warps' sums to shared memory and the block's out of it: each thread adds up all warps, in their order, and sends
  // the sum to the block that adds up the blocks.
  __device__ __forceinline__ void add_warps() {
    const float* mine = &sums_[0][0][0];
#pragma unroll
    for (int first = 0; first < S::kSums; first += S::kRound) {
      if (first > 0) __syncthreads();
#pragma unroll
      for (int i = 0; i < S::kRound; ++i) shared_.parts[warp_][32 * i + threadIdx.x % 32] = mine[first + i];
      __syncthreads();
#pragma unroll 1
      for (int at = threadIdx.x; at < 32 * S::kRound; at += S::kThreads) {
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < S::kWarps; ++w) sum += shared_.parts[w][at];
        const int all = 32 * first + at, to = unsigned(all * p_.share) / (32 * S::kSums);
        const int place = (block_ - to) * part_ + all;
        send(shared_.sum[place], sum, shared_.sum_barrier, to);
      }
    }
  }

  // The block's largest number of each token, to all blocks.
  __device__ __forceinline__ void send_ranges() {
    if (threadIdx.x >= S::kTokens) return;
    float largest = kSmallestRange;
#pragma unroll
    for (int w = 0; w < S::kWarps; ++w) largest = fmaxf(largest, shared_.warp_range[w][threadIdx.x]);
#pragma unroll 1
    for (int b = 0; b < p_.share; ++b) send(shared_.range[block_][threadIdx.x], largest, shared_.range_barrier, b);
  }

  __device__ __forceinline__ void find_scales() {
    receive(shared_.range_barrier);
    if (threadIdx.x < S::kTokens) {
      float largest = 0.f;
#pragma unroll
      for (int b = 0; b < kMaxClusterBlocks; ++b) {
        if (b < p_.share) largest = fmaxf(largest, shared_.range[b][threadIdx.x]);
      }
      const float scale = __fdiv_rn(largest, kLargestE4m3);
      shared_.scale[threadIdx.x] = scale;
      const int token = first_token_ + int(threadIdx.x);
      if (group_ == 0 && block_ == 0 && token < p_.m) p_.a[token] = scale;
    }
    __syncthreads();
  }

  // Each block adds up its part of the cluster's sums, in the order of the blocks.
  __device__ __forceinline__ void store_product() {
    receive(shared_.sum_barrier);
#pragma unroll 1
    for (int i = threadIdx.x; i < part_; i += S::kThreads) {
      float sum = 0.f;
#pragma unroll
      for (int b = 0; b < kMaxClusterBlocks; ++b) sum += b < p_.share ? shared_.sum[b * part_ + i] : 0.f;
      store_number(block_ * part_ + i, sum);
    }
  }

  // Sum `at` of a block: 32 * (which of a thread's sums_) + lane.
  __device__ __forceinline__ void store_number(int at, float sum) {
    const int q = at % 32 / 4, c = at % 4, i = at / 32 % 2, h = at / 64 % 2;
    const int pair = at / 128 % S::kPairs, row = at / 128 / S::kPairs;
    const int token = first_token_ + 8 * row + 2 * c + i;
    const int rank = group_ * S::kRanks + 2 * S::kPairs * q + 2 * pair + h;
    if (token < p_.m && rank < p_.rank) static_cast<T*>(p_.xv)[int64_t(token) * p_.rank + rank] = T(sum);
  }

  // h of what still is in registers, or is read once more out of the cache. Only of sources without columns and rows.
  __device__ __forceinline__ void write_per_token(Raw (&x)[S::kBatch][S::kRows]) {
    const bool held = !has_chunk(first_column_ + S::kBatch * stride_);
    for (int column = first_column_; has_chunk(column); column += S::kBatch * stride_) {
#pragma unroll
      for (int b = 0; b < S::kBatch; ++b) {
        const int at = column + b * stride_;
        if (!has_chunk(at) || !is_mine(at)) continue;
        if (!held) load_rows(x[b], at);
#pragma unroll
        for (int r = 0; r < S::kRows; ++r) {
          if (!inside(r, at)) continue;
          if (!held) Source::keep(Source::compute(x[b][r]), x[b][r]);
          const Divisor divide(shared_.scale[q_ + 8 * r]);
          store_quantized(Source::kept(x[b][r]), divide, p_.x8 + offset(r, at));
        }
      }
    }
  }
};

template <class S>
__global__ void __launch_bounds__(S::kThreads) quantize_lorc_kernel(QuantizeParams p) {
  __shared__ LorcShared<S> shared;
  LorcQuantizer<S>(p, shared).run();
}

}  // namespace zqfp
