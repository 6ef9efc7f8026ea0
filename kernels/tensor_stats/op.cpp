// Statistics in one pass on the CPU; see reference.py.
#include <cmath>
#include <cstring>
#include <vector>

#include "../common/numbers.h"
#include "../common/walk.h"

namespace qexp {
namespace {

enum Moment {
  kCount, kZeros, kNonfinite, kMinimum, kMaximum, kSum, kSquares, kCubes, kFourths, kAbsolute,
  kPositives, kPositiveSum, kPositiveSquares, kDeviation, kMoments
};
constexpr bool is_extreme(int m) { return m == kMinimum || m == kMaximum; }

// Which sums to compute: powers = all but the deviation, apart = the deviation from a center.
template <bool powers, bool apart>
struct Asked {
  static constexpr bool kPowers = powers, kApart = apart;
};

// The sums of one chunk over its channels `first` to `first + channels - 1`, [moments][channels].
class Moments {
 public:
  Moments(int64_t first, int64_t channels) : first_(first), channels_(channels), data_(kMoments * channels, 0.0) {
    std::fill_n(row(kMinimum), channels, INFINITY);
    std::fill_n(row(kMaximum), channels, -INFINITY);
  }
  double* row(int m) { return data_.data() + m * channels_; }
  double& at(int m, int64_t c) { return data_[m * channels_ + c - first_]; }
  void minimum(int64_t c, double v) { at(kMinimum, c) = lower(at(kMinimum, c), v); }
  void maximum(int64_t c, double v) { at(kMaximum, c) = -lower(-at(kMaximum, c), -v); }

  // Adds what a chunk of some of these channels has summed.
  void merge(Moments& other) {
    for (int64_t c = other.first_; c < other.first_ + other.channels_; ++c) {
      for (int m = kZeros; m < kMoments; ++m)
        if (!is_extreme(m)) at(m, c) += other.at(m, c);
      minimum(c, other.at(kMinimum, c));
      maximum(c, other.at(kMaximum, c));
    }
  }
  // The smaller; NaN if either is.
  static double lower(double a, double b) { return b < a || b != b ? b : a; }

 private:
  int64_t first_, channels_;
  std::vector<double> data_;
};

template <class C>
struct EightOf {
  typedef C type __attribute__((vector_size(8 * sizeof(C))));
};

// Eight running sums of each moment, element k of a step going to the k-th: the same bits on every processor.
template <class A, class C>
class Eight {
  using Values = typename EightOf<C>::type;
  using Doubles = typename EightOf<double>::type;
  using Masks = decltype(Values{} == Values{});

 public:
  // The centers of the sums are from[0], from[step], ...
  Eight(const C* from, int64_t step) {
    for (int k = 0; k < 8; ++k) middle_[k] = from[k * step];
  }

  void add(const C* from) {
    Values v;
    std::memcpy(&v, from, sizeof v);
    const Doubles wide = __builtin_convertvector(v, Doubles);
    if constexpr (A::kPowers) {
      const Doubles square = wide * wide, positive = wide < 0 ? Doubles{} : wide;  // NaN stays
      sum_ += wide;
      squares_ += square;
      cubes_ += square * wide;
      fourths_ += square * square;
      absolute_ += wide < 0 ? -wide : wide;
      positive_sum_ += positive;
      positive_squares_ += positive * positive;
      zeros_ -= v == 0;  // a comparison that holds is -1
      positives_ -= v > 0;
      low_ = v < low_ ? v : low_;
      high_ = v > high_ ? v : high_;
    }
    if constexpr (A::kApart) {
      const Doubles apart = wide - middle_;
      deviation_ += apart < 0 ? -apart : apart;
    }
  }

  // Adds what `steps` calls have summed, from x[0], x[apart], ...: sum k to channel c + k * step.
  void flush(const C* x, int64_t apart, int64_t steps, Moments& m, int64_t c, int64_t step) const {
    Masks nonfinite{}, nans{};
    // Values that are not finite leave no finite sum of squares; so they are counted only where they may be.
    for (int64_t r = 0; A::kPowers && r < steps && !finite_squares(); ++r) {
      Values v;
      std::memcpy(&v, x + r * apart, sizeof v);
      const Values size = v < 0 ? -v : v;
      nonfinite -= ~(size < static_cast<C>(INFINITY));
      nans -= v != v;
    }
    for (int k = 0; k < 8; ++k, c += step) {
      if constexpr (A::kApart) m.at(kDeviation, c) += deviation_[k];
      if constexpr (!A::kPowers) continue;
      m.at(kZeros, c) += zeros_[k];
      m.at(kNonfinite, c) += static_cast<double>(nonfinite[k]);
      m.at(kSum, c) += sum_[k];
      m.at(kSquares, c) += squares_[k];
      m.at(kCubes, c) += cubes_[k];
      m.at(kFourths, c) += fourths_[k];
      m.at(kAbsolute, c) += absolute_[k];
      m.at(kPositives, c) += positives_[k];
      m.at(kPositiveSum, c) += positive_sum_[k];
      m.at(kPositiveSquares, c) += positive_squares_[k];
      m.minimum(c, nans[k] ? NAN : static_cast<double>(low_[k]));
      m.maximum(c, nans[k] ? NAN : static_cast<double>(high_[k]));
    }
  }

 private:
  bool finite_squares() const {
    for (int k = 0; k < 8; ++k)
      if (!(squares_[k] < INFINITY)) return false;
    return true;
  }

  Doubles sum_{}, squares_{}, cubes_{}, fourths_{}, absolute_{}, positive_sum_{}, positive_squares_{}, deviation_{};
  Doubles middle_;
  Masks zeros_{}, positives_{};
  Values low_ = Values{} + static_cast<C>(INFINITY), high_ = -low_;
};

// Elements of n consecutive channels from c on.
template <class A, class C>
void add_across(const C* __restrict x, int64_t n, const C* __restrict center, Moments& m, int64_t c) {
  for (int64_t i = 0; i < n; ++i) {
    const double v = x[i], square = v * v, positive = v < 0 ? 0 : v;
    if constexpr (A::kPowers) {
      m.at(kSum, c + i) += v;
      m.at(kSquares, c + i) += square;
      m.at(kCubes, c + i) += square * v;
      m.at(kFourths, c + i) += square * square;
      m.at(kAbsolute, c + i) += std::fabs(v);
      m.at(kPositives, c + i) += v > 0;
      m.at(kPositiveSum, c + i) += positive;
      m.at(kPositiveSquares, c + i) += positive * positive;
      m.at(kZeros, c + i) += v == 0.0;
      m.at(kNonfinite, c + i) += !(std::fabs(v) < INFINITY);
      m.minimum(c + i, v);
      m.maximum(c + i, v);
    }
    if constexpr (A::kApart) m.at(kDeviation, c + i) += std::fabs(v - center[i]);
  }
}

// Elements of one channel.
template <class A, class C>
void add_run(const C* x, int64_t n, C center, Moments& m, int64_t c) {
  Eight<A, C> sums(&center, 0);
  const int64_t steps = n / 8;
  for (int64_t r = 0; r < steps; ++r) sums.add(x + r * 8);
  if (steps) sums.flush(x, 8, steps, m, c, 0);
  for (int64_t i = steps * 8; i < n; ++i) add_across<A>(x + i, 1, &center, m, c);
}

// A block of elements whose channels vary, the first of them `c`: whole rows of channels eight channels at a time.
template <class A, class C>
void add_varying(const C* x, int64_t n, const C* center, Moments& m, int64_t channels, int64_t c) {
  const int64_t rows = c == 0 ? n / channels : 0, whole = rows > 0 ? channels / 8 * 8 : 0;
  for (int64_t first = 0; first < whole; first += 8) {
    Eight<A, C> sums(center + first, 1);
    for (int64_t r = 0; r < rows; ++r) sums.add(x + r * channels + first);
    sums.flush(x + first, channels, rows, m, first, 1);
  }
  for (int64_t r = 0; r < rows; ++r)
    add_across<A>(x + r * channels + whole, channels - whole, center + whole, m, whole);
  for (int64_t i = rows * channels; i < n; c = 0) {
    const int64_t count = std::min(n - i, channels - c);
    add_across<A>(x + i, count, center + i, m, c);
    i += count;
  }
}

// Bins of n elements; what is not counted gets the spare bin `bins`. Positions are x / width, or with `times` x * width.
template <class C, bool V, bool times = false>
void find_bins(const C* __restrict x, int32_t* __restrict index, int64_t n, const C* __restrict first,
               const C* __restrict width, int64_t bins) {
  const C last = static_cast<C>(bins - 1);
  for (int64_t i = 0; i < n; ++i) {
    const C by = width[V ? i : 0], at = std::floor(times ? x[i] * by : x[i] / by) - first[V ? i : 0];
    const bool counted = (x[i] != C(0)) & (std::fabs(x[i]) < C(INFINITY)) & (at == at);
    const C inside = at > C(0) ? (at < last ? at : last) : C(0);
    index[i] = counted ? static_cast<int32_t>(inside) : static_cast<int32_t>(bins);
  }
}

// The same for elements that share one width. The inverse of a power of two is exact, so that a product, which takes a fraction of the
// time of a division, has the bits of the quotient.
template <class C>
void find_bins_of_one(const C* x, int32_t* index, int64_t n, const C* first, const C* width, int64_t bins) {
  int exponent = 0;
  if (std::frexp(*width, &exponent) != C(0.5) || exponent < -120 || exponent > 120) {
    find_bins<C, false>(x, index, n, first, width, bins);
    return;
  }
  const C inverse = C(1) / *width;
  find_bins<C, false, true>(x, index, n, first, &inverse, bins);
}

// Counts kept by one worker. Neighbours go to different copies: two equal bins in a row need not wait for each other. The copies of a
// single channel fill at most about 16 KiB: with twice that, an element takes twice the time.
class Counts {
 public:
  Counts(int64_t channels, int64_t bins)
      : channels_(channels), bins_(bins), copies_(channels > 1 ? 1 : bins > 1024 ? 2 : 4), stride_(bins + 1),
        data_(bins > 0 ? copies_ * channels * stride_ : 0, 0) {}
  uint32_t* row(int64_t channel, int copy) { return data_.data() + (channel * copies_ + copy) * stride_; }

  // Makes room for n more elements: adds the counts to the total before any of them could overflow.
  void reserve(int64_t n, std::vector<int64_t>& total) {
    held_ += n;
    if (held_ > UINT32_MAX) flush(total), held_ = n;
  }
  void flush(std::vector<int64_t>& total) {
    for (int64_t c = 0; c < (bins_ > 0 ? channels_ : 0); ++c)
      for (int k = 0; k < copies_; ++k)
        for (int64_t i = 0; i < bins_; ++i) total[c * bins_ + i] += row(c, k)[i];
    std::fill(data_.begin(), data_.end(), 0);
  }

  void add_run(const int32_t* index, int64_t n, int64_t channel) {
    uint32_t* rows[4];
    for (int k = 0; k < 4; ++k) rows[k] = row(channel, k % copies_);
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
      ++rows[0][index[i]];
      ++rows[1][index[i + 1]];
      ++rows[2][index[i + 2]];
      ++rows[3][index[i + 3]];
    }
    for (; i < n; ++i) ++rows[0][index[i]];
  }
  void add_across(const int32_t* index, int64_t n, int64_t channel) {
    uint32_t* counts = row(channel, 0);
    for (int64_t i = 0; i < n; ++i, counts += stride_) ++counts[index[i]];
  }

 private:
  int64_t channels_, bins_;
  int copies_;
  int64_t stride_, held_ = 0;
  std::vector<uint32_t> data_;
};

template <class A>
void fill(const Tensor& x, const Walk& walk, const OptionalTensor& center, const OptionalTensor& first,
          const OptionalTensor& width, int64_t bins, Moments& total, int64_t* histogram) {
  const int64_t channels = walk.channels, chunks = walk.chunks();
  const int64_t room = (int64_t{1} << 22) / std::max<int64_t>(1, channels * bins);
  const int64_t workers = std::min({chunks, std::max<int64_t>(1, room), int64_t{torch::stable::get_num_threads()}});
  std::vector<Moments> partial;
  for (int64_t k = 0; k < chunks; ++k) {
    const auto [low, high] = walk.channels_of(walk.chunk_begin(k), walk.chunk_begin(k + 1));
    partial.emplace_back(low, high - low);
  }
  std::vector<Counts> counts(workers, Counts(channels, bins));
  std::vector<std::vector<int64_t>> flushed(workers, std::vector<int64_t>(channels * bins, 0));
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    const auto table = [&](const OptionalTensor& p, C value) { return Table<C>(Parameter(p, value), walk); };
    const Table<C> centers = table(center, 0), firsts = table(first, 0), widths = table(width, 1);
    const T* from = data<T>(x);
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      alignas(64) C in[kBlock];
      alignas(64) int32_t index[kBlock];
      for (int64_t w = begin; w < end; ++w)
        for (int64_t k = w; k < chunks; k += workers) {
          counts[w].reserve(walk.chunk_begin(k + 1) - walk.chunk_begin(k), flushed[w]);
          walk.blocks(walk.chunk_begin(k), walk.chunk_begin(k + 1), [&](const Block& b) {
            const C* v = load<C>(from + b.in[0], walk.stride[0], b.n, in);
            if (!walk.varies) {
              add_run<A>(v, b.n, *centers.at(b.channel), partial[k], b.channel);
              if (bins == 0) return;
              find_bins_of_one<C>(v, index, b.n, firsts.at(b.channel), widths.at(b.channel), bins);
              counts[w].add_run(index, b.n, b.channel);
              return;
            }
            if (bins) find_bins<C, true>(v, index, b.n, firsts.at(b.channel), widths.at(b.channel), bins);
            add_varying<A>(v, b.n, centers.at(b.channel), partial[k], channels, b.channel);
            for (int64_t i = 0, c = b.channel; bins && i < b.n; c = 0) {
              const int64_t n = std::min(b.n - i, channels - c);
              counts[w].add_across(index + i, n, c);
              i += n;
            }
          });
        }
    });
  });
  for (auto& p : partial) total.merge(p);
  for (int64_t w = 0; w < workers; ++w) {
    counts[w].flush(flushed[w]);
    for (int64_t i = 0; i < channels * bins; ++i) histogram[i] += flushed[w][i];
  }
}

std::tuple<Tensor, Tensor> stats(const Tensor& x, Axis axis, const OptionalTensor& center,
                                 const OptionalTensor& first, const OptionalTensor& width, int64_t bins, bool powers) {
  const int64_t channels = axis ? x.size(*axis) : 1;
  Tensor moments = empty_of({kMoments, channels}, ScalarType::Double, x);
  Tensor histogram = torch::stable::new_zeros(x, {channels, bins}, ScalarType::Long);
  Moments total(0, channels);
  if (x.numel() > 0) {
    const Tensor order = call("aten::empty_like", "", x, std::nullopt, std::nullopt,
                              std::optional(torch::stable::Device(torch::headeronly::DeviceType::Meta, 0)), std::nullopt, std::nullopt);
    const Walk walk(order, {&x}, axis);
    const auto run = [&](auto asked) {
      fill<decltype(asked)>(x, walk, center, first, width, bins, total, writable<int64_t>(histogram));
    };
    if (!powers) {
      run(Asked<false, true>{});
    } else if (center) {
      run(Asked<true, true>{});
    } else {
      run(Asked<true, false>{});
      std::copy_n(total.row(kAbsolute), channels, total.row(kDeviation));
    }
    std::fill_n(total.row(kCount), channels, static_cast<double>(x.numel() / channels));
  }
  std::copy_n(total.row(0), kMoments * channels, writable<double>(moments));
  return {moments, histogram};
}

STABLE_TORCH_LIBRARY_IMPL(qexp, CPU, m) { m.impl("tensor_stats", TORCH_BOX(&stats)); }

}  // namespace
}  // namespace qexp
