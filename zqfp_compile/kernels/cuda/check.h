// Checks of what a caller passes. They need no GPU.
#pragma once

#include "status.h"

namespace zqfp {

constexpr int64_t kMaxColumns = 1 << 20;
constexpr int64_t kMaxRows = 1 << 24;
constexpr int64_t kMaxTokens = 1 << 24;

// Rows of the weight that one warpgroup multiplies: an output begins with a block of them.
constexpr int64_t kOutputRows = 64;
constexpr int64_t kGatedRows = 16;

zqfpStatus check_dtype(int32_t dtype);
zqfpStatus check_desc(const zqfpLinearDesc* desc);
zqfpStatus check_tokens(int64_t m);

// How many matrices the layer writes.
int count_outputs(const zqfpLinearDesc& desc);

// Without x8, a and xv.
zqfpStatus check_layer_args(const zqfpLinearDesc& desc, const zqfpLinearArgs* args);
zqfpStatus check_args(const zqfpLinearDesc& desc, const zqfpLinearArgs* args);

// Device pointers: not null, aligned to 16 bytes.
zqfpStatus check_pointer(const void* pointer, const char* name);
zqfpStatus check_alignment(const void* pointer, const char* name);

// What a quantizer computes h from.
zqfpStatus check_operands(const zqfpActivation& activation);

}  // namespace zqfp
