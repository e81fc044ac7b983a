// A consumer warpgroup: decodes its blocks of the weight in registers, multiplies them, and finishes its tile.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "gated.cuh"
#include "multiply.cuh"
#include "output.cuh"

namespace zqfp {

// Named barriers of the block; 0 is __syncthreads.
constexpr int kWarpgroupBarrier = 1;  // + warpgroup, at most 4
constexpr int kSlicesReady = 5;       // + row: the slices' sums lie in shared memory
constexpr int kSlicesTaken = 9;       // + row: they have been read

template <class C>
class Consumer {
 public:
  static constexpr int kCount = C::kAccumulators;
  using Sums = float[kCount];

  __device__ __forceinline__ Consumer(const GemmParams& p, Shared<C> shared, int rank, int warpgroup)
      : p_(p),
        shared_(shared),
        rank_(rank),
        warpgroup_(warpgroup),
        row_(C::kRows == 1 ? 0 : warpgroup / C::kSlices),
        slice_(C::kRows == 1 ? warpgroup : warpgroup % C::kSlices),
        thread_(threadIdx.x % kThreads) {}

  __device__ __forceinline__ void run(Trace& trace) {
    trace_ = trace;
    trace_.stamp(Step::kMet);
    ptx::wait_for_kernel_before();
    Walk walk(p_.schedule, this_worker<C>());
    Segment segment;
    while (walk.next(p_.schedule, this_worker<C>(), segment)) {
      segment = part_of<C>(segment, rank_);
      const Tile tile = locate<C>(p_, segment.tile, rank_);
      const bool last_units = segment.end == p_.schedule.units;
      if (row_ >= tile.row_blocks) {
        skip(segment.end - segment.begin + (last_units ? p_.lorc_steps : 0));
      } else {
        process(segment, tile, last_units);
      }
    }
    if constexpr (C::kStoreApart) end_output();
  }

 private:
  const GemmParams& p_;
  Shared<C> shared_;
  int rank_, warpgroup_, row_, slice_, thread_;
  Ring<C::kStages> ring_;
  Ring<C::kOutSlots> out_;
  bool reduced_before_ = false;
  int exchanged_ = 0;  // tiles
  Trace trace_;

  // ---- the pipeline ------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void wait_full() { ptx::barrier_wait(shared_.full(ring_.stage), ring_.parity); }

  // One lane of each warp says so, to every block that fills this stage.
  __device__ __forceinline__ void release(int stage) {
    const int lane = thread_ % 32;
    if constexpr (C::kCluster == 1) {
      if (lane == 0) ptx::barrier_arrive(shared_.empty(stage));
    } else {
      if (lane < C::kCluster) ptx::barrier_arrive_remote(shared_.empty(stage), lane);
    }
  }

  __device__ __forceinline__ void skip(int stages) {
    for (int i = 0; i < stages; ++i) {
      wait_full();
      __syncwarp();  // no lane may still look for this round of the stage; elsewhere wgmma sees to that
      release(ring_.stage);
      ring_.advance();
    }
  }

  // ---- a segment ---------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void process(const Segment& segment, const Tile& tile, bool last_units) {
    trace_.stamp(Step::kTile);
    if constexpr (C::kSplit > 1) make_room();
    const EdgeScales edge = load_edges(tile);
    // The last unit may have no block of K for this slice.
    const int units = segment.end - segment.begin;
    const bool idle_at_end = last_units && (p_.schedule.units - 1) * C::kSlices + slice_ >= p_.k_blocks;

    Sums sums;
    multiply_all(units - idle_at_end, sums);
    trace_.stamp(Step::kMultiplied);
    if (idle_at_end) skip(1);
    const Bias bias = load_bias(tile);
    apply_scales(edge, sums);
    if (last_units) add_lorc(sums);
    if constexpr (C::kSlices > 1) {
      if (!add_slices(sums)) return;
      trace_.stamp(Step::kSlices);
    }
    if constexpr (C::kSplit > 1) {
      if (!(rank_ == 0 ? exchange<0>(sums) : exchange<1>(sums))) return;
      trace_.stamp(Step::kShared);
    } else if (segment.begin > 0 || !last_units) {
      if (!add_partials(segment, sums)) return;
      trace_.stamp(Step::kShared);
    }
    add_bias(bias, sums);
    if (p_.bfloat) {
      store<__nv_bfloat16>(tile, sums);
    } else {
      store<__half>(tile, sums);
    }
    trace_.stamp(Step::kStored);
  }

  // The thread's two rows: h = 0 and 1.
  __device__ __forceinline__ int weight_row(const Tile& tile, int h) const {
    return (tile.row_block + row_) * kBlockRows + thread_ / 32 * 16 + thread_ % 32 / 4 + 8 * h;
  }

  // Scales of the thread's rows and of the warpgroup's tokens: read early, used late.
  struct EdgeScales {
    static constexpr int kTokenScales = (C::kTokens + kThreads - 1) / kThreads;
    float row[2];
    float token[kTokenScales];
  };

  __device__ __forceinline__ EdgeScales load_edges(const Tile& tile) const {
    EdgeScales edge;
    for (int h = 0; h < 2; ++h) {
      const int n = weight_row(tile, h);
      edge.row[h] = n < p_.n ? __ldg(p_.row_scales + n) : 0.f;
    }
    for (int i = 0; i < EdgeScales::kTokenScales; ++i) {
      const int token = tile.token + thread_ + i * kThreads;
      const bool inside = token < p_.m && thread_ + i * kThreads < C::kTokens;
      edge.token[i] = inside ? p_.a[p_.per_token ? token : 0] : 0.f;  // not __ldg: see load_eight
    }
    return edge;
  }

  // Read after K, when registers are free, and used after the sums have been added up.
  struct Bias {
    float row[2];
  };

  __device__ __forceinline__ Bias load_bias(const Tile& tile) const {
    Bias bias{};
    if (p_.bias == nullptr) return bias;
    for (int h = 0; h < 2; ++h) {
      const int n = weight_row(tile, h);
      if (n >= p_.n) continue;
      bias.row[h] = p_.bfloat ? __bfloat162float(static_cast<const __nv_bfloat16*>(p_.bias)[n])
                              : __half2float(static_cast<const __half*>(p_.bias)[n]);
    }
    return bias;
  }

  // ---- multiplication ----------------------------------------------------------------------------------------------

  __device__ __forceinline__ void multiply_all(int units, Sums& sums) {
    clear(sums);
    if constexpr (C::kPromote == 0) {
      multiply(units, sums);
    } else {
      for (int done = 0; done < units; done += C::kPromote) {
        Sums part;
        clear(part);
        multiply(units - done < C::kPromote ? units - done : C::kPromote, part);
#pragma unroll
        for (int i = 0; i < kCount; ++i) sums[i] += part[i];
      }
    }
  }

  __device__ __forceinline__ static void clear(Sums& sums) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = 0.f;
  }

  // Blocks of K, one stage each, in two halves.
  __device__ __forceinline__ void multiply(int units, Sums& sums) {
    uint32_t front[8], back[8];
    int previous = -1;
    for (int unit = 0; unit < units; ++unit) {
      wait_full();
      if (unit == 0) trace_.stamp(Step::kData);
      const uint32_t codes = shared_.codes(ring_.stage, warpgroup_) + thread_ * 16;
      const uint4 front_codes = ptx::load_16(codes);
      const uint4 back_codes = ptx::load_16(codes + kBlockBytes / 2);
      constexpr int kScaleBytes = scale_block_bytes(C::kGroup) / 32;
      const auto tables = load_tables<C::kGroup>(shared_.scales(ring_.stage, warpgroup_) + thread_ / 4 * kScaleBytes);
      const uint64_t tokens = ptx::descriptor(shared_.activations(ring_.stage, slice_));

      multiply_half<C::kTokens>(sums, front_codes, tables, 0, tokens, front);
      if (previous >= 0) release(previous);
      multiply_half<C::kTokens>(sums, back_codes, tables, 2, tokens, back);
      previous = ring_.stage;
      ring_.advance();
    }
    ptx::wgmma_wait<0>();
    ptx::pin(sums);
    if (previous >= 0) release(previous);
  }

  // ---- after K -----------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void sync_warpgroup() const {
    ptx::sync_threads(kWarpgroupBarrier + warpgroup_, kThreads);
  }

  // sums[4j + 2h + i] is row q + 8h of token 8j + 2c + i.
  __device__ __forceinline__ void apply_scales(const EdgeScales& edge, Sums& sums) {
    float* scales = shared_.template at<float>(C::kTokenScaleOffset) + warpgroup_ * C::kTokens;
    sync_warpgroup();  // the segment before has been read
#pragma unroll
    for (int i = 0; i < EdgeScales::kTokenScales; ++i) {
      if (thread_ + i * kThreads < C::kTokens) scales[thread_ + i * kThreads] = edge.token[i];
    }
    sync_warpgroup();
#pragma unroll
    for (int j = 0; j < C::kTokens / 8; ++j) {
      const float2 a = *reinterpret_cast<const float2*>(scales + 8 * j + 2 * (thread_ % 4));
      sums[4 * j + 0] *= a.x * edge.row[0];
      sums[4 * j + 1] *= a.y * edge.row[0];
      sums[4 * j + 2] *= a.x * edge.row[1];
      sums[4 * j + 3] *= a.y * edge.row[1];
    }
  }

  // sums += (xv @ u)^T; the first slice does it.
  __device__ __forceinline__ void add_lorc(Sums& sums) {
    if (slice_ != 0) {
      skip(p_.lorc_steps);
      return;
    }
    for (int step = 0; step < p_.lorc_steps; ++step) {
      wait_full();
      const uint64_t u = ptx::descriptor_transposed(shared_.codes(ring_.stage, row_));
      const uint64_t xv = ptx::descriptor(shared_.activations(ring_.stage, 0));
      constexpr uint64_t kUStep = 16 * 128 >> 4, kXvStep = 16 * 2 >> 4;  // 16 ranks
      if (p_.bfloat) {
        ptx::wgmma_fence();
        Wgmma<C::kTokens>::bfloat(sums, u, xv);
        Wgmma<C::kTokens>::bfloat(sums, u + kUStep, xv + kXvStep);
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
      } else {
        ptx::wgmma_fence();
        Wgmma<C::kTokens>::half(sums, u, xv);
        Wgmma<C::kTokens>::half(sums, u + kUStep, xv + kXvStep);
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
      }
      ptx::pin(sums);
      release(ring_.stage);
      ring_.advance();
    }
  }

  // Sums travel four at a time, those of neighbouring threads next to each other.
  static constexpr int kQuads = kCount / 4;

  __device__ __forceinline__ static float4 quad(const Sums& sums, int i) {
    return {sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]};
  }

  __device__ __forceinline__ static void add_quad(Sums& sums, int i, float4 more) {
    sums[4 * i] += more.x;
    sums[4 * i + 1] += more.y;
    sums[4 * i + 2] += more.z;
    sums[4 * i + 3] += more.w;
  }

  // Adds the slices in order. True for the first slice, which goes on with the sum.
  __device__ __forceinline__ bool add_slices(Sums& sums) {
    constexpr int kParties = C::kSlices * kThreads;
    float4* parts = shared_.template at<float4>(C::kReduceOffset) +
                    row_ * (C::kSlices - 1) * kQuads * kThreads + thread_;
    const bool again = reduced_before_;
    reduced_before_ = true;
    if (slice_ != 0) {
      if (again) ptx::sync_threads(kSlicesTaken + row_, kParties);
#pragma unroll
      for (int i = 0; i < kQuads; ++i) parts[((slice_ - 1) * kQuads + i) * kThreads] = quad(sums, i);
      ptx::arrive_threads(kSlicesReady + row_, kParties);
      return false;
    }
    if (again) ptx::arrive_threads(kSlicesTaken + row_, kParties);
    ptx::sync_threads(kSlicesReady + row_, kParties);
#pragma unroll
    for (int s = 0; s < C::kSlices - 1; ++s) {
#pragma unroll
      for (int i = 0; i < kQuads; ++i) add_quad(sums, i, parts[(s * kQuads + i) * kThreads]);
    }
    return true;
  }

  // ---- tiles that several workers share ----------------------------------------------------------------------------

  // A worker has at most one segment that starts inside a tile (its first) and one that only starts a tile (its last).
  __device__ __forceinline__ float4* partial(int worker, bool starts_tile) const {
    const int64_t slot = (int64_t(worker) * C::kCluster + rank_) * 2 + starts_tile;
    return reinterpret_cast<float4*>(p_.partials) + (slot * C::kRows + row_) * kQuads * kThreads + thread_;
  }

  // Adds up what the sharers of a tile have, in the order of K. True for the one that goes on with the sum.
  __device__ __forceinline__ bool add_partials(const Segment& segment, Sums& sums) {
    const Sharers who = sharers(p_.schedule, segment.tile);
    const int parties = who.last - who.first + 1;
    uint32_t* arrivals =
        p_.arrivals + (int64_t(segment.tile - p_.schedule.whole_tiles) * C::kCluster + rank_) * C::kRows + row_;
    if constexpr (C::kTokens >= 128) {
      if (parties == 2) return add_other(arrivals, segment.begin == 0 ? who.last : who.first, segment, sums);
    }
    leave(segment, sums);
    if (arrive(arrivals, parties) != uint32_t(parties - 1)) return false;
    clear(sums);
    for (int other = who.first; other <= who.last; ++other) add(partial(other, other == who.first), sums);
    return true;
  }

  // Of two sharers of a large tile only the first to arrive leaves its sums; the second, which the first cannot keep
  // waiting for long, adds them to its own. Their order makes no difference to a sum of two.
  __device__ __forceinline__ bool add_other(uint32_t* arrivals, int other, const Segment& segment, Sums& sums) {
    constexpr uint32_t kBothArrivedOneLeft = 3;
    if (arrive(arrivals, 0) == 0) {
      leave(segment, sums);
      sync_warpgroup();
      if (thread_ == 0) ptx::add_acq_rel(arrivals, 1);
      return false;
    }
    if (thread_ == 0) {
      while (ptx::load_acquire(arrivals) != kBothArrivedOneLeft) {
      }
      *arrivals = 0;
    }
    sync_warpgroup();
    add(partial(other, segment.begin != 0), sums);
    return true;
  }

  __device__ __forceinline__ void leave(const Segment& segment, const Sums& sums) const {
    float4* mine = partial(this_worker<C>(), segment.begin == 0);
#pragma unroll
    for (int i = 0; i < kQuads; ++i) __stcg(mine + i * kThreads, quad(sums, i));
  }

  __device__ __forceinline__ static void add(const float4* part, Sums& sums) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) add_quad(sums, i, __ldcg(part + i * kThreads));
  }

  // Counts an arrival of the warpgroup and returns how many there were before; the last of `parties` resets the counter.
  __device__ __forceinline__ uint32_t arrive(uint32_t* arrivals, int parties) const {
    volatile uint32_t* shared_flag = shared_.template at<uint32_t>(C::kTokenScaleOffset) + warpgroup_ * C::kTokens;
    sync_warpgroup();
    if (thread_ == 0) {
      // Releases what the warpgroup has written before the barrier, acquires what the others have.
      const uint32_t before = ptx::add_acq_rel(arrivals, 1);
      if (before == uint32_t(parties - 1)) *arrivals = 0;
      *shared_flag = before;
    }
    sync_warpgroup();
    return *shared_flag;
  }

  // ---- tiles of which two blocks have half of K each ------------------------------------------------------------------

  // Of two parts of kOutTokens the first block finishes the first, the second the second, and each sends the other its sums
  // of that; where there is one part, the first block does. True for a block that goes on.
  template <int kMine>
  __device__ __forceinline__ bool exchange(Sums& sums) {
    constexpr bool kBoth = C::kBothFinish;
    constexpr int kHalf = C::kOutTokens / 8;  // quads of a thread
    float4* halves = shared_.template at<float4>(C::kPeerOffset) + row_ * kHalf * kThreads + thread_;
    const int other = 1 - kMine;
    if (exchanged_ == 0) ptx::cluster_wait();  // its barriers are open
    if constexpr (kBoth || kMine == 1) {
      if (exchanged_ > 0) ptx::barrier_wait(shared_.peer_empty(row_), (exchanged_ - 1) & 1);
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        const float* sum = sums + 4 * ((kBoth ? other * kHalf : 0) + i);
        ptx::store_remote(reinterpret_cast<const float*>(halves + i * kThreads), {sum[0], sum[1], sum[2], sum[3]},
                          shared_.peer_full(row_), other);
      }
    }
    if constexpr (kBoth || kMine == 0) {
      if (thread_ == 0) ptx::barrier_expect(shared_.peer_full(row_), C::kHalfBytes);
      ptx::barrier_wait(shared_.peer_full(row_), exchanged_ & 1);
#pragma unroll
      for (int i = 0; i < kHalf; ++i) add_quad(sums, kMine * kHalf + i, halves[i * kThreads]);
    }
    ++exchanged_;
    return kBoth || kMine == 0;
  }

  // Says that there is room for what the other block sends of this tile. Not after the one before, which may be its last.
  __device__ __forceinline__ void make_room() const {
    if (slice_ != 0 || exchanged_ == 0 || (!C::kBothFinish && rank_ == 1)) return;
    __syncwarp();
    if (thread_ % 32 == 0) ptx::barrier_arrive_remote(shared_.peer_empty(row_), 1 - rank_);
  }

  // ---- output ------------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void add_bias(const Bias& bias, Sums& sums) const {
    if (p_.bias == nullptr) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] += bias.row[i / 2 % 2];
  }

  // Through shared memory, where the tile is turned to rows of tokens, 64 tokens at a time.
  template <typename T>
  __device__ __forceinline__ void store(const Tile& tile, const Sums& sums) {
#pragma unroll
    for (int part = 0; part < C::kTokens; part += C::kOutTokens) {
      if (C::kSplit > 1 && part / C::kOutTokens != rank_) continue;
      if constexpr (C::kStoreApart) {
        ptx::barrier_wait(shared_.out_empty(row_, out_.stage), out_.parity ^ 1);
        turn<T>(sums + part / 2, shared_.out(row_, out_.stage));
        hand_over(tile.row_block + row_, tile.token + part);
      } else {
        p_.gated ? turn_gated<T>(sums + part / 2) : turn<T>(sums + part / 2, shared_.out(row_, 0));
        sync_warpgroup();
        store_rows(tile, part);
        sync_warpgroup();
      }
    }
  }

  // 64 rows of kOutTokens tokens into rows of tokens. In a slot of a ring, pieces of 16 bytes lie as slot_piece says.
  template <typename T>
  __device__ __forceinline__ void turn(const float* sums, uint32_t staging) const {
    const int token = thread_ % 8, piece = thread_ / 32 * 2 + thread_ % 32 / 8 % 2;
    const uint32_t corner =
        staging + (C::kStoreApart ? slot_piece(token, piece) : uint32_t(token * C::kOutPitch + piece * 16));
#pragma unroll
    for (int j = 0; j < C::kOutTokens / 8; ++j) {
      const float* d = sums + j * 4;
      ptx::store_transposed(corner + j * 8 * C::kOutPitch, round_pair({d[0], d[1]}, T()), round_pair({d[2], d[3]}, T()));
    }
  }

  // The same of h, of which a warp's 16 rows are one piece; two times eight tokens at once, where there are. Slots of a ring
  // hold gate and up instead: the storer computes h.
  template <typename T>
  __device__ __forceinline__ void turn_gated(const float* sums) const {
    constexpr int kAtOnce = C::kOutTokens < 16 ? 1 : 2;
    const uint32_t corner = shared_.out(row_, 0) + thread_ % (8 * kAtOnce) * C::kOutPitch + thread_ / 32 * 16;
#pragma unroll
    for (int j = 0; j < C::kOutTokens / 8; j += kAtOnce) {
      const float *d = sums + j * 4, *e = d + 4 * (kAtOnce - 1);
      ptx::store_transposed(corner + j * 8 * C::kOutPitch, gate_pair<T>({d[0], d[1]}, {d[2], d[3]}),
                            gate_pair<T>({e[0], e[1]}, {e[2], e[3]}));
    }
  }

  // Says what the slot holds, and goes to the next.
  __device__ __forceinline__ void hand_over(int row_block, int token) {
    if (thread_ == 0) {
      volatile SlotContent* content = slot_content<C>(shared_, row_, out_.stage);
      content->row_block = row_block;
      content->token = token;
    }
    __syncwarp();
    if (thread_ % 32 == 0) ptx::barrier_arrive(shared_.out_full(row_, out_.stage));
    out_.advance();
  }

  __device__ __forceinline__ void end_output() {
    ptx::barrier_wait(shared_.out_empty(row_, out_.stage), out_.parity ^ 1);
    hand_over(0, -1);
  }

  // 128 bytes of a row by eight threads, 64 of h by four.
  __device__ __forceinline__ void store_rows(const Tile& tile, int part) const {
    const char* staging = ptx::shared_pointer<char>(shared_.out(row_, 0));
    const int row_block = tile.row_block + row_, columns = p_.gated ? kBlockRows / 2 : kBlockRows;
    const Output& output = output_of(p_.outputs, row_block);
#pragma unroll
    for (int i = thread_; i < C::kOutTokens * 8; i += kThreads) {
      const int token = tile.token + part + i / 8;
      const int inside = i % 8 * 8, column = (row_block - output.first_block) * columns + inside;
      if (token >= p_.m || column >= output.n || inside >= columns) continue;
      const uint4 eight = *reinterpret_cast<const uint4*>(staging + i / 8 * C::kOutPitch + i % 8 * 16);
      *reinterpret_cast<uint4*>(static_cast<uint16_t*>(output.y) + int64_t(token) * output.n + column) = eight;
    }
  }
};

}  // namespace zqfp
