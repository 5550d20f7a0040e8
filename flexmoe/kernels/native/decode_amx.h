// The stream path on AMX, for bf16 queries: up to 16 lines against 64 keys at a time, keys and values loaded once for all lines, as
// they lie. Scores are a product of the keys and the queries as pairs of numbers. Outputs are one of weights and values, in which two
// numbers of a row stand where two keys are meant: each line has two rows of weights, with zeros for the second numbers and for the
// first, and gives its even and its odd columns. Weights are rounded to bf16, sums and outputs are fp32.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "amx.h"
#include "call.h"
#include "four_lines_amx.h"
#include "lanes.h"
#include "numbers.h"

#if defined(HAS_AMX)
namespace {

struct AmxStream {
  const Call& c;
  const int row, heads, lines, group, padded_lines, D, padded, context, begin;
  const int64_t first_token;
  bf16 *q, *weights, *keys, *values;  // [heads][padded / 32][16][lines][2], [lines / group][4][2 * group][32], [64][padded] each
  float *o, *scores;                  // [heads][lines][2][padded / 2], even columns and odd ones; [2][64][lines]
  vf* max_sum;                        // [heads][lines / 4][2]: as in decode.h
  struct Rows { const bf16* at; int64_t step; } value_tiles[AMX_KEYS / TILE_KEYS];
  int turn = 0, pending = -1, pending_tiles = 0;  // which scores are this step's; the head whose outputs lack the step before, its tiles

  static size_t scratch_floats(const Call& c, int heads) {
    const size_t padded = round_up(c.D, 32);
    return heads * AMX_LINES * (padded / 2 + padded + 2 * W) + AMX_LINES * AMX_KEYS * 4 + padded * AMX_KEYS + 64;
  }
  AmxStream(const Call& call, const Item& item, float* scratch)
      : c(call), row(item.row), heads(item.head_end - item.head_begin),
        lines((call.q_starts[row + 1] - call.q_starts[row]) * call.N), group(lines > LINES_AT_ONCE ? 8 : LINES_AT_ONCE),
        padded_lines(lines > 8 ? 16 : group), D(call.D), padded(round_up(call.D, 32)), context(call.context_lens[row]),
        begin(first_key(call, row)), first_token(call.q_starts[row]) {
    float* at = scratch;
    auto take = [&](size_t floats) { float* taken = at; at += floats; return taken; };
    q = (bf16*)take(size_t(heads) * padded_lines * padded / 2), o = take(size_t(heads) * padded_lines * padded);
    max_sum = (vf*)take(size_t(heads) * padded_lines / LINES_AT_ONCE * 2 * W);
    scores = take(2 * padded_lines * AMX_KEYS), weights = (bf16*)take(2 * padded_lines * AMX_KEYS);
    values = (bf16*)take(padded * AMX_KEYS / 2), keys = (bf16*)take(padded * AMX_KEYS / 2);
  }

  // As `Stream::run`.
  void run(const Item& item, const Item* following) {
    int64_t offsets[2][AMX_KEYS];
    int t = begin, count = cut(c, row, t);
    token_offsets(c, row, t, count, offsets[0]);
    start(item.head_begin);
    const int line_bytes = padded_lines * 4, rows = 2 * group;
    const Tiles tiles({{16, line_bytes}, {16, line_bytes}, {16, line_bytes}, {16, 64}, {16, 64}, {rows, 64}, {rows, 64}, {rows, 64}});
    for (int now = 0; t < context; now ^= 1) {
      const bool done = t + count == context && following;
      const Item& item_ahead = done ? *following : item;
      const int t_ahead = done ? first_key(c, item_ahead.row) : t + count, next = cut(c, item_ahead.row, t_ahead);
      token_offsets(c, item_ahead.row, t_ahead, next, offsets[now ^ 1]);
      Ahead ahead(c, sizeof(bf16), offsets[now ^ 1], next, item_ahead.head_begin, heads, t_ahead);
      attend(item.head_begin, offsets[now], t, count, ahead);
      t += count, count = next;
    }
    finish(item.head_begin);
  }

  // Keys that are done at a time; where a window begins inside a page, the first ones end with a tile of it.
  static int cut(const Call& c, int row, int t) {
    return std::min(AMX_KEYS - t % TILE_KEYS, c.context_lens[row] - t);
  }

  void start(int head_begin) {
    for (int h = 0; h < heads; h++)
      for (int l = 0; l < padded_lines; l += LINES_AT_ONCE) {
        const FourLines four(c, row, head_begin + h, l, begin > 0 && c.state);
        four.begin(max_sum + (h * padded_lines + l) / LINES_AT_ONCE * 2);
        char* to = (char*)(q + size_t(h) * padded * padded_lines + 2 * l);
        for (int d = 0; d < padded; d += 32, to += 16 * 4 * padded_lines) {
          vf x[LINES_AT_ONCE];
          UNROLL for (int j = 0; j < LINES_AT_ONCE; j++)
            x[j] = four.query[j] ? (vf)load_32(four.query[j] + d, first_of_32(D - d)) : vf{};
          put_words<false>(x, to, 4 * padded_lines);
        }
        float* own = o + (size_t(h) * padded_lines + l) * padded;
        std::fill(own, own + LINES_AT_ONCE * padded, 0.0f);
        for (int j = 0; j < LINES_AT_ONCE; j++, own += padded)
          for (int d = 0; four.from[j] && d < D; d++) own[d % 2 * padded / 2 + d / 2] = four.from[j][d];
      }
  }

  // Scores are a step ahead and outputs one behind, so that no step waits for what it has just stored.
  void attend(int head_begin, const int64_t* offsets, int t, int count, Ahead& ahead) {
    const bf16 *k = (const bf16*)c.k_pool + int64_t(head_begin) * c.width, *v = (const bf16*)c.v_pool + int64_t(head_begin) * c.width;
    const int tiles = (count + TILE_KEYS - 1) / TILE_KEYS, some = share(AMX_KEYS / 4, padded_lines / LINES_AT_ONCE);
    const bool masked = count < AMX_KEYS || t + count > context - lines / c.N + 1 || (c.window && t <= context - 1 - c.window);
    score(k, offsets, count, tiles, 0, ahead);
    for (int h = 0; h < heads; h++, v += c.width) {
      turn ^= 1;
      if (h + 1 < heads) score(k += c.width, offsets, count, tiles, h + 1, ahead);
      accumulate(ahead);
      float* own = o + size_t(h) * padded_lines * padded;
      for (int l = 0; l < padded_lines; l += LINES_AT_ONCE) {
        vf* state = max_sum + (h * padded_lines + l) / LINES_AT_ONCE * 2;
        ahead.fetch_far(some);
        masked ? softmax<true>(l, t, count, state, own) : softmax<false>(l, t, count, state, own);
      }
      for (int i = 0; i < tiles; i++) value_tiles[i] = place(v, offsets, count, i, values);
      pending = h, pending_tiles = tiles;
    }
  }
  // Bytes of so many of the keys that come next, in one of so many pieces; every head brings AMX_KEYS of them in all.
  INLINE int share(int keys, int pieces) const { return keys * c.width * int(sizeof(bf16)) * 17 / 16 / pieces; }

  // scores[key][line] of the keys, in tiles.
  __attribute__((noinline)) void score(const bf16* k, const int64_t* offsets, int count, int tiles, int h, Ahead& ahead) {
    const int line_bytes = padded_lines * 4, some = share(AMX_KEYS * 3 / 8, (tiles + 1) / 2 * (padded / 32));
    const bf16* query = q + size_t(h) * padded_lines * padded;
    for (int i = 0; i < tiles; i += 2) {
      const Rows a = place(k, offsets, count, i, keys), b = place(k, offsets, count, std::min(i + 1, tiles - 1), keys);
      settle();
      _tile_zero(0);
      _tile_zero(1);
      for (int d = 0; d < padded; d += 32) {
        ahead.fetch_far(some);
        _tile_loadd(2, query + size_t(d) * padded_lines, line_bytes);
        _tile_loadd(3, a.at + d, a.step);
        _tile_dpbf16ps(0, 3, 2);
        _tile_loadd(4, b.at + d, b.step);
        _tile_dpbf16ps(1, 4, 2);
      }
      float* to = scores_of(turn ^ 1) + i * TILE_KEYS * padded_lines;
      _tile_stored(0, to, line_bytes);
      if (i + 1 < tiles) _tile_stored(1, to + TILE_KEYS * padded_lines, line_bytes);
    }
  }
  INLINE float* scores_of(int which) const { return scores + which * AMX_KEYS * padded_lines; }
  // A tile of keys or values where it lies, if it does so in whole numbers and at one step; else a copy.
  INLINE Rows place(const bf16* from, const int64_t* offsets, int count, int tile, bf16* copies) const {
    const int first = tile * TILE_KEYS, last = std::min(count, first + TILE_KEYS);
    if (D == padded && last - first == TILE_KEYS && evenly(c, offsets + first))
      return {from + offsets[first], int64_t(c.G) * c.width * 2};
    bf16 *begin = copies + size_t(first) * padded, *to = begin;
    for (int i = first; i < last; i++, to += padded)
      for (int d = 0; d < padded; d += 32) _mm512_storeu_si512(to + d, load_32(from + offsets[i] + d, first_of_32(D - d)));
    std::memset(to, 0, size_t(first + TILE_KEYS - last) * padded * 2);
    return {begin, padded * 2};
  }

  // Weights of four lines; what they have put out is scaled to their new maximum.
  template <bool MASKED> __attribute__((noinline)) void softmax(int l, int t, int count, vf* state, float* own) {
    constexpr int VECTORS = AMX_KEYS / 4;
    const vf factor = (vf){} + c.scale * LOG2E;
    vf x[VECTORS], highest = state[0];
    UNROLL for (int i = 0; i < VECTORS; i++) {
      x[i] = load_4x4(scores_of(turn) + 4 * i * padded_lines + l, padded_lines) * factor;
      if constexpr (MASKED) x[i] = masked(c, row, x[i], l, t, 4 * i, count);
    }
    vf top[4] = {highest, x[0], x[1], x[2]};
    UNROLL for (int i = 3; i < VECTORS; i++) top[i % 4] = vmax(top[i % 4], x[i]);
    highest = relative_to(highest, over_keys(vmax(vmax(top[0], top[1]), vmax(top[2], top[3])), true));
    const vf alpha = exp2_nonpositive(state[0] - highest);
    vf sums[2] = {state[1] * alpha, {}};
    UNROLL for (int i = 0; i < VECTORS; i++) {
      x[i] = exp2_rounded(x[i] - highest);
      sums[i % 2] += x[i];
    }
    bf16* to = weights + (l / 8 * AMX_KEYS / TILE_KEYS * group + l % 8) * 2 * 32;
    UNROLL for (int i = 0; i < VECTORS; i += 4, to += 2 * group * 32) {
      __m512 line[4];
      weights_by_line(x + i, line);
      UNROLL for (int j = 0; j < LINES_AT_ONCE; j++) {
        const __m512i first = in_order((__m256i)_mm512_cvtneps_pbh(line[j]));
        _mm512_store_si512(to + 2 * j * 32, first), _mm512_store_si512(to + (2 * j + 1) * 32, _mm512_slli_epi32(first, 16));
      }
    }
    if (_mm512_cmp_ps_mask((__m512)state[0], (__m512)highest, _CMP_NEQ_UQ)) rescale(alpha, own + size_t(l) * padded);
    state[0] = highest, state[1] = sums[0] + sums[1];
  }
  // Weights of 16 keys, as `weights_by_line` leaves them, every other number zero.
  static INLINE __m512i in_order(__m256i x) {
    const __m512i key = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_maskz_permutexvar_epi16(0x55555555, key, _mm512_castsi256_si512(x));
  }
  __attribute__((noinline)) void rescale(vf alpha, float* own) {
    for (int l = 0; l < LINES_AT_ONCE; l++, own += padded)
      for (int d = 0; d < padded; d += W) store(own + d, load(own + d) * alpha[l]);
  }

  // Adds weights times values of the step before.
  __attribute__((noinline)) void accumulate(Ahead& ahead) {
    if (pending < 0) return;
    settle();
    const int64_t step = padded * 2;
    const int some = share(AMX_KEYS * 3 / 8, padded_lines / group * ((padded + 63) / 64) * pending_tiles);
    float* own = o + size_t(pending) * padded_lines * padded;
    const bf16* of_lines = weights;
    for (int l = 0; l < padded_lines; l += group, own += group * padded, of_lines += AMX_KEYS / TILE_KEYS * 2 * group * 32)
      for (int d = 0; d < padded; d += 64) {
        const bool two = d + 32 < padded;
        _tile_loadd(6, own + d / 2, step);
        if (two) _tile_loadd(7, own + d / 2 + 16, step);
        for (int i = 0; i < pending_tiles; i++) {
          ahead.fetch_far(some);
          _tile_loadd(5, of_lines + i * 2 * group * 32, 64);
          _tile_loadd(3, value_tiles[i].at + d, value_tiles[i].step);
          _tile_dpbf16ps(6, 5, 3);
          if (!two) continue;
          _tile_loadd(4, value_tiles[i].at + d + 32, value_tiles[i].step);
          _tile_dpbf16ps(7, 5, 4);
        }
        _tile_stored(6, own + d / 2, step);
        if (two) _tile_stored(7, own + d / 2 + 16, step);
      }
  }

  void finish(int head_begin) {
    Ahead nothing(c, sizeof(bf16), nullptr, 0, head_begin, heads, 0);
    accumulate(nothing);
    for (int h = 0; h < heads; h++)
      for (int l = 0; l < lines; l += LINES_AT_ONCE) {
        const FourLines four(c, row, head_begin + h, l, false);
        const vf times = 1.0f / over_keys(max_sum[(h * padded_lines + l) / LINES_AT_ONCE * 2 + 1], false);
        const float* from = o + size_t(h * padded_lines + l) * padded;
        for (int j = 0; j < LINES_AT_ONCE && four.out[j]; j++, from += padded) write(from, of_line(times, j), four.out[j]);
      }
  }
  // Columns in order from even and odd ones.
  INLINE void write(const float* from, vf times, bf16* to) const {
    for (int d = 0; d < padded; d += 32)
      _mm512_mask_storeu_epi16(to + d, first_of_32(D - d), pairs_of((__m512)(load(from + d / 2) * times), (__m512)(load(from + (padded + d) / 2) * times)));
  }
};

}  // namespace
#endif
