// The convolution with mixed kernels, and the gradient of its input, on a CPU.
//
// Kernels exist for a few rows and channels at a time, in the second-level cache: a thread mixes them from the cells,
// applies them at once to the input where it lies, and goes on to the next. Mixing, convolution and their adjoints are
// all the same small product, `multiply`.
//
// Images are channels last. "Units" are pairs (sample, block of output channels), "parts" pairs (tap, block of input
// channels); one unit and part are one mixture. `kernel_warehouse/native.py` says what the tensors hold.

#include "gradients.h"
#include "whole.h"

namespace {

constexpr Int KERNELS = 640 << 10, KERNELS_BACKWARD = 768 << 10;  // bytes for a thread's kernels

// A number of parts of a whole, at most twice and at most `most`, with which `each` times as many tasks are shared
// out evenly among threads.
Int balanced(Int parts, Int each, Int threads, Int most) {
  const Int tasks = parts * each;
  return tasks % threads && tasks < 4 * threads && 2 * parts <= most ? 2 * parts : parts;
}

template <typename T, typename C>
void convolve(const Problem& p, Int threads, const T* alpha, const C* cells, const T* x, const Sum<T>* bias, T* y) {
  if (mixes_whole<T>(p, threads)) return convolve_whole(p, threads, alpha, cells, x, bias, y);
  const Lines lines(p);
  const Int parts = p.parts(), units = p.units(), wanted = 2 * threads;
  // Small kernels are applied whole to a large image, which is read once; those of narrow blocks side by side.
  const bool large = p.pixels() > 8 * p.cells, narrow = p.cout < 2 * LANES<T> && p.blocks_out * parts <= MIXTURES;
  const bool whole = large && parts * p.cin * p.cout * Int(sizeof(T)) <= SMALL;
  const Int side = narrow ? p.blocks_out : 1, groups = units / side;
  // Of folded cells a row is read for one part of each sample only: for small images that takes longer than the rest,
  // and smaller pieces of kernels are mixed for four times as many samples.
  const bool reads = WIDE == 4 && !PAIRED<T> && p.folded && p.pixels() <= 2 * p.cells;
  // Rows for all registers of a tile, or for half of them where reading the input once more is little beside the rest.
  const bool half = reads || (WIDE == 4 && !p.folded && (parts * p.cin <= 128 || !large));
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
  const Int most = all_rows.most();
  const Int mixtures = (reads ? 4 : p.folded ? Arithmetic<T>::values : 1) * most_mixtures<T>();
  const Int each = ceil_div(groups, unit_parts) * side;
  const Int together = std::max<Int>(ceil_div(each, ceil_div(each * parts, mixtures)) / side, 1) * side;
  const Int fitting = KERNELS / Int(sizeof(T)) / (together * parts * most);
  const Int strip = reads ? STRIP<T> / 2 : STRIP<T>;
  const Int depth = std::min(p.cin, std::max(fitting / strip, Int(1)) * strip);
  const bool direct = !PAIRED<T> || depth == p.cin;  // else outputs are rounded when they are summed up
  const auto mix = p.folded ? mix_folded<T, C> : mix_shared<T, C>;
  const Coefficients<T> coefficients(alpha, p.batch * (p.folded ? p.folded : p.blocks_out) * parts, p.cells);
#pragma omp parallel num_threads(threads)
  {
    const Tiles tiles;
    Buffer<T> mixed(together * parts * (most * depth + PAD));
    Buffer<Word<T>> turned(parts * (round_up(side * most) * words<T>(depth) + PAD)), cell_words(cell_room<T, C>(p));
    Buffer<Sum<T>> sums(direct ? 0 : each * p.pixels() * most);
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
          const auto output = [&](Int unit) {
            return y + unit / p.blocks_out * p.image_out() + unit % p.blocks_out * p.cout + row;
          };
          for (Int channel = 0; channel < p.cin; channel += depth) {
            const Int channels = std::min(depth, p.cin - channel);
            const Store how = channel > 0 ? ADD : WRITE;
            const bool last_channels = channel + channels == p.cin;
            const Int size = rows * channels + PAD, turned_size = row_length * words<T>(channels) + PAD;
            for (Int first = first_unit; first < last; first += together) {
              const Int count = std::min(together, last - first);
              mix(p, coefficients, cells, first, count, row, rows, channel, channels, mixed.data, size,
                  cell_words.data);
              for (Int unit = first; unit < first + count; unit += side) {
                for (Int block = 0; block < side; block++)
                  for (Int part = 0; part < parts; part++)
                    turn(rows, channels, mixed.data + ((unit + block - first) * parts + part) * size, channels,
                         turned.data + part * turned_size + block * rows, row_length, row_length - block * rows);
                const T* image = x + unit / p.blocks_out * p.image_in() + channel;
                const Pixels<T> pixels(image, p.channels_in(), p.blocks_in, channels, p.cin);
                const Sum<T>* offset = bias && last_channels ? bias + unit % p.blocks_out * p.cout + row : nullptr;
                const Int tap = p.blocks_in * turned_size;
                const Kernels<T> kernels = {turned.data, columns, row_length, tap, turned_size, offset};
                if (direct) {
                  apply<T>(lines, span, pixels, kernels, output(unit), p.channels_out(), how, terms.data);
                } else {
                  Sum<T>* summed = &sums[(unit - first_unit) * p.pixels() * rows];
                  apply<T>(lines, span, pixels, kernels, summed, columns, how, terms.data);
                }
              }
            }
          }
          if constexpr (PAIRED<T>) {
            const Int pixel = line * p.output[2], count = last_line * p.output[2] - pixel;
            for (Int unit = first_unit; unit < last && !direct; unit += side)
              round_rows(count, columns, &sums[(unit - first_unit) * p.pixels() * rows + pixel * columns], columns,
                         output(unit) + pixel * p.channels_out(), p.channels_out());
          }
        }
  }
}

// With what every pixel of an image receives besides, `each` (samples, channels), if anything.
template <typename T>
void gradient_of_x(const Problem& p, Int threads, const T* alpha, const Sum<T>* cells, const T* grad,
                   const Sum<T>* each, T* grad_x) {
  const Int parts = p.parts(), phases = Lines::phases(p);
  const bool half = WIDE == 4 && p.blocks_out * parts / p.blocks_in * p.cout <= 128;  // writing is most of the work
  // Far cells are read in longer pieces, if all threads have the same to do then.
  const bool far = p.cells * p.cout * p.cin * Int(sizeof(Sum<T>)) > FAR && p.cin % (SPAN<T> * threads) == 0;
  const Int wanted = (far ? 1 : 2) * threads;
  Int width = std::min(p.cin, far ? SPAN<T> : STRIP<T> / (half ? 2 : 1));
  while (p.batch * ceil_div(p.cin, width) < wanted && width > LANES<T>) width = ceil_div(width, 2);
  const Parts all_channels = {p.cin, ceil_div(p.cin, width), LANES<T>};
  const Int channel_parts = all_channels.count, mixtures = p.blocks_out * parts;
  const Int most = std::max<Int>(most_mixtures<T>() / mixtures, 1);
  const Int least = std::max(std::min(p.batch, ceil_div(wanted, channel_parts)), ceil_div(p.batch, most));
  const Int groups = balanced(least, channel_parts, threads, std::min(p.batch, p.batch * mixtures / 16));
  const Int together = ceil_div(p.batch, groups);
  const Int most_channels = all_channels.most();
  const Int fitting = KERNELS_BACKWARD / Int(sizeof(T)) / (together * mixtures * most_channels) / 16 * 16;
  const Int depth = std::min(p.cout, std::max<Int>(fitting, 16));
  const bool direct = !PAIRED<T> || depth == p.cout;  // as in `convolve`
  const Int inputs = p.input[0] * p.input[1] * p.input[2];
  const Coefficients<T> coefficients(alpha, p.units() * parts, p.cells);
#pragma omp parallel num_threads(threads)
  {
    const Tiles tiles;
    Buffer<T> mixed(together * mixtures * (depth * most_channels + PAD));
    Buffer<Word<T>> cell_words(cell_room<T, Sum<T>>(p));
    Buffer<Word<T>> paired(PAIRED<T> ? mixtures * (filled<T>(depth) * round_up(most_channels) + PAD) : 0);
    Buffer<Sum<T>> sums(direct ? 0 : together * inputs * p.blocks_in * most_channels);
    Buffer<Term> terms(mixtures);
#pragma omp for collapse(2) schedule(dynamic, 1)
    for (Int group = 0; group < groups; group++)
      for (Int channel_part = 0; channel_part < channel_parts; channel_part++) {
        const Int first = p.batch * group / groups, last = p.batch * (group + 1) / groups;
        const Int channel = all_channels.begin(channel_part), channels = all_channels.size(channel_part);
        const auto summed = [&](Int sample, Int block) {
          return &sums[((sample - first) * p.blocks_in + block) * inputs * channels];
        };
        const auto input = [&](Int sample, Int block) {
          return grad_x + sample * p.image_in() + block * p.cin + channel;
        };
        for (Int row = 0; row < p.cout; row += depth) {
          const Int rows = std::min(depth, p.cout - row), size = rows * channels + PAD;
          const Store how = row > 0 ? ADD : WRITE;
          const bool last_rows = row + rows == p.cout;
          mix_shared<T>(p, coefficients, cells, first * p.blocks_out, (last - first) * p.blocks_out, row, rows, channel,
                        channels, mixed.data, size, cell_words.data);
          for (Int sample = first; sample < last; sample++) {
            const T* own = mixed.data + (sample - first) * mixtures * size;
            const Int kernel_size = PAIRED<T> ? filled<T>(rows) * round_up(channels) + PAD : size;
            const Right<T> kernels = right_factor<T>(rows, channels, own, channels, paired.data);
            for (Int i = 1; i < mixtures; i++)
              right_factor<T>(rows, channels, own + i * size, channels, paired.data + i * kernel_size);
            const Pixels<T> pixels(grad + sample * p.image_out() + row, p.channels_out(), p.blocks_out, rows, p.cout);
            for (Int phase = 0; phase < phases; phase++) {
              const Lines lines(p, phase);
              const Span span = {0, lines.count, 0, lines.width.count};
              for (Int block = 0; block < p.blocks_in; block++) {
                const Int number = sample * p.blocks_in + block;
                const Kernels<T> these = {kernels.data + block * kernel_size, channels, kernels.inner,
                                          p.blocks_in * kernel_size, parts * kernel_size,
                                          each && last_rows ? each + number * p.cin + channel : nullptr};
                if (direct) {
                  apply<T>(lines, span, pixels, these, input(sample, block), p.channels_in(), how, terms.data);
                } else {
                  apply<T>(lines, span, pixels, these, summed(sample, block), channels, how, terms.data);
                }
              }
            }
          }
        }
        if constexpr (PAIRED<T>)
          for (Int sample = first; sample < last && !direct; sample++)
            for (Int block = 0; block < p.blocks_in; block++)
              round_rows(inputs, channels, summed(sample, block), channels, input(sample, block), p.channels_in());
      }
  }
}

}  // namespace

#define EXPORT_CONVOLVE(name, T, C)                                                                                  \
  extern "C" void name##_##T(const Problem& p, Int threads, const T* alpha, const C* cells, const T* x,              \
                             const Sum<T>* bias, T* y) {                                                             \
    convolve(p, threads, alpha, cells, x, bias, y);                                                                  \
  }
#define EXPORT(T)                                                                                                      \
  EXPORT_CONVOLVE(convolve, T, Sum<T>)                                                                                 \
  extern "C" void gradient_of_x_##T(const Problem& p, Int threads, const T* alpha, const Sum<T>* cells, const T* grad, \
                                    const Sum<T>* each, T* grad_x) {                                                   \
    gradient_of_x(p, threads, alpha, cells, grad, each, grad_x);                                                       \
  }                                                                                                                    \
  extern "C" void gradients_of_mixing_##T(const Problem& p, Int add, Int threads, const T* alpha,                      \
                                          const Sum<T>* cells, const T* x, const T* grad, Sum<T>* grad_alpha,          \
                                          Sum<T>* grad_cells) {                                                        \
    gradients_of_mixing(p, add, threads, alpha, cells, x, grad, grad_alpha, grad_cells);                               \
  }
EXPORT(float)
EXPORT(double)
EXPORT_CONVOLVE(convolve_rounded, float, bfloat16)
#if defined(__AVX512BF16__)
EXPORT(bfloat16)
EXPORT_CONVOLVE(convolve_rounded, bfloat16, bfloat16)
#endif
