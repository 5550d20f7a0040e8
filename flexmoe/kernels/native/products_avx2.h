// What decode on AVX2 multiplies: four lines with two keys at a time, and their weights with sixteen numbers of values.
//
// Plain keys and values are bf16. Sixteen of them are two vectors, of the even and of the odd ones, which takes a shift and a
// mask and no shuffle; queries and outputs lie so, too.
//
// Compressed ones are int8, and what they are multiplied with has 16 bits: queries relative to their largest number (an error of
// 2^-16 of it), weights relative to the largest of the chunk (the same). An instruction multiplies sixteen pairs and adds neighbours;
// sums are int32 and cannot overflow: a head has 512 numbers at most, a chunk 32 keys. Scores, sums of weights and outputs are fp32.
//
// The compiler would move sums between registers and memory in these loops, so each step of a sum is one piece of assembly.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "lanes.h"
#include "numbers.h"

#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__)
#define HAS_AVX2_STREAM
namespace {

constexpr int FOUR_LINES = 4;
constexpr int BLOCK = 16;  // numbers of a head at a time
constexpr float STEPS_OF_16_BITS = 32767;
constexpr int LARGEST_INT8_HEAD = 512;

// Kept in a register: the compiler would rather read it from memory with every use.
template <class V> INLINE V in_register(V x) {
  asm("" : "+x"(x));
  return x;
}
INLINE void add_product(vf& sum, vf x, vf y) { asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(x), "x"(y)); }
INLINE void add_product(__m256i& sum, __m256i x, __m256i y) {
  __m256i products;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(x), "x"(y));
}

// Lines of memory that are fetched meanwhile, one a step: the processor drops most of what is asked for in a burst.
struct Meanwhile {
  const char* at;
  int64_t bytes;
  INLINE void step() { __builtin_prefetch(at, 0, 2), at += bytes; }  // into L2: a chunk is more than the L1 cache holds
};

struct PlainProducts {
  using Query = float;
  static constexpr int keys = 16;  // of a chunk: with more, the rows of a head would drive each other out of the L1 cache
  static constexpr int step = 2;   // keys that `values` takes at a time
  // Where number d of line l lies among those of four lines.
  static int place(int l, int d) { return d / BLOCK * BLOCK * FOUR_LINES + l * BLOCK + d % 2 * W + d % BLOCK / 2; }
  static INLINE void split(const bf16* p, vf& even, vf& odd) {
    const __m256i x = in_register(_mm256_loadu_si256((const __m256i*)p));
    even = (vf)_mm256_slli_epi32(x, 16), odd = in_register((vf)_mm256_and_si256(x, _mm256_set1_epi32(0xffff0000)));
  }
  static INLINE void join(vf even, vf odd, vf& first, vf& second) {
    const __m256 low = _mm256_unpacklo_ps((__m256)even, (__m256)odd), high = _mm256_unpackhi_ps((__m256)even, (__m256)odd);
    first = (vf)_mm256_permute2f128_ps(low, high, 0x20), second = (vf)_mm256_permute2f128_ps(low, high, 0x31);
  }
  // A query of `padded` numbers, the last of them zeros, to those of four lines; returns what its scores are times.
  static float put_query(const float* from, int padded, float factor, float* to) {
    for (int d = 0; d < padded; d++) to[place(0, d)] = from[d] * factor;
    return 1.0f;
  }
  // Lane = line * 2 + key.
  static INLINE vf scores(const float* q, const bf16* a, const bf16* b, int padded, Meanwhile fetched) {
    vf sums[W] = {};
    for (int d = 0; d < padded; d += BLOCK, q += FOUR_LINES * BLOCK) {
      fetched.step();
      vf x[2], y[2];
      split(a + d, x[0], x[1]), split(b + d, y[0], y[1]);
      UNROLL for (int odd = 0; odd < 2; odd++)
        UNROLL for (int l = 0; l < FOUR_LINES; l++) {
          const vf query = in_register(load(q + (2 * l + odd) * W));
          add_product(sums[2 * l], x[odd], query), add_product(sums[2 * l + 1], y[odd], query);
        }
    }
    return sum_each<W>(sums);
  }
  // Adds to the outputs of four lines, which first become `alpha` times what they are.
  static INLINE void values(const bf16* v, const int64_t* at, int count, const float* weights, const float* alpha, float* o,
                            Meanwhile fetched) {
    vf sums[FOUR_LINES][2];
    UNROLL for (int l = 0; l < FOUR_LINES; l++)
      UNROLL for (int i = 0; i < 2; i++) sums[l][i] = load(o + (2 * l + i) * W) * alpha[2 * l];
    for (int j = 0; j < count; j += 2, weights += W) {
      fetched.step();
      UNROLL for (int i = 0; i < 2; i++) {
        vf even, odd;
        split(v + at[j + i], even, odd);
        UNROLL for (int l = 0; l < FOUR_LINES; l++) {
          const vf weight = (vf)in_register(_mm256_broadcast_ss(weights + 2 * l + i));
          add_product(sums[l][0], even, weight), add_product(sums[l][1], odd, weight);
        }
      }
    }
    UNROLL for (int l = 0; l < FOUR_LINES; l++)
      UNROLL for (int i = 0; i < 2; i++) store(o + (2 * l + i) * W, sums[l][i]);
  }
};

struct PackedProducts {
  using Query = int16_t;
  static constexpr int keys = 32;
  static constexpr int step = 4;
  static int place(int l, int d) {
    return d / BLOCK * BLOCK * FOUR_LINES + l * BLOCK + d / 4 % 2 * W + d % BLOCK / W * 4 + d % 4;
  }
  static INLINE void join(vf a, vf b, vf& first, vf& second) {
    first = (vf)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x20), second = (vf)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x31);
  }
  static INLINE __m256i wide(const i8* p) { return in_register(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p))); }
  // NaN where a number of the query is not finite.
  static float put_query(const float* from, int padded, float factor, int16_t* to) {
    vf top = {}, nothing = {};
    for (int d = 0; d < padded; d += W) {
      const vf x = load(from + d);
      top = vmax(top, vmax(-x, x)), nothing += x * 0.0f;
    }
    const vf largest = max_in_groups<W>(top);
    const vf steps = largest > 0.0f ? STEPS_OF_16_BITS / largest : vf{};
    for (int d = 0; d < padded; d += BLOCK, to += FOUR_LINES * BLOCK) {
      const __m256i a = _mm256_cvtps_epi32((__m256)(load(from + d) * steps)), b = _mm256_cvtps_epi32((__m256)(load(from + d + W) * steps));
      _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8));
    }
    return (largest[0] + sum_in_groups<W>(nothing)[0]) * factor / STEPS_OF_16_BITS;
  }
  static INLINE vf scores(const int16_t* q, const i8* a, const i8* b, int padded, Meanwhile fetched) {
    __m256i sums[W] = {};
    for (int d = 0; d < padded; d += BLOCK, q += FOUR_LINES * BLOCK) {
      fetched.step();
      const __m256i x = wide(a + d), y = wide(b + d);
      UNROLL for (int l = 0; l < FOUR_LINES; l++) {
        const __m256i query = in_register(_mm256_load_si256((const __m256i*)q + l));
        add_product(sums[2 * l], x, query), add_product(sums[2 * l + 1], y, query);
      }
    }
    return (vf)_mm256_cvtepi32_ps(sum_of_each(sums));
  }
  // As `sum_each`.
  static INLINE __m256i sum_of_each(const __m256i (&x)[W]) {
    __m256i pairs[4], fours[2];
    UNROLL for (int i = 0; i < 4; i++)
      pairs[i] = _mm256_add_epi32(_mm256_unpacklo_epi32(x[2 * i], x[2 * i + 1]), _mm256_unpackhi_epi32(x[2 * i], x[2 * i + 1]));
    UNROLL for (int i = 0; i < 2; i++)
      fours[i] = _mm256_add_epi32(_mm256_unpacklo_epi64(pairs[2 * i], pairs[2 * i + 1]), _mm256_unpackhi_epi64(pairs[2 * i], pairs[2 * i + 1]));
    return _mm256_add_epi32(_mm256_permute2x128_si256(fours[0], fours[1], 0x20), _mm256_permute2x128_si256(fours[0], fours[1], 0x31));
  }
  // Weights of four keys, those of two side by side for each line.
  static INLINE void put_weights(vf first, vf second, int16_t* to) {
    _mm256_store_si256((__m256i*)to, _mm256_packs_epi32(_mm256_cvtps_epi32((__m256)first), _mm256_cvtps_epi32((__m256)second)));
  }
  static INLINE void values(const i8* v, const int64_t* at, int count, const int16_t* weights, const float* alpha, const float* times,
                            float* o, Meanwhile fetched) {
    __m256i sums[FOUR_LINES][2] = {};
    for (int j = 0; j < count; j += 4, weights += 4 * FOUR_LINES) {
      fetched.step();
      UNROLL for (int i = 0; i < 2; i++) {
        const __m256i x = wide(v + at[j + 2 * i]), y = wide(v + at[j + 2 * i + 1]);
        const __m256i low = in_register(_mm256_unpacklo_epi16(x, y)), high = in_register(_mm256_unpackhi_epi16(x, y));
        UNROLL for (int l = 0; l < FOUR_LINES; l++) {
          int32_t two;
          std::memcpy(&two, weights + l / 2 * 8 + i * 4 + l % 2 * 2, sizeof two);
          const __m256i weight = in_register(_mm256_set1_epi32(two));
          add_product(sums[l][0], low, weight), add_product(sums[l][1], high, weight);
        }
      }
    }
    UNROLL for (int l = 0; l < FOUR_LINES; l++)
      UNROLL for (int i = 0; i < 2; i++) {
        float* to = o + (2 * l + i) * W;
        store(to, load(to) * alpha[2 * l] + (vf)_mm256_cvtepi32_ps(sums[l][i]) * times[2 * l]);
      }
  }
};

}  // namespace
#endif
