// The kernels of one group size, ZQFP_GROUP (32, 64 or 128). Compiled once for each, so that they build in parallel.
#include "gemm_kernel.cuh"
#include "kernels.h"
#include "strip_kernel.cuh"

namespace zqfp {
namespace {

template <int kTokens, int kRows, int kSlices, int kCluster, int kPromote, int kSplit = 1>
Kernel instance(const char* name) {
  using C = Config<kTokens, kRows, kSlices, ZQFP_GROUP, kCluster, kPromote, kSplit>;
  static std::atomic<uint64_t> prepared{0};
  return {name,
          kTokens,
          kRows,
          kSlices,
          kCluster,
          kPromote,
          kSplit,
          C::kStages,
          C::kBlockThreads,
          C::kSharedBytes,
          C::kPartialFloats,
          reinterpret_cast<const void*>(&gemm_kernel<C>),
          &prepared,
          false,
          false};
}

template <class C, class Params = StripParams>
Kernel strip_instance(const char* name) {
  static std::atomic<uint64_t> prepared{0};
  return {name,
          C::kTokens,
          1,
          C::kWarps,
          1,
          0,
          1,
          C::kAhead,
          C::kThreads,
          C::kSharedBytes,
          0,
          reinterpret_cast<const void*>(&strip_kernel<C, Params>),
          &prepared,
          true,
          std::is_same_v<Params, QuantizedStripParams>};
}

template <int kTokens, int kAhead>
using Strips = StripConfig<kTokens, ZQFP_GROUP, kAhead>;

// Two blocks in a multiprocessor: one's weights are on their way while the one before still computes.
template <int kAhead, int kWarpgroups>
using QuantizedStrips = StripConfig<2, ZQFP_GROUP, kAhead, kWarpgroups, 2>;

template <int kAhead, int kWarpgroups>
Kernel quantized_instance(const char* name) {
  using C = QuantizedStrips<kAhead, kWarpgroups>;
  constexpr int kTooMany = C::kSharedBytes + layer_bytes(2, kMaxShares / C::kRankSteps + 1, C::kRanks);
  static_assert(!share_processor(kTooMany, kTooMany), "more shares than can be counted have no room");
  return strip_instance<C, QuantizedStripParams>(name);
}

// Of the kernel that plans choose, 4096 columns.
constexpr int kBesideAttention =
    QuantizedStrips<3, 3>::kSharedBytes + layer_bytes(2, 4096 / kBlockColumns, ZQFP_GROUP == 32 ? 0 : 32);
static_assert(share_processor(kAlone, kBesideAttention), "room behind the one that follows attention");

}  // namespace

#define ZQFP_TABLE_NAME(group) kernels_##group
#define ZQFP_TABLE(group) ZQFP_TABLE_NAME(group)

KernelTable ZQFP_TABLE(ZQFP_GROUP)() {
  // Few tokens: all four warpgroups on 64 rows, each a quarter of K, so that a tile is small and cut rarely; or on 128,
  // half of K each, where that fills the GPU better. Up to 32 tokens the tensor core's sums are promoted, up to 128
  // most are cut into slices. A pair shares the tokens, or has half of K each where tiles are half as many as processors.
  // The order is KernelId's.
  static const Kernel kernels[] = {
      instance<8, 1, 4, 1, 4>("t8r1s4p4"),
      instance<8, 2, 2, 1, 4>("t8r2s2p4"),
      instance<16, 1, 4, 1, 4>("t16r1s4p4"),
      instance<16, 2, 2, 1, 4>("t16r2s2p4"),
      instance<32, 1, 4, 1, 4>("t32r1s4p4"),
      instance<32, 2, 2, 1, 4>("t32r2s2p4"),
      instance<64, 1, 4, 1, 0>("t64r1s4"),
      instance<64, 2, 2, 1, 0>("t64r2s2"),
      instance<128, 1, 2, 1, 0>("t128r1s2"),
      instance<128, 2, 1, 1, 0>("t128r2s1"),
      instance<256, 2, 1, 1, 0>("t256r2s1"),
      instance<256, 2, 1, 2, 0>("t256r2s1c2"),
      instance<8, 1, 4, 1, 4, 2>("t8r1s4p4k2"),
      instance<16, 1, 4, 1, 4, 2>("t16r1s4p4k2"),
      instance<32, 1, 4, 1, 4, 2>("t32r1s4p4k2"),
      instance<64, 1, 4, 1, 0, 2>("t64r1s4k2"),
      instance<128, 1, 2, 1, 0, 2>("t128r1s2k2"),
      strip_instance<Strips<8, 2>>("t8w2"),
      strip_instance<Strips<16, 3>>("t16w3"),
      strip_instance<Strips<8, 3>>("t8w3"),
      quantized_instance<3, 3>("t2w3g3q"),
#ifdef ZQFP_VARIANTS
      instance<128, 1, 2, 1, 4>("t128r1s2p4"),
      instance<128, 2, 1, 1, 4>("t128r2s1p4"),
      instance<128, 2, 1, 2, 0>("t128r2s1c2"),
      instance<64, 1, 2, 1, 4>("t64r1s2p4"),
      instance<8, 1, 4, 1, 0>("t8r1s4"),
      strip_instance<Strips<8, 4>>("t8w4"),
      strip_instance<Strips<16, 2>>("t16w2"),
      quantized_instance<4, 2>("t2w4g2q"),
      quantized_instance<4, 3>("t2w4g3q"),
#endif
  };
  return {kernels, int(sizeof kernels / sizeof kernels[0])};
}

}  // namespace zqfp

#if defined(ZQFP_TRACE) && ZQFP_GROUP == 64
extern "C" __attribute__((visibility("default"))) int zqfpReadTrace(void* stamps) {
  return cudaMemcpyFromSymbol(stamps, zqfp::trace_stamps, sizeof zqfp::trace_stamps);
}
extern "C" __attribute__((visibility("default"))) int zqfpClearTrace() {
  void* stamps = nullptr;
  const cudaError_t found = cudaGetSymbolAddress(&stamps, zqfp::trace_stamps);
  return found != cudaSuccess ? found : cudaMemset(stamps, 0, sizeof zqfp::trace_stamps);
}
#endif
