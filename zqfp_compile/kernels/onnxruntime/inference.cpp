#include "inference.h"

#include <algorithm>

namespace zqfp {

Inference::Inference(OrtShapeInferContext* context) : context_(context) {
  const OrtApi& api = Ort::GetApi();
  OrtTensorTypeAndShapeInfo* info = nullptr;  // the context's
  Ort::ThrowOnError(api.ShapeInferContext_GetInputTypeShape(context, 0, &info));
  Ort::ThrowOnError(api.GetTensorElementType(info, &type_));
  size_t rank = 0;
  Ort::ThrowOnError(api.GetDimensionsCount(info, &rank));
  dims_.resize(rank);
  symbols_.resize(rank, "");
  if (rank == 0) return;
  Ort::ThrowOnError(api.GetDimensions(info, dims_.data(), rank));
  Ort::ThrowOnError(api.GetSymbolicDimensions(info, symbols_.data(), rank));
  for (size_t i = 0; i < rank; ++i) {
    dims_[i] = std::max<int64_t>(dims_[i], -1);
    if (symbols_[i] == nullptr) symbols_[i] = "";
  }
}

int64_t Inference::attribute(const char* name) const {
  const OrtApi& api = Ort::GetApi();
  const OrtOpAttr* attribute = nullptr;
  int64_t value = 0;
  size_t size = 0;
  Ort::ThrowOnError(api.ShapeInferContext_GetAttribute(context_, name, &attribute));
  Ort::ThrowOnError(api.ReadOpAttr(attribute, ORT_OP_ATTR_INT, &value, sizeof(value), &size));
  return value;
}

int64_t Inference::attribute(const char* name, int64_t missing) const {
  const OrtOpAttr* attribute = nullptr;
  const Ort::Status failed(Ort::GetApi().ShapeInferContext_GetAttribute(context_, name, &attribute));
  return failed.IsOK() ? this->attribute(name) : missing;
}

std::vector<int64_t> Inference::attributes(const char* name, size_t most) const {
  const OrtApi& api = Ort::GetApi();
  const OrtOpAttr* attribute = nullptr;
  const Ort::Status missing(api.ShapeInferContext_GetAttribute(context_, name, &attribute));
  if (!missing.IsOK()) return {};
  std::vector<int64_t> values(most);
  size_t bytes = 0;
  const Ort::Status failed(
      api.ReadOpAttr(attribute, ORT_OP_ATTR_INTS, values.data(), most * sizeof(int64_t), &bytes));
  values.resize(failed.IsOK() ? bytes / sizeof(int64_t) : 0);
  return values;
}

void Inference::setOutput(size_t index, int64_t last, ONNXTensorElementDataType type) const {
  if (dims_.empty()) return;
  const OrtApi& api = Ort::GetApi();
  Shape dims = dims_;
  std::vector<const char*> symbols = symbols_;
  if (last >= 0) {
    dims.back() = last;
    symbols.back() = "";
  }
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  Ort::ThrowOnError(api.CreateTensorTypeAndShapeInfo(&raw));
  const Ort::TensorTypeAndShapeInfo info(raw);  // releases it
  Ort::ThrowOnError(api.SetTensorElementType(raw, type));
  Ort::ThrowOnError(api.SetDimensions(raw, dims.data(), dims.size()));
  Ort::ThrowOnError(api.SetSymbolicDimensions(raw, symbols.data(), symbols.size()));
  Ort::ThrowOnError(api.ShapeInferContext_SetOutputTypeShape(context_, index, raw));
}

}  // namespace zqfp
