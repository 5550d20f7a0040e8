// Grouped products of bf16 on AMX, of more than a few tokens: tiles of the weight as it lies times panels of tokens, which are
// packed once as pairs of columns. Packed weights are unpacked some rows at a time, in a core's own cache, and multiplied there.
//
// A sum of products is one tile's, column after column; a result depends neither on the other tokens nor on the threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "amx.h"
#include "blocked.h"
#include "numbers.h"
#include "packed_work.h"
#include "products.h"
#include "work.h"

namespace {

// Whether AMX multiplies these, and from how many tokens of an expert on it is faster than products.h.
#if defined(HAS_AMX)
constexpr int AMX_TOKENS = 5;
bool amx_multiplies(const Product& p, int dtype) { return dtype == 1 && p.D % 32 == 0 && p.R >= 16 && may_use_amx(); }
#else
constexpr int AMX_TOKENS = INT_MAX;
bool amx_multiplies(const Product&, int) { return false; }
#endif

}  // namespace

#if defined(HAS_AMX)
namespace {

constexpr int AMX_ROWS = 64;             // of a weight, at a time
constexpr int AMX_STRETCH_TOKENS = 1024; // packed at a time: bounds the memory that they take
constexpr int AMX_AHEAD = 512;           // columns of the next rows that are fetched while these are multiplied

struct AmxProductJob {
  BlockedJob tokens;      // its panels are [D / 2][vectors * W][2] bf16
  const Packed* packed;   // null: the weights are not packed
  const Matrix* matrices;
};

void pack_pairs(const Product& p, const Panel& panel) {
  const bf16* x = static_cast<const bf16*>(p.x) + panel.token * p.x_stride;
  const int lines = panel.vectors * W;
  uint32_t* to = (uint32_t*)panel.packed;
  for (int n = 0; n < lines; n += W)
    for (int d = 0; d < p.D; d += 32) {
      vf pairs[W];
      UNROLL for (int i = 0; i < W; i++) pairs[i] = n + i < panel.count ? load((const float*)(x + (n + i) * p.x_stride + d)) : (vf){};
      transpose(pairs);
      UNROLL for (int i = 0; i < W; i++) store((float*)(to + int64_t(d / 2 + i) * lines + n), pairs[i]);
    }
}
void work_pack_pairs(void* argument) {
  BlockedJob& job = static_cast<AmxProductJob*>(argument)->tokens;
  for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < int64_t(job.panels.size());)
    pack_pairs(job.product, job.panels[i]);
}

// Sixteen outputs of sixteen tokens, of a tile [output][token]: those from `skip` on to at most `count` tokens.
INLINE void write_outputs(const float* sums, const bf16* bias, int skip, bf16* out, int64_t R, int count) {
  vf x[W];
  UNROLL for (int i = 0; i < W; i++) x[i] = load(sums + i * W);
  transpose(x);
  const vf more = bias ? load(bias) : (vf){};
  const __mmask16 wanted = __mmask16(0xffff << skip);
  for (int t = 0; t < count; t++) {
    alignas(32) bf16 rounded[W];
    store(rounded, x[t] + more);
    _mm256_mask_storeu_epi16(out + t * R, wanted, _mm256_load_si256((const __m256i*)rounded));
  }
}

// One or two tiles of a weight's rows times the tiles n and, where there is one, n + 1 of a panel's tokens.
template <int ROW_TILES>
INLINE void multiply_tiles(const bf16* a, const bf16* b, int D, const Panel& panel, int n, bool fetch) {
  const int64_t lines = panel.vectors * W, step = lines * 4;
  const bf16* x = (const bf16*)panel.packed + n * W * 2;
  const bool two = n + 1 < panel.vectors;
  settle();
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  for (int d = 0; d < D; d += 32, x += 32 * lines) {
    if (fetch)
      for (int i = 0; i < 16; i++) {
        __builtin_prefetch(a + int64_t(i) * D + d + AMX_AHEAD, 0, 2);
        if (ROW_TILES > 1) __builtin_prefetch(b + int64_t(i) * D + d + AMX_AHEAD, 0, 2);
      }
    _tile_loadd(4, a + d, D * 2);
    _tile_loadd(6, x, step);
    _tile_dpbf16ps(0, 4, 6);
    if (ROW_TILES > 1) {
      _tile_loadd(5, b + d, D * 2);
      _tile_dpbf16ps(1, 5, 6);
    }
    if (two) {
      _tile_loadd(7, x + 2 * W, step);
      _tile_dpbf16ps(2, 4, 7);
      if (ROW_TILES > 1) { _tile_dpbf16ps(3, 5, 7); }
    }
  }
}

// Outputs [first, last) of an expert, whose first row is at `w`, over its panels. Rows in front of `last` are 16 at least.
void multiply_amx(const AmxProductJob& job, int expert, size_t begin, size_t end, int first, int last, const bf16* w) {
  const Product& p = job.tokens.product;
  const bf16* bias = p.biases ? static_cast<const bf16*>(p.biases[expert]) : nullptr;
  alignas(64) float sums[4][W * W];
  for (size_t i = begin; i < end; i++) {
    const Panel& panel = job.tokens.panels[i];
    for (int r = first; r < last; r += 32) {
      const int tiles = last - r > 16 ? 2 : 1;
      const int at[2] = {std::min(r, last - 16), std::min(r + 16, last - 16)};  // a last tile that is not whole begins earlier
      const bf16 *a = w + int64_t(at[0] - first) * p.D, *b = w + int64_t(at[1] - first) * p.D;
      for (int n = 0; n < panel.vectors; n += 2) {
        const bool fetch = i == begin && n == 0 && !job.packed;
        if (tiles > 1) multiply_tiles<2>(a, b, p.D, panel, n, fetch);
        else multiply_tiles<1>(a, b, p.D, panel, n, fetch);
        _tile_stored(0, sums[0], 64); _tile_stored(1, sums[1], 64); _tile_stored(2, sums[2], 64); _tile_stored(3, sums[3], 64);
        for (int j = 0; j < 4; j++) {
          const int tile = j % 2, vector = n + j / 2, count = std::min(W, panel.count - vector * W);
          if (tile >= tiles || vector >= panel.vectors || count <= 0) continue;
          bf16* out = static_cast<bf16*>(p.out) + (panel.token + vector * W) * p.R + at[tile];
          write_outputs(sums[j], bias ? bias + at[tile] : nullptr, r + 16 * tile - at[tile], out, p.R, count);
        }
      }
    }
  }
}

void work_amx(void* argument) {
  AmxProductJob& job = *static_cast<AmxProductJob*>(argument);
  BlockedJob& tokens = job.tokens;
  const Product& p = tokens.product;
  static thread_local Scratch scratch;
  bf16* memory = job.packed ? (bf16*)scratch.get((AMX_ROWS + size_t(16)) * p.D / 2) : nullptr;
  if (job.packed && !memory) {
    tokens.failed.store(true, std::memory_order_relaxed);
    return;
  }
  const Tiles all({{16, 64}, {16, 64}, {16, 64}, {16, 64}, {16, 64}, {16, 64}, {16, 64}, {16, 64}});
  const int64_t blocks = tokens.blocks(), items = blocks * int64_t(tokens.experts.size());
  for (int64_t i; (i = tokens.next.fetch_add(1, std::memory_order_relaxed)) < items;) {
    const size_t at = i / blocks, begin = at ? tokens.ends[at - 1] : 0, end = tokens.ends[at];
    const int expert = tokens.experts[at], first = int(i % blocks) * tokens.rows_at_once;
    const int last = std::min(first + tokens.rows_at_once, p.R), from = std::min(first, last - 16);
    const bf16* w;
    if (job.packed) unpack_rows(*job.packed, job.matrices[expert], from, last, memory), w = memory + int64_t(first - from) * p.D;
    else w = static_cast<const bf16*>(p.weights[expert]) + int64_t(first) * p.D;
    multiply_amx(job, expert, begin, end, first, last, w);
  }
}

// The product for the experts asked for; false: there was no memory.
bool run_amx(const Product& product, const std::vector<int>& asked, int threads, const Packed* packed, const Matrix* matrices) {
  static thread_local Scratch scratch;
  const int64_t tokens = asked.empty() ? 0 : product.ends[asked.back()];
  for (int64_t begin = 0; begin < tokens; begin += AMX_STRETCH_TOKENS) {
    AmxProductJob job{{product, 1}, packed, matrices};
    float* memory = scratch.get(job.tokens.cut(asked, begin, begin + AMX_STRETCH_TOKENS) / 2);
    if (job.tokens.panels.empty()) continue;
    if (!memory) return false;
    for (Panel& panel : job.tokens.panels) panel.packed = memory, memory += size_t(panel.vectors) * W * product.D / 2;
    run_parallel(work_pack_pairs, &job, int(std::min<size_t>(threads, job.tokens.panels.size())));
    job.tokens.next = 0;
    // Fewer rows at once where threads would wait for the last of them.
    const int64_t share = product.R * int64_t(job.tokens.experts.size()) / (3 * threads);
    job.tokens.rows_at_once = int(std::max<int64_t>(32, std::min<int64_t>(AMX_ROWS, share / 32 * 32)));
    run_parallel(work_amx, &job, threads);
    if (job.tokens.failed) return false;
  }
  return true;
}

}  // namespace
#else
namespace {
bool run_amx(const Product&, const std::vector<int>& asked, int, const Packed*, const Matrix*) { return asked.empty(); }
}  // namespace
#endif
