// AMX: bf16 tiles, 16 x 32 times 32 x 16 in sixteen cycles.
//
// P is the tile operand that holds pairs of columns: its register row n is bit n and bit n + 16 of sixteen rows' words.
// P's tiles live in a 16 KiB buffer in the first-level cache, written one step ahead of the step being multiplied, and
// the two are interleaved by hand: while a tile product takes its sixteen cycles, the vector units make the next tile.
// A Rademacher tile costs less than the products of 32 gradient rows with it, so for bigger batches it is simply made
// again for every group of rows, whose sums then never leave the tile registers; a normal tile costs far more, so it is
// used for all groups at once.
#include "lanes_avx512.h"
#include "pack_bf16.h"
#include "philox_rows.h"

namespace trak_fast {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kTilesPerUnit = kUnit / 32;

// The panel's rows in groups of one to three tiles: [group][unit][tile of 32 columns][row][32 columns].
struct Group {
  int64_t first, size;  // in tiles
};

// The group that a tile of rows belongs to: threes, then twos; a single one only if there is but one.
TRAK_FAST_INLINE Group group_of(int64_t tile, int64_t tiles) {
  const int64_t twos = tiles == 1 ? 0 : (3 - tiles % 3) % 3, threes = (tiles - 2 * twos) / 3;
  if (tiles == 1) return {0, 1};
  if (tile < 3 * threes) return {tile / 3 * 3, 3};
  const int64_t rest = tile - 3 * threes;
  return {3 * threes + rest / 2 * 2, 2};
}

template <Kind kind>
void pack(const Pack& p) {
  pack_terms(p, [&](const uint16_t* columns, int64_t row) {
    const Group group = group_of(row / kTileRows, p.batch / kTileRows);
    auto* out = static_cast<uint8_t*>(p.panel) +
                (group.first * p.units + group.size * p.unit) * kTilesPerUnit * kTileBytes +
                (row - group.first * kTileRows) * 64;
    const int64_t tile_stride = group.size * kTileBytes;
    const auto* pairs = reinterpret_cast<const uint8_t*>(columns);
    if (kind == Kind::normal) {
      for (int64_t t = 0; t < kTilesPerUnit; ++t) {
        _mm512_store_si512(out + t * tile_stride, _mm512_loadu_si512(pairs + 64 * t));
      }
      return;
    }
    // Tile (t, v) holds pairs 64 v + 4 n + t of the unit, n = 0..15.
    const __m512i every_fourth = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
    const __m512i two_on = _mm512_add_epi32(every_fourth, _mm512_set1_epi32(2));
    for (int64_t v = 0; v < 4; ++v) {
      const __m512i a = _mm512_loadu_si512(pairs + 256 * v), b = _mm512_loadu_si512(pairs + 256 * v + 64);
      const __m512i c = _mm512_loadu_si512(pairs + 256 * v + 128), d = _mm512_loadu_si512(pairs + 256 * v + 192);
      const __m512i low01 = _mm512_permutex2var_epi32(a, every_fourth, b);
      const __m512i low23 = _mm512_permutex2var_epi32(a, two_on, b);
      const __m512i top01 = _mm512_permutex2var_epi32(c, every_fourth, d);
      const __m512i top23 = _mm512_permutex2var_epi32(c, two_on, d);
      _mm512_store_si512(out + (0 + v) * tile_stride, _mm512_shuffle_i64x2(low01, top01, 0x44));
      _mm512_store_si512(out + (4 + v) * tile_stride, _mm512_shuffle_i64x2(low01, top01, 0xEE));
      _mm512_store_si512(out + (8 + v) * tile_stride, _mm512_shuffle_i64x2(low23, top23, 0x44));
      _mm512_store_si512(out + (12 + v) * tile_stride, _mm512_shuffle_i64x2(low23, top23, 0xEE));
    }
  });
}

// Sixteen +1/-1 tile rows from sixteen rows' words. One GF(2) affine product moves bit n of a word's upper byte to the
// sign and sets the other bits of +-1's upper byte; the lower byte, 0x80, is never written.
TRAK_FAST_INLINE void write_tile(__m512i words, uint8_t* tile) {
  const __mmask64 upper_bytes = 0xAAAAAAAAAAAAAAAA;
  __m512i ones[4];
  for (auto& x : ones) x = _mm512_set1_epi16(0x3F80);
  const __m512i source[2] = {_mm512_slli_epi32(words, 8), words};
#pragma GCC unroll 16
  for (int n = 0; n < 16; ++n) {
    __m512i& x = ones[n % 4];
    x = _mm512_mask_gf2p8affine_epi64_epi8(x, upper_bytes, source[n / 8], _mm512_set1_epi64(1 << n % 8), 0x3F);
    _mm512_store_si512(tile + 64 * n, x);
  }
}

// Writes P's tiles, step after step, into two buffers in turn. Aligned to 4 KiB, and so is the panel: then loads and
// the stores in flight seldom share their low twelve address bits, which the processor would take for a dependence.
template <Kind kind>
class TileWriter {
 public:
  TileWriter(const Multiply& m, uint32_t row)
      : philox_(kind, m.seed, m.stream, row, first_block(kind, m.unit)), unit_(m.unit), half_(normal_half_table()) {
    if (kind == Kind::rademacher) {
      for (int v = 0; v < 4; ++v) draw(0, v);
    }
    for (int v = 0; v < 4; ++v) write(0, v);
  }

  // The two tiles (rows 0-15 and 16-31) of columns 32 v of a step.
  const uint8_t* tiles(int64_t step, int v) const { return tiles_[step % 2][v][0]; }

  // A quarter of a step. The Rademacher words of the step after it are drawn at the same time.
  TRAK_FAST_INLINE void write(int64_t step, int v) {
    if constexpr (kind == Kind::rademacher) {
      draw(step + 1, v);
      for (int g = 0; g < 2; ++g) write_tile(words_[step % 2][g][v], tiles_[step % 2][v][g]);
    } else {
      const auto block = static_cast<uint32_t>(first_block(kind, unit_)) + static_cast<uint32_t>(4 * step + v);
      for (int g = 0; g < 2; ++g) {
        for (uint32_t t = 0; t < 4; ++t) {
          __m512i words[4];
          philox_.words(block, t, g, words);
          for (uint32_t w = 0; w < 4; ++w) {
            _mm512_store_si512(tiles_[step % 2][v][g] + 64 * (4 * w + t), Avx512::normal_pairs(words[w], half_));
          }
        }
      }
    }
  }

 private:
  // A quarter of a step's words: even rows, then odd rows, of one group of sixteen.
  TRAK_FAST_INLINE void draw(int64_t step, int quarter) {
    __m512i half[4];
    philox_.half(static_cast<uint32_t>(unit_ + static_cast<uint64_t>(step / 4)), static_cast<uint32_t>(step % 4),
                 quarter / 2, quarter % 2, half);
    auto& words = words_[step % 2][quarter / 2];
    for (int w = 0; w < 4; ++w) words[w] = quarter % 2 == 0 ? half[w] : Avx512::interleave(words[w], half[w]);
  }

  alignas(4096) uint8_t tiles_[2][4][2][kTileBytes];
  __m512i words_[2][2][4];
  PhiloxRows<Avx512> philox_;
  uint64_t unit_;
  const uint16_t* half_;
};

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  TileConfig() {
    for (int i = 0; i < 8; ++i) row_bytes[i] = 64, rows[i] = 16;
  }
};

// The sums of one group: tile 2 i + w for gradient tile i and P's rows 16 w.
template <int kTiles>
struct Sums {
  static TRAK_FAST_INLINE void zero() {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTiles > 1) {
      _tile_zero(2);
      _tile_zero(3);
    }
    if constexpr (kTiles > 2) {
      _tile_zero(4);
      _tile_zero(5);
    }
  }

  // sums[w][gradient row][16]
  static TRAK_FAST_INLINE void load(const float* sums, int64_t stride) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + stride, 64);
    if constexpr (kTiles > 1) {
      _tile_loadd(2, sums + 256, 64);
      _tile_loadd(3, sums + stride + 256, 64);
    }
    if constexpr (kTiles > 2) {
      _tile_loadd(4, sums + 512, 64);
      _tile_loadd(5, sums + stride + 512, 64);
    }
  }

  static TRAK_FAST_INLINE void store(float* sums, int64_t stride) {
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + stride, 64);
    if constexpr (kTiles > 1) {
      _tile_stored(2, sums + 256, 64);
      _tile_stored(3, sums + stride + 256, 64);
    }
    if constexpr (kTiles > 2) {
      _tile_stored(4, sums + 512, 64);
      _tile_stored(5, sums + stride + 512, 64);
    }
  }

  // 32 columns: kTiles gradient tiles, one after the other, times two tiles of P. With six sums, two tiles are left,
  // and the gradients are walked there and back.
  static TRAK_FAST_INLINE void add(const uint8_t* gradients, const uint8_t* p) {
    if constexpr (kTiles < 3) {
      _tile_loadd(4, p, 64);
      _tile_loadd(6, gradients, 64);
      _tile_dpbf16ps(0, 6, 4);
      _tile_loadd(5, p + kTileBytes, 64);
      _tile_dpbf16ps(1, 6, 5);
      if constexpr (kTiles == 2) {
        _tile_loadd(7, gradients + kTileBytes, 64);
        _tile_dpbf16ps(2, 7, 4);
        _tile_dpbf16ps(3, 7, 5);
      }
    } else {
      _tile_loadd(6, p, 64);
      _tile_loadd(7, gradients, 64);
      _tile_dpbf16ps(0, 7, 6);
      _tile_loadd(7, gradients + kTileBytes, 64);
      _tile_dpbf16ps(2, 7, 6);
      _tile_loadd(7, gradients + 2 * kTileBytes, 64);
      _tile_dpbf16ps(4, 7, 6);
      _tile_loadd(6, p + kTileBytes, 64);
      _tile_dpbf16ps(5, 7, 6);
      _tile_loadd(7, gradients, 64);
      _tile_dpbf16ps(1, 7, 6);
      _tile_loadd(7, gradients + kTileBytes, 64);
      _tile_dpbf16ps(3, 7, 6);
    }
  }
};

// All columns of the call for one group: its sums stay in tiles.
template <Kind kind, int kTiles>
void multiply_group(TileWriter<kind>& writer, const uint8_t* gradients, int64_t units, float* sums, int64_t stride) {
  Sums<kTiles>::zero();
  for (int64_t step = 0; step < 4 * units; ++step) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      Sums<kTiles>::add(gradients + (4 * step + v) * kTiles * kTileBytes, writer.tiles(step, v));
      writer.write(step + 1, v);
    }
  }
  Sums<kTiles>::store(sums, stride);
}

// One step's columns for one of several groups: its sums come from memory and go back.
template <int kTiles>
void multiply_step(const uint8_t* p, const uint8_t* gradients, bool first, float* sums, int64_t stride) {
  if (first) {
    Sums<kTiles>::zero();
  } else {
    Sums<kTiles>::load(sums, stride);
  }
  for (int v = 0; v < 4; ++v) Sums<kTiles>::add(gradients + v * kTiles * kTileBytes, p + v * 2 * kTileBytes);
  Sums<kTiles>::store(sums, stride);
}

template <Kind kind>
void multiply_row_block(const Multiply& m, uint32_t row, float* sums) {
  const int64_t tiles = m.batch / kTileRows, stride = m.batch * 16;
  const auto* panel = static_cast<const uint8_t*>(m.panel);
  const auto at = [&](Group group, int64_t step) {
    return panel + (group.first * m.panel_units * 4 + group.size * step) * 4 * kTileBytes;
  };
  if (kind == Kind::rademacher || tiles <= 3) {
    for (int64_t tile = 0; tile < tiles;) {
      TileWriter<kind> writer(m, row);
      const Group group = group_of(tile, tiles);
      const auto multiply_tiles = group.size == 1   ? multiply_group<kind, 1>
                                  : group.size == 2 ? multiply_group<kind, 2>
                                                    : multiply_group<kind, 3>;
      multiply_tiles(writer, at(group, 0), m.units, sums + tile * 256, stride);
      tile += group.size;
    }
    return;
  }
  TileWriter<kind> writer(m, row);
  for (int64_t step = 0; step < 4 * m.units; ++step) {
    for (int64_t tile = 0; tile < tiles;) {
      const Group group = group_of(tile, tiles);
      const auto multiply_tiles = group.size == 2 ? multiply_step<2> : multiply_step<3>;
      multiply_tiles(writer.tiles(step, 0), at(group, step), step == 0, sums + tile * 256, stride);
      tile += group.size;
    }
    for (int v = 0; v < 4; ++v) writer.write(step + 1, v);
  }
}

template <Kind kind>
void multiply(const Multiply& m) {
  static const TileConfig config;
  alignas(64) float sums[kRowBlock * kMaxPanelRows];
  _tile_loadconfig(&config);
  for (int64_t r = 0; r < m.row_blocks; ++r) {
    multiply_row_block<kind>(m, m.row + static_cast<uint32_t>(kRowBlock * r), sums);
    // The call's sum enters the total as one number: rounding grows with the number of calls, not of columns.
    float* acc = m.acc + r * kRowBlock * m.batch;
    for (int64_t i = 0; i < kRowBlock * m.batch; i += 16) {
      _mm512_store_ps(acc + i, _mm512_add_ps(_mm512_load_ps(acc + i), _mm512_load_ps(sums + i)));
    }
  }
  _tile_release();
}

template <Kind kind>
constexpr Kernel make_kernel() {
  return {true, kTileRows, kUnit * 2, 16, kind == Kind::rademacher ? 4 : 1, pack<kind>, multiply<kind>};
}

const Kernel kernels[2] = {make_kernel<Kind::rademacher>(), make_kernel<Kind::normal>()};

const Kernel& kernel(Kind kind, int) { return kernels[static_cast<int>(kind)]; }

}  // namespace

extern const Backend amx_backend;
const Backend amx_backend = {"amx", kernel};

}  // namespace trak_fast
