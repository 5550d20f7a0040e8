// The stream path on AMX, for bf16 queries: up to 16 lines against 64 keys at a time, each number of K and V loaded once for
// all lines. Scores are a product of the keys as they lie and the queries as pairs of numbers; outputs are one of the weights, a
// line after the other, and the values as pairs of keys. Weights are rounded to bf16, sums and outputs are fp32.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

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

// Where the j-th of 16 keys stands in a row of weights, pairs of them: as `weights_by_line` leaves them.
INLINE constexpr int key_at(int position) { return position % 4 * 4 + position / 4; }

// Vectors of 4 keys and 4 lines, 16 keys in all, to vectors of a line and 16 keys in the order of `key_at`.
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
INLINE vf each_4_times(const float* p) {  // what belongs to four keys
  return (vf)_mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
                                   _mm512_castps128_ps512(_mm_loadu_ps(p)));
}

// Whether a tile of keys lies at one step: its tokens are of two pages at most.
INLINE bool evenly(const Call& c, const int64_t* offsets) {
  return c.page_tokens >= TILE_KEYS && offsets[TILE_KEYS - 1] - offsets[0] == (TILE_KEYS - 1) * int64_t(c.G) * c.width;
}

// E: keys and values as they are stored.
template <class E> struct AmxStream {
  static constexpr bool scaled = std::is_same<E, i8>::value;
  const Call& c;
  const int row, heads, lines, padded_lines, D, padded, context, begin;
  const int64_t first_token;
  bf16 *q, *weights, *values, *keys;  // [heads][padded / 32][16][lines][2], [2][lines][32], [2][padded / 16][16][32], [64][padded]
  float *o, *scores;                  // [heads][lines][padded], columns as `unpack_pairs` leaves them; [64][lines]
  vf* max_sum;                        // [heads][lines / 4][2]: as in decode.h
  float k_scale[scaled ? AMX_KEYS : 1], v_scale[scaled ? AMX_KEYS : 1];

  static size_t scratch_floats(const Call& c, int heads) {
    const size_t padded = round_up(c.D, 32);
    return heads * AMX_LINES * (padded / 2 + padded + 2 * W) + AMX_LINES * AMX_KEYS * 2 + padded * AMX_KEYS + 64;
  }
  AmxStream(const Call& call, const Item& item, float* scratch)
      : c(call), row(item.row), heads(item.head_end - item.head_begin),
        lines((call.q_starts[row + 1] - call.q_starts[row]) * call.N), padded_lines(round_up(lines, LINES_AT_ONCE)), D(call.D),
        padded(round_up(call.D, 32)), context(call.context_lens[row]), begin(first_key(call, row)),
        first_token(call.q_starts[row]) {
    float* at = scratch;
    auto take = [&](size_t floats) { float* taken = at; at += floats; return taken; };
    q = (bf16*)take(size_t(heads) * padded_lines * padded / 2), o = take(size_t(heads) * padded_lines * padded);
    max_sum = (vf*)take(size_t(heads) * padded_lines / LINES_AT_ONCE * 2 * W);
    scores = take(padded_lines * AMX_KEYS), weights = (bf16*)take(padded_lines * AMX_KEYS / 2);
    values = (bf16*)take(padded * AMX_KEYS / 2), keys = (bf16*)take(padded * AMX_KEYS / 2);
  }

  // As `Stream::run`.
  void run(const Item& item, const Item* following) {
    int64_t offsets[2][AMX_KEYS];
    int t = begin, count = cut(c, row, t);
    token_offsets(c, row, t, count, offsets[0]);
    start(item.head_begin);
    const int line_bytes = padded_lines * 4;
    const Tiles tiles({{16, line_bytes}, {16, line_bytes}, {16, line_bytes}, {16, 64}, {padded_lines, 64}, {padded_lines, 64},
                       {padded_lines, 64}, {padded_lines, 64}});
    for (int now = 0; t < context; now ^= 1) {
      const bool done = t + count == context && following;
      const Item& item_ahead = done ? *following : item;
      const int t_ahead = done ? first_key(c, item_ahead.row) : t + count, next = cut(c, item_ahead.row, t_ahead);
      token_offsets(c, item_ahead.row, t_ahead, next, offsets[now ^ 1]);
      Ahead ahead(c, sizeof(E), offsets[now ^ 1], next, item_ahead.head_begin, heads);
      for (int h = 0; h < heads; h++) step(item.head_begin + h, h, offsets[now], t, count, ahead);
      t += count, count = next;
    }
    finish(item.head_begin);
  }

  // Keys that are done at a time; where a window begins inside a page, the first ones end with a tile of it.
  static int cut(const Call& c, int row, int t) {
    return std::min(AMX_KEYS - t % TILE_KEYS, c.context_lens[row] - t);
  }

  void start(int head_begin) {
    std::memset(q, 0, size_t(heads) * padded_lines * padded * 2);
    std::fill(o, o + size_t(heads) * padded_lines * padded, 0.0f);
    for (int h = 0; h < heads; h++)
      for (int l = 0; l < padded_lines; l++) {
        const int own = (head_begin + h) * c.N + l % c.N;
        const int64_t token = first_token + l / c.N;
        vf* state = max_sum + (h * (padded_lines / LINES_AT_ONCE) + l / LINES_AT_ONCE) * 2;
        const float* from = begin > 0 && c.state && l < lines ? state_of(c, token, own) : nullptr;
        for (int i = l % LINES_AT_ONCE; i < W; i += LINES_AT_ONCE) {
          state[0][i] = from ? from[D] : first_score(c, own);
          state[1][i] = i >= LINES_AT_ONCE ? 0.0f : from ? from[D + 1] : first_sum(c);
        }
        if (l >= lines) continue;
        const bf16* query = (const bf16*)c.q + token * c.q_stride + int64_t(own) * D;
        put_pairs(query, D, q + h * padded * padded_lines + 2 * l, padded_lines);
        if (from) pack_output(from, o + (h * padded_lines + l) * size_t(padded));
      }
  }

  void step(int head, int h, const int64_t* offsets, int t, int count, Ahead& ahead) {
    const E *k = (const E*)c.k_pool + int64_t(head) * c.width, *v = (const E*)c.v_pool + int64_t(head) * c.width;
    const int tiles = (count + TILE_KEYS - 1) / TILE_KEYS;
    score(k, offsets, count, tiles, q + size_t(h) * padded_lines * padded, ahead);
    if constexpr (scaled) {
      for (int i = 0; i < count; i++) k_scale[i] = head_scale(k + offsets[i], D), v_scale[i] = head_scale(v + offsets[i], D);
      std::fill(v_scale + count, v_scale + AMX_KEYS, 0.0f);
    }
    pair_values(v, offsets, count, tiles, ahead);
    float* own = o + size_t(h) * padded_lines * padded;
    const int some = share(AMX_KEYS / 8, padded_lines / LINES_AT_ONCE);
    for (int l = 0; l < padded_lines; l += LINES_AT_ONCE) {
      vf* state = max_sum + (h * padded_lines + l) / LINES_AT_ONCE * 2;
      ahead.fetch<2>(some);
      if (count == AMX_KEYS && t + count <= context - lines / c.N + 1 && !hides(t)) softmax<false>(l, t, count, state, own);
      else softmax<true>(l, t, count, state, own);
    }
    accumulate((tiles + 1) / 2, own, ahead);
  }
  // Bytes of so many of the keys that come next, in one of so many pieces; every head brings AMX_KEYS of them in all.
  INLINE int share(int keys, int pieces) const { return (keys * c.width * int(sizeof(E)) / pieces + 63) / 64 * 64; }
  INLINE bool hides(int t) const { return c.window && t <= context - 1 - c.window; }

  // scores[key][line] of the keys, in tiles.
  INLINE void score(const E* k, const int64_t* offsets, int count, int tiles, const bf16* query, Ahead& ahead) {
    const int64_t token = int64_t(c.G) * c.width;
    const int line_bytes = padded_lines * 4, some = share(AMX_KEYS / 4, (tiles + 1) / 2 * (padded / 32));
    for (int i = 0; i < tiles; i += 2) {
      const bf16 *a, *b;
      int64_t a_step, b_step;
      place_keys(k, offsets, count, i, token, a, a_step);
      place_keys(k, offsets, count, std::min(i + 1, tiles - 1), token, b, b_step);
      _tile_zero(0);
      _tile_zero(1);
      for (int d = 0; d < padded; d += 32) {
        ahead.fetch<2>(some);
        _tile_loadd(2, query + size_t(d) * padded_lines, line_bytes);
        _tile_loadd(3, a + d, a_step);
        _tile_dpbf16ps(0, 3, 2);
        _tile_loadd(3, b + d, b_step);
        _tile_dpbf16ps(1, 3, 2);
      }
      _tile_stored(0, scores + i * TILE_KEYS * padded_lines, line_bytes);
      if (i + 1 < tiles) _tile_stored(1, scores + (i + 1) * TILE_KEYS * padded_lines, line_bytes);
    }
  }
  // A tile of keys where it lies, if it does so in whole numbers and at one step; else a copy.
  INLINE void place_keys(const E* k, const int64_t* offsets, int count, int tile, int64_t token, const bf16*& at, int64_t& step) {
    const int first = tile * TILE_KEYS, last = std::min(count, first + TILE_KEYS);
    if constexpr (!scaled)
      if (D == padded && last - first == TILE_KEYS && evenly(c, offsets + first)) {
        at = k + offsets[first], step = token * 2;
        return;
      }
    bf16* to = keys + size_t(first) * padded;
    at = to, step = padded * 2;
    for (int i = first; i < last; i++, to += padded)
      for (int d = 0; d < D; d += 32) _mm512_storeu_si512(to + d, load_32(k + offsets[i] + d, first_of_32(D - d)));
    std::memset(to, 0, size_t(first + TILE_KEYS - last) * padded * 2);
  }

  // Values of two keys side by side, in the order in which weights come.
  INLINE void pair_values(const E* v, const int64_t* offsets, int count, int tiles, Ahead& ahead) {
    const int pairs = (tiles + 1) / 2 * TILE_KEYS, some = share(AMX_KEYS * 3 / 8, pairs);
    const __m512i none = _mm512_setzero_si512();
    for (int pair = 0; pair < pairs; pair++) {
      const int first = pair / 8 * TILE_KEYS, in_tile = pair % 8;
      const int a = first + key_at(2 * in_tile), b = first + key_at(2 * in_tile + 1);
      bf16* to = values + size_t(pair / 16) * padded * 32 + pair % 16 * 32;
      const E *x = v + offsets[std::min(a, count - 1)], *y = v + offsets[std::min(b, count - 1)];
      ahead.fetch<2>(some);
      for (int d = 0; d < padded; d += 32, to += 2 * 16 * 32) {
        const __mmask32 valid = first_of_32(D - d);
        const __m512i of_a = a < count ? load_32(x + d, valid) : none, of_b = b < count ? load_32(y + d, valid) : none;
        _mm512_storeu_si512(to, _mm512_unpacklo_epi16(of_a, of_b));
        _mm512_storeu_si512(to + 16 * 32, _mm512_unpackhi_epi16(of_a, of_b));
      }
    }
  }

  // Weights of four lines; what they have put out is scaled to their new maximum.
  template <bool MASKED> INLINE void softmax(int l, int t, int count, vf* state, float* own) {
    constexpr int VECTORS = AMX_KEYS / 4;
    const vf factor = (vf){} + c.scale * LOG2E;
    vf x[VECTORS], highest = state[0];
    UNROLL for (int i = 0; i < VECTORS; i++) {
      x[i] = load_4x4(scores + 4 * i * padded_lines + l, padded_lines) * factor;
      if constexpr (scaled) x[i] *= each_4_times(k_scale + 4 * i);
      if constexpr (MASKED) x[i] = masked(x[i], l, t, 4 * i, count);
    }
    vf top[4] = {highest, x[0], x[1], x[2]};
    UNROLL for (int i = 3; i < VECTORS; i++) top[i % 4] = vmax(top[i % 4], x[i]);
    highest = relative_to(highest, over_keys(vmax(vmax(top[0], top[1]), vmax(top[2], top[3])), true));
    const vf alpha = exp2_nonpositive(state[0] - highest);
    vf sums[2] = {state[1] * alpha, {}};
    UNROLL for (int i = 0; i < VECTORS; i++) {
      x[i] = exp2_rounded(x[i] - highest);
      sums[i % 2] += x[i];
      if constexpr (scaled) x[i] *= each_4_times(v_scale + 4 * i);
    }
    UNROLL for (int i = 0; i < VECTORS; i += 8) {
      __m512 low[4], high[4];
      weights_by_line(x + i, low), weights_by_line(x + i + 4, high);
      UNROLL for (int j = 0; j < LINES_AT_ONCE; j++)
        _mm512_storeu_si512(weights + (i / 8 * padded_lines + l + j) * 32, (__m512i)_mm512_cvtne2ps_pbh(high[j], low[j]));
    }
    if (_mm512_cmp_ps_mask((__m512)state[0], (__m512)highest, _CMP_NEQ_UQ)) rescale(alpha, own + size_t(l) * padded);
    state[0] = highest, state[1] = sums[0] + sums[1];
  }
  INLINE vf masked(vf x, int l, int t, int first, int count) const {
    const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const vi key = lane / LINES_AT_ONCE + first, past = (vi){} + (context - lines / c.N);
    vi position = past;
    for (int i = 0; i < W; i++) position[i] += (l + i % LINES_AT_ONCE) / c.N;
    vi hidden = (key >= count) | (key + t > position);
    if (c.window) hidden |= key + t <= position - c.window;
    return hidden ? (vf){} - __builtin_inff() : x;
  }
  __attribute__((noinline)) void rescale(vf alpha, float* own) {
    for (int l = 0; l < LINES_AT_ONCE; l++, own += padded)
      for (int d = 0; d < padded; d += W) store(own + d, load(own + d) * alpha[l]);
  }

  // Adds weights times values, of so many times 32 keys.
  INLINE void accumulate(int groups, float* own, Ahead& ahead) {
    const int64_t step = padded * 4, group = padded * 32;
    const int some = share(AMX_KEYS / 4, padded / 32);
    _tile_loadd(6, weights, 64);
    if (groups > 1) _tile_loadd(7, weights + padded_lines * 32, 64);
    for (int d = 0; d < padded; d += 32) {
      const bf16* at = values + d / 16 * 16 * 32;
      ahead.fetch<2>(some);
      _tile_loadd(4, own + d, step);
      _tile_loadd(5, own + d + 16, step);
      _tile_loadd(3, at, 64);
      _tile_dpbf16ps(4, 6, 3);
      _tile_loadd(3, at + 16 * 32, 64);
      _tile_dpbf16ps(5, 6, 3);
      if (groups > 1) {
        _tile_loadd(3, at + group, 64);
        _tile_dpbf16ps(4, 7, 3);
        _tile_loadd(3, at + group + 16 * 32, 64);
        _tile_dpbf16ps(5, 7, 3);
      }
      _tile_stored(4, own + d, step);
      _tile_stored(5, own + d + 16, step);
    }
  }

  // Outputs lie as pairs of values came: of each 32 columns, the first four of each eight come first.
  void pack_output(const float* from, float* to) const {
    for (int d = 0; d < D; d += 4)
      std::memcpy(to + d / 32 * 32 + d % 8 / 4 * 16 + d % 32 / 8 * 4, from + d, 4 * std::min(4, D - d));
  }
  INLINE void unpack_output(const float* from, float* to) const {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23), high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int d = 0; d < padded; d += 32) {
      const __m512 a = (__m512)load(from + d), b = (__m512)load(from + d + 16);
      store(to + d, (vf)_mm512_permutex2var_ps(a, low, b)), store(to + d + 16, (vf)_mm512_permutex2var_ps(a, high, b));
    }
  }
  void finish(int head_begin) {
    float* in_order = (float*)values;
    for (int h = 0; h < heads; h++)
      for (int l = 0; l < lines; l++) {
        const vf sum = over_keys(max_sum[(h * padded_lines + l) / LINES_AT_ONCE * 2 + 1], false);
        unpack_output(o + (h * padded_lines + l) * size_t(padded), in_order);
        bf16* to = (bf16*)c.out + ((first_token + l / c.N) * c.H + (head_begin + h) * c.N + l % c.N) * D;
        narrow_row(in_order, to, D, 1.0f / sum[l % LINES_AT_ONCE]);
      }
  }
};

}  // namespace
#endif
