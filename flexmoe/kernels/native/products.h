// Grouped products: out[n, R] = x[n, D] · weight[e]^T for the tokens of each expert e, where experts have few tokens.
//
// Few tokens make this a matter of reading the weights once, at the speed of memory: a register tile is 4 rows of the
// weight times 4 tokens, all of D deep, so every loaded weight is used for 4 tokens and never packed. Accumulation is
// fp32; a result depends neither on the other tokens nor on the threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "lanes.h"
#include "numbers.h"
#include "work.h"

namespace {

constexpr int TILE = 4, ROWS_AT_ONCE = 64, TOKENS_AT_ONCE = 64, COLUMNS_AT_ONCE = 1024;

struct Product {
  const void* x;
  const void* const* weights;  // of each expert, [R, D]
  void* out;           // [n, R]
  const int32_t* ends;
  int64_t x_stride;
  int E, R, D;
  const void* const* biases = nullptr;  // of each expert, [R]; null: there are none
};

// R0 rows of a weight times T0 tokens over the columns [d, end), added to sums[row][token].
template <class T, int R0, int T0>
INLINE void tile(const T* w, const T* x, int64_t x_stride, int D, int d, int end, float* sums) {
  vf acc[TILE * TILE] = {};
#if defined(__AVX512BF16__)
  if constexpr (std::is_same<T, bf16>::value)
    for (; d + 2 * W <= end; d += 2 * W) {
      __m512bh xs[T0];
      UNROLL for (int t = 0; t < T0; t++) xs[t] = (__m512bh)_mm512_loadu_si512(x + t * x_stride + d);
      UNROLL for (int r = 0; r < R0; r++) {
        const __m512bh ws = (__m512bh)_mm512_loadu_si512(w + int64_t(r) * D + d);
        UNROLL for (int t = 0; t < T0; t++)
          acc[r * TILE + t] = (vf)_mm512_dpbf16_ps((__m512)acc[r * TILE + t], ws, xs[t]);
      }
    }
#endif
  for (; d + W <= end; d += W) {
    vf xs[T0];
    UNROLL for (int t = 0; t < T0; t++) xs[t] = load(x + t * x_stride + d);
    UNROLL for (int r = 0; r < R0; r++) {
      const vf ws = load(w + int64_t(r) * D + d);
      UNROLL for (int t = 0; t < T0; t++) acc[r * TILE + t] += ws * xs[t];
    }
  }
  UNROLL for (int i = 0; i < TILE * TILE; i += W) {
    vf some[W];
    UNROLL for (int lane = 0; lane < W; lane++) some[lane] = acc[i + lane];
    store(sums + i, load(sums + i) + sum_each<W>(some));
  }
  for (; d < end; d++)
    for (int r = 0; r < R0; r++)
      for (int t = 0; t < T0; t++) sums[r * TILE + t] += widen(w[int64_t(r) * D + d]) * widen(x[t * x_stride + d]);
}

// R0 rows of a weight over n tokens, at most TOKENS_AT_ONCE, into out[token][row]; the columns of the rows that are multiplied stay in L1.
template <class T, int R0>
INLINE void rows(const T* w, const T* x, int64_t x_stride, int n, int D, T* out, int R, const T* bias) {
  float sums[TOKENS_AT_ONCE / TILE][TILE * TILE];
  std::memset(sums, 0, sizeof sums[0] * ((n + TILE - 1) / TILE));
  for (int d = 0; d < D; d += COLUMNS_AT_ONCE) {
    const int end = std::min(D, d + COLUMNS_AT_ONCE);
    for (int t = 0; t < n; t += TILE) {
      const T* tokens = x + t * x_stride;
      if (n - t >= TILE) tile<T, R0, TILE>(w, tokens, x_stride, D, d, end, sums[t / TILE]);
      else if (n - t == 3) tile<T, R0, 3>(w, tokens, x_stride, D, d, end, sums[t / TILE]);
      else if (n - t == 2) tile<T, R0, 2>(w, tokens, x_stride, D, d, end, sums[t / TILE]);
      else tile<T, R0, 1>(w, tokens, x_stride, D, d, end, sums[t / TILE]);
    }
  }
  for (int t = 0; t < n; t++)
    for (int r = 0; r < R0; r++)
      narrow(sums[t / TILE][r * TILE + t % TILE] + (bias ? widen(bias[r]) : 0.0f), out + int64_t(t) * R + r);
}

// Rows [first, last) of a weight, of which w is the first one, over n tokens.
template <class T>
INLINE void all_rows(const T* w, const T* x, int64_t x_stride, int n, int first, int last, int D, T* out, int R,
                     const T* bias = nullptr) {
  // Tokens in stretches that stay in L2 while all the rows are multiplied with them.
  for (int t = 0; t < n; t += TOKENS_AT_ONCE, x += TOKENS_AT_ONCE * x_stride, out += int64_t(TOKENS_AT_ONCE) * R) {
    const int count = std::min(TOKENS_AT_ONCE, n - t);
    int r = first;
    for (; r + TILE <= last; r += TILE)
      rows<T, TILE>(w + int64_t(r - first) * D, x, x_stride, count, D, out + r, R, bias ? bias + r : nullptr);
    for (; r < last; r++)
      rows<T, 1>(w + int64_t(r - first) * D, x, x_stride, count, D, out + r, R, bias ? bias + r : nullptr);
  }
}

// Rows [first, last) of one expert's weight over its tokens.
template <class T> void run_rows(const Product& p, int expert, int first, int last) {
  const int start = expert ? p.ends[expert - 1] : 0, n = p.ends[expert] - start;
  const T* x = static_cast<const T*>(p.x) + start * p.x_stride;
  const T* w = static_cast<const T*>(p.weights[expert]);
  T* out = static_cast<T*>(p.out) + int64_t(start) * p.R;
  const T* bias = p.biases ? static_cast<const T*>(p.biases[expert]) : nullptr;
  all_rows(w + int64_t(first) * p.D, x, p.x_stride, n, first, last, p.D, out, p.R, bias);
}

struct ProductJob {
  const Product& product;
  const int dtype;
  std::vector<int> experts;  // those that have tokens
  std::atomic<int64_t> next{0};
};

void work_product(void* argument) {
  ProductJob& job = *static_cast<ProductJob*>(argument);
  const Product& p = job.product;
  const int64_t blocks = (p.R + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, items = blocks * int64_t(job.experts.size());
  for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < items;) {
    const int expert = job.experts[i / blocks], first = int(i % blocks) * ROWS_AT_ONCE;
    const int last = std::min(first + ROWS_AT_ONCE, p.R);
    if (job.dtype == 0) run_rows<float>(p, expert, first, last);
    else if (job.dtype == 1) run_rows<bf16>(p, expert, first, last);
    else run_rows<f16>(p, expert, first, last);
  }
}

}  // namespace
