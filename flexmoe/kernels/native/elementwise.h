// Work between the products, one pass over memory each: norm, gate, rows put or added to others. Rotary embedding is in rotary.h.
//
// Numbers are widened to fp32, and rounded once where the result is stored. A result depends neither on the other rows nor
// on the threads. The C entry points are at the end; elementwise.py says what their arguments mean.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "call.h"
#include "lanes.h"
#include "numbers.h"
#include "work.h"

namespace {

constexpr int64_t ELEMENTS_AT_ONCE = 1 << 14;  // numbers of an item; a call of fewer is not worth a second thread

INLINE vf rounded(vf x, const float*) { return x; }
INLINE vf rounded(vf x, const bf16*) {
  vu u = (vu)x;
  return x != x ? x : (vf)((u + 0x7fff + (u >> 16 & 1)) & 0xffff0000u);
}
INLINE vf rounded(vf x, const f16*) {
  f16 stored[W];
  store(stored, x);
  return load(stored);
}
template <class T> INLINE float rounded(float x, const T*) {
  T stored;
  narrow(x, &stored);
  return widen(stored);
}

// Of two neighbouring vectors, the lanes at even places, or those at odd ones.
template <int FIRST, int... I> INLINE vf every_second(vf a, vf b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (2 * I + FIRST)...);
#else
  return __builtin_shuffle(a, b, (vi){(2 * I + FIRST)...});
#endif
}

// e^x for x <= 0: what the product with log2(e) loses is made up, as it counts as much as the exponent is large.
INLINE vf exp_nonpositive(vf x) {
  x = vmax((vf){} - 88.0f, x);  // keeps a NaN; e^-88 is the smallest that counts
  const vf high = x * LOG2E;
  const vf low = x - high * 0.693359375f - high * -2.12194440e-4f;  // ln(2) in two parts: of the first, few bits are set
  return exp2_nonpositive(high) * (1.0f + low);
}
INLINE vf sigmoid(vf x) {
  const vf size = x < 0.0f ? x : -x, z = exp_nonpositive(size);
  return (x < 0.0f ? z : (vf){} + 1.0f) / (1.0f + z);
}

// Threads share out `rows`, some at a time, and `run(first, last)` does them.
template <class Run> struct RowsJob {
  const Run& run;
  const int64_t rows, step;
  std::atomic<int64_t> next{0};
  static void work(void* argument) {
    RowsJob& job = *static_cast<RowsJob*>(argument);
    for (int64_t i; (i = job.next.fetch_add(job.step, std::memory_order_relaxed)) < job.rows;)
      job.run(i, std::min(job.rows, i + job.step));
  }
};
template <class Run> void over_rows(int64_t rows, int64_t width, int threads, const Run& run) {
  const int64_t step = std::max<int64_t>(1, ELEMENTS_AT_ONCE / std::max<int64_t>(1, width));
  RowsJob<Run> job{run, rows, step};
  run_parallel(RowsJob<Run>::work, &job, int(std::min<int64_t>(threads, (rows + step - 1) / step)));
}

template <class Call> void with_type(int dtype, const Call& call) {
  if (dtype == 0) call(static_cast<float*>(nullptr));
  else if (dtype == 1) call(static_cast<bf16*>(nullptr));
  else call(static_cast<f16*>(nullptr));
}

// out = norm(x + factor * added); the sum is also stored, in place of what is added. `added` null: of x alone.
template <class T>
void norm_row(const T* x, T* added, float factor, const T* weight, float eps, bool weight_first, T* out, int D) {
  const T* from = added ? added : x;
  vf squares = {};
  float square = 0.0f;
  int d = 0;
  for (; d + W <= D; d += W) {
    vf v = load(x + d);
    if (added) {
      v = rounded(v + load(added + d) * factor, x);
      store(added + d, v);
    }
    squares += v * v;
  }
  for (; d < D; d++) {
    float v = widen(x[d]);
    if (added) {
      v = rounded(v + widen(added[d]) * factor, x);
      narrow(v, added + d);
    }
    square += v * v;
  }
  for (int i = 0; i < W; i++) square += squares[i];
  const float scale = 1.0f / std::sqrt(square / float(D) + eps);
  for (d = 0; d + W <= D; d += W) {
    const vf v = load(from + d) * scale;
    store(out + d, (weight_first ? v : rounded(v, x)) * load(weight + d));
  }
  for (; d < D; d++) {
    const float v = widen(from[d]) * scale;
    narrow((weight_first ? v : rounded(v, x)) * widen(weight[d]), out + d);
  }
}

struct Gate {
  bool clamped;
  float limit, alpha;  // of clamped gates
  INLINE vf operator()(vf gate, vf up) const {
    if (!clamped) return gate * sigmoid(gate) * up;
    gate = gate > limit ? (vf){} + limit : gate;
    up = up > limit ? (vf){} + limit : up < -limit ? (vf){} - limit : up;
    return gate * sigmoid(gate * alpha) * (up + 1.0f);
  }
};

// out[i] = gate[i] combined with up[i]; alternating: both lie in `gate`, which `up` follows by one.
template <class T> void gate_row(const Gate& g, const T* gate, const T* up, bool alternate, T* out, int F) {
  int i = 0;
  for (; i + W <= F; i += W) {
    if (alternate) {
      const vf low = load(gate + 2 * i), high = load(gate + 2 * i + W);
      store(out + i, g(every_second<0>(low, high, Lanes()), every_second<1>(low, high, Lanes())));
    } else {
      store(out + i, g(load(gate + i), load(up + i)));
    }
  }
  const int step = alternate ? 2 : 1;
  for (; i < F; i++) narrow(g((vf){} + widen(gate[i * step]), (vf){} + widen(up[i * step]))[0], out + i);
}

template <class T> void add_row(T* to, const T* from, float factor, int D) {
  int d = 0;
  for (; d + W <= D; d += W) store(to + d, load(to + d) + load(from + d) * factor);
  for (; d < D; d++) narrow(widen(to[d]) + widen(from[d]) * factor, to + d);
}

constexpr int LEAST_COLUMNS = 128;  // of rows that threads share by columns: neighbours must not write one cache line

}  // namespace

extern "C" {

void flexmoe_norm(int dtype, const void* x, int64_t x_stride, void* added, int64_t added_stride, float factor,
                  const void* weight, float eps, int weight_first, void* out, int64_t out_stride, int64_t n, int D,
                  int num_threads) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    over_rows(n, D, num_threads, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i++)
        norm_row((const T*)x + i * x_stride, added ? (T*)added + i * added_stride : nullptr, factor, (const T*)weight, eps,
                 weight_first, (T*)out + i * out_stride, D);
    });
  });
}

void flexmoe_gate(int dtype, const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, int alternate,
                  int clamped, float limit, float alpha, void* out, int64_t out_stride, int64_t n, int F, int num_threads) {
  const Gate combined{clamped != 0, limit, alpha};
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    over_rows(n, F, num_threads, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i++)
        gate_row(combined, (const T*)gate + i * gate_stride, (const T*)up + i * up_stride, alternate,
                 (T*)out + i * out_stride, F);
    });
  });
}

// to[places[i]] += factors[i] * from[i], in order. A place may come again, so threads share the columns.
int flexmoe_add_rows(int dtype, void* to, int64_t to_stride, int64_t to_rows, const int64_t* places, const void* factors,
                     const void* from, int64_t from_stride, int64_t n, int D, int num_threads) {
  for (int64_t i = 0; i < n; i++)
    if (places[i] < 0 || places[i] >= to_rows) return 1;
  const int64_t wanted = std::max<int64_t>(1, std::min<int64_t>(4 * num_threads, n * D / ELEMENTS_AT_ONCE));
  const int64_t columns = std::max<int64_t>(LEAST_COLUMNS, (D / wanted + LEAST_COLUMNS - 1) / LEAST_COLUMNS * LEAST_COLUMNS);
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    over_rows((D + columns - 1) / columns, ELEMENTS_AT_ONCE, num_threads, [&](int64_t first, int64_t last) {
      const int64_t begin = first * columns, end = std::min<int64_t>(D, last * columns);
      for (int64_t i = 0; i < n; i++)
        add_row((T*)to + places[i] * to_stride + begin, (const T*)from + i * from_stride + begin,
                widen(((const T*)factors)[i]), int(end - begin));
    });
  });
  return 0;
}

// Rows of `bytes` of both sources to[which][places[i]] = from[which][i].
int flexmoe_put_rows(void* const* to, const void* const* from, int64_t to_stride, int64_t from_stride, int64_t to_rows,
                     const int64_t* places, int64_t n, int64_t bytes, int num_threads) {
  for (int64_t i = 0; i < n; i++)
    if (places[i] < 0 || places[i] >= to_rows) return 1;
  over_rows(n, bytes, num_threads, [&](int64_t first, int64_t last) {
    for (int which = 0; which < 2; which++)
      for (int64_t i = first; i < last; i++)
        std::memcpy((char*)to[which] + places[i] * to_stride, (const char*)from[which] + i * from_stride, size_t(bytes));
  });
  return 0;
}

}  // extern "C"
