// Run by tests/core/test_kernel_library.py: random schedules, each checked unit by unit. Exits 1 and says which is wrong.
#include "schedule.h"
#include <cstdio>
#include <cstdlib>
#include <vector>
using namespace zqfp;

// Every K unit of every tile is dealt once, and the sharers of a cut tile are exactly those who hold a part.
static bool right(const Schedule& s) {
  std::vector<int> owner(size_t(s.tiles()) * s.units, -1);
  std::vector<bool> seen(size_t(s.row_tiles) * s.token_tiles, false);
  for (int worker = 0; worker < s.workers; ++worker) {
    Walk walk(s, worker);
    Segment g;
    int inner_starts = 0, open_ends = 0;
    while (walk.next(s, worker, g)) {
      if (g.tile < 0 || g.tile >= s.tiles() || g.begin >= g.end || g.end > s.units) return false;
      if (g.begin == 0) {
        const TilePosition at = tile_position(s, g.tile);
        if (at.row_tile >= s.row_tiles || at.token_tile >= s.token_tiles) return false;
        const size_t place = size_t(at.row_tile) * s.token_tiles + at.token_tile;
        if (seen[place]) return false;
        seen[place] = true;
      }
      inner_starts += g.begin > 0;
      open_ends += g.begin == 0 && g.end < s.units;
      for (int u = g.begin; u < g.end; ++u) {
        int& o = owner[size_t(g.tile) * s.units + u];
        if (o != -1) return false;
        o = worker;
      }
      if (g.begin > 0 || g.end < s.units) {
        const Sharers who = sharers(s, g.tile);
        if (worker < who.first || worker > who.last || who.first == who.last) return false;
        if ((worker == who.first) != (g.begin == 0)) return false;
      }
    }
    if (inner_starts > 1 || open_ends > 1) return false;
  }
  for (int o : owner) if (o == -1) return false;
  for (int tile = s.whole_tiles; tile < s.tiles(); ++tile) {
    const Sharers who = sharers(s, tile);
    int parties = 1;
    for (int u = 1; u < s.units; ++u) {
      parties += owner[size_t(tile) * s.units + u] != owner[size_t(tile) * s.units + u - 1];
    }
    if (parties != who.last - who.first + 1) return false;
  }
  return true;
}

static bool divides(int d) {
  const FastDivisor divisor = FastDivisor::of(d);
  for (int64_t q = 0; q < 3; ++q) {  // around multiples, where it would go wrong first
    for (const int64_t n : {q * d - 1, q * d, 0x7fffffff / d * int64_t(d) - q, int64_t(0x7fffffff) - q, int64_t(rand())}) {
      if (n >= 0 && n <= 0x7fffffff && divisor.divide(int(n)) != int(n) / d) return false;
    }
  }
  return true;
}

int main() {
  srand(1);
  for (int d = 1; d < 100000; ++d) {
    if (!divides(d) || !divides(0x7fffffff - d) || !divides(1 + rand())) {
      printf("wrong: division by %d or so\n", d);
      return 1;
    }
  }
  for (int i = 0; i < 3000; ++i) {
    Schedule s{};
    s.row_tiles = 1 + rand() % 40;
    s.token_tiles = 1 + rand() % 12;
    s.units = 1 + rand() % 20;
    s.token_group = 8;
    s.workers = 1 + rand() % 24;
    const int rounds = s.tiles() / s.workers;
    s.whole_tiles = rand() % 3 == 0 ? s.tiles() : (rounds > 1 ? (rounds - 1) * s.workers : 0);
    if (rand() % 4 == 0) s.whole_tiles = rounds * s.workers;
    s.cut_workers = rand() % 2 == 0 ? s.workers : 1 + rand() % s.workers;
    if (s.whole_tiles < s.tiles() && s.cut_workers > s.cut_units()) s.cut_workers = s.cut_units();
    s.prepare();
    if (!right(s)) {
      printf("wrong: %d x %d tiles, %d units, %d workers, %d of them cut, %d whole\n", s.row_tiles, s.token_tiles,
             s.units, s.workers, s.cut_workers, s.whole_tiles);
      return 1;
    }
  }
  return 0;
}
