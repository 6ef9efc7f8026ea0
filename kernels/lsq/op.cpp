// Learned step size quantization on the CPU; see reference.py.
#include "../common/backward.h"
#include "../common/tables.h"

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

// q = clip((x - offset) / scale, low, high), v the same without the clip.
template <bool V, class C>
void codes_block(const C* __restrict x, C* __restrict v, C* __restrict q, int64_t n, const Row<C>& row) {
  const C *__restrict scale = row.scale, *__restrict offset = row.offset;
  for (int64_t i = 0; i < n; ++i) v[i] = (x[i] - offset[V ? i : 0]) / scale[V ? i : 0];
  for (int64_t i = 0; i < n; ++i) q[i] = clamp(v[i], row.low[V ? i : 0], row.high[V ? i : 0]);
}

// dx, and of rounded codes q the terms whose sums are the gradients of the scale and (O) of the offset.
template <bool V, bool O, class C>
void gradient_block(const C* __restrict v, const C* __restrict q, const C* __restrict g, C* __restrict dx, int64_t n,
                    const Row<C>& row, C* __restrict dscale, C* __restrict doffset) {
  const C *__restrict low = row.low, *__restrict high = row.high;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = V ? i : 0;
    const C gradient = g[i];
    const bool inside = (v[i] > low[c]) & (v[i] < high[c]);
    dx[i] = inside ? gradient : C(0);
    dscale[i] = gradient * (inside ? q[i] - v[i] : q[i]);
    if constexpr (O) doffset[i] = inside ? C(0) : gradient;
  }
}

// Both in one loop for the rounding that training uses.
template <bool V, bool O, class C>
void half_even_block(const C* __restrict x, const C* __restrict g, C* __restrict dx, int64_t n, const Row<C>& row,
                     C* __restrict dscale, C* __restrict doffset) {
  const C *__restrict scale = row.scale, *__restrict low = row.low, *__restrict high = row.high,
          *__restrict offset = row.offset;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = V ? i : 0;
    const C v = (x[i] - offset[c]) / scale[c], gradient = g[i];
    const C q = round_to<Rounding::half_even>(clamp(v, low[c], high[c]), C(0));
    const bool inside = (v > low[c]) & (v < high[c]);
    dx[i] = inside ? gradient : C(0);
    dscale[i] = gradient * (inside ? q - v : q);
    if constexpr (O) doffset[i] = inside ? C(0) : gradient;
  }
}

template <bool V, bool O, class C>
void block(const C* x, const C* g, C* dx, int64_t n, const Row<C>& row, Rounding mode, C* dscale, C* doffset) {
  if (mode == Rounding::half_even) return half_even_block<V, O>(x, g, dx, n, row, dscale, doffset);
  alignas(64) C v[kBlock], q[kBlock];
  codes_block<V>(x, v, q, n, row);
  round_block(mode, q, nullptr, n);
  gradient_block<V, O>(v, q, g, dx, n, row, dscale, doffset);
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& x, const Tensor& scale, const OptionalTensor& offset, double qmin, double qmax,
    const OptionalTensor& limits, Axis axis, std::string_view rounding, double grad_scale) {
  const Uniform u = grid(scale, offset, qmin, qmax, limits, axis, rounding);
  Tensor dx = empty_as(x), dscale = scale, doffset = empty_of({0}, scale.scalar_type(), scale);
  const Walk walk(dx, {&x, &grad}, u.channel_axis());
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    const Tables<C> tables(u, walk);
    const auto with_offset = walk.varies ? block<true, true, C> : block<false, true, C>;
    const auto without = walk.varies ? block<true, false, C> : block<false, false, C>;
    const auto kernel = offset ? with_offset : without;
    const Rounding mode = parse_rounding(rounding);
    const auto run = [&](const C* xs, const C* gs, C* to, int64_t n, int64_t channel, auto& terms) {
      kernel(xs, gs, to, n, tables.row(channel), mode, terms.front(), terms.back());
    };
    const auto sums = offset ? backward_walk<T, 2>(walk, x, grad, dx, run) : backward_walk<T, 1>(walk, x, grad, dx, run);
    dscale = gradient_like(scale, sums.data(), walk.channels, grad_scale);
    if (offset) doffset = gradient_like(*offset, sums.data() + walk.channels, walk.channels, grad_scale);
  });
  return {dx, dscale, doffset};
}

STABLE_TORCH_LIBRARY_IMPL(qexp, CPU, m) {
  m.impl("lsq", TORCH_BOX(&forward));
  m.impl("lsq_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace qexp
