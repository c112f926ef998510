// The kernels of `multiply`, in single and double precision.

#include "product.h"

namespace {

// Where rows of the left factor lie `along` what is summed over, those that the next tile reads, and what it writes, are
// prefetched; else rows of the right factor.
template <typename T, Int lanes, Int vectors, Int rows, bool along>
inline __attribute__((always_inline)) void tile(Terms terms, Left<T> a, Right<T> b, T* c, Int c_row, Store how,
                                                Prefetch& prefetch) {
  using V = Vector<T, lanes>;
  V sum[rows][vectors];
  for (Int i = 0; i < rows; i++)
    for (Int v = 0; v < vectors; v++) sum[i][v] = how == ADD ? load<lanes>(c + i * c_row + v * lanes) : V{};
  const Int inner = along ? 1 : a.inner;
  for (Int t = 0; t < terms.count; t++) {
    const T *left = a.data + terms.data[t].left, *right = b.data + terms.data[t].right;
    const auto add = [&]() __attribute__((always_inline)) {
      V value[vectors];
      for (Int v = 0; v < vectors; v++) value[v] = load<lanes>(right + v * lanes);
      for (Int v = 0; v < vectors && !along; v++) __builtin_prefetch(right + AHEAD * b.inner + v * lanes);
      for (Int i = 0; i < rows; i++)
        for (Int v = 0; v < vectors; v++) sum[i][v] += left[i * a.row] * value[v];
      left += inner;
      right += b.inner;
    };
    for (Int k = 0; k < terms.inner; k += LINE<T>) {
      prefetch.ask();
      if constexpr (along) {
        for (Int i = 0; i < rows; i++) __builtin_prefetch(left + (rows + i) * a.row);
        if (k < rows * LINE<T> && how != STREAM)
          for (Int v = 0; v < vectors; v++) __builtin_prefetch(c + (rows + k / LINE<T>) * c_row + v * lanes, 1);
      }
      for (Int i = std::min(LINE<T>, terms.inner - k); i > 0; i--) add();
    }
  }
  for (Int i = 0; i < rows; i++)
    for (Int v = 0; v < vectors; v++) {
      T* to = c + i * c_row + v * lanes;
      how == STREAM ? stream((V*)to, sum[i][v]) : store(to, sum[i][v]);
    }
}

// As many columns as `vectors` hold, for any number of rows.
template <typename T, Int lanes, Int vectors, bool along>
void strip(Int rows, Terms terms, Left<T> a, Right<T> b, T* c, Int c_row, Store how, Prefetch& prefetch) {
  for_rows(rows, [=, &prefetch](auto count, Int first) __attribute__((always_inline)) {
    tile<T, lanes, vectors, count, along>(terms, {a.data + first * a.row, a.row, a.inner}, b, c + first * c_row, c_row,
                                          how, prefetch);
  });
}

}  // namespace

template <typename T, bool along>
void multiply_strips(Int rows, Int columns, Terms terms, Left<T> a, Right<T> b, T* c, Int c_row, Store how,
                     Prefetch& prefetch) {
#define COLUMNS(lanes, vectors)                                                    \
  for (; columns >= lanes * vectors; columns -= lanes * vectors) {                 \
    strip<T, lanes, vectors, along>(rows, terms, a, b, c, c_row, how, prefetch);   \
    b.data += lanes * vectors;                                                     \
    c += lanes * vectors;                                                          \
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

#define KERNELS(T, along) \
  template void multiply_strips<T, along>(Int, Int, Terms, Left<T>, Right<T>, T*, Int, Store, Prefetch&);
KERNELS(float, true)
KERNELS(float, false)
KERNELS(double, true)
KERNELS(double, false)
