// What a launch of a GEMM kernel gets, by value.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "quantize_params.h"
#include "schedule.h"

namespace zqfp {

// Several layers of one input are one weight, their rows below each other, each beginning with a block of 64 rows.
constexpr int kMaxOutputs = 4;
struct Output {
  void* y;          // [m, n]
  int first_block;  // of 64 rows
  int n;
};

ZQFP_HOST_DEVICE const Output& output_of(const Output (&outputs)[kMaxOutputs], int row_block) {
  int index = 0;
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int i = 1; i < kMaxOutputs; ++i) index += row_block >= outputs[i].first_block;
  return outputs[index];
}

struct LinearParams {
  const uint8_t* codes;
  const uint8_t* group_scales;
  const float* row_scales;
  const float* a;
  const void* bias;  // or null
  Output outputs[kMaxOutputs];  // unused ones begin after the last block
  int m, n;
  int box_tokens;  // that a copy of x8, or xv, brings; in place of those beyond them a tile holds anything
  int row_blocks;  // of 64 rows
  int k_blocks;    // of 128 columns
  bool per_token;
  bool gated;   // y = silu(gate) * up: of 16 rows eight columns
  bool bfloat;  // type of y, bias, xv and u: bfloat16, else float16
};

struct GemmParams : LinearParams {
  CUtensorMap x8;  // E4M3 [m, k]
  CUtensorMap xv;  // 16 bit [m, rank]
  CUtensorMap u;   // 16 bit [rank, n]
  float* partials;     // of tiles that several workers share
  uint32_t* arrivals;  // how many of them are done; 0 between launches
  Schedule schedule;
  int lorc_steps;  // of 32 ranks
};

// Of the kernel for few tokens (strip_kernel.cuh).
struct StripParams : LinearParams {
  CUtensorMap x8;  // E4M3 [m, k]
  const void* xv;  // [m, rank]
  const void* u;   // [rank, n]
  int rank;
  int columns;  // slice_blocks
  int strips;   // of 16 rows
  int blocks;   // among which they are dealt out, for each tile of tokens
  FastDivisor by_blocks;
};

// Of the one that quantises its tokens as well (strip_tokens.cuh); x8, a and xv are not used.
struct QuantizedStripParams : StripParams {
  QuantizeParams from;
  int source;  // zqfpSource
  bool waits;  // for long: the kernel before is one of these, which lets the next one start when it does itself
  // With LoRC (strip_product.cuh).
  uint32_t* shares;  // counts them; 0 between launches
  float* slots;      // what each block of K adds: [k_blocks, m, rank]
};

// The rank that one LoRC step multiplies: its part of u takes as much shared memory as the codes of a block.
constexpr int kLorcStep = 32;

}  // namespace zqfp
