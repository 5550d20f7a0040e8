// The tile path, for many lines (prefill): vectors run along lines. K and V elements are broadcast, so neither is ever
// transposed and the softmax needs no horizontal operation.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "call.h"
#include "lanes.h"
#include "numbers.h"

namespace {

constexpr int CHUNK = 96;  // keys per step; a multiple of every key blocking below
constexpr int TILE_VECTORS = many_registers ? 4 : 2;
constexpr int TILE_LINES = TILE_VECTORS * W;

// out[i][line] = sum over j of b[j * b_step + i * b_next] * a[j][line], for I values of i, after scaling what is there.
template <int NV, int I, bool ADD>
INLINE void tile_product(const float* a, const float* b, int64_t b_step, int64_t b_next, int count, const vf* alpha,
                         float* out) {
  vf acc[I][NV];
  UNROLL for (int i = 0; i < I; i++)
    UNROLL for (int n = 0; n < NV; n++)
      acc[i][n] = ADD ? *(const vf*)(out + (i * NV + n) * W) * alpha[n] : (vf){};
  for (int j = 0; j < count; j++, a += NV * W, b += b_step) {
    vf x[NV];
    UNROLL for (int n = 0; n < NV; n++) x[n] = *(const vf*)(a + n * W);
    UNROLL for (int i = 0; i < I; i++) {
      float y = b[i * b_next];
      UNROLL for (int n = 0; n < NV; n++) acc[i][n] += x[n] * y;
    }
  }
  UNROLL for (int i = 0; i < I; i++)
    UNROLL for (int n = 0; n < NV; n++) *(vf*)(out + (i * NV + n) * W) = acc[i][n];
}

// What one tile keeps; its arithmetic does not depend on the storage type.
template <int NV> struct TileState {
  static constexpr int LINES = NV * W;
  static constexpr int BLOCKING = NV == TILE_VECTORS ? 6 : 8;  // accumulators: BLOCKING * NV
  static_assert(CHUNK % BLOCKING == 0, "keys are padded to whole blockings inside a chunk");
  int D, window, first_position, last_position;
  float *q, *o, *s, *k, *v;  // [D][LINES], [D][LINES], [CHUNK][LINES], [CHUNK][D], [CHUNK][D]
  vf highest[NV], sum[NV], alpha[NV];
  vi position[NV];

  // Attention of the tile's lines to the keys [t, t + keys) in k and v.
  template <int FIXED_D> __attribute__((noinline)) void accumulate(int t, int keys) {
    const int size = FIXED_D ? FIXED_D : D;
    for (int i = 0; i < keys; i += BLOCKING)
      tile_product<NV, BLOCKING, false>(q, k + i * size, 1, size, size, nullptr, s + i * LINES);
    softmax(t, keys);
    int d = 0;
    for (; d + BLOCKING <= size; d += BLOCKING) values<BLOCKING>(d, size, keys);
    for (; d + 4 <= size; d += 4) values<4>(d, size, keys);
    for (; d < size; d++) values<1>(d, size, keys);
  }
  template <int I> INLINE void values(int d, int size, int keys) {
    tile_product<NV, I, true>(s, v + d, size, 1, keys, alpha, o + d * LINES);
  }
  __attribute__((noinline)) void softmax(int t, int keys) {
    if (t + keys - 1 > first_position || (window && t <= last_position - window)) mask(t, keys);
    UNROLL for (int n = 0; n < NV; n++) {
      vf *x = (vf*)s + n, top[2] = {highest[n], highest[n]};
      int j = 0;
      for (; j + 2 <= keys; j += 2) top[0] = vmax(top[0], x[j * NV]), top[1] = vmax(top[1], x[j * NV + NV]);
      top[0] = vmax(top[0], top[1]);
      alpha[n] = exp2_nonpositive(highest[n] - top[0]);
      vf total = sum[n] * alpha[n];
      for (j = 0; j < keys; j++) {
        x[j * NV] = exp2_nonpositive(x[j * NV] - top[0]);
        total += x[j * NV];
      }
      highest[n] = top[0], sum[n] = total;
    }
  }
  void mask(int t, int keys) {
    const vf nothing = (vf){} - __builtin_inff();
    for (int j = 0; j < keys; j++)
      UNROLL for (int n = 0; n < NV; n++) {
        vi hidden = position[n] < t + j;
        if (window) hidden |= position[n] >= t + j + window;
        vf* x = (vf*)s + j * NV + n;
        *x = hidden ? nothing : *x;
      }
  }
};

// T: queries and outputs; E: keys and values as they are stored.
template <class T, class E, int NV> struct Tile : TileState<NV> {
  using State = TileState<NV>;
  using State::D, State::q, State::o, State::s, State::k, State::v, State::LINES;
  const Call& c;
  const int row, head;
  const Shared* const shared;
  const int64_t first_token;
  int valid, begin;
  int32_t token[LINES], member[LINES];  // of each line: query token of the row, head of the group

  Tile(const Call& call, const Item& item, float* scratch)
      : c(call), row(item.row), head(item.head_begin), shared(item.segment < 0 ? nullptr : c.shared + item.segment),
        first_token(c.q_starts[row]) {
    D = c.D, this->window = c.window;
    q = scratch, o = q + D * LINES, s = o + D * LINES, k = s + CHUNK * LINES;
    v = k + round_up(CHUNK * D, W);
    const int tokens = item_tokens(c, item), first_line = item.tile * TILE_LINES;
    const int past = c.context_lens[row] - tokens;
    valid = std::min(TILE_LINES, tokens * c.N - first_line);
    for (int l = 0; l < LINES; l++) {
      const int line = first_line + std::min(l, valid - 1);
      token[l] = line / c.N, member[l] = line % c.N;
      this->position[l / W][l % W] = past + token[l];
    }
    this->first_position = past + token[0], this->last_position = past + token[LINES - 1];
    begin = shared ? shared->begin : c.begins ? c.begins[row]
            : c.window ? std::max(0, this->first_position - c.window + 1) : 0;
    if (shared) {  // every query sees all of these keys, and nothing behind them
      for (int l = 0; l < LINES; l++) this->position[l / W][l % W] = shared->end - 1;
      this->first_position = this->last_position = shared->end - 1;
    }
  }
  static size_t scratch_floats(const Call& c) {
    return size_t(2 * c.D + CHUNK) * TILE_LINES + 2 * size_t(round_up(CHUNK * c.D, W)) + 64;
  }

  void run() {
    pack_queries();
    start();
    const int end = this->last_position + 1;
    for (int t = begin; t < end; t += CHUNK) {
      const int count = std::min(CHUNK, end - t), keys = round_up(count, State::BLOCKING);
      widen_keys(t, count, keys);
      if (D == 64) this->template accumulate<64>(t, keys);
      else if (D == 128) this->template accumulate<128>(t, keys);
      else this->template accumulate<0>(t, keys);
    }
    shared ? keep() : write();
  }

  // At no key yet, or behind the shared keys that have been attended to.
  void start() {
    std::fill(o, o + D * LINES, 0.0f);
    for (int l = 0; l < LINES; l++) {
      const int own = head * c.N + member[l];
      const float* from = begin > 0 && c.state ? state_of(c, first_token + token[l], own) : nullptr;
      this->highest[l / W][l % W] = from ? from[D] : first_score(c, own);
      this->sum[l / W][l % W] = from ? from[D + 1] : first_sum(c);
      for (int d = 0; from && d < D; d++) o[d * LINES + l] = from[d];
    }
  }

  // What the keys behind the shared ones go on from.
  void keep() {
    for (int l = 0; l < valid; l++) {
      float* to = state_of(c, first_token + token[l], head * c.N + member[l]);
      for (int d = 0; d < D; d++) to[d] = o[d * LINES + l];
      to[D] = this->highest[l / W][l % W], to[D + 1] = this->sum[l / W][l % W];
    }
  }

  void pack_queries() {
    const float factor = c.scale * LOG2E;
    for (int n = 0; n < NV; n++) {
      const T* from[W];
      for (int i = 0; i < W; i++)
        from[i] = (const T*)c.q + (first_token + int64_t(token[n * W + i])) * c.q_stride
                  + int64_t(head * c.N + member[n * W + i]) * D;
      int d = 0;
      for (; d + W <= D; d += W) {
        vf x[W];
        UNROLL for (int i = 0; i < W; i++) x[i] = load(from[i] + d) * factor;
        transpose(x);
        UNROLL for (int i = 0; i < W; i++) store(q + (d + i) * LINES + n * W, x[i]);
      }
      for (; d < D; d++)
        for (int i = 0; i < W; i++) q[d * LINES + n * W + i] = widen(from[i][d]) * factor;
    }
  }

  void widen_keys(int t, int count, int keys) {
    int64_t offsets[CHUNK];
    token_offsets(c, row, t, count, offsets);
    const E *from_k = (const E*)c.k_pool + int64_t(head) * c.width, *from_v = (const E*)c.v_pool + int64_t(head) * c.width;
    for (int i = 0; i < count; i++) {
      widen_row(from_k + offsets[i], k + i * D, D, D, head_scale(from_k + offsets[i], D));
      widen_row(from_v + offsets[i], v + i * D, D, D, head_scale(from_v + offsets[i], D));
    }
    std::fill(k + count * D, k + keys * D, 0.0f);
    std::fill(v + count * D, v + keys * D, 0.0f);
  }

  void write() {
    for (int n = 0; n < NV; n++) {
      const int lines = std::min(W, valid - n * W);
      const vf factor = 1.0f / this->sum[n];
      T* to[W];
      for (int i = 0; i < W; i++)
        to[i] = (T*)c.out + ((first_token + int64_t(token[n * W + i])) * c.H + head * c.N + member[n * W + i]) * D;
      int d = 0;
      for (; d + W <= D; d += W) {
        vf x[W];
        UNROLL for (int i = 0; i < W; i++) x[i] = load(o + (d + i) * LINES + n * W) * factor;
        transpose(x);
        for (int i = 0; i < lines; i++) store(to[i] + d, x[i]);
      }
      for (; d < D; d++)
        for (int i = 0; i < lines; i++) narrow(o[d * LINES + n * W + i] * factor[i], to[i] + d);
    }
  }
};

template <class T, class E> void run_tile(const Call& c, const Item& item, float* scratch) {
  const int lines = item_tokens(c, item) * c.N - item.tile * TILE_LINES;
  if (lines <= W) Tile<T, E, 1>(c, item, scratch).run();
  else if (TILE_VECTORS > 2 && lines <= 2 * W) Tile<T, E, 2>(c, item, scratch).run();
  else Tile<T, E, TILE_VECTORS>(c, item, scratch).run();
}

}  // namespace
