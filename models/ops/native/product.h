// One small product of strided operands, and a transposition, both in vector registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

using Int = int64_t;

// A register's bytes, and the tile of sums that fills the registers: WIDE of them by TALL rows.
#if defined(__AVX512F__)
constexpr Int REGISTER = 64, WIDE = 4, TALL = 7;
#elif defined(__aarch64__)
constexpr Int REGISTER = 16, WIDE = 4, TALL = 6;
#else
constexpr Int REGISTER = 32, WIDE = 2, TALL = 6;
#endif

// How values of a type are multiplied: as words of some neighbours along what is summed over, in sums of another type.
template <typename T>
struct Arithmetic {
  using Word = T;
  using Sum = T;
  static constexpr Int values = 1;
};
template <typename T>
using Word = typename Arithmetic<T>::Word;
template <typename T>
using Sum = typename Arithmetic<T>::Sum;

template <typename T>
constexpr Int LANES = REGISTER / sizeof(Sum<T>);

template <typename T, Int lanes>
using Vector __attribute__((vector_size(lanes * sizeof(T)), aligned(sizeof(T)), may_alias)) = T;

template <typename T>
constexpr Int LINE = 64 / sizeof(T);  // values in a line of the caches

constexpr Int AHEAD = 16;  // rows of a right factor that are asked for early
constexpr Int ROUND = 16;  // to a multiple of which the length of a transposed row is rounded up

Int ceil_div(Int a, Int b) { return (a + b - 1) / b; }
Int round_up(Int a) { return ceil_div(a, ROUND) * ROUND; }
template <typename T>
Int words(Int values) {
  return ceil_div(values, Arithmetic<T>::values);
}

// Matrices (rows, terms · inner) and (terms · inner, columns) of words; the columns of a right factor lie together.
template <typename T>
struct Left {
  const Word<T>* data;
  Int row, inner;
};
template <typename T>
struct Right {
  const Word<T>* data;
  Int inner;
};

// Where both factors of one term of a sum begin: what is summed over lies in memory in several pieces.
struct Term {
  Int left, right;
};
struct Terms {
  const Term* data;
  Int count, inner;
};
constexpr Term WHOLE[1] = {{0, 0}};

// What becomes of a product: it is written, added to what is there, or written past the caches to far memory. The last
// is for whole registers at their own alignment, and wants a `fence` before others read.
enum Store { WRITE, ADD, STREAM };

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

// Rows in far memory that are asked for while a product is computed, evenly: who asks for many at once has to wait for
// them, since a core can wait for a few dozen lines only.
struct Early {
  const char* row = nullptr;
  Int step = 0, lines = 0, line = 0;  // the bytes from one row to the next, cache lines of each, and the next of them
  Int total = 0, due = 0, steps = 1;

  Early() = default;
  template <typename T>
  Early(const T* data, Int rows, Int row, Int columns)
      : row((const char*)data), step(row * sizeof(T)), lines(ceil_div(columns * sizeof(T), 64)), total(rows * lines) {}

  // One of the `steps` in which all is asked for.
  void ask() {
    for (due += total; due >= steps; due -= steps) {
      __builtin_prefetch(row + line * 64, 0, 2);
      if (++line == lines) {
        line = 0;
        row += step;
      }
    }
  }
};

// Run work(lanes, registers, column) for as many columns at a time as some registers hold.
template <typename T, typename Work>
void for_columns(Int first, Int last, Work work) {
#define COLUMNS(lanes, vectors)                                     \
  for (; first + lanes * vectors <= last; first += lanes * vectors) \
    work(std::integral_constant<Int, lanes>{}, std::integral_constant<Int, vectors>{}, first);
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

// Where rows of the left factor lie `along` what is summed over, those that the next tile reads, and what it writes, are
// asked for; else rows of the right factor.
template <typename T, Int lanes, Int vectors, Int rows, bool along>
inline __attribute__((always_inline)) void tile(Terms terms, Left<T> a, Right<T> b, T* c, Int c_row, Store how,
                                                const T* offset, Early& early) {
  using V = Vector<T, lanes>;
  V sum[rows][vectors];
  for (Int i = 0; i < rows; i++)
    for (Int v = 0; v < vectors; v++) sum[i][v] = how == ADD ? *(const V*)(c + i * c_row + v * lanes) : V{};
  const Int inner = along ? 1 : a.inner;
  for (Int t = 0; t < terms.count; t++) {
    const T *left = a.data + terms.data[t].left, *right = b.data + terms.data[t].right;
    const auto add = [&]() __attribute__((always_inline)) {
      V value[vectors];
      for (Int v = 0; v < vectors; v++) value[v] = *(const V*)(right + v * lanes);
      for (Int v = 0; v < vectors && !along; v++) __builtin_prefetch(right + AHEAD * b.inner + v * lanes);
      for (Int i = 0; i < rows; i++)
        for (Int v = 0; v < vectors; v++) sum[i][v] += left[i * a.row] * value[v];
      left += inner;
      right += b.inner;
    };
    for (Int k = 0; k < terms.inner; k += LINE<T>) {
      early.ask();
      if constexpr (along) {
        for (Int i = 0; i < rows; i++) __builtin_prefetch(left + (rows + i) * a.row);
        if (k < rows * LINE<T>)
          for (Int v = 0; v < vectors; v++) __builtin_prefetch(c + (rows + k / LINE<T>) * c_row + v * lanes, 1);
      }
      for (Int i = std::min(LINE<T>, terms.inner - k); i > 0; i--) add();
    }
  }
  if (offset)
    for (Int v = 0; v < vectors; v++)
      for (Int i = 0; i < rows; i++) sum[i][v] += *(const V*)(offset + v * lanes);
  if (how == STREAM) {
    for (Int i = 0; i < rows; i++)
      for (Int v = 0; v < vectors; v++) stream((V*)(c + i * c_row + v * lanes), sum[i][v]);
    return;
  }
  for (Int i = 0; i < rows; i++)
    for (Int v = 0; v < vectors; v++) *(V*)(c + i * c_row + v * lanes) = sum[i][v];
}

// As many columns as `vectors` hold, for any number of rows.
template <typename T, Int lanes, Int vectors, bool along>
void strip(Int rows, Terms terms, Left<T> a, Right<T> b, T* c, Int c_row, Store how, const T* offset, Early& early) {
  for_rows(rows, [=, &early](auto count, Int first) __attribute__((always_inline)) {
    tile<T, lanes, vectors, count, along>(terms, {a.data + first * a.row, a.row, a.inner}, b, c + first * c_row, c_row,
                                          how, offset, early);
  });
}

template <typename T, bool along>
void multiply_values(Int rows, Int columns, Terms terms, Left<T> a, Right<T> b, T* c, Int c_row, Store how,
                     const T* offset, Early& early) {
#define COLUMNS(lanes, vectors)                                                       \
  for (; columns >= lanes * vectors; columns -= lanes * vectors) {                    \
    strip<T, lanes, vectors, along>(rows, terms, a, b, c, c_row, how, offset, early); \
    b.data += lanes * vectors;                                                        \
    c += lanes * vectors;                                                             \
    if (offset) offset += lanes * vectors;                                            \
  }
  if constexpr (WIDE == 4) {
    COLUMNS(LANES<T>, 4)
    COLUMNS(LANES<T>, 3)
  }
  COLUMNS(LANES<T>, 2)
  COLUMNS(LANES<T>, 1)
  if constexpr (LANES<T> > 8) COLUMNS(8, 1)
  if constexpr (LANES<T> > 4) COLUMNS(4, 1)
  COLUMNS(1, 1)
#undef COLUMNS
}

template <typename T, typename Out>
void multiply_words(Int, Int, Int, Terms, Left<T>, Int, Right<T>, Out*, Int, Int, Store, const Sum<T>*,
                    Early);  // in tiles.h

// For `count` left factors, `a_step` words apart, and as many c, (rows, columns) each: c = a b, or c += a b, which
// rounded results cannot be, or the first past the caches. `offset`, if any, is added to each row besides.
template <typename T, typename Out>
void multiply_lines(Int count, Int rows, Int columns, Terms terms, Left<T> a, Int a_step, Right<T> b, Out* c, Int c_row,
                    Int c_step, Store how, const Sum<T>* offset = nullptr, Early early = {}) {
  if constexpr (Arithmetic<T>::values == 1) {
    const auto run = a.inner == 1 ? multiply_values<T, true> : multiply_values<T, false>;
    early.steps = count * ceil_div(rows, TALL) * ceil_div(columns, WIDE * LANES<T>) * terms.count *
                  ceil_div(terms.inner, LINE<T>);
    // What takes several strips is written while it is in a cache.
    const Int together = columns > WIDE * LANES<T> ? 8 * TALL : rows;
    for (Int i = 0; i < count; i++)
      for (Int row = 0; row < rows; row += together)
        run(std::min(together, rows - row), columns, terms, {a.data + i * a_step + row * a.row, a.row, a.inner}, b,
            c + i * c_step + row * c_row, c_row, how, offset, early);
  } else {
    multiply_words(count, rows, columns, terms, a, a_step, b, c, c_row, c_step, how, offset, early);
  }
}
template <typename T, typename Out>
void multiply(Int rows, Int columns, Terms terms, Left<T> a, Right<T> b, Out* c, Int c_row, Store how,
              Early early = {}) {
  multiply_lines<T>(1, rows, columns, terms, a, 0, b, c, c_row, 0, how, nullptr, early);
}
template <typename T, typename Out>
void multiply(Int rows, Int columns, Int inner, Left<T> a, Right<T> b, Out* c, Int c_row, Store how,
              Early early = {}) {
  multiply<T>(rows, columns, {WHOLE, 1, inner}, a, b, c, c_row, how, early);
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
