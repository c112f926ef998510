// Tiles of a bank of whole kernels, the experts (n, rows, channels, taps): read and written by tap, as the gradients
// use kernels, and mixed. α has one part for all taps, or one for each.
#pragma once

#include "mixing.h"

namespace {

// The experts' rows and channels of a tile, (n, taps, rows, channels), with taps `size` values apart.
template <typename T>
void read_experts(const Problem& p, const T* bank, Int row, Int rows, Int channel, Int channels, T* tile, Int size) {
  const Int taps = p.parts();
  for (Int k = 0; k < p.cells; k++)
    for (Int r = 0; r < rows; r++)
      transpose<T>(channels, taps, bank + ((k * p.cout + row + r) * p.cin + channel) * taps, taps,
                   tile + k * taps * size + r * channels, size, channels);
}

// The inverse.
template <typename T>
void write_experts(const Problem& p, const T* tile, Int row, Int rows, Int channel, Int channels, T* bank, Int size) {
  const Int taps = p.parts();
  for (Int k = 0; k < p.cells; k++)
    for (Int r = 0; r < rows; r++)
      transpose<T>(taps, channels, tile + k * taps * size + r * channels, size,
                   bank + ((k * p.cout + row + r) * p.cin + channel) * taps, taps, taps);
}

// Kernels (count, taps, rows, channels) of some samples, of such a tile.
template <typename T>
void mix_tile(const Problem& p, const T* alpha, const T* tile, Int sample, Int count, T* kernels, Int size) {
  const Int taps = p.parts(), parts = p.expert_parts, columns = parts == 1 ? taps * size : size;
  for (Int part = 0; part < parts; part++)
    multiply<T>(count, columns, p.cells, {alpha + (sample * parts + part) * p.cells, parts * p.cells, 1},
                {tile + part * size, taps * size}, kernels + part * size, taps * size, WRITE);
}

template <typename T>
T dot(const T* a, const T* b, Int count) {
  constexpr Int L = LANES<T>;
  Vector<T, L> sums[2] = {};
  Int i = 0;
  for (; i + 2 * L <= count; i += 2 * L) {
    sums[0] += load<L>(a + i) * load<L>(b + i);
    sums[1] += load<L>(a + i + L) * load<L>(b + i + L);
  }
  sums[0] += sums[1];
  T sum{};
  for (Int k = 0; k < L; k++) sum += sums[0][k];
  for (; i < count; i++) sum += a[i] * b[i];
  return sum;
}

// The adjoint of mixing: from gradients of kernels as `mix_tile` makes them to those of α (samples, parts, `padded`),
// which are added to, and of the tile.
template <typename T>
void unmix_tile(const Problem& p, const T* alpha, const T* tile, const T* kernels, Int sample, Int count, Int values,
                Int size, Store how, T* grad_alpha, Int padded, T* grad_tile) {
  const Int taps = p.parts(), parts = p.expert_parts, columns = parts == 1 ? taps * size : size;
  for (Int i = 0; i < count; i++)
    for (Int tap = 0; tap < taps; tap++)
      for (Int k = 0; k < p.cells; k++)
        grad_alpha[((sample + i) * parts + (parts == 1 ? 0 : tap)) * padded + k] +=
            dot(kernels + (i * taps + tap) * size, tile + (k * taps + tap) * size, values);
  for (Int part = 0; part < parts; part++)
    multiply<T>(p.cells, columns, count, {alpha + (sample * parts + part) * p.cells, 1, parts * p.cells},
                {kernels + part * size, taps * size}, grad_tile + part * size, taps * size, how);
}

}  // namespace
