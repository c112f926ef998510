// The gradients of mixing: of the coefficients and the cells of kernels that a convolution was done with.
//
// Gradients of kernels exist for a few rows and channels at a time, as the kernels do in `convolution.cpp`.
#pragma once

#include <omp.h>

#include <cmath>

#include "axis.h"
#include "experts.h"

namespace {

constexpr Int GRADIENTS = 384 << 10;  // bytes for a thread's gradients of kernels
constexpr Int GATHERED = 640 << 10;  // bytes of an image's rows that are brought together
constexpr Int PIXELS = 128;  // that are summed over at once, and stay in the first-level cache for all rows

// Memory for `correlate`.
template <typename T>
struct Correlating {
  bool gathered;  // whether rows of what pixels have received are brought together: they lie far apart otherwise
  Buffer<Term> terms;
  Buffer<T> grad, turned;

  Correlating(const Problem& p, Int rows, Int channels)
      : gathered(p.pixels() * round_up(rows) * Int(sizeof(T)) <= GATHERED), terms(PIXELS),
        grad(gathered ? p.pixels() * round_up(rows) : 0), turned(channels * round_up(rows)) {}
};

// The gradients (parts, rows, channels), `size` values apart, of the kernels of one sample and block of outputs; where
// they are `turned`, neighbouring rows are in a register.
template <typename T>
void correlate(const Problem& p, const Lines& lines, const T* x, const T* grad, Int rows, Int channels, T* kernels,
               Int size, bool turned, const Correlating<T>& room) {
  const Axis &depth = lines.depth, &height = lines.height, &width = lines.width;
  const Int row_step = p.channels_out(), channel_step = p.pixel_step(), row_length = round_up(rows);
  if (depth.taps * height.taps * width.taps * p.blocks_in < p.parts()) std::fill_n(kernels, p.parts() * size, T{});
  for (Int i = 0; i < p.pixels() && room.gathered; i++) {
    for (Int k = 0; k < rows; k += LINE<T>) __builtin_prefetch(grad + (i + AHEAD) * row_step + k, 0, 2);
    std::copy_n(grad + i * row_step, rows, &room.grad[i * row_length]);
  }
  const T* all = room.gathered ? room.grad.data : grad;
  const Int step = room.gathered ? row_length : row_step;
  lines.for_taps(depth.all(), height.all(), width.all(), [&](const Tap& d, const Tap& h, const Tap& w) {
    const Int together = std::max<Int>(PIXELS / (w.last - w.first + 1), 1);
    for (Int block = 0; block < p.blocks_in; block++) {
      T* kernel = kernels + (lines.number(d, h, w) * p.blocks_in + block) * size;
      const T* in = x + lines.ahead(d, h, w) * p.channels_in() + block * p.cin;
      Store how = WRITE;
      for (Int i = d.first; i < d.last; i++)
        for (Int j = h.first; j < h.last; j += together)
          for (Int first = w.first; first < w.last; first += PIXELS, how = ADD) {
            const Int count = std::min(together, h.last - j), pixels = std::min(PIXELS, w.last - first);
            for (Int k = 0; k < count; k++) {
              const Int received = lines.pixel(i, j + k, first) * step, read = lines.read(i, j + k, first) * p.channels_in();
              room.terms[k] = turned ? Term{read, received} : Term{received, read};
            }
            const Terms terms = {room.terms.data, count, pixels};
            if (turned)
              multiply<T>(channels, rows, terms, {in, 1, channel_step}, {all, step}, room.turned.data, row_length, how);
            else
              multiply<T>(rows, channels, terms, {all, 1, step}, {in, channel_step}, kernel, channels, how);
          }
      if (turned) transpose<T>(channels, rows, room.turned.data, row_length, kernel, channels, channels);
    }
  });
}

// The gradient of α (threads, units, parts, n rounded up), to which each thread adds, and that of the cells or experts.
template <typename T>
void gradients_of_mixing(const Problem& p, Int threads, const T* alpha, const T* cells, const T* x, const T* grad,
                         T* grad_alpha, T* grad_cells) {
  const Lines lines(p);
  const Int parts = p.parts(), units = p.units(), padded = round_up(p.cells);
  const Parts all_channels = {p.cin, ceil_div(p.cin, SPAN<T>), LANES<T>};
  const Int channel_parts = all_channels.count, most = all_channels.most();
  const bool turned = p.cin < 2 * LANES<T> && p.cin < p.cout;  // registers would hold few channels
  // Of fewer units more rows fit, so that images are read less often, but cells more often. Both cost about the same
  // for a `fair` number of units.
  const double fair = std::sqrt(3. * p.cells * GRADIENTS / sizeof(T) / (double(most) * parts * p.pixels()));
  const Int fitting_units = std::max<Int>(MIXTURES / parts, 1);
  const Int together = ceil_div(units, ceil_div(units, std::min<Int>(fitting_units, std::max(fair + 0.5, 1.0))));
  const Int experts = p.expert_parts ? p.cells : 0, alphas = p.expert_parts ? p.expert_parts : parts;
  const Int fitting = GRADIENTS / Int(sizeof(T)) / ((together + 2 * experts) * parts * most) / TALL;
  const Int tall = std::max<Int>(fitting, 3) * TALL;
  const Int row_parts = std::max(ceil_div(p.cout, turned ? STRIP<T> : tall),
                                 std::min(p.cout, ceil_div(threads, channel_parts)));
  const Parts all_rows = {p.cout, row_parts, turned ? LANES<T> : 1};
  const Int most_rows = all_rows.most();
  const bool far = p.cells * p.cout * p.cin * Int(sizeof(T)) > FAR;
  const bool aligned = p.cin % LANES<T> == 0 && (uintptr_t)grad_cells % REGISTER == 0;
#pragma omp parallel num_threads(threads)
  {
    Buffer<T> kernels(together * parts * (most_rows * most + PAD));
    Buffer<T> coefficients(p.cells * round_up(together * parts)), cells_turned(most * padded);
    const Int room = experts * parts * (most_rows * most + PAD);
    Buffer<T> tile(room), grad_tile(room);
    const Correlating<T> correlating(p, most_rows, most);
    T* own_alpha = grad_alpha + omp_get_thread_num() * units * alphas * padded;
    std::fill_n(cells_turned.data, most * padded, T{});
    std::fill_n(kernels.data, together * parts * (most_rows * most + PAD), T{});  // what lies between kernels too
    std::fill_n(tile.data, room, T{});
    // Not dynamic: what is summed in which thread, and so the last digits, should be the same every time.
#pragma omp for collapse(2) schedule(static)
    for (Int row_part = 0; row_part < row_parts; row_part++)
      for (Int channel_part = 0; channel_part < channel_parts; channel_part++) {
        const Int row = all_rows.begin(row_part), rows = all_rows.size(row_part);
        const Int channel = all_channels.begin(channel_part), channels = all_channels.size(channel_part);
        const Int size = rows * channels + PAD;
        if (experts) read_experts<T>(p, cells, row, rows, channel, channels, tile.data, size);
        for (Int first = 0; first < units; first += together) {
          const Int count = std::min(together, units - first);
          for (Int unit = first; unit < first + count; unit++) {
            const T* in = x + unit / p.blocks_out * p.image_in() + channel;
            const T* received = grad + unit / p.blocks_out * p.image_out() + unit % p.blocks_out * p.cout + row;
            correlate<T>(p, lines, in, received, rows, channels, &kernels[(unit - first) * parts * size], size, turned,
                         correlating);
          }
          if (experts) {
            unmix_tile<T>(p, alpha, tile.data, kernels.data, first, count, rows * channels, size,
                          first > 0 ? ADD : WRITE, own_alpha, padded, grad_tile.data);
            continue;
          }
          const Int mixture = first * parts, at = row * p.cells * p.cin + channel;
          const Store how = first > 0 ? ADD : far && aligned ? STREAM : WRITE;
          unmix<T>(p, alpha + mixture * p.cells, cells + at, kernels.data, count * parts, rows, channels, size, how,
                   coefficients.data, cells_turned.data, own_alpha + mixture * padded, grad_cells + at);
        }
        if (experts) write_experts<T>(p, grad_tile.data, row, rows, channel, channels, grad_cells, size);
      }
    fence();
  }
}

}  // namespace
