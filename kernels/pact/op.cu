// Quantization with a learned clip value on a CUDA device; see reference.py.
#include "../common/elementwise.cuh"

namespace qexp {
namespace {

Tensor forward(const Tensor& x, const Tensor& alpha, double levels, bool two_sided, Axis axis,
               std::string_view rounding) {
  return uniform_forward(x, {.scale = Parameter(alpha, two_sided, levels),
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
                                    Axis axis) {
  Tensor dx = empty_as(given), dalpha = alpha;
  const Tensor x = laid_out_as(given, dx), g = laid_out_as(grad, dx);
  const Extent extent(dx, alpha.numel() == 1 ? std::nullopt : axis);
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    const Held<C> a(Parameter(alpha, two_sided, 1));
    const Sums sums = launch_backward<T, 1>(x, g, dx, extent, Gradient<C>{a.view(), two_sided});
    dalpha = device_gradient_like(alpha, sums, 0, 1.0, two_sided);
  });
  return {dx, dalpha};
}

QEXP_LIBRARY_IMPL(m) {
  m.impl("pact", TORCH_BOX(&forward));
  m.impl("pact_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace qexp
