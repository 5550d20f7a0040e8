// Chooses tokens: the one with the largest logit, or the winner of a race, whose logit less the logarithm of its exponential
// random number is largest. One pass over the logits.
//
// The random bits of a token are those of `token_words` in random_draws.py. A logarithm is computed only for tokens that
// could win: -log2(u) of a float u > 0 is at most 127 less its bits read as an integer in units of 2^-23, and the
// exponential number -log(1 - u) is at least u.

#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>

#include "numbers.h"

namespace {

struct Best {
  int dtype;
  const void* x;
  int64_t x_stride;
  int64_t* tokens;
  int rows, vocab;
  std::atomic<int> next{0};
};

struct Race {
  const float* x;
  int64_t x_stride;
  const uint32_t* keys;  // two a row
  int64_t* tokens;
  int rows, vocab;
  std::atomic<int> next{0};
};

INLINE bool any(vi mask) {
  uint64_t parts[sizeof(vi) / 8], all = 0;
  std::memcpy(parts, &mask, sizeof mask);
  for (uint64_t part : parts) all |= part;
  return all;
}

// The first of the largest logits, or -1 where one is not finite.
template <class T> int64_t largest(const T* x, int vocab) {
  vf best, odd = {};  // odd: 0 for as long as all are finite, then NaN
  vi token = {}, place;
  for (int i = 0; i < W; i++) best[i] = -std::numeric_limits<float>::infinity(), place[i] = i;
  int at = 0;
  for (; at + W <= vocab; at += W, place += W) {
    const vf now = load(x + at);
    odd += now - now;
    token = now > best ? place : token;
    best = now > best ? now : best;
  }
  float most = best[0], rest = 0.0f;
  int first = token[0];
  for (int i = 1; i < W; i++)
    if (best[i] > most || (best[i] == most && token[i] < first)) most = best[i], first = token[i];
  for (; at < vocab; at++) {
    const float now = widen(x[at]);
    rest += now - now;
    if (now > most) most = now, first = at;
  }
  return rest == 0.0f && !any(odd != vf{}) ? first : -1;
}

template <class T> void run_best(Best& best) {
  for (int row; (row = best.next.fetch_add(1, std::memory_order_relaxed)) < best.rows;)
    best.tokens[row] = largest(static_cast<const T*>(best.x) + row * best.x_stride, best.vocab);
}
void work_best(void* argument) {
  Best& best = *static_cast<Best*>(argument);
  best.dtype == 0 ? run_best<float>(best) : best.dtype == 1 ? run_best<bf16>(best) : run_best<f16>(best);
}

template <class T> INLINE T mixed(T x) {
  x = (x ^ x >> 16) * 0x21F0AAADu;
  x = (x ^ x >> 15) * 0xD35A2D97u;
  return x ^ x >> 15;
}
template <class T> INLINE T random_bits(T token, uint32_t first, uint32_t second) {
  return mixed(mixed(token * 0x9E3779B9u + first) + second) & 0x7fffffffu;
}

INLINE float arrival(float logit, uint32_t bits) {
  const float u = (float(bits) + 0.5f) * 0x1p-31f;
  return logit - std::log(-std::log1p(-(u < 1.0f - 0x1p-24f ? u : 1.0f - 0x1p-24f)));
}
INLINE vf latest(vf logit, vu bits) {  // no more than the slack below what `arrival` gives
  const vf u = (__builtin_convertvector((vi)bits, vf) + 0.5f) * 0x1p-31f;
  constexpr float LN2 = 0.69314718f, SLACK = 1e-4f;
  return logit + (127 * LN2 + SLACK - __builtin_convertvector((vi)u, vf) * (LN2 * 0x1p-23f));
}

int64_t winner(const float* x, int vocab, uint32_t first, uint32_t second) {
  float best = -std::numeric_limits<float>::infinity();
  int64_t token = 0;
  auto run = [&](int at, uint32_t bits) {
    const float time = arrival(x[at], bits);
    if (time > best) best = time, token = at;
  };
  vu places;
  for (int i = 0; i < W; i++) places[i] = i;
  int at = 0;
  for (; at + W <= vocab; at += W) {
    const vu bits = random_bits(places + uint32_t(at), first, second);
    const vi close = latest(load(x + at), bits) > best;
    if (any(close))
      for (int i = 0; i < W; i++)
        if (close[i]) run(at + i, bits[i]);
  }
  for (; at < vocab; at++) run(at, random_bits(uint32_t(at), first, second));
  return token;
}

void work_race(void* argument) {
  Race& race = *static_cast<Race*>(argument);
  for (int row; (row = race.next.fetch_add(1, std::memory_order_relaxed)) < race.rows;)
    race.tokens[row] = winner(race.x + row * race.x_stride, race.vocab, race.keys[2 * row], race.keys[2 * row + 1]);
}

}  // namespace
