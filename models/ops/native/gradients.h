// The gradients of mixing, on a CPU: of the coefficients and the cells of kernels that a convolution was done with.
//
// Gradients of kernels exist for a few rows and channels at a time, as the kernels do in `convolution.cpp`.
#pragma once

#include <omp.h>

#include "axis.h"
#include "mixing.h"

namespace {

constexpr Int PIXEL_WORDS = 64;  // words of pixels that are put together at once

// Memory for `correlate`.
template <typename T>
struct Correlating {
  Buffer<Term> terms;
  Buffer<Word<T>> grad, x;  // words of neighbouring pixels of a line
  Buffer<Sum<T>> sums, turned;

  Correlating(const Lines& lines, Int rows, Int channels)
      : terms(lines.count), grad(PAIRED<T> ? lines.count * words<T>(lines.width.count) * round_up(rows) : 0),
        x(PAIRED<T> ? (words<T>(lines.width.count) + PIXEL_WORDS) * round_up(channels) : 0),
        sums(PAIRED<T> ? rows * channels : 0), turned(channels * round_up(rows)) {}
};

#if defined(__AVX512BF16__)
// One tap of `correlate`, with `in` what the first pixel reads through it: words of the pixels of a few lines at a time.
inline void correlate_pairs(const Problem& p, const Lines& lines, const Tap& d, const Tap& h, const Tap& w,
                            const bfloat16* in, Int rows, Int channels, bfloat16* kernel, bool turned,
                            const Correlating<bfloat16>& room) {
  const Int pixels = lines.width.count, line = words<bfloat16>(pixels), step = p.pixel_step();
  const Int together = std::max<Int>(PIXEL_WORDS / line, 1), piece = together > 1 ? pixels : 2 * PIXEL_WORDS;
  const Int row_length = round_up(rows), length = round_up(channels);
  bool add = false;
  for (Int i = d.first; i < d.last; i++)
    for (Int j = h.first; j < h.last; j += together)
      for (Int first = 0; first < pixels; first += piece) {
        const Int last = std::min(first + piece, pixels), few = std::min(together, h.last - j);
        uint32_t* read = room.x.data;
        for (Int k = j; k < j + few; k++) {
          const bfloat16* from = in + lines.read(i, k, 0) * p.channels_in();
          const auto pixel = [&](Int n) { return n >= w.first && n < w.last ? from + n * step : nullptr; };
          for (Int n = first; n < last; n += 2, read += length) pair_rows(channels, pixel(n), pixel(n + 1), read);
        }
        const uint32_t* received = &room.grad[((i * lines.height.count + j) * line + first / 2) * row_length];
        const Int inner = (read - room.x.data) / length;
        if (turned) {
          multiply<bfloat16>(channels, rows, inner, {room.x.data, 1, length}, {received, row_length}, room.turned.data,
                             row_length, add);
        } else {
          multiply<bfloat16>(rows, channels, inner, {received, 1, row_length}, {room.x.data, length}, room.sums.data,
                             channels, add);
        }
        add = true;
      }
  if (turned) transpose(channels, rows, room.turned.data, row_length, room.sums.data, channels, channels);
  round_rows(rows, channels, room.sums.data, channels, kernel, channels);
}
#endif

// The gradients (parts, rows, channels), `size` values apart, of the kernels of one sample and block of outputs;
// to `turn` them is to put neighbouring rows into a register.
template <typename T>
void correlate(const Problem& p, const Lines& lines, const T* x, const T* grad, Int rows, Int channels, T* kernels,
               Int size, bool turned, const Correlating<T>& room) {
  const Axis &depth = lines.depth, &height = lines.height, &width = lines.width;
  const Int row_step = p.channels_out(), channel_step = p.pixel_step();
  if (depth.taps * height.taps * width.taps * p.blocks_in < p.parts()) std::fill_n(kernels, p.parts() * size, T{});
  if constexpr (PAIRED<T>) {
    const Int row_length = round_up(rows), line = words<T>(width.count);
    for (Int i = 0; i < lines.count; i++)
      right_factor<T>(width.count, rows, grad + i * width.count * row_step, row_step, &room.grad[i * line * row_length]);
  }
  lines.for_taps(depth.all(), height.all(), width.all(), [&](const Tap& d, const Tap& h, const Tap& w) {
    for (Int block = 0; block < p.blocks_in; block++) {
      T* kernel = kernels + (lines.number(d, h, w) * p.blocks_in + block) * size;
      const T* in = x + lines.ahead(d, h, w) * p.channels_in() + block * p.cin;
      if constexpr (PAIRED<T>) {
        correlate_pairs(p, lines, d, h, w, in, rows, channels, kernel, turned, room);
      } else {
        Terms pixels = {room.terms.data, 0, w.last - w.first};
        for (Int i = d.first; i < d.last; i++)
          for (Int j = h.first; j < h.last; j++) {
            const Int received = lines.pixel(i, j, w.first) * row_step;
            const Int read = lines.read(i, j, w.first) * p.channels_in();
            room.terms[pixels.count++] = turned ? Term{read, received} : Term{received, read};
          }
        if (turned) {
          multiply<T>(channels, rows, pixels, {in, 1, channel_step}, {grad, row_step}, room.turned.data, round_up(rows),
                      false);
          transpose<T>(channels, rows, room.turned.data, round_up(rows), kernel, channels, channels);
        } else {
          multiply<T>(rows, channels, pixels, {grad, 1, row_step}, {in, channel_step}, kernel, channels, false);
        }
      }
    }
  });
}

template <typename T>
void gradients_of_mixing(const Problem& p, Int threads, const T* alpha, const Sum<T>* cells, const T* x, const T* grad,
                         Sum<T>* grad_alpha, Sum<T>* grad_cells) {
  const Lines lines(p);
  const Int parts = p.parts(), units = p.units(), padded = round_up(p.cells);
  const Parts all_channels = {p.cin, ceil_div(p.cin, STRIP<T>), LANES<T>};
  const Int channel_parts = all_channels.count, most = all_channels.most(), length = words<T>(p.cells);
  const bool turned = p.cin < 2 * LANES<T> && p.cin < p.cout;  // registers would hold few channels
  const Int row_parts = std::max(ceil_div(p.cout, turned ? STRIP<T> : 3 * TALL * Arithmetic<T>::values),
                                 std::min(p.cout, ceil_div(threads, channel_parts)));
  const Parts all_rows = {p.cout, row_parts, turned ? LANES<T> : 1};
  const Int together = ceil_div(units, ceil_div(units * parts, MIXTURES<T>)), most_rows = all_rows.most();
#pragma omp parallel num_threads(threads)
  {
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
          unmix<T>(p, alpha + mixture * length * Arithmetic<T>::values, cells + at, kernels.data, count * parts, rows,
                   channels, size, first > 0, unmixing, own_alpha + mixture * padded, grad_cells + at);
        }
      }
  }
}

}  // namespace
