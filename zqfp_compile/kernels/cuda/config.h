// The shape of one kernel: what its warpgroups multiply and where its shared memory goes.
#pragma once

#include <cstdint>

#include "decode.h"

namespace zqfp {

constexpr int kMaxSharedBytes = 227 * 1024;
constexpr int kReservedBytes = 1024;  // of a processor's shared memory, for each block

// Whether a processor has room for two blocks of so much shared memory.
constexpr bool share_processor(int64_t bytes, int64_t other) {
  return bytes + other + 2 * kReservedBytes <= kMaxSharedBytes + kReservedBytes;
}

// Too much for a second block. Alone: also more than the division that an attention kernel may have left (164 KB of it to
// shared memory), as the next kernel could not share that; our own kernels leave all of it.
constexpr int64_t kMoreThanHalf = (kMaxSharedBytes - kReservedBytes) / 2 + 128, kAlone = 164 * 1024 - kReservedBytes + 128;

// What a kernel that quantises its tokens asks for, which needs so many bytes. A processor has room for two blocks of these
// kernels, of which one shall be of the next. Both might be of this one, and take twice as long as those elsewhere, where it
// follows kernels some of which leave a processor earlier than others; unless it asks for more than half.
// `before`: what the kernel before asked for, if that makes x and has a block on each processor; 0: another one.
constexpr int64_t asked_shared_bytes(int64_t bytes, int64_t before) {
  if (before > 0 && share_processor(before, bytes)) return bytes;
  const int64_t asked = before > 0 ? kMoreThanHalf : kAlone;
  return bytes > asked ? bytes : asked;
}

constexpr int kMaxStages = 8;

// A block has kRows * kSlices consumer warpgroups. Warpgroup (row, slice) multiplies 64 weight rows by kTokens tokens
// over every kSlices-th block of K; the slices are added up in shared memory. kCluster blocks with different weight
// rows share the activations; or kSplit, two, have the same rows and half of K each, and send each other sums. kPromote:
// blocks of K after which the tensor core's accumulator is added to one in float32; 0: never.
template <int Tokens, int Rows, int Slices, int Group, int Cluster, int Promote, int Split = 1>
struct Config {
  static constexpr int kTokens = Tokens, kRows = Rows, kSlices = Slices, kGroup = Group, kCluster = Cluster,
                       kPromote = Promote, kSplit = Split;
  static constexpr int kGang = Cluster * Split;  // blocks of a cluster
  static_assert(Split == 1 || (Split == 2 && Cluster == 1), "clusters are of rows or of halves of K");
  static constexpr int kWarpgroups = Rows * Slices;
  static constexpr int kAccumulators = Tokens / 2;  // of a thread

  // The producer is a warpgroup of its own, because registers move between whole warpgroups; what it gives up goes to
  // the consumers. A block starts with kEntryRegisters per thread: what its threads, in steps of 8, leave for each.
  static constexpr int kBlockThreads = (kWarpgroups + 1) * kThreads;
  static constexpr int kEntryRegisters = 65536 / kBlockThreads / 8 * 8;
  static constexpr int kProducerRegisters = kWarpgroups == 2 ? 72 : 64;
  static constexpr int kConsumerRegisters =
      ((kWarpgroups + 1) * kEntryRegisters - kProducerRegisters) / kWarpgroups / 8 * 8;

  // Shared memory, in order. Activation tiles have rows of 128 bytes.
  static constexpr int kTileBytes = Tokens * kBlockColumns;
  static constexpr int kActivationBytes = Slices * kTileBytes;
  static constexpr int kCodeBytes = kWarpgroups * kBlockBytes;
  static constexpr int kScaleBytes = kWarpgroups * scale_block_bytes(Group);
  static constexpr int kStageBytes = kActivationBytes + kCodeBytes + kScaleBytes;

  static constexpr int kReduceBytes = (Slices - 1) * Rows * kAccumulators * kThreads * 4;
  // Tiles of many tokens leave through a ring of slots (output.cuh), others through rows that are padded against bank
  // conflicts.
  static constexpr bool kStoreApart = Slices == 1 && Tokens >= 128;
  static constexpr int kOutTokens = Tokens < 64 ? Tokens : 64;
  static constexpr int kOutPitch = kBlockRows * 2 + (kStoreApart ? 0 : 16);
  static constexpr int kOutSlots = kStoreApart ? 3 : 1;
  static constexpr int kOutSlotBytes = kOutTokens * kOutPitch;
  static constexpr int kOutBytes = Rows * kOutSlots * kOutSlotBytes;
  static constexpr int kTokenScaleBytes = kWarpgroups * Tokens * 4;
  // What the other block sends: kOutTokens of every row. Of more tokens both finish a half.
  static constexpr bool kBothFinish = Split > 1 && Tokens > kOutTokens;
  static constexpr int kHalfBytes = kBlockRows * kOutTokens * 4, kPeerBytes = Split == 1 ? 0 : Rows * kHalfBytes;
  static_assert(Split == 1 || (Tokens <= 2 * kOutTokens && !kStoreApart), "two halves, and each is stored at once");
  static constexpr int kBarrierBytes = 1024, kAlignment = 1024;
  static constexpr int kFixedBytes = kReduceBytes + kOutBytes + kPeerBytes + kTokenScaleBytes + kBarrierBytes + kAlignment;

  static constexpr int kFittingStages = (kMaxSharedBytes - kFixedBytes) / kStageBytes;
  static constexpr int kStages = kFittingStages < kMaxStages ? kFittingStages : kMaxStages;
  // Stages that may be on their way at once, 70 KB: 3 TB/s and a microsecond of latency ask for 23 KB in each
  // multiprocessor. Of 2, 3, 4 and all, 4 is the fastest (docs/performance.md).
  static constexpr int kInFlight = Tokens <= 64 && kStages > 4 ? 4 : kStages;
  static constexpr int kSharedBytes = kFixedBytes + kStages * kStageBytes;
  static_assert(kStages >= 2, "no room for a pipeline");

  static constexpr int kActivationOffset = 0;
  static constexpr int kCodeOffset = kActivationOffset + kStages * kActivationBytes;
  static constexpr int kScaleOffset = kCodeOffset + kStages * kCodeBytes;
  static constexpr int kReduceOffset = kScaleOffset + kStages * kScaleBytes;
  static constexpr int kOutOffset = kReduceOffset + kReduceBytes;
  static constexpr int kPeerOffset = kOutOffset + kOutBytes;
  static constexpr int kTokenScaleOffset = kPeerOffset + kPeerBytes;
  static constexpr int kBarrierOffset = kTokenScaleOffset + kTokenScaleBytes;
  static constexpr int kContentOffset = kBarrierOffset + kBarrierBytes / 2;
  static_assert((kStages + Rows * (kOutSlots + 1)) * 2 * 8 <= kBarrierBytes / 2, "room for the barriers");
  static_assert(!kStoreApart || Rows <= 2, "a warp of the producer's warpgroup stores each row");

  // A worker's partial sums in the workspace, in floats; it can hold two.
  static constexpr int kPartialFloats = Split > 1 ? 0 : Rows * kAccumulators * kThreads;
};

}  // namespace zqfp
