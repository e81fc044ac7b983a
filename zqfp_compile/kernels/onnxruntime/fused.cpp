#include "fused.h"

namespace zqfp {
namespace {

bool flag(const Ort::ConstKernelInfo& info, const char* name) { return info.GetAttribute<int64_t>(name) != 0; }

}  // namespace

SiluMulNode::SiluMulNode(const Ort::ConstKernelInfo& info) : QuantizeNode(info, flag(info, "tokens"), 2) {}

SiluMulCall::SiluMulCall(const SiluMulNode& node, Ort::KernelContext& context)
    : QuantizeCall(node, context), up(own(context, 1, shape, "up")) {}

RmsNormNode::RmsNormNode(const Ort::ConstKernelInfo& info)
    : QuantizeNode(info, flag(info, "tokens"), 2 + flag(info, "skip"), flag(info, "skip")),
      skip(flag(info, "skip")),
      epsilon(info.GetAttribute<float>("epsilon")) {
  require(epsilon >= 0, "attribute epsilon is " + std::to_string(epsilon) + ", it must not be negative");
}

RmsNormCall::RmsNormCall(const RmsNormNode& node, Ort::KernelContext& context)
    : QuantizeCall(node, context), gamma(own(context, 1, {k}, "gamma")) {
  if (!node.skip) return;
  skip = own(context, 2, shape, "skip");
  sum = context.GetOutput(node.outputs(), shape).GetTensorMutableRawData();
}

}  // namespace zqfp
