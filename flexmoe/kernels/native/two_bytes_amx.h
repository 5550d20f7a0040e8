// Numbers of 16 bits as two bytes, for the int8 products of AMX: weights and queries in the layouts that they take, and sums of products
// of both bytes.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "amx.h"
#include "decode_amx.h"
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

INLINE vf widened(const bf16* query, int D, int d) {
  const __mmask16 valid = D - d >= W ? 0xffff : (1 << (D - d)) - 1;
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, query + d)), 16);
}
// A query in two bytes of each number; returns what they are times, NaN where one is.
float put_query(const bf16* query, int D, int8_t* to, int group) {
  vf top = {}, nothing = {};
  for (int d = 0; d < D; d += W) {
    const vf x = widened(query, D, d);
    top = vmax(top, vmax(-x, x)), nothing += x * 0.0f;
  }
  const float largest = max_in_groups<W>(top)[0], steps = largest > 0.0f ? QUERY_STEPS / largest : 0.0f;
  for (int d = 0; d < D; d += W, to += W / 4 * 8 * group) {
    const __m512i x = _mm512_cvtps_epi32((__m512)(widened(query, D, d) * steps));
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(128)), 8);
    alignas(16) int32_t quads[2][4];
    _mm_store_si128((__m128i*)quads[0], _mm512_cvtepi32_epi8(high));
    _mm_store_si128((__m128i*)quads[1], _mm512_cvtepi32_epi8(_mm512_sub_epi32(x, _mm512_slli_epi32(high, 8))));
    for (int i = 0; i < 4; i++)
      for (int byte = 0; byte < 2; byte++) std::memcpy(to + 8 * group * i + 16 * byte, &quads[byte][i], 4);
  }
  return (largest + sum_in_groups<W>(nothing)[0]) / QUERY_STEPS;
}

}  // namespace
#endif
