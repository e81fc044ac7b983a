// libnvinfer.so on the host: TensorRT's interface as tools/embed_cpp uses it, over ONNX Runtime on the CPU.
//
// A plan is the path of an ONNX model. There are two profiles, as zqfp-compile makes them: prompts of up to 64 tokens,
// and single tokens. The file that HOST_TENSORRT_LOG names gets a line for each plugin library and engine that is loaded,
// and for each run: the profile, how many tokens came, how many were cached. A run fails when a cache is read from
// elsewhere than where the run before wrote it. A plugin library loads unless it is empty.
//
// TensorRT's public classes forward to an interface of some hundred virtual functions. Only those that are called are
// here, put at their places in a table; any other ends the process.

#include <NvInferRuntime.h>
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace {

using namespace nvinfer1;
using Name = const char*;

struct Tensor {
  std::string name;
  bool is_input;
  ONNXTensorElementDataType type;
  std::vector<int64_t> dims;  // -1 where they vary
  std::vector<int64_t> shape = {};  // as a context was told
  void* address = nullptr;
};

Ort::Env* environment;
Ort::Session* session;
std::vector<Tensor> tensors;
std::map<std::string, void*> written;  // where the run before put each cache

std::ofstream Log() { return std::ofstream(std::getenv("HOST_TENSORRT_LOG"), std::ios::app); }

bool StartsWith(const std::string& text, const std::string& start) { return text.rfind(start, 0) == 0; }

Tensor& Find(const std::string& name) {
  return *std::find_if(tensors.begin(), tensors.end(), [&](const Tensor& tensor) { return tensor.name == name; });
}

Dims DimsOf(const std::vector<int64_t>& shape) {
  Dims dims{};
  dims.nbDims = static_cast<int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), dims.d);
  return dims;
}

void Open(const std::string& path) {
  environment = new Ort::Env(ORT_LOGGING_LEVEL_ERROR);
  session = new Ort::Session(*environment, path.c_str(), Ort::SessionOptions{});
  Ort::AllocatorWithDefaultOptions allocator;
  const auto add = [&](const Ort::TypeInfo& info, const char* name, bool is_input) {
    const auto tensor = info.GetTensorTypeAndShapeInfo();
    tensors.push_back({name, is_input, tensor.GetElementType(), tensor.GetShape()});
  };
  for (size_t i = 0; i < session->GetInputCount(); ++i) {
    add(session->GetInputTypeInfo(i), session->GetInputNameAllocated(i, allocator).get(), true);
  }
  for (size_t i = 0; i < session->GetOutputCount(); ++i) {
    add(session->GetOutputTypeInfo(i), session->GetOutputNameAllocated(i, allocator).get(), false);
  }
}

// The functions behind ICudaEngine.

int32_t Count(void*) { return static_cast<int32_t>(tensors.size()); }
Name NameAt(void*, int32_t index) { return tensors[index].name.c_str(); }
TensorIOMode Mode(void*, Name name) { return Find(name).is_input ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT; }
TensorLocation Location(void*, Name) { return TensorLocation::kDEVICE; }
Dims EngineShape(void*, Name name) { return DimsOf(Find(name).dims); }
int32_t Profiles(void*) { return 2; }

DataType Type(void*, Name name) {
  switch (Find(name).type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: return DataType::kINT64;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return DataType::kHALF;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN: return DataType::kFP8;
    default: return DataType::kFLOAT;
  }
}

Dims ProfileShape(void*, Name name, int32_t profile, OptProfileSelector select) {
  const int64_t tokens[2][3] = {{1, 16, 64}, {1, 1, 1}}, past[2][3] = {{0, 0, 64}, {0, 16, 128}};
  const int point = static_cast<int>(select);
  Dims dims = EngineShape(nullptr, name);
  dims.d[0] = 1;
  if (dims.nbDims == 4) dims.d[2] = past[profile][point];
  else dims.d[1] = tokens[profile][point] + (std::string(name) == "attention_mask" ? past[profile][point] : 0);
  return dims;
}

// The functions behind IExecutionContext; each context has the profile it was given.

bool SetShape(void*, Name name, const Dims& dims) {
  Find(name).shape.assign(dims.d, dims.d + dims.nbDims);
  return true;
}
bool SetAddress(void*, Name name, void* address) {
  Find(name).address = address;
  return address != nullptr;
}

Dims RunShape(void*, Name name) {
  const Tensor& tensor = Find(name);
  if (tensor.is_input) return DimsOf(tensor.shape);
  std::vector<int64_t> shape = tensor.dims;
  const int64_t tokens = Find("input_ids").shape[1];
  shape[0] = 1;
  if (StartsWith(tensor.name, "present")) shape[2] = Find("past_key_values" + tensor.name.substr(7)).shape[2] + tokens;
  else shape[1] = tokens;
  return DimsOf(shape);
}

struct Implementation {
  void** table;
  int32_t profile = -1;
};

// A virtual function's place in the table, out of the pointer to it (Itanium C++ ABI).
template <typename Method>
size_t Place(Method method) {
  uintptr_t words[2];
  static_assert(sizeof(method) == sizeof(words));
  std::memcpy(words, &method, sizeof(words));
  return (words[0] - 1) / sizeof(void*);
}

void NotHere() {
  std::fputs("a function of TensorRT that the stand-in lacks was called\n", stderr);
  std::abort();
}

struct Table {
  Table() { std::fill(std::begin(functions), std::end(functions), reinterpret_cast<void*>(&NotHere)); }

  template <typename Method, typename Function>
  Table& Put(Method method, Function* function) {
    functions[Place(method)] = reinterpret_cast<void*>(function);
    return *this;
  }

  void* functions[256];
};

bool SetProfile(void* self, int32_t profile, cudaStream_t) {
  static_cast<Implementation*>(self)->profile = profile;
  return true;
}

bool Run(void* self, cudaStream_t) {
  const Ort::MemoryInfo memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
  std::vector<const char*> names[2];
  std::vector<Ort::Value> values[2];
  int64_t cached = 0;
  for (const Tensor& tensor : tensors) {
    const Dims dims = RunShape(nullptr, tensor.name.c_str());
    size_t bytes = 8;  // the widest type
    for (int axis = 0; axis < dims.nbDims; ++axis) bytes *= static_cast<size_t>(dims.d[axis]);
    names[!tensor.is_input].push_back(tensor.name.c_str());
    values[!tensor.is_input].push_back(
        Ort::Value::CreateTensor(memory, tensor.address, bytes, dims.d, dims.nbDims, tensor.type));
    if (!StartsWith(tensor.name, "past")) continue;
    cached = dims.d[2];
    if (cached != 0 && tensor.address != written["present" + tensor.name.substr(15)]) return false;
  }
  session->Run(Ort::RunOptions{}, names[0].data(), values[0].data(), names[0].size(), names[1].data(), values[1].data(),
               names[1].size());
  for (const Tensor& tensor : tensors) {
    if (!tensor.is_input) written[tensor.name] = tensor.address;
  }
  Log() << static_cast<Implementation*>(self)->profile << " " << Find("input_ids").shape[1] << " " << cached << "\n";
  return true;
}

struct Context : IExecutionContext {
  Context() {
    static Table table;
    using V = apiv::VExecutionContext;
    table.Put(&V::setOptimizationProfileAsync, &SetProfile).Put(&V::setInputShape, &SetShape);
    table.Put(&V::setTensorAddress, &SetAddress).Put(&V::getTensorShape, &RunShape).Put(&V::enqueueV3, &Run);
    implementation.table = table.functions;
    mImpl = reinterpret_cast<V*>(&implementation);
  }
  Implementation implementation;
};

IExecutionContext* CreateContext(void*, ExecutionContextAllocationStrategy) { return new Context; }

struct Engine : ICudaEngine {
  Engine() {
    static Table table;
    using V = apiv::VCudaEngine;
    table.Put(&V::getNbIOTensors, &Count).Put(&V::getIOTensorName, &NameAt).Put(&V::getTensorIOMode, &Mode);
    table.Put(&V::getTensorLocation, &Location).Put(&V::getTensorDataType, &Type);
    table.Put(&V::getTensorShape, &EngineShape).Put(&V::getProfileShape, &ProfileShape);
    table.Put(&V::getNbOptimizationProfiles, &Profiles).Put(&V::createExecutionContext, &CreateContext);
    implementation.table = table.functions;
    mImpl = reinterpret_cast<V*>(&implementation);
  }
  Implementation implementation;
};

ILogger* logger;

ICudaEngine* Deserialize(void*, const void* plan, std::size_t size) {
  try {
    Open(std::string(static_cast<const char*>(plan), size));
    Log() << "engine\n";
    return new Engine;
  } catch (const Ort::Exception&) {
    logger->log(ILogger::Severity::kERROR, "the plan names no model\nthat loads");
    return nullptr;
  }
}

IPluginRegistry::PluginLibraryHandle LoadPlugin(void* self, const char* path) {
  Log() << "plugin " << path << "\n";
  return std::ifstream(path).peek() == EOF ? nullptr : self;
}

IPluginRegistry* Plugins(void*) {
  static Table table;
  static Implementation registry{table.Put(&IPluginRegistry::loadLibrary, &LoadPlugin).functions};
  return reinterpret_cast<IPluginRegistry*>(&registry);
}

struct Runtime : IRuntime {
  Runtime() {
    static Table table;
    using V = apiv::VRuntime;
    using Whole = ICudaEngine* (V::*)(const void*, std::size_t) noexcept;
    table.Put(static_cast<Whole>(&V::deserializeCudaEngine), &Deserialize).Put(&V::getPluginRegistry, &Plugins);
    implementation.table = table.functions;
    mImpl = reinterpret_cast<V*>(&implementation);
  }
  Implementation implementation;
};

}  // namespace

extern "C" {

int32_t getInferLibMajorVersion() noexcept { return NV_TENSORRT_MAJOR; }
int32_t getInferLibMinorVersion() noexcept { return NV_TENSORRT_MINOR; }
int32_t getInferLibPatchVersion() noexcept { return NV_TENSORRT_PATCH; }

void* createInferRuntime_INTERNAL(void* given, int32_t) noexcept {
  logger = static_cast<ILogger*>(given);
  return new Runtime;
}

}  // extern "C"
