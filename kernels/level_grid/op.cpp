// Quantization to a table of levels on the CPU; see reference.py.
#include <cmath>

#include "../common/backward.h"
#include "../common/rounding.h"

namespace qexp {
namespace {

// Sorted levels and, between neighbours, the largest value that still belongs to the lower one.
template <class C>
class Levels {
 public:
  explicit Levels(const Tensor& levels) : values_(values_of<C>(levels)) {
    for (size_t i = 0; i + 1 < values_.size(); ++i) {
      const C middle = (values_[i] + values_[i + 1]) * C(0.5);
      const bool lower = std::fabs(values_[i]) < std::fabs(values_[i + 1]);
      thresholds_.push_back(lower ? middle : std::nextafter(middle, C(-INFINITY)));
    }
  }
  C lowest() const { return values_.front(); }
  C highest() const { return values_.back(); }

  // Replaces v[i] by the nearest level. Few levels: count the thresholds below, a comparison each over the block.
  void nearest(const C* __restrict v, C* __restrict q, int64_t n) const {
    alignas(64) int32_t index[kBlock];
    if (thresholds_.size() <= 32) {
      std::fill_n(index, n, 0);
      for (const C t : thresholds_)
        for (int64_t i = 0; i < n; ++i) index[i] += v[i] > t;
    } else {
      for (int64_t i = 0; i < n; ++i)
        index[i] = static_cast<int32_t>(
            std::lower_bound(thresholds_.begin(), thresholds_.end(), v[i]) - thresholds_.begin());
    }
    const C* table = values_.data();
    for (int64_t i = 0; i < n; ++i) q[i] = v[i] == v[i] ? table[index[i]] : v[i];
  }

 private:
  std::vector<C> values_, thresholds_;
};

template <class C>
void divide(const C* __restrict x, const C* __restrict scale, C* __restrict v, int64_t n, int64_t step) {
  if (step)
    for (int64_t i = 0; i < n; ++i) v[i] = x[i] / scale[i];
  else
    for (int64_t i = 0; i < n; ++i) v[i] = x[i] / scale[0];
}

Tensor forward(const Tensor& x, const Tensor& levels, const Tensor& scale, Axis axis, bool) {
  Tensor out = empty_as(x);
  const Walk walk(out, {&x}, scale.numel() == 1 ? std::nullopt : axis);
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    const Levels<C> table(levels);
    Table<C> scales(scale, walk);
    scales.apply([](C s) { return valid(s); });
    const T* from = data<T>(x);
    T* to = writable<T>(out);
    const int64_t step = walk.varies ? 1 : 0;
    torch::stable::parallel_for(0, walk.numel, kGrain, [&](int64_t begin, int64_t end) {
      alignas(64) C in[kBlock], v[kBlock], q[kBlock];
      walk.blocks(begin, end, [&](const Block& b) {
        const C* s = scales.at(b.channel);
        divide(load<C>(from + b.in[0], walk.stride[0], b.n, in), s, v, b.n, step);
        table.nearest(v, q, b.n);
        for (int64_t i = 0; i < b.n; ++i) to[b.out + i] = static_cast<T>(q[i] * s[i * step]);
      });
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& levels, const Tensor& scale,
                                    Axis axis, bool clip_gradient) {
  Tensor dx = empty_as(x), dscale = scale;
  const Walk walk(dx, {&x, &grad}, scale.numel() == 1 ? std::nullopt : axis);
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    const Levels<C> table(levels);
    Table<C> scales(scale, walk);
    scales.apply([](C s) { return valid(s); });
    const C low = table.lowest(), high = table.highest();
    const auto sums = backward_walk<T, 1>(
        walk, x, grad, dx, [&](const C* xs, const C* gs, C* to, int64_t n, int64_t channel, auto& terms) {
          alignas(64) C v[kBlock], q[kBlock];
          divide(xs, scales.at(channel), v, n, walk.varies ? 1 : 0);
          table.nearest(v, q, n);
          C* term = terms[0];
          for (int64_t i = 0; i < n; ++i) {
            const bool inside = v[i] >= low && v[i] <= high;
            to[i] = inside || !clip_gradient ? gs[i] : C(0);
            term[i] = gs[i] * (inside ? q[i] - v[i] : q[i]);
          }
        });
    dscale = gradient_like(scale, sums.data(), walk.channels, 1.0);
  });
  return {dx, dscale};
}

STABLE_TORCH_LIBRARY_IMPL(qexp, CPU, m) {
  m.impl("level_grid", TORCH_BOX(&forward));
  m.impl("level_grid_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace qexp
