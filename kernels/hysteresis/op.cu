// Binarisation with hysteresis on a CUDA device; see reference.py.
#include "../common/elementwise.cuh"

namespace qexp {
namespace {

template <class C, class S>
struct Sign {
  const S* state;
  C threshold;

  // With a threshold of zero the sign of zero is +1, which the first comparison gives.
  __device__ __forceinline__ S operator()(C w, int64_t, int64_t i) const {
    return w >= threshold ? static_cast<S>(1.0f) : (w <= -threshold ? static_cast<S>(-1.0f) : state[i]);
  }
};

template <class T>
struct Magnitude {
  const T* x;

  __device__ __forceinline__ void operator()(int64_t i, double* terms) const {
    terms[0] = fabs(static_cast<double>(static_cast<Compute<T>>(x[i])));
  }
};

template <class F>
void with_state_type(const Tensor& state, F&& f) {
  switch (state.scalar_type()) {
    case ScalarType::Char: return f(int8_t{});
    case ScalarType::Short: return f(int16_t{});
    case ScalarType::Int: return f(int32_t{});
    case ScalarType::Long: return f(int64_t{});
    default: return with_type(state, f);
  }
}

std::tuple<Tensor, Tensor> forward(const Tensor& latent, const Tensor& state, double tau) {
  Tensor out = empty_as(state);
  const Tensor x = laid_out_as(latent, out), old = laid_out_as(state, out);
  Tensor scale = empty_of({}, ScalarType::Float, latent);
  const int64_t n = x.numel();
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    with_state_type(state, [&](auto sign) {
      using S = decltype(sign);
      launch_forward<T, S>(x, out, Extent(out, std::nullopt), Sign<C, S>{data<S>(old), static_cast<C>(tau)});
    });
    const Tensor total = launch_sums<1>(n, x, Magnitude<T>{data<T>(x)});
    launch(finish_sums<float>, dim3(1), dim3(1, kThreads), 0, x, data<double>(total), 1, 1, 0, 1, 1.0,
           static_cast<double>(std::max<int64_t>(n, 1)), nullptr, writable<float>(scale));
  });
  return {out, scale};
}

QEXP_LIBRARY_IMPL(m) { m.impl("hysteresis", TORCH_BOX(&forward)); }

}  // namespace
}  // namespace qexp
