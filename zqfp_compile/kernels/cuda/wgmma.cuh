// wgmma of 64 weight rows by N tokens. Accumulator: thread 32w+4q+c holds in d[4j + 2h + i] row 16w + 8h + q of
// column 8j + 2c + i (PTX ISA, fragment D). Every call accumulates; the caller brackets calls with fence, commit, wait.
#pragma once

#include <cstdint>

namespace zqfp {

template <int kTokens>
struct Wgmma;

// Operand numbers of the accumulators, and the accumulators themselves.
#define ZQFP_NUMBERS_8 \
  "%0, %1, %2, %3"
#define ZQFP_NUMBERS_16 \
  "%0, %1, %2, %3, %4, %5, %6, %7"
#define ZQFP_NUMBERS_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define ZQFP_NUMBERS_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ZQFP_NUMBERS_128 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ZQFP_NUMBERS_256 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define ZQFP_FLOATS_4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define ZQFP_FLOATS_8(i) ZQFP_FLOATS_4(i), ZQFP_FLOATS_4((i) + 4)
#define ZQFP_FLOATS_16(i) ZQFP_FLOATS_8(i), ZQFP_FLOATS_8((i) + 8)
#define ZQFP_FLOATS_32(i) ZQFP_FLOATS_16(i), ZQFP_FLOATS_16((i) + 16)
#define ZQFP_FLOATS_64(i) ZQFP_FLOATS_32(i), ZQFP_FLOATS_32((i) + 32)
#define ZQFP_FLOATS_128(i) ZQFP_FLOATS_64(i), ZQFP_FLOATS_64((i) + 64)

// e4m3: A in registers (fragment of m64k32), B[tokens][k] in shared memory.
// half, bfloat: A[k][rows] (transposed) and B[tokens][k] in shared memory, 16 columns of k.
#define ZQFP_DEFINE_WGMMA(N, REGISTERS, A0, A1, A2, A3, B)                                                           \
  template <>                                                                                                        \
  struct Wgmma<N> {                                                                                                  \
    static __device__ __forceinline__ void e4m3(float (&d)[N / 2], const uint32_t* a, uint64_t b) {                  \
      asm volatile(                                                                                                  \
          "{\n.reg .pred p;\nsetp.eq.u32 p, 1, 1;\n"                                                                 \
          "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" ZQFP_NUMBERS_##N                               \
          "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1;\n}"                                         \
          : ZQFP_FLOATS_##REGISTERS(0)                                                                               \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                     \
    }                                                                                                                \
    ZQFP_DEFINE_WGMMA_16(half, "f16", N, REGISTERS, A0, A1)                                                          \
    ZQFP_DEFINE_WGMMA_16(bfloat, "bf16", N, REGISTERS, A0, A1)                                                       \
  };

#define ZQFP_DEFINE_WGMMA_16(NAME, TYPE, N, REGISTERS, A, B)                                                         \
  static __device__ __forceinline__ void NAME(float (&d)[N / 2], uint64_t a, uint64_t b) {                           \
    asm volatile(                                                                                                    \
        "{\n.reg .pred p;\nsetp.eq.u32 p, 1, 1;\n"                                                                   \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" ZQFP_NUMBERS_##N                         \
        "}, %" #A ", %" #B ", p, 1, 1, 1, 0;\n}"                                                                     \
        : ZQFP_FLOATS_##REGISTERS(0)                                                                                 \
        : "l"(a), "l"(b));                                                                                           \
  }

ZQFP_DEFINE_WGMMA(8, 4, 4, 5, 6, 7, 8)
ZQFP_DEFINE_WGMMA(16, 8, 8, 9, 10, 11, 12)
ZQFP_DEFINE_WGMMA(32, 16, 16, 17, 18, 19, 20)
ZQFP_DEFINE_WGMMA(64, 32, 32, 33, 34, 35, 36)
ZQFP_DEFINE_WGMMA(128, 64, 64, 65, 66, 67, 68)
ZQFP_DEFINE_WGMMA(256, 128, 128, 129, 130, 131, 132)

#undef ZQFP_DEFINE_WGMMA
#undef ZQFP_DEFINE_WGMMA_16

}  // namespace zqfp
