// The GEMMLOWP affine quantizer on a CUDA device; see reference.py.
#include "../common/elementwise.cuh"

namespace qexp {
namespace {

Uniform grid(const Tensor& scale, const Tensor& zero_point, const Tensor& shift, double qmin, double qmax,
             const OptionalTensor& limits, Axis axis) {
  return {scale, zero_point, limit(qmin, limits, 0), limit(qmax, limits, 1), shift, axis};
}

Uniform with_noise(Uniform u, std::string_view rounding, const OptionalTensor& noise) {
  u.rounding = rounding;
  u.noise = noise;
  u.additive_noise = noise && rounding != "stochastic";
  return u;
}

Tensor forward(const Tensor& x, const Tensor& scale, const Tensor& zero_point, const Tensor& shift, double qmin,
               double qmax, const OptionalTensor& limits, Axis axis, std::string_view rounding,
               const OptionalTensor& noise) {
  return uniform_forward(x, with_noise(grid(scale, zero_point, shift, qmin, qmax, limits, axis), rounding, noise));
}

Tensor codes(const Tensor& x, const Tensor& scale, const Tensor& zero_point, const Tensor& shift, double qmin,
             double qmax, const OptionalTensor& limits, Axis axis, std::string_view rounding,
             const OptionalTensor& noise) {
  return uniform_codes(x, with_noise(grid(scale, zero_point, shift, qmin, qmax, limits, axis), rounding, noise));
}

template <class C>
struct Mask {
  DeviceParameter<C> scale, zero, low, high, shift;

  __device__ __forceinline__ void operator()(C x, C g, int64_t channel, C& dx, C*) const {
    const C v = (x - shift[channel]) / valid(scale[channel]) + zero[channel];
    dx = v >= low[channel] && v <= high[channel] ? g : C(0);
  }
};

Tensor backward(const Tensor& grad, const Tensor& given, const Tensor& scale, const Tensor& zero_point,
                const Tensor& shift, double qmin, double qmax, const OptionalTensor& limits, Axis axis) {
  const Uniform u = grid(scale, zero_point, shift, qmin, qmax, limits, axis);
  Tensor dx = empty_as(given);
  const Tensor x = laid_out_as(given, dx), g = laid_out_as(grad, dx);
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    const Held<C> s(u.scale), z(u.zero_point), low(u.low), high(u.high), o(u.offset);
    const Mask<C> f{s.view(), z.view(), low.view(), high.view(), o.view()};
    launch_backward<T, 0>(x, g, dx, Extent(dx, u.channel_axis()), f);
  });
  return dx;
}

QEXP_LIBRARY_IMPL(m) {
  m.impl("gemmlowp", TORCH_BOX(&forward));
  m.impl("gemmlowp_codes", TORCH_BOX(&codes));
  m.impl("gemmlowp_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace qexp
