#include "plan.h"

#include <algorithm>

namespace zqfp {
namespace {

constexpr int kTokenGroup = 8;
constexpr int kMaxRowsPerTile = 4;
static_assert(2 * kMaxProcessors * kMaxRowsPerTile * sizeof(uint32_t) <= ZQFP_WORKSPACE_ZEROED_BYTES,
              "a counter for each row of warpgroups of each cut tile; workers are fewer where they are clusters");

// Shares of the multiprocessors' time that must be in use before a schedule gives up cutting tiles.
constexpr double kGoodUse = 0.92;
constexpr double kGoodUseOfAlignedCuts = 0.95;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t tiles_of(const zqfpLinearDesc& desc, int64_t m, const Kernel& kernel) {
  const int64_t rows = int64_t(kBlockRows) * kernel.rows * kernel.cluster;
  return divide_up(desc.n, rows) * divide_up(m, kernel.tokens);
}

// Without pairs, reading the tokens from L2 would bound the tensor cores; one row tile cannot make a pair.
int choose_many_tokens(const zqfpLinearDesc& desc, int64_t m, int processors, const KernelTable& table) {
  // 128 tokens per tile decode each weight twice as often per product; worth it to waste fewer tokens or processors.
  const int64_t computed_128 = divide_up(m, 128) * 128, computed_256 = divide_up(m, 256) * 256;
  const bool few_tiles = tiles_of(desc, m, table.kernels[kT256]) < processors;
  const bool pair = tiles_of(desc, 1, table.kernels[kT128]) > 1;
  if (few_tiles || computed_128 * 5 < computed_256 * 4) return pair ? kT128Pair : kT128;
  return pair ? kT256Pair : kT256;
}

int choose(const zqfpLinearDesc& desc, int64_t m, int processors, const KernelTable& table) {
  if (m <= 8) return kT8;
  if (m <= 16) return kT16;
  const bool wide = tiles_of(desc, 1, table.kernels[kT32Wide]) * 2 >= processors;
  if (m <= 32) return wide ? kT32Wide : kT32;
  if (m <= 64) return wide ? kT64Wide : kT64;
  return choose_many_tokens(desc, m, processors, table);
}

// Fewer workers than processors, where that cuts every tile at the same places and idles few.
int aligned_workers(int tiles, int processors) {
  const int pieces = processors / tiles;
  return tiles * pieces >= processors * kGoodUseOfAlignedCuts ? tiles * pieces : processors;
}

void deal_out(Schedule& s, int processors, bool streaming, Cut cut) {
  const int tiles = s.tiles(), rounds = tiles / processors, rest = tiles % processors;
  const double use = double(tiles) / (double(divide_up(tiles, processors)) * processors);
  const bool cut_tiles = cut == Cut::kAlways || (cut == Cut::kAuto && (streaming || use < kGoodUse));
  if (rest == 0 || !cut_tiles) {
    s.workers = std::min(tiles, processors);
    s.whole_tiles = tiles;
    return;
  }
  s.whole_tiles = std::max(0, rounds - 1) * processors;
  s.workers = rounds == 0 ? aligned_workers(tiles, processors) : processors;
  s.workers = std::min(s.workers, s.cut_units());
}

}  // namespace

Plan make_plan(const zqfpLinearDesc& desc, int64_t m, int processors, const Tuning& tuning) {
  const KernelTable table = kernels_of(desc.group_size);
  processors = std::min(processors, kMaxProcessors);
  const int id = tuning.kernel >= 0 ? tuning.kernel : choose(desc, m, processors, table);
  const Kernel& kernel = table.kernels[id];
  Schedule s{};
  s.row_tiles = int(divide_up(desc.n, int64_t(kBlockRows) * kernel.rows * kernel.cluster));
  s.token_tiles = int(divide_up(m, kernel.tokens));
  s.units = int(divide_up(divide_up(desc.k, kBlockColumns), kernel.slices));
  s.token_group = kTokenGroup;
  deal_out(s, processors / kernel.cluster, kernel.tokens <= 64, tuning.cut);
  return {&kernel, s};
}

bool plan_fits(const zqfpLinearDesc& desc, int64_t m) {
  constexpr int64_t kLimit = int64_t(1) << 31;
  const int64_t row_blocks = divide_up(desc.n, kBlockRows), k_blocks = divide_up(desc.k, kBlockColumns);
  const bool walk_fits = row_blocks * divide_up(std::max<int64_t>(m, 1), 8) * kTokenGroup < kLimit;
  return walk_fits && 2 * kMaxProcessors * k_blocks * kMaxProcessors < kLimit;
}

size_t workspace_bytes(const zqfpLinearDesc& desc, int64_t m, const Tuning& tuning) {
  const KernelTable table = kernels_of(desc.group_size);
  size_t floats = 0;
  for (int i = 0; i < table.count; ++i) {
    const Kernel& kernel = table.kernels[i];
    // A plan takes at most the next larger tile than m, and those beyond kKernelCount only when told to.
    const bool possible = tuning.kernel >= 0 ? tuning.kernel == i : i < kKernelCount && kernel.tokens < 2 * m + 8;
    if (possible) floats = std::max(floats, size_t(kernel.partial_floats));
  }
  return ZQFP_WORKSPACE_ZEROED_BYTES + 2 * kMaxProcessors * floats * sizeof(float);
}

}  // namespace zqfp
