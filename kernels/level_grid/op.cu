// Quantization to a table of levels on a CUDA device; see reference.py.
#include "../common/elementwise.cuh"

namespace qexp {
namespace {

__device__ __forceinline__ float next_below(float v) { return nextafterf(v, -INFINITY); }
__device__ __forceinline__ double next_below(double v) { return nextafter(v, -static_cast<double>(INFINITY)); }

template <class C>
struct Levels {
  const C* values;
  int64_t count;

  __device__ __forceinline__ C lowest() const { return values[0]; }
  __device__ __forceinline__ C highest() const { return values[count - 1]; }

  // The largest value that still belongs to level i and not to the next.
  __device__ __forceinline__ C threshold(int64_t i) const {
    const C low = values[i], high = values[i + 1], middle = (low + high) * C(0.5);
    return fabs(low) < fabs(high) ? middle : next_below(middle);
  }
  __device__ __forceinline__ C nearest(C v) const {
    int64_t low = 0, high = count - 1;  // the level lies among low to high
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (v > threshold(middle)) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return v == v ? values[low] : v;
  }
};

template <class C>
struct Nearest {
  Levels<C> levels;
  DeviceParameter<C> scale;

  __device__ __forceinline__ C operator()(C x, int64_t channel, int64_t) const {
    const C s = valid(scale[channel]);
    return levels.nearest(x / s) * s;
  }
};

template <class C>
struct Gradient {
  Levels<C> levels;
  DeviceParameter<C> scale;
  bool clip;

  __device__ __forceinline__ void operator()(C x, C g, int64_t channel, C& dx, C* terms) const {
    const C v = x / valid(scale[channel]), q = levels.nearest(v);
    const bool inside = v >= levels.lowest() && v <= levels.highest();
    dx = inside || !clip ? g : C(0);
    terms[0] = g * (inside ? q - v : q);
  }
};

Axis channel_axis(const Tensor& scale, Axis axis) { return scale.numel() == 1 ? std::nullopt : axis; }

Tensor forward(const Tensor& given, const Tensor& levels, const Tensor& scale, Axis axis, bool) {
  Tensor out = empty_as(given);
  const Tensor x = laid_out_as(given, out);
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    const Held<C> table{Parameter(levels)}, s{Parameter(scale)};
    const Nearest<C> f{{table.view().data, levels.numel()}, s.view()};
    launch_forward<T, T>(x, out, Extent(out, channel_axis(scale, axis)), f);
  });
  return out;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& given, const Tensor& levels, const Tensor& scale,
                                    Axis axis, bool clip_gradient) {
  Tensor dx = empty_as(given), dscale = scale;
  const Tensor x = laid_out_as(given, dx), g = laid_out_as(grad, dx);
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    const Held<C> table{Parameter(levels)}, s{Parameter(scale)};
    const Gradient<C> f{{table.view().data, levels.numel()}, s.view(), clip_gradient};
    const Sums sums = launch_backward<T, 1>(x, g, dx, Extent(dx, channel_axis(scale, axis)), f);
    dscale = device_gradient_like(scale, sums, 0, 1.0);
  });
  return {dx, dscale};
}

QEXP_LIBRARY_IMPL(m) {
  m.impl("level_grid", TORCH_BOX(&forward));
  m.impl("level_grid_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace qexp
