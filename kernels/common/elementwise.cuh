// Elementwise CUDA kernels over dense tensors in memory order: 16-byte accesses, grid-stride loops, 64-bit indices.
#pragma once

#include "device.cuh"

namespace qexp {

// A dense tensor in memory order is [outer][channels][inner].
struct Extent {
  int64_t numel, channels, inner;

  Extent(const Tensor& t, Axis axis) : numel(t.numel()), channels(1), inner(1) {
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

// A parameter on the device: one element, one per channel, or a number.
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
  explicit Held(const Parameter& p) : fallback_(static_cast<C>(p.fallback)), row_(p.row), numel_(p.numel()) {
    if (!p.tensor) return;
    Tensor t = p.magnitude ? call("aten::abs", "", *p.tensor) : *p.tensor;
    if (p.divisor != 1)  // by a tensor, which is exact: torch would multiply by the reciprocal of a number
      t = call("aten::div", "Tensor", t, torch::stable::full({1}, p.divisor, t.scalar_type(), std::nullopt, t.device()));
    tensor_ = torch::stable::contiguous(torch::stable::to(t, scalar_type_of<C>));
  }
  DeviceParameter<C> view() const {
    if (!tensor_) return {nullptr, 0, fallback_};
    return {data<C>(*tensor_) + row_ * numel_, numel_ == 1 ? 0 : 1, fallback_};
  }

 private:
  OptionalTensor tensor_;
  C fallback_;
  int64_t row_, numel_;
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
inline Tensor laid_out_as(const Tensor& t, const Tensor& model) {
  bool same = true;
  for (int64_t d = 0; d < t.dim(); ++d) same &= t.stride(d) == model.stride(d);
  if (same) return t;
  Tensor copy = empty_as(model, t.scalar_type());
  return torch::stable::copy_(copy, t);
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

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
void launch_forward(const Tensor& x, Tensor& out, const Extent& extent, F f) {
  if (extent.numel == 0) return;
  const T* from = data<T>(x);
  O* to = writable<O>(out);
  constexpr int N = 16 / std::max(sizeof(T), sizeof(O));
  if (aligned(from) && aligned(to)) {
    launch(forward_kernel<N, T, O, F>, blocks_for(up(extent.numel, N)), kThreads, 0, x, from, to, extent, f);
  } else {
    launch(forward_kernel<1, T, O, F>, blocks_for(extent.numel), kThreads, 0, x, from, to, extent, f);
  }
}

// Channels are contiguous runs (or there is one): block (channel, split) takes every gridDim.y-th packet of a channel.
// f(x, g, channel, dx, terms) gives the gradient of x and S terms to be summed; partial is [gridDim.y][S][channels].
template <int N, int S, class T, class F>
__global__ void __launch_bounds__(kThreads) backward_runs(const T* __restrict__ x, const T* __restrict__ g,
                                                          T* __restrict__ dx, double* __restrict__ partial,
                                                          Extent extent, F f) {
  using C = Compute<T>;
  QEXP_SHARED(double, shared, kThreads);
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
    const double total = reduce_over_y(sums[s], shared, Plus{});
    if (threadIdx.y == 0) partial[(blockIdx.y * S + s) * extent.channels + channel] = total;
  }
}

// Channels are innermost: a thread keeps one channel and walks down the rows.
template <int S, class T, class F>
__global__ void __launch_bounds__(kThreads) backward_columns(const T* __restrict__ x, const T* __restrict__ g,
                                                             T* __restrict__ dx, double* __restrict__ partial,
                                                             Extent extent, F f) {
  using C = Compute<T>;
  QEXP_SHARED(double, shared, kThreads);
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
    const double total = reduce_over_y(sums[s], shared, Plus{});
    if (threadIdx.y == 0 && channel < extent.channels)
      partial[(blockIdx.y * S + s) * extent.channels + channel] = total;
  }
}

// Partial sums [splits][S][channels] in float64; nobody's order of arrival changes what they add up to.
struct Sums {
  Tensor partial;
  int64_t splits, count, channels;
};

// Runs f over x and grad into dx and returns the sums of its terms.
template <class T, int S, class F>
Sums launch_backward(const Tensor& x, const Tensor& grad, Tensor& dx, const Extent& extent, F f) {
  const auto room = [&](int64_t splits) {
    return Sums{empty_of({splits, S, extent.channels}, ScalarType::Double, x), splits, S, extent.channels};
  };
  if (extent.numel == 0) return room(0);
  const T *from = data<T>(x), *gradient = data<T>(grad);
  T* to = writable<T>(dx);
  constexpr int N = 16 / sizeof(T);
  const int64_t per_channel = extent.numel / extent.channels;
  if (extent.channels > 1 && extent.inner == 1) {
    unsigned wide = 1;
    while (wide < 32 && wide < extent.channels) wide *= 2;
    const dim3 threads(wide, kThreads / wide);
    const int64_t across = up(extent.channels, wide);
    Sums sums = room(std::clamp<int64_t>(kMaxBlocks / across, 1, up(per_channel, threads.y)));
    launch(backward_columns<S, T, F>, dim3(across, sums.splits), threads, 0, x, from, gradient, to,
           writable<double>(sums.partial), extent, f);
    return sums;
  }
  const bool packed = aligned(from) && aligned(gradient) && aligned(to) &&
                      (extent.channels == 1 || extent.inner % N == 0);
  const int64_t items = packed ? up(per_channel, N) : per_channel;
  Sums sums = room(std::clamp<int64_t>(kMaxBlocks / extent.channels, 1, up(items, kThreads)));
  launch(packed ? backward_runs<N, S, T, F> : backward_runs<1, S, T, F>, dim3(extent.channels, sums.splits),
         dim3(1, kThreads), 0, x, from, gradient, to, writable<double>(sums.partial), extent, f);
  return sums;
}

// Returns the sum `row`, times a factor (and the signs of the parameter, if asked), shaped and typed like the parameter it is the
// gradient of.
inline Tensor device_gradient_like(const Tensor& parameter, const Sums& sums, int64_t row, double factor,
                                   bool signs = false) {
  Tensor out = empty_of(Ints(parameter.sizes().begin(), parameter.sizes().end()), parameter.scalar_type(), parameter);
  if (out.numel() == 0) return out;
  const Tensor given = torch::stable::contiguous(parameter);
  with_type(out, [&](auto tag) {
    using T = decltype(tag);
    launch(finish_sums<T>, dim3(out.numel()), dim3(1, kThreads), 0, out, data<double>(sums.partial), sums.splits,
           sums.count, row, sums.channels, factor, 1.0, signs ? data<T>(given) : nullptr, writable<T>(out));
  });
  return out;
}

}  // namespace qexp
