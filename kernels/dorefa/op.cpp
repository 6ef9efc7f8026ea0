// DoReFa's weight transform on the CPU; see reference.py.
#include <ATen/ops/abs.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/tanh.h>
#include <torch/library.h>

#include "../common/backward.h"
#include "../common/rounding.h"

namespace qexp {
namespace {

using at::Tensor;

// tanh(w) in the dtype computed in: torch's own, so that it is the reference's to the last bit.
Tensor squashed(const Tensor& w) { return at::tanh(w.scalar_type() == at::kDouble ? w : w.to(at::kFloat)); }

template <class C, Rounding R, bool S>
void forward_block(const C* __restrict t, C* __restrict y, int64_t n, C peak, C levels) {
  for (int64_t i = 0; i < n; ++i) {
    const C u = t[i] / peak;
    y[i] = S ? round_to<R>(u * levels, C(0)) / levels
             : round_to<R>((u * C(0.5) + C(0.5)) * levels, C(0)) * C(2) / levels - C(1);
  }
}

Tensor forward(const Tensor& w, double levels, bool symmetric, std::string_view rounding) {
  Tensor out = at::empty_like(w);
  if (w.numel() == 0) return out;
  const Tensor t = squashed(w);
  const double peak = at::amax(at::abs(t)).item<double>();
  const Walk walk(out, {&t}, std::nullopt);
  with_type(w, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    const C* from = t.const_data_ptr<C>();
    T* to = out.mutable_data_ptr<T>();
    const C divisor = peak == 0 ? C(1) : static_cast<C>(peak), n = static_cast<C>(levels);
    with_rounding(parse_rounding(rounding), [&](auto r) {
      constexpr Rounding R = decltype(r)::value;
      const auto kernel = symmetric ? forward_block<C, R, true> : forward_block<C, R, false>;
      at::parallel_for(0, walk.numel, kGrain, [&](int64_t begin, int64_t end) {
        alignas(64) C in[kBlock], result[kBlock];
        walk.blocks(begin, end, [&](const Block& b) {
          C* where = place<C>(to + b.out, result);
          kernel(load<C>(from + b.in[0], walk.stride[0], b.n, in), where, b.n, divisor, n);
          store(to + b.out, where, b.n);
        });
      });
    });
  });
  return out;
}

Tensor backward(const Tensor& grad, const Tensor& w) {
  Tensor dw = at::empty_like(w);
  if (w.numel() == 0) return dw;
  const Tensor t = squashed(w);
  const double largest = at::amax(at::abs(t)).item<double>();
  const Walk walk(dw, {&t, &grad}, std::nullopt);
  with_type(w, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    const C *from = t.const_data_ptr<C>(), peak = static_cast<C>(largest);
    const T* gradient = grad.const_data_ptr<T>();
    T* to = dw.mutable_data_ptr<T>();
    auto each = [&](auto&& f) {
      alignas(64) C in[kBlock], g[kBlock];
      walk.blocks(0, walk.numel, [&](const Block& b) {
        f(load<C>(from + b.in[0], walk.stride[0], b.n, in), load<C>(gradient + b.in[1], walk.stride[1], b.n, g), b);
      });
    };
    double total = 0;
    int64_t at_peak = 0;
    each([&](const C* __restrict ts, const C* __restrict gs, const Block& b) {
      C sum = 0;  // of one block, so that float32 loses nothing that counts
      int32_t reached = 0;
#pragma omp simd reduction(+ : sum, reached)
      for (int64_t i = 0; i < b.n; ++i) {
        sum += gs[i] * ts[i];
        reached += std::fabs(ts[i]) == peak;
      }
      total += sum;
      at_peak += reached;
    });
    const C share = static_cast<C>(total / (largest * largest) / static_cast<double>(at_peak));
    const bool zero = peak == 0;
    alignas(64) C result[kBlock];
    each([&](const C* __restrict ts, const C* __restrict gs, const Block& b) {
      C* __restrict where = place<C>(to + b.out, result);
      for (int64_t i = 0; i < b.n; ++i) {
        const C t = ts[i], part = std::fabs(t) == peak ? share : C(0);
        const C slope = (gs[i] / peak - (t > 0 ? part : -part)) * (C(1) - t * t);
        where[i] = zero ? C(0) : slope;
      }
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
