// Decode on AMX takes four lines at a time, whose scores, weights and queries share vectors. Where a line comes from, where its outputs
// go, and the layouts between the two.

#pragma once

#include <cstddef>
#include <cstdint>

#include "amx.h"
#include "call.h"
#include "lanes.h"
#include "numbers.h"

#if defined(HAS_AMX)
namespace {

constexpr int AMX_LINES = 16;  // at most this many lines take the stream path on AMX
constexpr int AMX_KEYS = 64;   // at a time, of every head
constexpr int TILE_KEYS = 16;
constexpr int LINES_AT_ONCE = 4;  // of a vector, of which lane = key of 4 * LINES_AT_ONCE + line

// Vectors of 4 keys and 4 lines, 16 keys in all, to vectors of a line and 16 keys, of which key 4 i + j is at 4 j + i.
INLINE void weights_by_line(const vf* x, __m512 (&line)[4]) {
  const __m512 a = _mm512_unpacklo_ps((__m512)x[0], (__m512)x[1]), b = _mm512_unpackhi_ps((__m512)x[0], (__m512)x[1]);
  const __m512 c = _mm512_unpacklo_ps((__m512)x[2], (__m512)x[3]), d = _mm512_unpackhi_ps((__m512)x[2], (__m512)x[3]);
  line[0] = (__m512)_mm512_unpacklo_pd((__m512d)a, (__m512d)c), line[1] = (__m512)_mm512_unpackhi_pd((__m512d)a, (__m512d)c);
  line[2] = (__m512)_mm512_unpacklo_pd((__m512d)b, (__m512d)d), line[3] = (__m512)_mm512_unpackhi_pd((__m512d)b, (__m512d)d);
}

// Four numbers of each of four rows.
INLINE vf load_4x4(const float* p, int step) {
  if (step == 4) return load(p);
  __m512 x = _mm512_castps128_ps512(_mm_loadu_ps(p));
  x = _mm512_insertf32x4(x, _mm_loadu_ps(p + step), 1);
  x = _mm512_insertf32x4(x, _mm_loadu_ps(p + 2 * step), 2);
  return (vf)_mm512_insertf32x4(x, _mm_loadu_ps(p + 3 * step), 3);
}
INLINE vf over_keys(vf x, bool greatest) {  // of the four keys of each line, in all of its lanes
  const vf y = (vf)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0x4e);
  x = greatest ? vmax(x, y) : x + y;
  const vf z = (vf)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0xb1);
  return greatest ? vmax(x, z) : x + z;
}
// Whether a tile of keys lies at one step: its tokens are of two pages at most.
INLINE bool evenly(const Call& c, const int64_t* offsets) {
  return c.page_tokens >= TILE_KEYS && offsets[TILE_KEYS - 1] - offsets[0] == (TILE_KEYS - 1) * int64_t(c.G) * c.width;
}

// Four lines of a KV head: their queries, what shared keys have left of their softmax (null: nothing), and where their outputs go.
// Those behind the last line have none of these.
struct FourLines {
  const Call& c;
  const bf16* query[LINES_AT_ONCE] = {};
  const float* from[LINES_AT_ONCE] = {};
  bf16* out[LINES_AT_ONCE] = {};
  int head[LINES_AT_ONCE];

  FourLines(const Call& call, int row, int kv_head, int l, bool goes_on) : c(call) {
    const int lines = (c.q_starts[row + 1] - c.q_starts[row]) * c.N;
    int64_t token = c.q_starts[row] + l / c.N;
    for (int j = 0, member = l % c.N; j < LINES_AT_ONCE; j++, member++) {
      if (member == c.N) member = 0, token++;
      head[j] = kv_head * c.N + member;
      if (l + j >= lines) continue;
      query[j] = (const bf16*)c.q + token * c.q_stride + int64_t(head[j]) * c.D;
      from[j] = goes_on ? state_of(c, token, head[j]) : nullptr;
      out[j] = (bf16*)c.out + (token * c.H + head[j]) * c.D;
    }
  }
  // The largest score so far, of each line in all of its lanes, and the sum, in those of the first key.
  void begin(vf* max_sum) const {
    alignas(16) float highest[LINES_AT_ONCE], sum[LINES_AT_ONCE];
    for (int j = 0; j < LINES_AT_ONCE; j++) {
      highest[j] = from[j] ? from[j][c.D] : first_score(c, head[j]);
      sum[j] = from[j] ? from[j][c.D + 1] : first_sum(c);
    }
    max_sum[0] = repeated<LINES_AT_ONCE>(highest), max_sum[1] = (vf)_mm512_zextps128_ps512(_mm_load_ps(sum));
  }
};
// One number of each of four lines, in all lanes.
INLINE vf of_line(vf x, int j) { return (vf)_mm512_permutexvar_ps(_mm512_set1_epi32(j), (__m512)x); }
// The words of four lines side by side: word 4 k + j of each, from `x`, in row r of 16, which have `step` bytes; r is 4 k + j, or
// 4 j + k of words that came so.
template <bool TURNED> INLINE void put_words(const vf (&x)[LINES_AT_ONCE], char* to, int step) {
  __m512 rows[4];
  weights_by_line(x, rows);
  UNROLL for (int j = 0; j < 4; j++) {
    char* first = to + (TURNED ? 4 * j : j) * step;
    const int next = TURNED ? step : 4 * step;
    _mm_store_ps((float*)first, _mm512_castps512_ps128(rows[j]));
    _mm_store_ps((float*)(first + next), _mm512_extractf32x4_ps(rows[j], 1));
    _mm_store_ps((float*)(first + 2 * next), _mm512_extractf32x4_ps(rows[j], 2));
    _mm_store_ps((float*)(first + 3 * next), _mm512_extractf32x4_ps(rows[j], 3));
  }
}

// Scores of the lines from l on with four keys, of which the first is `first` of `count` from t on: -inf where they do not see it.
INLINE vf masked(const Call& c, int row, vf x, int l, int t, int first, int count) {
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const vi key = lane / LINES_AT_ONCE + first;
  vi position = (vi){} + (c.context_lens[row] - (c.q_starts[row + 1] - c.q_starts[row]));
  for (int i = 0; i < W; i++) position[i] += (l + i % LINES_AT_ONCE) / c.N;
  vi hidden = (key >= count) | (key + t > position);
  if (c.window) hidden |= key + t <= position - c.window;
  return hidden ? (vf){} - __builtin_inff() : x;
}

}  // namespace
#endif
