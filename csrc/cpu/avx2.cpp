// AVX2 with FMA: eight rows of P in a register. Signed-sum tables of three columns for Rademacher, FMA for normal.
#include <immintrin.h>

#include "../normal_table.h"
#include "float_backend.h"
#include "table_kernel.h"

namespace trak_fast {
namespace {

struct Avx2 {
  static constexpr int kLanes = 8;
  static constexpr int kFmaBatch = 6, kTableBatch = 12;  // gradient rows whose sums fit the 16 registers
  using Wide = __m256i;
  using Words = __m256i;
  using Floats = __m256;

  static TRAK_FAST_INLINE Wide wide(uint64_t x) { return _mm256_set1_epi64x(static_cast<long long>(x)); }
  static TRAK_FAST_INLINE Wide wide_rows(uint32_t first) {
    return _mm256_add_epi64(wide(first), _mm256_setr_epi64x(0, 2, 4, 6));
  }
  static TRAK_FAST_INLINE Wide load_wide(const uint64_t* p) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  }
  static TRAK_FAST_INLINE Wide in_register(Wide x) { return x; }
  static TRAK_FAST_INLINE Wide multiply(Wide a, Wide b) { return _mm256_mul_epu32(a, b); }
  static TRAK_FAST_INLINE Wide xor2(Wide a, Wide b) { return _mm256_xor_si256(a, b); }
  static TRAK_FAST_INLINE Wide xor3(Wide a, Wide b, Wide c) { return xor2(xor2(a, b), c); }
  static TRAK_FAST_INLINE Wide high(Wide product) { return _mm256_shuffle_epi32(product, 0xF5); }
  static TRAK_FAST_INLINE Wide high_too(Wide product) { return _mm256_srli_epi64(product, 32); }
  static TRAK_FAST_INLINE Words interleave(Wide even, Wide odd) {
    return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  }

  static TRAK_FAST_INLINE Floats zero() { return _mm256_setzero_ps(); }
  static TRAK_FAST_INLINE Floats set(float x) { return _mm256_set1_ps(x); }
  static TRAK_FAST_INLINE Floats load(const float* p) { return _mm256_load_ps(p); }
  static TRAK_FAST_INLINE void store(float* p, Floats x) { _mm256_store_ps(p, x); }
  static TRAK_FAST_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static TRAK_FAST_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

  static TRAK_FAST_INLINE Floats gather(const float* table, uint32_t __attribute__((vector_size(32))) places) {
    return _mm256_i32gather_ps(table, reinterpret_cast<__m256i>(places), 4);
  }

  // Tables hold the signed sums of three columns: entry n subtracts column c where bit c of n is set, else adds it.
  static constexpr int kTableBits = 3;
  static TRAK_FAST_INLINE Floats table(const float* x) {
    const __m256i n = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return add(add(signed_by(n, 31, x[0]), signed_by(n, 30, x[1])), signed_by(n, 29, x[2]));
  }
  static TRAK_FAST_INLINE Floats look_up(const float* table, Words words) {
    return _mm256_permutevar8x32_ps(load(table), words);
  }
  static TRAK_FAST_INLINE Words shift_right(Words x, int n) { return _mm256_srli_epi32(x, n); }
  static TRAK_FAST_INLINE Words shift_left(Words x, int n) { return _mm256_slli_epi32(x, n); }
  static TRAK_FAST_INLINE Words and_mask(Words x, uint32_t mask) {
    return _mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(mask)));
  }

  static TRAK_FAST_INLINE void normal(Words words, const uint16_t* half, Floats& even, Floats& odd) {
    const __m256i positive = _mm256_srai_epi16(words, 15);  // all ones where u >= 32768
    const __m256i m = xor3(words, positive, _mm256_set1_epi16(0x7FFF));
    const __m256i sign = _mm256_andnot_si256(positive, _mm256_set1_epi16(static_cast<short>(0x8000)));
    // Gathers of 32 bits that begin an element early, so that the value lands in the high half.
    const auto* early = reinterpret_cast<const int*>(half - 1);
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xFFFF0000));
    const __m256i low = _mm256_i32gather_epi32(early, _mm256_andnot_si256(upper, m), 2);
    const __m256i top = _mm256_i32gather_epi32(early, _mm256_srli_epi32(m, 16), 2);
    even = _mm256_castsi256_ps(xor2(_mm256_and_si256(low, upper), _mm256_slli_epi32(sign, 16)));
    odd = _mm256_castsi256_ps(_mm256_and_si256(xor2(top, sign), upper));
  }

 private:
  static TRAK_FAST_INLINE Floats signed_by(__m256i n, int shift, float x) {
    const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(n, shift), _mm256_set1_epi32(INT32_MIN));
    return _mm256_xor_ps(_mm256_castsi256_ps(sign), set(x));
  }
};

}  // namespace

extern const Backend avx2_backend;
constexpr Backend avx2_backend = float_backend<Avx2, TableKernel<Avx2>>("avx2");

}  // namespace trak_fast
