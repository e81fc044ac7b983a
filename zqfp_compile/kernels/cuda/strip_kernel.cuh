// The kernels for at most 16 tokens, whose time is that of reading the weight once. It deals out strips of 16 rows and all
// of K: no block leaves anything to another, and x8 stays in shared memory.
//
// A wgmma has 64 rows, 16 of each warp. Here the four warps of a warpgroup have the same 16 rows of four quarters of K,
// and the tokens stand in B four times, once for each quarter: each warp takes its own columns of the result and leaves
// the others. A piece, what a warp multiplies at a time, is 16 rows by 128 columns: a quarter of a packed block. It is
// copied by the warp that uses it, kAhead pieces ahead, so that no warp waits for another.
//
// The warpgroups, two to four, go round the columns of a strip's quarters, one strip after the other. Their sums meet in shared
// memory, where one more warp adds them in the order of K, scales, adds LoRC and bias, and stores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "multiply.cuh"
#include "params.h"
#include "ptx.cuh"
#include "strip_tokens.cuh"

namespace zqfp {

// What a block computes: strips, the same number as any other block or one more, and its first token.
struct StripTile {
  int first, end;
  int token;
};

template <class C>
__device__ __forceinline__ StripTile strip_tile(const StripParams& p) {
  const int token_tile = p.by_blocks.divide(blockIdx.x), block = blockIdx.x - token_tile * p.blocks;
  return {p.by_blocks.divide(p.strips * block), p.by_blocks.divide(p.strips * (block + 1)), token_tile * C::kTokens};
}

template <class C>
class StripWorker {
 public:
  __device__ __forceinline__ StripWorker(const StripParams& p, StripShared<C> shared)
      : p_(p),
        shared_(shared),
        warp_(threadIdx.x / 32),
        slice_(warp_ % kStripSlices),
        lane_(threadIdx.x % 32),
        tile_(strip_tile<C>(p)),
        load_{tile_.first, warp_ / 4},
        use_(load_),
        left_(tile_.first) {
    normalize(use_);
    aim();
  }

  // Asks for the first pieces, for which it needs nobody.
  __device__ __forceinline__ void start() {
    for (int stage = 0; stage < C::kAhead; ++stage) fetch(stage);
  }

  // `tokens_there`: no chunk of x8 is still on its way.
  __device__ __forceinline__ void run(bool tokens_there) {
    tokens_there_ = tokens_there;
    leave_strips_before(use_);
    while (use_.strip < tile_.end) {
      const int strip = use_.strip, slot = use_.column * kStripSlices + slice_;
      Sums sums;
#pragma unroll
      for (float& sum : sums) sum = 0.f;
      while (use_.strip == strip) step(sums);
      ptx::wgmma_wait<0>();
      ptx::pin(sums);
      wait_for_all_tokens();
      leave_strip(slot, sums);
      leave_strips_before(use_);
    }
  }

 private:
  using Sums = float[C::kColumns / 2];

  // Of a piece: its strip, and its block of K within the quarter.
  struct Position {
    int strip, column;
  };

  const StripParams& p_;
  StripShared<C> shared_;
  int warp_, slice_, lane_;
  StripTile tile_;
  Position load_, use_;
  int left_;  // the strip that this warp leaves next
  int stage_ = 0;
  bool tokens_there_;
  const uint8_t *codes_, *scales_;

  __device__ __forceinline__ void normalize(Position& at) const {
    for (; at.column >= p_.columns; ++at.strip) at.column -= p_.columns;
  }
  __device__ __forceinline__ void advance(Position& at) const {
    at.column += C::kWarpgroups;
    normalize(at);
  }

  // Where the lane's part of the piece at load_ lies.
  __device__ __forceinline__ void aim() {
    normalize(load_);
    const int64_t block = int64_t(load_.strip / 4) * p_.k_blocks + slice_ * p_.columns + load_.column;
    const int quarter = load_.strip % 4;
    const int rows = (quarter * 8 + lane_ / 4) * C::kScaleBytes / C::kScaleCopy * C::kScaleCopy;
    codes_ = p_.codes + block * kBlockBytes + quarter * (C::kCodeBytes / 2) + lane_ * 16;
    scales_ = p_.group_scales + block * scale_block_bytes(C::kGroup) + rows;
  }

  // Each lane copies what it will use itself. The last quarter of K may have fewer columns: zeros.
  __device__ __forceinline__ void fetch(int stage) {
    if (load_.strip < tile_.end) {
      const uint32_t to = shared_.piece(warp_, stage);
      const int bytes = slice_ * p_.columns + load_.column < p_.k_blocks ? 16 : 0;
      ptx::copy_ahead_or_clear(to + lane_ * 16, codes_, bytes);
      ptx::copy_ahead_or_clear(to + lane_ * 16 + C::kCodeBytes / 2, codes_ + kBlockBytes / 2, bytes);
      if (bytes != 0) ptx::copy_ahead<C::kScaleCopy>(to + C::kCodeBytes + lane_ * C::kScaleCopy, scales_);
      load_.column += C::kWarpgroups;
      codes_ += C::kWarpgroups * kBlockBytes;
      scales_ += C::kWarpgroups * scale_block_bytes(C::kGroup);
      if (load_.column >= p_.columns) aim();
    }
    ptx::commit_copies();
  }

  __device__ __forceinline__ void step(Sums& sums) {
    if (!tokens_there_) ptx::barrier_wait(shared_.chunk(use_.column / kStripChunk), 0);
    ptx::wait_copies<C::kAhead - 1>();
    const uint32_t piece = shared_.piece(warp_, stage_);
    const uint4 codes = ptx::load_16(piece + lane_ * 16);
    const uint4 more = ptx::load_16(piece + lane_ * 16 + C::kCodeBytes / 2);
    // Where two rows' scales are fewer bytes than can be copied, those of the next rows came with them.
    const int row = lane_ / 4 * C::kScaleBytes % C::kScaleCopy;
    const auto tables = load_tables<C::kGroup>(piece + C::kCodeBytes + lane_ * C::kScaleCopy + row);
    const uint64_t tokens = ptx::descriptor(shared_.tokens() + use_.column * 1024, p_.columns * 1024);
    uint32_t front[8], back[8];
    multiply_half<C::kColumns>(sums, codes, tables, 0, tokens, front);
    multiply_half<C::kColumns>(sums, more, tables, 2, tokens, back);

    fetch(stage_);
    if (++stage_ == C::kAhead) stage_ = 0;
    advance(use_);
  }

  // In its first strip a warp waits for the chunks that it needs; in others it may need those that it did not there.
  __device__ __forceinline__ void wait_for_all_tokens() {
    if (tokens_there_) return;
    for (int first = 0; first < p_.columns; first += kStripChunk) {
      ptx::barrier_wait(shared_.chunk(first / kStripChunk), 0);
    }
    tokens_there_ = true;
  }

  __device__ __forceinline__ int stage_of(int strip) const { return (strip - tile_.first) % C::kRing; }

  // The columns of this warp's quarter.
  __device__ __forceinline__ void leave_strip(int slot, const Sums& sums) {
    const int stage = stage_of(left_);
    wait_for_room();
#pragma unroll
    for (int octet = 0; octet < C::kOctets; ++octet) {
      float4 mine;
#pragma unroll
      for (int slice = 0; slice < (C::kTokens < 8 ? 1 : kStripSlices); ++slice) {
        const float* d = sums + 4 * (octet * kStripSlices + slice);
        if (slice == 0 || slice == slice_) mine = {d[0], d[1], d[2], d[3]};
      }
      if (C::kTokens >= 8 || lane_ % 4 == slice_) *shared_.sums(stage, slot, octet, lane_) = mine;
    }
    arrive();
  }

  // Every warp leaves every strip of the block, in order, those too of which it has nothing.
  __device__ __forceinline__ void leave_strips_before(const Position& at) {
    const int end = at.strip < tile_.end ? at.strip : tile_.end;
    while (left_ < end) {
      wait_for_room();
      arrive();
    }
  }

  __device__ __forceinline__ void wait_for_room() const {
    ptx::barrier_wait(shared_.empty(stage_of(left_)), ~((left_ - tile_.first) / C::kRing) & 1);
  }
  __device__ __forceinline__ void arrive() {
    __syncwarp();
    if (lane_ == 0) ptx::barrier_arrive(shared_.full(stage_of(left_)));
    ++left_;
  }
};

// The last warp: asks for x8, unless the others make it, and finishes strips. T: type of y, bias, xv and u. Thread 4q + c holds, of eight tokens, rows
// q and q + 8 of tokens 2c and 2c + 1: sums[2h + i].
template <class C, typename T, bool kTokensMade>
class StripFinisher {
 public:
  __device__ __forceinline__ StripFinisher(const StripParams& p, StripShared<C> shared)
      : p_(p), shared_(shared), tile_(strip_tile<C>(p)), lane_(threadIdx.x % 32), q_(lane_ / 4), c_(lane_ % 4) {}

  __device__ __forceinline__ void run() {
    if (lane_ == 0 && !kTokensMade) ptx::prefetch_map(&p_.x8);
    ptx::wait_for_kernel_before();
    if constexpr (kTokensMade) {
      ptx::sync_threads(kBarriersReady, C::kThreads);
    } else {
      bring_tokens();
    }
    load_token_side();
    clear_factor();
    for (int strip = tile_.first; strip < tile_.end; ++strip) {
      const int stage = (strip - tile_.first) % C::kRing, round = (strip - tile_.first) / C::kRing;
      copy_factor(strip);
      const RowSide rows = load_row_side(strip);
      ptx::barrier_wait(shared_.full(stage), round & 1);
      add_up(stage);
      __syncwarp();
      if (lane_ == 0) ptx::barrier_arrive(shared_.empty(stage));
      finish(rows);
      store(strip);
    }
  }

 private:
  const StripParams& p_;
  StripShared<C> shared_;
  StripTile tile_;
  int lane_, q_, c_;
  float a_[C::kOctets][2];
  uint32_t xv_[C::kRankSteps][C::kOctets][2];
  float sums_[C::kOctets][4];

  // Scales and bias of a thread's rows q and q + 8.
  struct RowSide {
    float scale[2], bias[2];
  };

  // Chunk by chunk, a tile of eight tokens and a block of K by each lane. What lies beyond x8 arrives as zeros.
  __device__ __forceinline__ void bring_tokens() const {
    static_assert(C::kTokens >= 8 && C::kOctets * kStripSlices * kStripChunk <= 32, "a tile for each lane");
    const int part = lane_ / kStripChunk;  // kStripSlices * octet + slice
    for (int chunk = 0; chunk * kStripChunk < p_.columns; ++chunk) {
      const int first = chunk * kStripChunk, left = p_.columns - first;
      const int columns = left < kStripChunk ? left : kStripChunk;
      const uint32_t barrier = shared_.chunk(chunk);
      if (lane_ == 0) ptx::barrier_expect(barrier, C::kOctets * kStripSlices * columns * 1024);
      __syncwarp();
      const int column = first + lane_ % kStripChunk;
      if (part >= C::kOctets * kStripSlices || column >= p_.columns) continue;
      ptx::copy_box(shared_.tokens() + (part * p_.columns + column) * 1024, &p_.x8,
                    (part % kStripSlices * p_.columns + column) * kBlockColumns,
                    tile_.token + part / kStripSlices * 8, barrier, ptx::kEvictLast);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void load_token_side() {
#pragma unroll
    for (int octet = 0; octet < C::kOctets; ++octet) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = tile_.token + 8 * octet + 2 * c_ + i;
        const float* a = kTokensMade ? shared_.token_scale(token) : p_.a + (p_.per_token ? token : 0);
        a_[octet][i] = token < p_.m ? *a : 0.f;  // not __ldg: see load_eight
      }
#pragma unroll
      for (int step = 0; step < C::kRankSteps; ++step) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const int token = tile_.token + 8 * octet + q_, rank = 16 * step + 8 * b + 2 * c_;
          const T* xv = static_cast<const T*>(p_.xv) + int64_t(token) * p_.rank + rank;
          xv_[step][octet][b] = token < p_.m && rank < p_.rank ? *reinterpret_cast<const uint32_t*>(xv) : 0;
        }
      }
    }
  }

  __device__ __forceinline__ RowSide load_row_side(int strip) const {
    RowSide side{};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = strip * kStripRows + q_ + 8 * h;
      if (row >= p_.n) continue;
      side.scale[h] = __ldg(p_.row_scales + row);
      if (p_.bias != nullptr) side.bias[h] = float(static_cast<const T*>(p_.bias)[row]);
    }
    return side;
  }

  // Ranks that there are not count as zeros.
  __device__ __forceinline__ void clear_factor() const {
    for (int i = p_.rank * C::kFactorPitch / 4 + lane_; i < C::kRanks * C::kFactorPitch / 4; i += 32) {
      *ptx::shared_pointer<uint32_t>(shared_.factor(0) + i * 4) = 0;
    }
  }

  // u of the strip, eight of its rows by each lane.
  __device__ __forceinline__ void copy_factor(int strip) const {
    const int row = strip * kStripRows + lane_ % 2 * 8;
    const T* u = static_cast<const T*>(p_.u) + row;
    for (int rank = lane_ / 2; rank < p_.rank && row < p_.n; rank += 16) {
      ptx::copy_ahead<16>(shared_.factor(rank) + lane_ % 2 * 16, u + int64_t(rank) * p_.n);
    }
    ptx::commit_copies();
  }

  // The warps' sums, in the order of K's columns.
  __device__ __forceinline__ void add_up(int stage) {
    const int slots = kStripSlices * (p_.columns < C::kWarpgroups ? p_.columns : C::kWarpgroups);
#pragma unroll
    for (int octet = 0; octet < C::kOctets; ++octet) {
      float4 sum{0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
      for (int slot = 0; slot < slots; ++slot) {
        const float4 more = *shared_.sums(stage, slot, octet, lane_);
        sum = {sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w};
      }
      sums_[octet][0] = sum.x;
      sums_[octet][1] = sum.y;
      sums_[octet][2] = sum.z;
      sums_[octet][3] = sum.w;
    }
  }

  __device__ __forceinline__ void finish(const RowSide& rows) {
    ptx::wait_copies<0>();
    __syncwarp();
#pragma unroll
    for (int octet = 0; octet < C::kOctets; ++octet) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums_[octet][i] *= a_[octet][i % 2] * rows.scale[i / 2];
    }
    // Four matrices of 8 ranks by 8 rows: lane i says where rank i % 8 of number i / 8 lies.
    const uint32_t corner = shared_.factor(lane_ / 16 * 8 + lane_ % 8) + lane_ / 8 % 2 * 16;
#pragma unroll
    for (int step = 0; step < C::kRankSteps; ++step) {
      if (16 * step >= p_.rank) break;
      uint32_t u[4];
      ptx::load_transposed(corner + step * 16 * C::kFactorPitch, u);
#pragma unroll
      for (int octet = 0; octet < C::kOctets; ++octet) {
        ptx::mma(sums_[octet], u, xv_[step][octet][0], xv_[step][octet][1], T());
      }
    }
    __syncwarp();  // before the next strip's u comes
#pragma unroll
    for (int octet = 0; octet < C::kOctets; ++octet) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums_[octet][i] += rows.bias[i / 2];
    }
  }

  __device__ __forceinline__ void store(int strip) const {
    const Output& output = output_of(p_.outputs, strip / 4);
    const int column = (strip - output.first_block * 4) * kStripRows + q_;
    T* y = static_cast<T*>(output.y) + column;
#pragma unroll
    for (int octet = 0; octet < C::kOctets; ++octet) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = tile_.token + 8 * octet + 2 * c_ + i % 2, row = i / 2 * 8;
        if (token < p_.m && column + row < output.n) y[int64_t(token) * output.n + row] = T(sums_[octet][i]);
      }
    }
  }
};

template <class C>
__device__ __forceinline__ void init_strip_barriers(StripShared<C> shared) {
  for (int i = 0; i < kMaxStripChunks; ++i) ptx::barrier_init(shared.chunk(i), 1);
  for (int stage = 0; stage < C::kRing; ++stage) {
    ptx::barrier_init(shared.full(stage), C::kWarps);
    ptx::barrier_init(shared.empty(stage), 1);
  }
  ptx::fence_barrier_init();
}

// StripParams, or QuantizedStripParams, whose tokens the block quantises itself.
template <class C, class Params>
__device__ __forceinline__ void run_strips(const Params& p, char* raw) {
  constexpr bool kMakesTokens = std::is_same_v<Params, QuantizedStripParams>;
  const StripShared<C> shared{(ptx::shared_address(raw) + 1023u) & ~1023u};
  ptx::release_kernel_after();
  if (threadIdx.x / 32 < C::kWarps) {
    StripWorker<C> worker(p, shared);
    worker.start();
    if constexpr (kMakesTokens) make_tokens(p, shared);
    ptx::sync_threads(kBarriersReady, C::kThreads);
    worker.run(kMakesTokens);
    return;
  }
  if (threadIdx.x % 32 == 0) init_strip_barriers<C>(shared);
  __syncwarp();
  // And on to x8: the others are still asking for weights.
  if constexpr (!kMakesTokens) ptx::arrive_threads(kBarriersReady, C::kThreads);
  if (p.bfloat) {
    StripFinisher<C, __nv_bfloat16, kMakesTokens>(p, shared).run();
  } else {
    StripFinisher<C, __half, kMakesTokens>(p, shared).run();
  }
}

template <class C, class Params>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks) strip_kernel(const __grid_constant__ Params p) {
  extern __shared__ char raw[];
  run_strips<C>(p, raw);
}

}  // namespace zqfp
