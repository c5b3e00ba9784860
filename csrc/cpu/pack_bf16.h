// Splits floats into bf16 terms, for the backends that multiply bf16.
//
// x = t0 + t1 + t2 with t0 the nearest bf16 of x, t1 the nearest of x - t0, and so on: one term keeps 8 bits, two 16,
// three all 24. Each term becomes a panel row of its own and the sums are added at the end.
#pragma once
#include <immintrin.h>

#include "backend.h"

namespace trak_fast {
namespace {

// Nearest bf16 (in a float's upper half), ties to even. NaN stays NaN, and a finite float never becomes infinite: the
// few above the largest bf16 are cut instead, and the next term carries the rest.
inline __m512i nearest_bf16(__m512i bits) {
  const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  r = _mm512_mask_mov_epi32(r, _mm512_cmpge_epu32_mask(magnitude, _mm512_set1_epi32(0x7F7F8000)), bits);
  r = _mm512_mask_or_epi32(r, _mm512_cmpgt_epu32_mask(magnitude, _mm512_set1_epi32(0x7F800000)), r,
                           _mm512_set1_epi32(0x400000));
  return _mm512_and_si512(r, _mm512_set1_epi32(static_cast<int>(0xFFFF0000)));
}

inline void split_bf16(const float* x, int terms, uint16_t (*out)[kUnit]) {
  for (int64_t i = 0; i < kUnit; i += 16) {
    __m512 rest = _mm512_loadu_ps(x + i);
    for (int term = 0; term < terms; ++term) {
      const __m512i t = nearest_bf16(_mm512_castps_si512(rest));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out[term] + i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(t, 16)));
      // Nothing is left of an infinity (inf - inf would be NaN).
      const __mmask16 finite =
          _mm512_cmplt_epu32_mask(_mm512_and_si512(t, _mm512_set1_epi32(0x7FFFFFFF)), _mm512_set1_epi32(0x7F800000));
      rest = _mm512_maskz_sub_ps(finite, rest, _mm512_castsi512_ps(t));
    }
  }
}

// Calls place(columns, panel row) for each term of one packing call.
template <class Place>
inline void pack_terms(const Pack& p, Place place) {
  if (p.raw_bf16) {
    place(static_cast<const uint16_t*>(p.columns), p.row);
    return;
  }
  alignas(64) uint16_t terms[3][kUnit];
  split_bf16(static_cast<const float*>(p.columns), p.terms, terms);
  for (int i = 0; i < p.terms; ++i) place(terms[i], p.row + i);
}

}  // namespace
}  // namespace trak_fast
