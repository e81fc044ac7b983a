// Who multiplies what: output tiles and ranges of K, dealt to worker groups (a block, or a cluster of blocks).
//
// The first `whole_tiles` tiles go round the workers, each tile to one worker. The K units of all other tiles form one
// line that is cut into equal ranges, one per worker; a tile cut in this way is added up by the worker that finishes
// last, in the order of K, so the sum does not depend on timing. No worker ever waits for another. Fewer than two tiles
// per worker are cut, so cut_units() * workers fits in an int.
#pragma once

#include <cstdint>

#include "decode.h"

namespace zqfp {

struct Schedule {
  int workers;
  int row_tiles;
  int token_tiles;
  int units;        // K units of a tile
  int whole_tiles;  // tiles that are not cut
  int token_group;  // token tiles that are walked before the next row tile, for the L2 cache

  ZQFP_HOST_DEVICE int tiles() const { return row_tiles * token_tiles; }
  ZQFP_HOST_DEVICE int cut_units() const { return (tiles() - whole_tiles) * units; }
  ZQFP_HOST_DEVICE int range_begin(int worker) const { return cut_units() * worker / workers; }
  // The worker whose range holds a unit of the line. Needs workers <= cut_units().
  ZQFP_HOST_DEVICE int owner(int unit) const { return ((unit + 1) * workers - 1) / cut_units(); }
};

struct Segment {
  int tile;
  int begin, end;  // K units
};

struct TilePosition {
  int row_tile, token_tile;
};

ZQFP_HOST_DEVICE TilePosition tile_position(const Schedule& s, int tile) {
  const int group_tiles = s.row_tiles * s.token_group;
  const int first_token_tile = tile / group_tiles * s.token_group;
  const int left = s.token_tiles - first_token_tile;
  const int width = left < s.token_group ? left : s.token_group;
  const int in_group = tile % group_tiles;
  return {in_group / width, first_token_tile + in_group % width};
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
      : next_tile_(worker),
        position_(schedule.range_begin(worker)),
        end_(schedule.range_begin(worker + 1)) {}

  ZQFP_HOST_DEVICE bool next(const Schedule& schedule, Segment& segment) {
    if (next_tile_ < schedule.whole_tiles) {
      segment = {next_tile_, 0, schedule.units};
      next_tile_ += schedule.workers;
      return true;
    }
    if (position_ >= end_) return false;
    const int tile = position_ / schedule.units;
    const int begin = position_ - tile * schedule.units;
    const int left = end_ - position_;
    const int length = left < schedule.units - begin ? left : schedule.units - begin;
    segment = {schedule.whole_tiles + tile, begin, begin + length};
    position_ += length;
    return true;
  }

 private:
  int next_tile_;
  int position_, end_;
};

}  // namespace zqfp
