// The lane type of AVX-512: sixteen rows of P in a register. Shared by the backends that have AVX-512.
#pragma once
#include <immintrin.h>

#include "../normal_table.h"
#include "backend.h"

namespace trak_fast {
namespace {

struct Avx512 {
  static constexpr int kLanes = 16;
  static constexpr int kFmaBatch = 12, kTableBatch = 16;  // gradient rows whose sums fit the 32 registers
  using Wide = __m512i;                                   // eight 64-bit lanes
  using Words = __m512i;                                  // sixteen 32-bit words
  using Floats = __m512;

  static TRAK_FAST_INLINE Wide wide(uint64_t x) { return _mm512_set1_epi64(static_cast<long long>(x)); }
  // Returns first, first + 2, first + 4, ...
  static TRAK_FAST_INLINE Wide wide_rows(uint32_t first) {
    return _mm512_add_epi64(wide(first), _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14));
  }
  static TRAK_FAST_INLINE Wide load_wide(const uint64_t* p) { return _mm512_load_si512(p); }
  static TRAK_FAST_INLINE Wide in_register(Wide x) {
    asm("" : "+v"(x));
    return x;
  }
  static TRAK_FAST_INLINE Wide multiply(Wide a, Wide b) { return _mm512_mul_epu32(a, b); }
  static TRAK_FAST_INLINE Wide xor2(Wide a, Wide b) { return _mm512_xor_si512(a, b); }
  static TRAK_FAST_INLINE Wide xor3(Wide a, Wide b, Wide c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
  // A product's upper half, by shuffle or by shift: they run on different ports.
  static TRAK_FAST_INLINE Wide high(Wide product) { return _mm512_shuffle_epi32(product, _MM_PERM_DDBB); }
  static TRAK_FAST_INLINE Wide high_too(Wide product) { return _mm512_srli_epi64(product, 32); }
  static TRAK_FAST_INLINE Words interleave(Wide even, Wide odd) {
    return _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA);
  }

  static TRAK_FAST_INLINE Floats zero() { return _mm512_setzero_ps(); }
  static TRAK_FAST_INLINE Floats set(float x) { return _mm512_set1_ps(x); }
  static TRAK_FAST_INLINE Floats load(const float* p) { return _mm512_load_ps(p); }
  static TRAK_FAST_INLINE void store(float* p, Floats x) { _mm512_store_ps(p, x); }
  static TRAK_FAST_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static TRAK_FAST_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

  static TRAK_FAST_INLINE Floats gather(const float* table, uint32_t __attribute__((vector_size(64))) places) {
    // The masked form: the plain one reads an undefined register.
    return _mm512_mask_i32gather_ps(zero(), 0xFFFF, reinterpret_cast<__m512i>(places), table, 4);
  }

  // Tables hold the signed sums of four columns: entry n subtracts column c where bit c of n is set, else adds it.
  static constexpr int kTableBits = 4;
  static TRAK_FAST_INLINE Floats table(const float* x) {
    const __m512i n = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    Floats sum = signed_by(n, 31, x[0]);
    sum = add(sum, signed_by(n, 30, x[1]));
    return add(sum, add(signed_by(n, 29, x[2]), signed_by(n, 28, x[3])));
  }
  static TRAK_FAST_INLINE Floats look_up(const float* table, Words words) {
    return _mm512_permutexvar_ps(words, load(table));
  }
  static TRAK_FAST_INLINE Words shift_right(Words x, int n) { return _mm512_srli_epi32(x, static_cast<unsigned>(n)); }
  static TRAK_FAST_INLINE Words shift_left(Words x, int n) { return _mm512_slli_epi32(x, static_cast<unsigned>(n)); }
  static TRAK_FAST_INLINE Words and_mask(Words x, uint32_t mask) {
    return _mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(mask)));
  }

  // Returns sixteen pairs of normal entries as bf16: the even column's in the low half, the odd one's in the high half.
  static TRAK_FAST_INLINE Words normal_pairs(Words words, const uint16_t* half) {
    const __m512i positive = _mm512_srai_epi16(words, 15);  // all ones where u >= 32768
    const __m512i m = _mm512_ternarylogic_epi32(words, positive, _mm512_set1_epi16(0x7FFF), 0x96);
    const __m512i even = _mm512_and_si512(m, _mm512_set1_epi32(0xFFFF)), odd = _mm512_srli_epi32(m, 16);
    // Gathers of 32 bits for 16-bit elements. The odd ones begin an element early: their value lands in the high half.
    const __m512i zero = _mm512_setzero_si512();
    const __m512i low = _mm512_mask_i32gather_epi32(zero, 0xFFFF, even, half, 2);
    const __m512i top = _mm512_mask_i32gather_epi32(zero, 0xFFFF, odd, half - 1, 2);
    const __m512i both = _mm512_mask_blend_epi16(0xAAAAAAAA, low, top);
    return _mm512_ternarylogic_epi32(both, positive, _mm512_set1_epi16(static_cast<short>(0x8000)), 0xD2);
  }
  static TRAK_FAST_INLINE void normal(Words words, const uint16_t* half, Floats& even, Floats& odd) {
    const __m512i pairs = normal_pairs(words, half);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))));
  }

 private:
  static TRAK_FAST_INLINE Floats signed_by(__m512i n, unsigned shift, float x) {
    const __m512i sign = _mm512_and_si512(_mm512_slli_epi32(n, shift), _mm512_set1_epi32(INT32_MIN));
    return _mm512_castsi512_ps(_mm512_xor_si512(sign, _mm512_castps_si512(_mm512_set1_ps(x))));
  }
};

}  // namespace
}  // namespace trak_fast
