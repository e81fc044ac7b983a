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
    while (walk.next(s, g)) {
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

int main() {
  srand(1);
  for (int i = 0; i < 3000; ++i) {
    Schedule s{};
    s.row_tiles = 1 + rand() % 40;
    s.token_tiles = 1 + rand() % 12;
    s.units = 1 + rand() % 20;
    s.token_group = 8;
    s.workers = 1 + rand() % 24;
    const int rounds = s.tiles() / s.workers;
    s.whole_tiles = rand() % 3 == 0 ? s.tiles() : (rounds > 1 ? (rounds - 1) * s.workers : 0);
    if (s.whole_tiles < s.tiles() && s.workers > s.cut_units()) s.workers = s.cut_units();
    if (!right(s)) {
      printf("wrong: %d x %d tiles, %d units, %d workers, %d whole\n", s.row_tiles, s.token_tiles, s.units, s.workers,
             s.whole_tiles);
      return 1;
    }
  }
  return 0;
}
