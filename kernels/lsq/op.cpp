// Learned step size quantization on the CPU; see reference.py.
#include <torch/library.h>

#include "../common/backward.h"
#include "../common/tables.h"

namespace qexp {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Uniform grid(const Tensor& scale, const OptionalTensor& offset, double qmin, double qmax, const OptionalTensor& limits,
             std::optional<int64_t> axis, std::string_view rounding) {
  return {.scale = scale,
          .low = limit(qmin, limits, 0),
          .high = limit(qmax, limits, 1),
          .offset = Parameter(offset, 0.0),
          .axis = axis,
          .rounding = rounding};
}

Tensor forward(const Tensor& x, const Tensor& scale, const OptionalTensor& offset, double qmin, double qmax,
               const OptionalTensor& limits, std::optional<int64_t> axis, std::string_view rounding, double) {
  return uniform_forward(x, grid(scale, offset, qmin, qmax, limits, axis, rounding));
}

// dx, and the terms whose sums are the gradients of the scale and (O) of the offset.
template <class C, Rounding R, bool V, bool O>
void block(const C* __restrict x, const C* __restrict g, C* __restrict dx, int64_t n, const Row<C>& row,
           C* __restrict dscale, C* __restrict doffset) {
  const C *__restrict scale = row.scale, *__restrict low = row.low, *__restrict high = row.high,
          *__restrict offset = row.offset;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = V ? i : 0;
    const C v = (x[i] - offset[c]) / scale[c];
    const C q = round_to<R>(clamp(v, low[c], high[c]), C(0));
    const C gradient = g[i];
    const bool inside = (v > low[c]) & (v < high[c]);
    dx[i] = inside ? gradient : C(0);
    dscale[i] = gradient * (inside ? q - v : q);
    if constexpr (O) doffset[i] = inside ? C(0) : gradient;
  }
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& x, const Tensor& scale, const OptionalTensor& offset, double qmin, double qmax,
    const OptionalTensor& limits, std::optional<int64_t> axis, std::string_view rounding, double grad_scale) {
  const Uniform u = grid(scale, offset, qmin, qmax, limits, axis, rounding);
  Tensor dx = at::empty_like(x), dscale, doffset = at::empty({0}, scale.options());
  const Walk walk(dx, {&x, &grad}, u.channel_axis());
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    const Tables<C> tables(u, walk);
    with_rounding(parse_rounding(rounding), [&](auto r) {
      constexpr Rounding R = decltype(r)::value;
      auto run = [&]<bool V, bool O>() {
        return backward_walk<T, O ? 2 : 1>(
            walk, x, grad, dx, [&](auto* xs, auto* gs, auto* to, int64_t n, int64_t channel, auto& terms) {
              block<C, R, V, O>(xs, gs, to, n, tables.row(channel), terms[0], terms[terms.size() - 1]);
            });
      };
      const auto sums = walk.varies ? (offset ? run.template operator()<true, true>() : run.template operator()<true, false>())
                                    : (offset ? run.template operator()<false, true>() : run.template operator()<false, false>());
      dscale = gradient_like(scale, sums.data(), walk.channels, grad_scale);
      if (offset) doffset = gradient_like(*offset, sums.data() + walk.channels, walk.channels, grad_scale);
    });
  });
  return {dx, dscale, doffset};
}

TORCH_LIBRARY_IMPL(qexp, CPU, m) {
  m.impl("lsq", &forward);
  m.impl("lsq_backward", &backward);
}

}  // namespace
}  // namespace qexp
