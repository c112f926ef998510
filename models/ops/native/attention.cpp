// Means over space, the coefficients of mixtures that an attention makes of them, and their gradients.

#include <omp.h>

#include <cmath>

#include "attention.h"
#include "bfloat16.h"

namespace {

constexpr Int SAMPLES = 16;  // whose logits of one mixture are computed at once

// The sum of term(lanes, i) for i below `count`.
template <typename S, typename Term>
inline S sum(Int count, Term term) {
  constexpr Int lanes = LANES<S>;
  Vector<S, lanes> sums[WIDE] = {};
  Int i = 0;
  for (; i + lanes * WIDE <= count; i += lanes * WIDE)
    for (Int v = 0; v < WIDE; v++) sums[v] += term(std::integral_constant<Int, lanes>{}, i + v * lanes);
  for (; i + lanes <= count; i += lanes) sums[0] += term(std::integral_constant<Int, lanes>{}, i);
  for (Int v = 1; v < WIDE; v++) sums[0] += sums[v];
  S total = 0;
  for (Int k = 0; k < lanes; k++) total += sums[0][k];
  for (; i < count; i++) total += term(std::integral_constant<Int, 1>{}, i)[0];
  return total;
}

template <Int lanes, typename S>
inline Vector<S, lanes> load(const S* from) {
  return *(const Vector<S, lanes>*)from;
}

template <typename S>
S dot(Int count, const S* a, const S* b) {
  return sum<S>(count, [=](auto lanes, Int i) { return load<lanes>(a + i) * load<lanes>(b + i); });
}

// What follows is run by all threads of a region, which share its loops.

// Sums (batch, chunks, columns) of the rows of images (batch, rows, columns), some rows for each chunk.
template <typename T>
void sum_chunks(Int batch, Int rows, Int columns, Int chunks, const T* x, Sum<T>* sums) {
#pragma omp for collapse(2) schedule(static)
  for (Int image = 0; image < batch; image++)
    for (Int chunk = 0; chunk < chunks; chunk++)
      for_columns<Sum<T>>(0, columns, [&](auto lanes, auto vectors, Int column) {
        Vector<Sum<T>, lanes> sum[vectors] = {};
        const Int last = rows * (chunk + 1) / chunks;
        for (Int row = rows * chunk / chunks; row < last; row++)
          for (Int v = 0; v < vectors; v++)
            sum[v] += widen<lanes>(x + (image * rows + row) * columns + column + v * lanes);
        for (Int v = 0; v < vectors; v++)
          put<lanes>(sums + (image * chunks + chunk) * columns + column + v * lanes, sum[v]);
      });
}

// Means (batch, channels) over the pixels of images. Chunks do not depend on the number of threads, nor do means.
template <typename T>
void pool(const Attention& p, const T* x, Sum<T>* sums, Sum<T>* means) {
  if (p.channels_last) {
    const Int neighbours = p.neighbours(), columns = neighbours * p.channels, chunks = p.chunks();
    sum_chunks(p.batch, p.pixels / neighbours, columns, chunks, x, sums);
#pragma omp for schedule(static)
    for (Int image = 0; image < p.batch; image++) {
      Sum<T>* to = means + image * p.channels;
      std::fill_n(to, p.channels, 0);
      for (Int part = 0; part < chunks * neighbours; part++)
        for (Int i = 0; i < p.channels; i++) to[i] += sums[(image * chunks * neighbours + part) * p.channels + i];
      for (Int i = 0; i < p.channels; i++) to[i] /= p.pixels;
    }
  } else {
#pragma omp for schedule(static)
    for (Int row = 0; row < p.batch * p.channels; row++) {
      const T* from = x + row * p.pixels;
      means[row] = sum<Sum<T>>(p.pixels, [=](auto lanes, Int i) { return widen<lanes>(from + i); }) / p.pixels;
    }
  }
}

// h = ReLU(Norm(W x + b)), (batch, width), for means x (batch, channels). A batch is normalised by `mean` and
// `variance`, and b may be null.
template <typename S>
void find_hidden(const Attention& p, double eps, const S* means, const S* weight, const S* bias, const S* mean,
                 const S* variance, const S* scale, const S* shift, S* hidden) {
#pragma omp for schedule(static)
  for (Int j = 0; j < p.width; j++) {
    const S first = bias ? bias[j] : 0, factor = p.layer_norm ? 0 : scale[j] / std::sqrt(variance[j] + S(eps));
    for (Int image = 0; image < p.batch; image++) {
      const S value = dot(p.channels, means + image * p.channels, weight + j * p.channels) + first;
      hidden[image * p.width + j] = p.layer_norm ? value : std::max<S>((value - mean[j]) * factor + shift[j], 0);
    }
  }
  if (!p.layer_norm) return;
#pragma omp for schedule(static)
  for (Int image = 0; image < p.batch; image++) {
    S* h = hidden + image * p.width;
    const S centre = sum<S>(p.width, [=](auto lanes, Int i) { return load<lanes>(h + i); }) / p.width;
    for (Int j = 0; j < p.width; j++) h[j] -= centre;
    const S factor = 1 / std::sqrt(dot(p.width, h, h) / p.width + S(eps));
    for (Int j = 0; j < p.width; j++) h[j] = std::max<S>(h[j] * factor * scale[j] + shift[j], 0);
  }
}

// z of `count` samples for one mixture: `length` values apart, with room for the weights as a right factor.
template <typename S>
void find_logits(const Attention& p, Int mixture, const S* hidden, Int count, const S* weight, const S* bias, S* turned,
                 S* z, Int length) {
  const Int n = p.logits();
  transpose<S>(n, p.width, weight + mixture * n * p.width, p.width, turned, length, length);
  for (Int i = 0; i < count; i++) std::copy_n(bias + mixture * n, n, z + i * length);
  multiply<S>(count, n, p.width, Left<S>{hidden, p.width, 1}, Right<S>{turned, length}, z, length, ADD);
}

template <typename S>
S total(Int n, const S* z) {
  return sum<S>(n, [=](auto lanes, Int i) {
    const auto value = load<lanes>(z + i);
    return value < 0 ? -value : value;
  });
}

// Run visit(sample, mixture, z, s) with s = 1 / (Σ|z| + ε), for h (batch, width).
template <typename S, typename Visit>
void for_logits(const Attention& p, double eps, const S* hidden, const S* weight, const S* bias, Visit visit) {
  const Int length = round_up(p.logits()), blocks = ceil_div(p.batch, SAMPLES);
  const Buffer<S> turned(p.width * length), z(SAMPLES * length);
#pragma omp for collapse(2) schedule(static)
  for (Int mixture = 0; mixture < p.mixtures; mixture++)
    for (Int block = 0; block < blocks; block++) {
      const Int first = block * SAMPLES, count = std::min(SAMPLES, p.batch - first);
      find_logits(p, mixture, hidden + first * p.width, count, weight, bias, turned.data, z.data, length);
      for (Int i = 0; i < count; i++) {
        const S* own = z.data + i * length;
        visit(first + i, mixture, own, 1 / (total(p.logits(), own) + S(eps)));
      }
    }
}

// α = (1 − τ) s z + τ β, (batch, mixtures, cells), for β (mixtures, cells).
template <typename S>
void find_coefficients(const Attention& p, double eps, const S* hidden, const S* weight, const S* bias,
                       const S* assignment, S temperature, S* alpha) {
  for_logits(p, eps, hidden, weight, bias, [=](Int sample, Int mixture, const S* z, S scale) {
    const S* held = assignment + mixture * p.cells;
    S* to = alpha + (sample * p.mixtures + mixture) * p.cells;
    const S factor = (1 - temperature) * scale;  // which leaves β, to the last digit, at τ = 1
    for (Int k = 0; k < p.cells; k++) to[k] = factor * z[k] + temperature * held[k];
  });
}

// What they are where cells are folded: s [h; 1], (batch, mixtures, width + 1).
template <typename S>
void find_folded(const Attention& p, double eps, const S* hidden, const S* weight, const S* bias, S* alpha) {
  for_logits(p, eps, hidden, weight, bias, [=](Int sample, Int mixture, const S*, S scale) {
    S* to = alpha + (sample * p.mixtures + mixture) * (p.width + 1);
    for (Int k = 0; k < p.width; k++) to[k] = hidden[sample * p.width + k] * scale;
    to[p.width] = scale;
  });
}

// Gradients of h, to which all mixtures add, and of weights and biases, given that of α. Each thread adds up its own
// gradient of h, (threads, batch, width), which starts at zero.
template <typename S>
void find_gradients(const Attention& p, double eps, const S* grad, const S* hidden, const S* weight, const S* bias,
                    S temperature, S* grad_hidden, S* grad_weight, S* grad_bias) {
  const Int n = p.logits(), length = round_up(n);
  const Buffer<S> turned(p.width * length), z(SAMPLES * length);
  S* added = grad_hidden + omp_get_thread_num() * p.batch * p.width;
#pragma omp for schedule(static)
  for (Int mixture = 0; mixture < p.mixtures; mixture++) {
    S *to_weight = grad_weight + mixture * n * p.width, *to_bias = grad_bias + mixture * n;
    std::fill_n(to_bias, n, 0);
    for (Int first = 0; first < p.batch; first += SAMPLES) {
      const Int count = std::min(SAMPLES, p.batch - first);
      const S* h = hidden + first * p.width;
      find_logits(p, mixture, h, count, weight, bias, turned.data, z.data, length);
      for (Int i = 0; i < count; i++) {
        S* own = z.data + i * length;
        const S* g = grad + ((first + i) * p.mixtures + mixture) * p.cells;
        const S factor = 1 / (total(n, own) + S(eps)), scale = (1 - temperature) * factor;
        const S common = dot(p.cells, g, own) * factor * scale;
        for (Int k = 0; k < n; k++) {
          const S sign = (own[k] > 0) - (own[k] < 0);
          own[k] = (k < p.cells ? g[k] * scale : 0) - sign * common;
          to_bias[k] += own[k];
        }
      }
      multiply<S>(n, p.width, count, Left<S>{z.data, 1, length}, Right<S>{h, p.width}, to_weight, p.width,
                  first > 0 ? ADD : WRITE);
      multiply<S>(count, p.width, n, Left<S>{z.data, length, 1}, Right<S>{weight + mixture * n * p.width, p.width},
                  added + first * p.width, p.width, ADD);
    }
  }
}

}  // namespace

#define EXPORT(T)                                                                                                   \
  extern "C" void mean_##T(const Attention& p, Int threads, const T* x, Sum<T>* means) {                            \
    const Buffer<Sum<T>> sums(p.room());                                                                            \
    _Pragma("omp parallel num_threads(threads)") pool(p, x, sums.data, means);                                      \
  }                                                                                                                 \
  /* Without β, of a folded layer. */                                                                               \
  extern "C" void attention_##T(const Attention& p, double norm_eps, double eps, Int threads, const T* x,           \
                                const Sum<T>* weight1, const Sum<T>* bias1, const Sum<T>* mean,                     \
                                const Sum<T>* variance, const Sum<T>* scale, const Sum<T>* shift,                   \
                                const Sum<T>* weight2, const Sum<T>* bias2, const Sum<T>* assignment,               \
                                const Sum<T>* temperature, Sum<T>* alpha) {                                         \
    const Buffer<Sum<T>> sums(p.room()), means(p.batch * p.channels), hidden(p.batch * p.width);                    \
    _Pragma("omp parallel num_threads(threads)") {                                                                  \
      pool(p, x, sums.data, means.data);                                                                            \
      find_hidden(p, norm_eps, means.data, weight1, bias1, mean, variance, scale, shift, hidden.data);              \
      if (assignment)                                                                                               \
        find_coefficients(p, eps, hidden.data, weight2, bias2, assignment, *temperature, alpha);                    \
      else                                                                                                          \
        find_folded(p, eps, hidden.data, weight2, bias2, alpha);                                                    \
    }                                                                                                               \
  }
EXPORT(float)
EXPORT(double)
EXPORT(bfloat16)

#define EXPORT_COEFFICIENTS(S)                                                                                      \
  extern "C" void coefficients_##S(const Attention& p, double eps, Int threads, const S* hidden, const S* weight,   \
                                   const S* bias, const S* assignment, const S* temperature, S* alpha) {            \
    _Pragma("omp parallel num_threads(threads)")                                                                    \
        find_coefficients(p, eps, hidden, weight, bias, assignment, *temperature, alpha);                           \
  }                                                                                                                 \
  extern "C" void coefficients_gradients_##S(const Attention& p, double eps, Int threads, const S* grad,            \
                                             const S* hidden, const S* weight, const S* bias, const S* temperature, \
                                             S* grad_hidden, S* grad_weight, S* grad_bias) {                        \
    _Pragma("omp parallel num_threads(threads)")                                                                    \
        find_gradients(p, eps, grad, hidden, weight, bias, *temperature, grad_hidden, grad_weight, grad_bias);      \
  }
EXPORT_COEFFICIENTS(float)
EXPORT_COEFFICIENTS(double)
