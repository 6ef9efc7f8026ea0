// Learned step size quantization on a CUDA device; see reference.py.
#include "../common/elementwise.cuh"

namespace qexp {
namespace {

Uniform grid(const Tensor& scale, const OptionalTensor& offset, double qmin, double qmax, const OptionalTensor& limits,
             Axis axis, std::string_view rounding) {
  return {.scale = scale,
          .low = limit(qmin, limits, 0),
          .high = limit(qmax, limits, 1),
          .offset = Parameter(offset, 0.0),
          .axis = axis,
          .rounding = rounding};
}

Tensor forward(const Tensor& x, const Tensor& scale, const OptionalTensor& offset, double qmin, double qmax,
               const OptionalTensor& limits, Axis axis, std::string_view rounding, double) {
  return uniform_forward(x, grid(scale, offset, qmin, qmax, limits, axis, rounding));
}

// terms: of the gradients of the scale and (O) of the offset.
template <class C, bool O>
struct Gradient {
  DeviceParameter<C> scale, low, high, offset;
  Rounding rounding;

  __device__ __forceinline__ void operator()(C x, C g, int64_t channel, C& dx, C* terms) const {
    const C lowest = low[channel], highest = high[channel];
    const C v = (x - offset[channel]) / valid(scale[channel]);
    const C q = round_any(rounding, clamp(v, lowest, highest), C(0));
    const bool inside = v > lowest && v < highest;
    dx = inside ? g : C(0);
    terms[0] = g * (inside ? q - v : q);
    if constexpr (O) terms[1] = inside ? C(0) : g;
  }
};

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& given, const Tensor& scale, const OptionalTensor& offset, double qmin,
    double qmax, const OptionalTensor& limits, Axis axis, std::string_view rounding,
    double grad_scale) {
  const Uniform u = grid(scale, offset, qmin, qmax, limits, axis, rounding);
  Tensor dx = empty_as(given), dscale = scale, doffset = empty_of({0}, scale.scalar_type(), scale);
  const Tensor x = laid_out_as(given, dx), g = laid_out_as(grad, dx);
  const Extent extent(dx, u.channel_axis());
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    const Held<C> s(u.scale), low(u.low), high(u.high), o(u.offset);
    const Rounding mode = parse_rounding(rounding);
    if (offset) {
      const Gradient<C, true> f{s.view(), low.view(), high.view(), o.view(), mode};
      const Sums sums = launch_backward<T, 2>(x, g, dx, extent, f);
      dscale = device_gradient_like(scale, sums, 0, grad_scale);
      doffset = device_gradient_like(*offset, sums, 1, grad_scale);
    } else {
      const Gradient<C, false> f{s.view(), low.view(), high.view(), o.view(), mode};
      dscale = device_gradient_like(scale, launch_backward<T, 1>(x, g, dx, extent, f), 0, grad_scale);
    }
  });
  return {dx, dscale, doffset};
}

QEXP_LIBRARY_IMPL(m) {
  m.impl("lsq", TORCH_BOX(&forward));
  m.impl("lsq_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace qexp
