// RegisterCustomOps: the entry point ONNX Runtime calls. The library's ops, for the CPU and for CUDA.
//
// A registered custom op beats a model-local function and never falls back, so both providers have every op.
// FLOAT, FLOAT16 and BFLOAT16 are one op: inputs and outputs of those types are declared untyped and checked.

#include <cstdio>

#include "cpu.h"
#include "cuda.h"
#include "inference.h"

#define ZQFP_EXPORT extern "C" __attribute__((visibility("default")))

namespace zqfp {
namespace {

constexpr auto kAny = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto kE4m3 = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN;
constexpr auto kInt4 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4;

// An implementation (CpuLinear, ...) as a kernel of ONNX Runtime.
template <typename Implementation>
struct Kernel {
  Implementation implementation;

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&] {
      Ort::KernelContext context(raw);
      implementation.compute(context);
    });
  }
};

OrtCustomOpInputOutputCharacteristic requiredIf(bool required) {
  return required ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
}

// What all ops have; `arguments` go to the implementation.
template <typename Op, typename Implementation, bool cuda, auto... arguments>
struct OpBase : Ort::CustomOpBase<Op, Kernel<Implementation>, true> {
  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return guarded(
        [&] { *kernel = new Kernel<Implementation>{Implementation(Ort::ConstKernelInfo(info), arguments...)}; });
  }
  const char* GetExecutionProviderType() const { return cuda ? "CUDAExecutionProvider" : "CPUExecutionProvider"; }
};

// Types and shapes of a layer's outputs; returns how many there are.
size_t inferLinear(const Inference& inference) {
  const auto type = static_cast<ONNXTensorElementDataType>(inference.attribute("dtype"));
  std::vector<int64_t> sizes = inference.attributes("output_n", ZQFP_MAX_OUTPUTS);
  if (sizes.empty()) sizes = {inference.attribute("n") / (inference.attribute("gated", 0) == 1 ? 2 : 1)};
  for (size_t i = 0; i < sizes.size(); ++i) inference.setOutput(i, sizes[i], type);
  return sizes.size();
}

template <typename Implementation, bool cuda>
struct LinearOp : OpBase<LinearOp<Implementation, cuda>, Implementation, cuda> {
  static constexpr ONNXTensorElementDataType kInputs[] = {kE4m3, kFloat, kInt4, kE4m3, kFloat, kAny, kAny, kAny};

  const char* GetName() const { return LinearNode::kName; }
  size_t GetInputTypeCount() const { return 8; }
  ONNXTensorElementDataType GetInputType(size_t index) const { return kInputs[index]; }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
    return requiredIf(index < 5);
  }
  size_t GetOutputTypeCount() const { return ZQFP_MAX_OUTPUTS; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return kAny; }
  OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t index) const {
    return requiredIf(index == 0);
  }

  LinearOp() {
    OrtCustomOp::InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) {
      return guarded([&] { inferLinear(Inference(context)); });
    };
  }
};

template <typename Implementation, bool cuda, bool tokens>
struct QuantizeOp : OpBase<QuantizeOp<Implementation, cuda, tokens>, Implementation, cuda, ZQFP_PLAIN, tokens> {
  const char* GetName() const { return tokens ? "QuantizeTokens" : "QuantizeActivation"; }
  size_t GetInputTypeCount() const { return tokens ? 2 : 3; }
  ONNXTensorElementDataType GetInputType(size_t index) const { return !tokens && index == 1 ? kFloat : kAny; }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
    return requiredIf(index + 1 < GetInputTypeCount());
  }
  size_t GetOutputTypeCount() const { return tokens ? 3 : 2; }
  ONNXTensorElementDataType GetOutputType(size_t index) const {
    return index == 0 ? kE4m3 : tokens && index == 1 ? kFloat : kAny;
  }
  OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t index) const {
    return requiredIf(index + 1 < GetOutputTypeCount());
  }

  QuantizeOp() {
    OrtCustomOp::InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) {
      return guarded([&] {
        const Inference inference(context);
        const int64_t rank = inference.attribute("lorc_rank");
        inference.setOutput(0, -1, kE4m3);
        if (tokens) inference.setOutput(1, 1, kFloat);
        if (rank > 0) inference.setOutput(tokens ? 2 : 1, rank, inference.type());
      });
    };
  }
};

// Which inputs and outputs there are is said by attributes, so they have no place of their own; `needed` inputs and one
// output there always are.
template <typename Op, typename Implementation, bool cuda, size_t inputs, size_t needed, auto... arguments>
struct UntypedOp : OpBase<Op, Implementation, cuda, arguments...> {
  size_t GetInputTypeCount() const { return inputs; }
  ONNXTensorElementDataType GetInputType(size_t) const { return kAny; }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
    return requiredIf(index < needed);
  }
  OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t index) const {
    return requiredIf(index == 0);
  }
};

constexpr bool isNorm(zqfpSource source) { return source == ZQFP_RMS_NORM; }

// An op whose quantiser computes x first, from two operands or, a norm, three.
template <typename Implementation, bool cuda, zqfpSource source>
struct FusedOp
    : UntypedOp<FusedOp<Implementation, cuda, source>, Implementation, cuda, isNorm(source) ? 5 : 4, 2, source> {
  static constexpr bool norm = isNorm(source);

  const char* GetName() const { return norm ? "QuantizeRmsNorm" : "QuantizeSiluMul"; }
  size_t GetOutputTypeCount() const { return norm ? 4 : 3; }
  ONNXTensorElementDataType GetOutputType(size_t index) const { return index == 0 ? kE4m3 : kAny; }

  FusedOp() {
    OrtCustomOp::InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) {
      return guarded([&] {
        const Inference inference(context);
        const int64_t rank = inference.attribute("lorc_rank");
        size_t next = 0;
        inference.setOutput(next++, -1, kE4m3);
        if (inference.attribute("tokens") != 0) inference.setOutput(next++, 1, kFloat);
        if (rank > 0) inference.setOutput(next++, rank, inference.type());
        if (norm && inference.attribute("skip") != 0) inference.setOutput(next, -1, inference.type());
      });
    };
  }
};

// At least x, codes and both scales of the weight; at most three operands, a, v, the weight, bias and u.
template <typename Implementation, bool cuda>
struct QuantizedLinearOp : UntypedOp<QuantizedLinearOp<Implementation, cuda>, Implementation, cuda, 10, 4> {
  const char* GetName() const { return QuantizedLinearNode::kName; }
  size_t GetOutputTypeCount() const { return ZQFP_MAX_OUTPUTS + 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return kAny; }

  QuantizedLinearOp() {
    OrtCustomOp::InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) {
      return guarded([&] {
        const Inference inference(context);
        const size_t outputs = inferLinear(inference);
        const bool norm = inference.attribute("source") == ZQFP_RMS_NORM;
        if (norm && inference.attribute("skip") != 0) inference.setOutput(outputs, -1, inference.type());
      });
    };
  }
};

template <typename Op>
void add(Ort::CustomOpDomain& domain) {
  static const Op op;
  domain.Add(&op);
}

void addOps(Ort::CustomOpDomain& domain) {
  add<LinearOp<CpuLinear, false>>(domain);
  add<LinearOp<CudaLinear, true>>(domain);
  add<QuantizeOp<CpuQuantizer, false, false>>(domain);
  add<QuantizeOp<CudaQuantizer, true, false>>(domain);
  add<QuantizeOp<CpuQuantizer, false, true>>(domain);
  add<QuantizeOp<CudaQuantizer, true, true>>(domain);
  add<FusedOp<CpuQuantizer, false, ZQFP_SILU_MUL>>(domain);
  add<FusedOp<CudaQuantizer, true, ZQFP_SILU_MUL>>(domain);
  add<FusedOp<CpuQuantizer, false, ZQFP_RMS_NORM>>(domain);
  add<FusedOp<CudaQuantizer, true, ZQFP_RMS_NORM>>(domain);
  add<QuantizedLinearOp<CpuQuantizedLinear, false>>(domain);
  add<QuantizedLinearOp<CudaQuantizedLinear, true>>(domain);
}

}  // namespace
}  // namespace zqfp

ZQFP_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr) {
    // Statuses are made the same way since the first version.
    const std::string message = "zqfp: this library needs ONNX Runtime 1." + std::to_string(ORT_API_VERSION) +
                                " or later, this is " + base->GetVersionString();
    return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED, message.c_str());
  }
  Ort::InitApi(api);
  return zqfp::guarded([&] {
    static Ort::CustomOpDomain domain = [] {
      Ort::CustomOpDomain made{"zqfp"};
      zqfp::addOps(made);
      return made;
    }();
    Ort::UnownedSessionOptions session(options);
    session.Add(domain);
  });
}
