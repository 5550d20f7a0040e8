// Operations between the lanes of vectors: sums and maxima across them, transposition.

#pragma once

#include <utility>

#include "numbers.h"

namespace {

template <int... I> INLINE vf interleave_low(vf a, vf b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (I / 2 + (I % 2) * W)...);
#else
  return __builtin_shuffle(a, b, (vi){(I / 2 + (I % 2) * W)...});
#endif
}
template <int... I> INLINE vf interleave_high(vf a, vf b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (W / 2 + I / 2 + (I % 2) * W)...);
#else
  return __builtin_shuffle(a, b, (vi){(W / 2 + I / 2 + (I % 2) * W)...});
#endif
}
template <int X, int... I> INLINE vf exchange(vf a, std::integer_sequence<int, I...>) {  // lane i takes lane i^X
#if defined(__clang__)
  return __builtin_shufflevector(a, a, (I ^ X)...);
#else
  return __builtin_shuffle(a, (vi){(I ^ X)...});
#endif
}
using Lanes = std::make_integer_sequence<int, W>;

#if defined(__AVX__) && !defined(__AVX512F__)
// The sum of x[i]'s lanes, in lane i: within halves first, since what crosses them costs more.
template <int COUNT> INLINE vf sum_each(vf (&x)[W]) {
  static_assert(COUNT == 8, "all lanes");
  __m256 pairs[4], fours[2];
  UNROLL for (int i = 0; i < 4; i++) {
    const __m256 a = (__m256)x[2 * i], b = (__m256)x[2 * i + 1];
    pairs[i] = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  }
  UNROLL for (int i = 0; i < 2; i++) {
    const __m256d a = _mm256_castps_pd(pairs[2 * i]), b = _mm256_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
  }
  return (vf)_mm256_add_ps(_mm256_permute2f128_ps(fours[0], fours[1], 0x20), _mm256_permute2f128_ps(fours[0], fours[1], 0x31));
}
#else
// The sum of x[i]'s lanes, in lane i. Recursion, not a loop over halves: the compiler must see constant indices to
// keep the vectors in registers.
template <int COUNT> INLINE vf sum_each(vf (&x)[W]) {
  if constexpr (COUNT > 1) {
    UNROLL for (int i = 0; i < COUNT / 2; i++) {
      vf a = x[i], b = x[i + COUNT / 2];
      x[i] = interleave_low(a, b, Lanes()) + interleave_high(a, b, Lanes());
    }
    return sum_each<COUNT / 2>(x);
  }
  return x[0];
}
#endif
INLINE double two_floats(const float* p) {
  double x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
// KEYS numbers, again and again.
template <int KEYS> INLINE vf repeated(const float* p) {
  if constexpr (KEYS == 1) return (vf){} + *p;
#if defined(__AVX512F__)
  if constexpr (KEYS == 2) return (vf)_mm512_castpd_ps(_mm512_set1_pd(two_floats(p)));
  if constexpr (KEYS == 4) return (vf)_mm512_broadcast_f32x4(_mm_loadu_ps(p));
  if constexpr (KEYS == 8) return (vf)_mm512_castpd_ps(_mm512_broadcast_f64x4(_mm256_castps_pd(_mm256_loadu_ps(p))));
#elif defined(__AVX__)
  if constexpr (KEYS == 2) return (vf)_mm256_castpd_ps(_mm256_broadcast_sd((const double*)p));
  if constexpr (KEYS == 4) return (vf)_mm256_broadcast_ps((const __m128*)p);
#endif
  if constexpr (KEYS == W) return load(p);
  vf x;
  for (int i = 0; i < W; i++) x[i] = p[i % KEYS];
  return x;
}
template <int KEYS> INLINE vf max_in_groups(vf x) {  // over each KEYS neighbouring lanes
  if constexpr (KEYS > 1) x = vmax(x, exchange<1>(x, Lanes()));
  if constexpr (KEYS > 2) x = vmax(x, exchange<2>(x, Lanes()));
  if constexpr (KEYS > 4) x = vmax(x, exchange<4>(x, Lanes()));
  if constexpr (KEYS > 8) x = vmax(x, exchange<8>(x, Lanes()));
  return x;
}
template <int KEYS> INLINE vf sum_in_groups(vf x) {
  if constexpr (KEYS > 1) x += exchange<1>(x, Lanes());
  if constexpr (KEYS > 2) x += exchange<2>(x, Lanes());
  if constexpr (KEYS > 4) x += exchange<4>(x, Lanes());
  if constexpr (KEYS > 8) x += exchange<8>(x, Lanes());
  return x;
}
template <int STAGE = 1> INLINE void transpose(vf (&x)[W]) {
  if constexpr (STAGE < W) {
    vf y[W];
    UNROLL for (int i = 0; i < W / 2; i++) {
      y[2 * i] = interleave_low(x[i], x[i + W / 2], Lanes());
      y[2 * i + 1] = interleave_high(x[i], x[i + W / 2], Lanes());
    }
    UNROLL for (int i = 0; i < W; i++) x[i] = y[i];
    transpose<STAGE * 2>(x);
  }
}

}  // namespace
