// Rotary embedding of new queries and keys. Keys and values go to their slots in the pages of the KV cache in the same pass over
// memory, compressed where the pages are.
//
// Turned numbers are rounded to the dtype before they are compressed, as if they had been stored between. The C entry point is at
// the end; elementwise.py says what its arguments mean.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "elementwise.h"
#include "lanes.h"
#include "numbers.h"

namespace {

constexpr int MOST_HEAD = 1024;  // dimensions of a head

struct Turn { int rotated, interleaved; };

// The head x of D numbers turned, to `to`, which may be x: dimension i of the first half with dimension i of the second, or
// neighbours, which are parted. `room` of D numbers.
template <class T> void rotate_head(const T* x, T* to, const T* cosine, const T* sine, Turn turn, int D, T* room) {
  const int half = turn.rotated / 2, step = turn.interleaved ? 2 : 1;
  const T* from = x;
  if (turn.interleaved && x == to) std::memcpy(room, x, 2 * half * sizeof(T)), from = room;
  const T* second = from + (turn.interleaved ? 1 : half);
  int i = 0;
  for (; i + W <= half; i += W) {
    vf a, b;
    if (turn.interleaved) {
      const vf low = load(from + 2 * i), high = load(from + 2 * i + W);
      a = every_second<0>(low, high, Lanes()), b = every_second<1>(low, high, Lanes());
    } else {
      a = load(from + i), b = load(second + i);
    }
    const vf c = load(cosine + i), s = load(sine + i);
    store(to + i, a * c - b * s), store(to + half + i, b * c + a * s);
  }
  for (; i < half; i++) {
    const float a = widen(from[i * step]), b = widen(second[i * step]), c = widen(cosine[i]), s = widen(sine[i]);
    narrow(a * c - b * s, to + i), narrow(b * c + a * s, to + half + i);
  }
  if (x != to) std::memcpy(to + 2 * half, x + 2 * half, (D - 2 * half) * sizeof(T));
}

typedef int8_t vb __attribute__((vector_size(W)));
INLINE vf whole_number(vf x) {  // the nearest, ties to even, within what int8 takes
  const vf most = (vf){} + 127.0f;
  x = x > most ? most : x < -most ? -most : x;
  return (x + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23
}
// A head as int8 numbers and behind them, at an even byte, their scale in bf16: the largest over 127, NaN where a number is not
// finite. As `flexmoe.formats.packed_kv.pack` has it.
template <class T> void compress_head(const T* x, int8_t* to, int D) {
  vf top = {}, nothing = {};
  int d = 0;
  for (; d + W <= D; d += W) {
    const vf v = load(x + d);
    top = vmax(top, vmax(-v, v)), nothing += v * 0.0f;
  }
  float largest = max_in_groups<W>(top)[0] + sum_in_groups<W>(nothing)[0];
  for (; d < D; d++) {
    const float v = widen(x[d]);
    largest = std::max(largest, std::fabs(v)) + v * 0.0f;
  }
  bf16 scale;
  narrow(largest / 127.0f, &scale);
  std::memcpy(to + D + D % 2, &scale, sizeof scale);
  if (D % 2) to[D] = 0;
  if (largest != largest) return (void)std::memset(to, 0, D);
  const float stored = widen(scale), divisor = stored == 0.0f ? 1.0f : stored;
  for (d = 0; d + W <= D; d += W) {
    const vb numbers = __builtin_convertvector(__builtin_convertvector(whole_number(load(x + d) / divisor), vi), vb);
    std::memcpy(to + d, &numbers, W);
  }
  for (; d < D; d++) to[d] = int8_t(whole_number((vf){} + widen(x[d]) / divisor)[0]);
}

// What is new of a batch: queries [T][H][D], keys and values [T][G][D]; strides of tokens in elements.
struct NewTokens {
  void *q, *k;
  const void *v, *cosine, *sine;
  int64_t q_stride, k_stride, v_stride, angle_stride;
  int H, G, D;
  Turn turn;
};
// Where keys and values of the tokens [first, last) go; slots are `stride` bytes apart, and heads of one `head_bytes`.
struct Slots {
  char *k, *v;
  int64_t stride;
  const int64_t* slots;
  int64_t first, last;
  int compressed, head_bytes;
};

template <class T> void turn_token(const NewTokens& n, const Slots& s, int64_t t) {
  T room[MOST_HEAD], turned[MOST_HEAD];
  const T *cosine = (const T*)n.cosine + t * n.angle_stride, *sine = (const T*)n.sine + t * n.angle_stride;
  T *q = (T*)n.q + t * n.q_stride, *k = (T*)n.k + t * n.k_stride;
  for (int h = 0; h < n.H; h++, q += n.D) rotate_head(q, q, cosine, sine, n.turn, n.D, room);
  if (t < s.first || t >= s.last) {
    for (int g = 0; g < n.G; g++, k += n.D) rotate_head(k, k, cosine, sine, n.turn, n.D, room);
    return;
  }
  const int64_t at = s.slots[t - s.first] * s.stride;
  const T* v = (const T*)n.v + t * n.v_stride;
  char *to_k = s.k + at, *to_v = s.v + at;
  for (int g = 0; g < n.G; g++, k += n.D, to_k += s.head_bytes) {
    rotate_head(k, s.compressed ? turned : (T*)to_k, cosine, sine, n.turn, n.D, room);
    if (s.compressed) compress_head(turned, (int8_t*)to_k, n.D);
  }
  if (!s.compressed) return (void)std::memcpy(to_v, v, size_t(n.G) * n.D * sizeof(T));
  for (int g = 0; g < n.G; g++, v += n.D, to_v += s.head_bytes) compress_head(v, (int8_t*)to_v, n.D);
}

enum RotateStatus { ROTATED = 0, NO_SUCH_SLOT = 1, HEAD_TOO_LARGE = 2 };

}  // namespace

extern "C" {

// Turns queries in place. Keys of the tokens [first, last) are turned into their slots of the pools, and values copied there;
// other keys are turned in place.
int flexmoe_rotate(int dtype, void* q, int64_t q_stride, void* k, int64_t k_stride, const void* v, int64_t v_stride,
                   const void* cosine, const void* sine, int64_t angle_stride, int64_t tokens, int H, int G, int D, int rotated,
                   int interleaved, void* k_pool, void* v_pool, int64_t slot_stride, int64_t num_slots, const int64_t* slots,
                   int64_t first, int64_t last, int compressed, int head_bytes, int num_threads) {
  if (D > MOST_HEAD) return HEAD_TOO_LARGE;
  for (int64_t i = 0; i < last - first; i++)
    if (slots[i] < 0 || slots[i] >= num_slots) return NO_SUCH_SLOT;
  const NewTokens made{q, k, v, cosine, sine, q_stride, k_stride, v_stride, angle_stride, H, G, D, {rotated, interleaved}};
  const Slots to{(char*)k_pool, (char*)v_pool, slot_stride, slots, first, last, compressed, head_bytes};
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    over_rows(tokens, int64_t(H + 2 * G) * D, num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) turn_token<T>(made, to, t);
    });
  });
  return ROTATED;
}

}  // extern "C"
