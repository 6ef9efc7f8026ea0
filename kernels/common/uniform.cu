// The forward pass every uniform quantizer shares, on a CUDA device; see uniform.cpp.
#include "elementwise.cuh"

namespace qexp {
namespace {

template <class C, bool Q>
struct Quantize {
  DeviceParameter<C> scale, zero, low, high, offset;
  const float* noise;
  Rounding rounding;
  bool additive;

  __device__ __forceinline__ auto operator()(C x, int64_t channel, int64_t i) const {
    const C s = valid(scale[channel]), z = zero[channel], o = offset[channel];
    const C u = noise ? static_cast<C>(noise[i]) : C(0);
    C v = (x - o) / s + z;
    if (additive) v = v + (u - C(0.5));
    const C q = round_any(rounding, clamp(v, low[channel], high[channel]), u);
    if constexpr (Q) {
      return code_of(q);
    } else {
      return (q - z) * s + o;
    }
  }
};

template <bool Q>
Tensor run(const Tensor& given, const Uniform& u) {
  Tensor out = empty_as(given, Q ? std::optional(ScalarType::Int) : std::nullopt);
  const Tensor x = laid_out_as(given, out);
  const Tensor noise = u.noise ? laid_out_as(*u.noise, out) : x;
  const Extent extent(out, u.channel_axis());
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    const Held<C> scale(u.scale), zero(u.zero_point), low(u.low), high(u.high), offset(u.offset);
    const Quantize<C, Q> f{scale.view(),  zero.view(), low.view(), high.view(), offset.view(),
                           u.noise ? data<float>(noise) : nullptr, parse_rounding(u.rounding),
                           u.additive_noise};
    launch_forward<T, std::conditional_t<Q, int32_t, T>>(x, out, extent, f);
  });
  return out;
}

}  // namespace

Tensor uniform_forward(const Tensor& x, const Uniform& u) { return run<false>(x, u); }
Tensor uniform_codes(const Tensor& x, const Uniform& u) { return run<true>(x, u); }

}  // namespace qexp
