// What CUTLASS makes of a W4A8 layer on Hopper: y[m,n] = alpha * sum_k x8[m,k] * E4M3(e2m1(codes[n,k]) * s[n, k / 128]).
//
// A contender of bench_gemm.py, built by cutlass.mk. Its kernels are those that CUTLASS's CollectiveBuilder makes of
// E2M1 weights with scales, E4M3 activations and FP16 outputs. The weights are operand A, so that few tokens fill a
// tile. Nearer to our layer it does not come: a scale serves 128 columns (those of a tile), is FP16 (what the weights
// are multiplied in before they are rounded to E4M3), and there are no row scales, only alpha.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/gemm/kernel/tile_scheduler.hpp"

#define CONTENDER_API extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kGroup = 128;
thread_local char message[256] = "";

int fail(const char* text, cutlass::Status status = cutlass::Status::kSuccess) {
  const bool named = status != cutlass::Status::kSuccess;
  std::snprintf(message, sizeof message, "%s%s%s", text, named ? ": " : "", named ? cutlassGetStatusString(status) : "");
  return 1;
}

struct Call {
  const void *codes, *scales, *x8;
  void* y;
  int m, n, k;
  float alpha;
};

// Tiles of 128 weight rows, two consumer warpgroups, and so many tokens.
template <int kTokens, class Scheduler>
struct Config {
  using Codes = cutlass::float_e2m1_t;
  using Scale = cutlass::half_t;
  using Activation = cutlass::float_e4m3_t;
  using Output = cutlass::half_t;
  using Tile = cute::Shape<cute::_128, cute::Int<kTokens>, cute::Int<kGroup>>;
  using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
  using Arch = cutlass::arch::Sm90;
  using TensorOp = cutlass::arch::OpClassTensorOp;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      Arch, TensorOp, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float, float, void,
      cutlass::layout::ColumnMajor, 8, Output, cutlass::layout::ColumnMajor, 8,
      cutlass::epilogue::TmaWarpSpecializedCooperative>::CollectiveOp;
  using Stages =
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      Arch, TensorOp, cute::tuple<Codes, Scale>, cutlass::layout::RowMajor, 32, Activation,
      cutlass::layout::ColumnMajor, 16, float, Tile, Cluster, Stages,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue, Scheduler>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static typename Gemm::Arguments arguments(const Call& c) {
    using cute::_0;
    using cute::_1;
    const auto rows = [](int64_t stride) { return cute::make_stride(stride, _1{}, int64_t(0)); };
    typename Gemm::Arguments result{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {c.n, c.m, c.k, 1},
        {static_cast<const Codes*>(c.codes), rows(c.k), static_cast<const Activation*>(c.x8), rows(c.k),
         static_cast<const Scale*>(c.scales), cute::make_stride(_1{}, int64_t(c.n), int64_t(0)), kGroup},
        {{c.alpha, 0.f},
         nullptr,
         cute::make_stride(_1{}, int64_t(c.n), int64_t(0)),
         static_cast<Output*>(c.y),
         cute::make_stride(_1{}, int64_t(c.n), int64_t(0))}};
    return result;
  }

  static size_t workspace(const Call& c) { return Gemm::get_workspace_size(arguments(c)); }

  static int run(const Call& c, void* workspace, void* stream) {
    auto arguments = Config::arguments(c);
    Gemm gemm;
    cutlass::Status status = Gemm::can_implement(arguments);
    if (status != cutlass::Status::kSuccess) return fail("no kernel for this problem", status);
    status = gemm.initialize(arguments, workspace, static_cast<cudaStream_t>(stream));
    if (status != cutlass::Status::kSuccess) return fail("preparing the launch", status);
    status = gemm.run(static_cast<cudaStream_t>(stream));
    return status == cutlass::Status::kSuccess ? 0 : fail("launching", status);
  }
};

struct Entry {
  const char* name;
  size_t (*workspace)(const Call&);
  int (*run)(const Call&, void*, void*);
};

template <int kTokens, class Scheduler>
constexpr Entry entry(const char* name) {
  using C = Config<kTokens, Scheduler>;
  return {name, &C::workspace, &C::run};
}

using StreamK = cutlass::gemm::StreamKScheduler;
using Persistent = cutlass::gemm::PersistentScheduler;

const Entry kEntries[] = {
    entry<16, StreamK>("t16 stream-K"),   entry<64, StreamK>("t64 stream-K"),
    entry<128, StreamK>("t128 stream-K"), entry<128, Persistent>("t128 persistent"),
    entry<256, Persistent>("t256 persistent"),
};
constexpr int kCount = sizeof kEntries / sizeof kEntries[0];

int check(int config, const Call& c) {
  if (config < 0 || config >= kCount) return fail("there is no such kernel");
  if (c.m <= 0 || c.n <= 0 || c.k <= 0) return fail("m, n and k must be positive");
  if (c.n % 8 != 0 || c.k % kGroup != 0) return fail("n must be a multiple of 8, k of 128");
  return 0;
}

}  // namespace

// The last error of this thread, a sentence; "" when there was none.
CONTENDER_API const char* contenderError() { return message; }

// Name of kernel `config`, or null beyond the last.
CONTENDER_API const char* contenderName(int config) {
  return config >= 0 && config < kCount ? kEntries[config].name : nullptr;
}

// Bytes of workspace of a call; 0 on success. Needs a device, whose multiprocessors are counted.
CONTENDER_API int contenderWorkspace(int config, int m, int n, int k, size_t* bytes) {
  const Call call{nullptr, nullptr, nullptr, nullptr, m, n, k, 1.f};
  if (check(config, call) != 0) return 1;
  if (bytes == nullptr) return fail("the result pointer is null");
  *bytes = kEntries[config].workspace(call);
  return 0;
}

// codes: E2M1 [n, k], the first of two in the low half of a byte; scales: FP16 [k / 128, n]; x8: E4M3 [m, k];
// y: FP16 [m, n]. Device pointers, aligned to 16 bytes. 0 on success; launches on `stream`, a cudaStream_t.
CONTENDER_API int contenderGemm(int config, int m, int n, int k, const void* codes, const void* scales, const void* x8,
                                float alpha, void* y, void* workspace, void* stream) {
  const Call call{codes, scales, x8, y, m, n, k, alpha};
  if (check(config, call) != 0) return 1;
  for (const void* pointer : {codes, scales, x8, static_cast<const void*>(y)}) {
    if (pointer == nullptr || reinterpret_cast<uintptr_t>(pointer) % 16 != 0) {
      return fail("codes, scales, x8 and y must be device pointers aligned to 16 bytes");
    }
  }
  return kEntries[config].run(call, workspace, stream);
}
