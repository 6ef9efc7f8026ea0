// Another grid on a CUDA device; see reference.py.
#include "../common/elementwise.cuh"

namespace qexp {
namespace {

template <class C, class S>
struct Rescale {
  DeviceParameter<double> factor, summand;
  double low, high;
  Rounding rounding;

  __device__ __forceinline__ S operator()(C x, int64_t channel, int64_t) const {
    const double y = static_cast<double>(x) * factor[channel] + summand[channel];
    return static_cast<S>(clamp(round_any(rounding, y, 0.0), low, high));
  }
};

template <class F>
void with_output_type(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Byte: return f(uint8_t{});
    case ScalarType::Char: return f(int8_t{});
    default: STD_TORCH_CHECK(false, "dtype is not allowed; use float32, float64, uint8 or int8");
  }
}

Tensor forward(const Tensor& given, const Tensor& factor, const Tensor& summand, double low, double high,
               std::string_view rounding, ScalarType dtype) {
  Tensor out = empty_as(given, dtype);
  const Tensor x = laid_out_as(given, out);
  const Extent extent(out, x.dim() > 1 ? Axis(1) : std::nullopt);
  const Held<double> f{Parameter(factor)}, s{Parameter(summand)};
  const Rounding mode = parse_rounding(rounding);
  with_compute_type(x, [&](auto tag) {
    using T = decltype(tag);
    with_output_type(dtype, [&](auto result) {
      using S = decltype(result);
      launch_forward<T, S>(x, out, extent, Rescale<T, S>{f.view(), s.view(), low, high, mode});
    });
  });
  return out;
}

QEXP_LIBRARY_IMPL(m) { m.impl("rescale", TORCH_BOX(&forward)); }

}  // namespace
}  // namespace qexp
