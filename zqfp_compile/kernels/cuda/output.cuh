// How finished tiles leave kernels of many tokens: consumers put them into a ring of slots in shared memory, 64 tokens
// each, and go on with their next tile while a warp of the producer's warpgroup writes them to memory.
//
// A slot has a row of 128 bytes per token, 64 weight rows of it, in which 16-byte piece c of token t lies at c ^ t % 8: no
// bank conflicts on either side.
#pragma once

#include "gated.cuh"
#include "producer.cuh"

namespace zqfp {

// What a slot holds. A negative token ends the ring.
struct SlotContent {
  int row_block, token;
};

template <class C>
__device__ __forceinline__ volatile SlotContent* slot_content(Shared<C> shared, int row, int slot) {
  return shared.template at<volatile SlotContent>(C::kContentOffset) + row * C::kOutSlots + slot;
}

__device__ __forceinline__ uint32_t slot_piece(int token, int piece) {
  return token * 128 + ((piece ^ (token % 8)) * 16);
}

// One warp: the slots of one row of warpgroups.
template <class C>
class Storer {
 public:
  __device__ __forceinline__ Storer(const GemmParams& p, Shared<C> shared, int row)
      : p_(p), shared_(shared), row_(row), lane_(threadIdx.x % 32) {}

  __device__ __forceinline__ void run() {
    for (;; ring_.advance()) {
      ptx::barrier_wait(shared_.out_full(row_, ring_.stage), ring_.parity);
      const volatile SlotContent* content = slot_content<C>(shared_, row_, ring_.stage);
      const int row_block = content->row_block, token = content->token;
      if (token < 0) return;
      if (!p_.gated) {
        copy(row_block, token);
      } else if (p_.bfloat) {
        gate<__nv_bfloat16>(row_block, token);
      } else {
        gate<__half>(row_block, token);
      }
      __syncwarp();
      if (lane_ == 0) ptx::barrier_arrive(shared_.out_empty(row_, ring_.stage));
    }
  }

 private:
  const GemmParams& p_;
  Shared<C> shared_;
  int row_, lane_;
  Ring<C::kOutSlots> ring_;

  // Eight lanes write the 128 bytes of a token, four tokens at a time.
  __device__ __forceinline__ void copy(int row_block, int token) const {
    constexpr int kAtOnce = 4;
    const Output& output = output_of(p_.outputs, row_block);
    const int piece = lane_ % 8, column = (row_block - output.first_block) * kBlockRows + piece * 8;
    const int left = column < output.n ? p_.m - token : 0;
    const char* slot = ptx::shared_pointer<char>(shared_.out(row_, ring_.stage));
    uint16_t* y = static_cast<uint16_t*>(output.y) + int64_t(token) * output.n + column;
    for (int first = lane_ / 8; first < C::kOutTokens; first += 4 * kAtOnce) {
      uint4 eight[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        eight[i] = *reinterpret_cast<const uint4*>(slot + slot_piece(first + 4 * i, piece));
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int row = first + 4 * i;
        if (row < left) *reinterpret_cast<uint4*>(y + int64_t(row) * output.n) = eight[i];
      }
    }
  }

  // Of the 128 bytes each two pieces are eight of gate and eight of up. Four lanes write a token; the consumers, whose tensor
  // core would wait, need not compute SiLU.
  template <typename T>
  __device__ __forceinline__ void gate(int row_block, int token) const {
    const int piece = lane_ % 4, column = row_block * (kBlockRows / 2) + piece * 8, n = p_.outputs[0].n;
    const int left = column < n ? p_.m - token : 0;
    const char* slot = ptx::shared_pointer<char>(shared_.out(row_, ring_.stage));
    T* y = static_cast<T*>(p_.outputs[0].y) + int64_t(token) * n + column;
#pragma unroll 2
    for (int row = lane_ / 4; row < C::kOutTokens; row += 8) {
      const auto gate = load_eight(reinterpret_cast<const T*>(slot + slot_piece(row, 2 * piece)), true);
      const auto up = load_eight(reinterpret_cast<const T*>(slot + slot_piece(row, 2 * piece + 1)), true);
      const Eight<T> h = silu_mul(gate, up);
      if (row < left) store_eight(h, y + int64_t(row) * n);
    }
  }
};

}  // namespace zqfp
