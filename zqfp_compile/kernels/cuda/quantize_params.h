// What a quantizer gets, by value.
#pragma once

#include <cstdint>

namespace zqfp {

struct QuantizeInputs {
  const void* x;                // or gate
  const void* other = nullptr;  // up of SiLU x up; skip of a norm, or null
  // Of a norm alone.
  const void* gamma = nullptr;
  float epsilon = 0.f;
  void* sum = nullptr;  // written, or null
};

struct QuantizeParams : QuantizeInputs {
  const float* scale;  // or null: per token
  uint8_t* x8;
  float* a;  // or null
  const void* v;
  void* xv;
  int m, k, rank;
  int share;  // without LoRC, static scale: eights of a thread; else blocks of a cluster
};

}  // namespace zqfp
