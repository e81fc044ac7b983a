// x @ V of tokens that strips' blocks make themselves (strip_tokens.cuh), by the warp that finishes strips, which has
// nothing to do until the first one's sums are there. For each block to read all of V would take longer than the weights do.
// So a share is what 128 columns add to 16 ranks of x @ V; blocks draw shares, leave their sums in the workspace, and all
// read them there. What the first share takes of V and x is loaded while the others make x8.
//
// Blocks may come in any order, and late, where other kernels have processors: whoever has drawn a share is running, and
// waits for no block before it has left the sums. So all shares that were drawn get made, and a block that waits for them
// has found none that was not drawn. Who makes a share changes none of its bits.
#pragma once

#include "params.h"
#include "quantize_source.cuh"
#include "rows_of_v.cuh"
#include "strip_config.cuh"
#include "zqfp.h"

namespace zqfp {

// What one word counts: shares drawn, one too many by each block; shares made; blocks that do not look at it any more. As
// all is in one word, who adds to it has seen it before the last block clears it.
constexpr uint32_t kDrawn = 1, kMade = 1u << 12, kLeft = 1u << 22;
constexpr int kMaxShares = kLeft / kMade - 1;

// One lane's part. T: type of x, V and xv.
template <class C, typename T>
class StripProduct {
 public:
  static_assert(C::kTokens == 2, "eights of 128 columns: a lane for each");

  __device__ __forceinline__ StripProduct(const QuantizedStripParams& p, StripShared<C> shared)
      : p_(p), shared_(shared), shares_(p.k_blocks * ((p.rank + kShareRanks - 1) / kShareRanks)) {}

  // Asks for V, a weight: before the kernel before has ended.
  __device__ __forceinline__ void prefetch() const {
    constexpr int kLine = 128;
    const int row_bytes = p_.rank * int(sizeof(T));
    for (int block = blockIdx.x; block < p_.k_blocks; block += p_.blocks) {
      const int first = block * kBlockColumns, left = p_.from.k - first;
      const int bytes = (left < kBlockColumns ? left : kBlockColumns) * row_bytes;
      const char* rows = static_cast<const char*>(p_.from.v) + int64_t(first) * row_bytes;
      for (int at = lane() * kLine; at < bytes; at += 32 * kLine) ptx::prefetch(rows + at);
    }
  }

  // Draws shares until none is left, and makes them as soon as tokens are made.
  __device__ __forceinline__ void make_shares() {
    Share share;
    counts_ = ptx::add_by_one(p_.shares, kDrawn);
#pragma unroll 1
    while (load_drawn(share)) {
      ptx::barrier_wait(shared_.tokens_made(), 0);
      make(share);
      __syncwarp();
      counts_ = 0;
      if (lane() == 0) counts_ = ptx::add_release(p_.shares, kMade + kDrawn);
    }
  }

  // The sum of all shares as operand B of mma: thread 4q + c gets ranks 16 * step + 8b + 2c + {0, 1} of token q.
  __device__ __forceinline__ void collect(uint32_t (&xv)[C::kRankSteps][C::kOctets][2]) {
    wait_for_shares();
    const float4 sum = add_shares();
    const unsigned words[2] = {round_pair({sum.x, sum.y}, T()), round_pair({sum.z, sum.w}, T())};
    const int lane = this->lane(), token = lane / 4, c = lane % 4;
#pragma unroll
    for (int step = 0; step < C::kRankSteps; ++step) {
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const int rank = 16 * step + 8 * b + 2 * c, four = (token * p_.rank + rank) / 4;
        const unsigned low = __shfl_sync(~0u, words[0], four), high = __shfl_sync(~0u, words[1], four);
        xv[step][0][b] = token >= p_.m || rank >= p_.rank ? 0 : c % 2 == 0 ? low : high;
      }
    }
    counts_ = ptx::add_by_one(p_.shares, kLeft);
  }

  // The last block leaves the word as it was found. Not at once: collect() does not wait for the old counts.
  __device__ __forceinline__ void clear() const {
    if (counts_ / kLeft == uint32_t(p_.blocks) - 1) ptx::store_relaxed(p_.shares, 0);
  }

 private:
  const QuantizedStripParams& p_;
  StripShared<C> shared_;
  const int shares_;
  uint32_t counts_;  // before the block added to them, in one lane; 0 in others

  // Computed each time: nothing takes registers meanwhile, that is computed of it either.
  __device__ __forceinline__ static int lane() {
    int thread = threadIdx.x;
    ptx::keep(thread);
    return thread % 32;
  }

  static constexpr int kShareRanks = 16;
  static constexpr int kChunk = 32, kChunks = kBlockColumns / kChunk;

  // A lane's part: two ranks of V, and eight columns of what h is computed of.
  struct Share {
    int block, rank;  // of K; the first of the lane's
    RowsOfV<1> rows[kChunks];
    Eight<T> x, other, gamma;
  };

  // False: no share is left.
  __device__ __forceinline__ bool load_drawn(Share& share) const {
    int drawn = int(__reduce_max_sync(~0u, counts_) % kMade);
    if (drawn >= shares_) return false;
    const int lane = this->lane(), q = lane / 4, c = lane % 4;
    share.rank = 2 * q;
    for (; drawn >= p_.k_blocks; drawn -= p_.k_blocks) share.rank += kShareRanks;
    share.block = drawn;
    load_rows(share, share.block * kBlockColumns + 8 * c);
    load_inputs(share, lane / 16, share.block * kBlockColumns + lane % 16 * 8);
    return true;
  }

  __device__ __forceinline__ void load_rows(Share& share, int column) const {
    int pitch = p_.rank;
    ptx::keep(pitch);  // its multiples would be kept in registers
    const T* v = static_cast<const T*>(p_.from.v) + int64_t(column) * pitch + share.rank;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const bool inside = column + kChunk * chunk < p_.from.k && share.rank < p_.rank;
      share.rows[chunk].load(v + kChunk * chunk * pitch, pitch, inside);
    }
  }

  // Zeros where there are no tokens and no columns.
  __device__ __forceinline__ void load_inputs(Share& share, int token, int column) const {
    const bool inside = token < p_.m && column < p_.from.k, norm = p_.source == ZQFP_RMS_NORM;
    const bool has_other = p_.source != ZQFP_PLAIN && p_.from.other != nullptr;
    const int64_t place = int64_t(token) * p_.from.k + column;
    share.x = load_eight(static_cast<const T*>(p_.from.x) + place, inside);
    share.other = load_eight(static_cast<const T*>(p_.from.other) + place, inside && has_other,
                             norm ? Norm<T>::kNothing : 0);
    share.gamma = load_eight(static_cast<const T*>(p_.from.gamma) + column, inside && norm);
  }

  __device__ __forceinline__ Eight<T> compute_eight(const Share& share, int token) const {
    switch (p_.source) {
      case ZQFP_SILU_MUL: return SiluMul<T>::compute({share.x, share.other});
      case ZQFP_RMS_NORM: {
        const float factor = token < p_.m ? *shared_.token_factor(token) : 0.f;
        return Norm<T>(p_.from).compute({share.x, share.other}, share.gamma, factor);
      }
      default: return share.x;
    }
  }

  // h of token t and eight 4i + c of the block lies in lane 16t + 4i + c, and is operand B of the step that multiplies
  // these columns; the other lanes have zeros there. So column 4t + i of the sums is what chunk i gives token t.
  __device__ __forceinline__ void make(const Share& share) const {
    const int lane = this->lane(), q = lane / 4, c = lane % 4;
    const Eight<T> h = compute_eight(share, lane / 16);
    __syncwarp();
    float sums[4] = {};
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const bool mine = q % 4 == chunk;
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        uint32_t a[4];
        share.rows[chunk].operand(s, 0, a);
        ptx::mma(sums, a, mine ? h.word[2 * s] : 0, mine ? h.word[2 * s + 1] : 0, T());
      }
    }
    // Two ranks, of chunks 2c and 2c + 1, and of those of the neighbour.
    const float low = add_neighbour(sums[0] + sums[1]), high = add_neighbour(sums[2] + sums[3]);
    float* slot = p_.slots + (share.block * p_.m + c / 2) * p_.rank + share.rank;
    const bool stores = c % 2 == 0 && c / 2 < p_.m && share.rank < p_.rank;
    if (stores) *reinterpret_cast<float2*>(slot) = {low, high};
  }

  __device__ __forceinline__ static float add_neighbour(float sum) { return sum + __shfl_xor_sync(~0u, sum, 1); }

  __device__ __forceinline__ void wait_for_shares() const {
    if (lane() == 0) {
      while (int(ptx::load_acquire(p_.shares) % kLeft / kMade) < shares_) {
      }
    }
    __syncwarp();
  }

  // Four ranks of a token, or of none: lane i has number i % lanes, where they are as many as a power of two. The lanes that
  // have the same add up every so-manieth block of K, and then each other's, always in the same order.
  __device__ __forceinline__ float4 add_shares() const {
    constexpr int kBatch = 8;  // loads under way
    const int fours = p_.m * p_.rank / 4, bits = 32 - __clz(fours - 1), lanes = 1 << bits, groups = 32 >> bits;
    const int lane = this->lane(), four = lane & (lanes - 1);
    const float4* slots = reinterpret_cast<const float4*>(p_.slots) + four;
    float4 sum{0.f, 0.f, 0.f, 0.f};
    for (int first = lane >> bits; first < p_.k_blocks; first += kBatch * groups) {
      float4 more[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int block = first + i * groups;
        more[i] = {0.f, 0.f, 0.f, 0.f};
        if (block < p_.k_blocks && four < fours) more[i] = __ldcg(slots + block * fours);
      }
#pragma unroll
      for (const float4& part : more) sum = {sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w};
    }
    for (int mask = lanes; mask < 32; mask *= 2) {
      sum.x += __shfl_xor_sync(~0u, sum.x, mask);
      sum.y += __shfl_xor_sync(~0u, sum.y, mask);
      sum.z += __shfl_xor_sync(~0u, sum.z, mask);
      sum.w += __shfl_xor_sync(~0u, sum.w, mask);
    }
    return sum;
  }
};

}  // namespace zqfp
