// The tile path on AMX, for bf16 queries: some tiles of 64 lines at a time against 128 keys, so that values are transposed once
// for all of them. Scores are [key][line], a product of the keys as they lie and the queries as pairs of numbers; outputs are
// [column][line], one of the transposed values and the weights of pairs of keys. Weights are rounded to bf16.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "amx.h"
#include "call.h"
#include "decode_amx.h"
#include "lanes.h"
#include "numbers.h"
#include "prefill.h"

#if defined(HAS_AMX)
namespace {

constexpr int AMX_CHUNK = 128;       // keys at a time
constexpr int AMX_TILES = 4;         // of TILE_LINES lines, that one item has at most

// Keys and values of a chunk, for all lines: [128][padded] bf16, or where the keys lie; [padded][128] bf16.
template <class E> struct AmxChunk {
  static constexpr bool scaled = std::is_same<E, i8>::value;
  struct Keys { const bf16* at; int64_t step; };
  const Call& c;
  const int D, padded;
  bf16 *copies, *values;
  Keys keys[AMX_CHUNK / TILE_KEYS];
  float k_scale[scaled ? AMX_CHUNK : 1], v_scale[scaled ? AMX_CHUNK : 1];

  // A tile of keys where it lies, if it does so in whole numbers and at one step; else a copy.
  void place(const E* k, const int64_t* offsets, int count) {
    for (int first = 0; first < count; first += TILE_KEYS) {
      const int last = std::min(count, first + TILE_KEYS);
      bf16* to = copies + size_t(first) * padded;
      Keys& tile = keys[first / TILE_KEYS];
      tile = {to, padded * 2};
      if constexpr (!scaled)
        if (D == padded && last - first == TILE_KEYS && evenly(c, offsets + first)) {
          tile = {k + offsets[first], int64_t(c.G) * c.width * 2};
          continue;
        }
      for (int i = first; i < last; i++, to += padded)
        for (int d = 0; d < padded; d += 32) _mm512_storeu_si512(to + d, load_32(k + offsets[i] + d, first_of_32(D - d)));
      std::memset(to, 0, size_t(first + TILE_KEYS - last) * padded * 2);
    }
  }

  void transpose_values(const E* v, const int64_t* offsets, int count) {
    for (int first = 0; first < count; first += 32)
      for (int d = 0; d < padded; d += 32) {
        const __mmask32 valid = first_of_32(D - d);
        vf low[W], high[W];
        UNROLL for (int i = 0; i < W; i++) {
          const int key = first + 2 * i;
          const __m512i a = key < count ? load_32(v + offsets[key] + d, valid) : _mm512_setzero_si512();
          const __m512i b = key + 1 < count ? load_32(v + offsets[key + 1] + d, valid) : _mm512_setzero_si512();
          low[i] = (vf)_mm512_unpacklo_epi16(a, b), high[i] = (vf)_mm512_unpackhi_epi16(a, b);
        }
        transpose(low);
        transpose(high);
        bf16* to = values + size_t(d) * AMX_CHUNK + first;
        UNROLL for (int i = 0; i < W; i++) {  // the columns of `low` are the first four of each eight
          const int column = i / 4 * 8 + i % 4;
          _mm512_storeu_si512(to + column * AMX_CHUNK, (__m512i)low[i]);
          _mm512_storeu_si512(to + (column + 4) * AMX_CHUNK, (__m512i)high[i]);
        }
      }
  }
  void take_scales(const E* k, const E* v, const int64_t* offsets, int count) {
    if constexpr (scaled) {
      for (int i = 0; i < count; i++) k_scale[i] = head_scale(k + offsets[i], D), v_scale[i] = head_scale(v + offsets[i], D);
      std::fill(v_scale + count, v_scale + AMX_CHUNK, 0.0f);
    }
  }
};

// One tile of lines; where they are, and where they begin and end, is as in prefill.h.
template <class E> struct AmxTile : Tile<bf16, E, TILE_VECTORS> {
  using Base = Tile<bf16, E, TILE_VECTORS>;
  using Base::c, Base::D, Base::LINES, Base::head, Base::valid, Base::o, Base::highest, Base::sum, Base::alpha, Base::position;
  const int padded, vectors;  // of lines
  bf16* query;                // [padded / 2][LINES][2]

  static size_t floats(const Call& c) { return size_t(round_up(c.D, 32)) * LINES * 3 / 2; }
  AmxTile(const Call& call, const Item& item, float* memory)
      : Base(call, item, memory), padded(round_up(call.D, 32)), vectors((valid + W - 1) / W) {
    query = (bf16*)memory, o = memory + size_t(padded) * LINES / 2;
    pack();
    std::fill(o, o + size_t(padded) * LINES, 0.0f);
    Base::start();
  }
  void pack() {
    std::memset(query, 0, size_t(padded) * LINES * 2);
    for (int l = 0; l < LINES; l++) {
      const bf16* from = (const bf16*)c.q + (this->first_token + int64_t(this->token[l])) * c.q_stride
                         + int64_t(head * c.N + this->member[l]) * D;
      put_pairs(from, D, query + 2 * l, LINES);
    }
  }
  bool sees(int t, int count) const {
    return t <= this->last_position && !(this->window && t + count - 1 <= this->first_position - this->window);
  }

  void attend(const AmxChunk<E>& chunk, int t, int count, float* scores, bf16* weights) {
    const int tiles = (count + TILE_KEYS - 1) / TILE_KEYS;
    score(chunk, tiles, scores);
    const bool masked = count % 32 || t + count - 1 > this->first_position ||
                        (this->window && t <= this->last_position - this->window);
    for (int n = 0; n < vectors; n++) {
      if (masked) softmax<true>(chunk, n, t, count, scores, weights);
      else softmax<false>(chunk, n, t, count, scores, weights);
    }
    rescale();
    accumulate(chunk.values, (count + 31) / 32, weights);
  }

  // scores[key][line]: two tiles of keys times two of lines at once.
  void score(const AmxChunk<E>& chunk, int tiles, float* scores) {
    constexpr int step = LINES * 4;
    settle();
    for (int n = 0; n < vectors; n += 2)
      for (int i = 0; i < tiles; i += 2) {
        const bf16* lines = query + n * W * 2;
        const auto &a = chunk.keys[i], &b = chunk.keys[std::min(i + 1, tiles - 1)];
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        for (int d = 0; d < padded; d += 32, lines += 32 * LINES) {
          _tile_loadd(4, a.at + d, a.step);
          _tile_loadd(6, lines, step);
          _tile_loadd(5, b.at + d, b.step);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(7, lines + 2 * W, step);
          _tile_dpbf16ps(1, 5, 6);
          _tile_dpbf16ps(2, 4, 7);
          _tile_dpbf16ps(3, 5, 7);
        }
        float* to = scores + i * TILE_KEYS * LINES + n * W;
        _tile_stored(0, to, step);
        _tile_stored(2, to + W, step);
        _tile_stored(1, to + TILE_KEYS * LINES, step);
        _tile_stored(3, to + TILE_KEYS * LINES + W, step);
      }
  }

  // The weights of sixteen lines, pairs of keys side by side.
  template <bool MASKED>
  __attribute__((noinline)) void softmax(const AmxChunk<E>& chunk, int n, int t, int count, float* scores, bf16* weights) {
    constexpr int STEP = LINES;
    const vf factor = (vf){} + c.scale * LOG2E;
    float* x = scores + n * W;
    const int keys = round_up(count, 32);
    vf top[4] = {highest[n], highest[n], highest[n], highest[n]};
    for (int j = 0; j < keys; j += 4)
      UNROLL for (int i = 0; i < 4; i++) {
        vf now = load(x + (j + i) * STEP) * factor;
        if constexpr (AmxChunk<E>::scaled) now *= chunk.k_scale[j + i];
        if constexpr (MASKED) now = visible(now, n, t, j + i, count);
        if constexpr (MASKED || AmxChunk<E>::scaled) store(x + (j + i) * STEP, now);
        top[i] = vmax(top[i], now);
      }
    const vf most = relative_to(highest[n], vmax(vmax(top[0], top[1]), vmax(top[2], top[3])));
    alpha[n] = exp2_nonpositive(highest[n] - most);
    highest[n] = most;
    vf total[2] = {sum[n] * alpha[n], {}};
    for (int j = 0; j < keys; j += 2) {
      vf pair[2];
      UNROLL for (int i = 0; i < 2; i++) {
        vf now = load(x + (j + i) * STEP);
        if constexpr (!(MASKED || AmxChunk<E>::scaled)) now *= factor;
        pair[i] = exp2_rounded(now - most);
        total[i] += pair[i];
        if constexpr (AmxChunk<E>::scaled) pair[i] *= chunk.v_scale[j + i];
      }
      _mm512_storeu_si512(weights + (j / 2 * LINES + n * W) * 2, pairs_of((__m512)pair[0], (__m512)pair[1]));
    }
    sum[n] = total[0] + total[1];
  }
  INLINE vf visible(vf x, int n, int t, int key, int count) const {
    vi hidden = position[n] < t + key;
    if (this->window) hidden |= position[n] >= t + key + this->window;
    if (key >= count) hidden = (vi){} - 1;
    return hidden ? (vf){} - __builtin_inff() : x;
  }
  void rescale() {
    for (int n = 0; n < vectors; n++) {
      if (!_mm512_cmp_ps_mask((__m512)alpha[n], _mm512_set1_ps(1.0f), _CMP_NEQ_UQ)) continue;
      for (int d = 0; d < D; d++) store(o + d * LINES + n * W, load(o + d * LINES + n * W) * alpha[n]);
    }
  }

  // o[column][line] of two times sixteen of each, over so many times 32 keys.
  void accumulate(const bf16* values, int groups, const bf16* weights) {
    constexpr int step = LINES * 4, value_step = AMX_CHUNK * 2;
    settle();
    for (int n = 0; n < vectors; n += 2)
      for (int d = 0; d < padded; d += 32) {
        float* to = o + d * LINES + n * W;
        const bf16 *columns = values + size_t(d) * AMX_CHUNK, *lines = weights + n * W * 2;
        _tile_loadd(0, to, step);
        _tile_loadd(1, to + 16 * LINES, step);
        _tile_loadd(2, to + W, step);
        _tile_loadd(3, to + 16 * LINES + W, step);
        for (int g = 0; g < groups; g++, columns += 32, lines += 32 * LINES) {
          _tile_loadd(4, columns, value_step);
          _tile_loadd(6, lines, step);
          _tile_loadd(5, columns + 16 * AMX_CHUNK, value_step);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(7, lines + 2 * W, step);
          _tile_dpbf16ps(1, 5, 6);
          _tile_dpbf16ps(2, 4, 7);
          _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, to, step);
        _tile_stored(1, to + 16 * LINES, step);
        _tile_stored(2, to + W, step);
        _tile_stored(3, to + 16 * LINES + W, step);
      }
  }
};

template <class E> size_t amx_tiles_floats(const Call& c) {
  const size_t padded = round_up(c.D, 32);
  return AMX_TILES * AmxTile<E>::floats(c) + AMX_CHUNK * (padded + TILE_LINES + TILE_LINES / 2) + 64;
}

// Tiles [item.tile, item.tile + item.tiles) of a row's lines, or of those that share keys.
template <class E> void run_amx_tiles(const Call& c, const Item& item, float* memory) {
  alignas(64) char room[AMX_TILES * sizeof(AmxTile<E>)];
  AmxTile<E>* tiles = (AmxTile<E>*)room;
  for (int i = 0; i < item.tiles; i++, memory += AmxTile<E>::floats(c)) {
    Item own = item;
    own.tile += i;
    new (tiles + i) AmxTile<E>(c, own, memory);
  }
  const size_t padded = round_up(c.D, 32);
  AmxChunk<E> chunk{c, c.D, int(padded), (bf16*)memory, (bf16*)(memory + AMX_CHUNK * padded / 2)};
  memory += AMX_CHUNK * padded;
  float* scores = memory;
  bf16* weights = (bf16*)(memory + AMX_CHUNK * TILE_LINES);
  std::fill(scores, scores + AMX_CHUNK * TILE_LINES, 0.0f);
  const Tiles all({{16, 64}, {16, 64}, {16, 64}, {16, 64}, {16, 64}, {16, 64}, {16, 64}, {16, 64}});
  const E *k = (const E*)c.k_pool + int64_t(item.head_begin) * c.width, *v = (const E*)c.v_pool + int64_t(item.head_begin) * c.width;
  const int end = tiles[item.tiles - 1].last_position + 1;
  int64_t offsets[AMX_CHUNK];
  for (int t = tiles[0].begin, count; t < end; t += count) {
    count = std::min(AMX_CHUNK - t % TILE_KEYS, end - t);
    token_offsets(c, item.row, t, count, offsets);
    chunk.place(k, offsets, count);
    chunk.transpose_values(v, offsets, count);
    chunk.take_scales(k, v, offsets, count);
    for (int i = 0; i < item.tiles; i++)
      if (tiles[i].sees(t, count)) tiles[i].attend(chunk, t, count, scores, weights);
  }
  for (int i = 0; i < item.tiles; i++) item.segment < 0 ? tiles[i].write() : tiles[i].keep();
}

}  // namespace
#endif
