// AMX: bf16 tiles, 16 x 32 times 32 x 16 in sixteen cycles.
//
// P is the tile operand that holds pairs of columns: its register row n is bit n and bit n + 16 of sixteen rows' words.
// P's tiles pass through a small buffer in the first-level cache. Making a tile and multiplying by one are interleaved
// by hand: a tile product takes sixteen cycles, in which the vector units make the next tile. A Rademacher tile costs
// less than the products of 32 gradient rows with it, so a larger batch makes it again for every group of rows, and the
// group's sums never leave the tile registers. A normal tile costs ten times as much, so it serves up to 96 rows at
// once; beyond that the sums of all groups are loaded and stored.
#include "float_backend.h"
#include "lanes_avx512.h"
#include "pack_bf16.h"
#include "philox_rows.h"
#include "table_kernel.h"

namespace trak_fast {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kTilesPerUnit = kUnit / 32;

// The panel's rows in groups of some tiles: [group][unit][tile of 32 columns][row][32 columns].
struct Group {
  int64_t first, size;  // in tiles
};

// Returns the group that a tile of rows belongs to. Rademacher: groups of three, then of two; a group of one only if
// there is a single tile. Normal: groups of six, and the rest.
template <Kind kind>
TRAK_FAST_INLINE Group group_of(int64_t tile, int64_t tiles) {
  if (kind == Kind::normal) return {tile / 6 * 6, tiles - tile / 6 * 6 < 6 ? tiles % 6 : 6};
  if (tiles == 1) return {0, 1};
  const int64_t twos = (3 - tiles % 3) % 3, threes = tiles - 2 * twos;  // tiles in groups of three
  if (tile < threes) return {tile / 3 * 3, 3};
  return {threes + (tile - threes) / 2 * 2, 2};
}

template <Kind kind>
void pack(const Pack& p) {
  pack_terms(p, [&](const uint16_t* columns, int64_t row) {
    const Group group = group_of<kind>(row / kTileRows, p.batch / kTileRows);
    auto* out = static_cast<uint8_t*>(p.panel) +
                (group.first * p.panel_units + group.size * p.unit) * kTilesPerUnit * kTileBytes +
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

// Writes sixteen tile rows of +1 and -1 from sixteen rows' words. One GF(2) affine product moves bit n of a word's
// upper byte to the sign and sets the other bits of the upper byte of +-1; the lower byte, 0x80, is never written.
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

// The Rademacher tiles of 32 rows, written step after step into two buffers in turn. They are aligned to 4 KiB, and so
// is the panel: then loads and the stores in flight seldom share their low twelve address bits, which the processor
// would take for a dependence.
class RademacherTiles {
 public:
  RademacherTiles(const Multiply& m, uint32_t row)
      : philox_(Kind::rademacher, m.seed, m.stream, row, m.unit), unit_(m.unit) {
    for (int v = 0; v < 4; ++v) draw(0, v);
    for (int v = 0; v < 4; ++v) write(0, v);
  }

  // The two tiles (rows 0-15 and 16-31) of columns 32 v of a step.
  const uint8_t* tiles(int64_t step, int v) const { return tiles_[step % 2][v][0]; }

  // Writes a quarter of a step, its two tiles at v, and draws words of the next step at the same time.
  TRAK_FAST_INLINE void write(int64_t step, int v) {
    draw(step + 1, v);
    for (int g = 0; g < 2; ++g) write_tile(words_[step % 2][g][v], tiles_[step % 2][v][g]);
  }

 private:
  // Draws a quarter of a step's words: even rows, then odd rows, of one group of sixteen.
  TRAK_FAST_INLINE void draw(int64_t step, int quarter) {
    PhiloxRows<Avx512>::Calls half[1] = {philox_.begin(static_cast<uint32_t>(unit_ + static_cast<uint64_t>(step / 4)),
                                                       static_cast<uint32_t>(step % 4), quarter / 2, quarter % 2)};
    philox_.finish(half);
    auto& words = words_[step % 2][quarter / 2];
    for (int w = 0; w < 4; ++w) words[w] = quarter % 2 == 0 ? half[0].c[w] : Avx512::interleave(words[w], half[0].c[w]);
  }

  alignas(4096) uint8_t tiles_[2][4][2][kTileBytes];
  __m512i words_[2][2][4];  // [step % 2][rows 0-15, 16-31][word]
  PhiloxRows<Avx512> philox_;
  uint64_t unit_;
};

// The normal tiles of sixteen rows, written block after block into a ring of four.
class NormalTiles {
 public:
  // rows: 0 or 1, for rows 0-15 or 16-31 of the row block.
  NormalTiles(const Multiply& m, const PhiloxRows<Avx512>& philox, int rows)
      : philox_(philox),
        block_(static_cast<uint32_t>(first_block<Kind::normal>(m.unit))),
        rows_(rows),
        half_(normal_half_table()) {
    for (uint32_t t = 0; t < 2; ++t) philox_.words(block_, t, rows_, words_ + 4 * t);
  }

  const uint8_t* tile(int64_t block) const { return tiles_[block % 4]; }

  // Writes the tile of a block; blocks must come in order. Gathers keep the load ports busy and Philox rounds the
  // others, so the words of the next two t are drawn between the gathers for these two. Four independent calls hide the
  // latency of the multiplications.
  TRAK_FAST_INLINE void write(int64_t block) {
    uint8_t* tile = tiles_[block % 4];
#pragma GCC unroll 1
    for (uint32_t t = 0; t < 4; t += 2) {
      const uint32_t next_block = block_ + static_cast<uint32_t>(block) + t / 2, next_t = 2 - t;
      PhiloxRows<Avx512>::Calls next[4];
#pragma GCC unroll 4
      for (uint32_t i = 0; i < 4; ++i) {
        next[i] = philox_.begin(next_block, next_t + i / 2, rows_, static_cast<int>(i % 2));
      }
      int r = PhiloxRows<Avx512>::kFirstRound;
#pragma GCC unroll 8
      for (uint32_t i = 0; i < 8; ++i, ++r) {
        _mm512_store_si512(tile + 256 * (i % 4) + 64 * (t + i / 4), Avx512::normal_pairs(words_[i], half_));
        if (r < kPhiloxRounds) philox_.round(r, next);
      }
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        words_[i] = Avx512::interleave(next[i / 4 * 2].c[i % 4], next[i / 4 * 2 + 1].c[i % 4]);
      }
    }
  }

 private:
  alignas(4096) uint8_t tiles_[4][kTileBytes];
  __m512i words_[8];  // for the next two t
  const PhiloxRows<Avx512>& philox_;
  uint32_t block_;
  int rows_;
  const uint16_t* half_;
};

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  TileConfig() {
    for (int i = 0; i < 8; ++i) {
      row_bytes[i] = 64;
      rows[i] = 16;
    }
  }
};

// The sums of one group for Rademacher, in tile register 2 i + w for gradient tile i and P's rows from 16 w on.
template <int kTiles>
struct PairSums {
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

  // Adds the products of 32 columns. Gradients that are used once are loaded past the first-level cache. Six sums leave
  // only two tile registers, so the gradients are walked there and back.
  static TRAK_FAST_INLINE void add(const uint8_t* gradients, const uint8_t* p) {
    if constexpr (kTiles < 3) {
      _tile_loadd(4, p, 64);
      _tile_stream_loadd(6, gradients, 64);
      _tile_dpbf16ps(0, 6, 4);
      _tile_loadd(5, p + kTileBytes, 64);
      _tile_dpbf16ps(1, 6, 5);
      if constexpr (kTiles == 2) {
        _tile_stream_loadd(7, gradients + kTileBytes, 64);
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

// The sums of one group for normal, with sixteen rows of P, in tile registers 0 to kTiles - 1. The intrinsics want
// literal numbers, hence the macro.
template <int kTiles>
struct StripSums {
#define TRAK_FAST_EACH(statement)           \
  do {                                      \
    statement(0);                           \
    if constexpr (kTiles > 1) statement(1); \
    if constexpr (kTiles > 2) statement(2); \
    if constexpr (kTiles > 3) statement(3); \
    if constexpr (kTiles > 4) statement(4); \
    if constexpr (kTiles > 5) statement(5); \
  } while (false)

  static TRAK_FAST_INLINE void zero() { TRAK_FAST_EACH(_tile_zero); }

#define TRAK_FAST_LOAD(i) _tile_loadd(i, sums + 256 * i, 64)
  static TRAK_FAST_INLINE void load(const float* sums) { TRAK_FAST_EACH(TRAK_FAST_LOAD); }
#undef TRAK_FAST_LOAD

#define TRAK_FAST_STORE(i) _tile_stored(i, sums + 256 * i, 64)
  static TRAK_FAST_INLINE void store(float* sums) { TRAK_FAST_EACH(TRAK_FAST_STORE); }
#undef TRAK_FAST_STORE

#define TRAK_FAST_ADD(i)                                   \
  do {                                                     \
    _tile_stream_loadd(7, gradients + kTileBytes * i, 64); \
    _tile_dpbf16ps(i, 7, 6);                               \
  } while (false)
  static TRAK_FAST_INLINE void add(const uint8_t* gradients, const uint8_t* p) {
    _tile_loadd(6, p, 64);
    TRAK_FAST_EACH(TRAK_FAST_ADD);
  }
#undef TRAK_FAST_ADD
#undef TRAK_FAST_EACH
};

template <int kTiles>
void multiply_pairs(RademacherTiles& p, const uint8_t* gradients, int64_t units, float* sums, int64_t stride) {
  PairSums<kTiles>::zero();
  for (int64_t step = 0; step < 4 * units; ++step) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      PairSums<kTiles>::add(gradients + (4 * step + v) * kTiles * kTileBytes, p.tiles(step, v));
      p.write(step + 1, v);
    }
  }
  PairSums<kTiles>::store(sums, stride);
}

template <int kTiles>
void multiply_strip(NormalTiles& p, const uint8_t* gradients, int64_t units, float* sums) {
  StripSums<kTiles>::zero();
  p.write(0);
  for (int64_t block = 0; block < kTilesPerUnit * units; ++block) {
    StripSums<kTiles>::add(gradients + block * kTiles * kTileBytes, p.tile(block));
    p.write(block + 1);
  }
  StripSums<kTiles>::store(sums);
}

// Multiplies four blocks that are already written, for one of several groups.
template <int kTiles>
void multiply_strip_step(const uint8_t* p, const uint8_t* gradients, bool first, float* sums) {
  if (first) {
    StripSums<kTiles>::zero();
  } else {
    StripSums<kTiles>::load(sums);
  }
  for (int v = 0; v < 4; ++v) StripSums<kTiles>::add(gradients + v * kTiles * kTileBytes, p + v * kTileBytes);
  StripSums<kTiles>::store(sums);
}

// Returns the address of a group's gradients for a block of 32 columns, counted within the call.
TRAK_FAST_INLINE const uint8_t* at(const Multiply& m, Group group, int64_t block) {
  return static_cast<const uint8_t*>(m.panel) +
         (group.first * m.panel_units * kTilesPerUnit + group.size * block) * kTileBytes;
}

void multiply_rademacher(const Multiply& m, uint32_t row, float* sums) {
  const int64_t tiles = m.batch / kTileRows;
  for (int64_t tile = 0; tile < tiles;) {
    RademacherTiles p(m, row);
    const Group group = group_of<Kind::rademacher>(tile, tiles);
    const auto multiply = group.size == 1 ? multiply_pairs<1> : group.size == 2 ? multiply_pairs<2> : multiply_pairs<3>;
    multiply(p, at(m, group, 0), m.units, sums + tile * 256, m.batch * 16);
    tile += group.size;
  }
}

void multiply_normal(const Multiply& m, uint32_t row, float* sums) {
  constexpr decltype(&multiply_strip<1>) strip[6] = {multiply_strip<1>, multiply_strip<2>, multiply_strip<3>,
                                                     multiply_strip<4>, multiply_strip<5>, multiply_strip<6>};
  constexpr decltype(&multiply_strip_step<1>) step[6] = {multiply_strip_step<1>, multiply_strip_step<2>,
                                                         multiply_strip_step<3>, multiply_strip_step<4>,
                                                         multiply_strip_step<5>, multiply_strip_step<6>};
  const int64_t tiles = m.batch / kTileRows;
  const PhiloxRows<Avx512> philox(Kind::normal, m.seed, m.stream, row, first_block<Kind::normal>(m.unit));
  for (int rows = 0; rows < 2; ++rows, sums += m.batch * 16) {
    NormalTiles p(m, philox, rows);
    if (tiles <= 6) {
      strip[tiles - 1](p, at(m, {0, tiles}, 0), m.units, sums);
      continue;
    }
    for (int64_t block = 0; block < kTilesPerUnit * m.units; block += 4) {
      for (int64_t b = block; b < block + 4; ++b) p.write(b);
      for (int64_t tile = 0; tile < tiles;) {
        const Group group = group_of<Kind::normal>(tile, tiles);
        step[group.size - 1](p.tile(0), at(m, group, block), block == 0, sums + tile * 256);
        tile += group.size;
      }
    }
  }
}

template <Kind kind>
void multiply(const Multiply& m) {
  static const TileConfig config;
  alignas(64) float sums[kRowBlock * kMaxPanelRows];
  _tile_loadconfig(&config);
  for (int64_t r = 0; r < m.row_blocks; ++r) {
    const uint32_t row = m.row + static_cast<uint32_t>(kRowBlock * r);
    if constexpr (kind == Kind::rademacher) {
      multiply_rademacher(m, row, sums);
    } else {
      multiply_normal(m, row, sums);
    }
    // The call's sum is added to the total as one number: rounding grows with the number of calls, not of columns.
    float* acc = m.acc + r * kRowBlock * m.batch;
    for (int64_t i = 0; i < kRowBlock * m.batch; i += 16) {
      _mm512_store_ps(acc + i, _mm512_add_ps(_mm512_load_ps(acc + i), _mm512_load_ps(sums + i)));
    }
  }
  _tile_release();
}

template <Kind kind>
constexpr Kernel make_kernel(int64_t row_blocks) {
  return {.bf16 = true,
          .batch_multiple = kTileRows,
          .row_bytes = kUnit * 2,
          .lanes = 16,
          .row_blocks = row_blocks,
          .pack = pack<kind>,
          .multiply = multiply<kind>};
}

constexpr Kernels kernels = {.rademacher = make_kernel<Kind::rademacher>(4), .normal = make_kernel<Kind::normal>(1)};

}  // namespace

extern const Backend amx_backend;
constexpr Backend amx_backend = {.name = "amx",
                                 .kernels = kernels,
                                 .kernels_of_one_term = kernels,
                                 .adjoint = float_adjoints<Avx512, TableKernel<Avx512>>(),
                                 .sparse = float_sparse<Avx512>()};

}  // namespace trak_fast
