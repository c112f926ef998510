// The convolution with mixed kernels, and the gradient of its input.
//
// Kernels exist for a few rows and channels at a time, in the second-level cache: a thread mixes them from the bank,
// applies them at once to the input where it lies, and goes on to the next. Mixing, convolution and their adjoints are
// all the same small product, `multiply`.
//
// Images are channels last. "Units" are pairs (sample, block of output channels), "parts" pairs (tap, block of input
// channels). `mixture_conv/cpp.py` says what the tensors hold.

#include "apply.h"
#include "experts.h"
#include "gradients.h"

namespace {

constexpr Int KERNELS = 640 << 10, KERNELS_BACKWARD = 768 << 10;  // bytes for a thread's kernels

// A number of parts of a whole, at most twice and at most `most`, with which `each` times as many tasks are shared
// out evenly among threads.
Int balanced(Int parts, Int each, Int threads, Int most) {
  const Int tasks = parts * each;
  return tasks % threads && tasks < 4 * threads && 2 * parts <= most ? 2 * parts : parts;
}

template <typename T>
void convolve(const Problem& p, Int threads, const T* alpha, const T* bank, const T* x, T* y) {
  const Lines lines(p);
  const Int parts = p.parts(), units = p.units(), wanted = 2 * threads;
  // Small kernels are applied whole to a large image, which is read once; those of narrow blocks side by side.
  const bool large = p.pixels() > 8 * p.cells, narrow = p.cout < 2 * LANES<T> && p.blocks_out * parts <= MIXTURES;
  const bool whole = large && parts * p.cin * p.cout * Int(sizeof(T)) <= SMALL;
  const Int side = narrow ? p.blocks_out : 1, groups = units / side;
  // Rows for all registers of a tile, or for half of them where reading the input once more is little beside the rest.
  const bool half = WIDE == 4 && !p.row_blocks && (parts * p.cin <= 128 || !large);
  Int row_parts = whole || narrow ? 1 : ceil_div(p.cout, STRIP<T> / (half ? 2 : 1));
  // Too few kernels mixed at once are not worth what reading the cells costs.
  const Int least = std::min(groups, ceil_div(wanted, row_parts));
  const Int unit_parts = balanced(least, row_parts, threads, std::min(groups, units * parts / 16));
  // Splitting positions means mixing the same kernels twice, which large maps hardly notice.
  const Int room = std::max<Int>(p.pixels() / (8 * p.cells), 1);
  const Int line_parts = std::min({lines.count, room, ceil_div(wanted, row_parts * unit_parts)});
  if (row_parts * unit_parts * line_parts < threads && side == 1)
    row_parts = std::max(row_parts, std::min(p.cout / LANES<T>, ceil_div(threads, unit_parts * line_parts)));
  const Parts all_rows = {p.cout, row_parts, LANES<T>};
  const Int most = all_rows.most(), each = ceil_div(groups, unit_parts) * side;
  const Int together = std::max<Int>(ceil_div(each, ceil_div(each * parts, MIXTURES)) / side, 1) * side;
  const Int fitting = KERNELS / Int(sizeof(T)) / (together * parts * most);
  const Int depth = std::min(p.cin, std::max(fitting / STRIP<T>, Int(1)) * STRIP<T>);
#pragma omp parallel num_threads(threads)
  {
    Buffer<T> mixed(together * parts * (most * depth + PAD)), turned(parts * (round_up(side * most) * depth + PAD));
    Buffer<Term> terms(parts);
#pragma omp for collapse(3) schedule(dynamic, 1)
    for (Int row_part = 0; row_part < row_parts; row_part++)
      for (Int unit_part = 0; unit_part < unit_parts; unit_part++)
        for (Int line_part = 0; line_part < line_parts; line_part++) {
          const Int row = all_rows.begin(row_part), rows = all_rows.size(row_part);
          const Int columns = side * rows, row_length = round_up(columns);
          const Int first_unit = groups * unit_part / unit_parts * side;
          const Int last = groups * (unit_part + 1) / unit_parts * side;
          const Int line = lines.count * line_part / line_parts, last_line = lines.count * (line_part + 1) / line_parts;
          const Span span = {line, last_line, 0, lines.width.count};
          for (Int channel = 0; channel < p.cin; channel += depth) {
            const Int channels = std::min(depth, p.cin - channel);
            const Int size = rows * channels + PAD, turned_size = row_length * channels + PAD;
            for (Int first = first_unit; first < last; first += together) {
              const Int count = std::min(together, last - first);
              mix(p, alpha, bank, first, count, row, rows, channel, channels, mixed.data, size);
              for (Int unit = first; unit < first + count; unit += side) {
                if (p.expert_parts)  // whose rows hold channels and taps side by side
                  transpose<T>(rows, channels * parts, mixed.data + (unit - first) * parts * size, channels * parts,
                               turned.data, row_length, row_length);
                for (Int block = 0; block < side && !p.expert_parts; block++)
                  for (Int part = 0; part < parts; part++)
                    transpose<T>(rows, channels, mixed.data + ((unit + block - first) * parts + part) * size, channels,
                                 turned.data + part * turned_size + block * rows, row_length,
                                 row_length - block * rows);
                const Int sample = unit / p.blocks_out;
                const Pixels<T> pixels = {x + sample * p.image_in() + channel, p.channels_in(), p.blocks_in, channels,
                                          p.cin};
                Kernels<T> kernels = {turned.data, columns, row_length, p.blocks_in * turned_size, turned_size};
                if (p.expert_parts) kernels = {turned.data, columns, parts * row_length, row_length, 0};
                apply<T>(lines, span, pixels, kernels, y + sample * p.image_out() + unit % p.blocks_out * p.cout + row,
                         p.channels_out(), channel > 0 ? ADD : WRITE, terms.data);
              }
            }
          }
        }
  }
}

template <typename T>
void gradient_of_x(const Problem& p, Int threads, const T* alpha, const T* cells, const T* grad, T* grad_x) {
  const Int parts = p.parts(), phases = Lines::phases(p);
  const bool half = WIDE == 4 && p.blocks_out * parts / p.blocks_in * p.cout <= 128;  // writing is most of the work
  // Far cells are read in longer pieces, if all threads have the same to do then.
  const bool far = p.cells * p.cout * p.cin * Int(sizeof(T)) > FAR && p.cin % (SPAN<T> * threads) == 0;
  const Int wanted = (far ? 1 : 2) * threads;
  Int width = std::min(p.cin, far ? SPAN<T> : STRIP<T> / (half ? 2 : 1));
  while (p.batch * ceil_div(p.cin, width) < wanted && width > LANES<T>) width = ceil_div(width, 2);
  const Parts all_channels = {p.cin, ceil_div(p.cin, width), LANES<T>};
  const Int channel_parts = all_channels.count, mixtures = p.blocks_out * parts;
  const Int most = std::max<Int>(MIXTURES / mixtures, 1);
  const Int least = std::max(std::min(p.batch, ceil_div(wanted, channel_parts)), ceil_div(p.batch, most));
  const Int groups = balanced(least, channel_parts, threads, std::min(p.batch, p.batch * mixtures / 16));
  const Int together = ceil_div(p.batch, groups), most_channels = all_channels.most();
  const Int experts = p.expert_parts ? p.cells : 0;
  const Int fitting = KERNELS_BACKWARD / Int(sizeof(T)) / ((together + experts) * mixtures * most_channels) / 16 * 16;
  const Int depth = std::min(p.cout, std::max<Int>(fitting, 16));
#pragma omp parallel num_threads(threads)
  {
    Buffer<T> mixed(together * mixtures * (depth * most_channels + PAD));
    Buffer<T> tile(experts * mixtures * (depth * most_channels + PAD));
    std::fill_n(tile.data, experts * mixtures * (depth * most_channels + PAD), T{});  // what lies between kernels too
    Buffer<Term> terms(mixtures);
#pragma omp for collapse(2) schedule(dynamic, 1)
    for (Int group = 0; group < groups; group++)
      for (Int channel_part = 0; channel_part < channel_parts; channel_part++) {
        const Int first = p.batch * group / groups, last = p.batch * (group + 1) / groups;
        const Int channel = all_channels.begin(channel_part), channels = all_channels.size(channel_part);
        for (Int row = 0; row < p.cout; row += depth) {
          const Int rows = std::min(depth, p.cout - row), size = rows * channels + PAD;
          if (experts) {
            read_experts<T>(p, cells, row, rows, channel, channels, tile.data, size);
            mix_tile<T>(p, alpha, tile.data, first, last - first, mixed.data, size);
          } else {
            mix_shared<T>(p, alpha, cells, first * p.blocks_out, (last - first) * p.blocks_out, row, rows, channel,
                          channels, mixed.data, size);
          }
          for (Int sample = first; sample < last; sample++) {
            const T* own = mixed.data + (sample - first) * mixtures * size;
            const Pixels<T> pixels = {grad + sample * p.image_out() + row, p.channels_out(), p.blocks_out, rows, p.cout};
            for (Int phase = 0; phase < phases; phase++) {
              const Lines lines(p, phase);
              const Span span = {0, lines.count, 0, lines.width.count};
              for (Int block = 0; block < p.blocks_in; block++) {
                const Kernels<T> kernels = {own + block * size, channels, channels, p.blocks_in * size, parts * size};
                apply<T>(lines, span, pixels, kernels, grad_x + sample * p.image_in() + block * p.cin + channel,
                         p.channels_in(), row > 0 ? ADD : WRITE, terms.data);
              }
            }
          }
        }
      }
  }
}

}  // namespace

#define EXPORT(T)                                                                                                    \
  extern "C" void convolve_##T(const Problem& p, Int threads, const T* alpha, const T* bank, const T* x, T* y) {     \
    convolve(p, threads, alpha, bank, x, y);                                                                         \
  }                                                                                                                  \
  extern "C" void gradient_of_x_##T(const Problem& p, Int threads, const T* alpha, const T* cells, const T* grad,    \
                                    T* grad_x) {                                                                     \
    gradient_of_x(p, threads, alpha, cells, grad, grad_x);                                                           \
  }                                                                                                                  \
  extern "C" void gradients_of_mixing_##T(const Problem& p, Int threads, const T* alpha, const T* cells, const T* x, \
                                          const T* grad, T* grad_alpha, T* grad_cells) {                             \
    gradients_of_mixing(p, threads, alpha, cells, x, grad, grad_alpha, grad_cells);                                  \
  }
EXPORT(float)
EXPORT(double)
