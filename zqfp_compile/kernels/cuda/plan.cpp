#include "plan.h"

#include <algorithm>
#include <cstdint>

#include "config.h"
#include "launch.h"
#include "strips.h"

namespace zqfp {
namespace {

constexpr int kTokenGroup = 8;
constexpr int kMaxRowsPerTile = 4;
static_assert(2 * kMaxProcessors * kMaxRowsPerTile * sizeof(uint32_t) <= ZQFP_WORKSPACE_ZEROED_BYTES,
              "a counter for each row of warpgroups of each cut tile; workers are fewer where they are clusters");

// What kernels cost on an H100, in cycles of a multiprocessor beyond an empty launch: a unit of K, the start and end of a tile,
// and once the exchange of sums where tiles are cut, all in two, all in more, or where the ranges end; all but the last
// exchange of two blocks that share K is hidden. Fitted to 1832 measurements (docs/kernel.md), within 3 to 6%.
struct Cost {
  int unit, tile, in_two, in_more, ragged;
};
constexpr int kTileStart = 3160;
// Reading blocks of 64 x 128 from memory, by all multiprocessors together, and what of it comes during a tile's start.
constexpr double kReadBlock = 2.33;
constexpr int64_t kReadEarly = 1000;
constexpr Cost kCosts[kT8Strips] = {
    {1021, 749, 2364, 2364, 5257},     // kT8
    {1105, 0, 2309, 3052, 5954},       // kT8Wide
    {1047, 969, 2427, 2444, 5329},     // kT16
    {1151, 53, 2523, 3552, 5974},      // kT16Wide
    {1059, 1578, 2650, 2690, 6106},    // kT32
    {1229, 428, 2718, 4268, 6255},     // kT32Wide
    {1358, 2140, 3639, 3639, 8114},    // kT64
    {1269, 1499, 4396, 6257, 8693},    // kT64Wide
    {786, 3011, 4565, 4598, 10302},    // kT128Narrow
    {915, 1677, 6792, 9767, 11798},    // kT128
    {1118, 4065, 9529, 17769, 19935},  // kT256
    {1098, 4065, 9529, 17769, 19935},  // kT256Pair
    {1047, 784, 800, 0, 0},            // kT8Halves
    {1080, 996, 850, 0, 0},            // kT16Halves
    {1116, 1594, 347, 0, 0},           // kT32Halves
    {1471, 2025, 1900, 0, 0},          // kT64Halves
    {811, 3250, 0, 0, 0},              // kT128Halves
};

// Of a strip: a block of K, in all but a processor's first strip no less than the warp takes that finishes it, and what does not
// overlap; and once: each of the first blocks of K, which have to come, a token's block, and the rest.
struct StripCost {
  double block, token_block;
  int least, end, first_block, launch;
};
constexpr int kFirstBlocks = 32;
constexpr StripCost kStripCosts[kT2QuantizedStrips - kT8Strips] = {
    {72, 0.4, 1500, 370, 72, 1175},    // kT8Strips
    {72, 1.2, 1800, 830, 162, 635},    // kT16Strips
    {64.5, 1.3, 1500, 625, 120, 375},  // kT8LongStrips
};

// Three pieces ahead, not two.
bool has_long_strips(const Kernel& kernel) { return kernel.strips && kernel.tokens == 8 && kernel.stages > 2; }

// Strips whose x8 fits in shared memory, and its chunks among the barriers; of two blocks where a kernel quantises it.
bool strips_fit(const Kernel& kernel, const zqfpLinearDesc& desc) {
  const int64_t bytes = strip_shared_bytes(kernel, desc);
  if (kernel.quantizes) return share_processor(bytes, bytes);
  return desc.k <= kMaxStripColumns && bytes <= kMaxSharedBytes;
}

bool can_compute(const Kernel& kernel, const zqfpLinearDesc& desc) {
  if (kernel.quantizes || (kernel.strips && !strips_fit(kernel, desc))) return false;
  return kernel.split == 1 || desc.k > int64_t(kBlockColumns) * kernel.slices;  // two units, one for each
}

Schedule tiles_of(const zqfpLinearDesc& desc, int64_t m, const Kernel& kernel) {
  Schedule s{};
  s.row_tiles = int(divide_up(desc.n, int64_t(kBlockRows) * kernel.rows * kernel.cluster));
  s.token_tiles = int(divide_up(m, kernel.tokens));
  s.units = int(divide_up(divide_up(desc.k, kBlockColumns), kernel.slices));
  s.token_group = kTokenGroup;
  return s;
}

// A schedule and the cycles it takes.
struct Deal {
  Schedule schedule;
  int64_t cycles;
};

// By workers of one processor, or of two, each with half of K.
Deal deal_whole(Schedule s, int workers, int split, const Cost& cost, int64_t reading) {
  s.workers = std::min(s.tiles(), workers);
  s.whole_tiles = s.tiles();
  s.cut_workers = 1;
  const int64_t tile = divide_up(s.units, split) * cost.unit + cost.tile;
  const int64_t all = std::max(divide_up(s.tiles(), workers) * tile, reading + cost.tile);
  return {s, kTileStart + all + (split > 1 ? cost.in_two : 0)};
}

// The last `rest` tiles are cut. So many pieces each that all are cut at the same places, if that idles few.
Deal deal_cut(Schedule s, int processors, const Cost& cost, int rest, int64_t reading) {
  constexpr double kFew = 0.05;
  const int pieces = rest < processors ? processors / rest : 0;
  const bool aligned = rest * pieces >= processors * (1 - kFew);
  s.whole_tiles = s.tiles() - rest;
  s.workers = processors;
  s.cut_workers = std::min(aligned || pieces > 1 ? rest * pieces : processors, s.cut_units());
  if (s.whole_tiles == 0) s.workers = s.cut_workers;
  const int64_t whole = s.whole_tiles / processors * (int64_t(s.units) * cost.unit + cost.tile);
  const int64_t cut = divide_up(s.cut_units(), s.cut_workers) * cost.unit + divide_up(rest, processors) * cost.tile;
  const bool ragged = s.cut_workers % rest != 0;
  const int exchange = ragged ? cost.ragged : s.cut_workers == 2 * rest ? cost.in_two : cost.in_more;
  return {s, kTileStart + std::max(whole + cut, reading + cost.tile) + exchange};
}

// Strips are never cut.
Deal deal_strips(const zqfpLinearDesc& desc, int64_t m, const Kernel& kernel, int processors) {
  const int id = has_long_strips(kernel) ? kT8LongStrips : kernel.tokens > 8 ? kT16Strips : kT8Strips;
  const StripCost& cost = kStripCosts[id - kT8Strips];
  Schedule s{};
  s.row_tiles = int(divide_up(desc.n, kStripRows));
  s.token_tiles = int(divide_up(m, kernel.tokens));
  s.units = int(divide_up(desc.k, kBlockColumns));
  s.whole_tiles = s.tiles();
  s.workers = std::min(s.row_tiles, processors);
  s.cut_workers = s.token_group = 1;
  const int64_t strip = int64_t(s.units * cost.block), rounds = divide_up(s.row_tiles, s.workers);
  const int64_t strips = strip + (rounds - 1) * std::max<int64_t>(strip, cost.least) + rounds * cost.end;
  const int64_t tokens = int64_t(std::min<int64_t>(m, kernel.tokens) * s.units * cost.token_block);
  const int64_t start = std::min(s.units, kFirstBlocks) * cost.first_block + cost.launch;
  return {s, (strips + tokens + start) * s.token_tiles};
}

Deal deal_out(const Schedule& tiles, const Kernel& kernel, int processors, const Cost& cost, Cut cut) {
  processors /= kernel.gang();
  const int rounds = tiles.tiles() / processors, rest = tiles.tiles() % processors;
  const int64_t blocks = int64_t(tiles.row_tiles) * kernel.rows * kernel.cluster * tiles.units * kernel.slices;
  const int64_t reading = int64_t(double(blocks) * kReadBlock) - kReadEarly;
  Deal best = deal_whole(tiles, processors, kernel.split, cost, reading);
  if (rest == 0 || cut == Cut::kNever || kernel.split > 1) return best;
  if (cut == Cut::kAlways) best.cycles = INT64_MAX;
  // What is left after the last full round, alone or with that round, which cuts it into larger pieces.
  for (const int more : {0, rounds > 0 ? processors : 0}) {
    const Deal deal = deal_cut(tiles, processors, cost, rest + more, reading);
    if (deal.cycles < best.cycles) best = deal;
  }
  return best;
}

// Variants beyond those that plans choose from cost what the one of the same tile does.
const Cost& cost_of(const KernelTable& table, int id) {
  if (id < kT8Strips) return kCosts[id];
  int like = kT256;
  for (int i = 0; i < kT8Strips; ++i) {
    const Kernel &known = table.kernels[i], &other = table.kernels[id];
    if (known.tokens == other.tokens && known.rows == other.rows && known.split == other.split) like = i;
  }
  return kCosts[like];
}

// At most the next larger tile, which is what the workspace is made for. Pairs, which read the tokens from L2 half as
// often, are faster only where a weight does not fit in L2 and is read again and again.
bool is_candidate(const Kernel& kernel, const zqfpLinearDesc& desc, int64_t m) {
  if (kernel.strips) return m <= kernel.tokens;
  constexpr int64_t kL2Bytes = 50 << 20, kManyTokens = 4096;
  return kernel.tokens < 2 * m + 8 && (kernel.cluster == 1 || (desc.n * desc.k / 2 > kL2Bytes && m >= kManyTokens));
}

}  // namespace

int64_t strip_shared_bytes(const Kernel& kernel, const zqfpLinearDesc& desc) {
  return kernel.shared_bytes + layer_bytes(kernel.tokens, int(divide_up(desc.k, kBlockColumns)), desc.lorc_rank);
}

Plan make_plan(const zqfpLinearDesc& desc, int64_t m, int processors, const Tuning& tuning) {
  const KernelTable table = kernels_of(desc.group_size);
  processors = std::min(processors, kMaxProcessors);
  Plan plan{};
  int64_t fewest = INT64_MAX;
  const int first = std::max(tuning.kernel, 0), last = tuning.kernel < 0 ? kKernelCount - 1 : tuning.kernel;
  for (int id = first; id <= last; ++id) {
    const Kernel& kernel = table.kernels[id];
    if (!can_compute(kernel, desc) || (tuning.kernel < 0 && !is_candidate(kernel, desc, m))) continue;
    const Deal deal = kernel.strips ? deal_strips(desc, m, kernel, processors)
                                    : deal_out(tiles_of(desc, m, kernel), kernel, processors, cost_of(table, id),
                                               tuning.cut);
    if (deal.cycles >= fewest) continue;
    fewest = deal.cycles;
    plan = {&kernel, deal.schedule};
  }
  if (plan.kernel != nullptr) plan.schedule.prepare();
  return plan;
}

Plan make_quantized_plan(const zqfpLinearDesc& desc, int64_t m, int processors, const Tuning& tuning) {
  // Each block quantises all tokens: more than one are faster in a kernel of their own.
  const bool tuned = tuning.kernel >= 0;
  const Kernel& kernel = kernels_of(desc.group_size).kernels[tuned ? tuning.kernel : int(kT2QuantizedStrips)];
  if (!kernel.quantizes || m > (tuned ? kernel.tokens : 1) || !strips_fit(kernel, desc)) return {};
  return {&kernel, deal_strips(desc, m, kernel, std::min(processors, kMaxProcessors)).schedule};
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
    const bool possible = tuning.kernel >= 0 ? tuning.kernel == i : i < kKernelCount && is_candidate(kernel, desc, m);
    if (possible) floats = std::max(floats, size_t(kernel.partial_floats));
  }
  return ZQFP_WORKSPACE_ZEROED_BYTES + 2 * kMaxProcessors * floats * sizeof(float);
}

}  // namespace zqfp
