/* Exported for benchmarks and tests, no part of the stable interface. */
#ifndef ZQFP_TUNING_H
#define ZQFP_TUNING_H

#include "zqfp.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Name of kernel `index` (of any group size), or null beyond the last. */
ZQFP_API const char* zqfpGetKernelName(int index);

/* From now on, in the whole process: use kernel `index` (-1: the plan's choice); cut tiles along K never (0), always
 * (1) or as the plan likes (-1); let kernels start while the one before ends (1), not (0), or by default (-1). Sizes of
 * workspaces follow. Not thread safe. */
ZQFP_API zqfpStatus zqfpTune(int index, int cut, int overlap);

/* What a call would do on a device of so many multiprocessors: kernel index, workers, row tiles, token tiles, K units
 * of a tile, tiles that are not cut. Needs no GPU. */
ZQFP_API zqfpStatus zqfpDescribePlan(const zqfpLinearDesc* desc, int64_t m, int processors, int32_t plan[6]);

#ifdef __cplusplus
}
#endif
#endif /* ZQFP_TUNING_H */
