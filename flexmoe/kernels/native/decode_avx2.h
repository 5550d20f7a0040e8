// The stream path on AVX2 for bf16 queries: four lines at a time against a chunk of keys, bf16 or compressed.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "call.h"
#include "numbers.h"
#include "products_avx2.h"

#if defined(HAS_AVX2_STREAM)
namespace {

// What comes next in one pool, in the order of addresses, which hardware prefetchers follow.
struct Lines {
  const char *base, *at, *stop;  // the rest of a run of tokens that lie side by side
  const int64_t* offsets;
  int token = 0, end, bytes, together, apart, element_bytes;
  // `count` tokens from t on, heads [head, head + heads).
  Lines(const Call& c, const void* pool, int element, const int64_t* token_offsets, int count, int head, int heads, int t)
      : base((const char*)pool + int64_t(head) * c.width * element), at(base), stop(base), offsets(token_offsets), end(count),
        bytes(heads * c.width * element), together(heads == c.G ? c.page_tokens - t % c.page_tokens : 1),
        apart(heads == c.G ? c.page_tokens : 1), element_bytes(element) {
    next();
  }
  void next() {
    if (token >= end) return;
    const int run = std::min(together, end - token);
    at = base + offsets[token] * element_bytes, stop = at + run * bytes;
    token += run, together = apart;
  }
  // Where the next `steps` times `step` bytes are; those behind the end of the run are fetched at once.
  INLINE Meanwhile take(int steps, int step) {
    if (at >= stop) next();
    const Meanwhile taken{at, at < stop ? step : 0};
    if ((at += steps * step) > stop) rest();
    return taken;
  }
  __attribute__((noinline)) void rest() {
    while (at > stop && token < end) {
      const ptrdiff_t more = at - stop;
      next();
      for (ptrdiff_t i = 0; i < more; i += 64) __builtin_prefetch(at + i, 0, 2);
      at += more;
    }
    at = std::min(at, stop);
  }
};

template <class E> struct Avx2Stream {
  static constexpr bool packed = std::is_same<E, i8>::value;
  using Products = std::conditional_t<packed, PackedProducts, PlainProducts>;
  using Query = typename Products::Query;
  static constexpr int KEYS = Products::keys;
  const Call& c;
  // Lines come in groups of four; those behind the last have a query of zeros and no output.
  const int row, heads, lines, groups, padded, context, begin;
  const int64_t first_token;
  Query* q;                    // [heads][groups][padded / 16][4][16]
  float *o, *q_scale, *wide;   // numbers as `Products::place` has them, [heads][groups][4][2], [padded]
  vf* max_sum;                 // [heads][groups][2]: as in decode.h, lane = line * 2 + key
  E* rows;                     // [2][KEYS][padded], keys and values that are not whole blocks, or a chunk that is not
  float k_scale[KEYS], v_scale[KEYS];

  static size_t scratch_floats(const Call& c, int heads) {
    const size_t padded = round_up(c.D, BLOCK);
    return size_t(heads) * 2 * (2 * FOUR_LINES * padded + 3 * W) + (2 * KEYS + 1) * padded;
  }
  Avx2Stream(const Call& call, const Item& item, float* scratch)
      : c(call), row(item.row), heads(item.head_end - item.head_begin),
        lines((call.q_starts[row + 1] - call.q_starts[row]) * call.N), groups((lines + FOUR_LINES - 1) / FOUR_LINES),
        padded(round_up(call.D, BLOCK)), context(call.context_lens[row]), begin(first_key(call, row)),
        first_token(call.q_starts[row]) {
    const size_t all = size_t(heads) * groups;
    q = (Query*)scratch, o = scratch + all * FOUR_LINES * padded, max_sum = (vf*)(o + all * FOUR_LINES * padded);
    q_scale = (float*)(max_sum + 2 * all), wide = q_scale + all * W, rows = (E*)(wide + padded);
  }

  // As `Stream::run`.
  void run(const Item& item, const Item* following) {
    int64_t offsets[2][KEYS];
    int t = begin, count = std::min(KEYS, context - t);
    token_offsets(c, row, t, count, offsets[0]);
    start(item.head_begin);
    for (int now = 0; t < context; now ^= 1) {
      const bool done = t + count == context && following;
      const Item& item_ahead = done ? *following : item;
      const int t_ahead = done ? first_key(c, item_ahead.row) : t + count;
      const int next = std::min(KEYS, c.context_lens[item_ahead.row] - t_ahead);
      token_offsets(c, item_ahead.row, t_ahead, next, offsets[now ^ 1]);
      auto ahead = [&](const void* pool) { return Lines(c, pool, sizeof(E), offsets[now ^ 1], next, item_ahead.head_begin, heads, t_ahead); };
      Lines k_ahead = ahead(c.k_pool), v_ahead = ahead(c.v_pool);
      for (int h = 0; h < heads; h++) step(item.head_begin + h, h, offsets[now], t, count, next, k_ahead, v_ahead);
      t += count, count = next;
    }
    finish(item.head_begin);
  }

  void step(int head, int h, const int64_t* offsets, int t, int count, int next, Lines& k_ahead, Lines& v_ahead) {
    const E *k = (const E*)c.k_pool + int64_t(head) * c.width, *v = (const E*)c.v_pool + int64_t(head) * c.width;
    const int keys = round_up(count, Products::step);
    if constexpr (packed) {
      for (int i = 0; i < count; i++) k_scale[i] = head_scale(k + offsets[i], c.D), v_scale[i] = head_scale(v + offsets[i], c.D);
      for (int i = count; i < keys; i++) k_scale[i] = v_scale[i] = 0.0f;
    }
    int64_t copied[KEYS];
    if (keys != count || padded != c.D) {
      E *k_rows = rows, *v_rows = rows + KEYS * padded;
      for (int i = 0; i < keys; i++) {
        copied[i] = int64_t(i) * padded;
        copy_row(i < count ? k + offsets[i] : nullptr, k_rows + copied[i]), copy_row(i < count ? v + offsets[i] : nullptr, v_rows + copied[i]);
      }
      k = k_rows, v = v_rows, offsets = copied;
    }
    // Bytes that a step of the products fetches, so that together they fetch the next chunk.
    const int bytes = next * c.width * int(sizeof(E)), blocks = padded / BLOCK * groups;
    auto share = [&](int steps) { return std::min(96, (bytes + steps - 1) / steps); };
    const int k_step = share(keys / 2 * blocks), v_step = share(keys / Products::step * blocks);
    for (int g = 0; g < groups; g++) attend(h, g, k, v, offsets, t, keys, k_step, v_step, k_ahead, v_ahead);
  }
  INLINE void copy_row(const E* from, E* to) const {
    const int size = from ? c.D : 0;
    if (size) std::memcpy(to, from, size * sizeof(E));
    std::memset(to + size, 0, (padded - size) * sizeof(E));
  }

  __attribute__((noinline)) void attend(int h, int g, const E* k, const E* v, const int64_t* offsets, int t, int keys, int k_step, int v_step,
                                        Lines& k_ahead, Lines& v_ahead) {
    alignas(32) float score[KEYS * FOUR_LINES], alpha[W], times[W];
    alignas(32) int16_t weights[packed ? KEYS * FOUR_LINES : 1];
    vf* scores = (vf*)score;
    const int at = h * groups + g, first = context - lines / c.N, blocks = padded / BLOCK;
    vf* state = max_sum + 2 * at;
    const Query* query = q + size_t(at) * FOUR_LINES * padded;
    vf highest = state[0];
    const bool masked = t + keys - 1 > first || (c.window && t <= context - 1 - c.window);
    vi last = {}, lane_key = {};
    if (masked)
      for (int i = 0; i < W; i++) last[i] = first + std::min(lines - 1, g * FOUR_LINES + i / 2) / c.N, lane_key[i] = t + i % 2;
    for (int j = 0; j < keys; j += 2) {
      vf x = Products::scores(query, k + offsets[j], k + offsets[j + 1], padded, k_ahead.take(blocks, k_step));
      if constexpr (packed) x *= repeated<2>(k_scale + j) * load(q_scale + at * W);
      if (masked) {
        const vi key = lane_key + j;
        vi hidden = key > last;
        if (c.window) hidden |= key <= last - c.window;
        x = hidden ? (vf){} - __builtin_inff() : x;
      }
      highest = vmax(highest, x);
      scores[j / 2] = x;
    }
    highest = max_in_groups<2>(highest);
    const vf before = exp2_nonpositive(state[0] - highest);
    vf sum = state[1] * before, largest = {}, nothing = {};
    for (int j = 0; j < keys / 2; j++) {
      vf p = exp2_rounded(scores[j] - highest);
      sum += p;
      if constexpr (packed) p *= repeated<2>(v_scale + 2 * j), largest = vmax(largest, p), nothing += p * 0.0f;
      scores[j] = p;
    }
    state[0] = highest, state[1] = sum;
    *(vf*)alpha = before;
    float* own = o + size_t(at) * FOUR_LINES * padded;
    if constexpr (packed) {
      largest = vmax((vf){} + 1e-30f, max_in_groups<2>(largest));
      *(vf*)times = (largest + sum_in_groups<2>(nothing)) * (1.0f / STEPS_OF_16_BITS);  // NaN where a weight is not finite
      const vf steps = STEPS_OF_16_BITS / largest;
      for (int j = 0; j < keys / 2; j += 2) Products::put_weights(scores[j] * steps, scores[j + 1] * steps, weights + 8 * j);
    }
    for (int b = 0; b < blocks; b++, v += BLOCK, own += FOUR_LINES * BLOCK) {
      const Meanwhile fetched = v_ahead.take(keys / Products::step, v_step);
      if constexpr (packed) Products::values(v, offsets, keys, weights, alpha, times, own, fetched);
      else Products::values(v, offsets, keys, score, alpha, own, fetched);
    }
  }

  void start(int head_begin) {
    const size_t all = size_t(heads) * groups;
    std::memset(q, 0, all * FOUR_LINES * padded * sizeof(Query));
    std::fill(o, o + all * FOUR_LINES * padded, 0.0f);
    std::fill(q_scale, q_scale + all * W, 0.0f);
    for (size_t at = 0; at < 2 * all; at++) max_sum[at] = vf{};
    for (int h = 0; h < heads; h++)
      for (int line = 0; line < lines; line++) {
        const size_t at = size_t(h) * groups + line / FOUR_LINES;
        const int l = line % FOUR_LINES, head = (head_begin + h) * c.N + line % c.N;
        const int64_t token = first_token + line / c.N;
        widen_row((const bf16*)c.q + token * c.q_stride + int64_t(head) * c.D, wide, c.D, padded);
        const float scale = Products::put_query(wide, padded, c.scale * LOG2E, q + at * FOUR_LINES * padded + l * BLOCK);
        const float* from = begin > 0 && c.state ? state_of(c, token, head) : nullptr;
        q_scale[at * W + 2 * l] = q_scale[at * W + 2 * l + 1] = scale;
        max_sum[2 * at][2 * l] = max_sum[2 * at][2 * l + 1] = from ? from[c.D] : first_score(c, head);
        max_sum[2 * at + 1][2 * l] = from ? from[c.D + 1] : first_sum(c);
        for (int d = 0; from && d < c.D; d++) o[at * FOUR_LINES * padded + Products::place(l, d)] = from[d];
      }
  }

  void finish(int head_begin) {
    for (int h = 0; h < heads; h++)
      for (int line = 0; line < lines; line++) {
        const size_t at = size_t(h) * groups + line / FOUR_LINES;
        const int l = line % FOUR_LINES;
        const float* from = o + at * FOUR_LINES * padded + l * BLOCK;
        for (int d = 0; d < padded; d += BLOCK, from += FOUR_LINES * BLOCK) {
          vf first, second;
          Products::join(load(from), load(from + W), first, second);
          store(wide + d, first), store(wide + d + W, second);
        }
        bf16* to = (bf16*)c.out + ((first_token + line / c.N) * c.H + (head_begin + h) * c.N + line % c.N) * c.D;
        narrow_row(wide, to, c.D, 1.0f / (max_sum[2 * at + 1][2 * l] + max_sum[2 * at + 1][2 * l + 1]));
      }
  }
};

}  // namespace
#endif
