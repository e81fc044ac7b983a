// Greedy tokens out of a compiled folder's engine, with TensorRT or TensorRT-RTX on the first GPU (generate.h has the
// command line). ZQFP_RUNTIME, tensorrt or tensorrt-rtx, is set by CMake from the library that is linked.
//
// The cache stays on the GPU: what a step reads and what it writes change places after it. An engine has a profile for
// prompts and one for single tokens; each gets a context of its own.

#include <NvInferRuntime.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <utility>

#include "cuda.h"
#include "error.h"
#include "generate.h"

namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::OptProfileSelector;
using zqfp::DeviceBuffer;
using zqfp::Error;
using zqfp::Exit;
using zqfp::Float;
using zqfp::Folder;
using Shape = std::vector<int64_t>;

const std::string kRuntime = ZQFP_RUNTIME;
const std::string kPlugin = "libzqfp_tensorrt.so";

// Keeps TensorRT's first error, for the line the program ends with.
class Logger : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* text) noexcept override {
    if (severity <= Severity::kERROR && first_.empty()) first_ = text;
  }
  std::string first() const { return first_.empty() ? "it gives no reason" : first_; }

 private:
  std::string first_;
};

std::string LibraryVersion() {
  return std::to_string(getInferLibMajorVersion()) + "." + std::to_string(getInferLibMinorVersion()) + "." +
         std::to_string(getInferLibPatchVersion());
}

// TensorRT's classes have other layouts in another major version, and in TensorRT-RTX.
void CheckHeaders() {
  if (getInferLibMajorVersion() == NV_TENSORRT_MAJOR && getInferLibMinorVersion() >= NV_TENSORRT_MINOR) return;
  throw Error(Exit::kEnvironment,
              "this program was compiled with the headers of version " + std::to_string(NV_TENSORRT_MAJOR) + "." +
                  std::to_string(NV_TENSORRT_MINOR) + " and " + kRuntime + " here is " + LibraryVersion() +
                  "; compile it with the headers that come with it");
}

// Engines load in the version that built them only; said here, since TensorRT needs a GPU to find out.
void CheckVersion(const Folder& folder, const std::string& engine) {
  const std::string built = folder.VersionOf(kRuntime), ours = LibraryVersion();
  if (built.empty() || built.rfind(ours + ".", 0) == 0 || built == ours) return;
  throw Error(Exit::kModel, engine + ": was built by " + kRuntime + " " + built + ", this is " + ours +
                                "; compile the model again with this version");
}

size_t SizeOf(DataType type) {
  switch (type) {
    case DataType::kINT64: return 8;
    case DataType::kFLOAT:
    case DataType::kINT32: return 4;
    case DataType::kHALF:
    case DataType::kBF16: return 2;
    case DataType::kFP8:
    case DataType::kINT8:
    case DataType::kUINT8:
    case DataType::kBOOL: return 1;
    default: throw Error(Exit::kModel, "the engine has a tensor of a type this program does not know");
  }
}

Float FloatOf(DataType type) {
  switch (type) {
    case DataType::kFLOAT: return Float::kFloat32;
    case DataType::kHALF: return Float::kFloat16;
    case DataType::kBF16: return Float::kBfloat16;
    default: throw Error(Exit::kModel, "the logits are neither float, float16 nor bfloat16");
  }
}

Shape ShapeOf(const Dims& dims) { return Shape(dims.d, dims.d + dims.nbDims); }

Dims DimsOf(const Shape& shape) {
  Dims dims{};
  dims.nbDims = static_cast<int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), dims.d);
  return dims;
}

size_t Elements(const Shape& shape) {
  size_t count = 1;
  for (const int64_t dim : shape) count *= static_cast<size_t>(dim);
  return count;
}

// The keys or values of one layer.
struct Cache {
  std::string past, present;
  Shape shape;  // of the past
  size_t element_bytes;
  DeviceBuffer read, written;
};

class TrtModel : public zqfp::Model {
 public:
  explicit TrtModel(const Folder& folder) {
    const std::string name = kRuntime + ".engine";
    const std::string path = folder.Verified(name);
    CheckVersion(folder, path);
    gpu_ = std::make_unique<zqfp::Gpu>();
    CheckHeaders();
    Load(folder, path);
    for (int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
      const std::string tensor = engine_->getIOTensorName(i);
      if (engine_->getTensorIOMode(tensor.c_str()) != nvinfer1::TensorIOMode::kINPUT) continue;
      if (zqfp::IsPast(tensor)) {
        AddCache(tensor);
      } else if (engine_->getTensorDataType(tensor.c_str()) == DataType::kINT64) {
        inputs_.emplace(tensor, DeviceBuffer());
      } else {
        throw Error(Exit::kModel, path + ": its input " + tensor + " is not of 64-bit integers; compile it again");
      }
    }
  }

  int64_t Step(const std::vector<int64_t>& tokens) override {
    zqfp::StepInputs values(tokens, cached_);
    std::map<std::string, Shape> shapes;
    for (const auto& [name, buffer] : inputs_) shapes[name] = {1, static_cast<int64_t>(values.Named(name).size())};
    for (const Cache& cache : caches_) shapes[cache.past] = cache.shape;
    nvinfer1::IExecutionContext& context = ContextFor(shapes);
    for (const auto& [name, shape] : shapes) Ask(context.setInputShape(name.c_str(), DimsOf(shape)), name);

    for (auto& [name, buffer] : inputs_) {
      std::vector<int64_t>& numbers = values.Named(name);
      buffer.Upload(numbers.data(), numbers.size() * sizeof(int64_t), *gpu_);
      Bind(context, name, OnHost(name) ? numbers.data() : buffer.Reserve(0));
    }
    for (Cache& cache : caches_) {
      Bind(context, cache.past, cache.read.Reserve(0));
      const size_t bytes = Elements(ShapeOf(context.getTensorShape(cache.present.c_str()))) * cache.element_bytes;
      Bind(context, cache.present, cache.written.Reserve(bytes));
    }
    const int64_t next = RunForToken(context);
    for (Cache& cache : caches_) {
      cache.shape = ShapeOf(context.getTensorShape(cache.present.c_str()));
      std::swap(cache.read, cache.written);
    }
    cached_ += static_cast<int64_t>(tokens.size());
    return next;
  }

 private:
  void Load(const Folder& folder, const std::string& path) {
    runtime_.reset(nvinfer1::createInferRuntime(logger_));
    if (runtime_ == nullptr) throw Error(Exit::kEnvironment, kRuntime + " does not start: " + logger_.first());
    if (folder.Has(kPlugin)) {
      const std::string plugin = folder.Verified(kPlugin);
      if (folder.Has("libzqfp.so")) folder.Verified("libzqfp.so");  // the plugin opens it
      if (runtime_->getPluginRegistry().loadLibrary(plugin.c_str()) == nullptr) {
        throw Error(Exit::kModel, plugin + ": does not load: " + logger_.first());
      }
    }
    const std::string plan = zqfp::ReadFile(path);
    engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
    if (engine_ == nullptr) {
      throw Error(Exit::kModel, path + ": " + kRuntime + " " + LibraryVersion() + " cannot load it: " + logger_.first() +
                                    "; an engine runs on the GPU architecture it was built for only");
    }
  }

  void AddCache(const std::string& name) {
    const Shape shape = zqfp::EmptyCache(ShapeOf(engine_->getTensorShape(name.c_str())));
    const size_t bytes = SizeOf(engine_->getTensorDataType(name.c_str()));
    caches_.push_back({name, zqfp::PresentOf(name), shape, bytes, {}, {}});
  }

  // Whether the engine reads a tensor's values, as a shape, from the CPU.
  bool OnHost(const std::string& name) const {
    return engine_->getTensorLocation(name.c_str()) == nvinfer1::TensorLocation::kHOST;
  }

  // The context of the profile that takes these shapes and is tuned for the nearest number of tokens.
  nvinfer1::IExecutionContext& ContextFor(const std::map<std::string, Shape>& shapes) {
    int32_t best = -1;
    double nearest = INFINITY;
    for (int32_t profile = 0; profile < engine_->getNbOptimizationProfiles(); ++profile) {
      if (!Takes(profile, shapes)) continue;
      const Dims tuned = engine_->getProfileShape("input_ids", profile, OptProfileSelector::kOPT);
      const double distance = std::abs(std::log(double(shapes.at("input_ids")[1] + 1) / double(tuned.d[1] + 1)));
      if (distance < nearest) best = profile, nearest = distance;
    }
    if (best < 0) {
      throw Error(Exit::kUsage, "no profile of the engine takes " + std::to_string(shapes.at("input_ids")[1]) +
                                    " tokens after " + std::to_string(cached_) + "; build it with other --max-shapes");
    }
    auto& context = contexts_[best];
    if (context == nullptr) {
      context.reset(engine_->createExecutionContext());
      if (context == nullptr) throw Error(Exit::kEnvironment, "not enough GPU memory for the engine: " + logger_.first());
      Ask(context->setOptimizationProfileAsync(best, gpu_->stream()), "profile " + std::to_string(best));
      gpu_->Wait();
    }
    return *context;
  }

  bool Takes(int32_t profile, const std::map<std::string, Shape>& shapes) const {
    for (const auto& [name, shape] : shapes) {
      if (OnHost(name)) continue;
      const Dims low = engine_->getProfileShape(name.c_str(), profile, OptProfileSelector::kMIN);
      const Dims high = engine_->getProfileShape(name.c_str(), profile, OptProfileSelector::kMAX);
      for (size_t axis = 0; axis < shape.size(); ++axis) {
        if (shape[axis] < low.d[axis] || shape[axis] > high.d[axis]) return false;
      }
    }
    return true;
  }

  // Runs what is bound and returns the likeliest token of the last position; logits are [1, tokens, vocabulary].
  int64_t RunForToken(nvinfer1::IExecutionContext& context) {
    const Shape shape = ShapeOf(context.getTensorShape("logits"));
    const Float type = FloatOf(engine_->getTensorDataType("logits"));
    const size_t row = static_cast<size_t>(shape.back()) * zqfp::SizeOf(type);
    const size_t bytes = Elements(shape) * zqfp::SizeOf(type);
    Bind(context, "logits", logits_.Reserve(bytes));
    if (!context.enqueueV3(gpu_->stream())) throw Error(Exit::kModel, "the engine fails to run: " + logger_.first());
    std::vector<char> last(row);
    logits_.Download(last.data(), row, bytes - row, *gpu_);
    gpu_->Wait();
    return zqfp::Likeliest(last.data(), shape.back(), type);
  }

  void Bind(nvinfer1::IExecutionContext& context, const std::string& name, void* address) const {
    Ask(context.setTensorAddress(name.c_str(), address), name);
  }

  void Ask(bool accepted, const std::string& what) const {
    if (!accepted) throw Error(Exit::kModel, "the engine refuses " + what + ": " + logger_.first());
  }

  // In this order, since each needs those before it, also while they are destroyed.
  Logger logger_;
  std::unique_ptr<zqfp::Gpu> gpu_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::map<int32_t, std::unique_ptr<nvinfer1::IExecutionContext>> contexts_;
  std::map<std::string, DeviceBuffer> inputs_;
  std::vector<Cache> caches_;
  DeviceBuffer logits_;
  int64_t cached_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  return zqfp::Generate(argc, argv, [](const Folder& folder) { return std::make_unique<TrtModel>(folder); });
}
