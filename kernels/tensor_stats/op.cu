// Statistics in one pass on a CUDA device; see reference.py.
#include <ATen/ops/amax.h>
#include <ATen/ops/amin.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../common/elementwise.cuh"

namespace qexp {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
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

// Reduces over the threads of a block with a binary function; thread 0 of each x gets the result.
template <class F>
__device__ double reduce_over_y(double value, double* shared, F f) {
  shared[threadIdx.y * blockDim.x + threadIdx.x] = value;
  __syncthreads();
  for (int half = blockDim.y / 2; half > 0; half /= 2) {
    if (threadIdx.y < half) {
      double& mine = shared[threadIdx.y * blockDim.x + threadIdx.x];
      mine = f(mine, shared[(threadIdx.y + half) * blockDim.x + threadIdx.x]);
    }
    __syncthreads();
  }
  const double result = shared[threadIdx.x];
  __syncthreads();
  return result;
}

// A thread keeps one channel. Runs: block x is the channel, and its threads share the run. Columns: threads of a row
// of the block have neighbouring channels. Partial results are [splits][moment][channels]; counts go to shared memory
// where a block has one channel and the bins fit, else straight to the histogram.
template <class T>
__global__ void __launch_bounds__(kThreads)
    stats_kernel(const T* __restrict__ x, Extent extent, DeviceParameter<Compute<T>> center,
                 DeviceParameter<Compute<T>> first, DeviceParameter<Compute<T>> width, int64_t bins, bool powers,
                 bool in_shared, double* __restrict__ partial, Count* __restrict__ histogram) {
  using C = Compute<T>;
  extern __shared__ unsigned counts[];
  __shared__ double shared[kThreads];
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
  const auto add = [](double a, double b) { return a + b; };
  const auto low_of = [](double a, double b) { return lower(a, b); };
  double results[kSums + 2];
  for (int s = 0; s < kSums; ++s) results[s] = reduce_over_y(sums[s], shared, add);
  results[kSums] = reduce_over_y(smallest, shared, low_of);
  results[kSums + 1] = -reduce_over_y(-largest, shared, low_of);
  if (threadIdx.y == 0 && channel < extent.channels)
    for (int s = 0; s < kSums + 2; ++s)
      partial[(static_cast<int64_t>(blockIdx.y) * (kSums + 2) + s) * extent.channels + channel] = results[s];
  if (in_shared)
    for (int64_t b = thread; b < bins; b += kThreads)
      if (counts[b]) atomicAdd(histogram + blockIdx.x * bins + b, Count{counts[b]});
}

std::tuple<Tensor, Tensor> stats(const Tensor& given, std::optional<int64_t> axis, const OptionalTensor& center,
                                 const OptionalTensor& first, const OptionalTensor& width, int64_t bins, bool powers) {
  const c10::cuda::CUDAGuard guard(given.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Tensor x = given.is_non_overlapping_and_dense() ? given : at::empty_like(given).copy_(given);
  const int64_t channels = axis ? x.size(*axis) : 1;
  const auto doubles = x.options().dtype(at::kDouble).memory_format(std::nullopt);
  Tensor moments = at::zeros({kMoments, channels}, doubles), histogram = at::zeros({channels, bins}, doubles.dtype(at::kLong));
  moments.select(0, 3).fill_(INFINITY);
  moments.select(0, 4).fill_(-INFINITY);
  if (x.numel() == 0) return {moments, histogram};
  const Extent extent(x, axis);
  const int64_t per_channel = extent.numel / extent.channels;
  const bool columns = extent.channels > 1 && extent.inner == 1;
  unsigned wide = 1;
  while (columns && wide < 32 && wide < extent.channels) wide *= 2;
  const dim3 threads(wide, kThreads / wide);
  const int64_t across = (extent.channels + wide - 1) / wide;
  const int64_t splits = std::clamp<int64_t>(kMaxBlocks / across, 1, (per_channel + threads.y - 1) / threads.y);
  const bool in_shared = wide == 1 && bins > 0 && bins <= kSharedBins;
  Tensor partial = at::empty({splits, kSums + 2, extent.channels}, doubles);
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    const Held<C> middle(Parameter(center, 0.0)), begin(Parameter(first, 0.0)), step(Parameter(width, 1.0));
    stats_kernel<T><<<dim3(across, splits), threads, in_shared ? bins * sizeof(unsigned) : 0, stream>>>(
        x.const_data_ptr<T>(), extent, middle.view(), begin.view(), step.view(), bins, powers, in_shared,
        partial.mutable_data_ptr<double>(), reinterpret_cast<Count*>(histogram.mutable_data_ptr<int64_t>()));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  const Tensor sums = at::sum(partial.narrow(1, 0, kSums), 0);
  moments.select(0, 0).fill_(static_cast<double>(per_channel));
  moments.narrow(0, 1, 2).copy_(sums.narrow(0, 0, 2));
  moments.select(0, 3).copy_(at::amin(partial.select(1, kSums), 0));
  moments.select(0, 4).copy_(at::amax(partial.select(1, kSums + 1), 0));
  moments.narrow(0, 5, kSums - 2).copy_(sums.narrow(0, 2, kSums - 2));
  return {moments, histogram};
}

TORCH_LIBRARY_IMPL(qexp, CUDA, m) { m.impl("tensor_stats", &stats); }

}  // namespace
}  // namespace qexp
