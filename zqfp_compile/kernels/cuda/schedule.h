// Who multiplies what: output tiles and ranges of K, dealt to worker groups (a block, or a cluster of blocks).
//
// The first `whole_tiles` tiles go round the workers, each tile to one worker. The K units of all other tiles form one
// line that is cut into equal ranges, one for each of the first `cut_workers` workers; a tile cut in this way is added
// up by one of its workers in the order of K, so the sum does not depend on timing. A worker waits for another only
// where that is already writing its sums (consumer.cuh). Fewer than two tiles per worker are cut, so cut_units() *
// cut_workers fits in an int.
#pragma once

#include <cstdint>

#include "decode.h"

namespace zqfp {

// Division of 0..2^31-1 by what the host knows: a product and a shift, where the GPU's own takes a hundred cycles.
// With l = ceil(log2 d) and m = ceil(2^(31+l) / d) <= 2^32 - 1, n / d = n m >> (31 + l) (Granlund & Montgomery 1994).
struct FastDivisor {
  uint32_t multiplier;
  int shift;

  static FastDivisor of(int d) {
    int log = 0;
    while ((int64_t(1) << log) < d) ++log;
    const uint64_t power = uint64_t(1) << (31 + log);
    return {uint32_t((power + d - 1) / d), 31 + log};
  }
  ZQFP_HOST_DEVICE int divide(int n) const { return int(uint64_t(uint32_t(n)) * multiplier >> shift); }
};

struct Schedule {
  int workers;
  int cut_workers;  // that share the line of cut tiles
  int row_tiles;
  int token_tiles;
  int units;        // K units of a tile
  int whole_tiles;  // tiles that are not cut
  int token_group;  // token tiles that are walked before the next row tile, for the L2 cache
  FastDivisor by_cut_workers, by_cut_units, by_units, by_group_tiles, by_group, by_last_group;

  ZQFP_HOST_DEVICE int tiles() const { return row_tiles * token_tiles; }
  ZQFP_HOST_DEVICE int cut_units() const { return (tiles() - whole_tiles) * units; }
  ZQFP_HOST_DEVICE int range_begin(int worker) const {
    return worker < cut_workers ? by_cut_workers.divide(cut_units() * worker) : cut_units();
  }
  // The worker whose range holds a unit of the line. Needs cut_workers <= cut_units().
  ZQFP_HOST_DEVICE int owner(int unit) const { return by_cut_units.divide((unit + 1) * cut_workers - 1); }

  // Fills in the divisors, when all else is known.
  void prepare() {
    const int last = token_tiles % token_group;
    by_cut_workers = FastDivisor::of(cut_workers > 0 ? cut_workers : 1);
    by_cut_units = FastDivisor::of(cut_units() > 0 ? cut_units() : 1);
    by_units = FastDivisor::of(units);
    by_group_tiles = FastDivisor::of(row_tiles * token_group);
    by_group = FastDivisor::of(token_group);
    by_last_group = FastDivisor::of(last > 0 ? last : token_group);
  }
};

struct Segment {
  int tile;
  int begin, end;  // K units
};

struct TilePosition {
  int row_tile, token_tile;
};

ZQFP_HOST_DEVICE TilePosition tile_position(const Schedule& s, int tile) {
  const int group = s.by_group_tiles.divide(tile);
  const int first_token_tile = group * s.token_group;
  const int left = s.token_tiles - first_token_tile;
  const bool last = left < s.token_group;
  const int width = last ? left : s.token_group;
  const int in_group = tile - group * s.row_tiles * s.token_group;
  const int row_tile = (last ? s.by_last_group : s.by_group).divide(in_group);
  return {row_tile, first_token_tile + in_group - row_tile * width};
}

// The workers that share a cut tile: first..last.
struct Sharers {
  int first, last;
};

ZQFP_HOST_DEVICE Sharers sharers(const Schedule& s, int tile) {
  const int begin = (tile - s.whole_tiles) * s.units;
  return {s.owner(begin), s.owner(begin + s.units - 1)};
}

// Walks the segments of one worker.
class Walk {
 public:
  ZQFP_HOST_DEVICE Walk(const Schedule& schedule, int worker)
      : next_tile_(worker), position_(schedule.range_begin(worker)) {}

  // `worker` again, as registers are few and a thread knows it anyway.
  ZQFP_HOST_DEVICE bool next(const Schedule& schedule, int worker, Segment& segment) {
    if (next_tile_ < schedule.whole_tiles) {
      segment = {next_tile_, 0, schedule.units};
      next_tile_ += schedule.workers;
      return true;
    }
    const int end = schedule.range_begin(worker + 1);
    if (position_ >= end) return false;
    const int tile = schedule.by_units.divide(position_);
    const int begin = position_ - tile * schedule.units;
    const int left = end - position_;
    const int length = left < schedule.units - begin ? left : schedule.units - begin;
    segment = {schedule.whole_tiles + tile, begin, begin + length};
    position_ += length;
    return true;
  }

 private:
  int next_tile_;
  int position_;
};

}  // namespace zqfp
