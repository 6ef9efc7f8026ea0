// The GEMMLOWP affine quantizer on the CPU; see reference.py.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>

#include "../common/backward.h"
#include "../common/rounding.h"
#include "../common/uniform.h"

namespace qexp {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Grid {
  Tensor scale, zero_point, offset, passes;  // passes: 1 where the range is a point and x stays as it is
};

template <class C>
C smallest_power_of_two(C value) {
  int exponent;
  const C mantissa = std::frexp(value, &exponent);
  return std::ldexp(C(1), exponent - (mantissa == C(0.5)));
}

Grid make_grid(const Tensor& delta, const Tensor& offset, double levels, bool preserve_zero, bool clamped,
               bool pow2_scale, std::string_view rounding) {
  const int64_t channels = std::max(delta.numel(), offset.numel());
  const auto options = delta.options().memory_format(std::nullopt);
  Grid grid{at::empty({channels}, options), at::empty({channels}, options), at::empty({channels}, options),
            at::empty({channels}, options)};
  const Tensor deltas = delta.contiguous(), offsets = offset.to(delta.scalar_type()).contiguous();
  with_type(delta, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    const T *ds = deltas.const_data_ptr<T>(), *os = offsets.const_data_ptr<T>();
    T *scales = grid.scale.mutable_data_ptr<T>(), *zeros = grid.zero_point.mutable_data_ptr<T>(),
      *shifts = grid.offset.mutable_data_ptr<T>(), *passes = grid.passes.mutable_data_ptr<T>();
    with_rounding(rounding == "stochastic" ? Rounding::half_even : parse_rounding(rounding), [&](auto r) {
      constexpr Rounding R = decltype(r)::value;
      for (int64_t c = 0; c < channels; ++c) {
        C range = ds[delta.numel() == 1 ? 0 : c], low = os[offset.numel() == 1 ? 0 : c];
        const bool passing = range <= C(0);
        if (clamped && preserve_zero && !passing) {
          const C high = clamp(low + range, C(0), C(INFINITY));
          low = clamp(low, C(-INFINITY), C(0));
          range = high - low;
        }
        C scale = range / static_cast<C>(levels), zero = 0;
        if (pow2_scale) scale = smallest_power_of_two(scale);
        if (preserve_zero) {
          zero = round_to<R>(-low / scale, C(0));
          if (clamped) zero = clamp(zero, C(0), static_cast<C>(levels));
          low = 0;
        }
        scales[c] = static_cast<T>(passing ? C(1) : scale);
        zeros[c] = static_cast<T>(passing ? C(0) : zero);
        shifts[c] = static_cast<T>(passing ? C(0) : low);
        passes[c] = static_cast<T>(passing ? C(1) : C(0));
      }
    });
  });
  return grid;
}

// Copies `from` to `to` (both shaped and laid out by the walk) where the channel passes.
void copy_passing(const Walk& walk, const Table<float>& passes, const Tensor& from, Tensor& to, int operand) {
  with_type(from, [&](auto tag) {
    using T = decltype(tag);
    const T* source = from.const_data_ptr<T>();
    T* target = to.mutable_data_ptr<T>();
    at::parallel_for(0, walk.numel, kGrain, [&](int64_t begin, int64_t end) {
      walk.blocks(begin, end, [&](const Block& b) {
        for (int64_t i = 0; i < b.n; ++i)
          if (passes.at(b.channel)[walk.varies ? i : 0] != 0)
            target[b.out + i] = source[b.in[operand] + i * walk.stride[operand]];
      });
    });
  });
}

bool any(const Tensor& passes) {
  const Tensor p = passes.to(at::kFloat);
  return std::any_of(p.const_data_ptr<float>(), p.const_data_ptr<float>() + p.numel(), [](float v) { return v != 0; });
}

std::optional<int64_t> channel_axis(const Grid& grid, std::optional<int64_t> axis) {
  return grid.scale.numel() == 1 ? std::nullopt : axis;
}

Tensor forward(const Tensor& x, const Tensor& delta, const Tensor& offset, double levels, bool preserve_zero,
               bool clamped, bool pow2_scale, std::optional<int64_t> axis, std::string_view rounding,
               const OptionalTensor& noise) {
  const Grid grid = make_grid(delta, offset, levels, preserve_zero, clamped, pow2_scale, rounding);
  Tensor out = uniform_forward(x, {.scale = grid.scale,
                                   .zero_point = grid.zero_point,
                                   .low = 0.0,
                                   .high = levels,
                                   .offset = grid.offset,
                                   .axis = axis,
                                   .rounding = rounding,
                                   .noise = noise,
                                   .additive_noise = noise.has_value() && rounding != "stochastic"});
  if (any(grid.passes)) {
    const Walk walk(out, {&x}, channel_axis(grid, axis));
    copy_passing(walk, Table<float>(grid.passes, walk), x, out, 0);
  }
  return out;
}

Tensor backward(const Tensor& grad, const Tensor& x, const Tensor& delta, const Tensor& offset, double levels,
                bool preserve_zero, bool clamped, bool pow2_scale, std::optional<int64_t> axis,
                std::string_view rounding) {
  const Grid grid = make_grid(delta, offset, levels, preserve_zero, clamped, pow2_scale, rounding);
  Tensor dx = at::empty_like(x);
  const Walk walk(dx, {&x, &grad}, channel_axis(grid, axis));
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    Table<C> scale(grid.scale, walk);
    scale.apply([](C s) { return valid(s); });
    const Table<C> zero(grid.zero_point, walk), shift(grid.offset, walk);
    const C high = static_cast<C>(levels);
    const int64_t step = walk.varies ? 1 : 0;
    backward_walk<T, 0>(walk, x, grad, dx, [&](const C* xs, const C* gs, C* to, int64_t n, int64_t channel, auto&) {
      const C *s = scale.at(channel), *z = zero.at(channel), *o = shift.at(channel);
      for (int64_t i = 0; i < n; ++i) {
        const C v = (xs[i] - o[i * step]) / s[i * step] + z[i * step], gradient = gs[i];
        to[i] = (v >= C(0)) & (v <= high) ? gradient : C(0);
      }
    });
  });
  if (any(grid.passes)) copy_passing(walk, Table<float>(grid.passes, walk), grad, dx, 1);
  return dx;
}

TORCH_LIBRARY_IMPL(qexp, CPU, m) {
  m.impl("gemmlowp", &forward);
  m.impl("gemmlowp_backward", &backward);
}

}  // namespace
}  // namespace qexp
