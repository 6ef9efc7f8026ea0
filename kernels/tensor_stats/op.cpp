// Statistics in one pass on the CPU; see reference.py.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "../common/numbers.h"
#include "../common/walk.h"

namespace qexp {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

enum Moment { kCount, kZeros, kNonfinite, kMinimum, kMaximum, kSum, kSquares, kDeviation, kMoments };

// The sums of one chunk, [moments][channels].
class Moments {
 public:
  explicit Moments(int64_t channels) : channels_(channels), data_(kMoments * channels, 0.0) {
    std::fill_n(row(kMinimum), channels, INFINITY);
    std::fill_n(row(kMaximum), channels, -INFINITY);
  }
  double* row(int m) { return data_.data() + m * channels_; }

  void merge(Moments& other) {
    for (int64_t c = 0; c < channels_; ++c) {
      for (int m : {kCount, kZeros, kNonfinite, kSum, kSquares, kDeviation}) row(m)[c] += other.row(m)[c];
      row(kMinimum)[c] = lower(row(kMinimum)[c], other.row(kMinimum)[c]);
      row(kMaximum)[c] = -lower(-row(kMaximum)[c], -other.row(kMaximum)[c]);
    }
  }
  // The smaller; NaN if either is.
  static double lower(double a, double b) { return b < a || b != b ? b : a; }

 private:
  int64_t channels_;
  std::vector<double> data_;
};

// Elements of one channel.
template <class C>
void add_run(const C* __restrict x, int64_t n, double center, Moments& m, int64_t c) {
  double sum = 0, squares = 0, deviation = 0;
  C low = INFINITY, high = -INFINITY;
  int32_t zeros = 0, nonfinite = 0, nans = 0;
#pragma omp simd reduction(+ : sum, squares, deviation, zeros, nonfinite, nans) reduction(min : low) reduction(max : high)
  for (int64_t i = 0; i < n; ++i) {
    const C v = x[i];
    const double wide = v;
    sum += wide;
    squares += wide * wide;
    deviation += std::fabs(wide - center);
    zeros += v == C(0);
    nonfinite += !(std::fabs(v) < C(INFINITY));
    nans += v != v;
    low = v < low ? v : low;
    high = v > high ? v : high;
  }
  m.row(kCount)[c] += n;
  m.row(kZeros)[c] += zeros;
  m.row(kNonfinite)[c] += nonfinite;
  m.row(kSum)[c] += sum;
  m.row(kSquares)[c] += squares;
  m.row(kDeviation)[c] += deviation;
  m.row(kMinimum)[c] = Moments::lower(m.row(kMinimum)[c], nans ? NAN : static_cast<double>(low));
  m.row(kMaximum)[c] = -Moments::lower(-m.row(kMaximum)[c], nans ? NAN : -static_cast<double>(high));
}

// Elements of n consecutive channels from c on.
template <class C>
void add_across(const C* __restrict x, int64_t n, const C* __restrict center, Moments& m, int64_t c) {
  double *__restrict sum = m.row(kSum) + c, *__restrict squares = m.row(kSquares) + c,
         *__restrict deviation = m.row(kDeviation) + c, *__restrict low = m.row(kMinimum) + c,
         *__restrict high = m.row(kMaximum) + c, *__restrict count = m.row(kCount) + c,
         *__restrict zeros = m.row(kZeros) + c, *__restrict nonfinite = m.row(kNonfinite) + c;
  for (int64_t i = 0; i < n; ++i) {
    const double v = x[i];
    sum[i] += v;
    squares[i] += v * v;
    deviation[i] += std::fabs(v - center[i]);
    count[i] += 1.0;
    zeros[i] += v == 0.0 ? 1.0 : 0.0;
    nonfinite[i] += std::fabs(v) < INFINITY ? 0.0 : 1.0;
    low[i] = v < low[i] || v != v ? v : low[i];
    high[i] = v > high[i] || v != v ? v : high[i];
  }
}

// Bins of n elements; what is not counted gets the spare bin `bins`.
template <class C, bool V>
void find_bins(const C* __restrict x, int32_t* __restrict index, int64_t n, const C* __restrict low,
               const C* __restrict width, int64_t bins) {
  const C last = static_cast<C>(bins - 1);
  for (int64_t i = 0; i < n; ++i) {
    const C at = std::floor((x[i] - low[V ? i : 0]) / width[V ? i : 0]);
    const bool counted = x[i] != C(0) && std::fabs(x[i]) < C(INFINITY) && at == at;
    const C inside = at > C(0) ? (at < last ? at : last) : C(0);
    index[i] = counted ? static_cast<int32_t>(inside) : static_cast<int32_t>(bins);
  }
}

// Counts kept by one worker. Neighbours go to different copies: two equal bins in a row need not wait for each other.
class Counts {
 public:
  Counts(int64_t channels, int64_t bins)
      : copies_(channels == 1 ? 4 : 1), stride_(bins + 1), data_(bins > 0 ? copies_ * channels * stride_ : 0, 0) {}
  int64_t* row(int64_t channel, int copy) { return data_.data() + (channel * copies_ + copy) * stride_; }
  int copies() const { return copies_; }

  void add_run(const int32_t* index, int64_t n, int64_t channel) {
    int64_t* rows[4];
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
    for (int64_t i = 0; i < n; ++i) ++row(channel + i, 0)[index[i]];
  }

 private:
  int copies_;
  int64_t stride_;
  std::vector<int64_t> data_;
};

std::tuple<Tensor, Tensor> stats(const Tensor& x, std::optional<int64_t> axis, const OptionalTensor& center,
                                 const OptionalTensor& low, const OptionalTensor& width, int64_t bins) {
  const int64_t channels = axis ? x.size(*axis) : 1;
  Tensor moments = at::empty({kMoments, channels}, x.options().dtype(at::kDouble).memory_format(std::nullopt));
  Tensor histogram = at::zeros({channels, bins}, x.options().dtype(at::kLong));
  Moments total(channels);
  if (x.numel() > 0) {
    const Tensor order = at::empty_like(x, x.options().device(at::kMeta));
    const Walk walk(order, {&x}, axis);
    const int64_t chunks = walk.chunks(), room = (int64_t{1} << 22) / std::max<int64_t>(1, channels * bins);
    const int64_t workers = std::min({chunks, std::max<int64_t>(1, room), int64_t{at::get_num_threads()}});
    std::vector<Moments> partial(chunks, Moments(channels));
    std::vector<Counts> counts(workers, Counts(channels, bins));
    with_type(x, [&](auto tag) {
      using T = decltype(tag);
      using C = Compute<T>;
      const Table<C> centers = center ? Table<C>(*center, walk) : Table<C>(C(0), walk);
      const Table<C> lows = low ? Table<C>(*low, walk) : Table<C>(C(0), walk);
      const Table<C> widths = width ? Table<C>(*width, walk) : Table<C>(C(1), walk);
      const T* from = x.const_data_ptr<T>();
      at::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
        alignas(64) C in[kBlock];
        alignas(64) int32_t index[kBlock];
        for (int64_t w = first; w < last; ++w)
          for (int64_t k = w; k < chunks; k += workers)
            walk.blocks(walk.chunk_begin(k), walk.chunk_begin(k + 1), [&](const Block& b) {
              const C* v = load<C>(from + b.in[0], walk.stride[0], b.n, in);
              if (!walk.varies) {
                add_run(v, b.n, static_cast<double>(*centers.at(b.channel)), partial[k], b.channel);
                if (bins == 0) return;
                find_bins<C, false>(v, index, b.n, lows.at(b.channel), widths.at(b.channel), bins);
                counts[w].add_run(index, b.n, b.channel);
                return;
              }
              if (bins) find_bins<C, true>(v, index, b.n, lows.at(b.channel), widths.at(b.channel), bins);
              for (int64_t i = 0, c = b.channel; i < b.n; c = 0) {
                const int64_t n = std::min(b.n - i, walk.channels - c);
                add_across(v + i, n, centers.at(c), partial[k], c);
                if (bins) counts[w].add_across(index + i, n, c);
                i += n;
              }
            });
      });
    });
    for (auto& p : partial) total.merge(p);
    int64_t* to = histogram.mutable_data_ptr<int64_t>();
    for (auto& worker : counts)
      for (int64_t c = 0; c < channels; ++c)
        for (int k = 0; k < worker.copies(); ++k)
          for (int64_t i = 0; i < bins; ++i) to[c * bins + i] += worker.row(c, k)[i];
  }
  std::copy_n(total.row(0), kMoments * channels, moments.mutable_data_ptr<double>());
  return {moments, histogram};
}

TORCH_LIBRARY_IMPL(qexp, CPU, m) { m.impl("tensor_stats", &stats); }

}  // namespace
}  // namespace qexp
