// ReLU and uniform quantization on a CUDA device; see reference.py.
#include <ATen/ops/full.h>
#include <ATen/ops/maximum.h>
#include <torch/library.h>

#include "../common/elementwise.cuh"

namespace qexp {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The ReLU is a higher lower limit: max(x / scale + zero_point, zero_point).
Tensor forward(const Tensor& x, const Tensor& scale, const Tensor& zero_point, double qmin, double qmax,
               const OptionalTensor& limits, std::optional<int64_t> axis, std::string_view rounding) {
  const Tensor zero = zero_point.detach().flatten();
  const Tensor low = limits ? limits->select(0, 0) : at::full({1}, qmin, zero.options());
  return uniform_forward(x, {.scale = scale,
                             .zero_point = zero_point,
                             .low = at::maximum(low, zero),
                             .high = limit(qmax, limits, 1),
                             .axis = axis,
                             .rounding = rounding});
}

template <class C>
struct Mask {
  DeviceParameter<C> scale, zero, low, high;

  __device__ __forceinline__ void operator()(C x, C g, int64_t channel, C& dx, C*) const {
    const C v = x / valid(scale[channel]) + zero[channel];
    dx = x > C(0) && v >= low[channel] && v <= high[channel] ? g : C(0);
  }
};

Tensor backward(const Tensor& grad, const Tensor& given, const Tensor& scale, const Tensor& zero_point, double qmin,
                double qmax, const OptionalTensor& limits, std::optional<int64_t> axis) {
  const Uniform u{scale, zero_point, limit(qmin, limits, 0), limit(qmax, limits, 1), 0.0, axis};
  Tensor dx = at::empty_like(given);
  const Tensor x = laid_out_as(given, dx), g = laid_out_as(grad, dx);
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    const Held<C> s(u.scale), z(u.zero_point), low(u.low), high(u.high);
    launch_backward<T, 0>(x, g, dx, Extent(dx, u.channel_axis()), Mask<C>{s.view(), z.view(), low.view(), high.view()});
  });
  return dx;
}

TORCH_LIBRARY_IMPL(qexp, CUDA, m) {
  m.impl("relu_quantize", &forward);
  m.impl("relu_quantize_backward", &backward);
}

}  // namespace
}  // namespace qexp
