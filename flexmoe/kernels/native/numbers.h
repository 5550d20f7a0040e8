// Numbers: vectors of the machine's width, the storage types (fp32, bf16, fp16) and how they become fp32, and 2^x.
//
// The arithmetic is written with compiler vector types: GCC >= 9 or clang, any CPU; AVX-512 is what it is tuned for.
// Like every header here it is read by one file only, attention.cpp: one translation unit, so that all of it inlines
// into the kernels.

#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool many_registers = true;  // 32 vector registers, else 16
#else
constexpr bool many_registers = false;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef float vf_any __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint16_t vh_any __attribute__((vector_size(W * 2), aligned(2), may_alias));

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
struct i8 { int8_t number; };  // of a compressed head, whose scale lies behind its numbers

template <class To, class From> INLINE To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From), "bit cast");
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

INLINE float widen(float x) { return x; }
INLINE float widen(bf16 x) { return bits_of<float>(uint32_t(x.bits) << 16); }
INLINE float widen(f16 x) {
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_of<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // A half's exponent field moved into a float's is 112 too small; the product also normalises subnormals.
  return bits_of<float>(sign | bits_of<uint32_t>(bits_of<float>(rest << 13) * 0x1p112f));
}

INLINE float widen(i8 x) { return x.number; }

INLINE void narrow(float x, float* out) { *out = x; }
INLINE void narrow(float x, bf16* out) {
  uint32_t u = bits_of<uint32_t>(x);
  out->bits = x != x ? 0x7fc0 : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
INLINE void narrow(float x, f16* out) {
  uint32_t u = bits_of<uint32_t>(x), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
  if (rest > 0x7f800000) out->bits = uint16_t(sign | 0x7e00);
  else if (rest >= 0x477ff000) out->bits = uint16_t(sign | 0x7c00);  // rounds to more than 65504
  else if (rest < 0x38800000)  // subnormal half: let the float adder round at 2^-24
    out->bits = uint16_t(sign | (bits_of<uint32_t>(bits_of<float>(rest) + 0.5f) - 0x3f000000));
  else out->bits = uint16_t(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}

INLINE vf load(const float* p) { return *(const vf_any*)p; }
INLINE vf load(const bf16* p) {
#if defined(__AVX512F__)  // GCC 12 splits the conversion below in two halves
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  vh h = *(const vh_any*)p;
  return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}
INLINE vf load(const f16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__) && defined(__AVX__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vf x;
  for (int i = 0; i < W; i++) x[i] = widen(p[i]);
  return x;
#endif
}
INLINE vf load(const i8* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  vf x;
  for (int i = 0; i < W; i++) x[i] = p[i].number;
  return x;
#endif
}
INLINE void store(float* p, vf x) { *(vf_any*)p = x; }
INLINE void store(bf16* p, vf x) {
  vu u = (vu)x, rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  rounded = x != x ? (vu){} + 0x7fc0 : rounded;
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i both = (__m256i)rounded;
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1)));
#else
  *(vh_any*)p = __builtin_convertvector(rounded, vh);
#endif
}
INLINE void store(f16* p, vf x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__) && defined(__AVX__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < W; i++) narrow(x[i], p + i);
#endif
}

// Row of D elements as fp32, the rest of `padded` zero.
template <class T> INLINE void widen_row(const T* from, float* to, int D, int padded, float factor = 1.0f) {
  int d = 0;
  for (; d + W <= D; d += W) store(to + d, load(from + d) * factor);
  for (; d < D; d++) to[d] = widen(from[d]) * factor;
  for (; d < padded; d++) to[d] = 0.0f;
}
template <class T> INLINE void narrow_row(const float* from, T* to, int D, float factor) {
  int d = 0;
  for (; d + W <= D; d += W) store(to + d, load(from + d) * factor);
  for (; d < D; d++) narrow(from[d] * factor, to + d);
}

INLINE vf vmax(vf a, vf b) {  // a NaN in b is kept
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// 2^x for x <= 0, exactly 0 below -127 (also at -inf); polynomial of Cephes exp2f, relative error 2e-7.
INLINE vf exp2_nonpositive(vf x) {
  x = vmax((vf){} - 127.0f, x);
  const float to_integer = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are x rounded
  vf t = x + to_integer;
  vf r = x - (t - to_integer);
  vf p = r * 1.535336188319500e-4f + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.0f;
  return p * (vf)(((vu)t + 127) << 23);  // -127 shifts to a zero factor
}

// The same up to 2^127, for what is rounded to 16 bits afterwards: relative error 4e-6.
INLINE vf exp2_rounded(vf x) {
  x = vmax((vf){} - 127.0f, x);
  const float to_integer = 12582912.0f;
  const vf t = x + to_integer, r = x - (t - to_integer);
  vf p = r * 9.666368515387469e-3f + 5.592197584225633e-2f;
  p = p * r + 2.402234903802033e-1f;
  p = p * r + 6.931210452034270e-1f;
  p = p * r + 1.0f;
  return p * (vf)(((vu)t + 127) << 23);
}

}  // namespace
