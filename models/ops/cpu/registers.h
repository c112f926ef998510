// Vector registers: what they hold of each type, loops that fill them, and a transposition in them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

using Int = int64_t;

// A register's bytes, and the tile of sums that fills the registers: WIDE of them by TALL rows.
#if defined(__AVX512F__)
constexpr Int REGISTER = 64, WIDE = 4, TALL = 7;
#elif defined(__aarch64__)
constexpr Int REGISTER = 16, WIDE = 4, TALL = 6;
#else
constexpr Int REGISTER = 32, WIDE = 2, TALL = 6;
#endif

template <typename T>
constexpr Int LANES = REGISTER / sizeof(T);

template <typename T, Int lanes>
using Vector __attribute__((vector_size(lanes * sizeof(T)), aligned(sizeof(T)), may_alias)) = T;

template <typename T>
constexpr Int LINE = 64 / sizeof(T);  // values in a line of the caches

constexpr Int ROUND = 16;  // to a multiple of which the length of a transposed row is rounded up

inline Int ceil_div(Int a, Int b) { return (a + b - 1) / b; }
inline Int round_up(Int a) { return ceil_div(a, ROUND) * ROUND; }

namespace {

// Some neighbouring values in a register.
template <Int lanes, typename T>
inline Vector<T, lanes> load(const T* from) {
  return *(const Vector<T, lanes>*)from;
}
template <typename T, typename V>
inline void store(T* to, V values) {
  *(Vector<T, sizeof(V) / sizeof(T)>*)to = values;
}

template <typename V>
inline void stream(V* to, V value) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512((__m512i*)to, (__m512i)value);
#elif defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256((__m256i*)to, (__m256i)value);
#endif
  *to = value;
}

inline void fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Run work(lanes, registers, column) for as many columns at a time as `most` registers hold, or fewer.
template <typename T, Int most = WIDE, typename Work>
inline __attribute__((always_inline)) void for_columns(Int first, Int last, Work work) {
#define COLUMNS(lanes, vectors)                                     \
  for (; first + lanes * vectors <= last; first += lanes * vectors) \
    work(std::integral_constant<Int, lanes>{}, std::integral_constant<Int, vectors>{}, first);
  if constexpr (most > WIDE) COLUMNS(LANES<T>, most)
  COLUMNS(LANES<T>, WIDE)
  COLUMNS(LANES<T>, 1)
  if constexpr (LANES<T> > 4) COLUMNS(4, 1)
  COLUMNS(1, 1)
#undef COLUMNS
}

// Run work(count, first) for rows, as many at a time as a tile has.
template <typename Work>
inline __attribute__((always_inline)) void for_rows(Int rows, Work work) {
  const Int tiles = ceil_div(rows, TALL);
  for (Int i = 0; i < tiles; i++) {
    const Int first = rows * i / tiles;
    switch (rows * (i + 1) / tiles - first) {
#define ROWS(count)                                    \
  case count:                                          \
    work(std::integral_constant<Int, count>{}, first); \
    break;
      ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7)
#undef ROWS
    }
  }
}

#if defined(__AVX512F__)
// 16 rows and columns: 4 × 4 squares are brought together by loads, and transposed side by side.
inline void transpose_square(const void* const* rows, Int column, void* into, Int to_row) {
  float* to = (float*)into;
  for (Int c = 0; c < 16; c += 4) {
    __m512 v[4];
    for (Int i = 0; i < 4; i++) {
      v[i] = _mm512_castps128_ps512(_mm_loadu_ps((const float*)rows[i] + column + c));
      v[i] = _mm512_insertf32x4(v[i], _mm_loadu_ps((const float*)rows[i + 4] + column + c), 1);
      v[i] = _mm512_insertf32x4(v[i], _mm_loadu_ps((const float*)rows[i + 8] + column + c), 2);
      v[i] = _mm512_insertf32x4(v[i], _mm_loadu_ps((const float*)rows[i + 12] + column + c), 3);
    }
    __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(v[0], v[1]));
    __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(v[2], v[3]));
    __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(v[0], v[1]));
    __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(v[2], v[3]));
    _mm512_storeu_pd(to + c * to_row, _mm512_unpacklo_pd(low01, low23));
    _mm512_storeu_pd(to + (c + 1) * to_row, _mm512_unpackhi_pd(low01, low23));
    _mm512_storeu_pd(to + (c + 2) * to_row, _mm512_unpacklo_pd(high01, high23));
    _mm512_storeu_pd(to + (c + 3) * to_row, _mm512_unpackhi_pd(high01, high23));
  }
}
#endif

// to (columns, rows). Of each row of it `room` values may be written, and are undefined from `rows` on.
template <typename T>
void transpose(Int rows, Int columns, const T* from, Int from_row, T* to, Int to_row, Int room) {
  for (Int i = 0; i < rows; i += ROUND) {
    Int done = 0;
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
      if (i + ROUND <= room) {
        const void* row[ROUND];
        for (Int k = 0; k < ROUND; k++) row[k] = from + std::min(i + k, rows - 1) * from_row;
        for (; done + ROUND <= columns; done += ROUND) transpose_square(row, done, to + done * to_row + i, to_row);
      }
#endif
    for (; done < columns; done++)
      for (Int k = i; k < std::min(i + ROUND, rows); k++) to[done * to_row + k] = from[k * from_row + done];
  }
}

}  // namespace
