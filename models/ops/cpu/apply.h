// The convolution of an image with the kernels of one sample.
#pragma once

#include "axis.h"
#include "mixing.h"

namespace {

constexpr Int SMALL = 24 << 10;  // bytes of kernels that stay in the first-level cache

// Kernels as a right factor: `columns` of them, whose rows, taps and blocks of rows begin so many values apart.
template <typename T>
struct Kernels {
  const T* data;
  Int columns, row, tap, block;
};

// Pixels to read: their size, and `blocks` of `channels` each, that are `block` values apart.
template <typename T>
struct Pixels {
  const T* data;
  Int size, blocks, channels, block;
};

// Part of an image: some of its lines, and of each the same pixels.
struct Span {
  Int first_line, last_line, first, last;
};

// Sum what the pixels of a span read through the taps of a kernel; `room` is for the terms.
template <typename T>
void apply(const Lines& lines, Span span, Pixels<T> from, Kernels<T> kernels, T* to, Int to_size, Store how,
           Term* room) {
  const Axis &depth = lines.depth, &height = lines.height, &width = lines.width;
  for (Int d = 0; d < depth.count; d++)
    for (Int i = 0; i < height.runs; i++) {
      const Int h = std::max(height.run[i].first, span.first_line - d * height.count);
      const Int last_h = std::min(height.run[i].last, span.last_line - d * height.count);
      for (Int j = 0; j < width.runs && h < last_h; j++) {
        const Int w = std::max(width.run[j].first, span.first), last_w = std::min(width.run[j].last, span.last);
        if (w >= last_w) continue;
        Terms terms = {room, 0, from.channels};
        lines.for_taps(depth.run_of(d), height.run[i], width.run[j], [&](const Tap& d, const Tap& h, const Tap& w) {
          const Int pixel = lines.ahead(d, h, w) * from.size, tap = lines.number(d, h, w) * kernels.tap;
          for (Int block = 0; block < from.blocks; block++)
            room[terms.count++] = {pixel + block * from.block, tap + block * kernels.block};
        });
        // The rows of the product are neighbours along the longer side.
        const bool across = last_w - w >= last_h - h;
        const Int first = across ? h : w, last = across ? last_h : last_w, rows = across ? last_w - w : last_h - h;
        const Int row = across ? width.step : height.step * lines.read_size[2];
        const Int to_row = across ? width.stride : height.stride * lines.size[2];
        const Int step = across ? height.step * lines.read_size[2] : width.step;
        const Int to_step = across ? height.stride * lines.size[2] : width.stride;
        const Left<T> a = {from.data + lines.read(d, h, w) * from.size, row * from.size, 1};
        multiply_lines<T>(last - first, rows, kernels.columns, terms, a, step * from.size, {kernels.data, kernels.row},
                          to + lines.pixel(d, h, w) * to_size, to_row * to_size, to_step * to_size, how);
      }
    }
}

}  // namespace
