#include "uniform.h"

#include "numbers.h"
#include "rounding.h"
#include "tables.h"
#include "walk.h"

namespace qexp {
namespace {

// V: the channel varies inside the block. Q: the result is the code.
template <bool V, bool Q, class C>
void half_even_block(const C* __restrict x, C* __restrict y, int64_t n, const Row<C>& row) {
  const C *__restrict scale = row.scale, *__restrict zero = row.zero, *__restrict low = row.low,
          *__restrict high = row.high, *__restrict offset = row.offset;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = V ? i : 0;
    const C v = clamp((x[i] - offset[c]) / scale[c] + zero[c], low[c], high[c]);
    const C q = round_to<Rounding::half_even>(v, C(0));
    y[i] = Q ? q : (q - zero[c]) * scale[c] + offset[c];
  }
}

// v = clip((x - offset) / scale + zero (+ u - 1/2), low, high)
template <bool V, class C>
void clipped_block(const C* __restrict x, C* __restrict v, int64_t n, const Row<C>& row, const float* __restrict u) {
  const C *__restrict scale = row.scale, *__restrict zero = row.zero, *__restrict offset = row.offset;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = V ? i : 0;
    v[i] = (x[i] - offset[c]) / scale[c] + zero[c];
  }
  if (u)
    for (int64_t i = 0; i < n; ++i) v[i] = v[i] + (static_cast<C>(u[i]) - C(0.5));
  for (int64_t i = 0; i < n; ++i) v[i] = clamp(v[i], row.low[V ? i : 0], row.high[V ? i : 0]);
}

// y = (q - zero) * scale + offset
template <bool V, class C>
void values_block(const C* q, C* y, int64_t n, const Row<C>& row) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = V ? i : 0;
    y[i] = (q[i] - row.zero[c]) * row.scale[c] + row.offset[c];
  }
}

template <bool V, bool Q, class C>
void quantize_block(const C* x, C* y, int64_t n, const Row<C>& row, Rounding mode, const float* u, bool additive) {
  if (mode == Rounding::half_even && !u) return half_even_block<V, Q>(x, y, n, row);
  alignas(64) C q[kBlock];
  clipped_block<V>(x, q, n, row, additive ? u : nullptr);
  round_block(mode, q, u, n);
  if constexpr (Q) {
    std::copy_n(q, n, y);
  } else {
    values_block<V>(q, y, n, row);
  }
}

template <class C>
void store_codes(int32_t* __restrict to, const C* __restrict q, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = code_of(q[i]);
}

template <bool Q>
Tensor run(const Tensor& x, const Uniform& u) {
  Tensor out = empty_as(x, Q ? std::optional(ScalarType::Int) : std::nullopt);
  if (x.numel() == 0) return out;
  const Tensor noise = u.noise.value_or(x);
  const Walk walk(out, {&x, &noise}, u.channel_axis());
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    const Tables<C> tables(u, walk);
    const auto kernel = walk.varies ? quantize_block<true, Q, C> : quantize_block<false, Q, C>;
    const Rounding mode = parse_rounding(u.rounding);
    const T* from = data<T>(x);
    const float* noises = u.noise ? data<float>(noise) : nullptr;
    void* to = writable<void>(out);
    torch::stable::parallel_for(0, walk.numel, kGrain, [&](int64_t begin, int64_t end) {
      alignas(64) C in[kBlock], result[kBlock];
      alignas(64) float drawn[kBlock];
      walk.blocks(begin, end, [&](const Block& b) {
        const C* values = load<C>(from + b.in[0], walk.stride[0], b.n, in);
        const float* r = noises ? load<float>(noises + b.in[1], walk.stride[1], b.n, drawn) : nullptr;
        if constexpr (Q) {
          kernel(values, result, b.n, tables.row(b.channel), mode, r, u.additive_noise);
          store_codes(static_cast<int32_t*>(to) + b.out, result, b.n);
        } else {
          T* target = static_cast<T*>(to) + b.out;
          C* where = place<C>(target, result);
          kernel(values, where, b.n, tables.row(b.channel), mode, r, u.additive_noise);
          store(target, where, b.n);
        }
      });
    });
  });
  return out;
}

template <class C>
void round_in_place(Rounding mode, C* __restrict v, const float* __restrict u, int64_t n) {
  with_rounding(mode, [&](auto r) {
    constexpr Rounding R = decltype(r)::value;
    for (int64_t i = 0; i < n; ++i) v[i] = round_to<R>(v[i], R == Rounding::stochastic ? static_cast<C>(u[i]) : C(0));
  });
}

}  // namespace

void round_block(Rounding mode, float* v, const float* u, int64_t n) { round_in_place(mode, v, u, n); }
void round_block(Rounding mode, double* v, const float* u, int64_t n) { round_in_place(mode, v, u, n); }

Tensor uniform_forward(const Tensor& x, const Uniform& u) { return run<false>(x, u); }
Tensor uniform_codes(const Tensor& x, const Uniform& u) { return run<true>(x, u); }

}  // namespace qexp
