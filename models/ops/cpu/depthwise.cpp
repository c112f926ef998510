// The depthwise convolution with a kernel for every sample, and its gradients.
//
// Images and kernels are channels last: a register holds neighbouring channels of a pixel, and images are read where
// they lie. Some pixels of a line are summed at once.

#include <omp.h>

#include "axis.h"

namespace {

constexpr Int PIXELS = TALL - 1, TAPS = TALL;  // sums for each register of channels

// Where a line that is read begins, and the row of the kernel through which it is.
struct Row {
  Int line, kernel;
};

// Find the rows of a line, and return how many there are; there is room for those of the whole kernel.
Int find_rows(const Lines& lines, Int line, Int channels, Row* rows) {
  const Int d = line / lines.height.count, h = line % lines.height.count;
  const Run &deep = lines.depth.run_of(d), &high = lines.height.run_of(h);
  const Tap start = {0, 0, 0, 0};
  Int count = 0;
  for (Int i = deep.tap; i < deep.last_tap; i++)
    for (Int j = high.tap; j < high.last_tap; j++) {
      const Tap &over = lines.depth.tap[i], &down = lines.height.tap[j];
      rows[count++] = {(lines.read(d, h, 0) + lines.ahead(over, down, start)) * channels,
                       lines.number(over, down, start) * channels};
    }
  return count;
}

// Sum what `pixels` neighbours, from number i on, read through the taps of a run in all rows.
template <typename T, Int lanes, Int vectors, Int pixels>
inline __attribute__((always_inline)) void gather(const Axis& axis, const Run& run, const Row* rows, Int count,
                                                  Int channels, Int i, const T* image, const T* kernel, T* out) {
  using V = Vector<T, lanes>;
  V sum[pixels][vectors] = {};
  const Int step = axis.step * channels, out_step = axis.stride * channels;
  for (Int r = 0; r < count; r++)
    for (Int k = run.tap; k < run.last_tap; k++) {
      const T* read = image + rows[r].line + (i * axis.step + axis.tap[k].at) * channels;
      const T* weights = kernel + rows[r].kernel + axis.tap[k].number * channels;
      V weight[vectors];
      for (Int v = 0; v < vectors; v++) weight[v] = load<lanes>(weights + v * lanes);
      for (Int n = 0; n < pixels; n++)
        for (Int v = 0; v < vectors; v++) sum[n][v] += load<lanes>(read + n * step + v * lanes) * weight[v];
    }
  for (Int n = 0; n < pixels; n++)
    for (Int v = 0; v < vectors; v++) store(out + (i + n) * out_step + v * lanes, sum[n][v]);
}

template <typename T, Int lanes, Int vectors>
void gather_line(const Axis& axis, const Row* rows, Int count, Int channels, const T* image, const T* kernel,
                 T* out) {
  for (Int r = 0; r < axis.runs; r++) {
    const Run& run = axis.run[r];
    const Int length = run.last - run.first, tiles = ceil_div(length, PIXELS);
    for (Int t = 0; t < tiles; t++) {
      const Int i = run.first + length * t / tiles;
      switch (run.first + length * (t + 1) / tiles - i) {
#define CASE(pixels)                                                                                   \
  case pixels:                                                                                         \
    gather<T, lanes, vectors, pixels>(axis, run, rows, count, channels, i, image, kernel, out); \
    break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
      }
    }
  }
}

// A share of the lines of one image.
template <typename T>
void gather_lines(const Lines& lines, Int part, Int parts, Int channels, const T* image, const T* kernel,
                  T* out, Row* rows) {
  for (Int line = lines.count * part / parts; line < lines.count * (part + 1) / parts; line++) {
    const Int count = find_rows(lines, line, channels, rows);
    T* to = out + lines.pixel(line / lines.height.count, line % lines.height.count, 0) * channels;
    for_columns<T>(0, channels, [&](auto lanes, auto vectors, Int c) {
      gather_line<T, lanes, vectors>(lines.width, rows, count, channels, image + c, kernel + c, to + c);
    });
  }
}

template <typename T>
void depthwise(const Problem& p, Int threads, const T* kernels, const T* x, T* y) {
  const Lines lines(p);
  const Int parts = std::min(p.lines(), ceil_div(4 * threads, p.batch));
#pragma omp parallel num_threads(threads)
  {
    Buffer<Row> rows(p.taps[0] * p.taps[1]);
#pragma omp for collapse(2) schedule(dynamic, 1)
    for (Int sample = 0; sample < p.batch; sample++)
      for (Int part = 0; part < parts; part++)
        gather_lines(lines, part, parts, p.cin, x + sample * p.image_in(), kernels + sample * p.parts() * p.cin,
                     y + sample * p.image_out(), rows.data);
  }
}

template <typename T>
void depthwise_gradient_of_x(const Problem& p, Int threads, const T* kernels, const T* grad, T* grad_x) {
  const Int parts = std::min(p.input[1], ceil_div(4 * threads, p.batch)), phases = Lines::phases(p);
#pragma omp parallel num_threads(threads)
  {
    Buffer<Row> rows(p.taps[0] * p.taps[1]);
#pragma omp for collapse(2) schedule(dynamic, 1)
    for (Int sample = 0; sample < p.batch; sample++)
      for (Int part = 0; part < parts; part++)
        for (Int phase = 0; phase < phases; phase++)
          gather_lines(Lines(p, phase), part, parts, p.cin, grad + sample * p.image_out(),
                       kernels + sample * p.parts() * p.cin, grad_x + sample * p.image_in(), rows.data);
  }
}

// Add to the gradients of `taps` weights what the pixels of a run have received through them.
template <typename T, Int lanes, Int vectors, Int taps>
inline __attribute__((always_inline)) void correlate(const Axis& axis, const Run& run, Int tap, Int channels,
                                                     const T* read, const T* received, T* out) {
  using V = Vector<T, lanes>;
  const Int step = axis.step * channels;
  V sum[taps][vectors];
  const T* from[taps];
  T* to[taps];
  for (Int k = 0; k < taps; k++) {
    from[k] = read + axis.tap[tap + k].at * channels;
    to[k] = out + axis.tap[tap + k].number * channels;
    for (Int v = 0; v < vectors; v++) sum[k][v] = load<lanes>(to[k] + v * lanes);
  }
  for (Int i = run.first; i < run.last; i++) {
    V value[vectors];
    for (Int v = 0; v < vectors; v++) value[v] = load<lanes>(received + i * channels + v * lanes);
    for (Int k = 0; k < taps; k++)
      for (Int v = 0; v < vectors; v++) sum[k][v] += load<lanes>(from[k] + i * step + v * lanes) * value[v];
  }
  for (Int k = 0; k < taps; k++)
    for (Int v = 0; v < vectors; v++) store(to[k] + v * lanes, sum[k][v]);
}

template <typename T, Int lanes, Int vectors>
void correlate_line(const Axis& axis, Int channels, const T* read, const T* received, T* out) {
  for (Int r = 0; r < axis.runs; r++) {
    const Run& run = axis.run[r];
    for (Int k = run.tap; k < run.last_tap; k += TAPS) switch (std::min(TAPS, run.last_tap - k)) {
#define CASE(taps)                                                                          \
  case taps:                                                                                \
    correlate<T, lanes, vectors, taps>(axis, run, k, channels, read, received, out);        \
    break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
#undef CASE
      }
  }
}

template <typename T>
void depthwise_gradient_of_kernels(const Problem& p, Int threads, const T* x, const T* grad,
                                   T* grad_kernels) {
  const Lines lines(p);
  const Int strips = ceil_div(p.cin, ROUND), parts = std::min(strips, ceil_div(4 * threads, p.batch));
#pragma omp parallel num_threads(threads)
  {
    Buffer<Row> rows(p.taps[0] * p.taps[1]);
#pragma omp for collapse(2) schedule(dynamic, 1)
    for (Int sample = 0; sample < p.batch; sample++)
      for (Int part = 0; part < parts; part++) {
        const Int first = strips * part / parts * ROUND, last = std::min(strips * (part + 1) / parts * ROUND, p.cin);
        const T *image = x + sample * p.image_in(), *received = grad + sample * p.image_out();
        T* out = grad_kernels + sample * p.parts() * p.cin;
        for (Int tap = 0; tap < p.parts(); tap++) std::fill_n(out + tap * p.cin + first, last - first, T(0));
        for (Int line = 0; line < lines.count; line++, received += p.output[2] * p.cin) {
          const Int count = find_rows(lines, line, p.cin, rows.data);
          for_columns<T>(first, last, [&](auto lanes, auto vectors, Int c) {
            for (Int r = 0; r < count; r++)
              correlate_line<T, lanes, vectors>(lines.width, p.cin, image + rows[r].line + c, received + c,
                                                out + rows[r].kernel + c);
          });
        }
      }
  }
}

}  // namespace

#define EXPORT(T)                                                                                              \
  extern "C" void depthwise_##T(const Problem& p, Int threads, const T* kernels, const T* x, T* y) {           \
    depthwise(p, threads, kernels, x, y);                                                                      \
  }                                                                                                            \
  extern "C" void depthwise_gradient_of_x_##T(const Problem& p, Int threads, const T* kernels, const T* grad,  \
                                              T* grad_x) {                                                     \
    depthwise_gradient_of_x(p, threads, kernels, grad, grad_x);                                                \
  }                                                                                                            \
  extern "C" void depthwise_gradient_of_kernels_##T(const Problem& p, Int threads, const T* x, const T* grad,  \
                                                    T* grad_kernels) {                                         \
    depthwise_gradient_of_kernels(p, threads, x, grad, grad_kernels);                                          \
  }
EXPORT(float)
EXPORT(double)
