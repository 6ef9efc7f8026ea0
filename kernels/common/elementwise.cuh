// Elementwise CUDA kernels over dense tensors in memory order: 16-byte accesses, grid-stride loops, 64-bit indices.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "numbers.h"
#include "rounding.h"
#include "uniform.h"

namespace qexp {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 132 * 16;  // enough to fill the largest device a few times over

// A dense tensor in memory order is [outer][channels][inner].
struct Extent {
  int64_t numel, channels, inner;

  Extent(const at::Tensor& t, std::optional<int64_t> axis) : numel(t.numel()), channels(1), inner(1) {
    if (axis && t.size(*axis) > 1) {
      channels = t.size(*axis);
      inner = t.stride(*axis);
    }
  }
  // 32-bit division is several times faster than 64-bit division, and nearly every tensor allows it.
  __device__ __forceinline__ int64_t channel(int64_t i) const {
    if (channels == 1) return 0;
    if (numel <= INT32_MAX)
      return static_cast<uint32_t>(i) / static_cast<uint32_t>(inner) % static_cast<uint32_t>(channels);
    return i / inner % channels;
  }
};

// A parameter on the device: one element, one a channel, or a number.
template <class C>
struct DeviceParameter {
  const C* data;
  int64_t step;
  C fallback;
  __device__ __forceinline__ C operator[](int64_t channel) const { return data ? data[channel * step] : fallback; }
};

// Keeps what `DeviceParameter` points to alive.
template <class C>
class Held {
 public:
  explicit Held(const Parameter& p) : fallback_(static_cast<C>(p.fallback)) {
    if (p.tensor) tensor_ = p.tensor->detach().to(c10::CppTypeToScalarType<C>::value).contiguous();
  }
  DeviceParameter<C> view() const {
    if (!tensor_.defined()) return {nullptr, 0, fallback_};
    return {tensor_.template const_data_ptr<C>(), tensor_.numel() == 1 ? 0 : 1, fallback_};
  }

 private:
  at::Tensor tensor_;
  C fallback_;
};

template <class C>
__device__ __forceinline__ C round_any(Rounding mode, C v, C noise) {
  switch (mode) {
    case Rounding::half_even: return round_to<Rounding::half_even>(v, noise);
    case Rounding::half_up: return round_to<Rounding::half_up>(v, noise);
    case Rounding::half_away: return round_to<Rounding::half_away>(v, noise);
    case Rounding::floor: return round_to<Rounding::floor>(v, noise);
    case Rounding::trunc: return round_to<Rounding::trunc>(v, noise);
    default: return round_to<Rounding::stochastic>(v, noise);
  }
}

template <class T, int N>
struct alignas(sizeof(T) * N) Packet {
  T v[N];
};

// Returns `t` laid out in memory as `model` is, copied only where it is not.
inline at::Tensor laid_out_as(const at::Tensor& t, const at::Tensor& model) {
  if (t.strides() == model.strides()) return t;
  return at::empty_like(model, model.options().dtype(t.scalar_type())).copy_(t);
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

inline int blocks_for(int64_t items) {
  return static_cast<int>(std::clamp<int64_t>((items + kThreads - 1) / kThreads, 1, kMaxBlocks));
}

// out[i] = f(x[i], channel, i); N elements a thread and step.
template <int N, class T, class O, class F>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const T* __restrict__ x, O* __restrict__ out, Extent extent, F f) {
  using C = Compute<T>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x * N;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N; i < extent.numel; i += stride) {
    if (N > 1 && i + N <= extent.numel) {
      const auto in = *reinterpret_cast<const Packet<T, N>*>(x + i);
      Packet<O, N> result;
#pragma unroll
      for (int k = 0; k < N; ++k)
        result.v[k] = static_cast<O>(f(static_cast<C>(in.v[k]), extent.channel(i + k), i + k));
      *reinterpret_cast<Packet<O, N>*>(out + i) = result;
    } else {
      for (int64_t k = i; k < i + N && k < extent.numel; ++k)
        out[k] = static_cast<O>(f(static_cast<C>(x[k]), extent.channel(k), k));
    }
  }
}

template <class T, class O, class F>
void launch_forward(const at::Tensor& x, at::Tensor& out, const Extent& extent, F f) {
  if (extent.numel == 0) return;
  const c10::cuda::CUDAGuard guard(x.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const T* from = x.const_data_ptr<T>();
  O* to = out.mutable_data_ptr<O>();
  constexpr int N = 16 / std::max(sizeof(T), sizeof(O));
  if (aligned(from) && aligned(to)) {
    forward_kernel<N><<<blocks_for((extent.numel + N - 1) / N), kThreads, 0, stream>>>(from, to, extent, f);
  } else {
    forward_kernel<1><<<blocks_for(extent.numel), kThreads, 0, stream>>>(from, to, extent, f);
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// Sums `value` over the threads of a block that have the same threadIdx.x; the threads with threadIdx.y = 0 hold it.
__device__ __forceinline__ double sum_over_y(double value, double* shared) {
  shared[threadIdx.y * blockDim.x + threadIdx.x] = value;
  __syncthreads();
  for (int half = blockDim.y / 2; half > 0; half /= 2) {
    if (threadIdx.y < half)
      shared[threadIdx.y * blockDim.x + threadIdx.x] += shared[(threadIdx.y + half) * blockDim.x + threadIdx.x];
    __syncthreads();
  }
  const double total = shared[threadIdx.x];
  __syncthreads();
  return total;
}

// Channels are contiguous runs (or there is one): block (channel, split) takes every gridDim.y-th packet of a channel.
// f(x, g, channel, dx, terms) gives the gradient of x and S terms to be summed; partial is [gridDim.y][S][channels].
template <int N, int S, class T, class F>
__global__ void __launch_bounds__(kThreads) backward_runs(const T* __restrict__ x, const T* __restrict__ g,
                                                          T* __restrict__ dx, double* __restrict__ partial,
                                                          Extent extent, F f) {
  using C = Compute<T>;
  __shared__ double shared[kThreads];
  const int64_t channel = blockIdx.x, per_channel = extent.numel / extent.channels;
  const int64_t inner = extent.channels == 1 ? extent.numel : extent.inner;
  double sums[S > 0 ? S : 1] = {};
  const int64_t stride = static_cast<int64_t>(gridDim.y) * kThreads * N;
  for (int64_t e = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.y) * N; e < per_channel; e += stride) {
    const int64_t i = extent.channels == 1 ? e : (e / inner * extent.channels + channel) * inner + e % inner;
    const int64_t count = min(static_cast<int64_t>(N), per_channel - e);
    Packet<T, N> in, gradient, result;
    if (count == N) {
      in = *reinterpret_cast<const Packet<T, N>*>(x + i);
      gradient = *reinterpret_cast<const Packet<T, N>*>(g + i);
    } else {
      for (int k = 0; k < count; ++k) in.v[k] = x[i + k], gradient.v[k] = g[i + k];
    }
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (k >= count) break;
      C d, terms[S > 0 ? S : 1];
      f(static_cast<C>(in.v[k]), static_cast<C>(gradient.v[k]), channel, d, terms);
      result.v[k] = static_cast<T>(d);
      for (int s = 0; s < S; ++s) sums[s] += terms[s];
    }
    if (count == N) {
      *reinterpret_cast<Packet<T, N>*>(dx + i) = result;
    } else {
      for (int k = 0; k < count; ++k) dx[i + k] = result.v[k];
    }
  }
  for (int s = 0; s < S; ++s) {
    const double total = sum_over_y(sums[s], shared);
    if (threadIdx.y == 0) partial[(blockIdx.y * S + s) * extent.channels + channel] = total;
  }
}

// Channels are innermost: a thread keeps one channel and walks down the rows.
template <int S, class T, class F>
__global__ void __launch_bounds__(kThreads) backward_columns(const T* __restrict__ x, const T* __restrict__ g,
                                                             T* __restrict__ dx, double* __restrict__ partial,
                                                             Extent extent, F f) {
  using C = Compute<T>;
  __shared__ double shared[kThreads];
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t rows = extent.numel / extent.channels;
  double sums[S > 0 ? S : 1] = {};
  if (channel < extent.channels) {
    for (int64_t r = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; r < rows;
         r += static_cast<int64_t>(gridDim.y) * blockDim.y) {
      const int64_t i = r * extent.channels + channel;
      C d, terms[S > 0 ? S : 1];
      f(static_cast<C>(x[i]), static_cast<C>(g[i]), channel, d, terms);
      dx[i] = static_cast<T>(d);
      for (int s = 0; s < S; ++s) sums[s] += terms[s];
    }
  }
  for (int s = 0; s < S; ++s) {
    const double total = sum_over_y(sums[s], shared);
    if (threadIdx.y == 0 && channel < extent.channels)
      partial[(blockIdx.y * S + s) * extent.channels + channel] = total;
  }
}

// Runs f over x and grad into dx and returns the sums [S][channels] in float64. No atomics: the result is repeatable.
template <class T, int S, class F>
at::Tensor launch_backward(const at::Tensor& x, const at::Tensor& grad, at::Tensor& dx, const Extent& extent, F f) {
  const c10::cuda::CUDAGuard guard(x.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto options = x.options().dtype(at::kDouble).memory_format(std::nullopt);
  if (extent.numel == 0) return at::empty({S, extent.channels}, options).zero_();
  const T *from = x.const_data_ptr<T>(), *gradient = grad.const_data_ptr<T>();
  T* to = dx.mutable_data_ptr<T>();
  constexpr int N = 16 / sizeof(T);
  const int64_t per_channel = extent.numel / extent.channels;
  if (extent.channels > 1 && extent.inner == 1) {
    unsigned wide = 1;
    while (wide < 32 && wide < extent.channels) wide *= 2;
    const dim3 threads(wide, kThreads / wide);
    const int64_t across = (extent.channels + wide - 1) / wide;
    const int64_t splits = std::clamp<int64_t>(kMaxBlocks / across, 1, (per_channel + threads.y - 1) / threads.y);
    at::Tensor partial = at::empty({splits, S, extent.channels}, options);
    backward_columns<S><<<dim3(across, splits), threads, 0, stream>>>(from, gradient, to,
                                                                      partial.mutable_data_ptr<double>(), extent, f);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return at::sum(partial, 0);
  }
  const bool packed = aligned(from) && aligned(gradient) && aligned(to) &&
                      (extent.channels == 1 || extent.inner % N == 0);
  const int64_t items = packed ? (per_channel + N - 1) / N : per_channel;
  const int64_t splits = std::clamp<int64_t>(kMaxBlocks / extent.channels, 1, (items + kThreads - 1) / kThreads);
  at::Tensor partial = at::empty({splits, S, extent.channels}, options);
  const dim3 blocks(extent.channels, splits), threads(1, kThreads);
  double* sums = partial.mutable_data_ptr<double>();
  if (packed) {
    backward_runs<N, S><<<blocks, threads, 0, stream>>>(from, gradient, to, sums, extent, f);
  } else {
    backward_runs<1, S><<<blocks, threads, 0, stream>>>(from, gradient, to, sums, extent, f);
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return at::sum(partial, 0);
}

// Returns row `row` of the sums, times a factor, shaped and typed like the parameter they are the gradient of.
inline at::Tensor device_gradient_like(const at::Tensor& parameter, const at::Tensor& sums, int64_t row, double factor) {
  at::Tensor total = sums.select(0, row).mul(factor);
  if (parameter.numel() == 1) total = at::sum(total);
  return total.reshape(parameter.sizes()).to(parameter.scalar_type());
}

}  // namespace qexp
