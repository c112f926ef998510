// The convolution with mixed kernels, and its gradients, on a CPU.
//
// Kernels exist for a few rows and channels at a time, in the second-level cache: a thread mixes them from the cells,
// applies them at once to the input where it lies, and goes on to the next. Mixing, convolution and their adjoints are
// all the same small product, `multiply`.
//
// Images are channels last. "Units" are pairs (sample, block of output channels), "parts" pairs (tap, block of input
// channels); one unit and part are one mixture. `kernel_warehouse/native.py` says what the tensors hold.

#include <omp.h>

#include "axis.h"

namespace {

constexpr Int CACHE = 512 << 10;  // bytes for a thread's kernels
constexpr Int MIXTURES = 40;      // that a row of the cells is read for: it stays in the first-level cache meanwhile
constexpr Int FEW = 16;           // mixtures that are faster than memory
constexpr Int BLOCK = 16 << 10;   // bytes of cells that are asked for early
constexpr Int PAD = 16;           // between kernels: at powers of two they would share few lines of the caches

// Ask for a matrix (rows, columns) early, to read or to write.
template <int write, typename T>
void ask_for(const T* first, Int rows, Int row, Int columns) {
  for (Int i = 0; i < rows; i++)
    for (Int k = 0; k < columns; k += 64 / Int(sizeof(T))) __builtin_prefetch(first + i * row + k, write, 2);
}

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
      ask_for<0>(next, block, p.cin, channels);
      multiply<T>(mixtures, channels, depth, {alpha + cell, p.cells, 1}, {first, p.cin}, out, size, cell > 0);
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
      Left<T> a = {alpha + mixture * p.cells, p.folded * parts * p.cells, 1};
      Right<T> b = {cells + (r * p.cells * parts + part) * p.cin + channel, parts * p.cin};
      multiply<T>(count, channels, p.cells, a, b, out + part * size, parts * size, false);
    }
}

// Where each of `count` parts of a whole begins: at multiples of a unit.
struct Parts {
  Int total, count, unit;
  Int begin(Int part) const { return std::min(ceil_div(total, unit) * part / count * unit, total); }
  Int size(Int part) const { return begin(part + 1) - begin(part); }
  Int most() const { return std::min(ceil_div(ceil_div(total, unit), count) * unit, total); }
};

// Kernels as a right factor: `columns` of them, whose rows, taps and blocks of rows begin so many values apart.
template <typename T>
struct Kernels {
  const T* data;
  Int columns, row, tap, block;
};

// Pixels to read: `blocks` of `channels` each, a number of values apart.
template <typename T>
struct Pixels {
  const T* data;
  Int size, blocks, channels, block;
};

// Sum what pixels of an image, from one line to another, read through the taps of a kernel; `room` is for the terms.
template <typename T>
void apply(const Lines& lines, Int first_line, Int last_line, Pixels<T> from, Kernels<T> kernels, T* to, Int to_size,
           bool add, Term* room) {
  const Axis &depth = lines.depth, &height = lines.height, &width = lines.width;
  for (Int d = 0; d < depth.count; d++)
    for (Int i = 0; i < height.runs; i++) {
      const Int h = std::max(height.run[i].first, first_line - d * height.count);
      const Int last_h = std::min(height.run[i].last, last_line - d * height.count);
      for (Int j = 0; j < width.runs && h < last_h; j++) {
        const Int w = width.run[j].first, last_w = width.run[j].last;
        Terms terms = {room, 0, from.channels};
        lines.for_taps(depth.run_of(d), height.run[i], width.run[j], [&](const Tap& d, const Tap& h, const Tap& w) {
          const Int pixel = lines.ahead(d, h, w) * from.size, tap = lines.number(d, h, w) * kernels.tap;
          for (Int block = 0; block < from.blocks; block++)
            room[terms.count++] = {pixel + block * from.block, tap + block * kernels.block};
        });
        // The rows of the product are neighbours along the longer side.
        const bool across = last_w - w >= last_h - h;
        const Int first = across ? h : w, last = across ? last_h : last_w, rows = across ? last_w - w : last_h - h;
        const Int row = across ? width.step : height.step * lines.read_size[2];
        const Int to_row = across ? width.stride : height.stride * lines.size[2];
        for (Int k = first; k < last; k++) {
          const Int at_h = across ? k : h, at_w = across ? w : k;
          Left<T> a = {from.data + lines.read(d, at_h, at_w) * from.size, row * from.size, 1};
          multiply<T>(rows, kernels.columns, terms, a, {kernels.data, kernels.row},
                      to + lines.pixel(d, at_h, at_w) * to_size, to_row * to_size, add);
        }
      }
    }
}

template <typename T>
void convolve(const Problem& p, Int threads, const T* alpha, const T* cells, const T* x, T* y) {
  const Lines lines(p);
  const Int parts = p.parts(), units = p.units(), wanted = 2 * threads;
  // Rows for all registers of a tile, or for half of them where reading the input once more is little beside the rest.
  const bool half = WIDE == 4 && !p.folded && (parts * p.cin <= 128 || 8 * p.cells > p.pixels());
  Int row_parts = ceil_div(p.cout, WIDE * LANES<T> / (half ? 2 : 1));
  const Int unit_parts = std::min(units, ceil_div(wanted, row_parts));
  // Splitting positions means mixing the same kernels twice, which large maps hardly notice.
  const Int room = std::max<Int>(p.pixels() / (8 * p.cells), 1);
  const Int line_parts = std::min({lines.count, room, ceil_div(wanted, row_parts * unit_parts)});
  if (row_parts * unit_parts * line_parts < threads)
    row_parts = std::max(row_parts, std::min(p.cout / LANES<T>, ceil_div(threads, unit_parts * line_parts)));
  const Parts all_rows = {p.cout, row_parts, LANES<T>};
  const Int most = all_rows.most();
  // Of folded cells a row is read for one part of each sample only.
  const Int each = ceil_div(units, unit_parts), mixtures = p.folded ? 2 * MIXTURES : MIXTURES;
  const Int together = ceil_div(each, ceil_div(each * parts, mixtures));
  const Int fitting = CACHE / Int(sizeof(T)) / (together * parts * most) / 16 * 16;
  const Int depth = std::min(p.cin, std::max<Int>(fitting, 64));
  const auto mix = p.folded ? mix_folded<T> : mix_shared<T>;
#pragma omp parallel num_threads(threads)
  {
    Buffer<T> mixed(together * parts * (most * depth + PAD)), turned(parts * (round_up(most) * depth + PAD));
    Buffer<Term> terms(parts);
#pragma omp for collapse(3) schedule(dynamic, 1)
    for (Int row_part = 0; row_part < row_parts; row_part++)
      for (Int unit_part = 0; unit_part < unit_parts; unit_part++)
        for (Int line_part = 0; line_part < line_parts; line_part++) {
          const Int row = all_rows.begin(row_part), rows = all_rows.size(row_part);
          const Int row_length = round_up(rows), last = units * (unit_part + 1) / unit_parts;
          for (Int channel = 0; channel < p.cin; channel += depth) {
            const Int channels = std::min(depth, p.cin - channel);
            const Int size = rows * channels + PAD, turned_size = row_length * channels + PAD;
            const Int line = lines.count * line_part / line_parts;
            const Int last_line = lines.count * (line_part + 1) / line_parts;
            for (Int first = units * unit_part / unit_parts; first < last; first += together) {
              const Int count = std::min(together, last - first);
              mix(p, alpha, cells, first, count, row, rows, channel, channels, mixed.data, size);
              for (Int unit = first; unit < first + count; unit++) {
                for (Int part = 0; part < parts; part++)
                  transpose<T>(rows, channels, mixed.data + ((unit - first) * parts + part) * size, channels,
                               turned.data + part * turned_size, row_length, row_length);
                const Int sample = unit / p.blocks_out, block = unit % p.blocks_out;
                Pixels<T> pixels = {x + sample * p.image_in() + channel, p.channels_in(), p.blocks_in, channels, p.cin};
                Kernels<T> kernels = {turned.data, rows, row_length, p.blocks_in * turned_size, turned_size};
                apply<T>(lines, line, last_line, pixels, kernels, y + sample * p.image_out() + block * p.cout + row,
                         p.channels_out(), channel > 0, terms.data);
              }
            }
          }
        }
  }
}

template <typename T>
void gradient_of_x(const Problem& p, Int threads, const T* alpha, const T* cells, const T* grad, T* grad_x) {
  const Int parts = p.parts(), phases = Lines::phases(p), wanted = 2 * threads;
  const bool half = WIDE == 4 && p.blocks_out * parts / p.blocks_in * p.cout <= 128;  // writing is most of the work
  Int width = std::min(p.cin, WIDE * LANES<T> / (half ? 2 : 1));
  while (p.batch * ceil_div(p.cin, width) < wanted && width > LANES<T>) width = ceil_div(width, 2);
  const Parts all_channels = {p.cin, ceil_div(p.cin, width), LANES<T>};
  const Int channel_parts = all_channels.count, mixtures = p.blocks_out * parts;
  const Int most = std::max<Int>(MIXTURES / mixtures, 1);
  const Int groups = std::max(std::min(p.batch, ceil_div(wanted, channel_parts)), ceil_div(p.batch, most));
  const Int together = ceil_div(p.batch, groups);
  const Int most_channels = all_channels.most();
  const Int fitting = CACHE / Int(sizeof(T)) / (together * mixtures * most_channels);
  const Int depth = std::min(p.cout, std::max<Int>(fitting, 16));
#pragma omp parallel num_threads(threads)
  {
    Buffer<T> mixed(together * mixtures * (depth * most_channels + PAD));
    Buffer<Term> terms(mixtures);
#pragma omp for collapse(2) schedule(dynamic, 1)
    for (Int group = 0; group < groups; group++)
      for (Int channel_part = 0; channel_part < channel_parts; channel_part++) {
        const Int first = p.batch * group / groups, last = p.batch * (group + 1) / groups;
        const Int channel = all_channels.begin(channel_part), channels = all_channels.size(channel_part);
        for (Int row = 0; row < p.cout; row += depth) {
          const Int rows = std::min(depth, p.cout - row), size = rows * channels + PAD;
          mix_shared<T>(p, alpha, cells, first * p.blocks_out, (last - first) * p.blocks_out, row, rows, channel,
                        channels, mixed.data, size);
          for (Int phase = 0; phase < phases; phase++) {
            const Lines lines(p, phase);
            for (Int sample = first; sample < last; sample++)
              for (Int block = 0; block < p.blocks_in; block++) {
                const T *from = grad + sample * p.image_out() + row,
                        *kernel = mixed.data + ((sample - first) * mixtures + block) * size;
                T* to = grad_x + sample * p.image_in() + block * p.cin + channel;
                Pixels<T> pixels = {from, p.channels_out(), p.blocks_out, rows, p.cout};
                Kernels<T> kernels = {kernel, channels, channels, p.blocks_in * size, parts * size};
                apply<T>(lines, 0, lines.count, pixels, kernels, to, p.channels_in(), row > 0, terms.data);
              }
          }
        }
      }
  }
}

// The gradients (parts, rows, channels), `size` values apart, of the kernels of one sample and block of outputs;
// to `turn` them is to put neighbouring rows into a register.
template <typename T>
void correlate(const Problem& p, const Lines& lines, const T* x, const T* grad, Int rows, Int channels, T* kernels,
               Int size, bool turn, Term* room, T* turned) {
  const Axis &depth = lines.depth, &height = lines.height, &width = lines.width;
  const Int row_step = p.channels_out(), channel_step = p.pixel_step();
  if (depth.taps * height.taps * width.taps * p.blocks_in < p.parts()) std::fill_n(kernels, p.parts() * size, T(0));
  lines.for_taps(depth.all(), height.all(), width.all(), [&](const Tap& d, const Tap& h, const Tap& w) {
    Terms pixels = {room, 0, w.last - w.first};
    for (Int i = d.first; i < d.last; i++)
      for (Int j = h.first; j < h.last; j++) {
        const Int received = lines.pixel(i, j, w.first) * p.channels_out();
        const Int read = (lines.read(i, j, w.first) + lines.ahead(d, h, w)) * p.channels_in();
        room[pixels.count++] = turn ? Term{read, received} : Term{received, read};
      }
    for (Int block = 0; block < p.blocks_in; block++) {
      T* kernel = kernels + (lines.number(d, h, w) * p.blocks_in + block) * size;
      const T* in = x + block * p.cin;
      if (turn) {
        multiply<T>(channels, rows, pixels, {in, 1, channel_step}, {grad, row_step}, turned, round_up(rows), false);
        transpose<T>(channels, rows, turned, round_up(rows), kernel, channels, channels);
      } else {
        multiply<T>(rows, channels, pixels, {grad, 1, row_step}, {in, channel_step}, kernel, channels, false);
      }
    }
  });
}

// The adjoint of mixing: from gradients of kernels (mixtures, rows, channels), `size` values apart, to those of α, which
// are added to, and of the cells. Cells and their gradients are in far memory: the next row's are asked for early.
template <typename T>
void unmix(const Problem& p, const T* alpha, const T* cells, const T* kernels, Int mixtures, Int rows, Int channels,
           Int size, bool add, T* turned, T* grad_alpha, T* grad_cells) {
  const Int padded = round_up(p.cells), row = p.cells * p.cin;
  for (Int r = 0; r < rows; r++, kernels += channels, cells += row, grad_cells += row) {
    for (Int cell = 0; cell < p.cells; cell += 2 * TALL) {
      const Int few = std::min(2 * TALL, p.cells - cell), at = cell * p.cin;
      ask_for<0>(cells + at + row, few, p.cin, channels);
      ask_for<1>(grad_cells + at + row, few, p.cin, channels);
      multiply<T>(few, channels, mixtures, {alpha + cell, 1, p.cells}, {kernels, size}, grad_cells + at, p.cin, add);
    }
    transpose<T>(p.cells, channels, cells, p.cin, turned, padded, padded);
    multiply<T>(mixtures, padded, channels, {kernels, size, 1}, {turned, padded}, grad_alpha, padded, true);
  }
}

template <typename T>
void gradients_of_mixing(const Problem& p, Int threads, const T* alpha, const T* cells, const T* x, const T* grad,
                         T* grad_alpha, T* grad_cells) {
  const Lines lines(p);
  const Int parts = p.parts(), units = p.units(), padded = round_up(p.cells);
  const Parts all_channels = {p.cin, ceil_div(p.cin, WIDE * LANES<T>), LANES<T>};
  const Int channel_parts = all_channels.count, most = all_channels.most();
  const bool turn = p.cin < 2 * LANES<T> && p.cin < p.cout;  // registers would hold few channels
  const Int row_parts = std::max(ceil_div(p.cout, turn ? WIDE * LANES<T> : 3 * TALL),
                                 std::min(p.cout, ceil_div(threads, channel_parts)));
  const Parts all_rows = {p.cout, row_parts, turn ? LANES<T> : 1};
  const Int together = ceil_div(units, ceil_div(units * parts, MIXTURES)), most_rows = all_rows.most();
#pragma omp parallel num_threads(threads)
  {
    Buffer<T> kernels(together * parts * (most_rows * most + PAD));
    Buffer<T> turned(most * std::max(padded, round_up(most_rows)));
    Buffer<Term> terms(lines.count);
    std::fill_n(turned.data, most * padded, T(0));
    T* own_alpha = grad_alpha + omp_get_thread_num() * units * parts * padded;
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
            correlate<T>(p, lines, in, received, rows, channels, kernels.data + (unit - first) * parts * size, size,
                         turn, terms.data, turned.data);
          }
          const Int mixture = first * parts, at = row * p.cells * p.cin + channel;
          unmix<T>(p, alpha + mixture * p.cells, cells + at, kernels.data, count * parts, rows, channels, size, first > 0,
                   turned.data, own_alpha + mixture * padded, grad_cells + at);
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
