// Products of bfloat16 in registers, two values at a time; and the choice between them and tiles.

#include "tiles.h"

#if defined(__AVX512BF16__)

namespace {

template <typename Out, Int vectors, Int rows>
inline __attribute__((always_inline)) void tile(Terms terms, Left<bfloat16> a, Right<bfloat16> b, Out* c, Int c_row,
                                                __mmask16 last, Store how, const float* offset, Early& early) {
  const auto mask = [=](Int v) { return v < vectors - 1 ? __mmask16(0xffff) : last; };
  __m512 sum[rows][vectors];
  for (Int i = 0; i < rows; i++)
    for (Int v = 0; v < vectors; v++) {
      sum[i][v] = _mm512_setzero_ps();
      if constexpr (std::is_same_v<Out, float>)
        if (how == ADD) sum[i][v] = load(c + i * c_row + v * 16, mask(v));
    }
  for (Int t = 0; t < terms.count; t++) {
    const uint32_t *left = a.data + terms.data[t].left, *right = b.data + terms.data[t].right;
    for (Int k = 0; k < terms.inner; k++, left += a.inner, right += b.inner) {
      __m512bh value[vectors];
      for (Int v = 0; v < vectors; v++) value[v] = (__m512bh)_mm512_loadu_si512(right + v * 16);
      if (k % ROUND == 0) early.ask();
      for (Int i = 0; i < rows; i++) {
        const __m512bh pair = (__m512bh)_mm512_set1_epi32(left[i * a.row]);
        for (Int v = 0; v < vectors; v++) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], value[v], pair);
      }
    }
  }
  if (offset)
    for (Int v = 0; v < vectors; v++)
      for (Int i = 0; i < rows; i++) sum[i][v] += load(offset + v * 16, mask(v));
  if constexpr (std::is_same_v<Out, float>)
    if (how == STREAM) {
      for (Int i = 0; i < rows; i++)
        for (Int v = 0; v < vectors; v++) stream((__m512*)(c + i * c_row + v * 16), sum[i][v]);
      return;
    }
  for (Int i = 0; i < rows; i++)
    for (Int v = 0; v < vectors; v++) store(c + i * c_row + v * 16, mask(v), sum[i][v]);
}

template <typename Out>
void multiply_pairs(Int rows, Int columns, Terms terms, Left<bfloat16> a, Right<bfloat16> b, Out* c, Int c_row,
                    Store how, const float* offset, Early& early) {
  const auto strip = [&](auto vectors) {
    const __mmask16 last = lanes(columns - (vectors - 1) * 16);
    for_rows(rows, [=, &early](auto count, Int first) __attribute__((always_inline)) {
      const Left<bfloat16> left = {a.data + first * a.row, a.row, a.inner};
      tile<Out, vectors, count>(terms, left, b, c + first * c_row, c_row, last, how, offset, early);
    });
  };
  for (; columns > 48; columns -= 64, b.data += 64, c += 64, offset += offset ? 64 : 0)
    strip(std::integral_constant<Int, 4>{});
  if (columns > 32) return strip(std::integral_constant<Int, 3>{});
  if (columns > 16) return strip(std::integral_constant<Int, 2>{});
  if (columns > 0) return strip(std::integral_constant<Int, 1>{});
}

// Of how many words a tile's rows should be, to sum over `inner` of them: 0 if tiles would be nearly empty.
inline Int tile_words(Int inner) {
  if (inner <= TILE) return inner;
  for (Int words = TILE; words > TILE / 3; words--)
    if (inner % words == 0) return words;
  return 0;
}

}  // namespace

template <typename T, typename Out>
void multiply_words(Int count, Int rows, Int columns, Terms terms, Left<T> a, Int a_step, Right<T> b,
                    Out* c, Int c_row, Int c_step, Store how, const Sum<T>* offset, Early early) {
#if defined(TILES)
  const bool fitting = tiles_allowed && a.inner == 1 && std::min({count, rows, columns, terms.count}) > 0;
  if (const Int words = fitting ? tile_words(terms.inner) : 0)
    return multiply_tiles(count, rows, columns, words, terms, a, a_step, b, c, c_row, c_step, how, offset, early);
#endif
  early.steps = count * ceil_div(rows, TALL) * ceil_div(columns, 64) * terms.count * ceil_div(terms.inner, ROUND);
  for (Int i = 0; i < count; i++, a.data += a_step, c += c_step)
    multiply_pairs(rows, columns, terms, a, b, c, c_row, how, offset, early);
}

#define KERNELS(Out)                                                                                              \
  template void multiply_words(Int, Int, Int, Terms, Left<bfloat16>, Int, Right<bfloat16>, Out*, Int, Int, Store, \
                               const float*, Early);
KERNELS(float)
KERNELS(bfloat16)

#endif
