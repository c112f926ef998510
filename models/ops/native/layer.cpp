// A layer in inference: its attention, and the convolution with the kernels that are mixed.

#include "attention.h"
#include "bfloat16.h"

namespace {

// α (batch, taps, blocks of outputs, blocks of inputs, cells) as convolutions read it, with the taps behind the blocks
// of outputs, and in bfloat16 with an even number of values for each mixture.
template <typename T>
void by_output_blocks(const Problem& p, const Sum<T>* from, T* to) {
  const Int taps = p.taps[0] * p.taps[1] * p.taps[2], length = words<T>(p.cells) * Arithmetic<T>::values;
  for (Int sample = 0; sample < p.batch; sample++)
    for (Int tap = 0; tap < taps; tap++)
      for (Int block = 0; block < p.blocks_out; block++)
        for (Int i = 0; i < p.blocks_in; i++, from += p.cells) {
          T* row = to + (((sample * p.blocks_out + block) * taps + tap) * p.blocks_in + i) * length;
          if constexpr (Arithmetic<T>::values > 1) {
            round_rows(1, p.cells, from, 0, row, 0);
            if (length > p.cells) row[p.cells] = T{};
          } else {
            std::copy_n(from, p.cells, row);
          }
        }
}

}  // namespace

#define PARAMETERS(S)                                                                                           \
  const S *weight1, const S *bias1, const S *mean, const S *variance, const S *scale, const S *shift,           \
      const S *weight2, const S *bias2, const S *assignment, const S *temperature
#define GIVEN weight1, bias1, mean, variance, scale, shift, weight2, bias2, assignment, temperature

#define ATTENTION(T)                                                                                                  \
  extern "C" void attention_##T(const Attention&, double, double, Int threads, const T* x, PARAMETERS(Sum<T>),        \
                                Sum<T>* alpha);
#define EXPORT_LAYER(layer, convolve, T, C)                                                                           \
  extern "C" void convolve##_##T(const Problem&, Int threads, const T* alpha, const C* cells, const T* x,             \
                                 const Sum<T>* bias, T* y);                                                           \
  extern "C" void layer##_##T(const Attention& attention, const Problem& p, double norm_eps, double eps, Int threads, \
                              const T* x, PARAMETERS(Sum<T>), const C* cells, const Sum<T>* bias, T* y) {             \
    const Int mixtures = attention.batch * attention.mixtures;                                                        \
    const Buffer<Sum<T>> found(mixtures * p.cells);                                                                   \
    const Buffer<T> alpha(mixtures * words<T>(p.cells) * Arithmetic<T>::values);                                      \
    attention_##T(attention, norm_eps, eps, threads, x, GIVEN, found.data);                                           \
    by_output_blocks(p, found.data, alpha.data);                                                                      \
    convolve##_##T(p, threads, alpha.data, cells, x, bias, y);                                                        \
  }
#define EXPORT_DEPTHWISE(T, S)                                                                                        \
  extern "C" void mix_depthwise_##S(Int rows, Int cells, Int channels, Int threads, const S* alpha, const S* values,  \
                                    S* kernels);                                                                      \
  extern "C" void depthwise_##T(const Problem&, Int threads, const S* kernels, const T* x, T* y);                     \
  extern "C" void depthwise_layer_##T(const Attention& attention, const Problem& p, double norm_eps, double eps,      \
                                      Int threads, const T* x, PARAMETERS(S), const S* cells, T* y) {                 \
    const Int mixtures = attention.batch * attention.mixtures, channels = attention.channels;                         \
    const Int width = channels * p.parts() / attention.mixtures;                                                      \
    const Buffer<S> alpha(mixtures * attention.cells), kernels(mixtures * width);                                     \
    attention_##T(attention, norm_eps, eps, threads, x, GIVEN, alpha.data);                                           \
    mix_depthwise_##S(mixtures, attention.cells, width, threads, alpha.data, cells, kernels.data);                    \
    depthwise_##T(p, threads, kernels.data, x, y);                                                                    \
  }
ATTENTION(float)
ATTENTION(double)
EXPORT_LAYER(layer, convolve, float, float)
EXPORT_LAYER(layer, convolve, double, double)
EXPORT_LAYER(layer_rounded, convolve_rounded, float, bfloat16)
EXPORT_DEPTHWISE(float, float)
EXPORT_DEPTHWISE(double, double)
#if defined(__AVX512BF16__)
ATTENTION(bfloat16)
EXPORT_LAYER(layer, convolve, bfloat16, float)
EXPORT_LAYER(layer_rounded, convolve_rounded, bfloat16, bfloat16)
EXPORT_DEPTHWISE(bfloat16, float)
#endif
