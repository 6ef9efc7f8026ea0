// DoReFa's weight transform on the CPU; see reference.py.
#include "../common/backward.h"
#include "../common/rounding.h"

namespace qexp {
namespace {

// y = the codes before they are rounded; then, of rounded codes, the values.
template <bool S, class C>
void codes_block(const C* __restrict t, C* __restrict y, int64_t n, C divisor, C levels) {
  for (int64_t i = 0; i < n; ++i) {
    const C u = t[i] / divisor;
    y[i] = S ? u * levels : (u * C(0.5) + C(0.5)) * levels;
  }
}

template <bool S, class C>
void values_block(C* __restrict y, int64_t n, C levels, C factor) {
  for (int64_t i = 0; i < n; ++i) y[i] = (S ? y[i] / levels : y[i] * C(2) / levels - C(1)) * factor;
}

template <bool S, class C>
void block(const C* t, C* y, int64_t n, C divisor, C levels, C factor, Rounding mode) {
  codes_block<S>(t, y, n, divisor, levels);
  round_block(mode, y, nullptr, n);
  values_block<S>(y, n, levels, factor);
}

// The largest magnitude; NaN if there is one.
template <class C>
C largest(const C* __restrict t, int64_t n) {
  C most = 0;
  int64_t nans = 0;
  for (int64_t i = 0; i < n; ++i) {
    const C size = std::fabs(t[i]);
    most = size > most ? size : most;
    nans += t[i] != t[i];
  }
  return nans ? C(NAN) : most;
}

// Returns {quantized, tanh(w), max|tanh(w)|}. The tanh is torch's own, so that it is the reference's to the last bit.
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& w, double levels, bool symmetric, bool rescale,
                                           std::string_view rounding) {
  Tensor out = empty_as(w), t = call("aten::tanh", "", w.scalar_type() == ScalarType::Double ? w : torch::stable::to(w, ScalarType::Float));
  Tensor peak_of = empty_of({}, t.scalar_type(), t);
  if (w.numel() == 0) return {out, t, torch::stable::zero_(peak_of)};
  const Walk walk(out, {&t}, std::nullopt);
  with_type(w, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    const C* from = data<C>(t);
    T* to = writable<T>(out);
    const C peak = largest(from, t.numel());
    *writable<C>(peak_of) = peak;
    const C divisor = peak == 0 ? C(1) : peak, n = static_cast<C>(levels);
    const C factor = rescale ? peak : C(1);
    const auto kernel = symmetric ? block<true, C> : block<false, C>;
    const Rounding mode = parse_rounding(rounding);
    torch::stable::parallel_for(0, walk.numel, kGrain, [&](int64_t begin, int64_t end) {
      alignas(64) C in[kBlock], result[kBlock];
      walk.blocks(begin, end, [&](const Block& b) {
        C* where = place<C>(to + b.out, result);
        kernel(load<C>(from + b.in[0], walk.stride[0], b.n, in), where, b.n, divisor, n, factor, mode);
        store(to + b.out, where, b.n);
      });
    });
  });
  return {out, t, peak_of};
}

// The sum over a block of gradient times what the peak does to the result, and how many weights are at the peak.
template <class C>
std::pair<C, int32_t> to_peak_block(const C* __restrict g, const C* __restrict y, const C* __restrict t, int64_t n,
                                    C peak, bool rescale) {
  alignas(64) C terms[kBlock];  // summed over one block, so that float32 loses nothing that counts
  int32_t reached = 0;
  const C kept = rescale ? C(1) : C(0);
  for (int64_t i = 0; i < n; ++i) {
    terms[i] = g[i] * (kept * y[i] - t[i]);
    reached += std::fabs(t[i]) == peak;
  }
  return {sum_of(terms, n), reached};
}

template <class C>
void backward_block(const C* __restrict g, const C* __restrict t, C* __restrict dw, int64_t n, C peak, C factor,
                    C share) {
  for (int64_t i = 0; i < n; ++i) {
    const C part = std::fabs(t[i]) == peak ? share : C(0);
    dw[i] = (g[i] / factor + (t[i] > 0 ? part : -part)) * (C(1) - t[i] * t[i]);
  }
}

Tensor backward(const Tensor& grad, const Tensor& y, const Tensor& t, const Tensor& peak_, bool rescale) {
  Tensor dw = empty_as(grad);
  if (grad.numel() == 0) return dw;
  const double greatest = values_of<double>(peak_)[0];
  if (greatest == 0) return torch::stable::zero_(dw);
  const Walk walk(dw, {&grad, &y, &t}, std::nullopt);
  with_type(grad, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    const C *squashed = data<C>(t), peak = static_cast<C>(greatest);
    const T *gradient = data<T>(grad), *result = data<T>(y);
    T* to = writable<T>(dw);
    const int64_t chunks = walk.chunks();  // as many with any number of threads, so the sum is too
    std::vector<std::pair<double, int64_t>> partial(chunks);
    auto each = [&](auto&& f) {
      torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
        alignas(64) C gs[kBlock], ys[kBlock], ts[kBlock];
        for (int64_t k = first; k < last; ++k)
          walk.blocks(walk.chunk_begin(k), walk.chunk_begin(k + 1), [&](const Block& b) {
            f(k, b, load<C>(gradient + b.in[0], walk.stride[0], b.n, gs),
              load<C>(result + b.in[1], walk.stride[1], b.n, ys),
              load<C>(squashed + b.in[2], walk.stride[2], b.n, ts));
          });
      });
    };
    each([&](int64_t k, const Block& b, const C* g, const C* values, const C* ts) {
      const auto [sum, reached] = to_peak_block<C>(g, values, ts, b.n, peak, rescale);
      partial[k].first += sum;
      partial[k].second += reached;
    });
    double total = 0, at_peak = 0;
    for (const auto& [sum, reached] : partial) total += sum, at_peak += reached;
    const C share = static_cast<C>(total / (rescale ? greatest : greatest * greatest) / at_peak);
    const C factor = rescale ? C(1) : peak;
    each([&](int64_t, const Block& b, const C* g, const C*, const C* ts) {
      alignas(64) C slopes[kBlock];
      C* where = place<C>(to + b.out, slopes);
      backward_block<C>(g, ts, where, b.n, peak, factor, share);
      store(to + b.out, where, b.n);
    });
  });
  return dw;
}

STABLE_TORCH_LIBRARY_IMPL(qexp, CPU, m) {
  m.impl("dorefa_weight", TORCH_BOX(&forward));
  m.impl("dorefa_weight_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace qexp
