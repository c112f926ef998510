// The convolution with kernels so few that all are mixed before they are applied. Threads share the rows of cells,
// then pixels and output channels.
#pragma once

#include "apply.h"

namespace {

constexpr Int WHOLE_KERNELS = 1 << 20;  // bytes of kernels that one core reads after another has written them

// Whether tasks that mix kernels for themselves would be too few, or would read the cells of all blocks several times.
template <typename T>
bool mixes_whole(const Problem& p, Int threads) {
  const Int mixtures = p.units() * p.parts();
  const bool fit = mixtures <= most_mixtures<T>() && mixtures * p.cout * p.cin * Int(sizeof(T)) <= WHOLE_KERNELS;
  return fit && (p.blocks_out > 1 || p.batch * ceil_div(p.cout, STRIP<T>) < 2 * threads);
}

// Where the kernels of a convolution lie: in panels of some output channels, (samples, panels, parts, channels, panel).
template <typename T>
struct Panels {
  Int width, count, part;
  Buffer<Word<T>> room;

  explicit Panels(const Problem& p)
      : width(p.parts() * p.cin * p.channels_out() * Int(sizeof(T)) <= SMALL ? round_up(p.channels_out()) : STRIP<T>),
        count(ceil_div(p.channels_out(), width)), part(width * words<T>(p.cin) + PAD),
        room(p.batch * count * p.parts() * part) {}

  Word<T>* at(const Problem& p, Int sample, Int panel, Int number) const {
    return &room[((sample * count + panel) * p.parts() + number) * part];
  }

  // Turn rows of a kernel, (rows, cin), into columns; into whole registers if the same thread puts what follows, later.
  void put(const Problem& p, Int sample, Int number, Int column, Int rows, const T* from, bool same_thread) const {
    for (Int done = 0; done < rows;) {
      const Int at_column = (column + done) % width, some = std::min(rows - done, width - at_column);
      turn(some, p.cin, from + done * p.cin, p.cin, at(p, sample, (column + done) / width, number) + at_column, width,
           same_thread ? width - at_column : some);
      done += some;
    }
  }
};

template <typename T, typename C>
void convolve_whole(const Problem& p, Int threads, const T* alpha, const C* cells, const T* x, const Sum<T>* bias,
                    T* y) {
  const Lines lines(p);
  const Panels<T> panels(p);
  const Int parts = p.parts(), units = p.units(), row_parts = ceil_div(p.cout, ROUND);
  const bool line = lines.count == 1;
  const Int places = line ? lines.width.count : lines.count, step = line ? TALL : 1;
  const Parts spans = {places, std::min(ceil_div(places, step), ceil_div(4 * threads, p.batch * panels.count)), step};
  const auto mix = p.folded ? mix_folded<T, C> : mix_shared<T, C>;
  const Coefficients<T> coefficients(alpha, p.batch * (p.folded ? p.folded : p.blocks_out) * parts, p.cells);
#pragma omp parallel num_threads(threads)
  {
    const Tiles tiles;
    Buffer<T> mixed(units * parts * (std::min(ROUND, p.cout) * p.cin + PAD));
    Buffer<Word<T>> cell_words(cell_room<T, C>(p));
    Buffer<Term> terms(parts);
#pragma omp for schedule(static)
    for (Int row_part = 0; row_part < row_parts; row_part++) {
      const Int row = row_part * ROUND, rows = std::min(ROUND, p.cout - row), size = rows * p.cin + PAD;
      mix(p, coefficients, cells, 0, units, row, rows, 0, p.cin, mixed.data, size, cell_words.data);
      for (Int unit = 0; unit < units; unit++)
        for (Int part = 0; part < parts; part++)
          panels.put(p, unit / p.blocks_out, part, unit % p.blocks_out * p.cout + row, rows,
                     mixed.data + (unit * parts + part) * size, row_parts == 1);
    }
#pragma omp for collapse(3) schedule(dynamic, 1)
    for (Int sample = 0; sample < p.batch; sample++)
      for (Int panel = 0; panel < panels.count; panel++)
        for (Int i = 0; i < spans.count; i++) {
          const Int first = spans.begin(i), last = first + spans.size(i), column = panel * panels.width;
          const Span span = line ? Span{0, 1, first, last} : Span{first, last, 0, lines.width.count};
          const Pixels<T> pixels(x + sample * p.image_in(), p.channels_in(), p.blocks_in, p.cin, p.cin);
          const Int columns = std::min(panels.width, p.channels_out() - column), tap = p.blocks_in * panels.part;
          const Kernels<T> kernels = {panels.at(p, sample, panel, 0), columns, panels.width, tap, panels.part,
                                      bias ? bias + column : nullptr};
          apply<T>(lines, span, pixels, kernels, y + sample * p.image_out() + column, p.channels_out(), WRITE,
                   terms.data);
        }
  }
}

}  // namespace
