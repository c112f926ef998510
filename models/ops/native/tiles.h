// Products of bfloat16 in tiles (AMX): 16 rows of 16 words each, for which registers take up to 30 times as long.
//
// The system has to be asked before a process may use them (`allow_tiles`); where it refuses, and where the processor
// has none, products are made in registers.
#pragma once

#include "bfloat16.h"
#include "product.h"

extern bool tiles_allowed;

// Gives the tiles of a thread back when it has used them: others should neither find nor save them.
struct Tiles {
#if defined(TILES)
  ~Tiles();
#endif
};

// `count` products of the same right factor, as `multiply_lines` has them, in tiles of so many words.
template <typename Out>
void multiply_tiles(Int count, Int rows, Int columns, Int words, Terms terms, Left<bfloat16> a, Int a_step,
                    Right<bfloat16> b, Out* c, Int c_row, Int c_step, Store how, const float* offset, Early early);

namespace {

constexpr Int TILE = 16;  // rows of a tile, and words of a row

// Whether products of a type are made in tiles.
template <typename T>
bool tiled() {
  return Arithmetic<T>::values > 1 && tiles_allowed;
}

// To how many words those of some values are filled up with zeros, where they are summed over.
template <typename T>
Int filled(Int values) {
  const Int inner = words<T>(values), count = ceil_div(inner, TILE);
  return tiled<T>() && count ? count * ceil_div(inner, count) : inner;
}

}  // namespace
