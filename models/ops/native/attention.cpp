// Means over space, the coefficients of mixtures that an attention makes of them, and their gradients.

#include <omp.h>

#include <cmath>

#include "attention.h"
#include "bfloat16.h"

namespace {

constexpr Int SAMPLES = 16;  // whose logits of one mixture are computed at once
constexpr Int COLUMNS = 64;  // channels for which gradients of weights are computed at once

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

// h = ReLU(Norm(W x + b)) for the means x, where b may be null. The mean and the variance (2, width) that it is
// normalised by are given, or are those of the batch, which are written to `found`, the variance without bias.
template <typename S>
void find_hidden(const Attention& p, double eps, const S* weight, const S* bias, const S* mean, const S* variance,
                 const S* scale, const S* shift, const Trace<S>& trace, S* found) {
#pragma omp for schedule(static)
  for (Int j = 0; j < p.width; j++) {
    S* values = trace.normal + j;
    for (Int at = 0, image = 0; image < p.batch; image++, at += p.width)
      values[at] = dot(p.channels, trace.means + image * p.channels, weight + j * p.channels) + (bias ? bias[j] : 0);
    if (p.norm == OWN) continue;
    S centre, spread = 0;
    if (p.norm == OF_BATCH) {
      S sum = 0;
      for (Int at = 0; at < p.batch * p.width; at += p.width) sum += values[at];
      centre = sum / p.batch;
      for (Int at = 0; at < p.batch * p.width; at += p.width) spread += (values[at] - centre) * (values[at] - centre);
      found[j] = centre;
      found[p.width + j] = spread / (p.batch - 1);
      spread /= p.batch;
    } else {
      centre = mean[j];
      spread = variance[j];
    }
    const S inverse = trace.inverse[j] = 1 / std::sqrt(spread + S(eps));
    for (Int at = 0; at < p.batch * p.width; at += p.width) {
      values[at] = (values[at] - centre) * inverse;
      trace.hidden[at + j] = std::max<S>(values[at] * scale[j] + shift[j], 0);
    }
  }
  if (p.norm != OWN) return;
#pragma omp for schedule(static)
  for (Int image = 0; image < p.batch; image++) {
    S *values = trace.normal + image * p.width, *h = trace.hidden + image * p.width;
    const S centre = sum<S>(p.width, [=](auto lanes, Int i) { return load<lanes>(values + i); }) / p.width;
    for (Int j = 0; j < p.width; j++) values[j] -= centre;
    const S inverse = trace.inverse[image] = 1 / std::sqrt(dot(p.width, values, values) / p.width + S(eps));
    for (Int j = 0; j < p.width; j++) h[j] = std::max<S>((values[j] *= inverse) * scale[j] + shift[j], 0);
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

// Gradients of h, to which all mixtures add, of weights and biases, given that of α. Each thread adds up its own
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

// The gradients of means, one for each pixel, and of what h is found with, given those of h that threads have summed.
template <typename S>
void find_hidden_gradients(const Attention& p, Int threads, const S* grad_hidden, const Trace<S>& trace,
                           const S* weight, const S* scale, S* received, S* each, S* grad_weight, S* grad_bias,
                           S* grad_scale, S* grad_shift) {
  const Int size = p.batch * p.width;
#pragma omp for schedule(static)
  for (Int j = 0; j < p.width; j++) {
    S total = 0, along = 0;
    for (Int at = j; at < size; at += p.width) {
      S grad = 0;
      if (!(trace.hidden[at] <= 0))
        for (Int thread = 0; thread < threads; thread++) grad += grad_hidden[thread * size + at];
      total += grad;
      along += grad * trace.normal[at];
      received[at] = grad * scale[j];
    }
    grad_shift[j] = total;
    grad_scale[j] = along;
    if (p.norm == OWN) continue;
    const S common = p.norm == OF_BATCH ? scale[j] / p.batch : 0, inverse = trace.inverse[j];
    for (Int at = j; at < size; at += p.width)
      received[at] = (received[at] - common * (total + trace.normal[at] * along)) * inverse;
  }
  if (p.norm == OWN) {
#pragma omp for schedule(static)
    for (Int image = 0; image < p.batch; image++) {
      S* own = received + image * p.width;
      const S *normal = trace.normal + image * p.width, along = dot(p.width, own, normal) / p.width;
      const S mean = sum<S>(p.width, [=](auto lanes, Int i) { return load<lanes>(own + i); }) / p.width;
      for (Int j = 0; j < p.width; j++) own[j] = (own[j] - mean - normal[j] * along) * trace.inverse[image];
    }
  }
  if (grad_bias) {
#pragma omp for schedule(static)
    for (Int j = 0; j < p.width; j++) {
      grad_bias[j] = 0;
      for (Int at = j; at < size; at += p.width) grad_bias[j] += received[at];
    }
  }
#pragma omp for schedule(static)
  for (Int first = 0; first < p.channels; first += COLUMNS) {
    const Int columns = std::min(COLUMNS, p.channels - first);
    multiply<S>(p.width, columns, p.batch, Left<S>{received, 1, p.width}, Right<S>{trace.means + first, p.channels},
                grad_weight + first, p.channels, WRITE);
    multiply<S>(p.batch, columns, p.width, Left<S>{received, p.width, 1}, Right<S>{weight + first, p.channels},
                each + first, p.channels, WRITE);
    for (Int image = 0; image < p.batch; image++)
      for (Int i = 0; i < columns; i++) each[image * p.channels + first + i] /= p.pixels;
  }
}

}  // namespace

#define EXPORT(T)                                                                                                   \
  extern "C" void mean_##T(const Attention& p, Int threads, const T* x, Sum<T>* means) {                            \
    const Buffer<Sum<T>> sums(p.room());                                                                            \
    _Pragma("omp parallel num_threads(threads)") pool(p, x, sums.data, means);                                      \
  }                                                                                                                 \
  /* Without β, of a folded layer. */                                                                               \
  extern "C" void attention_traced_##T(const Attention& p, double norm_eps, double eps, Int threads, const T* x,    \
                                       const Sum<T>* weight1, const Sum<T>* bias1, const Sum<T>* mean,              \
                                       const Sum<T>* variance, const Sum<T>* scale, const Sum<T>* shift,            \
                                       const Sum<T>* weight2, const Sum<T>* bias2, const Sum<T>* assignment,        \
                                       const Sum<T>* temperature, Sum<T>* alpha, Sum<T>* room, Sum<T>* found) {     \
    const Buffer<Sum<T>> sums(p.room());                                                                            \
    const Trace<Sum<T>> trace(p, room);                                                                             \
    if (temperature) *trace.temperature = *temperature;                                                             \
    _Pragma("omp parallel num_threads(threads)") {                                                                  \
      pool(p, x, sums.data, trace.means);                                                                           \
      find_hidden(p, norm_eps, weight1, bias1, mean, variance, scale, shift, trace, found);                         \
      if (assignment)                                                                                               \
        find_coefficients(p, eps, trace.hidden, weight2, bias2, assignment, *temperature, alpha);                   \
      else                                                                                                          \
        find_folded(p, eps, trace.hidden, weight2, bias2, alpha);                                                   \
    }                                                                                                               \
  }                                                                                                                 \
  extern "C" void attention_##T(const Attention& p, double norm_eps, double eps, Int threads, const T* x,           \
                                const Sum<T>* weight1, const Sum<T>* bias1, const Sum<T>* mean,                     \
                                const Sum<T>* variance, const Sum<T>* scale, const Sum<T>* shift,                   \
                                const Sum<T>* weight2, const Sum<T>* bias2, const Sum<T>* assignment,               \
                                const Sum<T>* temperature, Sum<T>* alpha) {                                         \
    const Buffer<Sum<T>> room(p.trace());                                                                           \
    attention_traced_##T(p, norm_eps, eps, threads, x, weight1, bias1, mean, variance, scale, shift, weight2,       \
                         bias2, assignment, temperature, alpha, room.data, nullptr);                                \
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
  }                                                                                                                 \
  extern "C" void attention_gradients_##S(const Attention& p, double eps, Int threads, const S* grad, S* room,      \
                                          const S* weight1, const S* scale, const S* weight2, const S* bias2,       \
                                          S* each, S* grad_weight1, S* grad_bias1, S* grad_scale, S* grad_shift,    \
                                          S* grad_weight2, S* grad_bias2) {                                         \
    const Int size = p.batch * p.width;                                                                             \
    const Buffer<S> grad_hidden(threads * size), received(size);                                                    \
    const Trace<S> trace(p, room);                                                                                  \
    std::fill_n(grad_hidden.data, threads * size, 0);                                                               \
    _Pragma("omp parallel num_threads(threads)") {                                                                  \
      find_gradients(p, eps, grad, trace.hidden, weight2, bias2, *trace.temperature, grad_hidden.data,              \
                     grad_weight2, grad_bias2);                                                                     \
      find_hidden_gradients(p, threads, grad_hidden.data, trace, weight1, scale, received.data, each,               \
                            grad_weight1, grad_bias1, grad_scale, grad_shift);                                      \
    }                                                                                                               \
  }
EXPORT_COEFFICIENTS(float)
EXPORT_COEFFICIENTS(double)
