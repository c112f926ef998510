// Mixing kernels from cells, a few rows and channels at a time, and its adjoint.
#pragma once

#include "problem.h"
#include "tiles.h"

namespace {

constexpr Int MIXTURES = 80;  // that a row of the cells is read for: it stays in a cache; twice as many in tiles
constexpr Int FEW = 3;  // mixtures that leave registers for twice as many columns
constexpr Int THIN = 16;  // mixtures that are rounded to bfloat16 sooner than the cells would be
constexpr Int FAR = 8 << 20;  // bytes that are too many to be in a cache when they are read again
constexpr Int PAD = 16;  // between kernels: at powers of two they would share few lines of the caches

// Ask for a matrix (rows, columns) early, to read or to write.
template <int write, typename T>
void ask_for(const T* first, Int rows, Int row, Int columns) {
  for (Int i = 0; i < rows; i++)
    for (Int k = 0; k < columns; k += 64 / Int(sizeof(T))) __builtin_prefetch(first + i * row + k, write, 2);
}

template <typename T>
Int most_mixtures() {
  return tiled<T>() ? 2 * MIXTURES : MIXTURES;
}

template <typename T>
constexpr bool PAIRED = Arithmetic<T>::values > 1;
template <typename T>
constexpr Int STRIP = WIDE * LANES<T>;  // columns of a product that are computed together
template <typename T>
constexpr Int SPAN = 2 * STRIP<T>;  // channels of cells in far memory that are read together

// Rows as a right factor: where they lie, or as words in `room`, filled up with rows of zeros.
template <typename T, typename S>
Right<T> right_factor(Int rows, Int columns, const S* from, Int row, Word<T>* room) {
  const Int length = round_up(columns);
  if constexpr (PAIRED<T>) {
    for (Int i = 0; i < rows; i += 2)
      pair_rows(columns, from + i * row, i + 1 < rows ? from + (i + 1) * row : nullptr, room + i / 2 * length);
    std::fill_n(room + words<T>(rows) * length, (filled<T>(rows) - words<T>(rows)) * length, 0);
    return {room, length};
  } else if constexpr (std::is_same_v<T, S>) {
    return {from, row};
  } else {
    for (Int i = 0; i < rows; i++) widen_row(columns, from + i * row, room + i * length);
    return {room, length};
  }
}

// Columns as the rows of a right factor, `length` words apart, of which `room` may be written.
template <typename T>
void turn(Int rows, Int columns, const T* from, Int row, Word<T>* to, Int length, Int room) {
  transpose<Word<T>>(rows, words<T>(columns), (const Word<T>*)from, words<T>(row), to, length, room);
}

// Room for words of the cells that are mixed at once, if they do not lie in memory like that.
template <typename T, typename C>
Int cell_room(const Problem& p) {
  return std::is_same_v<Word<T>, C> ? 0 : filled<T>(p.cells) * STRIP<T>;
}

// α, a row of so many words for each mixture.
template <typename T>
struct Coefficients {
  Int row;
  Buffer<Word<T>> room;
  const Word<T>* data;

  Coefficients(const T* alpha, Int mixtures, Int cells)
      : row(filled<T>(cells)), room(row > words<T>(cells) ? mixtures * row : 0) {
    const Int length = words<T>(cells);
    data = row > length ? room.data : (const Word<T>*)alpha;
    for (Int i = 0; i < mixtures && row > length; i++) {
      std::copy_n((const Word<T>*)alpha + i * length, length, &room[i * row]);
      std::fill_n(&room[i * row + length], row - length, Word<T>(0));
    }
  }
};

// c = a b for few rows: reads the right factor as it lies, at the pace of memory; `multiply` does too much besides.
template <Int rows, typename T>
void multiply_few(Int columns, Int inner, Left<T> a, Right<T> b, T* c, Int c_row) {
  for_columns<T, 2 * WIDE>(0, columns, [=](auto lanes, auto vectors, Int column) __attribute__((always_inline)) {
    using V = Vector<T, lanes>;
    V sum[rows][vectors] = {};
    const T* right = b.data + column;
    for (Int k = 0; k < inner; k++, right += b.inner)
      for (Int v = 0; v < vectors; v++)
        for (Int i = 0; i < rows; i++) sum[i][v] += a.data[i * a.row + k] * *(const V*)(right + v * lanes);
    for (Int i = 0; i < rows; i++)
      for (Int v = 0; v < vectors; v++) *(V*)(c + i * c_row + column + v * lanes) = sum[i][v];
  });
}
template <typename T>
void multiply_few(Int rows, Int columns, Int inner, Left<T> a, Right<T> b, T* c, Int c_row) {
  if (rows == 1) multiply_few<1>(columns, inner, a, b, c, c_row);
  if (rows == 2) multiply_few<2>(columns, inner, a, b, c, c_row);
  if (rows == 3) multiply_few<3>(columns, inner, a, b, c, c_row);
}

// One row of kernels, of cells as they are.
template <typename T>
void mix_row(Int mixtures, Int channels, const Problem& p, Left<T> a, const T* cells, T* out, Int size) {
  if (mixtures <= FEW) return multiply_few<T>(mixtures, channels, p.cells, a, {cells, p.cin}, out, size);
  for (Int from = 0; from < channels; from += STRIP<T>) {
    const Int columns = std::min(STRIP<T>, channels - from);
    const T *first = cells + from, *next = from + columns < channels ? first + columns : cells + p.cells * p.cin;
    multiply<T>(mixtures, columns, p.cells, a, {first, p.cin}, out + from, size, WRITE, {next, p.cells, p.cin, columns});
  }
}

// Kernels (count · parts, rows, channels) of some units, `size` values apart; `room` is for words of cells. Cells are
// asked for while those before are mixed. A thin α is mixed in the precision of the cells.
template <typename T, typename C>
void mix_shared(const Problem& p, const Coefficients<T>& alpha, const C* cells, Int unit, Int count, Int row, Int rows,
                Int channel, Int channels, T* out, Int size, Word<T>* room) {
  const Int mixtures = count * p.parts();
  const Left<T> a = {alpha.data + unit * p.parts() * alpha.row, alpha.row, 1};
  if constexpr (PAIRED<T> && std::is_same_v<C, Sum<T>>)
    if (mixtures <= THIN) {
      const Int length = round_up(p.cells), mixed_size = round_up(channels);
      const Buffer<C> wide(mixtures * length), mixed(mixtures * mixed_size);
      for (Int i = 0; i < mixtures; i++) widen_row(p.cells, (const T*)(a.data + i * a.row), &wide[i * length]);
      for (Int r = row; r < row + rows; r++, out += channels) {
        const C* own = cells + r * p.cells * p.cin + channel;
        mix_row<C>(mixtures, channels, p, {wide.data, length, 1}, own, mixed.data, mixed_size);
        round_rows(mixtures, channels, mixed.data, mixed_size, out, size);
      }
      return;
    }
  for (Int r = row; r < row + rows; r++, out += channels) {
    const C* own = cells + r * p.cells * p.cin + channel;
    if constexpr (std::is_same_v<Word<T>, C>) {
      mix_row<T>(mixtures, channels, p, a, own, out, size);
      continue;
    }
    for (Int from = 0; from < channels; from += STRIP<T>) {
      const Int columns = std::min(STRIP<T>, channels - from);
      const C* first = own + from;
      const C* next = from + columns < channels ? first + columns : own + p.cells * p.cin;
      const Right<T> b = right_factor<T>(p.cells, columns, first, p.cin, room);
      multiply<T>(mixtures, columns, alpha.row, a, b, out + from, size, WRITE, {next, p.cells, p.cin, columns});
    }
  }
}

// The same where each mixture has cells of its own.
template <typename T, typename C>
void mix_folded(const Problem& p, const Coefficients<T>& alpha, const C* cells, Int unit, Int count, Int row, Int rows,
                Int channel, Int channels, T* out, Int size, Word<T>* room) {
  const Int parts = p.parts();
  for (Int r = row; r < row + rows; r++, out += channels)
    for (Int part = 0; part < parts; part++) {
      const Int mixture = (unit * p.folded + r * p.folded / p.cout) * parts + part;
      const Left<T> a = {alpha.data + mixture * alpha.row, p.folded * parts * alpha.row, 1};
      const C *first = cells + (r * p.cells * parts + part) * p.cin + channel, *next_part = first + p.cin;
      if (part == parts - 1) next_part += (p.cells - 1) * parts * p.cin;
      if constexpr (std::is_same_v<Word<T>, C>)
        if (count <= FEW) {
          multiply_few<T>(count, channels, p.cells, a, {first, parts * p.cin}, out + part * size, parts * size);
          continue;
        }
      for (Int from = 0; from < channels; from += STRIP<T>) {
        const Int columns = std::min(STRIP<T>, channels - from);
        const C* next = from + columns < channels ? first + from + columns : next_part;
        const Right<T> b = right_factor<T>(p.cells, columns, first + from, parts * p.cin, room);
        multiply<T>(count, columns, alpha.row, a, b, out + part * size + from, parts * size, WRITE,
                    {next, p.cells, parts * p.cin, columns});
      }
    }
}

// Where each of `count` parts of a whole begins: at multiples of a unit.
struct Parts {
  Int total, count, unit;
  Int begin(Int part) const { return std::min(ceil_div(total, unit) * part / count * unit, total); }
  Int size(Int part) const { return begin(part + 1) - begin(part); }
  Int most() const { return std::min(ceil_div(ceil_div(total, unit), count) * unit, total); }
};

// Memory for `unmix`: factors as words, cells rounded, what is turned, and gradients of α that lie by cells.
template <typename T>
struct Unmixing {
  Buffer<Word<T>> paired, coefficients, kernels, turned;
  Buffer<T> rounded;
  Buffer<Sum<T>> by_cells;

  Unmixing(const Problem& p, Int mixtures, Int channels)
      : paired(PAIRED<T> ? filled<T>(mixtures) * round_up(p.cells) : 0),
        coefficients(p.cells * round_up(filled<T>(mixtures))),
        kernels(PAIRED<T> ? filled<T>(mixtures) * round_up(channels) : 0),
        turned(std::max(words<T>(channels), mixtures) * round_up(p.cells)),
        rounded(PAIRED<T> ? p.cells * channels : 0), by_cells(PAIRED<T> ? 0 : p.cells * mixtures) {
    std::fill_n(turned.data, words<T>(channels) * round_up(p.cells), Word<T>(0));
  }
};

// α (mixtures, cells) as a left factor (cells, mixtures), of which what is summed over lies together.
template <typename T>
Left<T> coefficients_of_cells(const Problem& p, const Word<T>* alpha, Int row, Int mixtures, const Unmixing<T>& room) {
  const Int length = filled<T>(mixtures), to_row = round_up(length);
  if constexpr (PAIRED<T>) {
    const auto paired = right_factor<T>(mixtures, p.cells, (const T*)alpha, row * 2, room.paired.data);
    transpose(length, p.cells, paired.data, paired.inner, room.coefficients.data, to_row, to_row);
  } else {
    transpose(mixtures, p.cells, alpha, row, room.coefficients.data, to_row, to_row);
  }
  return {room.coefficients.data, to_row, 1};
}

// The adjoint of mixing: from gradients of kernels (mixtures, rows, channels), `size` values apart, to those of α,
// which are added to, and of the cells. Cells and their gradients are in far memory: of the next row's cells each of
// the two products asks for half.
template <typename T>
void unmix(const Problem& p, const Word<T>* alpha, Int alpha_row, const Sum<T>* cells, const T* kernels, Int mixtures,
           Int rows, Int channels, Int size, Store how, const Unmixing<T>& room, Sum<T>* grad_alpha,
           Sum<T>* grad_cells) {
  const Int padded = round_up(p.cells), row = p.cells * p.cin, together = PAIRED<T> ? 32 : 2 * TALL;
  const Left<T> coefficients = coefficients_of_cells<T>(p, alpha, alpha_row, mixtures, room);
  // One factor of α's gradient has to be turned: kernels, if they are fewer than cells, and fill registers then.
  const bool turns_kernels = !PAIRED<T> && mixtures % (2 * LANES<T>) == 0 && mixtures < p.cells;
  for (Int r = 0; r < rows; r++, kernels += channels, cells += row, grad_cells += row) {
    const Right<T> received = right_factor<T>(mixtures, channels, kernels, size, room.kernels.data);
    if constexpr (PAIRED<T>) {
      round_rows(p.cells, channels, cells, p.cin, room.rounded.data, channels);
      turn(p.cells, channels, room.rounded.data, channels, room.turned.data, padded, padded);
    } else if (turns_kernels) {
      turn(mixtures, channels, kernels, size, room.turned.data, mixtures, mixtures);
    }
    for (Int cell = 0; cell < p.cells; cell += STRIP<T>) {
      const Int strip = std::min(STRIP<T>, p.cells - cell), half = strip / 2;
      const Sum<T>*own = cells + cell * p.cin, *next = own + row;
      for (Int i = 0; i < strip; i += together) {
        const Int few = std::min(together, strip - i), at = (cell + i) * p.cin;
        const Left<T> left = {coefficients.data + (cell + i) * coefficients.row, coefficients.row, 1};
        if (how == WRITE) ask_for<1>(grad_cells + at + row, few, p.cin, channels);
        const Early early = how == ADD ? Early(grad_cells + at + row, few, p.cin, channels)
                                       : Early(next + i / 2 * p.cin, (i + few) / 2 - i / 2, p.cin, channels);
        multiply<T>(few, channels, filled<T>(mixtures), left, received, grad_cells + at, p.cin, how, early);
      }
      const Int asked = how == ADD ? 0 : half;
      const Early early(next + asked * p.cin, strip - asked, p.cin, channels);
      if constexpr (!PAIRED<T>) {
        if (turns_kernels) {
          multiply<T>(strip, mixtures, channels, {own, p.cin, 1}, {room.turned.data, mixtures},
                      &room.by_cells[cell * mixtures], mixtures, r > 0 ? ADD : WRITE, early);
          continue;
        }
        turn(strip, channels, own, p.cin, room.turned.data + cell, padded, padded - cell);
      }
      multiply<T>(mixtures, std::min(STRIP<T>, padded - cell), words<T>(channels),
                  {(const Word<T>*)kernels, words<T>(size), 1}, {room.turned.data + cell, padded}, grad_alpha + cell,
                  padded, ADD, early);
    }
  }
  if constexpr (!PAIRED<T>) {
    if (!turns_kernels) return;
    transpose(p.cells, mixtures, room.by_cells.data, mixtures, room.turned.data, padded, padded);
    for (Int i = 0; i < mixtures; i++)
      for (Int k = 0; k < p.cells; k++) grad_alpha[i * padded + k] += room.turned[i * padded + k];
  }
}

}  // namespace
