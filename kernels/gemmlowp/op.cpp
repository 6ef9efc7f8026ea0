// The GEMMLOWP affine quantizer on the CPU; see reference.py.
#include "../common/backward.h"
#include "../common/tables.h"

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

template <bool V, class C>
void mask_block(const C* __restrict x, const C* __restrict g, C* __restrict dx, int64_t n, const Row<C>& row) {
  const C *__restrict scale = row.scale, *__restrict zero = row.zero, *__restrict low = row.low,
          *__restrict high = row.high, *__restrict shift = row.offset;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = V ? i : 0;
    const C v = (x[i] - shift[c]) / scale[c] + zero[c], gradient = g[i];
    dx[i] = (v >= low[c]) & (v <= high[c]) ? gradient : C(0);
  }
}

Tensor backward(const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& zero_point, const Tensor& shift,
                double qmin, double qmax, const OptionalTensor& limits, Axis axis) {
  const Uniform u = grid(scale, zero_point, shift, qmin, qmax, limits, axis);
  Tensor dx = empty_as(x);
  if (x.numel() == 0) return dx;
  const Walk walk(dx, {&x, &grad}, u.channel_axis());
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    const Tables<C> tables(u, walk);
    backward_walk<T, 0>(walk, x, grad, dx, [&](const C* xs, const C* gs, C* to, int64_t n, int64_t channel, auto&) {
      const Row<C> row = tables.row(channel);
      walk.varies ? mask_block<true>(xs, gs, to, n, row) : mask_block<false>(xs, gs, to, n, row);
    });
  });
  return dx;
}

STABLE_TORCH_LIBRARY_IMPL(qexp, CPU, m) {
  m.impl("gemmlowp", TORCH_BOX(&forward));
  m.impl("gemmlowp_codes", TORCH_BOX(&codes));
  m.impl("gemmlowp_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace qexp
