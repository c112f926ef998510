// What an attention computes.
#pragma once

#include "problem.h"

namespace {

constexpr Int CHUNK = 1 << 13;  // values of an image that are summed at once

// The mean and variance that a hidden vector is normalised by: those that are kept, its own, or those of the batch.
enum Norm { KEPT, OWN, OF_BATCH };

struct Attention {
  Int batch, pixels, channels, channels_last, width, mixtures, cells, norm;

  Int logits() const { return cells + 1; }

  // Few channels are summed as those of several neighbouring pixels, if these divide the image.
  Int neighbours() const {
    Int count = 1;
    while (2 * count * channels <= 64 && pixels % (2 * count) == 0) count *= 2;
    return count;
  }
  Int chunks() const { return std::min(ceil_div(pixels * channels, CHUNK), pixels / neighbours()); }
  Int room() const { return channels_last ? batch * chunks() * neighbours() * channels : 0; }  // for their sums
  Int trace() const { return batch * channels + 2 * batch * width + std::max(batch, width) + 1; }
};

// What is computed on the way to the coefficients, in one piece of memory, of `trace` values.
template <typename S>
struct Trace {
  S *means, *normal, *hidden;  // means (batch, channels), and h (batch, width) before its scale and after its ReLU
  S* inverse;  // one over the standard deviation: of each of the hidden values, or each sample's
  S* temperature;

  Trace(const Attention& p, S* room)
      : means(room), normal(means + p.batch * p.channels), hidden(normal + p.batch * p.width),
        inverse(hidden + p.batch * p.width), temperature(inverse + std::max(p.batch, p.width)) {}
};

}  // namespace
