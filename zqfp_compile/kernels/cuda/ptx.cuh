// The PTX instructions of Hopper that CUDA C++ has no name for, one function each.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstdio>

#include "descriptor.h"

namespace zqfp::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

template <typename T>
__device__ __forceinline__ T* shared_pointer(uint32_t address) {
  return static_cast<T*>(__cvta_shared_to_generic(address));
}

// ---- mbarrier ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine and to the cluster.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// A barrier that bytes alone complete.
__device__ __forceinline__ void barrier_open(uint32_t barrier, uint32_t bytes) {
  barrier_init(barrier, 1);
  barrier_expect(barrier, bytes);
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives on the barrier at the same offset in another block of the cluster. Not .release.cluster, which costs a fence
// of all memory each time: the arrival says that shared memory was read, there are no writes to publish.
__device__ __forceinline__ void barrier_arrive_remote(uint32_t barrier, uint32_t block) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(block)
      : "memory");
}

#ifdef ZQFP_DEBUG_WAIT
// Says who waits for what, and ends the kernel, when nothing comes for about a second.
static __device__ __noinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  for (const long long start = clock64(); clock64() - start < 2000000000ll;) {
    uint32_t done;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    if (done) return;
  }
  if (threadIdx.x % 32 == 0) {
    printf("block %d thread %d: barrier at %u, parity %u\n", blockIdx.x, threadIdx.x, barrier, parity);
  }
  __trap();
}
#else
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
#endif

// ---- copies --------------------------------------------------------------------------------------------------------

// L2 policies as the copy instructions take them (createpolicy with a fraction of 1).
constexpr uint64_t kEvictNormal = 0x1000000000000000ull;
constexpr uint64_t kEvictFirst = 0x12F0000000000000ull;
constexpr uint64_t kEvictLast = 0x14F0000000000000ull;

// `bytes`: a multiple of 16, both addresses aligned to 16.
__device__ __forceinline__ void copy_bytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier,
                                           uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier,
                                         uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(barrier), "l"(policy)
      : "memory");
}

// The box goes to the same offset, and its bytes are counted on the same barrier, in every block of `blocks`.
__device__ __forceinline__ void copy_box_to_cluster(uint32_t to, const CUtensorMap* map, int x, int y,
                                                    uint32_t barrier, uint16_t blocks, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(blocks), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Asks for the line at an address, so that it lies in L2 when it is read.
__device__ __forceinline__ void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// ---- copies of a thread, for itself (cp.async) ---------------------------------------------------------------------

// 16 bytes past L1, fewer through it.
template <int kBytes>
__device__ __forceinline__ void copy_ahead(uint32_t to, const void* from) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(kEvictFirst)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes),
                 "l"(kEvictFirst)
                 : "memory");
  }
}

// `bytes` of 16, the others as zeros; kTo and kFrom bytes behind the addresses.
template <int kTo = 0, int kFrom = 0>
__device__ __forceinline__ void copy_ahead_or_clear(uint32_t to, const void* from, int bytes,
                                                    uint64_t policy = kEvictFirst) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0 + %4], [%1 + %5], 16, %2, %3;" ::"r"(to), "l"(from),
               "r"(bytes), "l"(policy), "n"(kTo), "n"(kFrom)
               : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until of the groups committed at most the last kPending are on their way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// What this thread has written to shared memory can be read by wgmma (async proxy), by whoever hears of it.
__device__ __forceinline__ void publish_to_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- memory --------------------------------------------------------------------------------------------------------

// Adds `value`, for the whole GPU to see what this thread has seen written, and the other way round; returns the old one.
__device__ __forceinline__ uint32_t add_acq_rel(uint32_t* to, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(to), "r"(value) : "memory");
  return before;
}

// The same, without what others have written.
__device__ __forceinline__ uint32_t add_release(uint32_t* to, uint32_t value) {
  uint32_t before;
  asm volatile("atom.release.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(to), "r"(value) : "memory");
  return before;
}

// One lane of a warp adds, where no other memory is spoken of, and gets the old value; the others get 0. Elected, as what a
// lane adds that the program chose is added up over lanes first, by code that waits for the old value.
__device__ __forceinline__ uint32_t add_by_one(uint32_t* to, uint32_t value) {
  uint32_t before = 0;
  asm volatile(
      "{\n.reg .pred one;\n"
      "elect.sync _|one, 0xffffffff;\n"
      "@one atom.relaxed.gpu.global.add.u32 %0, [%1], %2;\n}"
      : "+r"(before)
      : "l"(to), "r"(value)
      : "memory");
  return before;
}

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

// A write to what other blocks add to, ordered by nothing but the old values that they saw.
__device__ __forceinline__ void store_relaxed(uint32_t* to, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

// ---- cluster, named barriers, registers ----------------------------------------------------------------------------

__device__ __forceinline__ uint32_t cluster_block() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// cluster_sync in two parts, between which there may be work, and without a fence: writes before it are not published.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

// Writes a number to the place of `mine` in another block of the cluster and counts its bytes on the barrier there.
__device__ __forceinline__ void store_remote(const float* mine, float number, uint32_t barrier, uint32_t block) {
  asm volatile(
      "{\n.reg .b32 to, remote;\n"
      "mapa.shared::cluster.u32 to, %0, %3;\n"
      "mapa.shared::cluster.u32 remote, %2, %3;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [to], %1, [remote];\n}" ::"r"(
          shared_address(mine)),
      "f"(number), "r"(barrier), "r"(block)
      : "memory");
}

// Four numbers; `mine` is aligned to 16 bytes.
__device__ __forceinline__ void store_remote(const float* mine, const float (&number)[4], uint32_t barrier,
                                             uint32_t block) {
  asm volatile(
      "{\n.reg .b32 to, remote;\n"
      "mapa.shared::cluster.u32 to, %0, %6;\n"
      "mapa.shared::cluster.u32 remote, %5, %6;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [to], {%1, %2, %3, %4}, [remote];\n}" ::"r"(
          shared_address(mine)),
      "f"(number[0]), "f"(number[1]), "f"(number[2]), "f"(number[3]), "r"(barrier), "r"(block)
      : "memory");
}

__device__ __forceinline__ void sync_threads(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void arrive_threads(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- overlap with the kernels before and after on the stream; without the launch attribute both do nothing ---------

// Waits until the kernel before has ended and its writes can be read. Before it, nothing may be written, and of what is
// read only weights.
__device__ __forceinline__ void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Lets the kernel after start as soon as there is room; it still waits for this one to end.
__device__ __forceinline__ void release_kernel_after() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// ---- shared memory -------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint4 load_16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}

__device__ __forceinline__ uint2 load_8(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}

__device__ __forceinline__ uint32_t load_4(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}

__device__ __forceinline__ uint32_t load_2(uint32_t address) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address));
  return v;
}

// Two 8x8 matrices of 16-bit numbers in accumulator order, stored transposed: lane i (0..15) gives the address of
// column i%8 of matrix i/8.
__device__ __forceinline__ void store_transposed(uint32_t address, uint32_t first, uint32_t second) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(first),
               "r"(second)
               : "memory");
}

// Four 8x8 matrices of 16-bit numbers, transposed: lane i gives the address of row i % 8 of matrix i / 8. Thread 4q + c
// gets rows 2c and 2c + 1 of column q.
__device__ __forceinline__ void load_transposed(uint32_t address, uint32_t (&matrix)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(address)
               : "memory");
}

// ---- numbers -------------------------------------------------------------------------------------------------------

// x, or the number of x's sign and magnitude `most` if that is nearer to 0. NaN stays NaN.
__device__ __forceinline__ float limit(float x, float most) {
  float limited;
  asm("min.NaN.xorsign.abs.f32 %0, %1, %2;" : "=f"(limited) : "f"(x), "f"(most));
  return limited;
}

// 2^x within 2^-22, 1 / x within 2^-23 of it; both take and give 0 for what is smaller than 2^-126.
__device__ __forceinline__ float power_of_2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}
__device__ __forceinline__ float reciprocal(float x) {
  float quotient;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(quotient) : "f"(x));
  return quotient;
}

// ---- mma of a warp: m16n8k16 ---------------------------------------------------------------------------------------

__device__ __forceinline__ void mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- wgmma ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of the accumulators across this point.
template <int kCount>
__device__ __forceinline__ void pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Keeps a number or pointer in its register: the compiler does not know what it is made of.
template <typename T>
__device__ __forceinline__ void keep(T& value) {
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(value));
  } else {
    asm volatile("" : "+r"(value));
  }
}

}  // namespace zqfp::ptx
