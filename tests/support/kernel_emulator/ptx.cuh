// Stands in for cuda/ptx.cuh on the host: what the PTX ISA says of each instruction, one std::thread per GPU thread.
// Of the orders that hardware may choose, copies finish at once and wgmma as late as possible.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "descriptor.h"

struct Index {
  unsigned x;
};
inline thread_local Index threadIdx, blockIdx, blockDim;

namespace emulator {

// Waits, but not for ever: a test that hangs says nothing.
template <typename Done>
void wait(std::condition_variable& changed, std::unique_lock<std::mutex>& lock, const char* what, Done done) {
  if (changed.wait_for(lock, std::chrono::seconds(100), done)) return;
  std::fprintf(stderr, "block %u thread %u waits for %s\n", blockIdx.x, threadIdx.x, what);
  std::abort();
}

// bar.sync and bar.arrive.
class Barrier {
 public:
  // Returns what to wait for.
  uint64_t arrive(int parties) {
    std::unique_lock<std::mutex> lock(mutex_);
    const uint64_t generation = generation_;
    if (++arrived_ == parties) {
      arrived_ = 0;
      ++generation_;
      changed_.notify_all();
    }
    return generation;
  }
  void wait_for(uint64_t generation) {
    std::unique_lock<std::mutex> lock(mutex_);
    wait(changed_, lock, "other threads", [&] { return generation_ != generation; });
  }
  void sync(int parties) { wait_for(arrive(parties)); }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int arrived_ = 0;
  uint64_t generation_ = 0;
};

class MBarrier {
 public:
  void init(int arrivals) { expected_ = pending_ = arrivals; }
  void arrive(int64_t bytes) {
    std::unique_lock<std::mutex> lock(mutex_);
    bytes_ += bytes;
    --pending_;
    check();
  }
  void complete(int64_t bytes) {
    std::unique_lock<std::mutex> lock(mutex_);
    bytes_ -= bytes;
    check();
  }
  void wait(uint32_t parity) {
    std::unique_lock<std::mutex> lock(mutex_);
    emulator::wait(changed_, lock, "an mbarrier", [&] { return (phase_ & 1) != parity; });
  }

 private:
  void check() {
    if (pending_ != 0 || bytes_ != 0) return;
    pending_ = expected_;
    ++phase_;
    changed_.notify_all();
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  int expected_ = 0, pending_ = 0;
  int64_t bytes_ = 0;
  uint64_t phase_ = 0;
};

// What threads of a warpgroup show each other, and of a warp.
struct Exchange {
  Barrier barrier;
  uint32_t words[128][6];
};

struct Block;

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  Barrier barrier;
  int threads;
};

// NaN in any format, so that what nobody writes is not used; and a page behind it that nobody may touch.
class Memory {
 public:
  explicit Memory(size_t bytes) : mapped_((bytes + 2 * kPage - 1) / kPage * kPage) {
    void* start = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) abort();
    start_ = static_cast<char*>(start);
    char* const guard = start_ + mapped_ - kPage;
    if (mprotect(guard, kPage, PROT_NONE) != 0) abort();
    data = guard - (bytes + 15) / 16 * 16;
    std::memset(data, 0xff, guard - data);
  }
  ~Memory() { munmap(start_, mapped_); }
  Memory(const Memory&) = delete;

  char* data;  // aligned to 16

 private:
  static constexpr size_t kPage = 4096;
  size_t mapped_;
  char* start_;
};

struct Block {
  explicit Block(size_t bytes) : memory(bytes) {}
  Memory memory;
  std::map<uint32_t, MBarrier> mbarriers;
  Barrier named[16];
  Exchange warpgroups[5], warps[32];
  Cluster* cluster;
  int rank;
  int threads;

  // As on a GPU, the dynamic shared memory does not start where swizzled tiles may.
  static constexpr uint32_t kStart = 1024 + 16;
  char* at(uint32_t address) {
    if (address < kStart) abort();
    return memory.data + (address - kStart);
  }
  uint32_t address(const void* pointer) { return uint32_t(static_cast<const char*>(pointer) - memory.data) + kStart; }
};

inline thread_local Block* block;

// A tensor map, kept where CUDA keeps its own.
struct Map {
  const char* data;
  int64_t rows, columns;
  int element_bytes, box_rows;
};

inline CUtensorMap make_map(const void* data, int64_t rows, int64_t columns, int element_bytes, int box_rows) {
  CUtensorMap map{};
  const Map fields{static_cast<const char*>(data), rows, columns, element_bytes, box_rows};
  std::memcpy(&map, &fields, sizeof fields);
  return map;
}

// 128-byte swizzle: which 16 bytes of a row of 128 depends on which of eight rows.
inline uint32_t swizzle(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

inline void copy_box(Block& to_block, uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier) {
  Map m;
  std::memcpy(&m, map, sizeof m);
  for (int row = 0; row < m.box_rows; ++row) {
    for (int byte = 0; byte < 128; ++byte) {
      const int64_t column = x + byte / m.element_bytes;
      const bool inside = y + row < m.rows && column < m.columns;
      *to_block.at(swizzle(to + row * 128 + byte)) =
          inside ? m.data[((y + row) * m.columns + column) * m.element_bytes + byte % m.element_bytes] : 0;
    }
  }
  to_block.mbarriers.at(barrier).complete(m.box_rows * 128);
}

}  // namespace emulator

// CUDA's own functions.
template <typename T>
T __ldg(const T* p) { return *p; }
template <typename T>
T __ldcg(const T* p) { return *p; }
template <typename T>
void __stcg(T* p, T v) { *p = v; }
inline void __syncwarp() { emulator::block->warps[threadIdx.x / 32].barrier.sync(32); }
inline void __syncthreads() { emulator::block->named[0].sync(emulator::block->threads); }

inline int __clz(int x) { return __builtin_clz(unsigned(x)); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frsqrt_rn(float x) { return float(1 / std::sqrt(double(x))); }
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t __reduce_max_sync(unsigned, uint32_t value) {
  emulator::Exchange& warp = emulator::block->warps[threadIdx.x / 32];
  warp.words[threadIdx.x % 32][0] = value;
  warp.barrier.sync(32);
  for (int lane = 0; lane < 32; ++lane) value = warp.words[lane][0] > value ? warp.words[lane][0] : value;
  warp.barrier.sync(32);
  return value;
}
template <typename T>
T shuffle(T value, int from) {
  emulator::Exchange& warp = emulator::block->warps[threadIdx.x / 32];
  std::memcpy(warp.words[threadIdx.x % 32], &value, 4);
  warp.barrier.sync(32);
  std::memcpy(&value, warp.words[from], 4);
  warp.barrier.sync(32);
  return value;
}
inline float __shfl_xor_sync(unsigned, float value, int mask) { return shuffle(value, threadIdx.x % 32 ^ mask); }
inline unsigned __shfl_sync(unsigned, unsigned value, int lane) { return shuffle(value, lane); }

namespace zqfp::ptx {

using emulator::block;

constexpr uint64_t kEvictNormal = 0, kEvictFirst = 0, kEvictLast = 0;

inline uint32_t shared_address(const void* pointer) { return block->address(pointer); }
template <typename T>
T* shared_pointer(uint32_t address) {
  return reinterpret_cast<T*>(block->at(address));
}
inline void barrier_init(uint32_t barrier, uint32_t arrivals) { block->mbarriers[barrier].init(arrivals); }
inline void fence_barrier_init() {}
inline uint32_t load_acquire(const uint32_t* from) { return __atomic_load_n(from, __ATOMIC_ACQUIRE); }
inline void store_relaxed(uint32_t* to, uint32_t value) { __atomic_store_n(to, value, __ATOMIC_RELAXED); }
inline uint32_t add_by_one(uint32_t* to, uint32_t value) {
  return threadIdx.x % 32 == 0 ? __atomic_fetch_add(to, value, __ATOMIC_RELAXED) : 0;
}
inline uint32_t add_acq_rel(uint32_t* to, uint32_t value) { return __atomic_fetch_add(to, value, __ATOMIC_SEQ_CST); }
inline uint32_t add_release(uint32_t* to, uint32_t value) { return __atomic_fetch_add(to, value, __ATOMIC_RELEASE); }
inline void barrier_expect(uint32_t barrier, uint32_t bytes) { block->mbarriers.at(barrier).arrive(bytes); }
inline void barrier_open(uint32_t barrier, uint32_t bytes) {
  barrier_init(barrier, 1);
  barrier_expect(barrier, bytes);
}
inline void barrier_arrive(uint32_t barrier) { block->mbarriers.at(barrier).arrive(0); }
inline void barrier_arrive_remote(uint32_t barrier, uint32_t rank) {
  block->cluster->blocks[rank]->mbarriers.at(barrier).arrive(0);
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) { block->mbarriers.at(barrier).wait(parity); }

inline void copy_bytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, uint64_t) {
  if (bytes % 16 || to % 16 || reinterpret_cast<uintptr_t>(from) % 16) abort();
  std::memcpy(block->at(to), from, bytes);
  block->mbarriers.at(barrier).complete(bytes);
}
inline void copy_box(uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier, uint64_t) {
  if (to % 1024) abort();
  // The kernel of strips: x8 comes late, so that who does not wait for it finds nothing.
  constexpr int kStripThreads = 17 * 32;
  if (block->threads == kStripThreads) std::this_thread::sleep_for(std::chrono::milliseconds(300));
  emulator::copy_box(*block, to, map, x, y, barrier);
}
inline void copy_box_to_cluster(uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier, uint16_t blocks,
                                uint64_t) {
  if (to % 1024) abort();
  for (auto& other : block->cluster->blocks) {
    if (blocks >> other->rank & 1) emulator::copy_box(*other, to, map, x, y, barrier);
  }
}
inline void prefetch_map(const CUtensorMap*) {}
inline void prefetch(const void*) {}

inline uint32_t cluster_block() { return block->rank; }
inline void cluster_sync() { block->cluster->barrier.sync(block->cluster->threads); }
inline thread_local uint64_t cluster_generation;
inline void cluster_arrive() { cluster_generation = block->cluster->barrier.arrive(block->cluster->threads); }
inline void cluster_wait() { block->cluster->barrier.wait_for(cluster_generation); }
inline void store_remote(const float* mine, float number, uint32_t barrier, uint32_t rank) {
  emulator::Block& to = *block->cluster->blocks[rank];
  std::memcpy(to.at(block->address(mine)), &number, sizeof number);
  to.mbarriers.at(barrier).complete(sizeof number);
}
inline void store_remote(const float* mine, const float (&number)[4], uint32_t barrier, uint32_t rank) {
  if (block->address(mine) % 16) abort();
  for (int i = 0; i < 4; ++i) store_remote(mine + i, number[i], barrier, rank);
}
inline float limit(float x, float most) {
  return std::isnan(x) ? x : std::copysign(std::fmin(std::fabs(x), most), x);
}
inline float power_of_2(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return x > 0x1p126f ? 0 : 1 / x; }
inline void sync_threads(int id, int threads) { block->named[id].sync(threads); }
inline void arrive_threads(int id, int threads) { block->named[id].arrive(threads); }
template <int>
void more_registers() {}
template <int>
void fewer_registers() {}
inline void wait_for_kernel_before() {}
inline void release_kernel_after() {}

template <typename T>
T load(uint32_t address) {
  if (address % sizeof(T)) abort();
  T value;
  std::memcpy(&value, block->at(address), sizeof value);
  return value;
}
inline uint4 load_16(uint32_t address) { return load<uint4>(address); }
inline uint2 load_8(uint32_t address) { return load<uint2>(address); }
inline uint32_t load_4(uint32_t address) { return load<uint32_t>(address); }
inline uint32_t load_2(uint32_t address) { return load<uint16_t>(address); }

// cp.async happens as late as it may, when its group is waited for.
inline thread_local std::vector<std::function<void()>> open_copies;
inline thread_local std::deque<std::vector<std::function<void()>>> copies;

template <int kBytes>
void copy_ahead(uint32_t to, const void* from) {
  if (to % kBytes || reinterpret_cast<uintptr_t>(from) % kBytes) abort();
  open_copies.push_back([to, from] { std::memcpy(block->at(to), from, kBytes); });
}
template <int kTo = 0, int kFrom = 0>
void copy_ahead_or_clear(uint32_t to, const void* from, int bytes, uint64_t = kEvictFirst) {
  to += kTo;
  from = static_cast<const char*>(from) + kFrom;
  if (to % 16 || reinterpret_cast<uintptr_t>(from) % 16) abort();
  open_copies.push_back([to, from, bytes] {
    std::memset(block->at(to), 0, 16);
    std::memcpy(block->at(to), from, bytes);
  });
}
inline void commit_copies() {
  copies.push_back(std::move(open_copies));
  open_copies.clear();
}
template <int kPending>
void wait_copies() {
  for (; copies.size() > kPending; copies.pop_front()) {
    for (const auto& run : copies.front()) run();
  }
}

inline void publish_to_wgmma() {}

// stmatrix.x2.trans: lane i < 16 names the place of column i % 8 of matrix i / 8; thread 4r + c/2 has row r, column c.
inline void store_transposed(uint32_t address, uint32_t first, uint32_t second) {
  emulator::Exchange& warp = block->warps[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  warp.words[lane][0] = first;
  warp.words[lane][1] = second;
  warp.barrier.sync(32);
  if (lane < 16) {
    if (address % 16) abort();
    for (int row = 0; row < 8; ++row) {
      const uint32_t pair = warp.words[4 * row + lane % 8 / 2][lane / 8];
      const uint16_t value = uint16_t(pair >> (lane % 2 * 16));
      std::memcpy(block->at(address) + 2 * row, &value, 2);
    }
  }
  warp.barrier.sync(32);
}

// ldmatrix.x4.trans: lane i names the place of row i % 8 of matrix i / 8; thread 4q + c gets rows 2c + 0..1 of column q.
inline void load_transposed(uint32_t address, uint32_t (&matrix)[4]) {
  emulator::Exchange& warp = block->warps[threadIdx.x / 32];
  const int lane = threadIdx.x % 32, q = lane / 4, c = lane % 4;
  if (address % 16) abort();
  warp.words[lane][0] = address;
  warp.barrier.sync(32);
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = load<uint16_t>(warp.words[8 * i + 2 * c][0] + 2 * q);
    matrix[i] = low | uint32_t(load<uint16_t>(warp.words[8 * i + 2 * c + 1][0] + 2 * q)) << 16;
  }
  warp.barrier.sync(32);
}

// mma.m16n8k16: thread 4q + c holds row q + 8h, columns 2c + 8b + 0..1 of A in a[h + 2b], rows 2c + 8b + 0..1 of column
// q of B in b[b], and row q + 8h, columns 2c + 0..1 of D in d[2h], d[2h + 1].
template <typename T>
void mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, T) {
  emulator::Exchange& warp = block->warps[threadIdx.x / 32];
  const int lane = threadIdx.x % 32, q = lane / 4, c = lane % 4;
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  std::memcpy(warp.words[lane], mine, sizeof mine);
  warp.barrier.sync(32);
  const auto number = [&](int of, int word, int half) {
    T value;
    std::memcpy(&value, reinterpret_cast<const char*>(&warp.words[of][word]) + 2 * half, 2);
    return float(value);
  };
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 16; ++k) {
      d[i] += number(4 * q + k % 8 / 2, i / 2 + k / 8 * 2, k % 2) *
              number(4 * (2 * c + i % 2) + k % 8 / 2, 4 + k / 8, k % 2);
    }
  }
  warp.barrier.sync(32);
}

// wgmma runs as late as it may, when its group is waited for: registers and stages given up too early show.
inline thread_local std::vector<std::function<void()>> open_group;
inline thread_local std::deque<std::vector<std::function<void()>>> groups;

inline void wgmma_fence() {}
inline void wgmma_commit() {
  groups.push_back(std::move(open_group));
  open_group.clear();
}
template <int kPending>
void wgmma_wait() {
  for (; groups.size() > kPending; groups.pop_front()) {
    for (const auto& run : groups.front()) run();
  }
}
template <int kCount>
void pin(float (&)[kCount]) {}
template <typename T>
void keep(T&) {}

}  // namespace zqfp::ptx
