// Packed matrices: the values of some rows, as the codecs of flexmoe/formats give them in torch, bit for bit.
//
// A value is (number - zero point) * scale, rounded in the dtype S of the scale and then in the dtype T that is asked
// for. Numbers of one row that share a scale are a group: 16 values of 4 bits are a table that is looked up, others are
// computed. Where outputs lie beside each other in memory (GPTQ, AWQ), some of them are transposed first.
//
// Legend: R outputs, C inputs.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "call.h"
#include "lanes.h"
#include "numbers.h"
#include "packed_avx2.h"

namespace {

enum Codec { INTEGER = 0, FP8 = 1, MXFP4 = 2, GPTQ = 3, AWQ = 4 };
enum Kind { UNSIGNED, E4M3, E2M1 };  // of a number

struct Packed {
  int codec, bits, scale_dtype, rows, columns;  // rows and columns that share a scale, 1 or more
  int zero_shift, R, C;
  int64_t packed_stride, scale_stride, zero_stride;  // bytes from one index of the first dimension to the next
  int groups() const { return (C + columns - 1) / columns; }
};
struct Matrix { const char *packed, *scale, *zero; };  // zero is null where there are no zero points

constexpr int AWQ_PLACES[8] = {0, 4, 1, 5, 2, 6, 3, 7};  // of each output in a word
constexpr int AWQ_AT_ONCE = 64, AWQ_COLUMNS = 128;  // outputs and inputs that are transposed at once

INLINE vf rounded(vf x, float) { return x; }
INLINE vf rounded(vf x, bf16) {
  const vu u = (vu)x, near = (u + 0x7fff + (u >> 16 & 1)) & 0xffff0000u;
  return x != x ? x : (vf)near;
}
INLINE vf rounded(vf x, f16) {
  f16 narrowed[W];
  store(narrowed, x);
  return load(narrowed);
}
// Rounding by `store` to T is the only one where S is T or holds every product.
template <class S, class T> INLINE vf scaled(vf x, float scale) {
  x *= scale;
  return std::is_same<S, T>::value ? x : rounded(x, S());
}

// Numbers in float32, those of e2m1 doubled: 2^128, the largest power beside them, is no float, but half of it is.
template <Kind K> INLINE vf values(vu codes, float zero) {
  if constexpr (K == UNSIGNED) return __builtin_convertvector((vi)codes, vf) - zero;
  constexpr int mantissa = K == E4M3 ? 3 : 1, bias = K == E4M3 ? 7 : 0, sign = K == E4M3 ? 7 : 3;
  const vu rest = codes & ((1u << sign) - 1), negative = (codes >> sign & 1) << 31;
  const vf normal = (vf)((rest << (23 - mantissa)) + (uint32_t(127 - bias) << 23));
  const vf small = __builtin_convertvector((vi)rest, vf) * (K == E4M3 ? 0x1p-9f : 1.0f);
  vf x = rest < (1u << mantissa) ? small : normal;
  if constexpr (K == E4M3) x = rest == 0x7f ? (vf){} + __builtin_nanf("") : x;
  return (vf)((vu)x | negative);
}

// W numbers of 4 or 8 bits that begin at a byte.
template <int BITS> INLINE vu codes_at(const uint8_t* p) {
  if constexpr (BITS == 8) {
#if defined(__AVX512F__)
    return (vu)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(PACKED_AVX2)
    return bytes_at(p);
#else
    typedef uint8_t vb __attribute__((vector_size(W)));
    vb bytes;
    std::memcpy(&bytes, p, W);
    return __builtin_convertvector(bytes, vu);
#endif
  }
  uint64_t bits = 0;
  std::memcpy(&bits, p, W / 2);
  vu word, shift;
  UNROLL for (int i = 0; i < W; i++) word[i] = uint32_t(bits >> (i / 8 * 32)), shift[i] = 4 * (i % 8);
  return word >> shift & 15;
}

template <int BITS> INLINE uint32_t code_at(const uint8_t* p, int c) {
  return BITS == 8 ? p[c] : p[c / 2] >> (c % 2 * 4) & 15;
}

// Numbers [c, end) of a row at p, one vector after the other; what is no whole vector comes one by one.
template <Kind K, int BITS, class S, class T>
void group_of_any(const uint8_t* p, int c, int end, float zero, float scale, T* out) {
  auto some = [&](int count) {
    vu codes = {};
    T last[W];
    for (int i = 0; i < count; i++) codes[i] = code_at<BITS>(p, c + i);
    store(last, scaled<S, T>(values<K>(codes, zero), scale));
    std::memcpy(out + c, last, count * sizeof(T));
    c += count;
  };
  if (BITS == 4 && c % 2 && c < end) some(1);
  for (; c + W <= end; c += W)
    store(out + c, scaled<S, T>(values<K>(codes_at<BITS>(p + c * BITS / 8), zero), scale));
  if (c < end) some(end - c);
}

// Whether no product with a scale is NaN or subnormal: some conversions of CPUs take subnormal numbers for 0.
INLINE bool is_plain(float scale) {
  const float size = std::fabs(scale);
  return size == 0 || (size > 0x1p-100f && size < 0x1p100f);
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)
INLINE __m256i narrowed(vf x, bf16) {
  const vu near = (vu)rounded(x, bf16()) >> 16;
  return _mm512_cvtepi32_epi16((__m512i)(x != x ? (vu){} + 0x7fc0 : near));
}
INLINE __m256i narrowed(vf x, f16) { return _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

template <class S> INLINE vf table_of_codes(Kind kind, float zero, float scale) {
  const vf counted = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const vf doubled = {0, 1, 2, 3, 4, 6, 8, 12, -0.0f, -1, -2, -3, -4, -6, -8, -12};  // `values` of E2M1
  return rounded((kind == E2M1 ? doubled : counted - zero) * scale, S());
}
// The same in 16 bits.
template <class S> INLINE __m256i narrow_table(Kind kind, float zero, float scale, bf16) {
  const vf table = table_of_codes<S>(kind, zero, scale);
#if defined(__AVX512BF16__)
  if (is_plain(scale)) return (__m256i)_mm512_cvtneps_pbh((__m512)table);
#endif
  return narrowed(table, bf16());
}
template <class S> INLINE __m256i narrow_table(Kind kind, float zero, float scale, f16) {
  return narrowed(table_of_codes<S>(kind, zero, scale), f16());
}

// 4 bits: an index takes the low bits of its lane alone, so the table is there twice and nothing is masked.
template <Kind K, class S, class T> INLINE int nibbles(const uint8_t* p, int c, int end, float zero, float scale, T* out) {
  if constexpr (sizeof(T) == 2) {
    const __m512i both = _mm512_broadcast_i64x4(narrow_table<S>(K, zero, scale, T()));
    for (; c + 32 <= end; c += 32) {
      const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(p + c / 2)));
      const __m512i codes = _mm512_or_si512(x, _mm512_slli_epi32(x, 12));
      _mm512_storeu_si512(out + c, _mm512_permutexvar_epi16(codes, both));
    }
  } else {
    const vf table = table_of_codes<S>(K, zero, scale);
    for (; c + 16 <= end; c += 16) {
      const __m512i x = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)(p + c / 2)));
      const __m512i codes = _mm512_or_si512(x, _mm512_slli_epi64(x, 28));
      _mm512_storeu_ps(out + c, _mm512_permutexvar_ps(codes, (__m512)table));
    }
  }
  return c;
}
#endif

#if defined(PACKED_AVX2)
template <Kind K, class S, class T> INLINE ByteTables tables_of_codes(float zero, float scale) {
  const vu first = {0, 1, 2, 3, 4, 5, 6, 7};
  const vf low = scaled<S, T>(values<K>(first, zero), scale), high = scaled<S, T>(values<K>(first + 8, zero), scale);
  if constexpr (std::is_same<T, bf16>::value)
    if (is_plain(scale)) return byte_tables(narrowed_finite(low, high));
  T table[16];
  store(table, low), store(table + W, high);
  return byte_tables(_mm256_loadu_si256((const __m256i*)table));
}
template <Kind K, class S, class T> INLINE int nibbles(const uint8_t* p, int c, int end, float zero, float scale, T* out) {
  if constexpr (sizeof(T) == 2) {
    if (c + 32 > end) return c;
    const ByteTables tables = tables_of_codes<K, S, T>(zero, scale);
    for (; c + 32 <= end; c += 32) look_up(nibbles_at(p + c / 2), tables, out + c);
  }
  return c;
}
template <Kind K, class S> INLINE int bytes(const uint8_t* p, int c, int end, float zero, float scale, bf16* out) {
  if (!is_plain(scale)) return c;
  const float factor = K == E4M3 ? scale * 0x1p8f : scale;
  for (; c + 16 <= end; c += 16) {
    vf low, high;
    if constexpr (K == UNSIGNED) {
      low = values<K>(bytes_at(p + c), zero), high = values<K>(bytes_at(p + c + 8), zero);
    } else {
#if defined(__F16C__)
      if (!e4m3_at(p + c, low, high)) return c;
#else
      return c;
#endif
    }
    const __m256i both = narrowed_finite(scaled<S, bf16>(low, factor), scaled<S, bf16>(high, factor));
    _mm256_storeu_si256((__m256i*)(out + c), both);
  }
  return c;
}
#endif

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
template <Kind K> INLINE bool wide(const uint8_t* p, float zero, vf& low, vf& high) {
  if constexpr (K == UNSIGNED) {
    low = values<K>(codes_at<8>(p), zero), high = values<K>(codes_at<8>(p + 16), zero);
    return true;
  }
  // The bits of an e4m3 number are those of a half 2^8 times smaller, subnormal ones included; NaN is another.
  const __m512i x = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
  const __m512i half = _mm512_and_si512(_mm512_srai_epi16(_mm512_slli_epi16(x, 8), 1), _mm512_set1_epi16(short(0xbfff)));
  low = (vf)_mm512_cvtph_ps(_mm512_castsi512_si256(half));
  high = (vf)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
  return !_mm512_cmpeq_epi16_mask(_mm512_and_si512(x, _mm512_set1_epi16(0x7f)), _mm512_set1_epi16(0x7f));
}

template <Kind K, class S> INLINE int bytes(const uint8_t* p, int c, int end, float zero, float scale, bf16* out) {
  if (!is_plain(scale)) return c;
  const float factor = K == E4M3 ? scale * 0x1p8f : scale;
  for (; c + 32 <= end; c += 32) {
    vf low, high;
    if (!wide<K>(p + c, zero, low, high)) return c;
    low = scaled<S, bf16>(low, factor), high = scaled<S, bf16>(high, factor);
    _mm512_storeu_si512(out + c, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
  }
  return c;
}
#endif

template <Kind K, int BITS, class S, class T>
INLINE void group(const uint8_t* p, int c, int end, float zero, float scale, T* out) {
#if defined(PACKED_AVX2) || (defined(__AVX512BW__) && defined(__AVX512VL__))
  if constexpr (BITS == 4)
    if (c % 2 == 0) c = nibbles<K, S>(p, c, end, zero, scale, out);
#endif
#if defined(PACKED_AVX2) || (defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__))
  if constexpr (BITS == 8 && std::is_same<T, bf16>::value) c = bytes<K, S>(p, c, end, zero, scale, out);
#endif
  if (c < end) group_of_any<K, BITS, S>(p, c, end, zero, scale, out);
}

INLINE float fast_widen(float x) { return x; }
INLINE float fast_widen(bf16 x) { return widen(x); }
INLINE float fast_widen(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  return widen(x);
#endif
}

// Scales and zero points of an output: where they lie, and how far apart for the groups of its inputs.
template <class S> struct Beside {
  const char *scale, *zero;
  int64_t scale_step, zero_step;
  int shift, mask, more;
  Beside() = default;
  Beside(const Packed& p, const Matrix& m, int r) : zero(m.zero), mask((1 << p.bits) - 1), more(p.zero_shift) {
    const int per_word = 32 / p.bits;
    const bool by_columns = p.codec == GPTQ || p.codec == AWQ;
    const int place = p.codec == AWQ ? AWQ_PLACES[r % 8] : r % per_word;
    const int64_t size = p.codec == MXFP4 ? 1 : sizeof(S);
    scale = m.scale + (by_columns ? r * size : r / p.rows * p.scale_stride);
    scale_step = by_columns ? p.scale_stride : size;
    if (zero) zero += by_columns ? r / per_word * 4 : r / per_word * p.zero_stride;
    zero_step = by_columns ? p.zero_stride : 4;
    shift = place * p.bits;
  }
  INLINE float scale_of(int group) const {
    S value;
    std::memcpy(&value, scale + group * scale_step, sizeof value);
    return fast_widen(value);
  }
  INLINE float half_power_of(int group) const {  // 2^(stored - 128)
    const uint32_t stored = uint8_t(scale[group * scale_step]);
    return bits_of<float>(stored > 1 ? (stored - 1) << 23 : 0x200000u << stored);
  }
  INLINE float zero_of(int group, float otherwise) const {
    if (!zero) return otherwise;
    uint32_t word;
    std::memcpy(&word, zero + group * zero_step, 4);
    return float(int(word >> shift & mask) + more);
  }
};

// Groups of 32 numbers of e2m1, from `begin` on, up to one whose values are no normal numbers: a power of two is added to exponents.
template <class S, class T>
INLINE int e2m1_groups(const Packed& p, const Beside<S>& beside, const uint8_t* numbers, int begin, int end, T* out) {
  int c = begin;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (std::is_same<T, bf16>::value) {
    if (p.columns != 32 || begin % 32) return c;
    const __m512i ones = _mm512_broadcast_i64x4(_mm256_setr_epi16(
        0, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, short(0x8000), short(0xbf00), short(0xbf80),
        short(0xbfc0), short(0xc000), short(0xc040), short(0xc080), short(0xc0c0)));
    for (; c + 32 <= end; c += 32) {
      const int stored = uint8_t(beside.scale[c / 32]);
      if (stored < 3 || stored > 251) return c;
      const __m512i table = _mm512_mask_add_epi16(ones, 0xfefefefe, ones, _mm512_set1_epi16(short((stored - 127) * 128)));
      const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(numbers + c / 2)));
      _mm512_storeu_si512(out + c, _mm512_permutexvar_epi16(_mm512_or_si512(x, _mm512_slli_epi32(x, 12)), table));
    }
  }
#elif defined(PACKED_AVX2)
  if constexpr (std::is_same<T, bf16>::value) {
    if (p.columns != 32 || begin % 32) return c;
    const __m256i ones = _mm256_setr_epi16(0, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, short(0x8000),
                                           short(0xbf00), short(0xbf80), short(0xbfc0), short(0xc000), short(0xc040),
                                           short(0xc080), short(0xc0c0));
    const __m256i not_zero = _mm256_setr_epi16(0, -1, -1, -1, -1, -1, -1, -1, 0, -1, -1, -1, -1, -1, -1, -1);
    for (; c + 32 <= end; c += 32) {
      const int stored = uint8_t(beside.scale[c / 32]);
      if (stored < 3 || stored > 251) return c;
      const __m256i more = _mm256_and_si256(not_zero, _mm256_set1_epi16(short((stored - 127) * 128)));
      look_up(nibbles_at(numbers + c / 2), byte_tables(_mm256_add_epi16(ones, more)), out + c);
    }
  }
#endif
  return c;
}

// Inputs [begin, end) of output r, whose numbers lie beside each other; `numbers` is where input 0 were.
template <Kind K, int BITS, class S, class T>
INLINE void stretch(const Packed& p, const Beside<S>& beside, const uint8_t* numbers, int begin, int end, T* out) {
  if constexpr (K == E2M1) begin = e2m1_groups(p, beside, numbers, begin, end, out);
  for (int g = begin / p.columns, c = begin; c < end; g++) {
    const int last = int(std::min<int64_t>(end, int64_t(g + 1) * p.columns));
    const float scale = K == E2M1 ? beside.half_power_of(g) : beside.scale_of(g);
    group<K, BITS, S>(numbers, c, last, K == UNSIGNED ? beside.zero_of(g, float(1 << (BITS - 1))) : 0.0f, scale, out);
    c = last;
  }
}

// Not inlined: its loop has all registers to itself.
template <Kind K, int BITS, class S, class T>
__attribute__((noinline)) void rows_as_they_lie(const Packed& p, const Matrix& m, int first, int last, T* out) {
  for (int r = first; r < last; r++, out += p.C) {
    const uint8_t* numbers = (const uint8_t*)m.packed + r * p.packed_stride;
    stretch<K, BITS, S>(p, Beside<S>(p, m, r), numbers, 0, p.C, out);
  }
}

// GPTQ: words of W outputs and W words of inputs are transposed, and every output has its numbers in order then.
template <int BITS, class S, class T> void rows_of_word_columns(const Packed& p, const Matrix& m, int first, int last, T* out) {
  constexpr int per_word = 32 / BITS, at_once = W * per_word;
  const int words = (p.C + per_word - 1) / per_word;
  for (int r = first; r < last; r += W, out += int64_t(W) * p.C) {
    const int outputs = std::min(W, last - r);
    Beside<S> beside[W];
    for (int o = 0; o < outputs; o++) beside[o] = Beside<S>(p, m, r + o);
    for (int word = 0; word < words; word += W) {
      vf block[W] = {};
      for (int i = 0; i < std::min(W, words - word); i++) {
        const char* from = m.packed + (word + i) * p.packed_stride + r * 4;
        __builtin_prefetch(from + W * p.packed_stride);  // every word of the next block is a line of its own
        if (outputs == W) std::memcpy(&block[i], from, W * 4);
        else std::memcpy(&block[i], from, outputs * 4);
      }
      transpose(block);
      const int begin = word * per_word, end = std::min(p.C, begin + at_once);
      for (int o = 0; o < outputs; o++)
        stretch<UNSIGNED, BITS, S>(p, beside[o], (const uint8_t*)&block[o] - begin * BITS / 8, begin, end,
                                   out + int64_t(o) * p.C);
    }
  }
}

// AWQ: a word holds 8 outputs of one input; words of some inputs are gathered, and every output takes its bits of them.
template <class S, class T> struct AwqBlock {
  const Packed& p;
  const Matrix& m;
  uint32_t words[AWQ_AT_ONCE / 8 + 1][AWQ_COLUMNS];
  Beside<S> beside[AWQ_AT_ONCE];

  void gather(int first_word, int count, int begin, int end) {
    const char* from = m.packed + begin * p.packed_stride + first_word * 4;
    int c = 0;
    if (first_word + round_up(count, W) <= p.R / 8)  // a vector of words is whole in every input
      for (; c + W <= end - begin; c += W, from += W * p.packed_stride)
        for (int w = 0; w < count; w += W) {
          vf block[W];
          UNROLL for (int i = 0; i < W; i++) {
            std::memcpy(&block[i], from + i * p.packed_stride + w * 4, W * 4);
            __builtin_prefetch(from + (AWQ_COLUMNS + i) * p.packed_stride + w * 4);  // every input is a line of its own
          }
          transpose(block);
          for (int i = 0; i < std::min(W, count - w); i++) std::memcpy(&words[w + i][c], &block[i], W * 4);
        }
    for (; c < end - begin; c++, from += p.packed_stride)
      for (int w = 0; w < count; w++) std::memcpy(&words[w][c], from + w * 4, 4);
  }
  // Inputs [begin, end) of one group of output r; words[w][0] is input `origin`.
  INLINE void output(const Beside<S>& own, int w, int origin, int begin, int end, T* out) {
    const int group = begin / p.columns, shift = own.shift;
    const float zero = own.zero_of(group, 8), scale = own.scale_of(group);
    const uint32_t* from = words[w];
    int c = begin;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    if constexpr (sizeof(T) == 2) {
      const __m512i table = _mm512_cvtepu16_epi32(narrow_table<S>(UNSIGNED, zero, scale, T()));
      const __m128i by = _mm_cvtsi32_si128(shift);
      __m512i low_words = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24, 22,
                                           20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
      for (; c + 32 <= end; c += 32) {
        const __m512i a = _mm512_permutexvar_epi32(_mm512_srl_epi32(_mm512_loadu_si512(from + c - origin), by), table);
        const __m512i b = _mm512_permutexvar_epi32(_mm512_srl_epi32(_mm512_loadu_si512(from + c - origin + 16), by), table);
        _mm512_storeu_si512(out + c, _mm512_permutex2var_epi16(a, low_words, b));
      }
    }
#elif defined(PACKED_AVX2)
    if constexpr (sizeof(T) == 2)
      if (c + 32 <= end) {
        const ByteTables tables = tables_of_codes<UNSIGNED, S, T>(zero, scale);
        for (; c + 32 <= end; c += 32) look_up(nibbles_of_words(from + c - origin, shift), tables, out + c);
      }
#endif
    for (; c < end; c += W) {
      const int count = std::min(W, end - c);
      vu codes = {};
      T some[W];
      std::memcpy(&codes, from + c - origin, count == W ? W * 4 : count * 4);
      store(some, scaled<S, T>(values<UNSIGNED>(codes >> shift & 15, zero), scale));
      std::memcpy(out + c, some, count * sizeof(T));
    }
  }
  void rows(int first, int last, T* out) {
    const int first_word = first / 8, count = (last + 7) / 8 - first_word;
    for (int r = first; r < last; r++) beside[r - first] = Beside<S>(p, m, r);
    for (int begin = 0; begin < p.C; begin += AWQ_COLUMNS) {
      const int end = std::min(p.C, begin + AWQ_COLUMNS);
      gather(first_word, count, begin, end);
      for (int r = first; r < last; r++) {
        for (int c = begin; c < end;) {
          const int stop = int(std::min<int64_t>(end, (int64_t(c / p.columns) + 1) * p.columns));
          output(beside[r - first], r / 8 - first_word, begin, c, stop, out + int64_t(r - first) * p.C);
          c = stop;
        }
      }
    }
  }
};

template <class S, class T> void unpack_in(const Packed& p, const Matrix& m, int first, int last, T* out) {
  if (p.codec == FP8) return rows_as_they_lie<E4M3, 8, S>(p, m, first, last, out);
  if (p.codec == INTEGER && p.bits == 4) return rows_as_they_lie<UNSIGNED, 4, S>(p, m, first, last, out);
  if (p.codec == INTEGER) return rows_as_they_lie<UNSIGNED, 8, S>(p, m, first, last, out);
  if (p.codec == GPTQ && p.bits == 4) return rows_of_word_columns<4, S>(p, m, first, last, out);
  if (p.codec == GPTQ) return rows_of_word_columns<8, S>(p, m, first, last, out);
  for (int r = first; r < last; r += AWQ_AT_ONCE, out += int64_t(AWQ_AT_ONCE) * p.C)
    AwqBlock<S, T>{p, m}.rows(r, std::min(last, r + AWQ_AT_ONCE), out);
}

// Values of the outputs [first, last), to out[0], out[C], …
template <class T> void unpack_rows(const Packed& p, const Matrix& m, int first, int last, T* out) {
  if (p.codec == MXFP4) return rows_as_they_lie<E2M1, 4, float>(p, m, first, last, out);
  if (p.scale_dtype == 0) return unpack_in<float>(p, m, first, last, out);
  if (p.scale_dtype == 1) return unpack_in<bf16>(p, m, first, last, out);
  unpack_in<f16>(p, m, first, last, out);
}

}  // namespace
