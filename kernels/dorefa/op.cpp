// DoReFa's weight transform on the CPU; see reference.py.
#include <ATen/ops/aminmax.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../common/backward.h"
#include "../common/rounding.h"

namespace qexp {
namespace {

using at::Tensor;

template <class C, Rounding R, bool S>
void forward_block(const C* __restrict t, C* __restrict y, int64_t n, C divisor, C levels, C factor) {
  for (int64_t i = 0; i < n; ++i) {
    const C u = t[i] / divisor;
    y[i] = (S ? round_to<R>(u * levels, C(0)) / levels
              : round_to<R>((u * C(0.5) + C(0.5)) * levels, C(0)) * C(2) / levels - C(1)) *
           factor;
  }
}

// Returns {quantized, tanh(w), max|tanh(w)|}. The tanh is torch's own, so that it is the reference's to the last bit.
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& w, double levels, bool symmetric, bool rescale,
                                           std::string_view rounding) {
  Tensor out = at::empty_like(w), t = at::tanh(w.scalar_type() == at::kDouble ? w : w.to(at::kFloat));
  if (w.numel() == 0) return {out, t, at::zeros({}, t.options())};
  const auto [least, greatest] = at::aminmax(t);
  const double peak = at::maximum(-least, greatest).item<double>();
  const Walk walk(out, {&t}, std::nullopt);
  with_type(w, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    const C* from = t.const_data_ptr<C>();
    T* to = out.mutable_data_ptr<T>();
    const C divisor = peak == 0 ? C(1) : static_cast<C>(peak), n = static_cast<C>(levels);
    const C factor = rescale ? static_cast<C>(peak) : C(1);
    with_rounding(parse_rounding(rounding), [&](auto r) {
      constexpr Rounding R = decltype(r)::value;
      const auto kernel = symmetric ? forward_block<C, R, true> : forward_block<C, R, false>;
      at::parallel_for(0, walk.numel, kGrain, [&](int64_t begin, int64_t end) {
        alignas(64) C in[kBlock], result[kBlock];
        walk.blocks(begin, end, [&](const Block& b) {
          C* where = place<C>(to + b.out, result);
          kernel(load<C>(from + b.in[0], walk.stride[0], b.n, in), where, b.n, divisor, n, factor);
          store(to + b.out, where, b.n);
        });
      });
    });
  });
  return {out, t, at::full({}, peak, t.options())};
}

// The sum over a block of gradient times what the peak does to the result, and how many weights are at the peak.
template <class C>
std::pair<C, int32_t> to_peak_block(const C* __restrict g, const C* __restrict y, const C* __restrict t, int64_t n,
                                    C peak, bool rescale) {
  C sum = 0;  // of one block, so that float32 loses nothing that counts
  int32_t reached = 0;
  const C kept = rescale ? C(1) : C(0);
#pragma omp simd reduction(+ : sum, reached)
  for (int64_t i = 0; i < n; ++i) {
    sum += g[i] * (kept * y[i] - t[i]);
    reached += std::fabs(t[i]) == peak;
  }
  return {sum, reached};
}

template <class C>
void backward_block(const C* __restrict g, const C* __restrict t, C* __restrict dw, int64_t n, C peak, C factor,
                    C share) {
  for (int64_t i = 0; i < n; ++i) {
    const C part = std::fabs(t[i]) == peak ? share : C(0);
    dw[i] = (g[i] / factor + (t[i] > 0 ? part : -part)) * (C(1) - t[i] * t[i]);
  }
}

Tensor backward(const Tensor& grad, const Tensor& y, const Tensor& t, const Tensor& peak_, bool rescale) {
  Tensor dw = at::empty_like(grad);
  if (grad.numel() == 0) return dw;
  const double greatest = peak_.item<double>();
  if (greatest == 0) return dw.zero_();
  const Walk walk(dw, {&grad, &y, &t}, std::nullopt);
  with_type(grad, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    const C *squashed = t.const_data_ptr<C>(), peak = static_cast<C>(greatest);
    const T *gradient = grad.const_data_ptr<T>(), *result = y.const_data_ptr<T>();
    T* to = dw.mutable_data_ptr<T>();
    const int64_t chunks = walk.chunks();  // as many with any number of threads, so the sum is too
    std::vector<std::pair<double, int64_t>> partial(chunks);
    auto each = [&](auto&& f) {
      at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
        alignas(64) C gs[kBlock], ys[kBlock], ts[kBlock];
        for (int64_t k = first; k < last; ++k)
          walk.blocks(walk.chunk_begin(k), walk.chunk_begin(k + 1), [&](const Block& b) {
            f(k, b, load<C>(gradient + b.in[0], walk.stride[0], b.n, gs),
              load<C>(result + b.in[1], walk.stride[1], b.n, ys),
              load<C>(squashed + b.in[2], walk.stride[2], b.n, ts));
          });
      });
    };
    each([&](int64_t k, const Block& b, const C* g, const C* values, const C* ts) {
      const auto [sum, reached] = to_peak_block<C>(g, values, ts, b.n, peak, rescale);
      partial[k].first += sum;
      partial[k].second += reached;
    });
    double total = 0, at_peak = 0;
    for (const auto& [sum, reached] : partial) total += sum, at_peak += reached;
    const C share = static_cast<C>(total / (rescale ? greatest : greatest * greatest) / at_peak);
    const C factor = rescale ? C(1) : peak;
    each([&](int64_t, const Block& b, const C* g, const C*, const C* ts) {
      alignas(64) C slopes[kBlock];
      C* where = place<C>(to + b.out, slopes);
      backward_block<C>(g, ts, where, b.n, peak, factor, share);
      store(to + b.out, where, b.n);
    });
  });
  return dw;
}

TORCH_LIBRARY_IMPL(qexp, CPU, m) {
  m.impl("dorefa_weight", &forward);
  m.impl("dorefa_weight_backward", &backward);
}

}  // namespace
}  // namespace qexp
