// Packed numbers in 16 bits on CPUs with AVX2 and without the byte and word instructions of AVX-512: 4 bits are looked up in two tables
// of bytes, 8 bits are computed and rounded sixteen at a time. Each function gives the number that is to be done next.

#pragma once

#include <cstdint>
#include <type_traits>

#include "numbers.h"

#if defined(__AVX2__) && !(defined(__AVX512BW__) && defined(__AVX512VL__))
#define PACKED_AVX2

namespace {

// The low and the high bytes of sixteen numbers of 16 bits, in both halves.
struct ByteTables { __m256i low, high; };

INLINE __m128i narrowed_bytes(__m256i x) {  // of sixteen 16-bit numbers below 256
  return _mm_packus_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}
INLINE ByteTables byte_tables(__m256i x) {
  return {_mm256_broadcastsi128_si256(narrowed_bytes(_mm256_and_si256(x, _mm256_set1_epi16(0xff)))),
          _mm256_broadcastsi128_si256(narrowed_bytes(_mm256_srli_epi16(x, 8)))};
}
// What 32 codes of a byte each stand for.
INLINE void look_up(__m256i codes, const ByteTables& tables, void* out) {
  const __m256i low = _mm256_shuffle_epi8(tables.low, codes), high = _mm256_shuffle_epi8(tables.high, codes);
  const __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
  _mm256_storeu_si256((__m256i*)out, _mm256_permute2x128_si256(a, b, 0x20));
  _mm256_storeu_si256((__m256i*)out + 1, _mm256_permute2x128_si256(a, b, 0x31));
}
// 32 codes of 4 bits, a byte each.
INLINE __m256i nibbles_at(const uint8_t* p) {
  const __m128i x = _mm_loadu_si128((const __m128i*)p), mask = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(x, mask), odd = _mm_and_si128(_mm_srli_epi16(x, 4), mask);
  return _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
}
// Bits [shift, shift + 4) of each of 32 words, a byte each.
INLINE __m256i nibbles_of_words(const uint32_t* words, int shift) {
  const __m128i by = _mm_cvtsi32_si128(shift);
  const __m256i mask = _mm256_set1_epi32(15);
  __m256i x[4];
  UNROLL for (int i = 0; i < 4; i++)
    x[i] = _mm256_and_si256(_mm256_srl_epi32(_mm256_loadu_si256((const __m256i*)words + i), by), mask);
  const __m256i mixed = _mm256_packus_epi16(_mm256_packus_epi32(x[0], x[1]), _mm256_packus_epi32(x[2], x[3]));
  return _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// Eight numbers of 8 bits.
INLINE vu bytes_at(const uint8_t* p) { return (vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }

// Sixteen numbers, none of them NaN, as bf16 in the order of the two vectors.
INLINE __m256i narrowed_finite(vf low, vf high) {
  const vu a = (vu)low, b = (vu)high;
  const __m256i both = _mm256_packus_epi32((__m256i)((a + 0x7fff + (a >> 16 & 1)) >> 16),
                                           (__m256i)((b + 0x7fff + (b >> 16 & 1)) >> 16));
  return _mm256_permute4x64_epi64(both, 0xd8);
}

#if defined(__F16C__)
// Sixteen e4m3 numbers, 2^8 times smaller; false where one is NaN. Their bits are those of such halves, subnormal ones included.
INLINE bool e4m3_at(const uint8_t* p, vf& low, vf& high) {
  const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)), rest = _mm256_set1_epi16(0x7f);
  const __m256i half = _mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(x, 8), 1), _mm256_set1_epi16(short(0xbfff)));
  low = (vf)_mm256_cvtph_ps(_mm256_castsi256_si128(half)), high = (vf)_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
  return !_mm256_movemask_epi8(_mm256_cmpeq_epi16(_mm256_and_si256(x, rest), rest));
}
#endif

}  // namespace

#endif
