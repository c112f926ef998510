// What is computed, and memory for it.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "product.h"

namespace {

// Sizes of three dimensions; an image has one of 1 in front, a line two.
struct Problem {
  Int batch, blocks_out, blocks_in, cells, cout, cin;
  Int input[3], output[3], taps[3], stride[3], padding[3], dilation[3];
  Int row_blocks;  // 0 where all parts share a bank; else each has its own, and α this many blocks of rows
  Int expert_parts;  // 0, or parts of α, 1 or one for each tap, where the bank is whole kernels (cells, cout, cin, taps)

  Int units() const { return batch * blocks_out; }
  Int parts() const { return taps[0] * taps[1] * taps[2] * blocks_in; }
  Int lines() const { return output[0] * output[1]; }
  Int pixels() const { return lines() * output[2]; }
  Int channels_in() const { return blocks_in * cin; }
  Int channels_out() const { return blocks_out * cout; }
  Int image_in() const { return input[0] * input[1] * input[2] * channels_in(); }
  Int image_out() const { return pixels() * channels_out(); }
  Int pixel_step() const { return stride[2] * channels_in(); }
};

// Memory for `count` values, uninitialised; the process ends with a message where there is none.
template <typename T>
struct Buffer {
  T* data;
  explicit Buffer(Int count) : data((T*)std::aligned_alloc(64, std::max<Int>(ceil_div(count * sizeof(T), 64), 1) * 64)) {
    if (!data) {
      std::fprintf(stderr, "kernelwarehouse: no memory for a workspace of %lld bytes\n",
                   (long long)(count * sizeof(T)));
      std::abort();
    }
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(data); }
  T& operator[](Int i) const { return data[i]; }
};

}  // namespace
