// Mixing kernels from a bank, a few rows and channels at a time, and its adjoint.
#pragma once

#include "problem.h"

namespace {

constexpr Int MIXTURES = 80;  // that a row of the cells is read for: it stays in a cache
constexpr Int FAR = 8 << 20;  // bytes that are too many to be in a cache when they are read again
constexpr Int PAD = 16;  // between kernels: at powers of two they would share few lines of the caches

template <typename T>
constexpr Int STRIP = WIDE * LANES<T>;  // columns of a product that are computed together
template <typename T>
constexpr Int SPAN = 2 * STRIP<T>;  // channels of cells in far memory that are read together

// Kernels (count · parts, rows, channels) of some units, `size` values apart, of cells (rows, n, cin) that all parts
// share: W = Σ α e. The next cells are prefetched while those before are mixed.
template <typename T>
void mix_shared(const Problem& p, const T* alpha, const T* cells, Int unit, Int count, Int row, Int rows, Int channel,
                Int channels, T* out, Int size) {
  const Int mixtures = count * p.parts();
  const Left<T> a = {alpha + unit * p.parts() * p.cells, p.cells, 1};
  for (Int r = row; r < row + rows; r++, out += channels) {
    const T* own = cells + r * p.cells * p.cin + channel;
    for (Int from = 0; from < channels; from += STRIP<T>) {
      const Int columns = std::min(STRIP<T>, channels - from);
      const T *first = own + from, *next = from + columns < channels ? first + columns : own + p.cells * p.cin;
      multiply<T>(mixtures, columns, p.cells, a, {first, p.cin}, out + from, size, WRITE,
                  {next, p.cells, p.cin, columns});
    }
  }
}

// The same where each part has a bank of its own: (rows, n, parts, cin).
template <typename T>
void mix_own(const Problem& p, const T* alpha, const T* bank, Int unit, Int count, Int row, Int rows, Int channel,
             Int channels, T* out, Int size) {
  const Int parts = p.parts();
  for (Int r = row; r < row + rows; r++, out += channels)
    for (Int part = 0; part < parts; part++) {
      const Int mixture = (unit * p.row_blocks + r * p.row_blocks / p.cout) * parts + part;
      const Left<T> a = {alpha + mixture * p.cells, p.row_blocks * parts * p.cells, 1};
      const T *first = bank + (r * p.cells * parts + part) * p.cin + channel, *next_part = first + p.cin;
      if (part == parts - 1) next_part += (p.cells - 1) * parts * p.cin;
      for (Int from = 0; from < channels; from += STRIP<T>) {
        const Int columns = std::min(STRIP<T>, channels - from);
        const T* next = from + columns < channels ? first + from + columns : next_part;
        multiply<T>(count, columns, p.cells, a, {first + from, parts * p.cin}, out + part * size + from, parts * size,
                    WRITE, {next, p.cells, parts * p.cin, columns});
      }
    }
}

// One row of a kernel, `columns` values, of n experts' rows `step` apart; the coefficients (n, period) repeat.
template <typename T>
void mix_row(Int columns, Int n, Int step, Int period, const T* alpha, const T* experts, T* out) {
  for (Int from = 0, at = 0; from < columns; from += LANES<T>, at = at + LANES<T> < period ? at + LANES<T> : 0) {
    const T *a = alpha + at, *e = experts + from;
    if (from + LANES<T> <= columns) {
      auto sum = load<LANES<T>>(a) * load<LANES<T>>(e);
      for (Int k = 1; k < n; k++) sum += load<LANES<T>>(a + k * period) * load<LANES<T>>(e + k * step);
      store(out + from, sum);
    } else {
      for (Int i = 0; i < columns - from; i++) {
        T sum{};
        for (Int k = 0; k < n; k++) sum += a[k * period + i] * e[k * step + i];
        out[from + i] = sum;
      }
    }
  }
}

// The same where the bank is n whole kernels, the experts (n, rows, cin, taps), and α is one for each of them, or one
// for each tap too. Kernels (count, rows, channels, taps) are `taps · size` apart.
template <typename T>
void mix_experts(const Problem& p, const T* alpha, const T* bank, Int unit, Int count, Int row, Int rows, Int channel,
                 Int channels, T* out, Int size) {
  const Int taps = p.parts(), columns = channels * taps, step = p.cout * p.cin * taps, period = taps * LANES<T>;
  const T* first = bank + (row * p.cin + channel) * taps;
  if (p.expert_parts == 1) {
    const Left<T> a = {alpha + unit * p.cells, p.cells, 1};
    for (Int r = 0; r < rows; r++, first += p.cin * taps, out += columns)
      for (Int from = 0; from < columns; from += STRIP<T>) {
        const Int strip = std::min(STRIP<T>, columns - from);
        const T* next = from + strip < columns ? first + from + strip : first + p.cin * taps;
        multiply<T>(count, strip, p.cells, a, {first + from, step}, out + from, taps * size, WRITE,
                    {next, p.cells, step, strip});
      }
    return;
  }
  Buffer<T> repeated(count * p.cells * period);
  for (Int i = 0; i < count; i++)
    for (Int k = 0; k < p.cells; k++)
      for (Int j = 0; j < period; j++)
        repeated[(i * p.cells + k) * period + j] = alpha[((unit + i) * taps + j % taps) * p.cells + k];
  for (Int r = 0; r < rows; r++, first += p.cin * taps, out += columns)
    for (Int i = 0; i < count; i++)
      mix_row<T>(columns, p.cells, step, period, &repeated[i * p.cells * period], first, out + i * taps * size);
}

template <typename T>
void mix(const Problem& p, const T* alpha, const T* bank, Int unit, Int count, Int row, Int rows, Int channel,
         Int channels, T* out, Int size) {
  if (p.expert_parts) return mix_experts<T>(p, alpha, bank, unit, count, row, rows, channel, channels, out, size);
  (p.row_blocks ? mix_own<T> : mix_shared<T>)(p, alpha, bank, unit, count, row, rows, channel, channels, out, size);
}

// Where each of `count` parts of a whole begins: at multiples of a unit.
struct Parts {
  Int total, count, unit;
  Int begin(Int part) const { return std::min(ceil_div(total, unit) * part / count * unit, total); }
  Int size(Int part) const { return begin(part + 1) - begin(part); }
  Int most() const { return std::min(ceil_div(ceil_div(total, unit), count) * unit, total); }
};

// Prefetch a matrix (rows, columns) that is to be written.
template <typename T>
void prefetch_to_write(const T* first, Int rows, Int row, Int columns) {
  for (Int i = 0; i < rows; i++)
    for (Int k = 0; k < columns; k += LINE<T>) __builtin_prefetch(first + i * row + k, 1, 2);
}

// The adjoint of mixing: from gradients of kernels (mixtures, rows, channels), `size` values apart, to those of α,
// which are added to, and of the cells. `coefficients` is room for α by cells, `turned` for cells by channels.
template <typename T>
void unmix(const Problem& p, const T* alpha, const T* cells, const T* kernels, Int mixtures, Int rows, Int channels,
           Int size, Store how, T* coefficients, T* turned, T* grad_alpha, T* grad_cells) {
  const Int padded = round_up(p.cells), row = p.cells * p.cin, together = 2 * TALL, length = round_up(mixtures);
  transpose(mixtures, p.cells, alpha, p.cells, coefficients, length, length);
  for (Int r = 0; r < rows; r++, kernels += channels, cells += row, grad_cells += row)
    for (Int cell = 0; cell < p.cells; cell += STRIP<T>) {
      const Int strip = std::min(STRIP<T>, p.cells - cell);
      const T* own = cells + cell * p.cin;
      for (Int i = 0; i < strip; i += together) {
        const Int few = std::min(together, strip - i), at = (cell + i) * p.cin;
        // Of the next row its cells are prefetched, and its gradients where they are written or added to.
        if (how == WRITE) prefetch_to_write(grad_cells + at + row, few, p.cin, channels);
        const Prefetch next((how == ADD ? grad_cells + at : own + i * p.cin) + row, few, p.cin, channels);
        multiply<T>(few, channels, mixtures, {coefficients + (cell + i) * length, length, 1}, {kernels, size},
                    grad_cells + at, p.cin, how, next);
      }
      transpose(strip, channels, own, p.cin, turned + cell, padded, padded - cell);
      multiply<T>(mixtures, std::min(STRIP<T>, padded - cell), channels, {kernels, size, 1}, {turned + cell, padded},
                  grad_alpha + cell, padded, ADD, how == ADD ? Prefetch(own + row, strip, p.cin, channels) : Prefetch());
    }
}

}  // namespace
