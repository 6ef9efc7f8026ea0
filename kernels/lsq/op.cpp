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

template <class C>
using Kernel = void (*)(const C*, const C*, C*, int64_t, const Row<C>&, C*, C*);

template <class C>
Kernel<C> pick(std::string_view rounding, bool varies, bool with_offset) {
  return with_rounding(parse_rounding(rounding), [&](auto r) -> Kernel<C> {
    constexpr Rounding R = decltype(r)::value;
    if (with_offset) return varies ? block<C, R, true, true> : block<C, R, false, true>;
    return varies ? block<C, R, true, false> : block<C, R, false, false>;
  });
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
    const Kernel<C> kernel = pick<C>(rounding, walk.varies, offset.has_value());
    const auto run = [&](const C* xs, const C* gs, C* to, int64_t n, int64_t channel, auto& terms) {
      kernel(xs, gs, to, n, tables.row(channel), terms.front(), terms.back());
    };
    const auto sums = offset ? backward_walk<T, 2>(walk, x, grad, dx, run) : backward_walk<T, 1>(walk, x, grad, dx, run);
    dscale = gradient_like(scale, sums.data(), walk.channels, grad_scale);
    if (offset) doffset = gradient_like(*offset, sums.data() + walk.channels, walk.channels, grad_scale);
  });
  return {dx, dscale, doffset};
}

TORCH_LIBRARY_IMPL(qexp, CPU, m) {
  m.impl("lsq", &forward);
  m.impl("lsq_backward", &backward);
}

}  // namespace
}  // namespace qexp
