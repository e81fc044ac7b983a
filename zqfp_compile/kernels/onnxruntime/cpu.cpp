#include "cpu.h"

#include <algorithm>

#include "decode.h"
#include "numbers.h"
#include "packed_sizes.h"

namespace zqfp {
namespace {

Ort::ConstValue constantInput(const Ort::ConstKernelInfo& info, size_t index, const char* what) {
  int constant = 0;
  Ort::ConstValue value = info.GetTensorConstantInput(index, &constant);
  require(constant != 0, std::string(what) + " is not an initializer; compile the model again");
  return value;
}

// The output that a column is in.
struct Target {
  void* y = nullptr;  // [m, n]
  int64_t first = 0, n = 0;
};

Target targetOf(const zqfpLinearDesc& desc, const zqfpLinearArgs& args, int64_t column) {
  Target target;
  const std::vector<int64_t> sizes = outputSizes(desc);
  for (size_t i = 0; i < sizes.size() && column >= target.first + target.n; ++i) {
    target = {args.y[i], target.first + target.n, sizes[i]};
  }
  return target;
}

// h of a gated layer's panel: eight of gate, eight of up.
template <typename T>
void writeGated(const float* panel, T* h) {
  constexpr int64_t kEach = Fp8Matrix::kWidth / 2;
  static_assert(Fp8Matrix::kWidth == kGatedRows);
  for (int64_t j = 0; j < kEach; ++j) {
    h[j] = fromFloat<T>(siluMul(rounded<T>(panel[j]), rounded<T>(panel[kEach + j])));
  }
}

// y of one panel of columns from its sums; outputs begin with a panel.
template <typename T>
void writePanel(const LinearNode& node, const LinearCall& call, int64_t panel, const float* sums, const float* low,
                const float* up, const float* bias) {
  const zqfpLinearDesc& desc = node.desc;
  const int64_t first = panel * Fp8Matrix::kWidth, rank = desc.lorc_rank;
  const int64_t width = std::min(Fp8Matrix::kWidth, desc.n - first);
  const Target target = targetOf(desc, call.args, first);
  for (int64_t row = 0; row < call.m; ++row) {
    const float a = call.args.a[desc.per_token ? row : 0];
    float values[Fp8Matrix::kWidth];
    for (int64_t j = 0; j < width; ++j) {
      float value = a * call.args.row_scales[first + j] * sums[row * Fp8Matrix::kWidth + j];
      for (int64_t r = 0; r < rank; ++r) value += low[row * rank + r] * up[r * desc.n + first + j];
      values[j] = bias == nullptr ? value : value + bias[first + j];
    }
    T* y = static_cast<T*>(target.y) + row * target.n;
    if (desc.gated) {
      writeGated(values, y + first / 2);
    } else {
      std::transform(values, values + width, y + first - target.first, fromFloat<T>);
    }
  }
}

}  // namespace

CpuLinear::CpuLinear(const Ort::ConstKernelInfo& info, const LinearNode& node) : node_(node) {
  const Ort::ConstValue codes = constantInput(info, node_.codes, "codes");
  const Ort::ConstValue scales = constantInput(info, node_.codes + 1, "group_scales");
  const PackedSizes sizes = packedSizes(node_.desc);
  const int64_t given = elements(codes.GetTensorTypeAndShapeInfo().GetShape());
  require(given == 2 * sizes.codes && elements(scales.GetTensorTypeAndShapeInfo().GetShape()) == sizes.scales,
          "codes have " + std::to_string(given) + " elements, a layer of n " + std::to_string(node_.desc.n) + ", k " +
              std::to_string(node_.desc.k) + " has " + std::to_string(2 * sizes.codes) + "; compile the model again");
  std::vector<uint8_t> w8(static_cast<size_t>(node_.desc.n * node_.desc.k));
  decodeWeights(node_.desc, codes.GetTensorRawData(), scales.GetTensorRawData(), w8.data());
  weight_ = std::make_unique<Fp8Matrix>(w8.data(), node_.desc.n, node_.desc.k);
}

void CpuLinear::compute(Ort::KernelContext& context) const { multiply(LinearCall(node_, context), context); }

void CpuLinear::multiply(const LinearCall& call, Ort::KernelContext& context) const {
  const zqfpLinearDesc& desc = node_.desc;
  const auto type = static_cast<zqfpDataType>(desc.dtype);
  if (call.m == 0) return;
  std::vector<float> x(static_cast<size_t>(call.m * desc.k));
  const auto* x8 = static_cast<const uint8_t*>(call.args.x8);
  parallelFor(context, call.m, [&](int64_t row) {
    for (int64_t i = row * desc.k; i < (row + 1) * desc.k; ++i) x[i] = decodeE4m3(x8[i]);
  });
  const int64_t rank = desc.lorc_rank;
  const auto low = asFloats(call.args.xv, type, call.m * rank), up = asFloats(call.args.u, type, rank * desc.n);
  const auto bias = asFloats(call.args.bias, type, node_.bias ? desc.n : 0);
  parallelFor(context, weight_->panels(), [&](int64_t panel) {
    std::vector<float> sums(static_cast<size_t>(call.m * Fp8Matrix::kWidth));
    weight_->multiply(panel, x.data(), call.m, sums.data());
    withType(type, [&](auto* tag) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(tag)>>;
      writePanel<T>(node_, call, panel, sums.data(), low.data(), up.data(), node_.bias ? bias.data() : nullptr);
    });
  });
}

}  // namespace zqfp
