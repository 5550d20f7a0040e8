// Work: how a call is cut into items, and the threads that take them.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <system_error>
#include <thread>
#include <vector>

#include "call.h"
#include "decode.h"
#include "decode_amx.h"
#include "decode_amx_int8.h"
#include "decode_avx2.h"
#include "numbers.h"
#include "prefill.h"
#include "prefill_amx.h"

namespace {

// Per-thread buffers, kept between calls: a sweep makes many.
struct Scratch {
  float* data = nullptr;
  size_t capacity = 0;
  ~Scratch() { std::free(data); }
  float* get(size_t floats) {
    if (floats > capacity) {
      std::free(data);
      capacity = 0;
      data = static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64));
      if (data) capacity = floats;
    }
    return data;
  }
};

// What the stream path is for queries of T; lines that it takes at most.
#if defined(HAS_AMX)
template <class T, class E> constexpr bool on_amx = std::is_same<T, bf16>::value;
template <class E> using AmxOf = std::conditional_t<std::is_same<E, i8>::value, AmxBytes, AmxStream>;
INLINE int stream_lines(int dtype) { return dtype == 1 && may_use_amx() ? AMX_LINES : STREAM_LINES; }
INLINE int tiles_at_once(int dtype) { return dtype == 1 && may_use_amx() ? AMX_TILES : 1; }
#else
template <class T, class E> constexpr bool on_amx = false;
INLINE int stream_lines(int) { return STREAM_LINES; }
INLINE int tiles_at_once(int) { return 1; }
#endif

template <class S> bool run_stream(const Call& c, const Item& item, const Item* following, Scratch& scratch) {
  float* memory = scratch.get(S::scratch_floats(c, c.G));
  if (memory) S(c, item, memory).run(item, following);
  return memory;
}
template <class T, class E> bool run_item(const Call& c, const Item& item, const Item* following) {
  static thread_local Scratch scratch;
#if defined(HAS_AMX)
  if constexpr (on_amx<T, E>)
    if (may_use_amx()) {
      if (item.tile < 0) return run_stream<AmxOf<E>>(c, item, following, scratch);
      float* memory = scratch.get(amx_tiles_floats<E>(c));
      if (memory) run_amx_tiles<E>(c, item, memory);
      return memory;
    }
#endif
#if defined(HAS_AVX2_STREAM)
  if constexpr (std::is_same<T, bf16>::value)
    if (item.tile < 0 && (std::is_same<E, bf16>::value || c.D <= LARGEST_INT8_HEAD))
      return run_stream<Avx2Stream<E>>(c, item, following, scratch);
#endif
  if (item.tile < 0) return run_stream<Stream<T, E>>(c, item, following, scratch);
  float* memory = scratch.get(Tile<T, E, 1>::scratch_floats(c));
  if (!memory) return false;
  run_tile<T, E>(c, item, memory);
  return true;
}

template <class T> bool run_stored(bool compressed, const Call& c, const Item& item, const Item* following) {
  return compressed ? run_item<T, i8>(c, item, following) : run_item<T, T>(c, item, following);
}

struct Job {
  const Call& call;
  const int dtype;
  const bool compressed;
  std::vector<Item> items;
  std::vector<size_t> claims;  // a thread takes items [claims[i], claims[i + 1]) at once
  std::atomic<size_t> next{0};
  std::atomic<bool> failed{false};

  // Of shared keys: those that follow so many others.
  Job(const Call& c, int type, bool is_compressed, const std::vector<int>& depths, int depth, int threads)
      : call(c), dtype(type), compressed(is_compressed) {
    auto lines_of = [&](int s) { return (c.q_starts[c.shared[s].stop] - c.q_starts[c.shared[s].first]) * c.N; };
    int tiles = 0;
    for (int s = 0; s < c.S; s++) tiles += depths[s] == depth ? tiles_of(lines_of(s)) * c.G : 0;
    for (int s = 0; s < c.S; s++)
      for (int h = 0; depths[s] == depth && h < c.G; h++)
        add_tiles(c.shared[s].first, h, lines_of(s), s, at_once(tiles, threads));
    for (size_t i = 0; i <= items.size(); i++) claims.push_back(i);
  }
  // Of each row by itself.
  Job(const Call& c, int type, bool is_compressed, int threads) : call(c), dtype(type), compressed(is_compressed) {
    add_tiles(threads);
    for (size_t i = 0; i < items.size(); i++) claims.push_back(i);
    const size_t first = items.size();
    int streams = 0;
    for (int b = 0; b < c.B; b++) streams += is_stream(b);
    // All heads of a row read the same pages; they are split only when rows are too few to balance the threads.
    const int heads = streams >= 4 * threads ? c.G : 1;
    for (int b = 0; b < c.B; b++)
      for (int h = 0; is_stream(b) && h < c.G; h += heads) items.push_back({b, h, h + heads, -1, -1});
    const size_t together = std::min<size_t>(16, std::max<size_t>(1, (items.size() - first) / (8 * threads)));
    for (size_t i = first; i < items.size(); i += together) claims.push_back(i);
    claims.push_back(items.size());
  }
  int lines(int b) const { return (call.q_starts[b + 1] - call.q_starts[b]) * call.N; }
  bool is_stream(int b) const { return lines(b) > 0 && lines(b) <= stream_lines(dtype); }
  static int tiles_of(int lines) { return (lines + TILE_LINES - 1) / TILE_LINES; }
  // Tiles of an item: fewer where threads would wait for the last of them.
  int at_once(int tiles, int threads) const { return std::max(1, std::min(tiles_at_once(dtype), tiles / (2 * threads))); }
  // Tiles go first, and of a run the last, dearest ones, so that streams fill the end of the call.
  void add_tiles(int threads) {
    int tiles = 0;
    for (int b = 0; b < call.B; b++) tiles += lines(b) > stream_lines(dtype) ? tiles_of(lines(b)) * call.G : 0;
    for (int b = 0; b < call.B; b++)
      for (int h = 0; lines(b) > stream_lines(dtype) && h < call.G; h++)
        add_tiles(b, h, lines(b), -1, at_once(tiles, threads));
  }
  void add_tiles(int row, int head, int lines, int segment, int most) {
    const int tiles = tiles_of(lines);
    for (int tile = (tiles - 1) / most * most; tile >= 0; tile -= most)
      items.push_back({row, head, head + 1, tile, segment, std::min(most, tiles - tile)});
  }
};

void work(void* argument) {
  Job& job = *static_cast<Job*>(argument);
  for (size_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) + 1 < job.claims.size();)
    for (size_t at = job.claims[i]; at < job.claims[i + 1]; at++) {
      const Item& item = job.items[at];
      const Item* following = at + 1 < job.claims[i + 1] ? &item + 1 : nullptr;
      const bool ok = job.dtype == 0 ? run_stored<float>(job.compressed, job.call, item, following)
                      : job.dtype == 1 ? run_stored<bf16>(job.compressed, job.call, item, following)
                                       : run_stored<f16>(job.compressed, job.call, item, following);
      if (!ok) job.failed.store(true, std::memory_order_relaxed);
    }
}

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel
Parallel parallel = nullptr;

// Work that its threads share out themselves, on as many as there are.
void run_parallel(void (*work)(void*), void* job, int threads) {
  if (threads > 1 && parallel) parallel(work, job, unsigned(threads), 0);
  else work(job);
}

void run_on_threads(Job& job, int threads) {
  if (threads <= 1) return work(&job);
  if (parallel) return parallel(work, &job, unsigned(threads), 0);
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < threads; i++) others.emplace_back(work, &job);
  } catch (const std::system_error&) {
    // The system gives no more threads: those that there are share the work.
  }
  work(&job);
  for (auto& thread : others) thread.join();
}

}  // namespace
