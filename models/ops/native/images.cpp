// Images from one memory layout to another, and their means.

#include "bfloat16.h"
#include "problem.h"

namespace {

// (batch, rows, columns) to (batch, columns, rows): between channels first and channels last.
template <typename T>
void reorder(Int batch, Int rows, Int columns, Int threads, const T* from, T* to) {
  const Int strip = 4 * ROUND, strips = ceil_div(rows, strip);
#pragma omp parallel for num_threads(threads) collapse(2) schedule(static)
  for (Int image = 0; image < batch; image++)
    for (Int i = 0; i < strips; i++) {
      const Int first = i * strip, offset = image * rows * columns;
      transpose<T>(std::min(strip, rows - first), columns, from + offset + first * columns, columns,
                   to + offset + first, rows, rows - first);
    }
}

// The means of matrices (batch, rows, columns) over their rows.
template <typename T>
void mean_of_rows(Int batch, Int rows, Int columns, Int threads, const T* x, Sum<T>* means) {
  const Int strip = WIDE * LANES<T>, strips = ceil_div(columns, strip);
#pragma omp parallel for num_threads(threads) collapse(2) schedule(static)
  for (Int image = 0; image < batch; image++)
    for (Int i = 0; i < strips; i++)
      for_columns<T>(i * strip, std::min((i + 1) * strip, columns), [&](auto lanes, auto vectors, Int column) {
        Vector<Sum<T>, lanes> sum[vectors] = {};
        const T* from = x + image * rows * columns + column;
        for (Int row = 0; row < rows; row++, from += columns)
          for (Int v = 0; v < vectors; v++) sum[v] += widen<lanes>(from + v * lanes);
        Sum<T>* to = means + image * columns + column;
        for (Int v = 0; v < vectors; v++) put<lanes>(to + v * lanes, sum[v] / Sum<T>(rows));
      });
}

// The same over their columns.
template <typename T>
void mean_of_columns(Int batch, Int rows, Int columns, Int threads, const T* x, Sum<T>* means) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Int row = 0; row < batch * rows; row++) {
    Vector<Sum<T>, LANES<T>> sums = {};
    const T* from = x + row * columns;
    Int i = 0;
    for (; i + LANES<T> <= columns; i += LANES<T>) sums += widen<LANES<T>>(from + i);
    Sum<T> sum = 0;
    for (Int k = 0; k < LANES<T>; k++) sum += sums[k];
    for (; i < columns; i++) sum += widen<1>(from + i)[0];
    means[row] = sum / columns;
  }
}

}  // namespace

#define EXPORT(name, T, Out)                                                                         \
  extern "C" void name##_##T(Int batch, Int rows, Int columns, Int threads, const T* from, Out* to) { \
    name(batch, rows, columns, threads, from, to);                                                    \
  }
EXPORT(reorder, float, float)
EXPORT(reorder, double, double)
EXPORT(reorder, bfloat16, bfloat16)
EXPORT(mean_of_rows, bfloat16, float)
EXPORT(mean_of_columns, bfloat16, float)
