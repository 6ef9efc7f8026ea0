// Statistics in one pass on a CUDA device; see reference.py.
#include "../common/elementwise.cuh"

namespace qexp {
namespace {

using Count = unsigned long long;

// zeros, non-finite values; sums of values, squares, cubes, fourth powers, magnitudes; positive values, their sum and
// squares; deviations
constexpr int kSums = 11;
constexpr int kMoments = kSums + 3;  // with the count and the extremes
constexpr int64_t kSharedBins = 8192;  // 32 KiB of counters a block

template <class C>
__device__ __forceinline__ C lower(C a, C b) {
  return b < a || b != b ? b : a;  // NaN if either is
}

struct Lower {
  __device__ __forceinline__ double operator()(double a, double b) const { return lower(a, b); }
};

// A thread keeps one channel. Runs: block x is the channel, and its threads share the run. Columns: threads of a row
// of the block have neighbouring channels. Partial results are [splits][moment][channels]; counts go to shared memory
// where a block has one channel and the bins fit, else straight to the histogram.
template <class T>
__global__ void __launch_bounds__(kThreads)
    stats_kernel(const T* __restrict__ x, Extent extent, DeviceParameter<Compute<T>> center,
                 DeviceParameter<Compute<T>> first, DeviceParameter<Compute<T>> width, int64_t bins, bool powers,
                 bool in_shared, double* __restrict__ partial, Count* __restrict__ histogram) {
  using C = Compute<T>;
  QEXP_DYNAMIC_SHARED(unsigned, counts);
  QEXP_SHARED(double, shared, kThreads);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  if (in_shared)
    for (int64_t b = thread; b < bins; b += kThreads) counts[b] = 0;
  __syncthreads();
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t per_channel = extent.numel / extent.channels;
  const int64_t inner = extent.channels == 1 ? extent.numel : extent.inner;
  double sums[kSums] = {}, smallest = INFINITY, largest = -INFINITY;
  if (channel < extent.channels) {
    const double middle = center[channel];
    const C begin = first[channel], step = width[channel], last = static_cast<C>(bins - 1);
    for (int64_t e = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; e < per_channel;
         e += static_cast<int64_t>(gridDim.y) * blockDim.y) {
      const int64_t i = extent.channels == 1 ? e : (e / inner * extent.channels + channel) * inner + e % inner;
      const C v = static_cast<C>(x[i]);
      const double wide = v;
      const bool finite = fabs(wide) < INFINITY;
      if (powers) {
        const double square = wide * wide, positive = wide < 0 ? 0.0 : wide;
        sums[0] += v == C(0) ? 1.0 : 0.0;
        sums[1] += finite ? 0.0 : 1.0;
        sums[2] += wide;
        sums[3] += square;
        sums[4] += square * wide;
        sums[5] += square * square;
        sums[6] += fabs(wide);
        sums[7] += v > C(0) ? 1.0 : 0.0;
        sums[8] += positive;
        sums[9] += positive * positive;
        smallest = lower(smallest, wide);
        largest = -lower(-largest, -wide);
      }
      sums[10] += fabs(wide - middle);
      if (bins > 0 && finite && v != C(0)) {
        const C at = floor(v / step) - begin;
        if (at == at) {
          const int64_t bin = static_cast<int64_t>(at > C(0) ? (at < last ? at : last) : C(0));
          if (in_shared)
            atomicAdd(counts + bin, 1u);
          else
            atomicAdd(histogram + channel * bins + bin, Count{1});
        }
      }
    }
  }
  double results[kSums + 2];
  for (int s = 0; s < kSums; ++s) results[s] = reduce_over_y(sums[s], shared, Plus{});
  results[kSums] = reduce_over_y(smallest, shared, Lower{});
  results[kSums + 1] = reduce_over_y(-largest, shared, Lower{});
  if (threadIdx.y == 0 && channel < extent.channels)
    for (int s = 0; s < kSums + 2; ++s)
      partial[(static_cast<int64_t>(blockIdx.y) * (kSums + 2) + s) * extent.channels + channel] = results[s];
  if (in_shared)
    for (int64_t b = thread; b < bins; b += kThreads)
      if (counts[b]) atomicAdd(histogram + blockIdx.x * bins + b, Count{counts[b]});
}

// Block (channel, moment) brings together the partial results of all splits, in an order that is always the same.
__global__ void __launch_bounds__(kThreads) finish_stats(const double* __restrict__ partial, int64_t splits,
                                                         int64_t channels, double count, double* __restrict__ moments) {
  QEXP_SHARED(double, shared, kThreads);
  const int moment = blockIdx.y;
  const bool extreme = moment == 3 || moment == 4;
  const int place = extreme ? kSums + moment - 3 : moment < 3 ? moment - 1 : moment - 3;
  double value = extreme ? INFINITY : 0.0;
  for (int64_t k = threadIdx.y; moment > 0 && k < splits; k += kThreads) {
    const double part = partial[(k * (kSums + 2) + place) * channels + blockIdx.x];
    value = extreme ? lower(value, part) : value + part;
  }
  value = extreme ? reduce_over_y(value, shared, Lower{}) : reduce_over_y(value, shared, Plus{});
  if (threadIdx.y == 0) moments[moment * channels + blockIdx.x] = moment == 0 ? count : moment == 4 ? -value : value;
}

std::tuple<Tensor, Tensor> stats(const Tensor& given, Axis axis, const OptionalTensor& center,
                                 const OptionalTensor& first, const OptionalTensor& width, int64_t bins, bool powers) {
  const Tensor x = is_dense(given) ? given : laid_out_as(given, empty_as(given));
  const int64_t channels = axis ? x.size(*axis) : 1;
  Tensor moments = empty_of({kMoments, channels}, ScalarType::Double, x);
  Tensor histogram = torch::stable::new_zeros(x, {channels, bins}, ScalarType::Long);
  if (channels == 0) return {moments, histogram};
  const Extent extent(x, axis);
  const int64_t per_channel = extent.numel / extent.channels;
  const bool columns = extent.channels > 1 && extent.inner == 1;
  unsigned wide = 1;
  while (columns && wide < 32 && wide < extent.channels) wide *= 2;
  const dim3 threads(wide, kThreads / wide);
  const int64_t across = up(extent.channels, wide);
  const int64_t splits = extent.numel == 0 ? 0 : std::clamp<int64_t>(kMaxBlocks / across, 1, up(per_channel, threads.y));
  const bool in_shared = wide == 1 && bins > 0 && bins <= kSharedBins;
  Tensor partial = empty_of({splits, kSums + 2, extent.channels}, ScalarType::Double, x);
  if (splits > 0)
    with_type(x, [&](auto tag) {
      using T = decltype(tag);
      using C = Compute<T>;
      const Held<C> middle(Parameter(center, 0.0)), begin(Parameter(first, 0.0)), step(Parameter(width, 1.0));
      launch(stats_kernel<T>, dim3(across, splits), threads, in_shared ? bins * sizeof(unsigned) : 0, x, data<T>(x),
             extent, middle.view(), begin.view(), step.view(), bins, powers, in_shared, writable<double>(partial),
             reinterpret_cast<Count*>(writable<int64_t>(histogram)));
    });
  launch(finish_stats, dim3(channels, kMoments), dim3(1, kThreads), 0, x, data<double>(partial), splits,
         extent.channels, static_cast<double>(per_channel), writable<double>(moments));
  return {moments, histogram};
}

QEXP_LIBRARY_IMPL(m) { m.impl("tensor_stats", TORCH_BOX(&stats)); }

}  // namespace
}  // namespace qexp
