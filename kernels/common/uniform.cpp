#include "uniform.h"

#include <ATen/ops/empty_like.h>

#include <limits>

#include "numbers.h"
#include "rounding.h"
#include "tables.h"
#include "walk.h"

namespace qexp {
namespace {

template <class C>
using Kernel = void (*)(const C*, C*, int64_t, const Row<C>&, const float*);

// V: the channel varies inside the block. A: noise is added before the clip. Q: the result is the code.
template <class C, Rounding R, bool V, bool A, bool Q>
void quantize_block(const C* __restrict x, C* __restrict y, int64_t n, const Row<C>& row, const float* __restrict u) {
  const C *__restrict scale = row.scale, *__restrict zero = row.zero, *__restrict low = row.low,
          *__restrict high = row.high, *__restrict offset = row.offset;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = V ? i : 0;
    C v = (x[i] - offset[c]) / scale[c] + zero[c];
    if constexpr (A) v = v + (static_cast<C>(u[i]) - C(0.5));
    v = clamp(v, low[c], high[c]);
    const C q = round_to<R>(v, R == Rounding::stochastic ? static_cast<C>(u[i]) : C(0));
    y[i] = Q ? q : (q - zero[c]) * scale[c] + offset[c];
  }
}

template <class C, bool Q>
Kernel<C> pick(const Uniform& u, bool varies) {
  return with_rounding(parse_rounding(u.rounding), [&](auto r) -> Kernel<C> {
    constexpr Rounding R = decltype(r)::value;
    if (u.additive_noise)
      return varies ? quantize_block<C, R, true, true, Q> : quantize_block<C, R, false, true, Q>;
    return varies ? quantize_block<C, R, true, false, Q> : quantize_block<C, R, false, false, Q>;
  });
}

void store_codes(int32_t* __restrict to, const float* __restrict q, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = q[i] == q[i] ? static_cast<int32_t>(q[i]) : std::numeric_limits<int32_t>::min();
}
void store_codes(int32_t* __restrict to, const double* __restrict q, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = q[i] == q[i] ? static_cast<int32_t>(q[i]) : std::numeric_limits<int32_t>::min();
}

template <bool Q>
at::Tensor run(const at::Tensor& x, const Uniform& u) {
  at::Tensor out = Q ? at::empty_like(x, x.options().dtype(at::kInt)) : at::empty_like(x);
  if (x.numel() == 0) return out;
  const at::Tensor noise = u.noise.value_or(x);
  const Walk walk(out, {&x, &noise}, u.channel_axis());
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    const Tables<C> tables(u, walk);
    const Kernel<C> kernel = pick<C, Q>(u, walk.varies);
    const T* from = x.const_data_ptr<T>();
    const float* noises = u.noise ? noise.const_data_ptr<float>() : nullptr;
    void* to = out.mutable_data_ptr();
    at::parallel_for(0, walk.numel, kGrain, [&](int64_t begin, int64_t end) {
      alignas(64) C in[kBlock], result[kBlock];
      alignas(64) float drawn[kBlock];
      walk.blocks(begin, end, [&](const Block& b) {
        const C* values = load<C>(from + b.in[0], walk.stride[0], b.n, in);
        const float* r = noises ? load<float>(noises + b.in[1], walk.stride[1], b.n, drawn) : nullptr;
        if constexpr (Q) {
          kernel(values, result, b.n, tables.row(b.channel), r);
          store_codes(static_cast<int32_t*>(to) + b.out, result, b.n);
        } else {
          T* target = static_cast<T*>(to) + b.out;
          C* where = place<C>(target, result);
          kernel(values, where, b.n, tables.row(b.channel), r);
          store(target, where, b.n);
        }
      });
    });
  });
  return out;
}

}  // namespace

at::Tensor uniform_forward(const at::Tensor& x, const Uniform& u) { return run<false>(x, u); }
at::Tensor uniform_codes(const at::Tensor& x, const Uniform& u) { return run<true>(x, u); }

}  // namespace qexp
