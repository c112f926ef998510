// Values of bfloat16, and their products, two at a time and summed in single precision.
//
// A word holds a value and the next one along what is summed over. Left factors lie in memory that way; right factors
// are put together from rows, whose own length is filled up to whole registers.
#pragma once

#include "registers.h"

struct bfloat16 {
  uint16_t bits;
};

template <>
struct Arithmetic<bfloat16> {
  using Word = uint32_t;
  using Sum = float;
  static constexpr Int values = 2;
};

namespace {

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
