// A gated feed-forward network in bf16 on AMX, from rows of the hidden states to what is added to other rows:
// y[t] += factor[t] * down · (silu(gate · x[t]) * (up · x[t])).
//
// The tokens are gathered where they are packed as pairs of columns, once for gate and up. A sum of products of both is gated as
// it leaves the tiles and lies, rounded, as down takes it; sums of down are scaled and added to y as they leave the tiles. So nothing
// between the products is a pass over memory. Threads share out rows of the weights, which are used as they lie.
//
// Sums are fp32, column after column; a result depends neither on the other tokens nor on the threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "amx.h"
#include "elementwise.h"
#include "numbers.h"
#include "products_amx.h"
#include "work.h"

#if defined(HAS_AMX)
namespace {

constexpr int GATED_TOKENS = 512;     // of a stretch, whose hidden states are kept
constexpr int GATED_ROWS = 64;        // of the outputs of a product, at a time
constexpr int GATED_COLUMNS = 4096;   // of a weight, at a time

struct FeedForward {
  const bf16* x;
  int64_t x_stride;
  const int64_t* tokens;  // rows of x and of y; null: the first ones
  const bf16* factors;    // of each token; null: one
  const bf16 *gate, *up, *down;
  bf16* y;
  int64_t y_stride;
  int D, F;
  int64_t row(int64_t i) const { return tokens ? tokens[i] : i; }
  float factor(int64_t i) const { return factors ? widen(factors[i]) : 1.0f; }
};

// Tokens [first, first + count), sixteen to a group: each is [columns / 32][16 pairs][16 tokens][2].
struct FeedForwardJob {
  const FeedForward& f;
  const int64_t first;
  const int count;
  bf16 *packed, *hidden;
  int rows_at_once = GATED_ROWS;
  std::atomic<int> next{0};
  std::atomic<bool> failed{false};
  int groups() const { return (count + W - 1) / W; }
  void start(int rows, int threads) {  // fewer rows at once where threads would wait for the last of them
    next = 0;
    rows_at_once = std::max(32, std::min(GATED_ROWS, rows / (3 * threads) / 32 * 32));
  }
};

void gather_group(const FeedForwardJob& job, int group) {
  const FeedForward& f = job.f;
  const int begin = group * W, count = std::min(W, job.count - begin);
  const bf16* from[W];
  for (int i = 0; i < count; i++) from[i] = f.x + f.row(job.first + begin + i) * f.x_stride;
  bf16* to = job.packed + size_t(begin) * f.D;
  for (int d = 0; d < f.D; d += 32, to += 512) {
    vf pairs[W];
    UNROLL for (int i = 0; i < W; i++) pairs[i] = i < count ? load((const float*)(from[i] + d)) : (vf){};
    transpose(pairs);
    UNROLL for (int i = 0; i < W; i++) store((float*)(to + i * 32), pairs[i]);
  }
}
void work_gather(void* argument) {
  FeedForwardJob& job = *static_cast<FeedForwardJob*>(argument);
  for (int i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.groups();) gather_group(job, i);
}

// Sixteen rows of a and of b times one or two groups of tokens, put to or added to sums [group][a, b][row][token].
template <int GROUPS>
INLINE void multiply_groups(const bf16* a, const bf16* b, int64_t D, int columns, const bf16* x, int64_t x_step, bool add, bool fetch,
                            float* sums) {
  settle();
  if (add) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 256, 64);
    if (GROUPS > 1) { _tile_loadd(2, sums + 512, 64); _tile_loadd(3, sums + 768, 64); }
  } else {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  }
  for (int d = 0; d < columns; d += 32, x += 512) {
    if (fetch)
      for (int i = 0; i < 16; i++) {
        __builtin_prefetch(a + i * D + d + AMX_AHEAD, 0, 2);
        __builtin_prefetch(b + i * D + d + AMX_AHEAD, 0, 2);
      }
    _tile_loadd(4, a + d, D * 2);
    _tile_loadd(6, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, b + d, D * 2);
    _tile_dpbf16ps(1, 5, 6);
    if (GROUPS > 1) {
      _tile_loadd(7, x + x_step, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  if (GROUPS > 1) { _tile_stored(2, sums + 512, 64); _tile_stored(3, sums + 768, 64); }
}

// silu(gate) * up for what is rounded to 16 bits afterwards.
INLINE vf gated(vf gate, vf up) {
  const __m512 power = _mm512_min_ps(_mm512_set1_ps(126.0f), (__m512)(gate * -LOG2E));  // keeps a NaN
  const vf below = 1.0f + exp2_rounded((vf)power), guess = (vf)_mm512_rcp14_ps((__m512)below);
  return gate * up * (guess * (2.0f - below * guess));
}

// Sums of sixteen rows of gate and of up, gated, to the hidden states of sixteen tokens: pairs of rows.
INLINE void put_hidden(const float* gate, const float* up, bf16* to) {
  const __m512i order = _mm512_setr_epi32(0x00100000, 0x00110001, 0x00120002, 0x00130003, 0x00140004, 0x00150005, 0x00160006, 0x00170007,
                                          0x00180008, 0x00190009, 0x001a000a, 0x001b000b, 0x001c000c, 0x001d000d, 0x001e000e, 0x001f000f);
  UNROLL for (int i = 0; i < W; i += 2) {
    const vf even = gated(load(gate + i * W), load(up + i * W)), odd = gated(load(gate + (i + 1) * W), load(up + (i + 1) * W));
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    _mm512_storeu_si512(to + i * W, _mm512_permutexvar_epi16(order, both));
  }
}

// Sums of 32 rows of down, for sixteen tokens from `token` on, times their factors to columns of their outputs.
INLINE void add_outputs(const FeedForward& f, const float* sums, int64_t token, int count, int column) {
  vf low[W], high[W];
  UNROLL for (int i = 0; i < W; i++) low[i] = load(sums + i * W), high[i] = load(sums + (W + i) * W);
  transpose(low);
  transpose(high);
  UNROLL for (int i = 0; i < W; i++)
    if (i < count) {
      bf16* to = f.y + f.row(token + i) * f.y_stride + column;
      const float factor = f.factor(token + i);
      const vf first = load(to) + low[i] * factor, second = load(to + W) + high[i] * factor;
      _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
    }
}

// Rows of two weights, sixteen of each at a time: (a, b) at row `at` of the first, over all tokens; `done(pair, group, sums)` takes
// the sums of one group.
template <class Rows, class Done>
INLINE void multiply_rows(const FeedForwardJob& job, const bf16* tokens, int D, int pairs, const Rows& rows, float* memory, const Done& done) {
  const int groups = job.groups();
  for (int d = 0; d < D; d += GATED_COLUMNS) {
    const int columns = std::min(GATED_COLUMNS, D - d);
    for (int g = 0; g < groups; g += 2)
      for (int i = 0; i < pairs; i++) {
        const bf16* x = tokens + size_t(g) * W * D + size_t(d) * W;
        float* sums = memory + (size_t(g / 2) * pairs + i) * 4 * W * W;
        const auto [a, b] = rows(i);
        if (g + 1 < groups) multiply_groups<2>(a + d, b + d, D, columns, x, int64_t(W) * D, d > 0, g == 0, sums);
        else multiply_groups<1>(a + d, b + d, D, columns, x, 0, d > 0, g == 0, sums);
        if (d + columns < D) continue;
        done(i, g, sums);
        if (g + 1 < groups) done(i, g + 1, sums + 2 * W * W);
      }
  }
}

struct TwoRows { const bf16 *a, *b; };

float* sums_of(FeedForwardJob& job) {
  static thread_local Scratch scratch;
  float* memory = scratch.get(size_t(GATED_TOKENS) * 2 * GATED_ROWS);
  if (!memory) job.failed.store(true, std::memory_order_relaxed);
  return memory;
}

void work_hidden(void* argument) {
  FeedForwardJob& job = *static_cast<FeedForwardJob*>(argument);
  const FeedForward& f = job.f;
  float* memory = sums_of(job);
  if (!memory) return;
  const Tiles all({{16, 64}, {16, 64}, {16, 64}, {16, 64}, {16, 64}, {16, 64}, {16, 64}, {16, 64}});
  for (int first; (first = job.next.fetch_add(job.rows_at_once, std::memory_order_relaxed)) < f.F;) {
    const int last = std::min(first + job.rows_at_once, f.F);
    auto rows = [&](int i) { return TwoRows{f.gate + int64_t(first + i * W) * f.D, f.up + int64_t(first + i * W) * f.D}; };
    multiply_rows(job, job.packed, f.D, (last - first) / W, rows, memory, [&](int i, int group, const float* sums) {
      const int row = first + i * W;
      put_hidden(sums, sums + W * W, job.hidden + size_t(group) * W * f.F + size_t(row / 32) * 512 + size_t(row % 32) * W);
    });
  }
}

void work_outputs(void* argument) {
  FeedForwardJob& job = *static_cast<FeedForwardJob*>(argument);
  const FeedForward& f = job.f;
  float* memory = sums_of(job);
  if (!memory) return;
  const Tiles all({{16, 64}, {16, 64}, {16, 64}, {16, 64}, {16, 64}, {16, 64}, {16, 64}, {16, 64}});
  for (int first; (first = job.next.fetch_add(job.rows_at_once, std::memory_order_relaxed)) < f.D;) {
    const int last = std::min(first + job.rows_at_once, f.D);
    auto rows = [&](int i) { return TwoRows{f.down + int64_t(first + i * 32) * f.F, f.down + int64_t(first + i * 32 + W) * f.F}; };
    multiply_rows(job, job.hidden, f.F, (last - first) / 32, rows, memory, [&](int i, int group, const float* sums) {
      add_outputs(f, sums, job.first + group * W, std::min(W, job.count - group * W), first + i * 32);
    });
  }
}

// False: there was no memory.
bool run_feed_forward(const FeedForward& f, int64_t n, int threads) {
  static thread_local Scratch scratch;
  const int64_t most = std::min<int64_t>(n, GATED_TOKENS);
  float* memory = scratch.get(size_t(round_up(int(most), W)) * (f.D + f.F) / 2);
  if (!memory) return false;
  for (int64_t first = 0; first < n; first += GATED_TOKENS) {
    const int count = int(std::min<int64_t>(GATED_TOKENS, n - first));
    bf16* packed = (bf16*)memory;
    FeedForwardJob job{f, first, count, packed, packed + size_t(round_up(count, W)) * f.D};
    run_parallel(work_gather, &job, std::min(threads, job.groups()));
    job.start(f.F, threads);
    run_parallel(work_hidden, &job, threads);
    job.start(f.D, threads);
    if (!job.failed) run_parallel(work_outputs, &job, threads);
    if (job.failed) return false;
  }
  return true;
}

}  // namespace
#endif

extern "C" {

// Rows of x and y are below `rows`; D and F are multiples of 32. 1: a token is not, 2: no memory, 3: there is no AMX.
int flexmoe_feed_forward(const void* x, int64_t x_stride, const int64_t* tokens, const void* factors, int64_t n, const void* gate,
                         const void* up, const void* down, int D, int F, void* y, int64_t y_stride, int64_t rows, int num_threads) {
  if (!tokens && n > rows) return 1;
  for (int64_t i = 0; tokens && i < n; i++)
    if (tokens[i] < 0 || tokens[i] >= rows) return 1;
#if defined(HAS_AMX)
  if (may_use_amx()) {
    const FeedForward f{(const bf16*)x, x_stride, tokens, (const bf16*)factors, (const bf16*)gate, (const bf16*)up, (const bf16*)down,
                        (bf16*)y, y_stride, D, F};
    return n == 0 || run_feed_forward(f, n, num_threads) ? 0 : 2;
  }
#endif
  return 3;
}

}  // extern "C"
