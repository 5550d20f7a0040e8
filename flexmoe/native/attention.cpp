// Ragged paged grouped-query causal attention on CPU cores; fp32 accumulation, online softmax in base 2.
//
// Shapes: T query tokens, H query heads, G KV heads, N = H/G heads per group, D head size, B rows.
// A row's queries times its group's heads are "lines" (line = token*N + head of the group); per (row, KV head):
//   few lines  ("stream"): vectors run along D, K and V are read from the pool once, in place;
//   many lines ("tile"):   vectors run along lines. K and V elements are broadcast, so neither is ever transposed
//                          and the softmax needs no horizontal operation.
// How lines are cut depends only on the row itself, so a result depends neither on the other rows nor on threads.
// The arithmetic is written with compiler vector types: GCC >= 9 or clang, any CPU; AVX-512 is what it is tuned for.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool many_registers = true;  // 32 vector registers, else 16
#else
constexpr bool many_registers = false;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef float vf_any __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint16_t vh_any __attribute__((vector_size(W * 2), aligned(2), may_alias));

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

// ---- storage <-> fp32 ------------------------------------------------------------------------------------------

template <class To, class From> INLINE To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From), "bit cast");
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

INLINE float widen(float x) { return x; }
INLINE float widen(bf16 x) { return bits_of<float>(uint32_t(x.bits) << 16); }
INLINE float widen(f16 x) {
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_of<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // A half's exponent field moved into a float's is 112 too small; the product also normalises subnormals.
  return bits_of<float>(sign | bits_of<uint32_t>(bits_of<float>(rest << 13) * 0x1p112f));
}

INLINE void narrow(float x, float* out) { *out = x; }
INLINE void narrow(float x, bf16* out) {
  uint32_t u = bits_of<uint32_t>(x);
  out->bits = x != x ? 0x7fc0 : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
INLINE void narrow(float x, f16* out) {
  uint32_t u = bits_of<uint32_t>(x), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
  if (rest > 0x7f800000) out->bits = uint16_t(sign | 0x7e00);
  else if (rest >= 0x477ff000) out->bits = uint16_t(sign | 0x7c00);  // rounds to more than 65504
  else if (rest < 0x38800000)  // subnormal half: let the float adder round at 2^-24
    out->bits = uint16_t(sign | (bits_of<uint32_t>(bits_of<float>(rest) + 0.5f) - 0x3f000000));
  else out->bits = uint16_t(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}

INLINE vf load(const float* p) { return *(const vf_any*)p; }
INLINE vf load(const bf16* p) {
#if defined(__AVX512F__)  // GCC 12 splits the conversion below in two halves
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
  vh h = *(const vh_any*)p;
  return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}
INLINE vf load(const f16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__) && defined(__AVX__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vf x;
  for (int i = 0; i < W; i++) x[i] = widen(p[i]);
  return x;
#endif
}
INLINE void store(float* p, vf x) { *(vf_any*)p = x; }
INLINE void store(bf16* p, vf x) {
  vu u = (vu)x, rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  rounded = x != x ? (vu){} + 0x7fc0 : rounded;
  *(vh_any*)p = __builtin_convertvector(rounded, vh);
}
INLINE void store(f16* p, vf x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__) && defined(__AVX__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < W; i++) narrow(x[i], p + i);
#endif
}

// ---- vector helpers --------------------------------------------------------------------------------------------

INLINE vf vmax(vf a, vf b) {  // a NaN in b is kept
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// 2^x for x <= 0, exactly 0 below -127 (also at -inf); polynomial of Cephes exp2f, relative error 2e-7.
INLINE vf exp2_nonpositive(vf x) {
  x = vmax((vf){} - 127.0f, x);
  const float to_integer = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are x rounded
  vf t = x + to_integer;
  vf r = x - (t - to_integer);
  vf p = r * 1.535336188319500e-4f + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.0f;
  return p * (vf)(((vu)t + 127) << 23);  // -127 shifts to a zero factor
}

template <int... I> INLINE vf interleave_low(vf a, vf b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (I / 2 + (I % 2) * W)...);
#else
  return __builtin_shuffle(a, b, (vi){(I / 2 + (I % 2) * W)...});
#endif
}
template <int... I> INLINE vf interleave_high(vf a, vf b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (W / 2 + I / 2 + (I % 2) * W)...);
#else
  return __builtin_shuffle(a, b, (vi){(W / 2 + I / 2 + (I % 2) * W)...});
#endif
}
template <int X, int... I> INLINE vf exchange(vf a, std::integer_sequence<int, I...>) {  // lane i takes lane i^X
#if defined(__clang__)
  return __builtin_shufflevector(a, a, (I ^ X)...);
#else
  return __builtin_shuffle(a, (vi){(I ^ X)...});
#endif
}
using Lanes = std::make_integer_sequence<int, W>;

// The sum of x[i]'s lanes, in lane i. Recursion, not a loop over halves: the compiler must see constant indices to
// keep the vectors in registers.
template <int COUNT> INLINE vf sum_each(vf (&x)[W]) {
  if constexpr (COUNT > 1) {
    UNROLL for (int i = 0; i < COUNT / 2; i++) {
      vf a = x[i], b = x[i + COUNT / 2];
      x[i] = interleave_low(a, b, Lanes()) + interleave_high(a, b, Lanes());
    }
    return sum_each<COUNT / 2>(x);
  }
  return x[0];
}
template <int KEYS> INLINE vf max_in_groups(vf x) {  // over each KEYS neighbouring lanes
  if constexpr (KEYS > 1) x = vmax(x, exchange<1>(x, Lanes()));
  if constexpr (KEYS > 2) x = vmax(x, exchange<2>(x, Lanes()));
  if constexpr (KEYS > 4) x = vmax(x, exchange<4>(x, Lanes()));
  if constexpr (KEYS > 8) x = vmax(x, exchange<8>(x, Lanes()));
  return x;
}
template <int KEYS> INLINE vf sum_in_groups(vf x) {
  if constexpr (KEYS > 1) x += exchange<1>(x, Lanes());
  if constexpr (KEYS > 2) x += exchange<2>(x, Lanes());
  if constexpr (KEYS > 4) x += exchange<4>(x, Lanes());
  if constexpr (KEYS > 8) x += exchange<8>(x, Lanes());
  return x;
}
template <int STAGE = 1> INLINE void transpose(vf (&x)[W]) {
  if constexpr (STAGE < W) {
    vf y[W];
    UNROLL for (int i = 0; i < W / 2; i++) {
      y[2 * i] = interleave_low(x[i], x[i + W / 2], Lanes());
      y[2 * i + 1] = interleave_high(x[i], x[i + W / 2], Lanes());
    }
    UNROLL for (int i = 0; i < W; i++) x[i] = y[i];
    transpose<STAGE * 2>(x);
  }
}

// ---- the call --------------------------------------------------------------------------------------------------

constexpr int CHUNK = 96;       // keys per step of the tile path; a multiple of every key blocking below
constexpr int STREAM_CHUNK = 16;  // of every head; the chunk ahead is prefetched into what is left of the L1 cache
constexpr int STREAM_LINES = 8;  // at most this many lines take the stream path
constexpr int TILE_VECTORS = many_registers ? 4 : 2;
constexpr int TILE_LINES = TILE_VECTORS * W;
constexpr float LOWEST = -1e30f;  // a finite "no score yet": -inf minus it is -inf, not NaN

struct Call {
  const void *q, *k_pool, *v_pool;
  void* out;
  int64_t q_stride, block_stride, table_stride;
  const int32_t *block_tables, *q_starts, *context_lens;
  int B, H, G, D, block_tokens, N, window;
  float scale;
};

struct Item { int32_t row, head_begin, head_end, tile; };  // tile -1: the stream path

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

INLINE int round_up(int x, int to) { return (x + to - 1) / to * to; }

// The first key that any query of a row sees.
INLINE int first_key(const Call& c, int row) {
  const int queries = c.q_starts[row + 1] - c.q_starts[row];
  return c.window ? std::max(0, c.context_lens[row] - queries - c.window + 1) : 0;
}

// Element offset of token t of a row, KV head 0, in either pool; fills `count` consecutive tokens.
INLINE void token_offsets(const Call& c, int row, int t, int count, int64_t* offsets) {
  const int32_t* table = c.block_tables + row * c.table_stride;
  int block = t / c.block_tokens, slot = t % c.block_tokens;
  const int64_t token = int64_t(c.G) * c.D;
  for (int i = 0; i < count; block++, slot = 0) {
    int64_t base = table[block] * c.block_stride;
    for (; slot < c.block_tokens && i < count; slot++, i++) offsets[i] = base + slot * token;
  }
}

// Prefetches `count` tokens' heads [head, head + heads) a few lines at a time, while the chunk before is computed: a
// burst would fill the core's miss buffers and stop it. In the order of addresses, which hardware prefetchers follow.
struct Ahead {
  const char* k;
  ptrdiff_t v_minus_k;
  const int64_t* offsets;
  int64_t element_bytes;
  int token = 0, end, byte = 0, bytes;
  Ahead(const Call& c, size_t element, const int64_t* token_offsets, int count, int head, int heads)
      : k((const char*)c.k_pool + int64_t(head) * c.D * element),
        v_minus_k((const char*)c.v_pool - (const char*)c.k_pool), offsets(token_offsets), element_bytes(element),
        end(count), bytes(heads * c.D * int(element)) {}
  INLINE void fetch(int most) {
    while (most > 0 && token < end) {
      const char* p = k + offsets[token] * element_bytes + byte;
      const int now = std::min(most, bytes - byte);
      for (int b = 0; b < now; b += 64) __builtin_prefetch(p + b), __builtin_prefetch(p + b + v_minus_k);
      most -= now, byte += now;
      if (byte >= bytes) byte = 0, token++;
    }
  }
};

// Row of D elements as fp32, the rest of `padded` zero.
template <class T> INLINE void widen_row(const T* from, float* to, int D, int padded, float factor = 1.0f) {
  int d = 0;
  for (; d + W <= D; d += W) store(to + d, load(from + d) * factor);
  for (; d < D; d++) to[d] = widen(from[d]) * factor;
  for (; d < padded; d++) to[d] = 0.0f;
}
template <class T> INLINE void narrow_row(const float* from, T* to, int D, float factor) {
  int d = 0;
  for (; d + W <= D; d += W) store(to + d, load(from + d) * factor);
  for (; d < D; d++) narrow(from[d] * factor, to + d);
}

// ---- stream path: few lines, D along vectors -------------------------------------------------------------------

// LINES lines against one chunk of keys. A score vector holds lane = line * KEYS + key.
struct StreamLines {
  const float* q;   // [LINES][padded]
  float* o;         // [LINES][padded]
  vf* max_sum;      // [2]: running maximum (equal within a line), running sum (partial, per lane)
  const int32_t* position;  // [LINES]
};

template <int LINES, int DV, class T>
INLINE void stream_values(const T* const* v, int from, int keys, const float* p, const float* alpha, float* o, int padded) {
  constexpr int KEYS = W / LINES;
  vf acc[LINES][DV];
  UNROLL for (int l = 0; l < LINES; l++)
    UNROLL for (int d = 0; d < DV; d++) acc[l][d] = load(o + l * padded + d * W) * alpha[l * KEYS];
  for (int j = 0; j < keys; j += KEYS, p += W)
    UNROLL for (int i = 0; i < KEYS; i++) {
      const T* row = v[j + i] + from;
      vf x[DV];
      UNROLL for (int d = 0; d < DV; d++) x[d] = load(row + d * W);
      UNROLL for (int l = 0; l < LINES; l++)
        UNROLL for (int d = 0; d < DV; d++) acc[l][d] += x[d] * p[l * KEYS + i];
    }
  UNROLL for (int l = 0; l < LINES; l++)
    UNROLL for (int d = 0; d < DV; d++) store(o + l * padded + d * W, acc[l][d]);
}

template <int LINES, class T>
__attribute__((noinline)) void stream_chunk(const StreamLines& s, const T* const* k, const T* const* v, int first_key, int keys,
                                            int window, int padded, Ahead& ahead) {
  constexpr int KEYS = W / LINES;
  alignas(64) float score[STREAM_CHUNK * LINES];
  alignas(64) float alpha[W];
  vf* scores = (vf*)score;
  int groups = keys / KEYS;
  const int share = KEYS * padded * int(sizeof(T));
  Ahead next = ahead;
  vf highest = s.max_sum[0];
  int oldest = s.position[0], newest = s.position[0];
  for (int l = 1; l < LINES; l++) oldest = std::min(oldest, s.position[l]), newest = std::max(newest, s.position[l]);
  const bool masked = first_key + keys - 1 > oldest || (window && first_key <= newest - window);
  vi last = {}, lane_key = {};
  if (masked)
    for (int i = 0; i < W; i++) last[i] = s.position[i / KEYS], lane_key[i] = first_key + i % KEYS;
  for (int j = 0; j < groups; j++) {
    vf acc[W] = {};
    next.fetch(share);
    for (int d = 0; d < padded; d += W) {
      vf x[KEYS];
      UNROLL for (int i = 0; i < KEYS; i++) x[i] = load(k[j * KEYS + i] + d);
      UNROLL for (int l = 0; l < LINES; l++) {
        vf y = load(s.q + l * padded + d);
        UNROLL for (int i = 0; i < KEYS; i++) acc[l * KEYS + i] += x[i] * y;
      }
    }
    vf x = sum_each<W>(acc);
    if (masked) {
      vi key = lane_key + j * KEYS;
      vi hidden = key > last;
      if (window) hidden |= key <= last - window;
      x = hidden ? (vf){} - __builtin_inff() : x;
    }
    highest = vmax(highest, x);
    scores[j] = x;
  }
  ahead = next;
  highest = max_in_groups<KEYS>(highest);
  vf scale = exp2_nonpositive(s.max_sum[0] - highest), sum = s.max_sum[1] * scale;
  for (int j = 0; j < groups; j++) {
    vf p = exp2_nonpositive(scores[j] - highest);
    sum += p;
    scores[j] = p;
  }
  s.max_sum[0] = highest, s.max_sum[1] = sum;
  *(vf*)alpha = scale;
  constexpr int DV = many_registers ? 4 : (LINES > 2 ? 2 : 4);
  int d = 0;
  for (; d + DV * W <= padded; d += DV * W) stream_values<LINES, DV>(v, d, keys, score, alpha, s.o + d, padded);
  for (; d + W <= padded; d += W) stream_values<LINES, 1>(v, d, keys, score, alpha, s.o + d, padded);
}

template <class T> INLINE void stream_lines(int lines, const StreamLines& s, const T* const* k, const T* const* v, int first_key,
                                            int keys, int window, int padded, Ahead& ahead) {
  if (lines == 4) stream_chunk<4>(s, k, v, first_key, keys, window, padded, ahead);
  else if (lines == 2) stream_chunk<2>(s, k, v, first_key, keys, window, padded, ahead);
  else stream_chunk<1>(s, k, v, first_key, keys, window, padded, ahead);
}

INLINE int cut_lines(int left) { return left >= 4 ? 4 : left >= 2 ? 2 : 1; }

template <class T> struct Stream {
  const Call& c;
  const int row, heads, lines, padded;
  const int64_t first_token;
  float *q, *o, *kv;
  vf* max_sum;

  static size_t scratch_floats(const Call& c, int heads) {
    int padded = round_up(c.D, W);
    return size_t(heads) * STREAM_LINES * (2 * padded + 2 * W) + size_t(2 * STREAM_CHUNK + 1) * padded;
  }
  Stream(const Call& call, const Item& item, float* scratch)
      : c(call), row(item.row), heads(item.head_end - item.head_begin),
        lines((call.q_starts[row + 1] - call.q_starts[row]) * call.N), padded(round_up(call.D, W)),
        first_token(call.q_starts[row]) {
    q = scratch, o = q + size_t(heads) * STREAM_LINES * padded;
    max_sum = (vf*)(o + size_t(heads) * STREAM_LINES * padded);
    kv = (float*)(max_sum + size_t(heads) * STREAM_LINES * 2);
  }
  INLINE int64_t out_offset(int head, int line) const {
    return ((first_token + line / c.N) * c.H + head * c.N + line % c.N) * c.D;
  }

  // `following` (or null) is the item that this thread does next: its first chunk is fetched behind this one's last.
  void run(const Item& item, const Item* following) {
    const int tokens = lines / c.N, context = c.context_lens[row];
    int32_t position[STREAM_LINES];
    for (int l = 0; l < lines; l++) position[l] = context - tokens + l / c.N;
    int64_t offsets[2][STREAM_CHUNK];
    int t = first_key(c, row), count = std::min(STREAM_CHUNK, context - t);
    token_offsets(c, row, t, count, offsets[0]);
    start(item.head_begin);
    for (int now = 0; t < context; now ^= 1) {
      const bool done = t + count == context && following;
      const Item& item_ahead = done ? *following : item;
      const int t_ahead = done ? first_key(c, item_ahead.row) : t + count;
      const int next = std::min(STREAM_CHUNK, c.context_lens[item_ahead.row] - t_ahead);
      token_offsets(c, item_ahead.row, t_ahead, next, offsets[now ^ 1]);
      Ahead ahead(c, sizeof(T), offsets[now ^ 1], next, item_ahead.head_begin, heads);
      for (int h = item.head_begin; h < item.head_end; h++)
        step(h, h - item.head_begin, offsets[now], t, count, position, ahead);
      t += count, count = next;
    }
    finish(item.head_begin);
  }

  void start(int head_begin) {
    const float factor = c.scale * 1.44269504088896340736f;
    for (int h = 0; h < heads; h++)
      for (int l = 0; l < lines; l++) {
        const T* from = (const T*)c.q + (first_token + l / c.N) * c.q_stride
                        + int64_t((head_begin + h) * c.N + l % c.N) * c.D;
        widen_row(from, q + (h * STREAM_LINES + l) * padded, c.D, padded, factor);
        max_sum[(h * STREAM_LINES + l) * 2] = (vf){} + LOWEST;
        max_sum[(h * STREAM_LINES + l) * 2 + 1] = (vf){};
      }
    std::fill(o, o + size_t(heads) * STREAM_LINES * padded, 0.0f);
    std::fill(kv, kv + padded, 0.0f);  // the row of zeros behind the last key
  }

  template <class E> void step_lines(int h, const E* const* k, const E* const* v, int t, int keys, const int32_t* position,
                                     Ahead& ahead) {
    for (int l = 0, take; l < lines; l += take) {
      take = cut_lines(lines - l);
      const int at = h * STREAM_LINES + l;
      StreamLines s{q + at * padded, o + at * padded, max_sum + at * 2, position + l};
      stream_lines(take, s, k, v, t, keys, c.window, padded, ahead);
    }
  }

  void step(int head, int h, const int64_t* offsets, int t, int count, const int32_t* position,
            Ahead& ahead) {
    const T *k = (const T*)c.k_pool + int64_t(head) * c.D, *v = (const T*)c.v_pool + int64_t(head) * c.D;
    const int keys = round_up(count, W);  // whole vectors for every number of lines
    if (padded == c.D) {
      const T *ks[STREAM_CHUNK], *vs[STREAM_CHUNK];
      for (int i = 0; i < count; i++) ks[i] = k + offsets[i], vs[i] = v + offsets[i];
      for (int i = count; i < keys; i++) ks[i] = vs[i] = (const T*)kv;
      step_lines(h, ks, vs, t, keys, position, ahead);
    } else {
      const float *ks[STREAM_CHUNK], *vs[STREAM_CHUNK];
      for (int i = 0; i < keys; i++) ks[i] = vs[i] = kv;
      for (int i = 0; i < count; i++) {
        float* to = kv + size_t(2 * i + 1) * padded;
        widen_row(k + offsets[i], to, c.D, padded);
        widen_row(v + offsets[i], to + padded, c.D, padded);
        ks[i] = to, vs[i] = to + padded;
      }
      step_lines(h, ks, vs, t, keys, position, ahead);
    }
  }

  void finish(int head_begin) {
    for (int h = 0; h < heads; h++)
      for (int l = 0, take; l < lines; l += take) {
        take = cut_lines(lines - l);
        vf part = max_sum[(h * STREAM_LINES + l) * 2 + 1];
        vf sum = take == 4 ? sum_in_groups<W / 4>(part) : take == 2 ? sum_in_groups<W / 2>(part) : sum_in_groups<W>(part);
        for (int i = 0; i < take; i++)
          narrow_row(o + (h * STREAM_LINES + l + i) * padded, (T*)c.out + out_offset(head_begin + h, l + i), c.D,
                     1.0f / sum[i * (W / take)]);
      }
  }
};

// ---- tile path: many lines, lines along vectors ----------------------------------------------------------------

// out[i][line] = sum over j of b[j * b_step + i * b_next] * a[j][line], for I values of i, after scaling what is there.
template <int NV, int I, bool ADD>
INLINE void tile_product(const float* a, const float* b, int64_t b_step, int64_t b_next, int count, const vf* alpha,
                         float* out) {
  vf acc[I][NV];
  UNROLL for (int i = 0; i < I; i++)
    UNROLL for (int n = 0; n < NV; n++)
      acc[i][n] = ADD ? *(const vf*)(out + (i * NV + n) * W) * alpha[n] : (vf){};
  for (int j = 0; j < count; j++, a += NV * W, b += b_step) {
    vf x[NV];
    UNROLL for (int n = 0; n < NV; n++) x[n] = *(const vf*)(a + n * W);
    UNROLL for (int i = 0; i < I; i++) {
      float y = b[i * b_next];
      UNROLL for (int n = 0; n < NV; n++) acc[i][n] += x[n] * y;
    }
  }
  UNROLL for (int i = 0; i < I; i++)
    UNROLL for (int n = 0; n < NV; n++) *(vf*)(out + (i * NV + n) * W) = acc[i][n];
}

// What one tile keeps; its arithmetic does not depend on the storage type.
template <int NV> struct TileState {
  static constexpr int LINES = NV * W;
  static constexpr int BLOCKING = NV == TILE_VECTORS ? 6 : 8;  // accumulators: BLOCKING * NV
  static_assert(CHUNK % BLOCKING == 0, "keys are padded to whole blockings inside a chunk");
  int D, window, first_position, last_position;
  float *q, *o, *s, *k, *v;  // [D][LINES], [D][LINES], [CHUNK][LINES], [CHUNK][D], [CHUNK][D]
  vf highest[NV], sum[NV], alpha[NV];
  vi position[NV];

  // Attention of the tile's lines to the keys [t, t + keys) in k and v.
  template <int FIXED_D> __attribute__((noinline)) void accumulate(int t, int keys) {
    const int size = FIXED_D ? FIXED_D : D;
    for (int i = 0; i < keys; i += BLOCKING)
      tile_product<NV, BLOCKING, false>(q, k + i * size, 1, size, size, nullptr, s + i * LINES);
    softmax(t, keys);
    int d = 0;
    for (; d + BLOCKING <= size; d += BLOCKING) values<BLOCKING>(d, size, keys);
    for (; d + 4 <= size; d += 4) values<4>(d, size, keys);
    for (; d < size; d++) values<1>(d, size, keys);
  }
  template <int I> INLINE void values(int d, int size, int keys) {
    tile_product<NV, I, true>(s, v + d, size, 1, keys, alpha, o + d * LINES);
  }
  __attribute__((noinline)) void softmax(int t, int keys) {
    if (t + keys - 1 > first_position || (window && t <= last_position - window)) mask(t, keys);
    UNROLL for (int n = 0; n < NV; n++) {
      vf *x = (vf*)s + n, top[2] = {highest[n], highest[n]};
      int j = 0;
      for (; j + 2 <= keys; j += 2) top[0] = vmax(top[0], x[j * NV]), top[1] = vmax(top[1], x[j * NV + NV]);
      top[0] = vmax(top[0], top[1]);
      alpha[n] = exp2_nonpositive(highest[n] - top[0]);
      vf total = sum[n] * alpha[n];
      for (j = 0; j < keys; j++) {
        x[j * NV] = exp2_nonpositive(x[j * NV] - top[0]);
        total += x[j * NV];
      }
      highest[n] = top[0], sum[n] = total;
    }
  }
  void mask(int t, int keys) {
    const vf nothing = (vf){} - __builtin_inff();
    for (int j = 0; j < keys; j++)
      UNROLL for (int n = 0; n < NV; n++) {
        vi hidden = position[n] < t + j;
        if (window) hidden |= position[n] >= t + j + window;
        vf* x = (vf*)s + j * NV + n;
        *x = hidden ? nothing : *x;
      }
  }
};

template <class T, int NV> struct Tile : TileState<NV> {
  using State = TileState<NV>;
  using State::D, State::q, State::o, State::s, State::k, State::v, State::LINES;
  const Call& c;
  const int row, head;
  int valid;
  int32_t token[LINES], member[LINES];  // of each line: query token of the row, head of the group

  Tile(const Call& call, const Item& item, float* scratch) : c(call), row(item.row), head(item.head_begin) {
    D = c.D, this->window = c.window;
    q = scratch, o = q + D * LINES, s = o + D * LINES, k = s + CHUNK * LINES;
    v = k + round_up(CHUNK * D, W);
    const int tokens = c.q_starts[row + 1] - c.q_starts[row], first_line = item.tile * TILE_LINES;
    const int past = c.context_lens[row] - tokens;
    valid = std::min(TILE_LINES, tokens * c.N - first_line);
    for (int l = 0; l < LINES; l++) {
      const int line = first_line + std::min(l, valid - 1);
      token[l] = line / c.N, member[l] = line % c.N;
      this->position[l / W][l % W] = past + token[l];
    }
    this->first_position = past + token[0], this->last_position = past + token[LINES - 1];
  }
  static size_t scratch_floats(const Call& c) {
    return size_t(2 * c.D + CHUNK) * TILE_LINES + 2 * size_t(round_up(CHUNK * c.D, W)) + 64;
  }

  void run() {
    pack_queries();
    std::fill(o, o + D * LINES, 0.0f);
    for (int n = 0; n < NV; n++) this->highest[n] = (vf){} + LOWEST, this->sum[n] = (vf){};
    const int end = this->last_position + 1;
    for (int t = c.window ? std::max(0, this->first_position - c.window + 1) : 0; t < end; t += CHUNK) {
      const int count = std::min(CHUNK, end - t), keys = round_up(count, State::BLOCKING);
      widen_keys(t, count, keys);
      if (D == 64) this->template accumulate<64>(t, keys);
      else if (D == 128) this->template accumulate<128>(t, keys);
      else this->template accumulate<0>(t, keys);
    }
    write();
  }

  void pack_queries() {
    const float factor = c.scale * 1.44269504088896340736f;
    for (int n = 0; n < NV; n++) {
      const T* from[W];
      for (int i = 0; i < W; i++)
        from[i] = (const T*)c.q + (c.q_starts[row] + int64_t(token[n * W + i])) * c.q_stride
                  + int64_t(head * c.N + member[n * W + i]) * D;
      int d = 0;
      for (; d + W <= D; d += W) {
        vf x[W];
        UNROLL for (int i = 0; i < W; i++) x[i] = load(from[i] + d) * factor;
        transpose(x);
        UNROLL for (int i = 0; i < W; i++) store(q + (d + i) * LINES + n * W, x[i]);
      }
      for (; d < D; d++)
        for (int i = 0; i < W; i++) q[d * LINES + n * W + i] = widen(from[i][d]) * factor;
    }
  }

  void widen_keys(int t, int count, int keys) {
    int64_t offsets[CHUNK];
    token_offsets(c, row, t, count, offsets);
    const T *from_k = (const T*)c.k_pool + int64_t(head) * D, *from_v = (const T*)c.v_pool + int64_t(head) * D;
    for (int i = 0; i < count; i++) {
      widen_row(from_k + offsets[i], k + i * D, D, D);
      widen_row(from_v + offsets[i], v + i * D, D, D);
    }
    std::fill(k + count * D, k + keys * D, 0.0f);
    std::fill(v + count * D, v + keys * D, 0.0f);
  }

  void write() {
    for (int n = 0; n < NV; n++) {
      const int lines = std::min(W, valid - n * W);
      const vf factor = 1.0f / this->sum[n];
      T* to[W];
      for (int i = 0; i < W; i++)
        to[i] = (T*)c.out + ((c.q_starts[row] + int64_t(token[n * W + i])) * c.H + head * c.N + member[n * W + i]) * D;
      int d = 0;
      for (; d + W <= D; d += W) {
        vf x[W];
        UNROLL for (int i = 0; i < W; i++) x[i] = load(o + (d + i) * LINES + n * W) * factor;
        transpose(x);
        for (int i = 0; i < lines; i++) store(to[i] + d, x[i]);
      }
      for (; d < D; d++)
        for (int i = 0; i < lines; i++) narrow(o[d * LINES + n * W + i] * factor[i], to[i] + d);
    }
  }
};

template <class T> void run_tile(const Call& c, const Item& item, float* scratch) {
  const int lines = (c.q_starts[item.row + 1] - c.q_starts[item.row]) * c.N - item.tile * TILE_LINES;
  if (lines <= W) Tile<T, 1>(c, item, scratch).run();
  else if (TILE_VECTORS > 2 && lines <= 2 * W) Tile<T, 2>(c, item, scratch).run();
  else Tile<T, TILE_VECTORS>(c, item, scratch).run();
}

// ---- work items and threads ------------------------------------------------------------------------------------

template <class T> bool run_item(const Call& c, const Item& item, const Item* following) {
  static thread_local Scratch scratch;
  float* memory = scratch.get(std::max(Stream<T>::scratch_floats(c, c.G), Tile<T, 1>::scratch_floats(c)));
  if (!memory) return false;
  if (item.tile < 0) Stream<T>(c, item, memory).run(item, following);
  else run_tile<T>(c, item, memory);
  return true;
}

struct Job {
  const Call& call;
  const int dtype;
  std::vector<Item> items;
  std::vector<size_t> claims;  // a thread takes items [claims[i], claims[i + 1]) at once
  std::atomic<size_t> next{0};
  std::atomic<bool> failed{false};

  Job(const Call& c, int type, int threads) : call(c), dtype(type) {
    add_tiles();
    for (size_t i = 0; i < items.size(); i++) claims.push_back(i);
    const size_t first = items.size();
    int streams = 0;
    for (int b = 0; b < c.B; b++) streams += is_stream(b);
    // All heads of a row read the same pages; they are split only when rows are too few to balance the threads.
    const int heads = streams >= 4 * threads ? c.G : 1;
    for (int b = 0; b < c.B; b++)
      for (int h = 0; is_stream(b) && h < c.G; h += heads) items.push_back({b, h, h + heads, -1});
    const size_t together = std::min<size_t>(16, std::max<size_t>(1, (items.size() - first) / (8 * threads)));
    for (size_t i = first; i < items.size(); i += together) claims.push_back(i);
    claims.push_back(items.size());
  }
  int lines(int b) const { return (call.q_starts[b + 1] - call.q_starts[b]) * call.N; }
  bool is_stream(int b) const { return lines(b) > 0 && lines(b) <= STREAM_LINES; }
  // Tiles go first, and of a run the last, dearest one, so that streams fill the end of the call.
  void add_tiles() {
    for (int b = 0; b < call.B; b++)
      for (int h = 0; lines(b) > STREAM_LINES && h < call.G; h++)
        for (int tile = (lines(b) - 1) / TILE_LINES; tile >= 0; tile--) items.push_back({b, h, h + 1, tile});
  }
};

void work(void* argument) {
  Job& job = *static_cast<Job*>(argument);
  for (size_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) + 1 < job.claims.size();)
    for (size_t at = job.claims[i]; at < job.claims[i + 1]; at++) {
      const Item& item = job.items[at];
      const Item* following = at + 1 < job.claims[i + 1] ? &item + 1 : nullptr;
      const bool ok = job.dtype == 0 ? run_item<float>(job.call, item, following)
                      : job.dtype == 1 ? run_item<bf16>(job.call, item, following)
                                       : run_item<f16>(job.call, item, following);
      if (!ok) job.failed.store(true, std::memory_order_relaxed);
    }
}

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel
Parallel parallel = nullptr;

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

enum Status { OK = 0, BAD_STARTS = 1, BAD_CONTEXT = 2, BAD_BLOCK = 3, NO_MEMORY = 4 };

Status check(const Call& c, int64_t tokens, int64_t num_blocks, int64_t table_width) {
  if (c.q_starts[0] < 0 || c.q_starts[c.B] > tokens) return BAD_STARTS;
  for (int b = 0; b < c.B; b++) {
    const int queries = c.q_starts[b + 1] - c.q_starts[b], context = c.context_lens[b];
    if (queries < 0) return BAD_STARTS;
    if (queries == 0) continue;
    if (context < queries || context > table_width * c.block_tokens) return BAD_CONTEXT;
    const int32_t* table = c.block_tables + b * c.table_stride;
    for (int i = first_key(c, b) / c.block_tokens; i <= (context - 1) / c.block_tokens; i++)
      if (table[i] < 0 || table[i] >= num_blocks) return BAD_BLOCK;
  }
  return OK;
}

}  // namespace

extern "C" {

// `gomp_parallel` is GOMP_parallel of the OpenMP runtime that the process already has, so that this library's threads
// are that runtime's and no second pool spins beside it. Null: plain threads, started and joined in every call.
void flexmoe_set_parallel(void* gomp_parallel) { parallel = reinterpret_cast<Parallel>(gomp_parallel); }

// dtype 0 fp32, 1 bf16, 2 fp16; strides in elements; see flexmoe/native/__init__.py for the meaning of the arguments.
int flexmoe_attention(int dtype, const void* q, int64_t q_stride, int64_t tokens, const void* k_pool,
                      const void* v_pool, int64_t block_stride, int64_t num_blocks, const int32_t* block_tables,
                      int64_t table_stride, int64_t table_width, const int32_t* q_starts, const int32_t* context_lens,
                      void* out, int B, int H, int G, int D, int block_tokens, int window, float scale,
                      int num_threads) {
  Call call{q, k_pool, v_pool, out, q_stride, block_stride, table_stride, block_tables, q_starts, context_lens,
            B, H, G, D, block_tokens, H / G, window, scale};
  try {
    if (Status status = check(call, tokens, num_blocks, table_width)) return status;
    Job job(call, dtype, num_threads);
    run_on_threads(job, int(std::min<size_t>(num_threads, job.claims.size() - 1)));
    return job.failed ? NO_MEMORY : OK;
  } catch (const std::exception&) {
    return NO_MEMORY;
  }
}

}  // extern "C"
