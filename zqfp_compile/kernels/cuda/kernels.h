// The compiled GEMM kernels, one table per group size.
#pragma once

#include <atomic>
#include <cstdint>

namespace zqfp {

struct Kernel {
  // t<tokens>r<rows>s<slices>, then c<cluster>, p<promotion> and k<split> if any (config.h); t<tokens>w<pieces ahead>
  // g<warpgroups> (strip_kernel.cuh; without g: four), then q if it quantises its tokens
  const char* name;
  int tokens, rows, slices, cluster, promote, split;
  int stages;
  int threads;
  int shared_bytes;  // of kernels of strips: without layer_bytes (strips.h)
  int partial_floats;
  const void* function;
  std::atomic<uint64_t>* prepared;  // devices, one bit each, on which it may use its shared memory
  bool strips;     // strip_kernel.cuh
  bool quantizes;  // its tokens, for zqfpQuantizedLinear alone

  int gang() const { return cluster * split; }  // blocks of a cluster
};

// The kernels that plans choose from, by number; those beyond are there to be tried (zqfpTune).
enum KernelId {
  kT8,
  kT8Wide,
  kT16,
  kT16Wide,
  kT32,
  kT32Wide,
  kT64,
  kT64Wide,
  kT128Narrow,
  kT128,
  kT256,
  kT256Pair,
  kT8Halves,
  kT16Halves,
  kT32Halves,
  kT64Halves,
  kT128Halves,
  kT8Strips,
  kT16Strips,
  kT8LongStrips,
  kT2QuantizedStrips,
  kKernelCount
};

struct KernelTable {
  const Kernel* kernels;
  int count;  // at least kKernelCount, the same for all group sizes
};

KernelTable kernels_32();
KernelTable kernels_64();
KernelTable kernels_128();

// The table of a legal group size.
inline KernelTable kernels_of(int group_size) {
  return group_size == 32 ? kernels_32() : group_size == 64 ? kernels_64() : kernels_128();
}

}  // namespace zqfp
