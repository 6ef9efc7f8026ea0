// The backward pass of an elementwise quantizer: the gradient of x, and sums of gradients for its parameters.
#pragma once

#include <vector>

#include "numbers.h"
#include "sums.h"
#include "walk.h"

namespace qexp {

// Gradient terms of one block that are to be summed a channel; S of them.
template <class C, int S>
using Terms = std::array<C*, S>;

// Runs kernel(x, g, dx, n, channel, terms) over all blocks and returns {dx, sums [S][channels]}.
// The sums are taken in float64, chunk by chunk in a fixed order, so they do not depend on the number of threads.
template <class T, int S, class F>
std::vector<double> backward_walk(const Walk& walk, const Tensor& x, const Tensor& grad, Tensor& dx,
                                  F&& kernel) {
  using C = Compute<T>;
  const int64_t channels = walk.channels, chunks = walk.chunks();
  std::vector<double> partial(S * channels * chunks, 0.0);
  const T *from = data<T>(x), *gradient = data<T>(grad);
  T* to = writable<T>(dx);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    alignas(64) C values[kBlock], g[kBlock], result[kBlock], term[S > 0 ? S : 1][kBlock];
    Terms<C, S> terms;
    for (int s = 0; s < S; ++s) terms[s] = term[s];
    for (int64_t k = first; k < last; ++k) {
      double* sums = partial.data() + S * channels * k;
      walk.blocks(walk.chunk_begin(k), walk.chunk_begin(k + 1), [&](const Block& b) {
        const C* xs = load<C>(from + b.in[0], walk.stride[0], b.n, values);
        const C* gs = load<C>(gradient + b.in[1], walk.stride[1], b.n, g);
        C* where = place<C>(to + b.out, result);
        kernel(xs, gs, where, b.n, b.channel, terms);
        store(to + b.out, where, b.n);
        for (int s = 0; s < S; ++s) add(sums + s * channels, terms[s], b, walk);
      });
    }
  });
  std::vector<double> total(S * channels, 0.0);
  for (int64_t k = 0; k < chunks; ++k)
    for (int64_t i = 0; i < S * channels; ++i) total[i] += partial[S * channels * k + i];
  return total;
}

// Adds the terms of one block to the sums of their channels.
template <class C>
void add(double* sums, const C* __restrict term, const Block& b, const Walk& walk) {
  if (!walk.varies) {
    sums[b.channel] += sum_of(term, b.n);
    return;
  }
  for (int64_t i = 0, channel = b.channel; i < b.n;) {
    const int64_t stop = std::min(b.n, i + walk.channels - channel);
    for (int64_t c = channel; i < stop; ++i, ++c) sums[c] += term[i];
    channel = 0;
  }
}

// Returns sums as a tensor shaped and typed like the parameter they are the gradient of.
inline Tensor gradient_like(const Tensor& parameter, const double* sums, int64_t channels, double factor) {
  Tensor out = empty_of(Ints(parameter.sizes().begin(), parameter.sizes().end()), parameter.scalar_type(), parameter);
  const bool one = parameter.numel() == 1;
  double total = 0;
  if (one)
    for (int64_t c = 0; c < channels; ++c) total += sums[c];
  with_type(out, [&](auto tag) {
    using T = decltype(tag);
    T* to = writable<T>(out);
    for (int64_t c = 0; c < out.numel(); ++c)
      to[c] = static_cast<T>(static_cast<Compute<T>>((one ? total : sums[c]) * factor));
  });
  return out;
}

}  // namespace qexp
