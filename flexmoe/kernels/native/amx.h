// AMX: a core's eight tiles of 16 rows of 64 bytes, and the product of bf16 tiles, C[m][n] += A[m][2k, 2k + 1] · B[k][n][0, 1].
// Beside it what brings numbers into the layouts that it takes. See Intel's architecture manual, "Programming with AMX".

#pragma once

#include <cstdint>
#include <cstring>

#include "numbers.h"

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AMX_TILE__) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>

namespace {

// The kernel gives a process the room for tiles when it asks; it refuses where it does not know them.
bool may_use_amx() {
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  static const bool allowed = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
  return allowed;
}

// Rows and bytes of a row of each tile, while this lives.
struct Tiles {
  struct Shape { int rows, bytes; };
  explicit Tiles(const Shape (&shapes)[8]) {
    struct alignas(64) { uint8_t palette, start_row, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {};
    config.palette = 1;
    for (int i = 0; i < 8; i++) config.bytes[i] = uint16_t(shapes[i].bytes), config.rows[i] = uint8_t(shapes[i].rows);
    asm volatile("" : "+m"(config));  // to the compiler the intrinsic reads eight bytes of it
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

// What was stored before tiles are loaded is in memory: to the compiler a load of a tile is assembly that reads nothing.
INLINE void settle() { asm volatile("" ::: "memory"); }

// Numbers [0, count) of 32 in bf16.
INLINE __m512i load_32(const bf16* p, __mmask32 valid) { return _mm512_maskz_loadu_epi16(valid, p); }
INLINE __m512i load_32(const i8* p, __mmask32 valid) {
  const __m256i x = _mm256_maskz_loadu_epi8(valid, p);
  const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(x)));
  const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(x, 1)));
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}
INLINE __m512i load_32(const bf16* p) { return _mm512_loadu_si512(p); }
INLINE __m512i load_32(const i8* p) { return load_32(p, ~__mmask32(0)); }
// What weights are relative to: the largest score, or an earlier one as long as weights stay below 2^8, which spares
// that outputs are scaled again.
INLINE vf relative_to(vf before, vf largest) { return largest > before + 8.0f ? largest : before; }
// A row of numbers as every `step`-th pair of them.
INLINE void put_pairs(const bf16* from, int count, bf16* to, int step) {
  for (int d = 0; d + 2 <= count; d += 2) std::memcpy(to + d * step, from + d, 4);
  if (count % 2) to[(count - 1) * step] = from[count - 1];
}
// Sixteen numbers and sixteen others in bf16, by turns.
INLINE __m512i pairs_of(__m512 a, __m512 b) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)_mm512_cvtne2ps_pbh(b, a));
}
INLINE __mmask32 first_of_32(int count) { return count >= 32 ? ~__mmask32(0) : (__mmask32(1) << count) - 1; }

}  // namespace
#endif
