// What a launch of the GEMM kernel gets, by value.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "schedule.h"

namespace zqfp {

// Several layers of one input are one weight, their rows below each other, each beginning with a block of 64 rows.
constexpr int kMaxOutputs = 4;
struct Output {
  void* y;          // [m, n]
  int first_block;  // of 64 rows
  int n;
};

struct GemmParams {
  CUtensorMap x8;  // E4M3 [m, k]
  CUtensorMap xv;  // 16 bit [m, rank]
  CUtensorMap u;   // 16 bit [rank, n]
  const uint8_t* codes;
  const uint8_t* group_scales;
  const float* row_scales;
  const float* a;
  const void* bias;  // or null
  float* partials;     // of tiles that several workers share
  uint32_t* arrivals;  // how many of them are done; 0 between launches
  Schedule schedule;
  Output outputs[kMaxOutputs];  // unused ones begin after the last block
  int m, n;
  int row_blocks;  // of 64 rows
  int k_blocks;    // of 128 columns
  int lorc_steps;  // of 32 ranks
  bool per_token;
  bool bfloat;  // type of y, bias, xv and u: bfloat16, else float16
};

// The rank that one LoRC step multiplies: its part of u takes as much shared memory as the codes of a block.
constexpr int kLorcStep = 32;

}  // namespace zqfp
