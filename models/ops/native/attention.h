// What an attention computes.
#pragma once

#include "problem.h"

namespace {

constexpr Int CHUNK = 1 << 13;  // values of an image that are summed at once

struct Attention {
  Int batch, pixels, channels, channels_last, width, mixtures, cells, layer_norm;

  Int logits() const { return cells + 1; }

  // Few channels are summed as those of several neighbouring pixels, if these divide the image.
  Int neighbours() const {
    Int count = 1;
    while (2 * count * channels <= 64 && pixels % (2 * count) == 0) count *= 2;
    return count;
  }
  Int chunks() const { return std::min(ceil_div(pixels * channels, CHUNK), pixels / neighbours()); }
  Int room() const { return channels_last ? batch * chunks() * neighbours() * channels : 0; }  // for their sums
};

}  // namespace
