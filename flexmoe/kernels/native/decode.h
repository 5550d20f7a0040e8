// The stream path, for few lines (decode, speculation): vectors run along D, K and V are read from the pool once, in
// place. A chunk of keys is done for every head before the next chunk, since the heads of a token lie side by side.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "call.h"
#include "lanes.h"
#include "numbers.h"

namespace {

constexpr int STREAM_CHUNK = 16;  // keys of every head; the chunk ahead is prefetched into what is left of the L1 cache
constexpr int STREAM_LINES = 8;   // at most this many lines take the stream path

// LINES lines against one chunk of keys. A score vector holds lane = line * KEYS + key.
struct StreamLines {
  const float* q;   // [LINES][padded]
  float* o;         // [LINES][padded]
  vf* max_sum;      // [2]: running maximum (equal within a line), running sum (partial, per lane)
  const int32_t* position;  // [LINES]
};

template <int LINES, int DV, class T>
INLINE void stream_values(const T* const* v, int from, int keys, const float* p, const float* alpha, float* o,
                          int padded) {
  constexpr int KEYS = W / LINES;
  vf acc[LINES][DV];
  UNROLL for (int l = 0; l < LINES; l++)
    UNROLL for (int d = 0; d < DV; d++) acc[l][d] = load(o + l * padded + d * W) * alpha[l * KEYS];
  for (int j = 0; j < keys; j += KEYS, p += W)
    UNROLL for (int i = 0; i < KEYS; i++) {
      const T* row = v[j + i] + from;
      vf x[DV];
      UNROLL for (int d = 0; d < DV; d++) x[d] = load(row + d * W);
      UNROLL for (int l = 0; l < LINES; l++)
        UNROLL for (int d = 0; d < DV; d++) acc[l][d] += x[d] * p[l * KEYS + i];
    }
  UNROLL for (int l = 0; l < LINES; l++)
    UNROLL for (int d = 0; d < DV; d++) store(o + l * padded + d * W, acc[l][d]);
}

// A chunk of keys and values of one KV head: pointers to them, and what they are times where they are compressed.
template <class E> struct Chunk {
  static constexpr bool scaled = std::is_same<E, i8>::value;
  const E *k[STREAM_CHUNK], *v[STREAM_CHUNK];
  float k_scale[scaled ? STREAM_CHUNK : 1], v_scale[scaled ? STREAM_CHUNK : 1];
  INLINE void set(int i, const E* key, const E* value, int D) {
    k[i] = key, v[i] = value;
    if constexpr (scaled) k_scale[i] = head_scale(key, D), v_scale[i] = head_scale(value, D);
  }
  INLINE void set_zero(int i, const E* zeros) {
    k[i] = v[i] = zeros;
    if constexpr (scaled) k_scale[i] = v_scale[i] = 0.0f;
  }
};

template <int LINES, class T>
__attribute__((noinline)) void stream_chunk(const StreamLines& s, const Chunk<T>& chunk, int first_key, int keys, int window,
                                            int padded, Ahead& ahead) {
  const T* const* k = chunk.k;
  const T* const* v = chunk.v;
  constexpr int KEYS = W / LINES;
  alignas(64) float score[STREAM_CHUNK * LINES];
  alignas(64) float alpha[W];
  vf* scores = (vf*)score;
  int groups = keys / KEYS;
  const int share = KEYS * padded * int(sizeof(T));
  Ahead next = ahead;
  vf highest = s.max_sum[0];
  int oldest = s.position[0], newest = s.position[0];
  for (int l = 1; l < LINES; l++) oldest = std::min(oldest, s.position[l]), newest = std::max(newest, s.position[l]);
  const bool masked = first_key + keys - 1 > oldest || (window && first_key <= newest - window);
  vi last = {}, lane_key = {};
  if (masked)
    for (int i = 0; i < W; i++) last[i] = s.position[i / KEYS], lane_key[i] = first_key + i % KEYS;
  for (int j = 0; j < groups; j++) {
    vf acc[W] = {};
    next.fetch(share);
    for (int d = 0; d < padded; d += W) {
      vf x[KEYS];
      UNROLL for (int i = 0; i < KEYS; i++) x[i] = load(k[j * KEYS + i] + d);
      UNROLL for (int l = 0; l < LINES; l++) {
        vf y = load(s.q + l * padded + d);
        UNROLL for (int i = 0; i < KEYS; i++) acc[l * KEYS + i] += x[i] * y;
      }
    }
    vf x = sum_each<W>(acc);
    if constexpr (Chunk<T>::scaled) x *= repeated<KEYS>(chunk.k_scale + j * KEYS);
    if (masked) {
      vi key = lane_key + j * KEYS;
      vi hidden = key > last;
      if (window) hidden |= key <= last - window;
      x = hidden ? (vf){} - __builtin_inff() : x;
    }
    highest = vmax(highest, x);
    scores[j] = x;
  }
  ahead = next;
  highest = max_in_groups<KEYS>(highest);
  vf scale = exp2_nonpositive(s.max_sum[0] - highest), sum = s.max_sum[1] * scale;
  for (int j = 0; j < groups; j++) {
    vf p = exp2_nonpositive(scores[j] - highest);
    sum += p;
    if constexpr (Chunk<T>::scaled) p *= repeated<KEYS>(chunk.v_scale + j * KEYS);
    scores[j] = p;
  }
  s.max_sum[0] = highest, s.max_sum[1] = sum;
  *(vf*)alpha = scale;
  constexpr int DV = many_registers ? (LINES > 4 ? 2 : 4) : (LINES > 4 ? 1 : LINES > 2 ? 2 : 4);
  int d = 0;
  for (; d + DV * W <= padded; d += DV * W) stream_values<LINES, DV>(v, d, keys, score, alpha, s.o + d, padded);
  for (; d + W <= padded; d += W) stream_values<LINES, 1>(v, d, keys, score, alpha, s.o + d, padded);
}

template <class T>
INLINE void stream_lines(int lines, const StreamLines& s, const Chunk<T>& chunk, int first_key, int keys, int window,
                         int padded, Ahead& ahead) {
  if constexpr (W >= 8)
    if (lines == 8) return stream_chunk<8>(s, chunk, first_key, keys, window, padded, ahead);
  if (lines == 4) stream_chunk<4>(s, chunk, first_key, keys, window, padded, ahead);
  else if (lines == 2) stream_chunk<2>(s, chunk, first_key, keys, window, padded, ahead);
  else stream_chunk<1>(s, chunk, first_key, keys, window, padded, ahead);
}

INLINE int cut_lines(int left) { return left >= 8 && W >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1; }

// T: queries and outputs; E: keys and values as they are stored.
template <class T, class E> struct Stream {
  const Call& c;
  const int row, heads, lines, padded;
  const int64_t first_token;
  float *q, *o, *kv;
  vf* max_sum;

  static size_t scratch_floats(const Call& c, int heads) {
    int padded = round_up(c.D, W);
    return size_t(heads) * STREAM_LINES * (2 * padded + 2 * W) + size_t(2 * STREAM_CHUNK + 1) * padded;
  }
  Stream(const Call& call, const Item& item, float* scratch)
      : c(call), row(item.row), heads(item.head_end - item.head_begin),
        lines((call.q_starts[row + 1] - call.q_starts[row]) * call.N), padded(round_up(call.D, W)),
        first_token(call.q_starts[row]) {
    q = scratch, o = q + size_t(heads) * STREAM_LINES * padded;
    max_sum = (vf*)(o + size_t(heads) * STREAM_LINES * padded);
    kv = (float*)(max_sum + size_t(heads) * STREAM_LINES * 2);
  }
  INLINE int64_t out_offset(int head, int line) const {
    return ((first_token + line / c.N) * c.H + head * c.N + line % c.N) * c.D;
  }

  // `following` (or null) is the item that this thread does next: its first chunk is fetched behind this one's last.
  void run(const Item& item, const Item* following) {
    const int tokens = lines / c.N, context = c.context_lens[row];
    int32_t position[STREAM_LINES];
    for (int l = 0; l < lines; l++) position[l] = context - tokens + l / c.N;
    int64_t offsets[2][STREAM_CHUNK];
    int t = first_key(c, row), count = std::min(STREAM_CHUNK, context - t);
    token_offsets(c, row, t, count, offsets[0]);
    start(item.head_begin);
    for (int now = 0; t < context; now ^= 1) {
      const bool done = t + count == context && following;
      const Item& item_ahead = done ? *following : item;
      const int t_ahead = done ? first_key(c, item_ahead.row) : t + count;
      const int next = std::min(STREAM_CHUNK, c.context_lens[item_ahead.row] - t_ahead);
      token_offsets(c, item_ahead.row, t_ahead, next, offsets[now ^ 1]);
      Ahead ahead(c, sizeof(E), offsets[now ^ 1], next, item_ahead.head_begin, heads, t_ahead);
      for (int h = item.head_begin; h < item.head_end; h++)
        step(h, h - item.head_begin, offsets[now], t, count, position, ahead);
      t += count, count = next;
    }
    finish(item.head_begin);
  }

  void start(int head_begin) {
    const float factor = c.scale * LOG2E;
    for (int h = 0; h < heads; h++) {
      for (int l = 0; l < lines; l++) {
        const T* from = (const T*)c.q + (first_token + l / c.N) * c.q_stride
                        + int64_t((head_begin + h) * c.N + l % c.N) * c.D;
        widen_row(from, q + (h * STREAM_LINES + l) * padded, c.D, padded, factor);
      }
      start_softmax(h, (head_begin + h) * c.N);
    }
    std::fill(o, o + size_t(heads) * STREAM_LINES * padded, 0.0f);
    if (first_key(c, row) > 0 && c.state) go_on(head_begin);
    std::fill(kv, kv + padded, 0.0f);  // the row of zeros behind the last key
  }

  // A line's maximum is in all its lanes; of its sum each lane has a part.
  void start_softmax(int h, int first_head) {
    for (int l = 0, take; l < lines; l += take) {
      take = cut_lines(lines - l);
      vf highest = {}, sum = {};
      for (int i = 0; i < W; i++) {
        const int line = i / (W / take);
        highest[i] = first_score(c, first_head + (l + line) % c.N);
        sum[i] = i % (W / take) ? 0.0f : first_sum(c);
      }
      max_sum[(h * STREAM_LINES + l) * 2] = highest, max_sum[(h * STREAM_LINES + l) * 2 + 1] = sum;
    }
  }

  // From the shared keys, which have been attended to.
  void go_on(int head_begin) {
    for (int h = 0; h < heads; h++)
      for (int l = 0, take; l < lines; l += take) {
        take = cut_lines(lines - l);
        vf highest = {}, sum = {};
        for (int i = 0; i < take; i++) {
          const float* from = state_of(c, first_token + (l + i) / c.N, (head_begin + h) * c.N + (l + i) % c.N);
          std::copy(from, from + c.D, o + (h * STREAM_LINES + l + i) * padded);
          for (int lane = 0; lane < W / take; lane++) highest[i * (W / take) + lane] = from[c.D];
          sum[i * (W / take)] = from[c.D + 1];
        }
        max_sum[(h * STREAM_LINES + l) * 2] = highest, max_sum[(h * STREAM_LINES + l) * 2 + 1] = sum;
      }
  }

  template <class X>
  void step_lines(int h, const Chunk<X>& chunk, int t, int keys, const int32_t* position, Ahead& ahead) {
    for (int l = 0, take; l < lines; l += take) {
      take = cut_lines(lines - l);
      const int at = h * STREAM_LINES + l;
      StreamLines s{q + at * padded, o + at * padded, max_sum + at * 2, position + l};
      stream_lines(take, s, chunk, t, keys, c.window, padded, ahead);
    }
  }

  void step(int head, int h, const int64_t* offsets, int t, int count, const int32_t* position, Ahead& ahead) {
    const E *k = (const E*)c.k_pool + int64_t(head) * c.width, *v = (const E*)c.v_pool + int64_t(head) * c.width;
    const int keys = round_up(count, W);  // whole vectors for every number of lines
    if (padded == c.D) {
      Chunk<E> chunk;
      for (int i = 0; i < count; i++) chunk.set(i, k + offsets[i], v + offsets[i], c.D);
      for (int i = count; i < keys; i++) chunk.set_zero(i, (const E*)kv);
      step_lines(h, chunk, t, keys, position, ahead);
    } else {
      Chunk<float> chunk;
      for (int i = count; i < keys; i++) chunk.set_zero(i, kv);
      for (int i = 0; i < count; i++) {
        float* to = kv + size_t(2 * i + 1) * padded;
        widen_row(k + offsets[i], to, c.D, padded, head_scale(k + offsets[i], c.D));
        widen_row(v + offsets[i], to + padded, c.D, padded, head_scale(v + offsets[i], c.D));
        chunk.set(i, to, to + padded, c.D);
      }
      step_lines(h, chunk, t, keys, position, ahead);
    }
  }

  void finish(int head_begin) {
    for (int h = 0; h < heads; h++)
      for (int l = 0, take; l < lines; l += take) {
        take = cut_lines(lines - l);
        vf part = max_sum[(h * STREAM_LINES + l) * 2 + 1];
        vf sum = take == 8   ? sum_in_groups<W / 8>(part)
                 : take == 4 ? sum_in_groups<W / 4>(part)
                 : take == 2 ? sum_in_groups<W / 2>(part)
                             : sum_in_groups<W>(part);
        for (int i = 0; i < take; i++)
          narrow_row(o + (h * STREAM_LINES + l + i) * padded, (T*)c.out + out_offset(head_begin + h, l + i), c.D,
                     1.0f / sum[i * (W / take)]);
      }
  }
};

}  // namespace
