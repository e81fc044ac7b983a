// Greedy tokens out of a compiled folder's onnxruntime.onnx, with ONNX Runtime on the CPU (generate.h has the command
// line). The cache stays in ONNX Runtime: what comes out of one step is bound to the next.

#include <onnxruntime_cxx_api.h>

#include <utility>

#include "error.h"
#include "generate.h"

namespace {

using zqfp::Float;
using zqfp::Folder;

const std::string kModel = "onnxruntime.onnx";
const std::string kCustomOps = "libzqfp_onnxruntime.so";

struct Tensor {
  std::string name;
  ONNXTensorElementDataType type;
  std::vector<int64_t> shape;
};

class OrtModel : public zqfp::Model {
 public:
  explicit OrtModel(const Folder& folder) : session_(Open(env_, folder)) {
    Ort::AllocatorWithDefaultOptions allocator;
    for (size_t i = 0; i < session_.GetInputCount(); ++i) {
      const auto info = session_.GetInputTypeInfo(i);  // owns what the next line returns a view of
      const auto tensor = info.GetTensorTypeAndShapeInfo();
      inputs_.push_back({session_.GetInputNameAllocated(i, allocator).get(), tensor.GetElementType(), tensor.GetShape()});
    }
    for (const Tensor& input : inputs_) {
      if (!zqfp::IsPast(input.name)) continue;
      const std::vector<int64_t> shape = zqfp::EmptyCache(input.shape);
      cache_.emplace_back(input.name, Ort::Value::CreateTensor(allocator, shape.data(), shape.size(), input.type));
    }
  }

  int64_t Step(const std::vector<int64_t>& tokens) override {
    zqfp::StepInputs values(tokens, cached_);
    Ort::IoBinding binding(session_);
    for (const Tensor& input : inputs_) {
      if (!zqfp::IsPast(input.name)) binding.BindInput(input.name.c_str(), View(values.Named(input.name)));
    }
    binding.BindOutput("logits", cpu_);
    for (const auto& [name, value] : cache_) {
      binding.BindInput(name.c_str(), value);
      binding.BindOutput(zqfp::PresentOf(name).c_str(), cpu_);
    }
    session_.Run(Ort::RunOptions{}, binding);

    std::vector<Ort::Value> outputs = binding.GetOutputValues();  // in the order they were bound
    for (size_t i = 0; i < cache_.size(); ++i) cache_[i].second = std::move(outputs[i + 1]);
    cached_ += static_cast<int64_t>(tokens.size());
    return LastLikeliest(outputs[0]);
  }

 private:
  static Ort::Session Open(Ort::Env& env, const Folder& folder) {
    Ort::SessionOptions options;
    if (folder.Has(kCustomOps)) options.RegisterCustomOpsLibrary(folder.Verified(kCustomOps).c_str());
    if (folder.Has(kModel + ".data")) folder.Verified(kModel + ".data");
    return Ort::Session(env, folder.Verified(kModel).c_str(), options);
  }

  // A [1, n] tensor over the numbers themselves, which must outlive it.
  Ort::Value View(std::vector<int64_t>& numbers) {
    const int64_t shape[] = {1, static_cast<int64_t>(numbers.size())};
    return Ort::Value::CreateTensor<int64_t>(cpu_, numbers.data(), numbers.size(), shape, 2);
  }

  // Of the last position; logits are [1, tokens, vocabulary].
  static int64_t LastLikeliest(const Ort::Value& logits) {
    const auto info = logits.GetTensorTypeAndShapeInfo();
    const std::vector<int64_t> shape = info.GetShape();
    const ONNXTensorElementDataType type = info.GetElementType();
    if (type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT && type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16) {
      throw zqfp::Error(zqfp::Exit::kModel, "the logits are neither float nor float16");
    }
    const Float kind = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? Float::kFloat32 : Float::kFloat16;
    const size_t last = static_cast<size_t>((shape[1] - 1) * shape[2]) * zqfp::SizeOf(kind);
    return zqfp::Likeliest(static_cast<const char*>(logits.GetTensorRawData()) + last, shape[2], kind);
  }

  Ort::Env env_{ORT_LOGGING_LEVEL_ERROR, "zqfp"};
  Ort::MemoryInfo cpu_ = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  Ort::Session session_;
  std::vector<Tensor> inputs_;
  std::vector<std::pair<std::string, Ort::Value>> cache_;
  int64_t cached_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  return zqfp::Generate(argc, argv, [](const Folder& folder) { return std::make_unique<OrtModel>(folder); });
}
