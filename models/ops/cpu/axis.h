// Which pixels are read, and through which taps of the kernel: along each axis, for runs of pixels that are alike.
#pragma once

#include "problem.h"

namespace {

// A position of the kernel along one axis: the pixels from `first` to `last` read `step · i + at` through it.
struct Tap {
  Int number, at, first, last;
};

// Pixels from `first` to `last` that read through the same taps, from `tap` to `last_tap`.
struct Run {
  Int first, last, tap, last_tap;
};

// Along one axis, the pixels `start + stride · i`, for i below `count`, and what they read.
struct Axis {
  Int start, stride, step, count, taps = 0, runs = 0;
  Buffer<Tap> tap;
  Buffer<Run> run;

  // Outputs, which read inputs.
  Axis(const Problem& p, Int dim)
      : start(0), stride(1), step(p.stride[dim]), count(p.output[dim]), tap(p.taps[dim]), run(2 * p.taps[dim] + 1) {
    for (Int k = 0; k < p.taps[dim]; k++) {
      const Int at = k * p.dilation[dim] - p.padding[dim];
      add(k, at, ceil_div(std::max<Int>(-at, 0), step), at < p.input[dim] ? (p.input[dim] - 1 - at) / step + 1 : 0);
    }
    find_runs();
  }

  // Every `stride`-th input from `phase` on, which read gradients of outputs.
  Axis(const Problem& p, Int dim, Int phase)
      : start(phase), stride(p.stride[dim]), step(1), count(ceil_div(p.input[dim] - phase, stride)), tap(p.taps[dim]),
        run(2 * p.taps[dim] + 1) {
    for (Int k = 0; k < p.taps[dim]; k++) {
      const Int distance = phase + p.padding[dim] - k * p.dilation[dim], at = distance / stride;
      if (at * stride == distance) add(k, at, std::max<Int>(-at, 0), p.output[dim] - at);
    }
    find_runs();
  }

  void add(Int number, Int at, Int first, Int last) {
    last = std::min(last, count);
    if (first < last) tap[taps++] = {number, at, first, last};
  }

  const Run& run_of(Int i) const {
    Int r = 0;
    while (run[r].last <= i) r++;
    return run[r];
  }

  // All taps, wherever they reach.
  Run all() const { return {0, count, 0, taps}; }

  // The taps of a pixel are neighbours, since what they read moves in one direction.
  void find_runs() {
    for (Int first = 0; first < count; first = run[runs++].last) {
      Int last = count, begin = taps, end = 0;
      for (Int k = 0; k < taps; k++) {
        if (tap[k].first > first) {
          last = std::min(last, tap[k].first);
        } else if (tap[k].last > first) {
          last = std::min(last, tap[k].last);
          begin = std::min(begin, k);
          end = k + 1;
        }
      }
      run[runs] = {first, last, std::min(begin, end), end};
    }
  }
};

// The lines of an image, each made of runs of pixels, and what they read of another image.
struct Lines {
  const Int *size, *read_size, *kernel_size;
  Axis depth, height, width;
  Int count;

  // Outputs, which read inputs.
  explicit Lines(const Problem& p)
      : size(p.output), read_size(p.input), kernel_size(p.taps), depth(p, 0), height(p, 1), width(p, 2),
        count(depth.count * height.count) {}

  // The inputs of one of the `phases`, which read gradients of outputs.
  Lines(const Problem& p, Int phase)
      : size(p.input), read_size(p.output), kernel_size(p.taps), depth(p, 0, phase / phases(p, 2) / phases(p, 1)),
        height(p, 1, phase / phases(p, 2) % phases(p, 1)), width(p, 2, phase % phases(p, 2)),
        count(depth.count * height.count) {}

  static Int phases(const Problem& p, Int dim) { return std::min(p.stride[dim], p.input[dim]); }
  static Int phases(const Problem& p) { return phases(p, 0) * phases(p, 1) * phases(p, 2); }

  // Visit the taps of a run along each axis.
  template <typename Visit>
  void for_taps(const Run& deep, const Run& high, const Run& wide, Visit visit) const {
    for (Int i = deep.tap; i < deep.last_tap; i++)
      for (Int j = high.tap; j < high.last_tap; j++)
        for (Int k = wide.tap; k < wide.last_tap; k++) visit(depth.tap[i], height.tap[j], width.tap[k]);
  }

  // Number of a tap, and how many pixels on it reads.
  Int number(const Tap& d, const Tap& h, const Tap& w) const {
    return (d.number * kernel_size[1] + h.number) * kernel_size[2] + w.number;
  }
  Int ahead(const Tap& d, const Tap& h, const Tap& w) const {
    return (d.at * read_size[1] + h.at) * read_size[2] + w.at;
  }

  // Numbers of pixels: of one that is written, and of what it would read through a tap with `at` 0.
  Int pixel(Int d, Int h, Int w) const {
    const Int line = (depth.start + d * depth.stride) * size[1] + height.start + h * height.stride;
    return line * size[2] + width.start + w * width.stride;
  }
  Int read(Int d, Int h, Int w) const {
    return (d * depth.step * read_size[1] + h * height.step) * read_size[2] + w * width.step;
  }
};

}  // namespace
