// One call: its arguments, the work items it is cut into, and where its keys and values lie in the paged pools.
// The legend of shapes is in attention.cpp.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "numbers.h"

namespace {

constexpr float LOWEST = -1e30f;  // a finite "no score yet": -inf minus it is -inf, not NaN

// Keys [begin, end) of the rows [first, stop), in the same pages.
struct Shared { int32_t first, stop, begin, end; };

struct Call {
  const void *q, *k_pool, *v_pool;
  void* out;
  int64_t q_stride, page_stride, table_stride;
  const int32_t *page_tables, *q_starts, *context_lens;
  int B, H, G, D, page_tokens, N, window;
  float scale;
  const float* sinks;  // [H], a score in every softmax that belongs to no key; null: none
  int width;  // stored elements of a head of a token: D, or those of a compressed head with its scale
  const Shared* shared;    // what rows have in common, longer beginnings behind those that they follow
  int S;
  const int32_t* begins;   // [B], the first key that a row has not in common with others; null: 0 for all
  float* state;            // [T][H][D + 2], the softmax of each query over the shared keys so far: output, largest score, sum
};

// What a head of a token in a pool is times; 1 where it is not compressed. Its place follows the numbers, at an even byte.
template <class E> INLINE float head_scale(const E*, int) { return 1.0f; }
INLINE float head_scale(const i8* head, int D) {
  bf16 scale;
  std::memcpy(&scale, head + D + D % 2, sizeof scale);
  return widen(scale);
}

// tile -1: the stream path; segment: of the shared keys, for all of its rows, or -1; tiles: that follow one another
struct Item { int32_t row, head_begin, head_end, tile, segment, tiles = 1; };

// Query tokens of an item.
INLINE int item_tokens(const Call& c, const Item& item) {
  const int stop = item.segment < 0 ? item.row + 1 : c.shared[item.segment].stop;
  return c.q_starts[stop] - c.q_starts[item.row];
}

constexpr float LOG2E = 1.44269504088896340736f;

// Where the softmax of a query head begins: its largest score so far, in base 2, and the sum of what counts so far.
INLINE float first_score(const Call& c, int head) { return c.sinks ? c.sinks[head] * LOG2E : LOWEST; }
INLINE float first_sum(const Call& c) { return c.sinks ? 1.0f : 0.0f; }

INLINE int round_up(int x, int to) { return (x + to - 1) / to * to; }

INLINE float* state_of(const Call& c, int64_t token, int head) { return c.state + (token * c.H + head) * (c.D + 2); }

// The first key that is left for the row by itself and that any of its queries sees.
INLINE int first_key(const Call& c, int row) {
  if (c.begins) return c.begins[row];
  const int queries = c.q_starts[row + 1] - c.q_starts[row];
  return c.window ? std::max(0, c.context_lens[row] - queries - c.window + 1) : 0;
}

// Element offset of token t of a row, KV head 0, in either pool; fills `count` consecutive tokens.
INLINE void token_offsets(const Call& c, int row, int t, int count, int64_t* offsets) {
  const int32_t* table = c.page_tables + row * c.table_stride;
  int page = t / c.page_tokens, slot = t % c.page_tokens;
  const int64_t token = int64_t(c.G) * c.width;
  for (int i = 0; i < count; page++, slot = 0) {
    int64_t base = table[page] * c.page_stride;
    for (; slot < c.page_tokens && i < count; slot++, i++) offsets[i] = base + slot * token;
  }
}

// Prefetches `count` tokens' heads [head, head + heads) a few lines at a time, while the chunk before is computed: a
// burst would fill the core's miss buffers and stop it, and a pause leaves the memory idle. In the order of addresses,
// which hardware prefetchers follow.
struct Ahead {
  const char *k, *at = nullptr;
  ptrdiff_t v_minus_k;
  const int64_t* offsets;
  int64_t element_bytes;
  int token = 0, end, bytes, left = 0, credit = 0, together, apart;  // tokens that lie side by side: from here on, and of a page
  // `t`: of the first token.
  Ahead(const Call& c, size_t element, const int64_t* token_offsets, int count, int head, int heads, int t)
      : k((const char*)c.k_pool + int64_t(head) * c.width * element),
        v_minus_k((const char*)c.v_pool - (const char*)c.k_pool), offsets(token_offsets), element_bytes(element),
        end(count), bytes(heads * c.width * int(element)), together(heads == c.G ? c.page_tokens - t % c.page_tokens : 1),
        apart(heads == c.G ? c.page_tokens : 1) {}
  // So many bytes more of the keys, in whole lines, and of the values.
  template <int LOCALITY = 3> INLINE void fetch(int most) {
    for (credit += most; credit >= 64;) {
      if (!left) {
        if (token >= end) return;
        const int run = std::min(together, end - token);
        const char* first = k + offsets[token] * element_bytes;
        at = (const char*)(uintptr_t(first) & ~uintptr_t(63));
        left = int(first - at + run * bytes + 63) / 64, token += run, together = apart;
      }
      const int now = std::min(credit / 64, left);
      const char *line = at, *const stop = at + now * 64;
      for (; line < stop; line += 64) __builtin_prefetch(line, 0, LOCALITY), __builtin_prefetch(line + v_minus_k, 0, LOCALITY);
      at = stop, left -= now, credit -= now * 64;
    }
  }
  // Into L2, a few bytes at a time.
  INLINE void fetch_some(int most) {
    credit += most;
    const int now = credit / 64;
    if (now > left) return fetch_far(0);
    const char *line = at, *const stop = at + now * 64;
    for (; line < stop; line += 64) __builtin_prefetch(line, 0, 2), __builtin_prefetch(line + v_minus_k, 0, 2);
    at = stop, left -= now, credit -= now * 64;
  }
  // Into L2, from where registers are scarce.
  __attribute__((noinline)) void fetch_far(int most) { fetch<2>(most); }
};

}  // namespace
