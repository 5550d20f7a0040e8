// Numbers of 16 bits as two bytes, for the int8 products of AMX: weights and queries in the layouts that they take, and sums of products
// of both bytes.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "amx.h"
#include "four_lines_amx.h"
#include "lanes.h"
#include "numbers.h"

#if defined(HAS_AMX)
namespace {

constexpr float QUERY_STEPS = 127 * 256, WEIGHT_STEPS = 65528;

// Numbers [0, count) of 64.
INLINE __m512i load_64(const i8* p, int count) {
  return count >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8((__mmask64(1) << count) - 1, p);
}
INLINE vf each_4_times(const float* p, int quarter) {  // of 16 numbers, four
  const __m512i first = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return (vf)_mm512_permutexvar_ps(_mm512_add_epi32(first, _mm512_set1_epi32(4 * quarter)), _mm512_load_ps(p));
}
INLINE vf two_bytes(__m512i high, __m512i low) {  // of sums of products of each
  return (vf)_mm512_cvtepi32_ps(high) * 256.0f + (vf)_mm512_cvtepi32_ps(low);
}

// The 64 weights of each of four lines, high bytes in one row and low ones `group` rows behind; in a row key
// 16 m + 4 j + k is at byte 16 k + 4 m + j.
INLINE void put_weights(const vf* w, vf steps, int8_t* to, int group) {
  const __m512i by_line = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m512i low_byte = _mm512_set1_epi16(255);
  vf high[4], low[4];
  UNROLL for (int m = 0; m < 4; m++) {
    __m512i x[4];
    UNROLL for (int j = 0; j < 4; j++) x[j] = _mm512_cvtps_epi32((__m512)(w[4 * m + j] * steps));
    const __m512i a = _mm512_packus_epi32(x[0], x[1]), b = _mm512_packus_epi32(x[2], x[3]);
    const __m512i h = _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8));
    const __m512i l = _mm512_packus_epi16(_mm512_and_si512(a, low_byte), _mm512_and_si512(b, low_byte));
    high[m] = (vf)_mm512_shuffle_epi8(h, by_line), low[m] = (vf)_mm512_shuffle_epi8(l, by_line);
  }
  __m512 line[4];
  weights_by_line(high, line);
  UNROLL for (int i = 0; i < 4; i++) _mm512_store_ps(to + i * AMX_KEYS, line[i]);
  weights_by_line(low, line);
  UNROLL for (int i = 0; i < 4; i++) _mm512_store_ps(to + (group + i) * AMX_KEYS, line[i]);
}

// Quad i of vector j becomes quad j of vector i.
INLINE void turn_quads(vf (&x)[4]) {
  const __m512 a = _mm512_shuffle_f32x4((__m512)x[0], (__m512)x[1], 0x44), b = _mm512_shuffle_f32x4((__m512)x[0], (__m512)x[1], 0xee);
  const __m512 e = _mm512_shuffle_f32x4((__m512)x[2], (__m512)x[3], 0x44), f = _mm512_shuffle_f32x4((__m512)x[2], (__m512)x[3], 0xee);
  x[0] = (vf)_mm512_shuffle_f32x4(a, e, 0x88), x[1] = (vf)_mm512_shuffle_f32x4(a, e, 0xdd);
  x[2] = (vf)_mm512_shuffle_f32x4(b, f, 0x88), x[3] = (vf)_mm512_shuffle_f32x4(b, f, 0xdd);
}

INLINE vf widened(const bf16* query, int D, int d) {
  const __mmask16 valid = D - d >= W ? 0xffff : (1 << (D - d)) - 1;
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, query + d)), 16);
}
// Queries of four lines in two bytes of each number, in rows of `columns` bytes, as `decode_amx_int8.h` has them; returns what each
// is times, in all of its lanes, NaN where one of its numbers is.
INLINE vf put_queries(const bf16* const (&query)[LINES_AT_ONCE], int D, int padded, int8_t* to, int columns) {
  alignas(16) float scale[LINES_AT_ONCE] = {};
  vf steps[LINES_AT_ONCE] = {};
  UNROLL for (int j = 0; j < LINES_AT_ONCE; j++) {
    if (!query[j]) continue;
    vf top = {}, nothing = {};
    for (int d = 0; d < D; d += W) {
      const vf x = widened(query[j], D, d);
      top = vmax(top, vmax(-x, x)), nothing += x * 0.0f;
    }
    const vf largest = max_in_groups<W>(top);
    steps[j] = largest > 0.0f ? QUERY_STEPS / largest : vf{};
    scale[j] = (largest[0] + sum_in_groups<W>(nothing)[0]) / QUERY_STEPS;
  }
  for (int d = 0; d < padded; d += 64, to += 16 * columns) {
    vf high[LINES_AT_ONCE] = {}, low[LINES_AT_ONCE] = {};
    UNROLL for (int j = 0; j < LINES_AT_ONCE; j++) {
      if (!query[j]) continue;
      __m512i x[4];
      UNROLL for (int i = 0; i < 4; i++)
        x[i] = d + i * W < D ? _mm512_cvtps_epi32((__m512)(widened(query[j], D, d + i * W) * steps[j])) : _mm512_setzero_si512();
      const __m512i a = _mm512_packs_epi32(x[0], x[1]), b = _mm512_packs_epi32(x[2], x[3]);
      const __m512i half = _mm512_set1_epi16(128), low_byte = _mm512_set1_epi16(255);
      high[j] = (vf)_mm512_packs_epi16(_mm512_srai_epi16(_mm512_adds_epi16(a, half), 8), _mm512_srai_epi16(_mm512_adds_epi16(b, half), 8));
      low[j] = (vf)_mm512_packus_epi16(_mm512_and_si512(a, low_byte), _mm512_and_si512(b, low_byte));
    }
    put_words<true>(high, (char*)to, columns), put_words<true>(low, (char*)to + 16, columns);
  }
  return repeated<LINES_AT_ONCE>(scale);
}

}  // namespace
#endif
