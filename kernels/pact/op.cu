// Quantization with a learned clip value on a CUDA device; see reference.py.
#include <ATen/ops/abs.h>
#include <ATen/ops/div.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sign.h>
#include <torch/library.h>

#include "../common/elementwise.cuh"

namespace qexp {
namespace {

using at::Tensor;

Tensor forward(const Tensor& x, const Tensor& alpha, double levels, bool two_sided, std::optional<int64_t> axis,
               std::string_view rounding) {
  return uniform_forward(x, {.scale = at::div(two_sided ? at::abs(alpha) : alpha, levels),
                             .low = two_sided ? -levels : 0.0,
                             .high = levels,
                             .axis = axis,
                             .rounding = rounding});
}

template <class C>
struct Gradient {
  DeviceParameter<C> alpha;
  bool two_sided;

  __device__ __forceinline__ void operator()(C x, C g, int64_t channel, C& dx, C* terms) const {
    const C a = valid(alpha[channel]), low = two_sided ? -a : C(0);
    dx = x >= low && x <= a ? g : C(0);
    terms[0] = two_sided && x <= -a ? -g : (x >= a ? g : C(0));
  }
};

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& given, const Tensor& alpha, bool two_sided,
                                    std::optional<int64_t> axis) {
  Tensor dx = at::empty_like(given), dalpha;
  const Tensor x = laid_out_as(given, dx), g = laid_out_as(grad, dx);
  const Extent extent(dx, alpha.numel() == 1 ? std::nullopt : axis);
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    const Held<C> a(Parameter(two_sided ? at::abs(alpha) : alpha));
    const Tensor sums = launch_backward<T, 1>(x, g, dx, extent, Gradient<C>{a.view(), two_sided});
    dalpha = device_gradient_like(alpha, sums, 0, 1.0);
  });
  return {dx, two_sided ? at::mul(dalpha, at::sign(alpha)) : dalpha};
}

TORCH_LIBRARY_IMPL(qexp, CUDA, m) {
  m.impl("pact", &forward);
  m.impl("pact_backward", &backward);
}

}  // namespace
}  // namespace qexp
