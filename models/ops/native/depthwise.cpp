// The depthwise convolution with a kernel for every sample, and its gradients, on a CPU.
//
// Images and kernels are channels last: a register holds neighbouring channels of a pixel, and images are read where
// they lie. Some pixels of a line are summed at once.

#include <omp.h>

#include <type_traits>

#include "problem.h"

namespace {

constexpr Int PIXELS = TALL - 1, TAPS = TALL;  // sums for each register of channels

// A position of the kernel along one axis: the pixels from `first` to `last` read `step · i + at` through it.
struct Tap {
  Int number, at, first, last;
  bool reaches(Int i) const { return first <= i && i < last; }
};

// Along one axis, the pixels `start + stride · i`, for i below `count`, and the taps through which they read others.
struct Axis {
  Int start, stride, step, count, taps = 0;
  Buffer<Tap> tap;

  // Outputs, which read inputs.
  Axis(const Problem& p, Int dim) : start(0), stride(1), step(p.stride[dim]), count(p.output[dim]), tap(p.taps[dim]) {
    for (Int k = 0; k < p.taps[dim]; k++) {
      const Int at = k * p.dilation[dim] - p.padding[dim];
      add(k, at, ceil_div(std::max<Int>(-at, 0), step), at < p.input[dim] ? (p.input[dim] - 1 - at) / step + 1 : 0);
    }
  }

  // Every `stride`-th input from `phase` on, which read gradients of outputs, all through the same taps.
  Axis(const Problem& p, Int dim, Int phase)
      : start(phase), stride(p.stride[dim]), step(1), count(ceil_div(p.input[dim] - phase, stride)), tap(p.taps[dim]) {
    for (Int k = 0; k < p.taps[dim]; k++) {
      const Int distance = phase + p.padding[dim] - k * p.dilation[dim], at = distance / stride;
      if (at * stride == distance) add(k, at, std::max<Int>(-at, 0), p.output[dim] - at);
    }
  }

  void add(Int number, Int at, Int first, Int last) {
    last = std::min(last, count);
    if (first < last) tap[taps++] = {number, at, first, last};
  }

  // All taps reach the pixels from `first` to `last`.
  Int first() const {
    Int result = 0;
    for (Int k = 0; k < taps; k++) result = std::max(result, tap[k].first);
    return result;
  }
  Int last() const {
    Int result = count;
    for (Int k = 0; k < taps; k++) result = std::min(result, tap[k].last);
    return std::max(result, first());
  }
};

// Where a line that is read begins, and the row of the kernel through which it is.
struct Row {
  Int line, kernel;
};

// The lines of an image, and what they read of another one.
struct Lines {
  const Problem& p;
  const Int *size, *read_size;
  Axis depth, height, width;
  Int channels, count;
  Buffer<Row> rows;

  explicit Lines(const Problem& p)
      : p(p), size(p.output), read_size(p.input), depth(p, 0), height(p, 1), width(p, 2), channels(p.cin),
        count(depth.count * height.count), rows(p.taps[0] * p.taps[1]) {}
  Lines(const Problem& p, const Int* phase)
      : p(p), size(p.input), read_size(p.output), depth(p, 0, phase[0]), height(p, 1, phase[1]), width(p, 2, phase[2]),
        channels(p.cin), count(depth.count * height.count), rows(p.taps[0] * p.taps[1]) {}

  Int begin(Int line) const {
    const Int d = depth.start + line / height.count * depth.stride;
    return (d * size[1] + height.start + line % height.count * height.stride) * size[2] * channels;
  }

  // Fills `rows`, and says how many there are.
  Int find_rows(Int line) const {
    const Int d = line / height.count, h = line % height.count;
    Int found = 0;
    for (Int i = 0; i < depth.taps; i++)
      for (Int j = 0; j < height.taps; j++) {
        const Tap &over = depth.tap[i], &down = height.tap[j];
        if (!over.reaches(d) || !down.reaches(h)) continue;
        const Int read = (d * depth.step + over.at) * read_size[1] + h * height.step + down.at;
        rows[found++] = {read * read_size[2] * channels, (over.number * p.taps[1] + down.number) * p.taps[2] * channels};
      }
    return found;
  }
};

// Run work(lanes, registers, channel) for as many channels at a time as some registers hold.
template <typename T, typename Work>
void for_channels(Int first, Int last, Work work) {
#define STRIP(lanes, vectors)                                         \
  for (; first + lanes * vectors <= last; first += lanes * vectors)   \
    work(std::integral_constant<Int, lanes>{}, std::integral_constant<Int, vectors>{}, first);
  STRIP(LANES<T>, WIDE)
  STRIP(LANES<T>, 1)
  if constexpr (LANES<T> > 4) STRIP(4, 1)
  STRIP(1, 1)
#undef STRIP
}

// Sum what `pixels` neighbours, from number i on, read through some taps of all rows.
template <typename T, Int lanes, Int vectors, Int pixels>
inline __attribute__((always_inline)) void gather(const Lines& lines, Int rows, Int tap, Int last_tap, Int i,
                                                  const T* image, const T* kernel, T* out) {
  using V = Vector<T, lanes>;
  V sum[pixels][vectors] = {};
  const Axis& axis = lines.width;
  const Int step = axis.step * lines.channels, out_step = axis.stride * lines.channels;
  for (Int r = 0; r < rows; r++)
    for (Int k = tap; k < last_tap; k++) {
      const T* read = image + lines.rows[r].line + (i * axis.step + axis.tap[k].at) * lines.channels;
      const T* weights = kernel + lines.rows[r].kernel + axis.tap[k].number * lines.channels;
      V weight[vectors];
      for (Int v = 0; v < vectors; v++) weight[v] = *(const V*)(weights + v * lanes);
      for (Int n = 0; n < pixels; n++)
        for (Int v = 0; v < vectors; v++) sum[n][v] += *(const V*)(read + n * step + v * lanes) * weight[v];
    }
  out += (axis.start + i * axis.stride) * lines.channels;
  for (Int n = 0; n < pixels; n++)
    for (Int v = 0; v < vectors; v++) *(V*)(out + n * out_step + v * lanes) = sum[n][v];
}

template <typename T, Int lanes, Int vectors>
void gather_line(const Lines& lines, Int rows, const T* image, const T* kernel, T* out) {
  const Axis& axis = lines.width;
  const Int first = axis.first(), last = axis.last(), tiles = ceil_div(last - first, PIXELS);
  const auto one = [&](Int i) {
    Int tap = 0, last_tap = axis.taps;
    while (tap < last_tap && !axis.tap[tap].reaches(i)) tap++;
    while (tap < last_tap && !axis.tap[last_tap - 1].reaches(i)) last_tap--;
    gather<T, lanes, vectors, 1>(lines, rows, tap, last_tap, i, image, kernel, out);
  };
  for (Int i = 0; i < first; i++) one(i);
  for (Int t = 0; t < tiles; t++) {
    const Int i = first + (last - first) * t / tiles;
    switch (first + (last - first) * (t + 1) / tiles - i) {
#define CASE(count)                                                                       \
  case count:                                                                             \
    gather<T, lanes, vectors, count>(lines, rows, 0, axis.taps, i, image, kernel, out);   \
    break;
      CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
    }
  }
  for (Int i = last; i < axis.count; i++) one(i);
}

// A share of the lines of one image.
template <typename T>
void gather_lines(const Lines& lines, Int part, Int parts, const T* image, const T* kernel, T* out) {
  for (Int line = lines.count * part / parts; line < lines.count * (part + 1) / parts; line++) {
    const Int rows = lines.find_rows(line);
    for_channels<T>(0, lines.channels, [&](auto lanes, auto vectors, Int c) {
      gather_line<T, lanes, vectors>(lines, rows, image + c, kernel + c, out + lines.begin(line) + c);
    });
  }
}

template <typename T>
void depthwise(const Problem& p, Int threads, const T* kernels, const T* x, T* y) {
  const Int parts = std::min(p.lines(), ceil_div(4 * threads, p.batch));
#pragma omp parallel num_threads(threads)
  {
    const Lines lines(p);
#pragma omp for collapse(2) schedule(dynamic, 1)
    for (Int sample = 0; sample < p.batch; sample++)
      for (Int part = 0; part < parts; part++)
        gather_lines(lines, part, parts, x + sample * p.image_in(), kernels + sample * p.parts() * p.cin,
                     y + sample * p.image_out());
  }
}

template <typename T>
void depthwise_gradient_of_x(const Problem& p, Int threads, const T* kernels, const T* grad, T* grad_x) {
  const Int parts = std::min(p.input[1], ceil_div(4 * threads, p.batch));
  Int phases[3];
  for (Int dim = 0; dim < 3; dim++) phases[dim] = std::min(p.stride[dim], p.input[dim]);
#pragma omp parallel for num_threads(threads) collapse(2) schedule(dynamic, 1)
  for (Int sample = 0; sample < p.batch; sample++)
    for (Int part = 0; part < parts; part++)
      for (Int i = 0; i < phases[0] * phases[1] * phases[2]; i++) {
        const Int phase[] = {i / (phases[1] * phases[2]), i / phases[2] % phases[1], i % phases[2]};
        gather_lines(Lines(p, phase), part, parts, grad + sample * p.image_out(), kernels + sample * p.parts() * p.cin,
                     grad_x + sample * p.image_in());
      }
}

// Add to the gradients of `taps` weights what pixels of a line, from `first` to `last`, have received through them.
template <typename T, Int lanes, Int vectors, Int taps>
inline __attribute__((always_inline)) void correlate(const Lines& lines, Int tap, Int first, Int last, const T* read,
                                                     const T* received, T* out) {
  using V = Vector<T, lanes>;
  const Int channels = lines.channels, step = lines.width.step * channels;
  V sum[taps][vectors];
  const T* from[taps];
  T* to[taps];
  for (Int k = 0; k < taps; k++) {
    from[k] = read + lines.width.tap[tap + k].at * channels;
    to[k] = out + lines.width.tap[tap + k].number * channels;
    for (Int v = 0; v < vectors; v++) sum[k][v] = *(const V*)(to[k] + v * lanes);
  }
  for (Int i = first; i < last; i++) {
    V value[vectors];
    for (Int v = 0; v < vectors; v++) value[v] = *(const V*)(received + i * channels + v * lanes);
    for (Int k = 0; k < taps; k++)
      for (Int v = 0; v < vectors; v++) sum[k][v] += *(const V*)(from[k] + i * step + v * lanes) * value[v];
  }
  for (Int k = 0; k < taps; k++)
    for (Int v = 0; v < vectors; v++) *(V*)(to[k] + v * lanes) = sum[k][v];
}

template <typename T, Int lanes, Int vectors>
void correlate_line(const Lines& lines, const T* read, const T* received, T* out) {
  const Axis& axis = lines.width;
  const Int first = axis.first(), last = axis.last();
  for (Int k = 0; k < axis.taps; k += TAPS) switch (std::min(TAPS, axis.taps - k)) {
#define CASE(count)                                                                        \
  case count:                                                                              \
    correlate<T, lanes, vectors, count>(lines, k, first, last, read, received, out);       \
    break;
      CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
#undef CASE
    }
  for (Int k = 0; k < axis.taps; k++) {
    const Tap& tap = axis.tap[k];
    correlate<T, lanes, vectors, 1>(lines, k, tap.first, std::min(tap.last, first), read, received, out);
    correlate<T, lanes, vectors, 1>(lines, k, std::max(tap.first, last), tap.last, read, received, out);
  }
}

template <typename T>
void depthwise_gradient_of_kernels(const Problem& p, Int threads, const T* x, const T* grad, T* grad_kernels) {
  const Int strips = ceil_div(p.cin, ROUND), parts = std::min(strips, ceil_div(4 * threads, p.batch));
#pragma omp parallel num_threads(threads)
  {
    const Lines lines(p);
#pragma omp for collapse(2) schedule(dynamic, 1)
    for (Int sample = 0; sample < p.batch; sample++)
      for (Int part = 0; part < parts; part++) {
        const Int first = strips * part / parts * ROUND, last = std::min(strips * (part + 1) / parts * ROUND, p.cin);
        const T *image = x + sample * p.image_in(), *received = grad + sample * p.image_out();
        T* out = grad_kernels + sample * p.parts() * p.cin;
        for (Int tap = 0; tap < p.parts(); tap++) std::fill(out + tap * p.cin + first, out + tap * p.cin + last, T(0));
        for (Int line = 0; line < lines.count; line++) {
          const Int rows = lines.find_rows(line);
          for_channels<T>(first, last, [&](auto lanes, auto vectors, Int c) {
            for (Int r = 0; r < rows; r++)
              correlate_line<T, lanes, vectors>(lines, image + lines.rows[r].line + c, received + lines.begin(line) + c,
                                                out + lines.rows[r].kernel + c);
          });
        }
      }
  }
}

}  // namespace

#define EXPORT(T)                                                                                                     \
  extern "C" void depthwise_##T(const Problem& p, Int threads, const T* kernels, const T* x, T* y) {                  \
    depthwise(p, threads, kernels, x, y);                                                                             \
  }                                                                                                                   \
  extern "C" void depthwise_gradient_of_x_##T(const Problem& p, Int threads, const T* kernels, const T* grad,         \
                                              T* grad_x) {                                                            \
    depthwise_gradient_of_x(p, threads, kernels, grad, grad_x);                                                       \
  }                                                                                                                   \
  extern "C" void depthwise_gradient_of_kernels_##T(const Problem& p, Int threads, const T* x, const T* grad,         \
                                                    T* grad_kernels) {                                                \
    depthwise_gradient_of_kernels(p, threads, x, grad, grad_kernels);                                                 \
  }
EXPORT(float)
EXPORT(double)
