// AMX tiles in software, for machines without them: the intrinsics that csrc/kernels.inc uses, as the manual defines them.
// For tests alone.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace software_tiles {

struct Tile {
  int rows = 0, bytes = 0;
  alignas(64) uint8_t data[16][64] = {};
};
inline thread_local Tile tiles[8];

inline void load_config(const void* config) {
  const uint8_t* p = static_cast<const uint8_t*>(config);
  if (p[0] != 1) std::abort();  // the only palette there is
  for (int t = 0; t < 8; ++t) {
    uint16_t bytes;
    std::memcpy(&bytes, p + 16 + 2 * t, 2);
    if (bytes > 64 || p[48 + t] > 16) std::abort();
    tiles[t] = Tile{p[48 + t], bytes};
  }
}

inline void release() {
  for (Tile& t : tiles) t = Tile{};
}

inline Tile& configured(int t) {
  if (tiles[t].rows == 0) std::abort();
  return tiles[t];
}

inline void zero(int t) { std::memset(configured(t).data, 0, sizeof tiles[t].data); }

inline void load(int t, const void* base, long stride) {
  Tile& tile = configured(t);
  std::memset(tile.data, 0, sizeof tile.data);
  for (int r = 0; r < tile.rows; ++r) std::memcpy(tile.data[r], static_cast<const uint8_t*>(base) + r * stride, static_cast<size_t>(tile.bytes));
}

inline void store(int t, void* base, long stride) {
  const Tile& tile = configured(t);
  for (int r = 0; r < tile.rows; ++r) std::memcpy(static_cast<uint8_t*>(base) + r * stride, tile.data[r], static_cast<size_t>(tile.bytes));
}

inline float bf16(const uint8_t* p) {
  const uint32_t bits = static_cast<uint32_t>(p[0]) << 16 | static_cast<uint32_t>(p[1]) << 24;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// c (rows, columns) fp32 += a (rows, 2 K) b, whose row k holds inputs 2k and 2k + 1 of each column.
inline void dot_bf16(int c_tile, int a_tile, int b_tile) {
  Tile &c = configured(c_tile), &a = configured(a_tile), &b = configured(b_tile);
  if (a.rows != c.rows || b.bytes != c.bytes || a.bytes != 4 * b.rows) std::abort();
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < c.bytes; n += 4) {
      float sum;
      std::memcpy(&sum, &c.data[m][n], 4);
      for (int k = 0; k < b.rows; ++k) {
        sum += bf16(&a.data[m][4 * k]) * bf16(&b.data[k][n]);
        sum += bf16(&a.data[m][4 * k + 2]) * bf16(&b.data[k][n + 2]);
      }
      std::memcpy(&c.data[m][n], &sum, 4);
    }
}

}  // namespace software_tiles

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) ::software_tiles::load_config(config)
#define _tile_release() ::software_tiles::release()
#define _tile_zero(t) ::software_tiles::zero(t)
#define _tile_loadd(t, base, stride) ::software_tiles::load(t, base, stride)
#define _tile_stored(t, base, stride) ::software_tiles::store(t, base, stride)
#define _tile_dpbf16ps(c, a, b) ::software_tiles::dot_bf16(c, a, b)
