// Binarisation with hysteresis on the CPU; see reference.py.
#include <cmath>
#include <vector>

#include "../common/numbers.h"
#include "../common/sums.h"
#include "../common/walk.h"

namespace qexp {
namespace {

template <class F>
void with_state_type(const Tensor& state, F&& f) {
  switch (state.scalar_type()) {
    case ScalarType::Char: return f(int8_t{});
    case ScalarType::Short: return f(int16_t{});
    case ScalarType::Int: return f(int32_t{});
    case ScalarType::Long: return f(int64_t{});
    default: return with_type(state, f);
  }
}

std::tuple<Tensor, Tensor> forward(const Tensor& latent, const Tensor& state, double tau) {
  Tensor out = empty_as(state);
  const Walk walk(out, {&latent, &state}, std::nullopt);
  const int64_t chunks = walk.chunks();
  std::vector<double> partial(chunks, 0.0);
  with_type(latent, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    with_state_type(state, [&](auto sign) {
      using S = decltype(sign);
      const T* weights = data<T>(latent);
      const S* signs = data<S>(state);
      S* to = writable<S>(out);
      const C threshold = static_cast<C>(tau);
      torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
        alignas(64) C buffer[kBlock];
        alignas(64) double magnitudes[kBlock];
        for (int64_t k = first; k < last; ++k)
          walk.blocks(walk.chunk_begin(k), walk.chunk_begin(k + 1), [&](const Block& b) {
            const C* w = load<C>(weights + b.in[0], walk.stride[0], b.n, buffer);
            const S* old = signs + b.in[1];
            for (int64_t i = 0; i < b.n; ++i) magnitudes[i] = std::fabs(static_cast<double>(w[i]));
            partial[k] += sum_of(magnitudes, b.n);
            // With a threshold of zero the sign of zero is +1, which the first comparison gives.
            for (int64_t i = 0; i < b.n; ++i)
              to[b.out + i] = w[i] >= threshold ? S(1) : (w[i] <= -threshold ? S(-1) : old[i * walk.stride[1]]);
          });
      });
    });
  });
  double total = 0;
  for (const double p : partial) total += p;
  Tensor scale = empty_of({}, ScalarType::Float, latent);
  *writable<float>(scale) = static_cast<float>(total / std::max<int64_t>(latent.numel(), 1));
  return {out, scale};
}

STABLE_TORCH_LIBRARY_IMPL(qexp, CPU, m) { m.impl("hysteresis", TORCH_BOX(&forward)); }

}  // namespace
}  // namespace qexp
