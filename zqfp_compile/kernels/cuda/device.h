// What the library asks the CUDA driver for.
#pragma once

#include <cuda.h>

#include "status.h"

namespace zqfp {

// Devices whose properties are remembered; others are asked each time.
constexpr int kMaxDevices = 64;

// Checks that the current device is one the kernels are built for, and gives its multiprocessors.
zqfpStatus find_device(int* device, int* processors);

// A tensor map of a row-major matrix with boxes of box_rows rows by 128 bytes, in 128-byte swizzle; zeros outside.
zqfpStatus make_map(CUtensorMap* map, CUtensorMapDataType type, int element_bytes, const void* data, int64_t rows,
                    int64_t columns, int box_rows);

}  // namespace zqfp
