// Run by tests/core/test_kernel_library.py: how much shared memory kernels ask for that quantise their tokens, one after
// the other behind a kernel of somebody else. Exits 1 and says what is wrong.
#include <cstdio>

#include "config.h"
using namespace zqfp;

static bool right(const int64_t (&needed)[4]) {
  int64_t before = 0;
  for (int i = 0; i < 4; ++i) {
    const int64_t bytes = needed[i], asked = asked_shared_bytes(bytes, before);
    const bool beside = before > 0 && share_processor(before, bytes);
    // Beside the one before, or with nobody, not even a second block of its own.
    if (beside ? asked != bytes : asked < bytes || share_processor(asked, asked)) return false;
    if (before == 0 && asked < 163 * 1024) return false;
    // That the one behind a stranger is alone must not make all others so: by the third they share.
    if (i > 1 && !beside) return false;
    before = asked;
  }
  return true;
}

int main() {
  constexpr int64_t kMost = 110 * 1024, kStep = 9 * 1024;
  for (int64_t a = 40 * 1024; a < kMost; a += kStep)
    for (int64_t b = 40 * 1024; b < kMost; b += kStep)
      for (int64_t c = 40 * 1024; c < kMost; c += kStep)
        if (!right({a, b, c, a})) return std::printf("wrong behind %d, %d, %d\n", int(a), int(b), int(c)), 1;
}
