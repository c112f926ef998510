// Values of bfloat16, and their products, two at a time and summed in single precision.
//
// A word holds a value and the next one along what is summed over. Left factors lie in memory that way; right factors
// are put together from rows, whose own length is filled up to whole registers.
#pragma once

#include "product.h"

struct bfloat16 {
  uint16_t bits;
};

namespace {

template <>
struct Arithmetic<bfloat16> {
  using Word = uint32_t;
  using Sum = float;
  static constexpr Int values = 2;
};

// Some neighbours, as they are summed.
template <Int lanes, typename T>
inline Vector<Sum<T>, lanes> widen(const T* from) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    using Bits = Vector<uint32_t, lanes>;
    return (Vector<float, lanes>)(__builtin_convertvector(*(const Vector<uint16_t, lanes>*)from, Bits) << 16);
  } else {
    return *(const Vector<T, lanes>*)from;
  }
}

// Write some neighbours, rounded to the nearest value, of two the even one.
template <Int lanes, typename T>
inline void put(T* to, Vector<Sum<T>, lanes> values) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    using Bits = Vector<uint32_t, lanes>;
    const Bits bits = (Bits)values, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *(Vector<uint16_t, lanes>*)to = __builtin_convertvector(rounded, Vector<uint16_t, lanes>);
  } else {
    *(Vector<T, lanes>*)to = values;
  }
}

inline void widen_row(Int columns, const bfloat16* from, float* to) {
  for_columns<float>(0, columns, [&](auto lanes, auto vectors, Int first) {
    for (Int i = first; i < first + lanes * vectors; i += lanes) put<lanes>(to + i, widen<lanes>(from + i));
  });
}

#if defined(__AVX512BF16__)

inline __mmask16 lanes(Int count) { return count < 16 ? (1 << count) - 1 : 0xffff; }

inline __m512 load(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }
inline __m256i load(const bfloat16* from, __mmask16 mask) { return _mm256_maskz_loadu_epi16(mask, from); }
inline void store(float* to, __mmask16 mask, __m512 values) { _mm512_mask_storeu_ps(to, mask, values); }
inline void store(bfloat16* to, __mmask16 mask, __m512 values) {
  _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(values));
}

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

// Two rows side by side: the first value of one, the first of the other, the second of one, …
inline __m512i interleave(__m512i rows) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i other = _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16);
  return _mm512_permutexvar_epi16(_mm512_or_si512(lane, other), rows);
}
inline __m512i pair(__m512 first, __m512 second) { return interleave((__m512i)_mm512_cvtne2ps_pbh(second, first)); }
inline __m512i pair(__m256i first, __m256i second) {
  return interleave(_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
}

// Words of two rows; of one that is null they hold zeros.
template <typename S>
void pair_rows(Int columns, const S* first, const S* second, uint32_t* to) {
  for (Int i = 0; i < columns; i += 16) {
    const __mmask16 mask = lanes(columns - i);
    const auto one = load(first + i, first ? mask : 0), other = load(second + i, second ? mask : 0);
    _mm512_storeu_si512(to + i, pair(one, other));
  }
}

// Round rows to bfloat16.
inline void round_rows(Int rows, Int columns, const float* from, Int from_row, bfloat16* to, Int to_row) {
  for (Int i = 0; i < rows; i++, from += from_row, to += to_row)
    for (Int k = 0; k < columns; k += 16) {
      const __mmask16 mask = lanes(columns - k);
      store(to + k, mask, load(from + k, mask));
    }
}

#endif

}  // namespace
