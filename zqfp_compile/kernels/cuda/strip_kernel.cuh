// The kernel for at most 16 tokens, whose time is that of reading the weight once. Warps stream it from memory to their
// registers, decode it and multiply it there: nothing waits for a tile to be complete, and nothing is exchanged between
// blocks, whose work is cut by strips of 16 rows.
//
// A piece is 16 rows by 128 columns: a quarter of a packed block. The pieces of a block's strips, each strip along K, go
// round its warps; each warp has the next kAhead of its own on their way. The warps' sums of a strip meet in a ring in
// shared memory, where one more warp adds them in the order of K, scales, adds LoRC and bias, and stores.
//
// On Hopper mma.sync of E4M3 is unpacked to float16 anyway, so that is done here: every product is exact, and sums are
// float32 throughout.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "params.h"
#include "ptx.cuh"
#include "strips.h"

namespace zqfp {

constexpr int kMaxRankSteps = 4;  // of 16 ranks

// kWarps that stream: with the one that finishes 16, as registers are dealt out by four warps. kAhead: pieces that each
// has asked for.
template <int Tokens, int Group, int Warps = 15, int Ahead = 5>
struct StripConfig {
  static constexpr int kTokens = Tokens, kGroup = Group, kWarps = Warps, kAhead = Ahead;
  static constexpr int kThreads = (Warps + 1) * 32;
  static constexpr int kOctets = Tokens / 8;
  static constexpr int kRing = Tokens == 8 ? 4 : 2;

  // Shared memory: barriers, the ring of sums, and x8, a row per token (strip_pitch).
  static constexpr int kBarrierBytes = (kMaxChunks + 2 * kRing) * 8;
  static constexpr int kSumOffset = 256;
  static_assert(kBarrierBytes <= kSumOffset && Warps <= kChunkBlocks);
  static constexpr int kStripBytes = Warps * kOctets * 32 * 16;
  static constexpr int kTokenOffset = kSumOffset + kRing * kStripBytes;
};

template <class C>
struct StripShared {
  uint32_t base;

  __device__ __forceinline__ uint32_t chunk(int index) const { return base + index * 8; }
  __device__ __forceinline__ uint32_t full(int stage) const { return base + (kMaxChunks + stage) * 8; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(C::kRing + stage); }
  // A warp's sums of eight tokens: 16 bytes of each lane.
  __device__ __forceinline__ float4* sums(int stage, int slot, int octet) const {
    return ptx::shared_pointer<float4>(base + C::kSumOffset + stage * C::kStripBytes) +
           (slot * C::kOctets + octet) * 32;
  }
  __device__ __forceinline__ uint32_t tokens() const { return base + C::kTokenOffset; }
};

// What a block computes: strips, the same number as any other block or one more, and tokens.
struct StripTile {
  int first, end;
  int token, tokens;
};

template <class C>
__device__ __forceinline__ StripTile strip_tile(const StripParams& p) {
  const int token_tile = p.by_blocks.divide(blockIdx.x), block = blockIdx.x - token_tile * p.blocks;
  const int token = token_tile * C::kTokens, left = p.m - token;
  return {p.by_blocks.divide(p.strips * block), p.by_blocks.divide(p.strips * (block + 1)), token,
          left < C::kTokens ? left : C::kTokens};
}

// Thread 4q + c holds, of eight tokens, rows q and q + 8 of tokens 2c and 2c + 1: sums[2h + i].
using StripSums = float[4];

template <class C>
class StripWorker {
 public:
  __device__ __forceinline__ StripWorker(const StripParams& p, StripShared<C> shared)
      : p_(p),
        shared_(shared),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        tile_(strip_tile<C>(p)),
        load_{tile_.first, warp_},
        use_(load_),
        left_(tile_.first) {
    normalize(load_);
    normalize(use_);
  }

  // Asks for the first pieces, for which it needs nobody.
  __device__ __forceinline__ void start() {
#pragma unroll
    for (int i = 0; i < C::kAhead; ++i) fetch(pieces_[i]);
  }

  __device__ __forceinline__ void run() {
    const int q = lane_ / 4, c = lane_ % 4;
#pragma unroll
    for (int octet = 0; octet < C::kOctets; ++octet) {
      // Of tokens that do not exist anything will do: their sums go nowhere.
      const int token = 8 * octet + q < tile_.tokens ? 8 * octet + q : tile_.tokens - 1;
      tokens_[octet] = shared_.tokens() + token * strip_pitch(p_.k_blocks) + 4 * c;
    }
    clear();
    slot_ = use_.k_block;
    leave_strips_before(use_, false);
    while (use_.strip < tile_.end) {
#pragma unroll
      for (int i = 0; i < C::kAhead; ++i) {
        if (use_.strip < tile_.end) step(pieces_[i]);
      }
    }
  }

 private:
  static constexpr int kScaleWords = ThreadTables<C::kGroup>::kWords;

  // What a thread has of a piece: codes of two steps of 32 columns each, and group scales of its two rows.
  struct Piece {
    uint4 codes[2];
    uint32_t scales[kScaleWords];
  };
  struct Position {
    int strip, k_block;
  };

  const StripParams& p_;
  StripShared<C> shared_;
  int warp_, lane_;
  StripTile tile_;
  Position load_, use_;
  int left_;  // the strip that this warp leaves next
  int slot_;  // its first block of K in the strip: where its sums go
  Piece pieces_[C::kAhead];
  uint32_t tokens_[C::kOctets];
  StripSums sums_[C::kOctets];

  __device__ __forceinline__ void normalize(Position& at) const {
    for (; at.k_block >= p_.k_blocks; ++at.strip) at.k_block -= p_.k_blocks;
  }
  __device__ __forceinline__ void advance(Position& at) const {
    at.k_block += C::kWarps;
    normalize(at);
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& sums : sums_) {
      for (float& sum : sums) sum = 0.f;
    }
  }

  __device__ __forceinline__ void fetch(Piece& piece) {
    if (load_.strip >= tile_.end) return;
    constexpr int kScaleBytes = scale_block_bytes(C::kGroup), kThreadBytes = kScaleBytes / 32;
    const int64_t block = int64_t(load_.strip / 4) * p_.k_blocks + load_.k_block;
    const int part = load_.strip % 4;
    const uint8_t* codes = p_.codes + block * kBlockBytes + part * 512 + lane_ * 16;
    piece.codes[0] = ptx::stream_16(codes);
    piece.codes[1] = ptx::stream_16(codes + kBlockBytes / 2);
    const uint8_t* scales = p_.group_scales + block * kScaleBytes + (part * 8 + lane_ / 4) * kThreadBytes;
    if constexpr (kThreadBytes == 8) {
      const uint2 words = ptx::stream_8(scales);
      piece.scales[0] = words.x;
      piece.scales[1] = words.y;
    } else if constexpr (kThreadBytes == 4) {
      piece.scales[0] = ptx::stream_4(scales);
    } else {
      piece.scales[0] = ptx::stream_2(scales);
    }
    advance(load_);
  }

  __device__ __forceinline__ void step(Piece& piece) {
    if (use_.strip == tile_.first || p_.k_blocks < C::kWarps) {
      ptx::barrier_wait(shared_.chunk(use_.k_block / kChunkBlocks), 0);
    }
    multiply(piece, use_.k_block * kBlockColumns);
    fetch(piece);
    const int strip = use_.strip;
    advance(use_);
    if (use_.strip == strip) return;
    leave_strips_before(use_, true);
    slot_ = use_.k_block;
  }

  __device__ __forceinline__ void multiply(const Piece& piece, int column) {
    const ThreadTables<C::kGroup> tables(piece.scales);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint4& codes = piece.codes[step / 2];
      uint32_t weights[4], low[4], high[4];
      step % 2 == 0 ? decode_step<C::kGroup>(codes.x, codes.y, tables, step, weights)
                    : decode_step<C::kGroup>(codes.z, codes.w, tables, step, weights);
#pragma unroll
      for (int i = 0; i < 4; ++i) ptx::unpack_e4m3(weights[i], low[i], high[i]);
#pragma unroll
      for (int octet = 0; octet < C::kOctets; ++octet) {
        uint32_t first[2], second[2];
        const uint32_t tokens = tokens_[octet] + column + 32 * step;
        ptx::unpack_e4m3(ptx::load_4(tokens), first[0], second[0]);
        ptx::unpack_e4m3(ptx::load_4(tokens + 16), first[1], second[1]);
        ptx::mma(sums_[octet], low, first[0], first[1], __half());
        ptx::mma(sums_[octet], high, second[0], second[1], __half());
      }
    }
  }

  // Every warp leaves every strip of the block, in order; the first of these with what it has added up.
  __device__ __forceinline__ void leave_strips_before(const Position& at, bool with_sums) {
    const int end = at.strip < tile_.end ? at.strip : tile_.end;
    for (; left_ < end; ++left_, with_sums = false) {
      const int stage = (left_ - tile_.first) % C::kRing, round = (left_ - tile_.first) / C::kRing;
      ptx::barrier_wait(shared_.empty(stage), ~round & 1);
      if (with_sums) {
#pragma unroll
        for (int octet = 0; octet < C::kOctets; ++octet) {
          const StripSums& sums = sums_[octet];
          shared_.sums(stage, slot_, octet)[lane_] = {sums[0], sums[1], sums[2], sums[3]};
        }
        clear();
      }
      __syncwarp();
      if (lane_ == 0) ptx::barrier_arrive(shared_.full(stage));
    }
  }
};

// The last warp: brings x8, and finishes strips. T: type of y, bias, xv and u.
template <class C, typename T>
class StripFinisher {
 public:
  __device__ __forceinline__ StripFinisher(const StripParams& p, StripShared<C> shared)
      : p_(p), shared_(shared), tile_(strip_tile<C>(p)), lane_(threadIdx.x % 32), q_(lane_ / 4), c_(lane_ % 4) {}

  __device__ __forceinline__ void run() {
    clear_behind_tokens();
    ptx::wait_for_kernel_before();
    bring_tokens();
    load_token_side();
    for (int strip = tile_.first; strip < tile_.end; ++strip) {
      const int stage = (strip - tile_.first) % C::kRing, round = (strip - tile_.first) / C::kRing;
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
  uint32_t xv_[kMaxRankSteps][C::kOctets][2];
  StripSums sums_[C::kOctets];

  // Scales, bias and u of a thread's rows q and q + 8.
  struct RowSide {
    float scale[2], bias[2];
    uint32_t u[kMaxRankSteps][4];
  };

  // The last block of K may reach beyond x8: its codes are 0 there, but 0 times what lies about could be NaN.
  __device__ __forceinline__ void clear_behind_tokens() const {
    const int behind = (p_.k_blocks * kBlockColumns - p_.k) / 4;
    for (int i = lane_; i < behind * tile_.tokens; i += 32) {
      *ptx::shared_pointer<uint32_t>(shared_.tokens() + i / behind * strip_pitch(p_.k_blocks) + p_.k + i % behind * 4) = 0;
    }
    __syncwarp();
  }

  // Each lane a token.
  __device__ __forceinline__ void bring_tokens() const {
    constexpr int kChunk = kChunkBlocks * kBlockColumns;
    for (int begin = 0; begin < p_.k; begin += kChunk) {
      const int bytes = p_.k - begin < kChunk ? p_.k - begin : kChunk;
      const uint32_t barrier = shared_.chunk(begin / kChunk);
      if (lane_ == 0) ptx::barrier_expect(barrier, tile_.tokens * bytes);
      __syncwarp();
      if (lane_ < tile_.tokens) {
        ptx::copy_bytes(shared_.tokens() + lane_ * strip_pitch(p_.k_blocks) + begin,
                        p_.x8 + int64_t(tile_.token + lane_) * p_.k + begin, bytes, barrier, ptx::kEvictLast);
      }
    }
  }

  __device__ __forceinline__ void load_token_side() {
#pragma unroll
    for (int octet = 0; octet < C::kOctets; ++octet) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = tile_.token + 8 * octet + 2 * c_ + i;
        a_[octet][i] = token < p_.m ? p_.a[p_.per_token ? token : 0] : 0.f;  // not __ldg: see load_eight
      }
#pragma unroll
      for (int step = 0; step < kMaxRankSteps; ++step) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const int token = tile_.token + 8 * octet + q_, rank = 16 * step + 8 * b + 2 * c_;
          const bool inside = token < p_.m && rank < p_.rank;
          xv_[step][octet][b] =
              inside ? *reinterpret_cast<const uint32_t*>(static_cast<const T*>(p_.xv) + int64_t(token) * p_.rank + rank) : 0;
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
      const uint16_t* u = static_cast<const uint16_t*>(p_.u) + row;
#pragma unroll
      for (int step = 0; step < kMaxRankSteps; ++step) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const int rank = 16 * step + 8 * b + 2 * c_;
          if (rank >= p_.rank) continue;
          side.u[step][h + 2 * b] =
              __ldg(u + int64_t(rank) * p_.n) | uint32_t(__ldg(u + int64_t(rank + 1) * p_.n)) << 16;
        }
      }
    }
    return side;
  }

  // The warps' sums, in the order of K.
  __device__ __forceinline__ void add_up(int stage) {
    const int slots = p_.k_blocks < C::kWarps ? p_.k_blocks : C::kWarps;
#pragma unroll
    for (int octet = 0; octet < C::kOctets; ++octet) {
      float4 sum{0.f, 0.f, 0.f, 0.f};
#pragma unroll 5
      for (int slot = 0; slot < slots; ++slot) {
        const float4 more = shared_.sums(stage, slot, octet)[lane_];
        sum = {sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w};
      }
      sums_[octet][0] = sum.x;
      sums_[octet][1] = sum.y;
      sums_[octet][2] = sum.z;
      sums_[octet][3] = sum.w;
    }
  }

  __device__ __forceinline__ void finish(const RowSide& rows) {
#pragma unroll
    for (int octet = 0; octet < C::kOctets; ++octet) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums_[octet][i] *= a_[octet][i % 2] * rows.scale[i / 2];
#pragma unroll
      for (int step = 0; step < kMaxRankSteps; ++step) {
        if (16 * step >= p_.rank) break;
        ptx::mma(sums_[octet], rows.u[step], xv_[step][octet][0], xv_[step][octet][1], T());
      }
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
  for (int i = 0; i < kMaxChunks; ++i) ptx::barrier_init(shared.chunk(i), 1);
  for (int stage = 0; stage < C::kRing; ++stage) {
    ptx::barrier_init(shared.full(stage), C::kWarps);
    ptx::barrier_init(shared.empty(stage), 1);
  }
  ptx::fence_barrier_init();
}

template <class C>
__device__ __forceinline__ void run_strips(const StripParams& p, char* raw) {
  const StripShared<C> shared{ptx::shared_address(raw)};
  ptx::release_kernel_after();
  if (threadIdx.x / 32 < C::kWarps) {
    StripWorker<C> worker(p, shared);
    worker.start();
    __syncthreads();
    worker.run();
    return;
  }
  if (threadIdx.x % 32 == 0) init_strip_barriers<C>(shared);
  __syncthreads();
  if (p.bfloat) {
    StripFinisher<C, __nv_bfloat16>(p, shared).run();
  } else {
    StripFinisher<C, __half>(p, shared).run();
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) strip_kernel(const __grid_constant__ StripParams p) {
  extern __shared__ __align__(16) char raw[];
  run_strips<C>(p, raw);
}

}  // namespace zqfp
