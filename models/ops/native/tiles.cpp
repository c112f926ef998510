// Products of bfloat16 in tiles. The instructions are written out, since compilers learned them late.

#include "tiles.h"

#include <sys/syscall.h>
#include <unistd.h>

bool tiles_allowed = false;

#if defined(TILES)

namespace {

// What the tiles of this thread are like: their rows and the words that are summed over, or 0.
thread_local Int tile_shape = 0;

// Tiles 0 to 3 hold sums, 4 and 5 left factors, 6 and 7 right ones.
inline void shape_tiles(Int rows, Int words) {
  if (tile_shape == rows * 2 * TILE + words) return;
  struct alignas(64) {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } shape = {1, 0, {}, {}, {}};
  for (int i = 0; i < 8; i++) {
    shape.bytes[i] = 4 * (i == 4 || i == 5 ? words : TILE);
    shape.rows[i] = i < 6 ? rows : words;
  }
  asm volatile("ldtilecfg %0" ::"m"(shape));
  tile_shape = rows * 2 * TILE + words;
}

template <int tile>
inline void load_tile(const uint32_t* from, Int row) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row * 4), "i"(tile) : "memory");
}
template <int tile>
inline void store_tile(float* to, Int row) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row * 4), "i"(tile) : "memory");
}
template <int tile>
inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int sum, int left, int right>
inline void add_product() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(left), "i"(right));
}

// Sums of one or two tiles of rows by one or two of columns.
template <bool two_rows, bool two_columns>
inline void sum_tiles(Terms terms, Int words, const uint32_t* left, const uint32_t* other, Int left_row,
                      Right<bfloat16> right, Early& early) {
  clear_tile<0>();
  if constexpr (two_columns) clear_tile<1>();
  if constexpr (two_rows) clear_tile<2>();
  if constexpr (two_rows && two_columns) clear_tile<3>();
  for (Int t = 0; t < terms.count; t++) {
    const Term term = terms.data[t];
    const uint32_t* b = right.data + term.right;
    for (Int k = 0; k < terms.inner; k += words, b += words * right.inner) {
      load_tile<4>(left + term.left + k, left_row);
      load_tile<6>(b, right.inner);
      add_product<0, 4, 6>();
      if constexpr (two_columns) {
        load_tile<7>(b + TILE, right.inner);
        add_product<1, 4, 7>();
      }
      if constexpr (two_rows) {
        load_tile<5>(other + term.left + k, left_row);
        add_product<2, 5, 6>();
      }
      if constexpr (two_rows && two_columns) add_product<3, 5, 7>();
      early.ask();
    }
  }
}

// Write sums (rows, 2 · 16) of up to 32 columns, with an offset.
template <typename Out>
void put_sums(Int rows, Int columns, const float* sums, Out* to, Int to_row, Store how, const float* offset) {
  const __mmask16 low = lanes(columns), high = columns > TILE ? lanes(columns - TILE) : 0;
  const __m512 one = load(offset, offset ? low : 0), other = load(offset + TILE, offset ? high : 0);
  for (Int i = 0; i < rows; i++, sums += 2 * TILE, to += to_row) {
    __m512 first = _mm512_load_ps(sums) + one, second = _mm512_load_ps(sums + TILE) + other;
    if constexpr (std::is_same_v<Out, bfloat16>) {
      _mm512_mask_storeu_epi16(to, low | __mmask32(high) << 16, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    } else {
      if (how == STREAM) {
        stream((__m512*)to, first);
        if (high) stream((__m512*)(to + TILE), second);
        continue;
      }
      if (how == ADD) first += load(to, low), second += load(to + TILE, high);
      store(to, low, first);
      store(to + TILE, high, second);
    }
  }
}

}  // namespace

template <typename Out>
void multiply_tiles(Int count, Int rows, Int columns, Int words, Terms terms, Left<bfloat16> a, Int a_step,
                    Right<bfloat16> b, Out* c, Int c_row, Int c_step, Store how, const float* offset, Early early) {
  alignas(64) float sums[2][TILE * 2 * TILE];
  // Tiles of the same height, of which the last may repeat some rows of the one before.
  const Int strips = ceil_div(rows, TILE), tall = ceil_div(rows, strips), total = count * strips;
  early.steps = ceil_div(total, 2) * ceil_div(columns, 2 * TILE) * terms.count * (terms.inner / words);
  shape_tiles(tall, words);
  const auto left = [&](Int line, Int row) { return a.data + line * a_step + row * a.row; };
  for (Int i = 0; i < total; i += 2) {
    const bool two_rows = i + 1 < total;
    Int line[2], row[2], done[2];  // the rows of each tile, and those of them that are there already
    for (Int n = 0; n < 1 + two_rows; n++) {
      line[n] = (i + n) / strips;
      const Int first = (i + n) % strips * tall;
      row[n] = std::min(first, rows - tall);
      done[n] = first - row[n];
    }
    const uint32_t *first = left(line[0], row[0]), *second = two_rows ? left(line[1], row[1]) : nullptr;
    for (Int column = 0; column < columns; column += 2 * TILE) {
      const bool two_columns = columns - column > TILE;
      const Right<bfloat16> right = {b.data + column, b.inner};
      const auto sum = [&](auto two_rows, auto two_columns) {
        sum_tiles<two_rows, two_columns>(terms, words, first, second, a.row, right, early);
        store_tile<0>(sums[0], 2 * TILE);
        if constexpr (two_columns) store_tile<1>(sums[0] + TILE, 2 * TILE);
        if constexpr (two_rows) store_tile<2>(sums[1], 2 * TILE);
        if constexpr (two_rows && two_columns) store_tile<3>(sums[1] + TILE, 2 * TILE);
      };
      if (two_rows)
        two_columns ? sum(std::true_type{}, std::true_type{}) : sum(std::true_type{}, std::false_type{});
      else
        two_columns ? sum(std::false_type{}, std::true_type{}) : sum(std::false_type{}, std::false_type{});
      for (Int n = 0; n < 1 + two_rows; n++)
        put_sums(tall - done[n], columns - column, sums[n] + done[n] * 2 * TILE,
                 c + line[n] * c_step + (row[n] + done[n]) * c_row + column, c_row, how,
                 offset ? offset + column : nullptr);
    }
  }
}

#define KERNELS(Out)                                                                                             \
  template void multiply_tiles(Int, Int, Int, Int, Terms, Left<bfloat16>, Int, Right<bfloat16>, Out*, Int, Int, \
                               Store, const float*, Early);
KERNELS(float)
KERNELS(bfloat16)

Tiles::~Tiles() {
  if (tile_shape) asm volatile("tilerelease");
  tile_shape = 0;
}

#endif

// Ask the system for the tiles of AMX, and use them from now on where that is granted and `wanted`.
extern "C" int allow_tiles(int wanted) {
#if defined(TILES)
  tiles_allowed = wanted && syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* of tiles */) == 0;
#endif
  return tiles_allowed;
}
