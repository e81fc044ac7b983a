// ONNX Runtime's C++ API, initialised from the session that registers the library.
#ifndef ZQFP_ORT_API_H
#define ZQFP_ORT_API_H

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "zqfp.h"

namespace zqfp {

using Shape = std::vector<int64_t>;

// Runs `body`; what it throws becomes a status, since no exception may reach ONNX Runtime's C code.
template <typename Body>
OrtStatusPtr guarded(Body&& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Ort::Exception& error) {
    return Ort::GetApi().CreateStatus(error.GetOrtErrorCode(), error.what());
  } catch (const std::exception& error) {
    return Ort::GetApi().CreateStatus(ORT_FAIL, error.what());
  }
}

// Throws with an error of the caller's making unless `holds`.
inline void require(bool holds, const std::string& message) {
  if (!holds) throw Ort::Exception("zqfp: " + message, ORT_INVALID_ARGUMENT);
}

// A node must have as many inputs and outputs as its attributes ask for.
inline void checkCounts(const Ort::ConstKernelInfo& info, const char* name, size_t inputs, size_t outputs) {
  const size_t givenInputs = info.GetInputCount(), givenOutputs = info.GetOutputCount();
  require(givenInputs == inputs && givenOutputs == outputs,
          std::string(name) + " has " + std::to_string(givenInputs) + " inputs and " + std::to_string(givenOutputs) +
              " outputs, its attributes say " + std::to_string(inputs) + " and " + std::to_string(outputs));
}

inline bool flag(const Ort::ConstKernelInfo& info, const char* name) { return info.GetAttribute<int64_t>(name) != 0; }

inline std::string text(const Shape& shape) {
  std::string result = "[";
  for (const int64_t dim : shape) result += (result.size() > 1 ? ", " : "") + std::to_string(dim);
  return result + "]";
}

// The product of all dimensions but the last, which must be `width`.
inline int64_t rowCount(const Shape& shape, int64_t width, const char* what) {
  require(!shape.empty() && shape.back() == width,
          std::string(what) + " has shape " + text(shape) + ", its last dimension must be " + std::to_string(width));
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) rows *= shape[i];
  return rows;
}

inline int64_t elements(const Shape& shape) {
  int64_t count = 1;
  for (const int64_t dim : shape) count *= dim;
  return count;
}

inline zqfpDataType dataType(ONNXTensorElementDataType type, const char* what) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return ZQFP_FLOAT16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return ZQFP_BFLOAT16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return ZQFP_FLOAT32;
    default:
      throw Ort::Exception(std::string("zqfp: ") + what + " has element type " + std::to_string(type) +
                               ", it must be FLOAT, FLOAT16 or BFLOAT16",
                           ORT_INVALID_ARGUMENT);
  }
}

}  // namespace zqfp

#endif
