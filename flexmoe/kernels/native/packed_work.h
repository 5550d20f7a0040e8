// Packed matrices shared out among threads: rows that are unpacked, and products that unpack some rows at a time.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "packed.h"
#include "products.h"
#include "work.h"

namespace {

constexpr int64_t UNPACKED_AT_ONCE = 1 << 16;  // values that a thread takes at once

constexpr int64_t MULTIPLIED_BYTES = 1 << 18;  // of unpacked rows; they stay in L2 beside the tokens

// Rows that are unpacked at once and multiplied then, where an item is ROWS_AT_ONCE; at least those that are transposed.
INLINE int rows_at_once(const Packed& p, size_t size) {
  const int least = p.codec == AWQ ? AWQ_AT_ONCE : p.codec == GPTQ ? 16 : TILE;
  const int64_t fit = MULTIPLIED_BYTES / (std::max(p.C, 1) * int64_t(size)) / least * least;
  return int(std::min<int64_t>(ROWS_AT_ONCE, std::max<int64_t>(least, fit)));
}

struct UnpackJob {
  const Packed& packed;
  const Matrix& matrix;
  const int dtype, first, last;
  void* const out;
  std::atomic<int64_t> next{0};
};

template <class T> void unpack_items(UnpackJob& job) {
  const int64_t C = job.packed.C;
  const int step = int(std::max<int64_t>(1, UNPACKED_AT_ONCE / std::max<int64_t>(C, 1) / AWQ_AT_ONCE)) * AWQ_AT_ONCE;
  for (int64_t i; (i = job.first + job.next.fetch_add(step, std::memory_order_relaxed)) < job.last;) {
    const int last = int(std::min<int64_t>(job.last, i + step));
    unpack_rows(job.packed, job.matrix, int(i), last, static_cast<T*>(job.out) + (i - job.first) * C);
  }
}

void work_unpack(void* argument) {
  UnpackJob& job = *static_cast<UnpackJob*>(argument);
  if (job.dtype == 0) unpack_items<float>(job);
  else if (job.dtype == 1) unpack_items<bf16>(job);
  else unpack_items<f16>(job);
}

struct PackedProductJob {
  const Product& product;
  const Packed& packed;
  const Matrix* const matrices;  // of each expert
  const int dtype;
  std::vector<int> experts;  // those that have tokens
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
};

// Outputs [first, last) of one expert over its tokens: unpacked into `memory`, a few at a time, and multiplied there.
template <class T> void packed_rows(const PackedProductJob& job, int expert, int first, int last, T* memory) {
  const Product& p = job.product;
  const int start = expert ? p.ends[expert - 1] : 0, n = p.ends[expert] - start, step = rows_at_once(job.packed, sizeof(T));
  const T* x = static_cast<const T*>(p.x) + start * p.x_stride;
  T* out = static_cast<T*>(p.out) + int64_t(start) * p.R;
  for (int at = first; at < last; at += step) {
    const int stop = std::min(last, at + step);
    unpack_rows(job.packed, job.matrices[expert], at, stop, memory);
    all_rows(static_cast<const T*>(memory), x, p.x_stride, n, at, stop, p.D, out, p.R);
  }
}

template <class T> void packed_items(PackedProductJob& job) {
  static thread_local Scratch scratch;
  const Product& p = job.product;
  void* memory = scratch.get((int64_t(rows_at_once(job.packed, sizeof(T))) * p.D * sizeof(T) + 3) / 4 + 1);
  if (!memory) {
    job.failed.store(true, std::memory_order_relaxed);
    return;
  }
  const int64_t blocks = (p.R + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, items = blocks * int64_t(job.experts.size());
  for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < items;) {
    const int first = int(i % blocks) * ROWS_AT_ONCE;
    packed_rows(job, job.experts[i / blocks], first, std::min(first + ROWS_AT_ONCE, p.R), static_cast<T*>(memory));
  }
}

void work_packed_product(void* argument) {
  PackedProductJob& job = *static_cast<PackedProductJob*>(argument);
  if (job.dtype == 0) packed_items<float>(job);
  else if (job.dtype == 1) packed_items<bf16>(job);
  else packed_items<f16>(job);
}

}  // namespace
