// Splits floats into bf16 terms, for the backends that multiply bf16.
//
// x = t0 + t1 + t2 with t0 the nearest bf16 of x, t1 the nearest of x - t0, and so on: one term keeps 8 bits, two 16,
// three all 24. Each term becomes a panel row of its own and the sums are added at the end.
#pragma once
#include <immintrin.h>

#include "backend.h"

namespace trak_fast {
namespace {

// Returns the nearest bf16, in a float's upper half, ties to even. NaN stays NaN, and a finite float never becomes
// infinite: the few above the largest bf16 are cut instead, and the next term carries the rest.
inline __m512i nearest_bf16(__m512i bits) {
  const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  r = _mm512_mask_mov_epi32(r, _mm512_cmpge_epu32_mask(magnitude, _mm512_set1_epi32(0x7F7F8000)), bits);
  r = _mm512_mask_or_epi32(r, _mm512_cmpgt_epu32_mask(magnitude, _mm512_set1_epi32(0x7F800000)), r,
                           _mm512_set1_epi32(0x400000));
  return _mm512_and_si512(r, _mm512_set1_epi32(static_cast<int>(0xFFFF0000)));
}

// Returns x - term, but zero where the term is not finite: inf - inf would be NaN.
inline __m512 rest_of(__m512 x, __m512i term) {
  const __m512i magnitude = _mm512_and_si512(term, _mm512_set1_epi32(0x7FFFFFFF));
  const __mmask16 finite = _mm512_cmplt_epu32_mask(magnitude, _mm512_set1_epi32(0x7F800000));
  return _mm512_maskz_sub_ps(finite, x, _mm512_castsi512_ps(term));
}

// Splits 512 floats into kTerms rows of bf16.
template <int kTerms>
inline void split_bf16(const float* x, uint16_t (*out)[kUnit]) {
  // The upper 16 bits of 32 floats: elements 1, 3, 5, ... of two registers.
  const __m512i upper_halves =
      _mm512_setr_epi32(0x00030001, 0x00070005, 0x000B0009, 0x000F000D, 0x00130011, 0x00170015, 0x001B0019, 0x001F001D,
                        0x00230021, 0x00270025, 0x002B0029, 0x002F002D, 0x00330031, 0x00370035, 0x003B0039, 0x003F003D);
  for (int64_t i = 0; i < kUnit; i += 32) {
    __m512 a = _mm512_loadu_ps(x + i), b = _mm512_loadu_ps(x + i + 16);
    for (int term = 0; term < kTerms; ++term) {
      const __m512i ta = nearest_bf16(_mm512_castps_si512(a)), tb = nearest_bf16(_mm512_castps_si512(b));
      _mm512_store_si512(out[term] + i, _mm512_permutex2var_epi16(ta, upper_halves, tb));
      a = rest_of(a, ta);
      b = rest_of(b, tb);
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
  const auto split = p.terms == 1 ? split_bf16<1> : p.terms == 2 ? split_bf16<2> : split_bf16<3>;
  split(static_cast<const float*>(p.columns), terms);
  for (int i = 0; i < p.terms; ++i) place(terms[i], p.row + i);
}

}  // namespace
}  // namespace trak_fast
