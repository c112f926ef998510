// Means over space, the coefficients of mixtures that an attention makes of them, and their gradients.

#include <omp.h>

#include <cmath>

#include "problem.h"

namespace {

constexpr Int CHUNK = 1 << 13;  // values of an image that are summed at once
constexpr Int SAMPLES = 16;  // whose logits of one mixture are computed at once

struct Attention {
  Int batch, pixels, channels, channels_last, width, mixtures, cells;

  Int logits() const { return cells + 1; }

  // Few channels are summed as those of several neighbouring pixels, if these divide the image.
  Int neighbours() const {
    Int count = 1;
    while (2 * count * channels <= 64 && pixels % (2 * count) == 0) count *= 2;
    return count;
  }
  Int chunks() const { return std::min(ceil_div(pixels * channels, CHUNK), pixels / neighbours()); }
  Int room() const { return channels_last ? batch * chunks() * neighbours() * channels : 0; }  // for their sums
};

// The sum of term(lanes, i) for i below `count`.
template <typename T, typename Term>
inline T sum(Int count, Term term) {
  constexpr Int lanes = LANES<T>;
  Vector<T, lanes> sums[WIDE] = {};
  Int i = 0;
  for (; i + lanes * WIDE <= count; i += lanes * WIDE)
    for (Int v = 0; v < WIDE; v++) sums[v] += term(std::integral_constant<Int, lanes>{}, i + v * lanes);
  for (; i + lanes <= count; i += lanes) sums[0] += term(std::integral_constant<Int, lanes>{}, i);
  for (Int v = 1; v < WIDE; v++) sums[0] += sums[v];
  T total = 0;
  for (Int k = 0; k < lanes; k++) total += sums[0][k];
  for (; i < count; i++) total += term(std::integral_constant<Int, 1>{}, i)[0];
  return total;
}

template <typename T>
T dot(Int count, const T* a, const T* b) {
  return sum<T>(count, [=](auto lanes, Int i) { return load<lanes>(a + i) * load<lanes>(b + i); });
}

// What follows is run by all threads of a region, which share its loops.

// Sums (batch, chunks, columns) of the rows of images (batch, rows, columns), some rows for each chunk.
template <typename T>
void sum_chunks(Int batch, Int rows, Int columns, Int chunks, const T* x, T* sums) {
#pragma omp for collapse(2) schedule(static)
  for (Int image = 0; image < batch; image++)
    for (Int chunk = 0; chunk < chunks; chunk++)
      for_columns<T>(0, columns, [&](auto lanes, auto vectors, Int column) {
        Vector<T, lanes> sum[vectors] = {};
        const Int last = rows * (chunk + 1) / chunks;
        for (Int row = rows * chunk / chunks; row < last; row++)
          for (Int v = 0; v < vectors; v++) sum[v] += load<lanes>(x + (image * rows + row) * columns + column + v * lanes);
        for (Int v = 0; v < vectors; v++)
          store(sums + (image * chunks + chunk) * columns + column + v * lanes, sum[v]);
      });
}

// Means (batch, channels) over the pixels of images. Chunks do not depend on the number of threads, nor do means.
template <typename T>
void pool(const Attention& p, const T* x, T* sums, T* means) {
  if (p.channels_last) {
    const Int neighbours = p.neighbours(), columns = neighbours * p.channels, chunks = p.chunks();
    sum_chunks(p.batch, p.pixels / neighbours, columns, chunks, x, sums);
#pragma omp for schedule(static)
    for (Int image = 0; image < p.batch; image++) {
      T* to = means + image * p.channels;
      std::fill_n(to, p.channels, 0);
      for (Int part = 0; part < chunks * neighbours; part++)
        for (Int i = 0; i < p.channels; i++) to[i] += sums[(image * chunks * neighbours + part) * p.channels + i];
      for (Int i = 0; i < p.channels; i++) to[i] /= p.pixels;
    }
  } else {
#pragma omp for schedule(static)
    for (Int row = 0; row < p.batch * p.channels; row++) {
      const T* from = x + row * p.pixels;
      means[row] = sum<T>(p.pixels, [=](auto lanes, Int i) { return load<lanes>(from + i); }) / p.pixels;
    }
  }
}

// h = ReLU(Norm(W x + b)) for means x, where b may be null: a BatchNorm of the given mean and variance (width) or,
// without these, a LayerNorm.
template <typename T>
void find_hidden(const Attention& p, double eps, const T* means, const T* weight, const T* bias, const T* mean,
                 const T* variance, const T* scale, const T* shift, T* hidden) {
#pragma omp for schedule(static)
  for (Int j = 0; j < p.width; j++) {
    const T factor = mean ? scale[j] / std::sqrt(variance[j] + T(eps)) : 1;
    for (Int image = 0; image < p.batch; image++) {
      T& value = hidden[image * p.width + j];
      value = dot(p.channels, means + image * p.channels, weight + j * p.channels) + (bias ? bias[j] : 0);
      if (mean) value = std::max<T>((value - mean[j]) * factor + shift[j], 0);
    }
  }
  if (mean) return;
#pragma omp for schedule(static)
  for (Int image = 0; image < p.batch; image++) {
    T* h = hidden + image * p.width;
    const T centre = sum<T>(p.width, [=](auto lanes, Int i) { return load<lanes>(h + i); }) / p.width;
    for (Int j = 0; j < p.width; j++) h[j] -= centre;
    const T inverse = 1 / std::sqrt(dot(p.width, h, h) / p.width + T(eps));
    for (Int j = 0; j < p.width; j++) h[j] = std::max<T>(h[j] * inverse * scale[j] + shift[j], 0);
  }
}

// z of `count` samples for one mixture: `length` values apart, with room for the weights as a right factor.
template <typename T>
void find_logits(const Attention& p, Int mixture, const T* hidden, Int count, const T* weight, const T* bias, T* turned,
                 T* z, Int length) {
  const Int n = p.logits();
  transpose<T>(n, p.width, weight + mixture * n * p.width, p.width, turned, length, length);
  for (Int i = 0; i < count; i++) std::copy_n(bias + mixture * n, n, z + i * length);
  multiply<T>(count, n, p.width, Left<T>{hidden, p.width, 1}, Right<T>{turned, length}, z, length, ADD);
}

template <typename T>
T sum_of_magnitudes(Int n, const T* z) {
  return sum<T>(n, [=](auto lanes, Int i) {
    const auto value = load<lanes>(z + i);
    return value < 0 ? -value : value;
  });
}

// α = (1 − τ) z / (Σ|z| + ε) + τ β, (batch, mixtures, cells), for h (batch, width) and β (mixtures, cells).
template <typename T>
void find_coefficients(const Attention& p, double eps, const T* hidden, const T* weight, const T* bias,
                       const T* assignment, T temperature, T* alpha) {
  const Int length = round_up(p.logits()), blocks = ceil_div(p.batch, SAMPLES);
  const Buffer<T> turned(p.width * length), z(SAMPLES * length);
#pragma omp for collapse(2) schedule(static)
  for (Int mixture = 0; mixture < p.mixtures; mixture++)
    for (Int block = 0; block < blocks; block++) {
      const Int first = block * SAMPLES, count = std::min(SAMPLES, p.batch - first);
      find_logits(p, mixture, hidden + first * p.width, count, weight, bias, turned.data, z.data, length);
      for (Int i = 0; i < count; i++) {
        const T *own = z.data + i * length, *assigned = assignment + mixture * p.cells;
        // So that α is β, to the last digit, at τ = 1.
        const T factor = (1 - temperature) / (sum_of_magnitudes(p.logits(), own) + T(eps));
        T* to = alpha + ((first + i) * p.mixtures + mixture) * p.cells;
        for (Int k = 0; k < p.cells; k++) to[k] = factor * own[k] + temperature * assigned[k];
      }
    }
}

// Gradients of h, to which all mixtures add, of weights and biases, given that of α. Each thread adds up its own
// gradient of h, (threads, batch, width), which starts at zero.
template <typename T>
void find_gradients(const Attention& p, double eps, const T* grad, const T* hidden, const T* weight, const T* bias,
                    T temperature, T* grad_hidden, T* grad_weight, T* grad_bias) {
  const Int n = p.logits(), length = round_up(n);
  const Buffer<T> turned(p.width * length), z(SAMPLES * length);
  T* added = grad_hidden + omp_get_thread_num() * p.batch * p.width;
#pragma omp for schedule(static)
  for (Int mixture = 0; mixture < p.mixtures; mixture++) {
    T *to_weight = grad_weight + mixture * n * p.width, *to_bias = grad_bias + mixture * n;
    std::fill_n(to_bias, n, 0);
    for (Int first = 0; first < p.batch; first += SAMPLES) {
      const Int count = std::min(SAMPLES, p.batch - first);
      const T* h = hidden + first * p.width;
      find_logits(p, mixture, h, count, weight, bias, turned.data, z.data, length);
      for (Int i = 0; i < count; i++) {
        T* own = z.data + i * length;
        const T* g = grad + ((first + i) * p.mixtures + mixture) * p.cells;
        const T factor = 1 / (sum_of_magnitudes(n, own) + T(eps)), scale = (1 - temperature) * factor;
        const T common = dot(p.cells, g, own) * factor * scale;
        for (Int k = 0; k < n; k++) {
          const T sign = (own[k] > 0) - (own[k] < 0);
          own[k] = (k < p.cells ? g[k] * scale : 0) - sign * common;
          to_bias[k] += own[k];
        }
      }
      multiply<T>(n, p.width, count, Left<T>{z.data, 1, length}, Right<T>{h, p.width}, to_weight, p.width,
                  first > 0 ? ADD : WRITE);
      multiply<T>(count, p.width, n, Left<T>{z.data, length, 1}, Right<T>{weight + mixture * n * p.width, p.width},
                  added + first * p.width, p.width, ADD);
    }
  }
}

}  // namespace

#define EXPORT(T)                                                                                                    \
  extern "C" void mean_##T(const Attention& p, Int threads, const T* x, T* means) {                                  \
    const Buffer<T> sums(p.room());                                                                                  \
    _Pragma("omp parallel num_threads(threads)") pool(p, x, sums.data, means);                                       \
  }                                                                                                                  \
  extern "C" void attention_##T(const Attention& p, double norm_eps, double eps, Int threads, const T* x,            \
                                const T* weight1, const T* bias1, const T* mean, const T* variance, const T* scale,  \
                                const T* shift, const T* weight2, const T* bias2, const T* assignment,               \
                                const T* temperature, T* alpha) {                                                    \
    const Buffer<T> sums(p.room()), means(p.batch * p.channels), hidden(p.batch * p.width);                          \
    _Pragma("omp parallel num_threads(threads)") {                                                                   \
      pool(p, x, sums.data, means.data);                                                                             \
      find_hidden(p, norm_eps, means.data, weight1, bias1, mean, variance, scale, shift, hidden.data);               \
      find_coefficients(p, eps, hidden.data, weight2, bias2, assignment, *temperature, alpha);                       \
    }                                                                                                                \
  }                                                                                                                  \
  extern "C" void coefficients_##T(const Attention& p, double eps, Int threads, const T* hidden, const T* weight,    \
                                   const T* bias, const T* assignment, const T* temperature, T* alpha) {             \
    _Pragma("omp parallel num_threads(threads)")                                                                     \
        find_coefficients(p, eps, hidden, weight, bias, assignment, *temperature, alpha);                            \
  }                                                                                                                  \
  extern "C" void coefficients_gradients_##T(const Attention& p, double eps, Int threads, const T* grad,             \
                                             const T* hidden, const T* weight, const T* bias, const T* temperature,  \
                                             T* grad_hidden, T* grad_weight, T* grad_bias) {                         \
    _Pragma("omp parallel num_threads(threads)")                                                                     \
        find_gradients(p, eps, grad, hidden, weight, bias, *temperature, grad_hidden, grad_weight, grad_bias);       \
  }
EXPORT(float)
EXPORT(double)
