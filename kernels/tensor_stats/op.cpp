// Statistics in one pass on the CPU; see reference.py.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "../common/numbers.h"
#include "../common/walk.h"

namespace qexp {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

enum Moment {
  kCount, kZeros, kNonfinite, kMinimum, kMaximum, kSum, kSquares, kCubes, kFourths, kAbsolute,
  kPositives, kPositiveSum, kPositiveSquares, kDeviation, kMoments
};
constexpr bool is_extreme(int m) { return m == kMinimum || m == kMaximum; }

// What is asked for: powers = all but the deviation, apart = the deviation from a center.
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

// Elements of one channel.
template <class A, class C>
void add_run(const C* __restrict x, int64_t n, double center, Moments& m, int64_t c) {
  double sum = 0, squares = 0, cubes = 0, fourths = 0, absolute = 0, positive_sum = 0, positive_squares = 0;
  double deviation = 0;
  C low = INFINITY, high = -INFINITY;
  int32_t zeros = 0, nonfinite = 0, nans = 0, positives = 0;
  if constexpr (A::kPowers) {
#pragma omp simd reduction(+ : sum, squares, cubes, fourths, absolute, positive_sum, positive_squares) \
    reduction(+ : zeros, nonfinite, nans, positives) reduction(min : low) reduction(max : high)
    for (int64_t i = 0; i < n; ++i) {
      const C v = x[i], above = v < C(0) ? C(0) : v;  // NaN stays
      const double wide = v, square = wide * wide, positive = above;
      sum += wide;
      squares += square;
      cubes += square * wide;
      fourths += square * square;
      absolute += std::fabs(wide);
      positive_sum += positive;
      positive_squares += positive * positive;
      zeros += v == C(0);
      positives += v > C(0);
      nonfinite += !(std::fabs(v) < C(INFINITY));
      nans += v != v;
      low = v < low ? v : low;
      high = v > high ? v : high;
    }
    m.at(kZeros, c) += zeros;
    m.at(kNonfinite, c) += nonfinite;
    m.at(kSum, c) += sum;
    m.at(kSquares, c) += squares;
    m.at(kCubes, c) += cubes;
    m.at(kFourths, c) += fourths;
    m.at(kAbsolute, c) += absolute;
    m.at(kPositives, c) += positives;
    m.at(kPositiveSum, c) += positive_sum;
    m.at(kPositiveSquares, c) += positive_squares;
    m.minimum(c, nans ? NAN : static_cast<double>(low));
    m.maximum(c, nans ? NAN : static_cast<double>(high));
  }
  if constexpr (A::kApart) {
#pragma omp simd reduction(+ : deviation)
    for (int64_t i = 0; i < n; ++i) deviation += std::fabs(static_cast<double>(x[i]) - center);
    m.at(kDeviation, c) += deviation;
  }
}

// Rows of all channels, eight channels at a time with their sums in registers.
template <class A>
void add_rows(const float* x, int64_t rows, int64_t channels, const float* center, Moments& m) {
  using Floats = float __attribute__((vector_size(32)));
  using Doubles = double __attribute__((vector_size(64)));
  using Masks = int32_t __attribute__((vector_size(32)));
  for (int64_t c = 0; c + 8 <= channels; c += 8) {
    Doubles sum{}, squares{}, cubes{}, fourths{}, absolute{}, positive_sum{}, positive_squares{}, deviation{}, middle;
    Masks zeros{}, nonfinite{}, nans{}, positives{};
    Floats low = Floats{} + INFINITY, high = -low;
    for (int k = 0; k < 8; ++k) middle[k] = center[c + k];
    for (int64_t r = 0; r < rows; ++r) {
      Floats v;
      std::memcpy(&v, x + r * channels + c, sizeof v);
      const Floats size = v < 0 ? -v : v;
      const Doubles wide = __builtin_convertvector(v, Doubles);
      if constexpr (A::kPowers) {
        const Doubles square = wide * wide, positive = wide < 0 ? Doubles{} : wide;
        sum += wide;
        squares += square;
        cubes += square * wide;
        fourths += square * square;
        absolute += __builtin_convertvector(size, Doubles);
        positive_sum += positive;
        positive_squares += positive * positive;
        zeros -= v == 0;  // a comparison that holds is -1
        positives -= v > 0;
        nonfinite += size < INFINITY;
        nans -= v != v;
        low = v < low ? v : low;
        high = v > high ? v : high;
      }
      if constexpr (A::kApart) {
        const Doubles apart = wide - middle;
        deviation += apart < 0 ? -apart : apart;
      }
    }
    for (int k = 0; k < 8; ++k) {
      if constexpr (A::kApart) m.at(kDeviation, c + k) += deviation[k];
      if constexpr (!A::kPowers) continue;
      m.at(kZeros, c + k) += zeros[k];
      m.at(kNonfinite, c + k) += static_cast<double>(rows + nonfinite[k]);
      m.at(kSum, c + k) += sum[k];
      m.at(kSquares, c + k) += squares[k];
      m.at(kCubes, c + k) += cubes[k];
      m.at(kFourths, c + k) += fourths[k];
      m.at(kAbsolute, c + k) += absolute[k];
      m.at(kPositives, c + k) += positives[k];
      m.at(kPositiveSum, c + k) += positive_sum[k];
      m.at(kPositiveSquares, c + k) += positive_squares[k];
      m.minimum(c + k, nans[k] ? NAN : static_cast<double>(low[k]));
      m.maximum(c + k, nans[k] ? NAN : static_cast<double>(high[k]));
    }
  }
}

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

// A block of elements whose channels vary, the first of them `c`.
template <class A, class C>
void add_varying(const C* x, int64_t n, const C* center, Moments& m, int64_t channels, int64_t c) {
  int64_t start = 0;
  if constexpr (std::is_same_v<C, float>) {
    const int64_t rows = c == 0 ? n / channels : 0, whole = channels / 8 * 8;
    if (rows > 0) {
      add_rows<A>(x, rows, channels, center, m);
      for (int64_t r = 0; r < rows; ++r)
        add_across<A>(x + r * channels + whole, channels - whole, center + whole, m, whole);
      start = rows * channels;
    }
  }
  for (int64_t i = start; i < n; c = 0) {
    const int64_t count = std::min(n - i, channels - c);
    add_across<A>(x + i, count, center + i, m, c);
    i += count;
  }
}

// Bins of n elements; what is not counted gets the spare bin `bins`.
template <class C, bool V>
void find_bins(const C* __restrict x, int32_t* __restrict index, int64_t n, const C* __restrict first,
               const C* __restrict width, int64_t bins) {
  const C last = static_cast<C>(bins - 1);
  for (int64_t i = 0; i < n; ++i) {
    const C at = std::floor(x[i] / width[V ? i : 0]) - first[V ? i : 0];
    const bool counted = (x[i] != C(0)) & (std::fabs(x[i]) < C(INFINITY)) & (at == at);
    const C inside = at > C(0) ? (at < last ? at : last) : C(0);
    index[i] = counted ? static_cast<int32_t>(inside) : static_cast<int32_t>(bins);
  }
}

// Counts kept by one worker. Neighbours go to different copies: two equal bins in a row need not wait for each other.
class Counts {
 public:
  Counts(int64_t channels, int64_t bins)
      : channels_(channels), bins_(bins), copies_(channels == 1 ? 4 : 1), stride_(bins + 1),
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
  const int64_t workers = std::min({chunks, std::max<int64_t>(1, room), int64_t{at::get_num_threads()}});
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
    const auto table = [&](const OptionalTensor& p, C value) { return p ? Table<C>(*p, walk) : Table<C>(value, walk); };
    const Table<C> centers = table(center, 0), firsts = table(first, 0), widths = table(width, 1);
    const T* from = x.const_data_ptr<T>();
    at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      alignas(64) C in[kBlock];
      alignas(64) int32_t index[kBlock];
      for (int64_t w = begin; w < end; ++w)
        for (int64_t k = w; k < chunks; k += workers) {
          counts[w].reserve(walk.chunk_begin(k + 1) - walk.chunk_begin(k), flushed[w]);
          walk.blocks(walk.chunk_begin(k), walk.chunk_begin(k + 1), [&](const Block& b) {
            const C* v = load<C>(from + b.in[0], walk.stride[0], b.n, in);
            if (!walk.varies) {
              add_run<A>(v, b.n, static_cast<double>(*centers.at(b.channel)), partial[k], b.channel);
              if (bins == 0) return;
              find_bins<C, false>(v, index, b.n, firsts.at(b.channel), widths.at(b.channel), bins);
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

std::tuple<Tensor, Tensor> stats(const Tensor& x, std::optional<int64_t> axis, const OptionalTensor& center,
                                 const OptionalTensor& first, const OptionalTensor& width, int64_t bins, bool powers) {
  const int64_t channels = axis ? x.size(*axis) : 1;
  Tensor moments = at::empty({kMoments, channels}, x.options().dtype(at::kDouble).memory_format(std::nullopt));
  Tensor histogram = at::zeros({channels, bins}, x.options().dtype(at::kLong));
  Moments total(0, channels);
  if (x.numel() > 0) {
    const Tensor order = at::empty_like(x, x.options().device(at::kMeta));
    const Walk walk(order, {&x}, axis);
    const auto run = [&](auto asked) {
      fill<decltype(asked)>(x, walk, center, first, width, bins, total, histogram.mutable_data_ptr<int64_t>());
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
  std::copy_n(total.row(0), kMoments * channels, moments.mutable_data_ptr<double>());
  return {moments, histogram};
}

TORCH_LIBRARY_IMPL(qexp, CPU, m) { m.impl("tensor_stats", &stats); }

}  // namespace
}  // namespace qexp
