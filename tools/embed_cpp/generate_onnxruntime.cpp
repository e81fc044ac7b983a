// Greedy tokens out of a compiled folder, in C++ with ONNX Runtime.
//
//     generate_onnxruntime FOLDER MAX_NEW_TOKENS END_TOKEN TOKEN...
//
// runs FOLDER/onnxruntime.onnx on the CPU and prints one token number per line as it is made, the end token
// included; -1 as END_TOKEN never ends early. Text to tokens and back is the tokenizer's work (tokenizer.json).
// The cache stays in ONNX Runtime: what comes out of one step is bound to the next.
//
// Inputs are named as torch.onnx's export (models/) and optimum name them: input_ids, attention_mask, position_ids,
// past_key_values.N.key and .value, which come back as present.N.key and .value.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

const std::string kPast = "past_key_values.";
const std::string kPresent = "present.";

bool StartsWith(const std::string& text, const std::string& start) { return text.rfind(start, 0) == 0; }

struct Tensor {
  std::string name;
  ONNXTensorElementDataType type;
  std::vector<int64_t> shape;
};

class Model {
 public:
  explicit Model(const std::string& path) : session_(env_, path.c_str(), Ort::SessionOptions{}) {
    Ort::AllocatorWithDefaultOptions allocator;
    for (size_t i = 0; i < session_.GetInputCount(); ++i) {
      const auto info = session_.GetInputTypeInfo(i);  // owns what the next line returns a view of
      const auto tensor = info.GetTensorTypeAndShapeInfo();
      inputs_.push_back({session_.GetInputNameAllocated(i, allocator).get(), tensor.GetElementType(), tensor.GetShape()});
    }
    for (const Tensor& input : inputs_) {
      if (StartsWith(input.name, kPast)) cache_.emplace_back(input.name, Empty(input));
    }
  }

  // Runs tokens that follow the cached ones, keeps the new cache, and returns the likeliest next token.
  int64_t Step(std::vector<int64_t> tokens) {
    const auto count = static_cast<int64_t>(tokens.size());
    std::vector<int64_t> mask(static_cast<size_t>(cached_ + count), 1);
    std::vector<int64_t> positions(tokens.size());
    for (int64_t i = 0; i < count; ++i) positions[static_cast<size_t>(i)] = cached_ + i;

    Ort::IoBinding binding(session_);
    for (const Tensor& input : inputs_) {
      if (input.name == "input_ids") binding.BindInput("input_ids", View(tokens));
      else if (input.name == "attention_mask") binding.BindInput("attention_mask", View(mask));
      else if (input.name == "position_ids") binding.BindInput("position_ids", View(positions));
      else if (!StartsWith(input.name, kPast)) throw std::runtime_error("unknown input " + input.name);
    }
    binding.BindOutput("logits", cpu_);
    for (const auto& [name, value] : cache_) {
      binding.BindInput(name.c_str(), value);
      binding.BindOutput((kPresent + name.substr(kPast.size())).c_str(), cpu_);
    }
    session_.Run(Ort::RunOptions{}, binding);

    std::vector<Ort::Value> outputs = binding.GetOutputValues();  // in the order they were bound
    for (size_t i = 0; i < cache_.size(); ++i) cache_[i].second = std::move(outputs[i + 1]);
    cached_ += count;
    return Likeliest(outputs[0]);
  }

 private:
  Ort::Value Empty(const Tensor& input) {
    std::vector<int64_t> shape = input.shape;
    for (size_t axis = 0; axis < shape.size(); ++axis) {
      if (shape[axis] < 0) shape[axis] = axis == 0 ? 1 : 0;  // the batch, and the number of cached tokens
    }
    Ort::AllocatorWithDefaultOptions allocator;
    return Ort::Value::CreateTensor(allocator, shape.data(), shape.size(), input.type);
  }

  // A [1, n] tensor over the numbers themselves, which must outlive it.
  Ort::Value View(std::vector<int64_t>& numbers) {
    const int64_t shape[] = {1, static_cast<int64_t>(numbers.size())};
    return Ort::Value::CreateTensor<int64_t>(cpu_, numbers.data(), numbers.size(), shape, 2);
  }

  template <typename T>
  static int64_t Likeliest(const T* row, int64_t size) {
    return std::max_element(row, row + size, [](const T& a, const T& b) {
             return static_cast<float>(a) < static_cast<float>(b);
           }) - row;
  }

  // Of the last position; logits are [1, tokens, vocabulary].
  static int64_t Likeliest(const Ort::Value& logits) {
    const auto info = logits.GetTensorTypeAndShapeInfo();
    const std::vector<int64_t> shape = info.GetShape();
    const int64_t size = shape[2], last = (shape[1] - 1) * size;
    switch (info.GetElementType()) {
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return Likeliest(logits.GetTensorData<float>() + last, size);
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return Likeliest(logits.GetTensorData<Ort::Float16_t>() + last, size);
      default: throw std::runtime_error("logits are neither float nor float16");
    }
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
  if (argc < 5) {
    std::cerr << "usage: generate_onnxruntime FOLDER MAX_NEW_TOKENS END_TOKEN TOKEN...\n";
    return 2;
  }
  const std::string path = std::string(argv[1]) + "/onnxruntime.onnx";
  try {
    const int64_t count = std::stoll(argv[2]), end = std::stoll(argv[3]);
    std::vector<int64_t> tokens;
    for (int i = 4; i < argc; ++i) tokens.push_back(std::stoll(argv[i]));
    Model model(path);
    for (int64_t made = 0; made < count; ++made) {
      tokens = {model.Step(std::move(tokens))};
      std::cout << tokens[0] << std::endl;
      if (tokens[0] == end) break;
    }
  } catch (const std::exception& error) {
    std::cerr << "generate_onnxruntime: error: " << path << ": " << error.what() << "\n";
    return 3;
  }
  return 0;
}
