// Quantization with a learned clip value on the CPU; see reference.py.
#include "../common/backward.h"
#include "../common/rounding.h"
#include "../common/uniform.h"

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

// dx, and the terms whose sum is the gradient of alpha. One-sided: sign = 0 and none = NaN, which nothing is below; two-sided: -1 and 0.
// Both sides share this code although one needs less: without -g, AVX-512 loads only the g it keeps, at half the speed.
template <class C, bool V>
void block(const C* __restrict x, const C* __restrict g, C* __restrict dx, int64_t n, const C* __restrict alpha, C sign,
           C none, C* __restrict dalpha) {
  for (int64_t i = 0; i < n; ++i) {
    const C a = alpha[V ? i : 0], low = sign * a, gradient = g[i], v = x[i];
    dx[i] = (v >= low) & (v <= a) ? gradient : C(0);
    const C above = v >= a ? gradient : C(0);
    dalpha[i] = v <= low + none ? -gradient : above;
  }
}

// The clip value acts by its magnitude, so its gradient has its sign.
void times_sign(Tensor& gradient, const Tensor& alpha) {
  const std::vector<double> values = values_of<double>(alpha);
  with_type(gradient, [&](auto tag) {
    using T = decltype(tag);
    T* to = writable<T>(gradient);
    for (size_t i = 0; i < values.size(); ++i)
      to[i] = static_cast<T>(static_cast<Compute<T>>(to[i]) * ((values[i] > 0) - (values[i] < 0)));
  });
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& alpha, bool two_sided,
                                    Axis axis) {
  Tensor dx = empty_as(x), dalpha = alpha;
  const Walk walk(dx, {&x, &grad}, alpha.numel() == 1 ? std::nullopt : axis);
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    Table<C> table(Parameter(alpha, two_sided, 1), walk);
    table.apply([](C a) { return valid(a); });
    const auto kernel = walk.varies ? block<C, true> : block<C, false>;
    const C sign = two_sided ? -1 : 0, none = two_sided ? C(0) : C(NAN);
    const auto run = [&](const C* xs, const C* gs, C* to, int64_t n, int64_t channel, auto& terms) {
      kernel(xs, gs, to, n, table.at(channel), sign, none, terms[0]);
    };
    const auto sums = backward_walk<T, 1>(walk, x, grad, dx, run);
    dalpha = gradient_like(alpha, sums.data(), walk.channels, 1.0);
    if (two_sided) times_sign(dalpha, alpha);
  });
  return {dx, dalpha};
}

STABLE_TORCH_LIBRARY_IMPL(qexp, CPU, m) {
  m.impl("pact", TORCH_BOX(&forward));
  m.impl("pact_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace qexp
