// libzqfp.so and libcuda.so.1 in one, on the host: device pointers are host pointers, numbers are FLOAT16.
//
// It checks what the ABI promises: the workspace is as large as was asked for, and was zeroed once.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "decode.h"
#include "numbers.h"
#include "packed_sizes.h"
#include "zqfp.h"

namespace {

using Half = Ort::Float16_t;

thread_local char message[200];
bool capturing() { return std::getenv("FAKE_CAPTURING") != nullptr; }

zqfpStatus fail(const char* text) {
  std::snprintf(message, sizeof(message), "%s", text);
  return ZQFP_INVALID_VALUE;
}

float number(const void* data, int64_t index) { return static_cast<const Half*>(data)[index].ToFloat(); }

// A row of the product, [n], as the outputs have it.
void writeRow(const zqfpLinearDesc& desc, const zqfpLinearArgs& args, int64_t row, const std::vector<Half>& product) {
  const std::vector<int64_t> sizes = zqfp::outputSizes(desc);
  if (desc.gated != 0) {
    Half* h = static_cast<Half*>(args.y[0]) + row * sizes[0];
    for (int64_t i = 0; i < sizes[0]; ++i) {
      const int64_t gate = i / 8 * 16 + i % 8;
      h[i] = Half(zqfp::siluMul(product[gate].ToFloat(), product[gate + 8].ToFloat()));
    }
    return;
  }
  const Half* next = product.data();
  for (size_t i = 0; i < sizes.size(); next += sizes[i++]) {
    std::copy_n(next, sizes[i], static_cast<Half*>(args.y[i]) + row * sizes[i]);
  }
}

}  // namespace

extern "C" {

int zqfpGetVersion(void) { return ZQFP_ABI_VERSION; }

const char* zqfpGetLastErrorString(void) { return message; }

zqfpStatus zqfpGetPackedSizes(const zqfpLinearDesc* desc, size_t* codes, size_t* scales) {
  const auto sizes = zqfp::packedSizes(*desc);
  *codes = sizes.codes;
  *scales = sizes.scales;
  return ZQFP_SUCCESS;
}

zqfpStatus zqfpGetWorkspaceSize(const zqfpLinearDesc*, int64_t m, size_t* bytes) {
  *bytes = 64 + 16 * m;
  return ZQFP_SUCCESS;
}

zqfpStatus zqfpLinear(const zqfpLinearDesc* desc, const zqfpLinearArgs* args, int64_t m, void* workspace, size_t bytes,
                      void*) {
  if (const char* refusal = std::getenv("FAKE_REFUSAL")) return fail(refusal);
  if (bytes < size_t(64 + 16 * m)) return fail("the workspace is too small");
  auto* counters = static_cast<unsigned char*>(workspace);
  if (std::any_of(counters, counters + 64, [](unsigned char c) { return c != 0; })) return fail("it was not zeroed");
  std::memset(counters + 64, 0xff, bytes - 64);
  if ((desc->lorc_rank > 0) != (args->xv != nullptr && args->u != nullptr)) return fail("xv and u do not fit");
  std::vector<uint8_t> w8(desc->n * desc->k);
  zqfp::decodeWeights(*desc, args->codes, args->group_scales, w8.data());
  std::vector<Half> product(desc->n);
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t n = 0; n < desc->n; ++n) {
      float sum = 0;
      for (int64_t k = 0; k < desc->k; ++k) {
        const uint8_t x8 = static_cast<const uint8_t*>(args->x8)[row * desc->k + k];
        sum += zqfp::decodeE4m3(x8) * zqfp::decodeE4m3(w8[n * desc->k + k]);
      }
      float y = args->a[desc->per_token ? row : 0] * args->row_scales[n] * sum;
      for (int64_t r = 0; r < desc->lorc_rank; ++r) {
        y += number(args->xv, row * desc->lorc_rank + r) * number(args->u, r * desc->n + n);
      }
      if (args->bias != nullptr) y += number(args->bias, n);
      product[n] = Half(y);
    }
    writeRow(*desc, *args, row, product);
  }
  return ZQFP_SUCCESS;
}

zqfpStatus zqfpQuantizeActivation(const void* x, int32_t type, int64_t m, int64_t k, const float* scale, void* x8,
                                  float* a, const void* v, int32_t rank, void* xv, void*) {
  if (type != ZQFP_FLOAT16) return fail("the fake quantises FLOAT16");
  if ((v == nullptr) != (xv == nullptr) || (v != nullptr) != (rank > 0)) return fail("v, rank and xv do not fit");
  for (int64_t row = 0; row < m; ++row) {
    float range = 1e-30f;
    for (int64_t i = 0; i < k; ++i) range = std::max(range, std::fabs(number(x, row * k + i)));
    const float own = scale == nullptr ? range / 448.0f : *scale;
    if (scale == nullptr) a[row] = own;
    for (int64_t i = 0; i < k; ++i) {
      static_cast<uint8_t*>(x8)[row * k + i] = zqfp::encodeE4m3(number(x, row * k + i) / own);
    }
    for (int64_t r = 0; r < rank; ++r) {
      float sum = 0;
      for (int64_t i = 0; i < k; ++i) sum += number(x, row * k + i) * number(v, i * rank + r);
      static_cast<Half*>(xv)[row * rank + r] = Half(sum);
    }
  }
  return ZQFP_SUCCESS;
}

zqfpStatus zqfpQuantizeSiluMul(const void* gate, const void* up, int32_t type, int64_t m, int64_t k, const float* scale,
                               void* x8, float* a, const void* v, int32_t rank, void* xv, void* stream) {
  if (const char* refusal = std::getenv("FAKE_REFUSAL")) return fail(refusal);
  std::vector<Half> h(m * k);
  for (int64_t i = 0; i < m * k; ++i) h[i] = Half(zqfp::siluMul(number(gate, i), number(up, i)));
  return zqfpQuantizeActivation(h.data(), type, m, k, scale, x8, a, v, rank, xv, stream);
}

zqfpStatus zqfpQuantizeRmsNorm(const void* x, const void* skip, const void* gamma, float epsilon, int32_t type, int64_t m,
                               int64_t k, const float* scale, void* x8, float* a, void* sum, const void* v, int32_t rank,
                               void* xv, void* stream) {
  if (const char* refusal = std::getenv("FAKE_REFUSAL")) return fail(refusal);
  if ((skip == nullptr) != (sum == nullptr)) return fail("skip and sum do not fit");
  std::vector<Half> s(m * k), h(m * k);
  for (int64_t i = 0; i < m * k; ++i) s[i] = Half(number(x, i) + (skip == nullptr ? 0 : number(skip, i)));
  for (int64_t row = 0; row < m; ++row) {
    float squares = 0;
    for (int64_t i = row * k; i < (row + 1) * k; ++i) squares += s[i].ToFloat() * s[i].ToFloat();
    const float size = std::sqrt(squares / k + epsilon);
    for (int64_t i = 0; i < k; ++i) h[row * k + i] = Half(s[row * k + i].ToFloat() / size * number(gamma, i));
  }
  if (sum != nullptr) std::copy(s.begin(), s.end(), static_cast<Half*>(sum));
  return zqfpQuantizeActivation(h.data(), type, m, k, scale, x8, a, v, rank, xv, stream);
}

zqfpStatus zqfpGetQuantizedWorkspaceSize(const zqfpLinearDesc* desc, int64_t m, size_t* bytes) {
  zqfpGetWorkspaceSize(desc, m, bytes);
  *bytes += 1;
  return ZQFP_SUCCESS;
}

zqfpStatus zqfpQuantizedLinear(const zqfpLinearDesc* desc, const zqfpActivation* from, const zqfpLinearArgs* args,
                               int64_t m, void* workspace, size_t bytes, void* stream) {
  if (bytes < size_t(64 + 16 * m + 1)) return fail("the workspace is too small for a quantizer as well");
  if ((from->scale == nullptr) != (desc->per_token != 0)) return fail("the scale does not fit");
  const int64_t k = desc->k;
  const int32_t rank = desc->lorc_rank, type = from->x_dtype;
  std::vector<uint8_t> x8(m * k);
  std::vector<float> a(m);
  std::vector<Half> low(m * rank);
  void* xv = rank > 0 ? low.data() : nullptr;
  zqfpStatus status = ZQFP_INVALID_VALUE;
  if (from->source == ZQFP_PLAIN) {
    status = zqfpQuantizeActivation(from->x, type, m, k, from->scale, x8.data(), a.data(), from->v, rank, xv, stream);
  } else if (from->source == ZQFP_SILU_MUL) {
    status = zqfpQuantizeSiluMul(from->x, from->other, type, m, k, from->scale, x8.data(), a.data(), from->v, rank, xv,
                                 stream);
  } else if (from->source == ZQFP_RMS_NORM) {
    status = zqfpQuantizeRmsNorm(from->x, from->other, from->gamma, from->epsilon, type, m, k, from->scale, x8.data(),
                                 a.data(), from->sum, from->v, rank, xv, stream);
  }
  if (status != ZQFP_SUCCESS) return status;
  zqfpLinearArgs quantized = *args;
  quantized.x8 = x8.data();
  quantized.a = from->scale == nullptr ? a.data() : from->scale;
  quantized.xv = xv;
  return zqfpLinear(desc, &quantized, m, workspace, bytes, stream);
}

// The driver. A context is any pointer that is not null.

int cuCtxGetCurrent(void** context) {
  *context = &message;
  return 0;
}
int cuCtxPushCurrent_v2(void*) { return 0; }
int cuCtxPopCurrent_v2(void**) { return 0; }
int cuMemAlloc_v2(unsigned long long* pointer, size_t bytes) {
  *pointer = reinterpret_cast<unsigned long long>(std::malloc(bytes));
  std::memset(reinterpret_cast<void*>(*pointer), 0xff, bytes);
  return 0;
}
int cuMemFree_v2(unsigned long long pointer) {
  std::free(reinterpret_cast<void*>(pointer));
  return 0;
}
int cuMemsetD8Async(unsigned long long pointer, unsigned char value, size_t bytes, void*) {
  std::memset(reinterpret_cast<void*>(pointer), value, bytes);
  return 0;
}
// The per-thread default stream has a number in each thread; other streams have that of their handle.
int cuStreamGetId(void* stream, unsigned long long* id) {
  if (capturing()) return 900;  // as the driver does, and the capture fails with it
  static thread_local char own;
  const bool each = stream == reinterpret_cast<void*>(2);
  *id = reinterpret_cast<unsigned long long>(each ? static_cast<void*>(&own) : stream);
  return 0;
}
int cuStreamIsCapturing(void*, int* status) {
  *status = capturing();
  return 0;
}

}  // extern "C"
