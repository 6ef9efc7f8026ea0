// Uniform quantization on a CUDA device; see reference.py.
#include "../common/elementwise.cuh"

namespace qexp {
namespace {

Uniform grid(const Tensor& scale, const Tensor& zero_point, double qmin, double qmax, const OptionalTensor& limits,
             Axis axis) {
  return {scale, zero_point, limit(qmin, limits, 0), limit(qmax, limits, 1), 0.0, axis};
}

Tensor forward(const Tensor& x, const Tensor& scale, const Tensor& zero_point, double qmin, double qmax,
               const OptionalTensor& limits, Axis axis, std::string_view rounding,
               const OptionalTensor& noise) {
  Uniform u = grid(scale, zero_point, qmin, qmax, limits, axis);
  u.rounding = rounding;
  u.noise = noise;
  return uniform_forward(x, u);
}

Tensor codes(const Tensor& x, const Tensor& scale, const Tensor& zero_point, double qmin, double qmax,
             const OptionalTensor& limits, Axis axis, std::string_view rounding,
             const OptionalTensor& noise) {
  Uniform u = grid(scale, zero_point, qmin, qmax, limits, axis);
  u.rounding = rounding;
  u.noise = noise;
  return uniform_codes(x, u);
}

template <class C>
struct Mask {
  DeviceParameter<C> scale, zero, low, high;

  __device__ __forceinline__ void operator()(C x, C g, int64_t channel, C& dx, C*) const {
    const C v = x / valid(scale[channel]) + zero[channel];
    dx = v >= low[channel] && v <= high[channel] ? g : C(0);
  }
};

Tensor backward(const Tensor& grad, const Tensor& given, const Tensor& scale, const Tensor& zero_point, double qmin,
                double qmax, const OptionalTensor& limits, Axis axis) {
  const Uniform u = grid(scale, zero_point, qmin, qmax, limits, axis);
  Tensor dx = empty_as(given);
  const Tensor x = laid_out_as(given, dx), g = laid_out_as(grad, dx);
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    const Held<C> s(u.scale), z(u.zero_point), low(u.low), high(u.high);
    launch_backward<T, 0>(x, g, dx, Extent(dx, u.channel_axis()), Mask<C>{s.view(), z.view(), low.view(), high.view()});
  });
  return dx;
}

QEXP_LIBRARY_IMPL(m) {
  m.impl("fake_quantize", TORCH_BOX(&forward));
  m.impl("fake_quantize_backward", TORCH_BOX(&backward));
  m.impl("quantize", TORCH_BOX(&codes));
}

}  // namespace
}  // namespace qexp
