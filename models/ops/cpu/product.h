// One small product of strided operands, compiled once in product.cpp for all that multiply.
#pragma once

#include "registers.h"

// Matrices (rows, terms · inner) and (terms · inner, columns); the columns of a right factor lie together.
template <typename T>
struct Left {
  const T* data;
  Int row, inner;
};
template <typename T>
struct Right {
  const T* data;
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

constexpr Int AHEAD = 16;  // rows of a right factor that are prefetched

// Rows in far memory that are prefetched while a product is computed, evenly: a core can wait for a few dozen lines.
struct Prefetch {
  const char* row = nullptr;
  Int step = 0, lines = 0, line = 0;  // the bytes from one row to the next, cache lines of each, and the next of them
  Int total = 0, due = 0, steps = 1;

  Prefetch() = default;
  template <typename T>
  Prefetch(const T* data, Int rows, Int row, Int columns)
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

// c (rows, columns) = a b, or c += a b; the rows of a may lie `along` what is summed over.
template <typename T, bool along>
void multiply_strips(Int rows, Int columns, Terms terms, Left<T> a, Right<T> b, T* c, Int c_row, Store how,
                     Prefetch& prefetch);

namespace {

// For `count` left factors, `a_step` values apart, and as many c, (rows, columns) each.
template <typename T>
void multiply_lines(Int count, Int rows, Int columns, Terms terms, Left<T> a, Int a_step, Right<T> b, T* c, Int c_row,
                    Int c_step, Store how, Prefetch prefetch = {}) {
  const auto run = a.inner == 1 ? multiply_strips<T, true> : multiply_strips<T, false>;
  prefetch.steps = count * ceil_div(rows, TALL) * ceil_div(columns, WIDE * LANES<T>) * terms.count *
                   ceil_div(terms.inner, LINE<T>);
  // What takes several strips is written while it is in a cache.
  const Int together = columns > WIDE * LANES<T> ? 8 * TALL : rows;
  for (Int i = 0; i < count; i++)
    for (Int row = 0; row < rows; row += together)
      run(std::min(together, rows - row), columns, terms, {a.data + i * a_step + row * a.row, a.row, a.inner}, b,
          c + i * c_step + row * c_row, c_row, how, prefetch);
}
template <typename T>
void multiply(Int rows, Int columns, Terms terms, Left<T> a, Right<T> b, T* c, Int c_row, Store how,
              Prefetch prefetch = {}) {
  multiply_lines<T>(1, rows, columns, terms, a, 0, b, c, c_row, 0, how, prefetch);
}
template <typename T>
void multiply(Int rows, Int columns, Int inner, Left<T> a, Right<T> b, T* c, Int c_row, Store how,
              Prefetch prefetch = {}) {
  multiply<T>(rows, columns, {WHOLE, 1, inner}, a, b, c, c_row, how, prefetch);
}

}  // namespace
