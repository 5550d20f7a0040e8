// Grouped products of more than a few tokens: vectors run along the tokens, which are packed once, and the numbers of the
// weight are broadcast, so that no weight is transposed. A block of the weight's rows is widened to fp32 where it stays in L2.
//
// Accumulation is fp32, column after column; a result depends neither on the other tokens nor on the threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "lanes.h"
#include "numbers.h"
#include "prefill.h"
#include "products.h"
#include "work.h"

namespace {

constexpr int BLOCK_ROWS = 48, BLOCK_COLUMNS = 256;  // of a weight, widened: 48 KiB
constexpr int ROW_STEP = 12;                         // a multiple of the rows of every register tile
constexpr size_t FEW_PANELS = 8;                     // of which the columns of a block stay in L2
constexpr int PANEL_TOKENS = TILE_LINES;             // tokens of a whole panel
constexpr int BLOCKED_TOKENS = 8;                    // see `blocked_from`
constexpr int STRETCH_TOKENS = 512;                  // packed at a time: bounds the memory that they take

// Tokens of an expert from which on this is faster than products.h, which has instructions for bf16 in AVX-512.
INLINE int blocked_from(int dtype) {
#if defined(__AVX512BF16__)
  if (dtype == 1) return INT_MAX;
#endif
  (void)dtype;
  return BLOCKED_TOKENS;
}

// Vectors of a panel of so many tokens.
INLINE int panel_vectors(int tokens) { return tokens > 2 * W ? TILE_VECTORS : tokens > W ? 2 : 1; }

// A panel of packed tokens: [D][vectors * W] fp32, of the tokens [token, token + count) of the call.
struct Panel {
  int64_t token;
  int count, vectors;
  const float* packed;
};

struct BlockedJob {
  const Product& product;
  const int dtype;
  int rows_at_once = BLOCK_ROWS;
  std::vector<int> experts;      // those that have tokens here
  std::vector<size_t> ends;      // of each of these, where its panels end
  std::vector<Panel> panels;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};

  // Of the tokens [begin, end) of the experts that are asked for; returns the floats that they take when packed.
  size_t cut(const std::vector<int>& asked, int64_t begin, int64_t end) {
    size_t floats = 0;
    for (int e : asked) {
      const int64_t first = std::max<int64_t>(begin, e ? product.ends[e - 1] : 0), last = std::min<int64_t>(end, product.ends[e]);
      for (int64_t t = first; t < last; t += PANEL_TOKENS) {
        const int count = int(std::min<int64_t>(PANEL_TOKENS, last - t)), vectors = panel_vectors(count);
        panels.push_back({t, count, vectors, nullptr});
        floats += size_t(vectors) * W * product.D;
      }
      if (first < last) experts.push_back(e), ends.push_back(panels.size());
    }
    return floats;
  }
  void place(float* memory) {
    for (Panel& panel : panels) panel.packed = memory, memory += size_t(panel.vectors) * W * product.D;
  }
  int64_t blocks() const { return (product.R + rows_at_once - 1) / rows_at_once; }
};

template <class T> void pack_panel(const Product& p, const Panel& panel) {
  const T* x = static_cast<const T*>(p.x) + panel.token * p.x_stride;
  float* to = const_cast<float*>(panel.packed);
  const int lines = panel.vectors * W;
  for (int n = 0; n < lines; n += W) {
    const int valid = std::max(0, std::min(W, panel.count - n));
    const T* from[W];
    for (int i = 0; i < W; i++) from[i] = x + std::min(n + i, panel.count - 1) * p.x_stride;
    int d = 0;
    for (; valid && d + W <= p.D; d += W) {
      vf v[W];
      UNROLL for (int i = 0; i < W; i++) v[i] = load(from[i] + d);
      transpose(v);
      UNROLL for (int i = 0; i < W; i++) store(to + int64_t(d + i) * lines + n, v[i]);
    }
    for (; d < p.D; d++)
      for (int i = 0; i < W; i++) to[int64_t(d) * lines + n + i] = widen(from[i][d]);
  }
}

void work_pack(void* argument) {
  BlockedJob& job = *static_cast<BlockedJob*>(argument);
  for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < int64_t(job.panels.size());) {
    if (job.dtype == 0) pack_panel<float>(job.product, job.panels[i]);
    else if (job.dtype == 1) pack_panel<bf16>(job.product, job.panels[i]);
    else pack_panel<f16>(job.product, job.panels[i]);
  }
}

// Columns [d, d + columns) of the widened rows times a panel, put to or added to sums [rows][vectors * W].
template <int NV, bool ADD>
__attribute__((noinline)) void multiply_panel(const Panel& panel, const float* wide, int rows, int d, int columns, float* sums) {
  constexpr int ROWS = NV == TILE_VECTORS ? 6 : ROW_STEP;
  vf as_they_are[NV];
  UNROLL for (int n = 0; n < NV; n++) as_they_are[n] = (vf){} + 1.0f;
  for (int r = 0; r < rows; r += ROWS)
    tile_product<NV, ROWS, ADD>(panel.packed + int64_t(d) * NV * W, wide + r * BLOCK_COLUMNS, 1, BLOCK_COLUMNS, columns,
                                as_they_are, sums + r * NV * W);
}
template <bool ADD>
void multiply_panel(const Panel& panel, const float* wide, int rows, int d, int columns, float* sums) {
  if (panel.vectors == 1) multiply_panel<1, ADD>(panel, wide, rows, d, columns, sums);
  else if (panel.vectors == 2) multiply_panel<2, ADD>(panel, wide, rows, d, columns, sums);
  else multiply_panel<TILE_VECTORS, ADD>(panel, wide, rows, d, columns, sums);
}

// The sums of a panel, rounded, to the outputs [first, last) of its tokens.
template <class T> void write_panel(const Product& p, const Panel& panel, const T* bias, int first, int last, const float* sums) {
  const int lines = panel.vectors * W;
  T* out = static_cast<T*>(p.out) + panel.token * p.R;
  int r = first;
  for (; r + W <= last; r += W) {
    const vf more = bias ? load(bias + r) : (vf){};
    for (int n = 0; n < panel.count; n += W) {
      vf v[W];
      UNROLL for (int i = 0; i < W; i++) v[i] = load(sums + (r - first + i) * lines + n);
      transpose(v);
      for (int i = 0; i < W && n + i < panel.count; i++) store(out + int64_t(n + i) * p.R + r, v[i] + more);
    }
  }
  for (; r < last; r++)
    for (int n = 0; n < panel.count; n++)
      narrow(sums[(r - first) * lines + n] + (bias ? widen(bias[r]) : 0.0f), out + int64_t(n) * p.R + r);
}

// Some columns of rows of a weight, of which `left` columns follow; those behind them are fetched while these are multiplied.
template <class T> void widen_block(const T* w, int rows, int padded, int columns, int D, int left, float* wide) {
  const int ahead = std::min(BLOCK_COLUMNS, left - columns);
  for (int r = 0; r < rows; r++, w += D) {
    widen_row(w, wide + r * BLOCK_COLUMNS, columns, columns);
    for (int c = 0; c < ahead; c += 64 / int(sizeof(T))) __builtin_prefetch(w + columns + c, 0, 2);
  }
  std::fill(wide + std::max(0, rows) * BLOCK_COLUMNS, wide + padded * BLOCK_COLUMNS, 0.0f);
}

// Outputs [first, last) of one expert over its panels [begin, end).
template <class T> void multiply_block(const BlockedJob& job, int expert, size_t begin, size_t end, int first, int last, float* memory) {
  const Product& p = job.product;
  const int rows = last - first, padded = round_up(rows, ROW_STEP);
  const T* w = static_cast<const T*>(p.weights[expert]) + int64_t(first) * p.D;
  float *wide = memory, *all_sums = memory + BLOCK_ROWS * BLOCK_COLUMNS;
  // The widened rows stay in L1 where the tokens stay in L2, else the tokens of a panel do, for as many rows as there are.
  const int step = end - begin <= FEW_PANELS ? ROW_STEP : padded;
  for (int d = 0; d < p.D; d += BLOCK_COLUMNS)
    for (int r = 0; r < padded; r += step) {
      const int columns = std::min(BLOCK_COLUMNS, p.D - d);
      widen_block(w + int64_t(r) * p.D + d, std::min(step, rows - r), step, columns, p.D, p.D - d, wide);
      float* sums = all_sums;
      for (size_t i = begin; i < end; sums += padded * job.panels[i].vectors * W, i++) {
        float* own = sums + r * job.panels[i].vectors * W;
        if (d) multiply_panel<true>(job.panels[i], wide, step, d, columns, own);
        else multiply_panel<false>(job.panels[i], wide, step, d, columns, own);
      }
    }
  const T* bias = p.biases ? static_cast<const T*>(p.biases[expert]) : nullptr;
  float* sums = all_sums;
  for (size_t i = begin; i < end; sums += padded * job.panels[i].vectors * W, i++)
    write_panel<T>(p, job.panels[i], bias, first, last, sums);
}

void work_blocks(void* argument) {
  BlockedJob& job = *static_cast<BlockedJob*>(argument);
  static thread_local Scratch scratch;
  float* memory = scratch.get(size_t(BLOCK_ROWS) * (BLOCK_COLUMNS + STRETCH_TOKENS + PANEL_TOKENS));
  if (!memory) {
    job.failed.store(true, std::memory_order_relaxed);
    return;
  }
  const int64_t blocks = job.blocks(), items = blocks * int64_t(job.experts.size());
  for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < items;) {
    const size_t at = i / blocks, begin = at ? job.ends[at - 1] : 0, end = job.ends[at];
    const int first = int(i % blocks) * job.rows_at_once, last = std::min(first + job.rows_at_once, job.product.R);
    if (job.dtype == 0) multiply_block<float>(job, job.experts[at], begin, end, first, last, memory);
    else if (job.dtype == 1) multiply_block<bf16>(job, job.experts[at], begin, end, first, last, memory);
    else multiply_block<f16>(job, job.experts[at], begin, end, first, last, memory);
  }
}

// The product for the experts asked for; false: there was no memory.
bool run_blocked(const Product& product, int dtype, const std::vector<int>& asked, int threads) {
  static thread_local Scratch scratch;
  const int64_t tokens = asked.empty() ? 0 : product.ends[asked.back()];
  for (int64_t begin = 0; begin < tokens; begin += STRETCH_TOKENS) {
    BlockedJob job{product, dtype};
    float* memory = scratch.get(job.cut(asked, begin, begin + STRETCH_TOKENS));
    if (job.panels.empty()) continue;
    if (!memory) return false;
    job.place(memory);
    run_parallel(work_pack, &job, int(std::min<size_t>(threads, job.panels.size())));
    job.next = 0;
    // Fewer rows at once where threads would wait for the last of them.
    const int64_t share = product.R * int64_t(job.experts.size()) / (3 * threads);
    job.rows_at_once = int(std::max<int64_t>(ROW_STEP, std::min<int64_t>(BLOCK_ROWS, share / ROW_STEP * ROW_STEP)));
    run_parallel(work_blocks, &job, threads);
    if (job.failed) return false;
  }
  return true;
}

}  // namespace
