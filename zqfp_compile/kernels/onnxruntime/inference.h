// Type and shape inference when a model is loaded, with the C API: the C++ wrapper of ONNX Runtime 1.21 writes
// symbolic dimensions in a way that 1.31 refuses.
#ifndef ZQFP_ORT_INFERENCE_H
#define ZQFP_ORT_INFERENCE_H

#include "api.h"

namespace zqfp {

class Inference {
 public:
  explicit Inference(OrtShapeInferContext* context);

  int64_t attribute(const char* name) const;

  // `missing` where the node has no such attribute.
  int64_t attribute(const char* name, int64_t missing) const;

  // At most `most` integers; none where the node has no such attribute or a longer one.
  std::vector<int64_t> attributes(const char* name, size_t most) const;

  // Element type of the first input.
  ONNXTensorElementDataType type() const { return type_; }

  // Gives an output the shape of the first input, with `last` as its last dimension unless that is negative.
  // Of an input of unknown rank ONNX Runtime says rank 0: then the output is what the model says it is.
  void setOutput(size_t index, int64_t last, ONNXTensorElementDataType type) const;

 private:
  OrtShapeInferContext* context_;
  ONNXTensorElementDataType type_{};
  Shape dims_;
  std::vector<const char*> symbols_;  // "" for dimensions that are numbers or unknown
};

}  // namespace zqfp

#endif
