// AVX-512 with the bf16 dot product: the kernels of AVX-512, but bf16 gradients meet normal entries two columns at a
// time. (Rademacher tables do more per instruction; floats would need two or three bf16 terms.) AMD's processors do a
// dot product in the time of an FMA, Intel's take twice as long.
#include "float_backend.h"
#include "lanes_avx512.h"
#include "pack_bf16.h"
#include "table_kernel.h"

namespace trak_fast {
namespace {

constexpr int64_t kPairs = kStep / 2;
constexpr int64_t kPairRow = kUnit / 2 + 16;  // 32-bit pairs; spread over cache sets as in pack_f32.h

// Panel: [unit][row][272 pairs], columns in natural order.
void pack_pairs(const Pack& p) {
  pack_terms(p, [&](const uint16_t* columns, int64_t row) {
    std::memcpy(static_cast<uint32_t*>(p.panel) + (p.unit * p.batch + row) * kPairRow, columns, kUnit * 2);
  });
}

TRAK_FAST_INLINE __m512bh as_bf16(__m512i x) { return reinterpret_cast<__m512bh>(x); }

template <int kBatch>
TRAK_FAST_INLINE void multiply_rows(const uint32_t* x, const __m512i (*p)[2], int64_t batch, float* acc) {
  __m512 sums[2][kBatch];
  for (auto& row : sums) {
    for (auto& s : row) s = _mm512_setzero_ps();
  }
  for (int64_t j = 0; j < kPairs; ++j) {
#pragma GCC unroll 16
    for (int i = 0; i < kBatch; ++i) {
      const __m512i g = _mm512_set1_epi32(static_cast<int>(x[i * kPairRow + j]));
      sums[0][i] = _mm512_dpbf16_ps(sums[0][i], as_bf16(p[j][0]), as_bf16(g));
      sums[1][i] = _mm512_dpbf16_ps(sums[1][i], as_bf16(p[j][1]), as_bf16(g));
    }
  }
  for (int w = 0; w < 2; ++w) {
    for (int i = 0; i < kBatch; ++i) {
      float* a = acc + (w * batch + i) * 16;
      _mm512_store_ps(a, _mm512_add_ps(_mm512_load_ps(a), sums[w][i]));
    }
  }
}

void multiply_normal(const Multiply& m) {
  __m512i p[kPairs][2];  // [pair of columns][rows 0-15, 16-31]
  const uint16_t* half = normal_half_table();
  for (int64_t r = 0; r < m.row_blocks; ++r) {
    const PhiloxRows<Avx512> philox(Kind::normal, m.seed, m.stream, m.row + static_cast<uint32_t>(kRowBlock * r),
                                    first_block<Kind::normal>(m.unit));
    float* acc = m.acc + r * kRowBlock * m.batch;
    for (int64_t step = 0; step < 4 * m.units; ++step) {
      for (int64_t part = 0; part < 16; ++part) {
        const auto block = static_cast<uint32_t>(first_block<Kind::normal>(m.unit)) + static_cast<uint32_t>(4 * step);
        for (int v = 0; v < 2; ++v) {
          __m512i words[4];
          philox.words(block + static_cast<uint32_t>(part / 4), static_cast<uint32_t>(part % 4), v, words);
          for (int w = 0; w < 4; ++w) p[16 * (part / 4) + 4 * w + part % 4][v] = Avx512::normal_pairs(words[w], half);
        }
      }
      const auto* x = static_cast<const uint32_t*>(m.panel) + step / 4 * m.batch * kPairRow + step % 4 * kPairs;
      int64_t b = 0;
      for (; b + Avx512::kFmaBatch <= m.batch; b += Avx512::kFmaBatch) {
        multiply_rows<Avx512::kFmaBatch>(x + b * kPairRow, p, m.batch, acc + b * 16);
      }
      for (; b < m.batch; ++b) multiply_rows<1>(x + b * kPairRow, p, m.batch, acc + b * 16);
    }
  }
}

constexpr Backend make_backend() {
  Backend backend = float_backend<Avx512, TableKernel<Avx512>>("avx512_bf16");
  backend.kernels_of_one_term.normal = {.bf16 = true,
                                        .batch_multiple = 1,
                                        .row_bytes = kPairRow * 4,
                                        .lanes = 16,
                                        .row_blocks = 1,
                                        .pack = pack_pairs,
                                        .multiply = multiply_normal};
  return backend;
}

}  // namespace

extern const Backend avx512_bf16_backend;
constexpr Backend avx512_bf16_backend = make_backend();

}  // namespace trak_fast
