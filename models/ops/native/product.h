// One small product of strided operands. Its kernels are in `values.cpp` and, in bfloat16, `pairs.cpp` and `tiles.cpp`,
// which are compiled once for all that multiply.
#pragma once

#include "registers.h"

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

constexpr Int AHEAD = 16;  // rows of a right factor that are asked for early

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

// What `multiply_lines` says, for values as they are; rows of the left factor may lie `along` what is summed over.
template <typename T, bool along>
void multiply_values(Int rows, Int columns, Terms terms, Left<T> a, Right<T> b, T* c, Int c_row, Store how,
                     const T* offset, Early& early);

// The same for words of several values.
template <typename T, typename Out>
void multiply_words(Int count, Int rows, Int columns, Terms terms, Left<T> a, Int a_step, Right<T> b, Out* c, Int c_row,
                    Int c_step, Store how, const Sum<T>* offset, Early early);

namespace {

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

}  // namespace
