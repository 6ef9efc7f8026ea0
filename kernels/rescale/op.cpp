// Another grid on the CPU; see reference.py.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../common/numbers.h"
#include "../common/rounding.h"
#include "../common/walk.h"

namespace qexp {
namespace {

using at::Tensor;

template <class F>
void with_output_type(at::ScalarType dtype, F&& f) {
  switch (dtype) {
    case at::kFloat: return f(float{});
    case at::kDouble: return f(double{});
    case at::kByte: return f(uint8_t{});
    case at::kChar: return f(int8_t{});
    default: TORCH_CHECK_VALUE(false, "dtype: got ", dtype, ", expected float32, float64, uint8 or int8");
  }
}

Tensor forward(const Tensor& x, const Tensor& factor, const Tensor& summand, double low, double high,
               std::string_view rounding, at::ScalarType dtype) {
  Tensor out = at::empty_like(x, x.options().dtype(dtype));
  const std::optional<int64_t> axis = x.dim() > 1 ? std::optional<int64_t>(1) : std::nullopt;
  const Walk walk(out, {&x}, axis);
  const Table<double> factors(factor, walk), summands(summand, walk);
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    const T* from = x.const_data_ptr<T>();
    with_output_type(dtype, [&](auto result) {
      using S = decltype(result);
      S* to = out.mutable_data_ptr<S>();
      with_rounding(parse_rounding(rounding), [&](auto mode) {
        at::parallel_for(0, walk.numel, kGrain, [&](int64_t first, int64_t last) {
          alignas(64) double buffer[kBlock];
          walk.blocks(first, last, [&](const Block& b) {
            const double* v = load<double>(from + b.in[0], walk.stride[0], b.n, buffer);
            const double* f = factors.at(b.channel);
            const double* s = summands.at(b.channel);
            S* y = to + b.out;
            if (walk.varies) {
              for (int64_t i = 0; i < b.n; ++i)
                y[i] = static_cast<S>(clamp(round_to<decltype(mode)::value>(v[i] * f[i] + s[i], 0.0), low, high));
            } else {
              const double one = f[0], other = s[0];
              for (int64_t i = 0; i < b.n; ++i)
                y[i] = static_cast<S>(clamp(round_to<decltype(mode)::value>(v[i] * one + other, 0.0), low, high));
            }
          });
        });
      });
    });
  });
  return out;
}

TORCH_LIBRARY_IMPL(qexp, CPU, m) { m.impl("rescale", &forward); }

}  // namespace
}  // namespace qexp
