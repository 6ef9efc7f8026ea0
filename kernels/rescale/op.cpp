// Another grid on the CPU; see reference.py.
#include "../common/numbers.h"
#include "../common/rounding.h"
#include "../common/walk.h"

namespace qexp {
namespace {

template <class F>
void with_output_type(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Byte: return f(uint8_t{});
    case ScalarType::Char: return f(int8_t{});
    default: STD_TORCH_CHECK(false, "dtype is not allowed; use float32, float64, uint8 or int8");
  }
}

void place_on_grid(const double* __restrict x, double* __restrict y, int64_t n, const double* __restrict factor,
                   const double* __restrict summand, bool varies) {
  if (varies) {
    for (int64_t i = 0; i < n; ++i) y[i] = x[i] * factor[i] + summand[i];
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = x[i] * factor[0] + summand[0];
  }
}

Tensor forward(const Tensor& x, const Tensor& factor, const Tensor& summand, double low, double high,
               std::string_view rounding, ScalarType dtype) {
  Tensor out = empty_as(x, dtype);
  const Axis axis = x.dim() > 1 ? Axis(1) : std::nullopt;
  const Walk walk(out, {&x}, axis);
  const Table<double> factors(factor, walk), summands(summand, walk);
  const Rounding mode = parse_rounding(rounding);
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    const T* from = data<T>(x);
    with_output_type(dtype, [&](auto result) {
      using S = decltype(result);
      S* to = writable<S>(out);
      torch::stable::parallel_for(0, walk.numel, kGrain, [&](int64_t first, int64_t last) {
        alignas(64) double buffer[kBlock], y[kBlock];
        walk.blocks(first, last, [&](const Block& b) {
          const double* v = load<double>(from + b.in[0], walk.stride[0], b.n, buffer);
          place_on_grid(v, y, b.n, factors.at(b.channel), summands.at(b.channel), walk.varies);
          round_block(mode, y, nullptr, b.n);
          S* target = to + b.out;
          for (int64_t i = 0; i < b.n; ++i) target[i] = static_cast<S>(clamp(y[i], low, high));
        });
      });
    });
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(qexp, CPU, m) { m.impl("rescale", TORCH_BOX(&forward)); }

}  // namespace
}  // namespace qexp
