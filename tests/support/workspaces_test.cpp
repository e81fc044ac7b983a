// Run by tests/ort/test_cuda_call_path.py over the driver of fake_cuda.cpp: which streams share a workspace. Exits 1 when
// two that may run at once do, or when a captured stream does not get its own.
#include <stdlib.h>

#include <thread>

#include "workspaces.h"

int main() {
  constexpr size_t kBytes = 100000;
  const auto pool = zqfp::Workspaces::shared();
  const auto at = [&](size_t handle) { return pool->get(reinterpret_cast<void*>(handle), kBytes).data; };
  const size_t own = 2;  // CU_STREAM_PER_THREAD: one handle, a stream in each thread
  void *here = at(own), *there = nullptr;
  std::thread([&] { there = at(own); }).join();
  const bool apart = here != there && at(0x1000) != at(0x2000) && at(0x1000) != here;
  const bool kept = here == at(own) && at(0x1000) == at(0x1000);
  setenv("FAKE_CAPTURING", "1", 1);
  const bool captured = here == at(own) && at(0x1000) != at(0x2000);
  return apart && kept && captured ? 0 : 1;
}
