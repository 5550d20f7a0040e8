// Ragged paged grouped-query causal attention on CPU cores; fp32 accumulation, online softmax in base 2.
//
// Shapes: T query tokens, H query heads, G KV heads, N = H/G heads per group, D head size, B rows.
// A row's queries times its group's heads are "lines" (line = token*N + head of the group). Per (row, KV head), few
// lines take the stream path (decode.h) and many lines the tile path (prefill.h). How lines are cut depends only on the
// row itself, so a result depends neither on the other rows nor on threads.
//
// Keys that rows have in common come first, tile by tile of all lines of these rows, so that they are read once for all of
// them; each row goes on from there by itself. Its result then depends on which of its keys are shared, and on nothing else.
//
// This file is the C entry points (those of products.h, packed_work.h and choice.h, too; elementwise.h and rotary.h have their own) and the
// checks that need the tensors' contents.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <vector>

#include "blocked.h"
#include "call.h"
#include "choice.h"
#include "elementwise.h"
#include "feed_forward.h"
#include "packed_work.h"
#include "products.h"
#include "products_amx.h"
#include "rotary.h"
#include "work.h"

namespace {

enum Status { OK = 0, BAD_STARTS = 1, BAD_CONTEXT = 2, BAD_PAGE = 3, NO_MEMORY = 4, BAD_SHARED = 5 };

Status check(const Call& c, int64_t tokens, int64_t num_pages, int64_t table_width) {
  if (c.q_starts[0] < 0 || c.q_starts[c.B] > tokens) return BAD_STARTS;
  for (int b = 0; b < c.B; b++) {
    const int queries = c.q_starts[b + 1] - c.q_starts[b], context = c.context_lens[b];
    if (queries < 0) return BAD_STARTS;
    if (queries == 0) continue;
    if (context < queries || context > table_width * c.page_tokens) return BAD_CONTEXT;
    const int32_t* table = c.page_tables + b * c.table_stride;
    for (int i = c.S ? 0 : first_key(c, b) / c.page_tokens; i <= (context - 1) / c.page_tokens; i++)
      if (table[i] < 0 || table[i] >= num_pages) return BAD_PAGE;
  }
  return OK;
}

// How many shared beginnings each one follows, and where each row's own keys begin. The pages are compared, since a wrong one
// would go unseen.
Status cut_shared(const Call& c, std::vector<int>& depths, std::vector<int32_t>& begins) {
  std::vector<const Shared*> within;
  for (int s = 0; s < c.S; s++) {
    const Shared& each = c.shared[s];
    while (!within.empty() && within.back()->stop <= each.first) within.pop_back();
    if (each.first < 0 || each.stop <= each.first || each.stop > c.B || each.end <= each.begin || c.window) return BAD_SHARED;
    if (each.begin != (within.empty() ? 0 : within.back()->end) || each.begin % c.page_tokens || each.end % c.page_tokens)
      return BAD_SHARED;
    if (!within.empty() && each.stop > within.back()->stop) return BAD_SHARED;
    const int from = each.begin / c.page_tokens, pages = each.end / c.page_tokens - from;
    const int32_t* first = c.page_tables + each.first * c.table_stride + from;
    for (int b = each.first; b < each.stop; b++) {
      if (each.end > c.context_lens[b] - (c.q_starts[b + 1] - c.q_starts[b])) return BAD_SHARED;
      if (std::memcmp(first, c.page_tables + b * c.table_stride + from, pages * sizeof(int32_t))) return BAD_SHARED;
      begins[b] = each.end;
    }
    depths.push_back(int(within.size()));
    within.push_back(&each);
  }
  return OK;
}

}  // namespace

extern "C" {

// `gomp_parallel` is GOMP_parallel of the OpenMP runtime that the process already has, so that this library's threads
// are that runtime's and no second pool spins beside it. Null: plain threads, started and joined in every call.
void flexmoe_set_parallel(void* gomp_parallel) { parallel = reinterpret_cast<Parallel>(gomp_parallel); }

// Whether bf16 is multiplied in tiles of AMX here.
int flexmoe_has_tiles() {
#if defined(HAS_AMX)
  return may_use_amx();
#else
  return 0;
#endif
}

// dtype 0 fp32, 1 bf16, 2 fp16; strides in elements, those of compressed pools in bytes; `width` is of a head in a pool. See
// attention.py for the meaning of the arguments.
int flexmoe_attention(int dtype, int compressed, int width, const void* q, int64_t q_stride, int64_t tokens, const void* k_pool,
                      const void* v_pool, int64_t page_stride, int64_t num_pages, const int32_t* page_tables,
                      int64_t table_stride, int64_t table_width, const int32_t* q_starts, const int32_t* context_lens,
                      const float* sinks, const int32_t* shared, int S, void* out, int B, int H, int G, int D, int page_tokens, int window, float scale,
                      int num_threads) {
  Call call{q, k_pool, v_pool, out, q_stride, page_stride, table_stride, page_tables, q_starts, context_lens,
            B, H, G, D, page_tokens, H / G, window, scale, sinks, width,
            reinterpret_cast<const Shared*>(shared), S, nullptr, nullptr};
  try {
    if (Status status = check(call, tokens, num_pages, table_width)) return status;
    std::vector<int> depths;
    std::vector<int32_t> begins(S ? B : 0);
    static thread_local Scratch scratch;
    float* state = S ? scratch.get(size_t(tokens) * H * (D + 2)) : nullptr;
    if (S && !state) return NO_MEMORY;
    if (Status status = cut_shared(call, depths, begins)) return status;
    if (S) call.begins = begins.data(), call.state = state;
    const int levels = S ? *std::max_element(depths.begin(), depths.end()) + 1 : 0;
    for (int depth = 0; depth < levels; depth++) {
      Job job(call, dtype, compressed, depths, depth, num_threads);
      run_on_threads(job, int(std::min<size_t>(num_threads, job.claims.size() - 1)));
      if (job.failed) return NO_MEMORY;
    }
    Job job(call, dtype, compressed, num_threads);
    run_on_threads(job, int(std::min<size_t>(num_threads, job.claims.size() - 1)));
    return job.failed ? NO_MEMORY : OK;
  } catch (const std::exception&) {
    return NO_MEMORY;
  }
}

// out[n, R] = x[n, D] · weight[e]^T + bias[e] for the tokens x[ends[e - 1], ends[e]) of each expert e; `biases` may be null.
int flexmoe_products(int dtype, const void* x, int64_t x_stride, const void* const* weights, const int32_t* ends, void* out,
                     int E, int R, int D, const void* const* biases, int num_threads) {
  Product product{x, weights, out, ends, x_stride, E, R, D, biases};
  try {
    ProductJob job{product, dtype};
    std::vector<int> others;
    const bool amx = amx_multiplies(product, dtype);
    for (int e = 0; e < E; e++) {
      const int tokens = ends[e] - (e ? ends[e - 1] : 0);
      if (tokens) (tokens < (amx ? AMX_TOKENS : blocked_from(dtype)) ? job.experts : others).push_back(e);
    }
    if (!job.experts.empty()) run_parallel(work_product, &job, num_threads);
    if (amx) return run_amx(product, others, num_threads, nullptr, nullptr) ? OK : NO_MEMORY;
    return run_blocked(product, dtype, others, num_threads) ? OK : NO_MEMORY;
  } catch (const std::exception&) {
    return NO_MEMORY;
  }
}

// Values of the outputs [first, last) of a packed matrix; `dtype` is that of `out` [last - first, C].
int flexmoe_unpack(const Packed* packed, const Matrix* matrix, int dtype, int first, int last, void* out, int num_threads) {
  UnpackJob job{*packed, *matrix, dtype, first, last, out};
  run_parallel(work_unpack, &job, num_threads);
  return OK;
}

// The same as `flexmoe_products` with packed weights, whose values are those that `flexmoe_unpack` gives in `dtype`.
int flexmoe_packed_products(const Packed* packed, const Matrix* matrices, int dtype, const void* x, int64_t x_stride,
                            const int32_t* ends, void* out, int E, int num_threads) {
  Product product{x, nullptr, out, ends, x_stride, E, packed->R, packed->C};
  try {
    PackedProductJob job{product, *packed, matrices, dtype};
    std::vector<int> others;
    const bool amx = amx_multiplies(product, dtype);
    for (int e = 0; e < E; e++) {
      const int tokens = ends[e] - (e ? ends[e - 1] : 0);
      if (tokens) (amx && tokens >= AMX_TOKENS ? others : job.experts).push_back(e);
    }
    if (!job.experts.empty()) run_parallel(work_packed_product, &job, num_threads);
    return !job.failed && run_amx(product, others, num_threads, packed, matrices) ? OK : NO_MEMORY;
  } catch (const std::exception&) {
    return NO_MEMORY;
  }
}

// tokens[r]: the largest logit of row r of x [rows, vocab], or -1 where one is not finite.
void flexmoe_largest(int dtype, const void* x, int64_t x_stride, int64_t* tokens, int rows, int vocab, int num_threads) {
  Best best{dtype, x, x_stride, tokens, rows, vocab};
  run_parallel(work_best, &best, std::min(rows, num_threads));
}

// tokens[r]: who wins the race of row r of the logits x [rows, vocab]; keys [rows, 2].
void flexmoe_winners(const float* x, int64_t x_stride, const uint32_t* keys, int64_t* tokens, int rows, int vocab,
                     int num_threads) {
  Race race{x, x_stride, keys, tokens, rows, vocab};
  run_parallel(work_race, &race, std::min(rows, num_threads));
}

}  // extern "C"
