// Stands in for CUDA's header: what the quantizer uses of a cluster.
#pragma once

#include "ptx.cuh"

namespace cooperative_groups {

class cluster_group {
 public:
  unsigned num_blocks() const { return unsigned(emulator::block->cluster->blocks.size()); }
  unsigned block_rank() const { return emulator::block->rank; }
  void sync() const { emulator::block->cluster->barrier.sync(emulator::block->cluster->threads); }
  template <typename T>
  T* map_shared_rank(T* mine, int rank) const {
    const auto offset = reinterpret_cast<const char*>(mine) - emulator::block->base;
    return reinterpret_cast<T*>(emulator::block->cluster->blocks[rank]->base + offset);
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
