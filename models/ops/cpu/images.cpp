// Images from one memory layout to another.

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

}  // namespace

#define EXPORT(T)                                                                                    \
  extern "C" void reorder_##T(Int batch, Int rows, Int columns, Int threads, const T* from, T* to) { \
    reorder(batch, rows, columns, threads, from, to);                                                \
  }
EXPORT(float)
EXPORT(double)
