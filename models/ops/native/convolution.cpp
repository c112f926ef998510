// The convolution with mixed kernels, and its gradients, on a CPU.
//
// Kernels exist for a few rows and channels at a time, in the second-level cache: a thread mixes them from the cells,
// applies them at once to the input where it lies, and goes on to the next. Mixing, convolution and their adjoints are
// all the same small product, `multiply`.
//
// Images are channels last. "Units" are pairs (sample, block of output channels), "parts" pairs (tap, block of input
// channels); one unit and part are one mixture. `kernel_warehouse/native.py` says what the tensors hold.

#include <omp.h>

#include "problem.h"

namespace {

constexpr Int CACHE = 512 << 10;  // bytes for a thread's kernels
constexpr Int MIXTURES = 40;      // that a row of the cells is read for: it stays in the first-level cache meanwhile
constexpr Int FEW = 16;           // mixtures that are faster than memory
constexpr Int BLOCK = 16 << 10;   // bytes of cells that are asked for early
constexpr Int PAD = 16;           // between kernels: at powers of two they would share few lines of the caches

// Which outputs a tap gives something to, in one dimension: `count` from `first` on, which reads the input at `at`.
struct Span {
  Int first, count, at;
  Span(const Problem& p, Int dim, Int tap) {
    Int offset = tap * p.dilation[dim] - p.padding[dim];
    first = offset < 0 ? ceil_div(-offset, p.stride[dim]) : 0;
    Int last = offset < p.input[dim] ? (p.input[dim] - 1 - offset) / p.stride[dim] + 1 : 0;
    count = std::max<Int>(std::min(p.output[dim], last) - first, 0);
    at = first * p.stride[dim] + offset;
  }
};

struct Tap {
  Span depth, height, width;
  Tap(const Problem& p, Int tap)
      : depth(p, 0, tap / (p.taps[1] * p.taps[2])),
        height(p, 1, tap / p.taps[2] % p.taps[1]),
        width(p, 2, tap % p.taps[2]) {}
  bool covers(const Problem& p) const {
    return depth.count == p.output[0] && height.count == p.output[1] && width.count == p.output[2];
  }
};

struct Taps {
  const Int count;
  Buffer<Tap> taps;
  explicit Taps(const Problem& p) : count(p.parts() / p.blocks_in), taps(count) {
    for (Int tap = 0; tap < count; tap++) taps[tap] = Tap(p, tap);
  }
  const Tap& operator[](Int tap) const { return taps[tap]; }
};

// The same for one line of outputs, `at` being the number of the pixel.
struct Read {
  Int first, count, at;
  Read(const Problem& p, const Tap& tap, Int line) : first(tap.width.first), count(tap.width.count) {
    Int d = line / p.output[1] - tap.depth.first, h = line % p.output[1] - tap.height.first;
    if (d < 0 || d >= tap.depth.count || h < 0 || h >= tap.height.count) count = 0;
    at = ((tap.depth.at + d * p.stride[0]) * p.input[1] + tap.height.at + h * p.stride[1]) * p.input[2] + tap.width.at;
  }
};

// Kernels (count · parts, rows, channels) of some units, `size` values apart. Where few mixtures are made of a cell, a
// block of cells is asked for while the one before is mixed: strips of columns would ask for them too late.
template <typename T>
void mix_shared(const Problem& p, const T* alpha, const T* cells, Int unit, Int count, Int row, Int rows, Int channel,
                Int channels, T* out, Int size) {
  const Int mixtures = count * p.parts();
  const Int block = std::min(p.cells, mixtures > FEW ? p.cells : std::max<Int>(BLOCK / Int(sizeof(T)) / channels, 16));
  alpha += unit * p.parts() * p.cells;
  for (Int r = row; r < row + rows; r++, out += channels)
    for (Int cell = 0; cell < p.cells; cell += block) {
      const Int depth = std::min(block, p.cells - cell);
      const T *first = cells + (r * p.cells + cell) * p.cin + channel, *next = first + depth * p.cin;
      for (Int i = 0; i < block; i++)
        for (Int k = 0; k < channels; k += 64 / Int(sizeof(T))) __builtin_prefetch(next + i * p.cin + k, 0, 2);
      multiply<T>(mixtures, channels, 1, depth, {alpha + cell, p.cells, 0, 1}, {first, 0, p.cin}, out, size, cell > 0);
    }
}

// The same where each mixture has cells of its own.
template <typename T>
void mix_folded(const Problem& p, const T* alpha, const T* cells, Int unit, Int count, Int row, Int rows, Int channel,
                Int channels, T* out, Int size) {
  const Int parts = p.parts();
  for (Int r = row; r < row + rows; r++, out += channels)
    for (Int part = 0; part < parts; part++) {
      const Int mixture = (unit * p.folded + r * p.folded / p.cout) * parts + part;
      Left<T> a = {alpha + mixture * p.cells, p.folded * parts * p.cells, 0, 1};
      Right<T> b = {cells + (r * p.cells * parts + part) * p.cin + channel, 0, parts * p.cin};
      multiply<T>(count, channels, 1, p.cells, a, b, out + part * size, parts * size, false);
    }
}

// Which lines of which outputs a thread computes at a time: `rows` output channels, from inputs of `channels`.
struct Piece {
  Int first_line, last_line, rows, channels;
};

// Add to the outputs of one sample what kernels (parts, channels, row_length), `size` values apart, make of its input.
template <typename T>
void apply(const Problem& p, const Taps& taps, const Piece& piece, const T* kernels, Int size, Int row_length,
           const T* x, T* y, bool first) {
  const bool complete = taps.count == 1 && taps[0].covers(p);  // then nothing is added up over taps
  for (Int line = piece.first_line; line < piece.last_line; line++) {
    T* out = y + line * p.output[2] * p.channels_out();
    if (first && !complete)
      for (Int i = 0; i < p.output[2]; i++) std::fill_n(out + i * p.channels_out(), piece.rows, T(0));
    for (Int tap = 0; tap < taps.count; tap++) {
      Read read(p, taps[tap], line);
      Left<T> a = {x + read.at * p.channels_in(), p.pixel_step(), p.cin, 1};
      Right<T> b = {kernels + tap * p.blocks_in * size, size, row_length};
      multiply<T>(read.count, piece.rows, p.blocks_in, piece.channels, a, b, out + read.first * p.channels_out(),
                  p.channels_out(), !first || !complete);
    }
  }
}

template <typename T>
void convolve(const Problem& p, Int threads, const T* alpha, const T* cells, const T* x, T* y) {
  const Taps taps(p);
  const Int parts = p.parts(), units = p.units(), lines = p.lines(), wanted = 2 * threads;
  Int row_parts = ceil_div(p.cout, WIDE * LANES<T>);
  const Int unit_parts = std::min(units, ceil_div(wanted, row_parts));
  // Splitting positions means mixing the same kernels twice, which large maps hardly notice.
  const Int room = std::max<Int>(lines * p.output[2] / (8 * p.cells), 1);
  const Int line_parts = std::min({lines, room, ceil_div(wanted, row_parts * unit_parts)});
  if (row_parts * unit_parts * line_parts < threads)
    row_parts = std::max(row_parts, std::min(p.cout / LANES<T>, ceil_div(threads, unit_parts * line_parts)));
  const Int most = ceil_div(p.cout, row_parts);
  // Of folded cells a row is read for one part of each sample only.
  const Int each = ceil_div(units, unit_parts), mixtures = p.folded ? 2 * MIXTURES : MIXTURES;
  const Int together = ceil_div(each, ceil_div(each * parts, mixtures));
  const Int fitting = CACHE / Int(sizeof(T)) / (together * parts * most) / 16 * 16;
  const Int depth = std::min(p.cin, std::max<Int>(fitting, 64));
  const auto mix = p.folded ? mix_folded<T> : mix_shared<T>;
#pragma omp parallel num_threads(threads)
  {
    Buffer<T> mixed(together * parts * (most * depth + PAD)), turned(parts * (round_up(most) * depth + PAD));
#pragma omp for collapse(3) schedule(dynamic, 1)
    for (Int row_part = 0; row_part < row_parts; row_part++)
      for (Int unit_part = 0; unit_part < unit_parts; unit_part++)
        for (Int line_part = 0; line_part < line_parts; line_part++) {
          const Int row = p.cout * row_part / row_parts, rows = p.cout * (row_part + 1) / row_parts - row;
          const Int row_length = round_up(rows), last = units * (unit_part + 1) / unit_parts;
          for (Int channel = 0; channel < p.cin; channel += depth) {
            const Int channels = std::min(depth, p.cin - channel);
            const Int size = rows * channels + PAD, turned_size = row_length * channels + PAD;
            const Piece piece = {lines * line_part / line_parts, lines * (line_part + 1) / line_parts, rows, channels};
            for (Int first = units * unit_part / unit_parts; first < last; first += together) {
              const Int count = std::min(together, last - first);
              mix(p, alpha, cells, first, count, row, rows, channel, channels, mixed.data, size);
              for (Int unit = first; unit < first + count; unit++) {
                for (Int part = 0; part < parts; part++)
                  transpose<T>(rows, channels, mixed.data + ((unit - first) * parts + part) * size, channels,
                               turned.data + part * turned_size, row_length, row_length);
                const Int sample = unit / p.blocks_out, block = unit % p.blocks_out;
                apply<T>(p, taps, piece, turned.data, turned_size, row_length, x + sample * p.image_in() + channel,
                         y + sample * p.image_out() + block * p.cout + row, channel == 0);
              }
            }
          }
        }
  }
}

template <typename T>
void gradient_of_x(const Problem& p, Int threads, const T* alpha, const T* cells, const T* grad, T* grad_x) {
  const Taps taps(p);
  const Int parts = p.parts(), lines = p.lines(), wanted = 2 * threads;
  Int width = std::min(p.cin, WIDE * LANES<T>);
  while (p.batch * ceil_div(p.cin, width) < wanted && width > LANES<T>) width = ceil_div(width, 2);
  const Int channel_parts = ceil_div(p.cin, width), mixtures = p.blocks_out * parts;
  const Int most = std::max<Int>(MIXTURES / mixtures, 1);
  const Int groups = std::max(std::min(p.batch, ceil_div(wanted, channel_parts)), ceil_div(p.batch, most));
  const Int together = ceil_div(p.batch, groups);
  const Int fitting = CACHE / Int(sizeof(T)) / (together * mixtures * width);
  const Int depth = std::min(p.cout, std::max<Int>(fitting, 16));
#pragma omp parallel num_threads(threads)
  {
    Buffer<T> mixed(together * mixtures * (depth * width + PAD));
#pragma omp for collapse(2) schedule(dynamic, 1)
    for (Int group = 0; group < groups; group++)
      for (Int channel_part = 0; channel_part < channel_parts; channel_part++) {
        const Int first = p.batch * group / groups, last = p.batch * (group + 1) / groups;
        const Int channel = p.cin * channel_part / channel_parts;
        const Int channels = p.cin * (channel_part + 1) / channel_parts - channel;
        for (T* block = grad_x + first * p.image_in() + channel; block < grad_x + last * p.image_in(); block += p.cin)
          std::fill_n(block, channels, T(0));
        for (Int row = 0; row < p.cout; row += depth) {
          const Int rows = std::min(depth, p.cout - row), size = rows * channels + PAD;
          mix_shared<T>(p, alpha, cells, first * p.blocks_out, (last - first) * p.blocks_out, row, rows, channel,
                        channels, mixed.data, size);
          for (Int sample = first; sample < last; sample++)
            for (Int line = 0; line < lines; line++)
              for (Int tap = 0; tap < taps.count; tap++) {
                Read read(p, taps[tap], line);
                const T* received = grad + sample * p.image_out() + row;
                const Int at = line * p.output[2] + read.first;
                Left<T> a = {received + at * p.channels_out(), p.channels_out(), p.cout, 1};
                for (Int block_in = 0; block_in < p.blocks_in; block_in++) {
                  const Int mixture = (sample - first) * mixtures + tap * p.blocks_in + block_in;
                  Right<T> b = {mixed.data + mixture * size, parts * size, channels};
                  T* out = grad_x + sample * p.image_in() + read.at * p.channels_in() + block_in * p.cin + channel;
                  multiply<T>(read.count, channels, p.blocks_out, rows, a, b, out, p.pixel_step(), true);
                }
              }
        }
      }
  }
}

template <typename T>
void gradients_of_mixing(const Problem& p, Int threads, const T* alpha, const T* cells, const T* x, const T* grad,
                         T* grad_alpha, T* grad_cells) {
  const Taps taps(p);
  const Int parts = p.parts(), units = p.units(), padded = round_up(p.cells);
  const Int channel_parts = ceil_div(p.cin, WIDE * LANES<T>), width = ceil_div(p.cin, channel_parts);
  const Int row_parts = std::max(ceil_div(p.cout, 3 * TALL), std::min(p.cout, ceil_div(threads, channel_parts)));
  const Int together = ceil_div(units, ceil_div(units * parts, MIXTURES)), depth = ceil_div(p.cout, row_parts);
#pragma omp parallel num_threads(threads)
  {
    Buffer<T> kernels(together * parts * (depth * width + PAD)), turned(width * padded);
    std::fill_n(turned.data, width * padded, T(0));
    T* own_alpha = grad_alpha + omp_get_thread_num() * units * parts * padded;
    // Not dynamic: what is summed in which thread, and so the last digits, should be the same every time.
#pragma omp for collapse(2) schedule(static)
    for (Int row_part = 0; row_part < row_parts; row_part++)
      for (Int channel_part = 0; channel_part < channel_parts; channel_part++) {
        const Int row = p.cout * row_part / row_parts, rows = p.cout * (row_part + 1) / row_parts - row;
        const Int channel = p.cin * channel_part / channel_parts;
        const Int channels = p.cin * (channel_part + 1) / channel_parts - channel, size = rows * channels + PAD;
        for (Int first = 0; first < units; first += together) {
          const Int count = std::min(together, units - first);
          for (Int i = 0; i < count * parts; i++) {
            const Int unit = first + i / parts, part = i % parts;
            const Tap& tap = taps[part / p.blocks_in];
            const T* in = x + unit / p.blocks_out * p.image_in() + part % p.blocks_in * p.cin + channel;
            const T* received = grad + unit / p.blocks_out * p.image_out() + unit % p.blocks_out * p.cout + row;
            for (Int d = 0; d < std::max<Int>(tap.depth.count, 1); d++) {  // a sum of nothing is 0 as well
              const Int line = (tap.depth.first + d) * p.output[1] + tap.height.first;
              Read read(p, tap, line);
              Left<T> a = {received + (line * p.output[2] + read.first) * p.channels_out(), 1,
                           p.output[2] * p.channels_out(), p.channels_out()};
              Right<T> b = {in + read.at * p.channels_in(), p.stride[1] * p.input[2] * p.channels_in(), p.pixel_step()};
              multiply<T>(rows, channels, tap.depth.count ? tap.height.count : 0, tap.width.count, a, b,
                          kernels.data + i * size, channels, d > 0);
            }
          }
          const Int mixture = first * parts;
          for (Int r = 0; r < rows; r++) {
            const T* kernel = kernels.data + r * channels;
            const Int at = (row + r) * p.cells * p.cin + channel;
            multiply<T>(p.cells, channels, 1, count * parts, {alpha + mixture * p.cells, 1, 0, p.cells},
                        {kernel, 0, size}, grad_cells + at, p.cin, first > 0);
            transpose<T>(p.cells, channels, cells + at, p.cin, turned.data, padded, padded);
            multiply<T>(count * parts, padded, 1, channels, {kernel, size, 0, 1}, {turned.data, 0, padded},
                        own_alpha + mixture * padded, padded, true);
          }
        }
      }
  }
}

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

#define EXPORT(T)                                                                                                    \
  extern "C" void convolve_##T(const Problem& p, Int threads, const T* alpha, const T* cells, const T* x, T* y) {    \
    convolve<T>(p, threads, alpha, cells, x, y);                                                                     \
  }                                                                                                                  \
  extern "C" void gradient_of_x_##T(const Problem& p, Int threads, const T* alpha, const T* cells, const T* grad,    \
                                    T* grad_x) {                                                                     \
    gradient_of_x<T>(p, threads, alpha, cells, grad, grad_x);                                                        \
  }                                                                                                                  \
  extern "C" void gradients_of_mixing_##T(const Problem& p, Int threads, const T* alpha, const T* cells, const T* x, \
                                          const T* grad, T* grad_alpha, T* grad_cells) {                             \
    gradients_of_mixing<T>(p, threads, alpha, cells, x, grad, grad_alpha, grad_cells);                               \
  }                                                                                                                  \
  extern "C" void reorder_##T(Int batch, Int rows, Int columns, Int threads, const T* from, T* to) {                 \
    reorder<T>(batch, rows, columns, threads, from, to);                                                             \
  }
EXPORT(float)
EXPORT(double)
