// Grouped products: out[n, R] = x[n, D] · weight[e]^T for the tokens of each expert e, where experts have few tokens.
//
// Few tokens make this a matter of reading the weights once, at the speed of memory: a register tile is 4 rows of the
// weight times 4 tokens, all of D deep, so every loaded weight is used for 4 tokens and never packed. Accumulation is
// fp32; a result depends neither on the other tokens nor on the threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "numbers.h"
#include "work.h"

namespace {

constexpr int TILE = 4, ROWS_AT_ONCE = 64;

INLINE float sum_of(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float sum = 0;
  for (int i = 0; i < W; i++) sum += x[i];
  return sum;
#endif
}

struct Product {
  const void* x;
  const void* const* weights;  // of each expert, [R, D]
  void* out;           // [n, R]
  const int32_t* ends;
  int64_t x_stride;
  int E, R, D;
};

// R0 rows of one expert's weight times T0 tokens, into out[token][row].
template <class T, int R0, int T0>
INLINE void tile(const T* w, const T* x, int64_t x_stride, int D, T* out, int R) {
  vf acc[R0][T0] = {};
  int d = 0;
#if defined(__AVX512BF16__)
  if constexpr (std::is_same<T, bf16>::value)
    for (; d + 2 * W <= D; d += 2 * W) {
      __m512bh xs[T0];
      UNROLL for (int t = 0; t < T0; t++) xs[t] = (__m512bh)_mm512_loadu_si512(x + t * x_stride + d);
      UNROLL for (int r = 0; r < R0; r++) {
        const __m512bh ws = (__m512bh)_mm512_loadu_si512(w + int64_t(r) * D + d);
        UNROLL for (int t = 0; t < T0; t++) acc[r][t] = (vf)_mm512_dpbf16_ps((__m512)acc[r][t], ws, xs[t]);
      }
    }
#endif
  for (; d + W <= D; d += W) {
    vf xs[T0];
    UNROLL for (int t = 0; t < T0; t++) xs[t] = load(x + t * x_stride + d);
    UNROLL for (int r = 0; r < R0; r++) {
      const vf ws = load(w + int64_t(r) * D + d);
      UNROLL for (int t = 0; t < T0; t++) acc[r][t] += ws * xs[t];
    }
  }
  UNROLL for (int r = 0; r < R0; r++)
    UNROLL for (int t = 0; t < T0; t++) {
      float sum = sum_of(acc[r][t]);
      for (int i = d; i < D; i++) sum += widen(w[int64_t(r) * D + i]) * widen(x[t * x_stride + i]);
      narrow(sum, out + int64_t(t) * R + r);
    }
}

template <class T, int R0> INLINE void rows(const T* w, const T* x, int64_t x_stride, int n, int D, T* out, int R) {
  int t = 0;
  for (; t + TILE <= n; t += TILE) tile<T, R0, TILE>(w, x + t * x_stride, x_stride, D, out + int64_t(t) * R, R);
  x += t * x_stride;
  out += int64_t(t) * R;
  if (n - t == 3) tile<T, R0, 3>(w, x, x_stride, D, out, R);
  if (n - t == 2) tile<T, R0, 2>(w, x, x_stride, D, out, R);
  if (n - t == 1) tile<T, R0, 1>(w, x, x_stride, D, out, R);
}

// Rows [first, last) of one expert's weight over its tokens.
template <class T> void run_rows(const Product& p, int expert, int first, int last) {
  const int start = expert ? p.ends[expert - 1] : 0, n = p.ends[expert] - start;
  const T* x = static_cast<const T*>(p.x) + start * p.x_stride;
  const T* w = static_cast<const T*>(p.weights[expert]);
  T* out = static_cast<T*>(p.out) + int64_t(start) * p.R;
  int r = first;
  for (; r + TILE <= last; r += TILE) rows<T, TILE>(w + int64_t(r) * p.D, x, p.x_stride, n, p.D, out + r, p.R);
  for (; r < last; r++) rows<T, 1>(w + int64_t(r) * p.D, x, p.x_stride, n, p.D, out + r, p.R);
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
