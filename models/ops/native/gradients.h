// The gradients of mixing, on a CPU: of the coefficients and the cells of kernels that a convolution was done with.
//
// Gradients of kernels exist for a few rows and channels at a time, as the kernels do in `convolution.cpp`.
#pragma once

#include <omp.h>

#include <cmath>

#include "axis.h"
#include "mixing.h"

namespace {

constexpr Int GRADIENTS = 384 << 10;  // bytes for a thread's gradients of kernels
constexpr Int GATHERED = 640 << 10;  // bytes of an image's rows that are brought together
constexpr Int PIXELS = 128;  // that are summed over at once, and stay in the first-level cache for all rows

// Memory for `correlate`.
template <typename T>
struct Correlating {
  bool gathered;  // whether rows of what pixels have received are brought together: they lie far apart otherwise
  Buffer<Term> terms;
  Buffer<Word<T>> grad, x, line;  // words of neighbouring pixels of a line
  Buffer<Sum<T>> sums, turned;

  Correlating(const Lines& lines, Int rows, Int channels)
      : gathered(PAIRED<T> || lines.count * lines.width.count * round_up(rows) * Int(sizeof(T)) <= GATHERED),
        terms(PIXELS), grad(gathered ? length(lines) * round_up(rows) : 0),
        x(PAIRED<T> ? 2 * PIXELS * round_up(channels) : 0),
        line(PAIRED<T> ? filled<T>(lines.width.count) * round_up(rows) : 0), sums(PAIRED<T> ? rows * channels : 0),
        turned(channels * round_up(rows)) {
    if (PAIRED<T>) std::fill_n(grad.data, length(lines) * round_up(rows), Word<T>(0));
  }

  // Of what a row has received from all pixels, in words; in pairs it is followed by zeros.
  static Int length(const Lines& lines) {
    return lines.count * words<T>(lines.width.count) + (PAIRED<T> ? 2 * ROUND : 0);
  }
};

// Bring rows together that lie far apart.
template <typename T>
void gather(Int rows, Int columns, const T* from, Int row, T* to, Int to_row) {
  for (Int i = 0; i < rows; i++, from += row, to += to_row) {
    ask_for<0>(from + AHEAD * row, 1, 0, columns);
    std::copy_n(from, columns, to);
  }
}

// Part of the pixels of an output: some lines of them from (depth, height) on, in each those from `first` to `last`.
struct Patch {
  Int depth, height, lines, first, last;
  Int pixels() const { return last - first; }
};

// Visit the patches that read through a tap; words of two pixels begin at even ones, and may reach beyond the tap.
template <typename T, typename Visit>
void for_patches(const Lines& lines, const Tap& d, const Tap& h, const Tap& w, Visit visit) {
  const Int begin = PAIRED<T> ? 0 : w.first, end = PAIRED<T> ? lines.width.count : w.last;
  const Int together = std::max<Int>(PIXELS / (end - begin + 1), 1);
  for (Int i = d.first; i < d.last; i++)
    for (Int j = h.first; j < h.last; j += together)
      for (Int first = begin; first < end; first += PIXELS)
        visit(Patch{i, j, std::min(together, h.last - j), first, std::min(first + PIXELS, end)});
}

// The gradients (parts, rows, channels), `size` values apart, of the kernels of one sample and block of outputs; where
// they are `turned`, neighbouring rows are in a register.
template <typename T>
void correlate(const Problem& p, const Lines& lines, const T* x, const T* grad, Int rows, Int channels, T* kernels,
               Int size, bool turned, const Correlating<T>& room) {
  const Axis &depth = lines.depth, &height = lines.height, &width = lines.width;
  const Int row_step = p.channels_out(), channel_step = p.pixel_step();
  const Int row_length = round_up(rows), length = round_up(channels), line = words<T>(width.count);
  // In tiles, the words that a row has received lie together; else the rows that a word belongs to.
  const Int along = tiled<T>() ? 1 : row_length, across = tiled<T>() ? room.length(lines) : 1;
  if (depth.taps * height.taps * width.taps * p.blocks_in < p.parts()) std::fill_n(kernels, p.parts() * size, T{});
  for (Int i = 0; i < lines.count && room.gathered; i++) {
    const T* from = grad + i * width.count * row_step;
    Word<T>* to = &room.grad[i * line * along];
    if constexpr (PAIRED<T>) {
      const Right<T> received = right_factor<T>(width.count, rows, from, row_step, tiled<T>() ? room.line.data : to);
      if (tiled<T>()) transpose(line, rows, received.data, received.inner, to, across, round_up(line));
    } else {
      gather(width.count, rows, from, row_step, to, row_length);
    }
  }
  const Word<T>* all = room.gathered ? room.grad.data : (const Word<T>*)grad;
  const Int step = room.gathered ? row_length : row_step;
  lines.for_taps(depth.all(), height.all(), width.all(), [&](const Tap& d, const Tap& h, const Tap& w) {
    for (Int block = 0; block < p.blocks_in; block++) {
      T* kernel = kernels + (lines.number(d, h, w) * p.blocks_in + block) * size;
      const T* in = x + lines.ahead(d, h, w) * p.channels_in() + block * p.cin;
      Store how = WRITE;
      // Sums over `terms` of products of what pixels have received and what they read.
      const auto sum = [&](Terms terms, Left<T> received, Right<T> grads, Left<T> seen, Right<T> read, auto* out) {
        if (turned) {
          multiply<T>(channels, rows, terms, seen, grads, room.turned.data, row_length, how);
        } else {
          multiply<T>(rows, channels, terms, received, read, out, channels, how);
        }
        how = ADD;
      };
      for_patches<T>(lines, d, h, w, [&](const Patch& patch) {
        if constexpr (PAIRED<T>) {
          Word<T>* to = room.x.data;
          for (Int k = patch.height; k < patch.height + patch.lines; k++) {
            const T* from = in + lines.read(patch.depth, k, 0) * p.channels_in();
            const auto pixel = [&](Int n) { return n >= w.first && n < w.last ? from + n * channel_step : nullptr; };
            for (Int n = patch.first; n < patch.last; n += 2, to += length)
              pair_rows(channels, pixel(n), pixel(n + 1), to);
          }
          const Int number = (patch.depth * height.count + patch.height) * line + patch.first / 2;
          const Word<T>* received = all + number * along;
          const Int seen = (to - room.x.data) / length, summed = filled<T>(seen * Arithmetic<T>::values);
          std::fill_n(to, (summed - seen) * length, 0);
          sum({WHOLE, 1, summed}, {received, across, along}, {received, row_length}, {room.x.data, 1, length},
              {room.x.data, length}, room.sums.data);
        } else {
          for (Int k = 0; k < patch.lines; k++) {
            const Int received = lines.pixel(patch.depth, patch.height + k, patch.first) * step;
            const Int read = lines.read(patch.depth, patch.height + k, patch.first) * p.channels_in();
            room.terms[k] = turned ? Term{read, received} : Term{received, read};
          }
          sum({room.terms.data, patch.lines, patch.pixels()}, {all, 1, step},
              {all, step}, {in, 1, channel_step}, {in, channel_step}, kernel);
        }
      });
      if constexpr (PAIRED<T>) {
        if (turned) transpose(channels, rows, room.turned.data, row_length, room.sums.data, channels, channels);
        round_rows(rows, channels, room.sums.data, channels, kernel, channels);
      } else if (turned) {
        transpose<T>(channels, rows, room.turned.data, row_length, kernel, channels, channels);
      }
    }
  });
}

// Those of the cells are written, or added to what is there already.
template <typename T>
void gradients_of_mixing(const Problem& p, bool add, Int threads, const T* alpha, const Sum<T>* cells, const T* x,
                         const T* grad, Sum<T>* grad_alpha, Sum<T>* grad_cells) {
  const Lines lines(p);
  const Int parts = p.parts(), units = p.units(), padded = round_up(p.cells);
  const Parts all_channels = {p.cin, ceil_div(p.cin, SPAN<T>), LANES<T>};
  const Int channel_parts = all_channels.count, most = all_channels.most();
  const bool turned = !tiled<T>() && p.cin < 2 * LANES<T> && p.cin < p.cout;  // registers would hold few channels
  // Of fewer units more rows fit, so that images are read less often, but cells more often. Both cost about the same
  // for a `fair` number of units.
  const double fair = std::sqrt(3. * p.cells * GRADIENTS / sizeof(T) / (double(most) * parts * p.pixels()));
  const Int fitting_units = std::max<Int>(most_mixtures<T>() / parts, 1);
  const Int wanted = PAIRED<T> ? fitting_units : std::min<Int>(fitting_units, std::max(fair + 0.5, 1.0));
  const Int together = ceil_div(units, ceil_div(units, wanted));
  const Int fitting = GRADIENTS / Int(sizeof(T)) / (together * parts * most) / TALL;
  const Int tall = std::max<Int>(fitting, 3) * TALL;
  const Int row_parts = std::max(ceil_div(p.cout, turned ? STRIP<T> : tall),
                                 std::min(p.cout, ceil_div(threads, channel_parts)));
  const Parts all_rows = {p.cout, row_parts, turned ? LANES<T> : 1};
  const Int most_rows = all_rows.most();
  const bool far = p.cells * p.cout * p.cin * Int(sizeof(Sum<T>)) > FAR;
  const bool aligned = p.cin % LANES<T> == 0 && (uintptr_t)grad_cells % REGISTER == 0;
  const Coefficients<T> coefficients(alpha, units * parts, p.cells);
#pragma omp parallel num_threads(threads)
  {
    const Tiles tiles;
    Buffer<T> kernels(together * parts * (most_rows * most + PAD));
    const Correlating<T> correlating(lines, most_rows, most);
    const Unmixing<T> unmixing(p, together * parts, most);
    Sum<T>* own_alpha = grad_alpha + omp_get_thread_num() * units * parts * padded;
    // Not dynamic: what is summed in which thread, and so the last digits, should be the same every time.
#pragma omp for collapse(2) schedule(static)
    for (Int row_part = 0; row_part < row_parts; row_part++)
      for (Int channel_part = 0; channel_part < channel_parts; channel_part++) {
        const Int row = all_rows.begin(row_part), rows = all_rows.size(row_part);
        const Int channel = all_channels.begin(channel_part), channels = all_channels.size(channel_part);
        const Int size = rows * channels + PAD;
        for (Int first = 0; first < units; first += together) {
          const Int count = std::min(together, units - first);
          for (Int unit = first; unit < first + count; unit++) {
            const T* in = x + unit / p.blocks_out * p.image_in() + channel;
            const T* received = grad + unit / p.blocks_out * p.image_out() + unit % p.blocks_out * p.cout + row;
            correlate<T>(p, lines, in, received, rows, channels, &kernels[(unit - first) * parts * size], size, turned,
                         correlating);
          }
          const Int mixture = first * parts, at = row * p.cells * p.cin + channel;
          const Store how = add || first > 0 ? ADD : far && aligned ? STREAM : WRITE;
          unmix<T>(p, coefficients.data + mixture * coefficients.row, coefficients.row, cells + at, kernels.data,
                   count * parts, rows, channels, size, how, unmixing, own_alpha + mixture * padded, grad_cells + at);
        }
      }
    fence();
  }
}

}  // namespace
