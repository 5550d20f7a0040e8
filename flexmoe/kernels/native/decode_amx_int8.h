// The stream path on AMX over compressed heads, for bf16 queries: up to 16 lines against 64 keys at a time. Both products are of
// int8 numbers as they are stored, with sums in int32, and their scales go to scores and weights.
//
// What they are multiplied with has 16 bits in two bytes, each a line of its own: queries relative to their largest number
// (an error of 2^-16 of it), weights relative to the sum of those of the 64 keys (2^-17 of it). Sums and outputs are fp32.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "amx.h"
#include "call.h"
#include "four_lines_amx.h"
#include "numbers.h"
#include "two_bytes_amx.h"

#if defined(HAS_AMX)
namespace {

struct AmxBytes {
  const Call& c;
  // Lines come in groups, whose high bytes lie before the low ones; of queries and scores those of four lines each.
  const int row, heads, lines, group, groups, D, padded, context, begin;
  const int64_t first_token;
  int8_t *q, *weights, *values, *keys;  // [heads][groups][padded / 64][16][group / 4][2][4][4], [groups][2][group][64],
                                        // [padded / 16][16][64], [64][padded]
  float *q_scale, *o;                   // [heads][lines], [heads][lines][padded], columns as `interleave` leaves them
  int32_t *scores, *sums;               // [2][groups][64][group / 4][2][4], [2][2][2][group][16]
  vf* max_sum;                          // [heads][lines / 4][2]: as in decode.h
  alignas(64) float k_scale[2][AMX_KEYS], v_scale[AMX_KEYS];
  alignas(64) float alpha[AMX_LINES], factor[AMX_LINES];
  int turn = 0, pending = -1;  // which of two buffers is this step's; the head whose outputs lack the step before

  static size_t scratch_floats(const Call& c, int heads) {
    const size_t padded = round_up(c.D, 64);
    return heads * AMX_LINES * (padded / 2 + 1 + padded + 2 * W) + AMX_LINES * (AMX_KEYS / 2 + 4 * AMX_KEYS + 64) +
           padded * AMX_KEYS / 2 + 192;
  }
  AmxBytes(const Call& call, const Item& item, float* scratch)
      : c(call), row(item.row), heads(item.head_end - item.head_begin),
        lines((call.q_starts[row + 1] - call.q_starts[row]) * call.N), group(lines > LINES_AT_ONCE ? 8 : LINES_AT_ONCE),
        groups(lines > 8 ? 2 : 1), D(call.D), padded(round_up(call.D, 64)), context(call.context_lens[row]),
        begin(first_key(call, row)), first_token(call.q_starts[row]) {
    const int all = group * groups;
    float* at = scratch;
    auto take = [&](size_t floats) { float* taken = at; at += (floats + 15) / 16 * 16; return taken; };
    q = (int8_t*)take(size_t(heads) * all * padded / 2), o = take(size_t(heads) * all * padded);
    max_sum = (vf*)take(size_t(heads) * all / LINES_AT_ONCE * 2 * W), q_scale = take(size_t(heads) * all);
    scores = (int32_t*)take(4 * all * AMX_KEYS), sums = (int32_t*)take(4 * group * 32);
    weights = (int8_t*)take(all * AMX_KEYS / 2);
    values = (int8_t*)take(padded * AMX_KEYS / 4), keys = (int8_t*)take(padded * AMX_KEYS / 4);
  }

  // As `Stream::run`. What each step needs was stored a step before, so that it need not wait for it.
  void run(const Item& item, const Item* following) {
    int64_t offsets[2][AMX_KEYS];
    int t = begin, count = cut(row, t);
    token_offsets(c, row, t, count, offsets[0]);
    start(item.head_begin);
    const int columns = 8 * group;
    const Tiles tiles({{16, columns}, {16, columns}, {16, columns}, {16, 64}, {2 * group, 64}, {16, 64}, {2 * group, 64},
                       {2 * group, 64}});
    for (int now = 0; t < context; now ^= 1) {
      const bool done = t + count == context && following;
      const Item& item_ahead = done ? *following : item;
      const int t_ahead = done ? first_key(c, item_ahead.row) : t + count, next = cut(item_ahead.row, t_ahead);
      token_offsets(c, item_ahead.row, t_ahead, next, offsets[now ^ 1]);
      Ahead ahead(c, sizeof(i8), offsets[now ^ 1], next, item_ahead.head_begin, heads, t_ahead);
      attend(item.head_begin, offsets[now], t, count, ahead);
      t += count, count = next;
    }
    finish(item.head_begin);
  }
  int cut(int of_row, int t) const { return std::min(AMX_KEYS - t % TILE_KEYS, c.context_lens[of_row] - t); }

  // Scores are a step ahead and outputs one behind, so that no step waits for what it has just stored.
  void attend(int head_begin, const int64_t* offsets, int t, int count, Ahead& ahead) {
    const i8 *k = (const i8*)c.k_pool + int64_t(head_begin) * c.width, *v = (const i8*)c.v_pool + int64_t(head_begin) * c.width;
    const bool masked = count < AMX_KEYS || t + count > context - lines / c.N + 1 || (c.window && t <= context - 1 - c.window);
    score(k, offsets, count, 0, ahead);
    for (int h = 0; h < heads; h++, v += c.width) {
      turn ^= 1;
      if (h + 1 < heads) score(k += c.width, offsets, count, h + 1, ahead);
      if (pending >= 0) accumulate(pending, ahead);
      take_scales(v, offsets, count, v_scale);
      for (int l = 0; l < lines; l += LINES_AT_ONCE)
        masked ? softmax<true>(h, l, t, count, ahead) : softmax<false>(h, l, t, count, ahead);
      if (padded != D) interleave<false, false>(v, offsets, count, ahead);
      else if (count == AMX_KEYS) interleave<true, true>(v, offsets, count, ahead);
      else interleave<true, false>(v, offsets, count, ahead);
      pending = h;
    }
  }
  // Bytes of so many of the keys that come next; every head brings AMX_KEYS of them in all.
  INLINE int share(int keys, int pieces) const { return keys * c.width * 17 / 16 / pieces; }

  // What the keys are times. Sixteen at one step are gathered: their scales, and two bytes before each, which are lower bits.
  INLINE void take_scales(const i8* heads_of_keys, const int64_t* offsets, int count, float* to) const {
    const char* ends = (const char*)heads_of_keys + D + D % 2 + 2;
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i at = _mm512_mullo_epi32(lane, _mm512_set1_epi32(c.G * c.width)), high = _mm512_set1_epi32(0xffff0000);
    for (int i = 0; i < AMX_KEYS; i += TILE_KEYS) {
      if (i + TILE_KEYS <= count && D > 1 && evenly(c, offsets + i)) {
        const __m512i bits = _mm512_i32gather_epi32(at, ends + offsets[i] - 4, 1);
        _mm512_store_si512(to + i, _mm512_and_si512(bits, high));
      } else {
        for (int key = i; key < i + TILE_KEYS; key++) to[key] = key < count ? head_scale(heads_of_keys + offsets[key], D) : 0.0f;
      }
    }
  }

  // Scores of 64 keys, the high bytes' beside the low bytes'.
  __attribute__((noinline)) void score(const i8* k, const int64_t* offsets, int count, int h, Ahead& ahead) {
    const int tiles = (count + TILE_KEYS - 1) / TILE_KEYS, columns = 8 * group;
    const int some = share(AMX_KEYS / 8, (tiles + 1) / 2 * (padded / 64) * groups);
    take_scales(k, offsets, count, k_scale[turn ^ 1]);
    for (int i = 0; i < tiles; i += 2) {
      const i8 *a, *b;
      int64_t a_step, b_step;
      place_keys(k, offsets, count, i, a, a_step);
      place_keys(k, offsets, count, std::min(i + 1, tiles - 1), b, b_step);
      for (int g = 0; g < groups; g++) {
        const int8_t* query = q + (size_t(h) * groups + g) * 2 * group * padded;
        settle();
        _tile_zero(0);
        _tile_zero(1);
        for (int d = 0; d < padded; d += 64) {
          ahead.fetch_some(some);
          _tile_loadd(2, query + size_t(d) * 2 * group, columns);
          _tile_loadd(3, a + d, a_step);
          _tile_dpbssd(0, 3, 2);
          _tile_loadd(5, b + d, b_step);
          _tile_dpbssd(1, 5, 2);
        }
        int32_t* to = scores_of(turn ^ 1, g) + i * TILE_KEYS * 2 * group;
        _tile_stored(0, to, columns);
        if (i + 1 < tiles) _tile_stored(1, to + TILE_KEYS * 2 * group, columns);
      }
    }
  }
  INLINE int32_t* scores_of(int which, int g) const { return scores + (which * groups + g) * AMX_KEYS * 2 * group; }
  INLINE void place_keys(const i8* k, const int64_t* offsets, int count, int tile, const i8*& at, int64_t& step) const {
    const int first = tile * TILE_KEYS, last = std::min(count, first + TILE_KEYS);
    if (D == padded && last - first == TILE_KEYS && evenly(c, offsets + first)) {
      at = k + offsets[first], step = int64_t(c.G) * c.width;
      return;
    }
    int8_t* to = keys + size_t(first) * padded;
    at = (const i8*)to, step = padded;
    for (int i = first; i < last; i++, to += padded)
      for (int d = 0; d < padded; d += 64) _mm512_storeu_si512(to + d, load_64(k + offsets[i] + d, D - d));
  }

  // Weights of four lines in two bytes, and what outputs and their products are times.
  template <bool MASKED> __attribute__((noinline)) void softmax(int h, int l, int t, int count, Ahead& ahead) {
    constexpr int VECTORS = AMX_KEYS / 4;
    const int some = share(AMX_KEYS * 3 / 8, 9 * ((lines + 3) / LINES_AT_ONCE));
    vf* state = max_sum + (h * groups * group + l) / LINES_AT_ONCE * 2;
    const int32_t* from = scores_of(turn, l / 8) + l % 8 * 2;
    const vf of_lines = repeated<4>(q_scale + h * groups * group + l);
    vf x[VECTORS], w[VECTORS];
    UNROLL for (int i = 0; i < VECTORS; i++) {
      if (i % 4 == 0) ahead.fetch_some(some);
      x[i] = scores_4x4(from + i * 8 * group) * (each_4_times(k_scale[turn] + i / 4 * 16, i % 4) * of_lines);
      if constexpr (MASKED) x[i] = masked(c, row, x[i], l, t, 4 * i, count);
    }
    vf top[4] = {state[0], x[0], x[1], x[2]};
    UNROLL for (int i = 3; i < VECTORS; i++) top[i % 4] = vmax(top[i % 4], x[i]);
    const vf highest = relative_to(state[0], over_keys(vmax(vmax(top[0], top[1]), vmax(top[2], top[3])), true));
    const vf before = exp2_nonpositive(state[0] - highest);
    vf total[2] = {state[1] * before, {}}, of_values[2] = {};
    UNROLL for (int i = 0; i < VECTORS; i++) {
      if (i % 4 == 0) ahead.fetch_some(some);
      w[i] = exp2_rounded(x[i] - highest);
      total[i % 2] += w[i];
      w[i] *= each_4_times(v_scale + i / 4 * 16, i % 4);
      of_values[i % 2] += w[i];
    }
    state[0] = highest, state[1] = total[0] + total[1];
    const vf whole = vmax((vf){} + 1e-30f, over_keys(of_values[0] + of_values[1], false));  // a NaN stays
    _mm_store_ps(alpha + l, _mm512_castps512_ps128((__m512)before));
    _mm_store_ps(factor + l, _mm512_castps512_ps128((__m512)(whole * (1 / WEIGHT_STEPS))));
    ahead.fetch_some(some);
    const vf steps = (vf){} + WEIGHT_STEPS;
    put_weights(w, steps / whole, weights + (l / 8 * 2 * group + l % 8) * AMX_KEYS, group);
  }
  // Of four keys and four lines: lane = key of 4 * 4 + line.
  INLINE vf scores_4x4(const int32_t* p) const {
    const int next = 2 * group;
    const __m512i a = two_rows(p, p + next), b = two_rows(p + 2 * next, p + 3 * next);
    return two_bytes(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
  }
  static INLINE __m512i two_rows(const int32_t* p, const int32_t* next) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_load_si256((const __m256i*)p)), _mm256_load_si256((const __m256i*)next), 1);
  }
  // Values of four keys side by side, in the order in which weights come. Of each 64 columns, those of a tile are the same
  // four of each sixteen.
  template <bool WHOLE, bool FULL> __attribute__((noinline)) void interleave(const i8* v, const int64_t* offsets, int count, Ahead& ahead) {
    const int some = share(AMX_KEYS * 3 / 8, 16), size = D, width = padded;
    int8_t* const rows = values;
    for (int r = 0; r < 16; r++) {
      const i8* from[4];
      UNROLL for (int j = 0; j < 4; j++) from[j] = v + offsets[std::min(r % 4 * 16 + 4 * j + r / 4, FULL ? AMX_KEYS : count - 1)];
      ahead.fetch_some(some);
      int8_t* to = rows + r * 64;
      for (int d = 0; d < width; d += 64, to += 4 * 1024) {
        __m512i x[4];
        UNROLL for (int j = 0; j < 4; j++) x[j] = load_64(from[j] + d, WHOLE ? 64 : size - d);
        const __m512i a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpackhi_epi8(x[0], x[1]);
        const __m512i e = _mm512_unpacklo_epi8(x[2], x[3]), f = _mm512_unpackhi_epi8(x[2], x[3]);
        _mm512_store_si512(to, _mm512_unpacklo_epi16(a, e)), _mm512_store_si512(to + 1024, _mm512_unpackhi_epi16(a, e));
        _mm512_store_si512(to + 2048, _mm512_unpacklo_epi16(b, f)), _mm512_store_si512(to + 3072, _mm512_unpackhi_epi16(b, f));
      }
    }
  }

  // Adds weights times values of the step before to the outputs: 32 columns are multiplied while those before them are added.
  __attribute__((noinline)) void accumulate(int h, Ahead& ahead) {
    settle();
    const int tile = 2 * group * 16, some = share(AMX_KEYS / 8, groups * (padded / 32));
    const int8_t *of_lines = weights, *end = values + padded * 64;
    for (int g = 0; g < groups; g++, of_lines += 2 * group * AMX_KEYS) {
      float* own = o + (size_t(h) * groups + g) * group * padded;
      const int count = std::min(group, lines - g * group);
      int32_t *to = sums, *before = sums + 2 * tile;
      _tile_loadd(4, of_lines, 64);
      for (const int8_t* rows = values; rows < end; rows += 2048, std::swap(to, before)) {
        ahead.fetch_some(some);
        _tile_zero(6);
        _tile_loadd(3, rows, 64);
        _tile_dpbusd(6, 4, 3);
        _tile_zero(7);
        _tile_loadd(5, rows + 1024, 64);
        _tile_dpbusd(7, 4, 5);
        if (rows > values) add(before, g, count, own), own += 32;
        _tile_stored(6, to, 64);
        _tile_stored(7, to + tile, 64);
      }
      settle();
      add(before, g, count, own);
    }
  }
  INLINE void add(const int32_t* from, int g, int count, float* own) const {
    const int tile = 2 * group * 16, low = group * 16;
    for (int l = 0; l < count; l++, own += padded, from += 16) {
      const vf scale = (vf){} + alpha[g * group + l], times = (vf){} + factor[g * group + l];
      UNROLL for (int i = 0; i < 2; i++) {
        const int32_t* at = from + i * tile;
        store(own + 16 * i, load(own + 16 * i) * scale + two_bytes(_mm512_load_si512(at), _mm512_load_si512(at + low)) * times);
      }
    }
  }

  void start(int head_begin) {
    const int all = group * groups;
    for (int h = 0; h < heads; h++)
      for (int l = 0; l < all; l += LINES_AT_ONCE) {
        const FourLines four(c, row, head_begin + h, l, begin > 0 && c.state);
        four.begin(max_sum + (h * all + l) / LINES_AT_ONCE * 2);
        int8_t* to = q + (size_t(h) * groups + l / 8) * 2 * group * padded + l % 8 / LINES_AT_ONCE * 32;
        const vf scale = put_queries(four.query, D, padded, to, 8 * group) * (c.scale * LOG2E);
        _mm_store_ps(q_scale + h * all + l, _mm512_castps512_ps128((__m512)scale));
        float* own = o + (size_t(h) * all + l) * padded;
        std::fill(own, own + LINES_AT_ONCE * padded, 0.0f);
        for (int j = 0; j < LINES_AT_ONCE; j++)
          if (four.from[j]) pack_output(four.from[j], own + j * padded);
      }
  }
  // Outputs lie as values came: quads of columns of each 64 transposed.
  static int column(int d) { return d / 64 * 64 + d % 16 / 4 * 16 + d % 64 / 16 * 4; }
  void pack_output(const float* from, float* to) const {
    for (int d = 0; d < D; d += 4) std::memcpy(to + column(d), from + d, 4 * std::min(4, D - d));
  }
  void finish(int head_begin) {
    Ahead nothing(c, sizeof(i8), nullptr, 0, head_begin, heads, 0);
    if (pending >= 0) accumulate(pending, nothing);
    const int all = group * groups;
    for (int h = 0; h < heads; h++)
      for (int l = 0; l < lines; l += LINES_AT_ONCE) {
        const FourLines four(c, row, head_begin + h, l, false);
        const vf times = 1.0f / over_keys(max_sum[(h * all + l) / LINES_AT_ONCE * 2 + 1], false);
        const float* from = o + (size_t(h) * all + l) * padded;
        for (int j = 0; j < LINES_AT_ONCE && four.out[j]; j++, from += padded) write(from, of_line(times, j), four.out[j]);
      }
  }
  INLINE void write(const float* from, vf times, bf16* to) const {
    for (int d = 0; d < padded; d += 64) {
      vf x[4];
      UNROLL for (int i = 0; i < 4; i++) x[i] = load(from + d + 16 * i) * times;
      turn_quads(x);
      UNROLL for (int i = 0; i < 2; i++) {
        const __mmask32 valid = D - d > 32 * i ? first_of_32(D - d - 32 * i) : 0;
        _mm512_mask_storeu_epi16(to + d + 32 * i, valid, (__m512i)_mm512_cvtne2ps_pbh((__m512)x[2 * i + 1], (__m512)x[2 * i]));
      }
    }
  }
};

}  // namespace
#endif
