// Batch normalisation of a training step on the CPU; see reference.py.
#include <cmath>
#include <numeric>

#include "../common/rounding.h"
#include "../common/vectors.h"
#include "../common/walk.h"

namespace qexp {
namespace {

constexpr int64_t kGuesses = 16;     // elements of a channel that give a first guess of its mean
constexpr int64_t kRows = 64;        // vectors that are added up in the type of the elements before float64 takes over
constexpr int64_t kPieces = 64;      // parts of the work; neither their number nor the sums depend on the number of threads
constexpr int64_t kPiece = 1 << 15;  // elements below which a part does not pay

// How [N, C, ...] lies in memory: planes of one channel each, or rows of all channels in turn.
struct Layout {
  int64_t numel, channels, plane;
  bool turns;

  explicit Layout(const Tensor& x) : numel(x.numel()), channels(x.size(1)), plane(numel / (x.size(0) * channels)) {
    turns = channels > 1 && (plane == 1 || !x.is_contiguous());
  }
  int64_t count() const { return numel / channels; }
  // Elements after which channels and lanes of a vector meet again.
  template <class C>
  int64_t period() const { return turns ? std::lcm(channels, kVector<C>) : kVector<C>; }
};

// Returns `t` in the memory order of `model`, copied only where it is in another.
Tensor laid_out_as(const Tensor& t, const Tensor& model) {
  bool same = true;
  for (int64_t d = 0; d < t.dim(); ++d) same &= t.size(d) == 1 || t.stride(d) == model.stride(d);
  if (same) return t;
  Tensor copy = empty_as(model, t.scalar_type());
  return torch::stable::copy_(copy, t);
}

// Returns `x` as planes or as rows of channels, copied only where it is neither.
Tensor planes_or_rows(const Tensor& x) {
  return x.is_contiguous() || (x.dim() == 4 && is_channels_last(x)) ? x : torch::stable::contiguous(x);
}

// One number per channel, repeated up to a whole period where channels take turns.
template <class C>
class PerChannel {
 public:
  PerChannel(std::vector<C> values, const Layout& layout) : values_(std::move(values)), turns_(layout.turns) {
    if (!turns_) return;
    const size_t n = values_.size();
    values_.resize(layout.period<C>());
    for (size_t i = n; i < values_.size(); ++i) values_[i] = values_[i - n];
  }
  // Those of the elements from place `at` of a period on; of channel `at` where channels do not take turns.
  template <class V>
  V get(int64_t at) const {
    return turns_ ? elements<V>(values_.data() + at) : all<V>(values_[at]);
  }

 private:
  std::vector<C> values_;
  bool turns_;
};

// Adds lanes to the sums of their channels, the first of which is `channel`.
template <class V>
void fold(const V& v, double* sums, int64_t channel, const Layout& layout) {
  if constexpr (lanes<V> == 1) {
    sums[channel] += v;
  } else if (!layout.turns) {
    sums[channel] += total_of<std::remove_cvref_t<decltype(v[0])>>(v);
  } else if (channel + lanes<V> <= layout.channels) {
    for (int64_t k = 0; k < lanes<V>; ++k) sums[channel + k] += v[k];
  } else {
    for (int64_t k = 0; k < lanes<V>; ++k) sums[(channel + k) % layout.channels] += v[k];
  }
}

// Runs an operation over the elements [begin, end): op.at<V>(place) gives its constants, op(constants, element, sums) works on the
// elements from `element` on and adds to S vectors of sums. `stride` elements lie between vectors that have the same constants.
template <class C, int S, class V, class Op>
void down(const Op& op, int64_t begin, int64_t count, int64_t stride, int64_t place, int64_t channel, double* sums,
          const Layout& layout) {
  const auto held = op.template at<V>(place);
  for (int64_t r = 0; r < count; r += kRows) {
    V terms[S > 0 ? S : 1] = {};
    const int64_t stop = std::min(count, r + kRows);
    for (int64_t k = r; k < stop; ++k) op(held, begin + k * stride, terms);
    for (int s = 0; s < S; ++s) fold(terms[s], sums + s * layout.channels, channel, layout);
  }
}

// In the order of the memory; the sums of a few rows lie in the first-level cache meanwhile.
template <class C, int S, class Op>
void over_rows(const Op& op, int64_t first, int64_t last, double* sums, const Layout& layout) {
  using V = Vector<C>;
  const int64_t period = layout.period<C>(), wide = period / kVector<C>;
  if (wide == 1) return down<C, S, V>(op, first * period, last - first, period, 0, 0, sums, layout);
  std::vector<V> terms(std::max(S, 1) * wide);
  for (int64_t r = first; r < last; r += kRows) {
    std::fill(terms.begin(), terms.end(), V{});
    for (int64_t k = r; k < std::min(last, r + kRows); ++k)
      for (int64_t j = 0; j < wide; ++j) {
        V own[S > 0 ? S : 1] = {};
        const int64_t place = j * kVector<C>;
        op(op.template at<V>(place), k * period + place, own);
        for (int s = 0; s < S; ++s) terms[s * wide + j] += own[s];
      }
    for (int s = 0; s < S; ++s)
      for (int64_t j = 0; j < wide; ++j)
        fold(terms[s * wide + j], sums + s * layout.channels, j * kVector<C> % layout.channels, layout);
  }
}

template <class C, int S, class Op>
void over_planes(const Op& op, int64_t first, int64_t last, double* sums, const Layout& layout) {
  const int64_t whole = layout.plane / kVector<C> * kVector<C>;
  for (int64_t p = first; p < last; ++p) {
    const int64_t channel = p % layout.channels, begin = p * layout.plane;
    down<C, S, Vector<C>>(op, begin, whole / kVector<C>, kVector<C>, channel, channel, sums, layout);
    down<C, S, C>(op, begin + whole, layout.plane - whole, 1, channel, channel, sums, layout);
  }
}

// Runs an operation over all elements and returns its sums [S][channels].
template <class C, int S, class Op>
std::vector<double> over(const Layout& layout, const Op& op) {
  const int64_t parts = layout.turns ? layout.numel / layout.period<C>() : layout.numel / layout.plane;
  const int64_t pieces = std::clamp<int64_t>(layout.numel / kPiece, 1, std::min(kPieces, std::max<int64_t>(parts, 1)));
  const int64_t size = S * layout.channels;
  std::vector<double> partial(size * pieces, 0.0), total(size, 0.0);
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t first = parts * k / pieces, last = parts * (k + 1) / pieces;
      double* sums = partial.data() + size * k;
      if (layout.turns)
        over_rows<C, S>(op, first, last, sums, layout);
      else
        over_planes<C, S>(op, first, last, sums, layout);
    }
  });
  for (int64_t k = 0; k < pieces; ++k)
    for (int64_t i = 0; i < size; ++i) total[i] += partial[size * k + i];
  if (layout.turns)  // what is left of the last period
    for (int64_t i = parts * layout.period<C>(); i < layout.numel; ++i)
      down<C, S, C>(op, i, 1, 1, i % layout.channels, i % layout.channels, total.data(), layout);
  return total;
}

// The mean of a few elements of each channel that lie far apart: sums of differences from it lose no digits.
template <class C, class T>
std::vector<C> guess(const Tensor& x) {
  const int64_t channels = x.size(1);
  std::vector<double> sums(channels, 0.0);
  const T* from = data<T>(x);
  for (int64_t k = 0; k < kGuesses; ++k) {
    int64_t at = k * x.size(0) / kGuesses * x.stride(0);
    for (int64_t d = 2; d < x.dim(); ++d) at += (2 * k + 1) * (d + 3) % x.size(d) * x.stride(d);
    for (int64_t c = 0; c < channels; ++c) sums[c] += static_cast<double>(from[at + c * x.stride(1)]);
  }
  std::vector<C> found(channels);
  for (int64_t c = 0; c < channels; ++c) found[c] = std::isfinite(sums[c]) ? static_cast<C>(sums[c] / kGuesses) : C(0);
  return found;
}

// Sums of differences from a guess of the mean, and of their squares.
template <class T, class C>
struct Moments {
  const T* x;
  PerChannel<C> guess;

  template <class V>
  V at(int64_t place) const { return guess.template get<V>(place); }
  template <class V>
  void operator()(const V& guess, int64_t i, V* sums) const {
    const V d = elements<V>(x + i) - guess;
    sums[0] += d;
    sums[1] += d * d;
  }
};

// How a channel is normalised.
template <class C>
struct Line {
  PerChannel<C> mean, slope, bias;

  template <class V>
  struct Held {
    V mean, slope, bias;
    V operator()(const V& x) const { return (x - mean) * slope + bias; }
  };
  template <class V>
  Held<V> at(int64_t place) const {
    return {mean.template get<V>(place), slope.template get<V>(place), bias.template get<V>(place)};
  }
};

// A: adds something before the limits.
template <bool A, class T, class C>
struct Normalize {
  const T *x, *added;
  T* y;
  Line<C> line;
  C low, high;

  template <class V>
  auto at(int64_t place) const { return line.template at<V>(place); }
  template <class V>
  void operator()(const typename Line<C>::template Held<V>& held, int64_t i, V*) const {
    V v = held(elements<V>(x + i));
    if constexpr (A) v += elements<V>(added + i);
    put(clamp(v, all<V>(low), all<V>(high)), y + i);
  }
};

// What the limits were applied to: nothing, values that are computed again, or (because something was added) values that are stored.
enum class Limits { none, computed, stored };

// The gradient that passes the limits, and its product with the difference from the mean. M: the gradient is the sum of two. Where it
// took more than x and one gradient to compute, it is stored.
template <Limits L, bool M, class T, class C>
struct Passed {
  static constexpr bool stores = L == Limits::stored || M;
  const T *x, *g, *more, *y;
  T* passed;
  Line<C> line;
  C low, high;

  template <class V>
  auto at(int64_t place) const { return line.template at<V>(place); }
  template <class V>
  void operator()(const typename Line<C>::template Held<V>& held, int64_t i, V* sums) const {
    const V value = elements<V>(x + i);
    const V p = through<V>(held, value, i);
    if constexpr (stores) put(p, passed + i);
    sums[0] += p;
    sums[1] += p * (value - held.mean);
  }
  template <class V>
  V through(const typename Line<C>::template Held<V>& held, const V& value, int64_t i) const {
    V gradient = elements<V>(g + i);
    if constexpr (M) gradient += elements<V>(more + i);
    if constexpr (L == Limits::none) return gradient;
    const V limited = L == Limits::stored ? elements<V>(y + i) : held(value);
    const V above = limited > low ? gradient : all<V>(C(0));
    return limited < high ? above : all<V>(C(0));
  }
};

// The gradient of x.
template <class P, class T, class C>
struct Gradient {
  P pass;
  PerChannel<C> down, less;
  T* dx;

  template <class V>
  struct Held {
    typename Line<C>::template Held<V> line;
    V down, less;
  };
  template <class V>
  Held<V> at(int64_t place) const {
    return {pass.line.template at<V>(place), down.template get<V>(place), less.template get<V>(place)};
  }
  template <class V>
  void operator()(const Held<V>& held, int64_t i, V*) const {
    const V value = elements<V>(pass.x + i), p = pass.template through<V>(held.line, value, i);
    put(p * held.line.slope - (value - held.line.mean) * held.down - held.less, dx + i);
  }
};

template <class C>
std::vector<C> slopes(const Tensor& weight, const C* variance, double eps) {
  std::vector<C> found = values_of<C>(weight);
  for (size_t c = 0; c < found.size(); ++c) found[c] /= std::sqrt(variance[c] + static_cast<C>(eps));
  return found;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& given, const Tensor& weight, const Tensor& bias,
                                           const OptionalTensor& added, double eps, double low, double high) {
  const Tensor x = planes_or_rows(given);
  const Layout layout(x);
  const ScalarType wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor y = empty_as(x), mean = empty_of({layout.channels}, wide, x), variance = empty_of({layout.channels}, wide, x);
  const Tensor more = added ? laid_out_as(*added, x) : x;
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    C *means = writable<C>(mean), *variances = writable<C>(variance);
    const std::vector<C> guesses = guess<C, T>(x);
    const auto sums = over<C, 2>(layout, Moments<T, C>{data<T>(x), {guesses, layout}});
    const double count = static_cast<double>(layout.count());
    for (int64_t c = 0; c < layout.channels; ++c) {
      const double off = sums[c] / count;
      means[c] = static_cast<C>(guesses[c] + off);
      variances[c] = static_cast<C>(std::max(sums[layout.channels + c] / count - off * off, 0.0));
    }
    const Line<C> line{{{means, means + layout.channels}, layout},
                       {slopes<C>(weight, variances, eps), layout},
                       {values_of<C>(bias), layout}};
    const auto run = [&](auto with) {
      over<C, 0>(layout, Normalize<with.value, T, C>{data<T>(x), data<T>(more), writable<T>(y), line, static_cast<C>(low),
                                                     static_cast<C>(high)});
    };
    added ? run(std::true_type{}) : run(std::false_type{});
  });
  return {laid_out_as(y, empty_as(given)), mean, variance};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const OptionalTensor& more,
                                                    const Tensor& given, const OptionalTensor& y, const Tensor& weight,
                                                    const Tensor& bias, const Tensor& mean, const Tensor& variance,
                                                    double eps, double low, double high, bool added) {
  const Tensor x = planes_or_rows(given), g = laid_out_as(grad, x), result = y ? laid_out_as(*y, x) : x;
  const Tensor second = more ? laid_out_as(*more, x) : x;
  const Layout layout(x);
  Tensor dx = empty_as(x), dadded = added ? empty_as(x) : empty_of({0}, x.scalar_type(), x);
  Tensor dweight = empty_of({layout.channels}, weight.scalar_type(), x);
  Tensor dbias = empty_of({layout.channels}, weight.scalar_type(), x);
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    const std::vector<C> slope = slopes<C>(weight, data<C>(variance), eps);
    const Line<C> line{{values_of<C>(mean), layout}, {slope, layout}, {values_of<C>(bias), layout}};
    const auto run = [&](auto limits, auto two) {
      using Pass = Passed<limits.value, two.value, T, C>;
      T* passed = writable<T>(added ? dadded : dx);  // dx takes its place at the end
      const Pass pass{data<T>(x), data<T>(g), data<T>(second), data<T>(result), passed, line, static_cast<C>(low),
                      static_cast<C>(high)};
      const auto sums = over<C, 2>(layout, pass);
      std::vector<C> down(layout.channels), less(layout.channels);
      const double count = static_cast<double>(layout.count());
      with_type(dweight, [&](auto kind) {
        using W = decltype(kind);
        W *dw = writable<W>(dweight), *db = writable<W>(dbias);
        for (int64_t c = 0; c < layout.channels; ++c) {
          const C square = data<C>(variance)[c] + static_cast<C>(eps);
          const double total = sums[c], product = sums[layout.channels + c];
          dw[c] = static_cast<W>(static_cast<C>(product / std::sqrt(square)));
          db[c] = static_cast<W>(static_cast<C>(total));
          down[c] = static_cast<C>(slope[c] / square * product / count);
          less[c] = static_cast<C>(slope[c] * total / count);
        }
      });
      const PerChannel<C> d(down, layout), l(less, layout);
      if constexpr (Pass::stores) {
        using Stored = Passed<Limits::none, false, T, C>;
        const Stored stored{data<T>(x), passed, nullptr, nullptr, nullptr, line, C(0), C(0)};
        over<C, 0>(layout, Gradient<Stored, T, C>{stored, d, l, writable<T>(dx)});
      } else {
        over<C, 0>(layout, Gradient<Pass, T, C>{pass, d, l, writable<T>(dx)});
      }
    };
    const auto limited = [&](auto two) {
      if (y) return run(std::integral_constant<Limits, Limits::stored>{}, two);
      if (low == -INFINITY && high == INFINITY) return run(std::integral_constant<Limits, Limits::none>{}, two);
      run(std::integral_constant<Limits, Limits::computed>{}, two);
    };
    more ? limited(std::true_type{}) : limited(std::false_type{});
  });
  const Tensor as = empty_as(given);
  return {laid_out_as(dx, as), added ? laid_out_as(dadded, as) : dadded, dweight, dbias};
}

STABLE_TORCH_LIBRARY_IMPL(qexp, CPU, m) {
  m.impl("batch_norm", TORCH_BOX(&forward));
  m.impl("batch_norm_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace qexp
