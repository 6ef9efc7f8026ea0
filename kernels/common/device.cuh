// What kernels are written with on a CUDA device. The tests run the same sources on the CPU: tests/kernels/emulation.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "numbers.h"
#include "rounding.h"
#include "uniform.h"

#ifdef QEXP_EMULATION
#include "emulate.h"
#else
#include <cuda_runtime.h>

#define QEXP_DEVICE CUDA
#define QEXP_MAX_BLOCKS (132 * 16)
#define QEXP_SHARED(type, name, size) __shared__ type name[size]
#define QEXP_DYNAMIC_SHARED(type, name) extern __shared__ type name[]

namespace qexp {

// Starts a kernel on the device of a tensor, on torch's stream there.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 blocks, dim3 threads, size_t shared_bytes, const Tensor& where, A... arguments) {
  const int32_t index = where.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(static_cast<P>(arguments)...);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
}

}  // namespace qexp
#endif

// Inside namespace qexp: what registers the implementations of this file.
#define QEXP_LIBRARY_IMPL(m) QEXP_LIBRARY_IMPL_FOR(QEXP_DEVICE, m)
#define QEXP_LIBRARY_IMPL_FOR(device, m) STABLE_TORCH_LIBRARY_IMPL(qexp, device, m)

namespace qexp {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = QEXP_MAX_BLOCKS;  // enough to fill the largest device a few times over

inline int64_t up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

inline unsigned blocks_for(int64_t items) {
  return static_cast<unsigned>(std::clamp<int64_t>(up(items, kThreads), 1, kMaxBlocks));
}

// Reduces over the threads of a block that have the same threadIdx.x, in an order that is always the same; the threads with
// threadIdx.y = 0 get the result. `shared` has room for one value a thread.
template <class V, class S, class F>
__device__ __forceinline__ V reduce_over_y(V value, S shared, F f) {
  shared[threadIdx.y * blockDim.x + threadIdx.x] = value;
  __syncthreads();
  for (unsigned half = blockDim.y / 2; half > 0; half /= 2) {
    if (threadIdx.y < half) {
      const V mine = shared[threadIdx.y * blockDim.x + threadIdx.x];
      const V other = shared[(threadIdx.y + half) * blockDim.x + threadIdx.x];
      shared[threadIdx.y * blockDim.x + threadIdx.x] = f(mine, other);
    }
    __syncthreads();
  }
  const V result = shared[threadIdx.x];
  __syncthreads();
  return result;
}

struct Plus {
  __device__ __forceinline__ double operator()(double a, double b) const { return a + b; }
};

// Adds up partial sums [splits][S][channels]: block e computes the sum `row` of channel e, or, where there is one block, of all
// channels; times `factor`, divided by `divisor`, and times the sign of signs[e] where there are signs.
template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_sums(const double* __restrict__ partial, int64_t splits, int64_t S, int64_t row, int64_t channels,
                double factor, double divisor, const T* __restrict__ signs, T* __restrict__ out) {
  QEXP_SHARED(double, shared, kThreads);
  const int64_t span = gridDim.x == 1 ? channels : 1;
  double total = 0;
  for (int64_t k = threadIdx.y; k < splits * span; k += kThreads)
    total += partial[(k / span * S + row) * channels + blockIdx.x + k % span];
  total = reduce_over_y(total, shared, Plus{});
  if (threadIdx.y > 0) return;
  Compute<T> value = static_cast<Compute<T>>(total * factor / divisor);
  if (signs) {
    const Compute<T> sign = static_cast<Compute<T>>(signs[blockIdx.x]);
    value = value * static_cast<Compute<T>>((sign > 0) - (sign < 0));
  }
  out[blockIdx.x] = static_cast<T>(value);
}

// f(i, terms) gives S terms of element i; partial is [gridDim.x][S].
template <int S, class F>
__global__ void __launch_bounds__(kThreads) sum_kernel(int64_t numel, F f, double* __restrict__ partial) {
  QEXP_SHARED(double, shared, kThreads);
  double sums[S] = {};
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.y; i < numel;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    double terms[S];
    f(i, terms);
    for (int s = 0; s < S; ++s) sums[s] += terms[s];
  }
  for (int s = 0; s < S; ++s) {
    const double total = reduce_over_y(sums[s], shared, Plus{});
    if (threadIdx.y == 0) partial[blockIdx.x * S + s] = total;
  }
}

// Returns sums [S] in float64. No atomics: the result is repeatable.
template <int S, class F>
Tensor launch_sums(int64_t numel, const Tensor& where, F f) {
  Tensor totals = empty_of({S}, ScalarType::Double, where);
  const int64_t splits = blocks_for(numel);
  Tensor partial = empty_of({splits, S}, ScalarType::Double, where);
  launch(sum_kernel<S, F>, dim3(splits), dim3(1, kThreads), 0, where, numel, f, writable<double>(partial));
  for (int s = 0; s < S; ++s)
    launch(finish_sums<double>, dim3(1), dim3(1, kThreads), 0, where, data<double>(partial), splits, S, s, 1, 1.0, 1.0,
           nullptr, writable<double>(totals) + s);
  return totals;
}

}  // namespace qexp
