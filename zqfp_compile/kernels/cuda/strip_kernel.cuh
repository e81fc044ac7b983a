// The kernels for at most 16 tokens, whose time is that of reading the weight once. They deal out strips of 16 rows and
// all of K: no block leaves anything to another, and x8 stays in shared memory.
//
// A wgmma has 64 rows, 16 of each warp. Here the four warps of a warpgroup have the same 16 rows of four quarters of K,
// and the tokens stand in B four times, once for each quarter: each warp takes its own columns of the result and leaves
// the others. A piece, what a warp multiplies at a time, is 16 rows by 128 columns: a quarter of a packed block. It is
// copied by the warp that uses it, kAhead pieces ahead, so that no warp waits for another.
//
// The warpgroups, two to four, go round the columns of a strip's quarters, one strip after the other. Their sums meet in
// shared memory, where one more warp adds them in the order of K, scales, adds LoRC and bias, and stores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "gated.cuh"
#include "multiply.cuh"
#include "params.h"
#include "ptx.cuh"
#include "strip_product.cuh"
#include "strip_tokens.cuh"

namespace zqfp {

// What a block computes: every so-manieth strip, as blocks are dealt them in turn, and tokens from `token` on. Blocks that
// run together so read what lies together: strip 0 to 3 are the four quarters of the same rows' blocks.
struct StripTile {
  int block, end;  // its number, and that of its strips
  int token;

  __device__ __forceinline__ int place(int strip, const StripParams& p) const { return strip * p.blocks + block; }
};

template <class C>
__device__ __forceinline__ StripTile strip_tile(const StripParams& p) {
  const int token_tile = p.by_blocks.divide(blockIdx.x), block = blockIdx.x - token_tile * p.blocks;
  return {block, p.by_blocks.divide(p.strips - block + p.blocks - 1), token_tile * C::kTokens};
}

template <class C>
class StripWorker {
 public:
  // `asked`: how many pieces are on their way, none or kAhead.
  __device__ __forceinline__ StripWorker(const StripParams& p, StripShared<C> shared, int thread, int asked)
      : p_(p),
        shared_(shared),
        warp_(thread / 32),
        slice_(warp_ % kStripSlices),
        lane_(thread % 32),
        tile_(strip_tile<C>(p)),
        load_{0, warp_ / 4 + asked * C::kWarpgroups},
        use_{0, warp_ / 4},
        filled_(p.k_blocks - slice_ * p.columns),
        pieces_(shared.piece(warp_, 0) + lane_ * 16),
        last_piece_(pieces_ + (C::kAhead - 1) * C::kPieceBytes),
        piece_(pieces_),
        scale_copy_(C::kCodeBytes + lane_ * (C::kScaleCopy - 16)) {
    normalize(use_);
    normalize(load_);
    aim();
  }

  // Asks for the first pieces, for which it needs nobody.
  __device__ __forceinline__ void start() {
    for (int stage = 0; stage < C::kAhead; ++stage) next_piece();
  }

  // `tokens_there`: no chunk of x8 is still on its way.
  __device__ __forceinline__ void run(bool tokens_there) {
    tokens_there_ = tokens_there;
    // What would otherwise be computed again for each piece.
    ptx::keep(filled_);
    ptx::keep(pieces_);
    ptx::keep(last_piece_);
    ptx::keep(scale_copy_);
    leave_strips_before(use_);
    while (use_.strip < tile_.end) {
      const int slot = use_.column * kStripSlices + slice_;
      Sums sums;
#pragma unroll
      for (float& sum : sums) sum = 0.f;
      uint64_t tokens = ptx::descriptor(shared_.tokens() + use_.column * 1024, p_.columns * 1024);
      do {
        step(sums, tokens);
        use_.column += C::kWarpgroups;
        tokens = ptx::descriptor_after(tokens, C::kWarpgroups * 1024);
      } while (use_.column < p_.columns);
      normalize(use_);
      ptx::wgmma_wait<0>();
      ptx::pin(sums);
      wait_for_all_tokens();
      leave_strip(slot, sums);
      leave_strips_before(use_);
    }
  }

 private:
  using Sums = float[C::kColumns / 2];

  // Of a piece: the number of its strip, and its block of K within the quarter.
  struct Position {
    int strip, column;
  };

  const StripParams& p_;
  StripShared<C> shared_;
  int warp_, slice_, lane_;
  StripTile tile_;
  Position load_, use_;
  int left_ = 0;          // the strip that this warp leaves next
  int stage_ = 0;         // where its sums go
  uint32_t parity_ = 1;   // of the wait for room there
  int filled_;                              // columns of the quarter that exist
  uint32_t pieces_, last_piece_, piece_;  // the lane's part of the codes in the ring's first, last and next piece
  uint32_t scale_copy_;                   // from there to its copy of group scales
  bool tokens_there_;
  const uint8_t *codes_, *scales_;

  __device__ __forceinline__ void normalize(Position& at) const {
    for (; at.column >= p_.columns; ++at.strip) at.column -= p_.columns;
  }

  // Where the lane's part of the piece at load_ lies.
  __device__ __forceinline__ void aim() {
    const int strip = tile_.place(load_.strip, p_), quarter = strip % 4;
    const int64_t block = int64_t(strip / 4) * p_.k_blocks + (slice_ * p_.columns + load_.column);
    const int rows = (quarter * 8 + lane_ / 4) * C::kScaleBytes / C::kScaleCopy * C::kScaleCopy;
    codes_ = p_.codes + block * kBlockBytes + (quarter * (C::kCodeBytes / 2) + lane_ * 16);
    scales_ = p_.group_scales + block * scale_block_bytes(C::kGroup) + rows;
  }

  // Asks for what will take the piece's place, and goes on to the next. Each lane copies what it will use itself. The last
  // quarter of K may have fewer columns: zeros.
  __device__ __forceinline__ void next_piece() {
    if (load_.strip < tile_.end) {
      const int bytes = load_.column < filled_ ? 16 : 0;
      ptx::copy_ahead_or_clear(piece_, codes_, bytes);
      ptx::copy_ahead_or_clear<C::kCodeBytes / 2, kBlockBytes / 2>(piece_, codes_, bytes);
      if (bytes != 0) ptx::copy_ahead<C::kScaleCopy>(piece_ + scale_copy_, scales_);
      load_.column += C::kWarpgroups;
      codes_ += C::kWarpgroups * kBlockBytes;
      scales_ += C::kWarpgroups * scale_block_bytes(C::kGroup);
      if (load_.column >= p_.columns) {
        normalize(load_);
        aim();
      }
    }
    ptx::commit_copies();
    piece_ = piece_ == last_piece_ ? pieces_ : piece_ + C::kPieceBytes;
  }

  __device__ __forceinline__ void step(Sums& sums, uint64_t tokens) {
    if (!tokens_there_) ptx::barrier_wait(shared_.chunk(use_.column / kStripChunk), 0);
    ptx::wait_copies<C::kAhead - 1>();
    const uint4 codes = ptx::load_16(piece_);
    const uint4 more = ptx::load_16(piece_ + C::kCodeBytes / 2);
    // Where two rows' scales are fewer bytes than can be copied, those of the next rows came with them.
    const int row = lane_ / 4 * C::kScaleBytes % C::kScaleCopy;
    const auto tables = load_tables<C::kGroup>(piece_ + scale_copy_ + row);
    uint32_t front[8], back[8];
    multiply_half<C::kColumns>(sums, codes, tables, 0, tokens, front);
    multiply_half<C::kColumns>(sums, more, tables, 2, tokens, back);
    next_piece();
  }

  // In its first strip a warp waits for the chunks that it needs; in others it may need those that it did not there.
  __device__ __forceinline__ void wait_for_all_tokens() {
    if (tokens_there_) return;
    for (int first = 0; first < p_.columns; first += kStripChunk) {
      ptx::barrier_wait(shared_.chunk(first / kStripChunk), 0);
    }
    tokens_there_ = true;
  }

  // The columns of this warp's quarter.
  __device__ __forceinline__ void leave_strip(int slot, const Sums& sums) {
    wait_for_room();
#pragma unroll
    for (int octet = 0; octet < C::kOctets; ++octet) {
      float4 mine;
#pragma unroll
      for (int slice = 0; slice < (C::kTokens < 8 ? 1 : kStripSlices); ++slice) {
        const float* d = sums + 4 * (octet * kStripSlices + slice);
        if (slice == 0 || slice == slice_) mine = {d[0], d[1], d[2], d[3]};
      }
      if (C::kTokens >= 8 || lane_ % 4 == slice_) *shared_.sums(stage_, slot, octet, lane_) = mine;
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

  __device__ __forceinline__ void wait_for_room() const { ptx::barrier_wait(shared_.empty(stage_), parity_); }
  __device__ __forceinline__ void arrive() {
    ptx::barrier_arrive(shared_.full(stage_));
    ++left_;
    if (++stage_ < C::kRing) return;
    stage_ = 0;
    parity_ ^= 1;
  }
};

// The last warp: asks for x8, unless the others make it, and finishes strips. T: type of y, bias, xv and u. Thread 4q + c
// holds, of eight tokens, rows q and q + 8 of tokens 2c and 2c + 1: sums[2h + i].
template <class C, typename T, class Params>
class StripFinisher {
 public:
  __device__ __forceinline__ StripFinisher(const Params& p, StripShared<C> shared, int lane)
      : p_(p), shared_(shared), tile_(strip_tile<C>(p)), lane_(lane), q_(lane_ / 4), c_(lane_ % 4) {}

  // Asks for what it needs for the first strips, weights all.
  __device__ __forceinline__ void start() const {
    clear_ranks();
#pragma unroll 1
    for (int strip = 0; strip < C::kSides - 1; ++strip) copy_side(strip);
  }

  // `bring` is called for xv when all is on its way that the first strip needs besides.
  template <typename Bring>
  __device__ __forceinline__ void run(Bring bring) {
    load_scales();
    for (int strip = 0; strip < tile_.end; ++strip) {
      const int stage = strip % C::kRing, round = strip / C::kRing;
      copy_side(strip + C::kSides - 1);
      if (strip == 0) bring(xv_);
      ptx::barrier_wait(shared_.full(stage), round & 1);
      add_up(stage);
      ptx::barrier_arrive(shared_.empty(stage));
      finish(side(strip));
      store(tile_.place(strip, p_));
    }
  }

  // Chunk by chunk, a tile of eight tokens and a block of K by each lane.
  __device__ __forceinline__ void bring_tokens() const {
    static_assert(C::kTokens >= 8 && C::kOctets * kStripSlices * kStripChunk <= 32, "a tile for each lane");
    const int part = lane_ / kStripChunk;  // kStripSlices * octet + slice
    for (int chunk = 0; chunk * kStripChunk < p_.columns; ++chunk) {
      const int first = chunk * kStripChunk, left = p_.columns - first;
      const int columns = left < kStripChunk ? left : kStripChunk;
      const uint32_t barrier = shared_.chunk(chunk);
      if (lane_ == 0) ptx::barrier_expect(barrier, C::kOctets * kStripSlices * columns * p_.box_tokens * kBlockColumns);
      __syncwarp();
      const int column = first + lane_ % kStripChunk;
      if (part >= C::kOctets * kStripSlices || column >= p_.columns) continue;
      ptx::copy_box(shared_.tokens() + (part * p_.columns + column) * 1024, &p_.x8,
                    (part % kStripSlices * p_.columns + column) * kBlockColumns,
                    tile_.token + part / kStripSlices * 8, barrier, ptx::kEvictLast);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void load_product() {
#pragma unroll
    for (int octet = 0; octet < C::kOctets; ++octet) {
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

 private:
  static constexpr bool kTokensMade = std::is_same_v<Params, QuantizedStripParams>;

  const Params& p_;
  StripShared<C> shared_;
  StripTile tile_;
  int lane_, q_, c_;
  float a_[C::kOctets][2];
  uint32_t xv_[C::kRankSteps][C::kOctets][2];
  float sums_[C::kOctets][4];

  __device__ __forceinline__ void load_scales() {
#pragma unroll
    for (int octet = 0; octet < C::kOctets; ++octet) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = tile_.token + 8 * octet + 2 * c_ + i;
        const float* a = kTokensMade ? shared_.token_scale(token) : p_.a + (p_.per_token ? token : 0);
        a_[octet][i] = token < p_.m ? *a : 0.f;  // not __ldg: see load_eight
      }
    }
  }

  // Behind x8: token_bytes, from columns, as k_blocks would take registers that there are not.
  __device__ __forceinline__ uint32_t side(int strip) const {
    return shared_.tokens() + p_.columns * (C::kTokens * kStripSlices * kBlockColumns) +
           strip % C::kSides * side_bytes(p_.rank);
  }

  // A step of mma takes 16 ranks: the ones that there are not count as zeros.
  __device__ __forceinline__ void clear_ranks() const {
    const int ranks = p_.rank % 16;  // 0 or 8
    for (int i = lane_; ranks != 0 && i < C::kSides * 16; i += 32) {
      const uint32_t behind = side(i / 16) + kSideFactorOffset + p_.rank * kSideRankBytes;
      *ptx::shared_pointer<uint4>(behind + i % 16 * 16) = {};
    }
  }

  __device__ __forceinline__ void copy_side(int strip) const {
    if (strip < tile_.end) {
      const int row = tile_.place(strip, p_) * kStripRows;
      const uint32_t to = side(strip);
      copy_rows<4, 0, 0>(to, row, p_.row_scales);
      if (p_.bias != nullptr) copy_rows<2, kSideBiasOffset, 4>(to, row, static_cast<const T*>(p_.bias));
      copy_factor(to + kSideFactorOffset, row + lane_ % 2 * 8);
    }
    ptx::commit_copies();
  }

  // Eight of u's rows by each lane.
  __device__ __forceinline__ void copy_factor(uint32_t to, int row) const {
    const T* u = static_cast<const T*>(p_.u) + row;
    for (int rank = lane_ / 2; rank < p_.rank && row < p_.n; rank += 16) {
      ptx::copy_ahead<16>(to + rank * kSideRankBytes + lane_ % 2 * 16, u + int64_t(rank) * p_.n);
    }
  }

  // 16 bytes by each of kLanes lanes from kFirst on.
  template <int kLanes, int kOffset, int kFirst, typename Number>
  __device__ __forceinline__ void copy_rows(uint32_t to, int row, const Number* numbers) const {
    const int lane = lane_ - kFirst;
    row += kStripRows / kLanes * lane;
    if (lane >= 0 && lane < kLanes && row < p_.n) ptx::copy_ahead<16>(to + kOffset + lane * 16, numbers + row);
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

  __device__ __forceinline__ void finish(uint32_t side) {
    ptx::wait_copies<C::kSides - 1>();
    __syncwarp();
    const float* scales = ptx::shared_pointer<float>(side) + q_;
    scale(scales[0], scales[8]);
    // Four matrices of 8 ranks by 8 rows: lane i says where rank i % 8 of number i / 8 lies.
    const uint32_t corner =
        side + kSideFactorOffset + (lane_ / 16 * 8 + lane_ % 8) * kSideRankBytes + lane_ / 8 % 2 * 16;
#pragma unroll
    for (int step = 0; step < C::kRankSteps; ++step) {
      if (16 * step >= p_.rank) break;
      uint32_t u[4];
      ptx::load_transposed(corner + step * 16 * kSideRankBytes, u);
#pragma unroll
      for (int octet = 0; octet < C::kOctets; ++octet) {
        ptx::mma(sums_[octet], u, xv_[step][octet][0], xv_[step][octet][1], T());
      }
    }
    const T* bias = ptx::shared_pointer<T>(side + kSideBiasOffset) + q_;
    if (p_.bias != nullptr) add(float(bias[0]), float(bias[8]));
    __syncwarp();  // before another strip's side comes
  }

  // Of rows q and q + 8.
  __device__ __forceinline__ void scale(float first, float second) {
#pragma unroll
    for (int octet = 0; octet < C::kOctets; ++octet) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums_[octet][i] *= a_[octet][i % 2] * (i < 2 ? first : second);
    }
  }
  __device__ __forceinline__ void add(float first, float second) {
#pragma unroll
    for (int octet = 0; octet < C::kOctets; ++octet) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums_[octet][i] += i < 2 ? first : second;
    }
  }

  __device__ __forceinline__ void store(int strip) const {
    if (p_.gated) return store_gated(strip);
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

  __device__ __forceinline__ void store_gated(int strip) const {
    const int column = strip * (kStripRows / 2) + q_, n = p_.outputs[0].n;
    uint16_t* y = static_cast<uint16_t*>(p_.outputs[0].y) + column;
#pragma unroll
    for (int octet = 0; octet < C::kOctets; ++octet) {
      const float* d = sums_[octet];
      const uint32_t pair = gate_pair<T>({d[0], d[1]}, {d[2], d[3]});
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = tile_.token + 8 * octet + 2 * c_ + i;
        if (token < p_.m && column < n) y[int64_t(token) * n] = uint16_t(pair >> 16 * i);
      }
    }
  }
};

template <class C, typename T>
__device__ __forceinline__ void finish_strips(const StripParams& p, StripShared<C> shared) {
  const int lane = threadIdx.x % 32;
  StripFinisher<C, T, StripParams> finisher(p, shared, lane);
  if (lane == 0) ptx::prefetch_map(&p.x8);
  finisher.start();
  ptx::wait_for_kernel_before();
  finisher.bring_tokens();
  finisher.load_product();
  finisher.run([](auto&) {});
}

template <class C, typename T>
__device__ __forceinline__ void finish_strips(const QuantizedStripParams& p, StripShared<C> shared) {
  StripProduct<C, T> product(p, shared);
  const bool has_lorc = p.rank > 0;
  if (has_lorc) product.prefetch();
  StripFinisher<C, T, QuantizedStripParams>(p, shared, threadIdx.x % 32).start();
  ptx::wait_for_kernel_before();
  if (has_lorc) product.make_shares();
  ptx::barrier_wait(shared.tokens_made(), 0);
  int thread = threadIdx.x;
  ptx::keep(thread);  // what the finisher computes of it takes no registers meanwhile
  StripFinisher<C, T, QuantizedStripParams>(p, shared, thread % 32).run([&](auto& xv) {
    if (has_lorc) product.collect(xv);
  });
  if (has_lorc) product.clear();
}

template <class C>
__device__ __forceinline__ void init_strip_barriers(StripShared<C> shared) {
  for (int i = 0; i < kMaxStripChunks; ++i) ptx::barrier_init(shared.chunk(i), 1);
  for (int stage = 0; stage < C::kRing; ++stage) {
    ptx::barrier_init(shared.full(stage), C::kWarps * 32);
    ptx::barrier_init(shared.empty(stage), 32);
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
    if constexpr (kMakesTokens) {
      StripWorker<C>(p, shared, threadIdx.x, 0).start();
      make_tokens(p, shared);
      int thread = threadIdx.x;
      ptx::keep(thread);  // a worker that is made again takes no registers meanwhile
      StripWorker<C> worker(p, shared, thread, C::kAhead);
      ptx::sync_threads(kBarriersReady, C::kThreads);
      if (thread == 0) ptx::barrier_arrive(shared.tokens_made());  // who has written the tokens' numbers
      worker.run(true);
    } else {
      StripWorker<C> worker(p, shared, threadIdx.x, 0);
      worker.start();
      ptx::sync_threads(kBarriersReady, C::kThreads);
      worker.run(false);
    }
    return;
  }
  if (threadIdx.x % 32 == 0) init_strip_barriers<C>(shared);
  __syncwarp();
  // And on to x8, or x @ V: the others are still asking for weights.
  ptx::arrive_threads(kBarriersReady, C::kThreads);
  if (p.bfloat) {
    finish_strips<C, __nv_bfloat16>(p, shared);
  } else {
    finish_strips<C, __half>(p, shared);
  }
}

template <class C, class Params>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks) strip_kernel(const __grid_constant__ Params p) {
  extern __shared__ char raw[];
  run_strips<C>(p, raw);
}

}  // namespace zqfp
