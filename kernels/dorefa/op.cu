// DoReFa's weight transform on a CUDA device; see reference.py. Nothing waits for the device: the peak stays there.
#include "../common/elementwise.cuh"

namespace qexp {
namespace {

template <class C>
struct Transform {
  const C* peak;
  C levels;
  bool symmetric, rescale;
  Rounding rounding;

  __device__ __forceinline__ C operator()(C t, int64_t, int64_t) const {
    const C most = *peak, u = t / (most == C(0) ? C(1) : most);
    const C q = round_any(rounding, symmetric ? u * levels : (u * C(0.5) + C(0.5)) * levels, C(0));
    return (symmetric ? q / levels : q * C(2) / levels - C(1)) * (rescale ? most : C(1));
  }
};

// Returns {quantized, tanh(w), max|tanh(w)|}. The tanh is torch's own, so that it is the reference's to the last bit.
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& w, double levels, bool symmetric, bool rescale,
                                           std::string_view rounding) {
  Tensor out = empty_as(w);
  const Tensor t = call("aten::tanh", "", w.scalar_type() == ScalarType::Double ? w : torch::stable::to(w, ScalarType::Float));
  if (w.numel() == 0) return {out, t, torch::stable::new_zeros(t, {})};
  const Tensor peak = torch::stable::amax(call("aten::abs", "", t), Ints{});
  const Tensor squashed = laid_out_as(t, out);
  with_type(w, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    const Transform<C> f{data<C>(peak), static_cast<C>(levels), symmetric, rescale, parse_rounding(rounding)};
    launch_forward<C, T>(squashed, out, Extent(out, std::nullopt), f);
  });
  return {out, t, peak};
}

// Terms: the gradient times what the peak does to the result, and whether the weight is at the peak.
template <class T>
struct ToPeak {
  using C = Compute<T>;
  const T *grad, *y;
  const C *t, *peak;
  bool rescale;

  __device__ __forceinline__ void operator()(int64_t i, double* terms) const {
    const C size = t[i] < C(0) ? -t[i] : t[i];
    terms[0] = static_cast<C>(grad[i]) * ((rescale ? static_cast<C>(y[i]) : C(0)) - t[i]);
    terms[1] = size == *peak ? 1.0 : 0.0;
  }
};

template <class C>
struct Gradient {
  const C *t, *peak;
  const double* totals;
  bool rescale;

  __device__ __forceinline__ C operator()(C g, int64_t, int64_t i) const {
    const C most = *peak, here = t[i];
    if (most == C(0)) return C(0);
    const double wide = most;
    const C share = static_cast<C>(totals[0] / (rescale ? wide : wide * wide) / totals[1]);
    const C part = (here < C(0) ? -here : here) == most ? share : C(0);
    return (g / (rescale ? C(1) : most) + (here > C(0) ? part : -part)) * (C(1) - here * here);
  }
};

Tensor backward(const Tensor& grad, const Tensor& y, const Tensor& t, const Tensor& peak, bool rescale) {
  Tensor dw = empty_as(grad);
  if (grad.numel() == 0) return dw;
  const Tensor g = laid_out_as(grad, dw), result = laid_out_as(y, dw), squashed = laid_out_as(t, dw);
  with_type(grad, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    const C *ts = data<C>(squashed), *most = data<C>(peak);
    const Tensor totals = launch_sums<2>(g.numel(), g, ToPeak<T>{data<T>(g), data<T>(result), ts, most, rescale});
    launch_forward<T, T>(g, dw, Extent(dw, std::nullopt), Gradient<C>{ts, most, data<double>(totals), rescale});
  });
  return dw;
}

QEXP_LIBRARY_IMPL(m) {
  m.impl("dorefa_weight", TORCH_BOX(&forward));
  m.impl("dorefa_weight_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace qexp
