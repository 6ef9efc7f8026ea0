// Integer Winograd convolution on a CUDA device; see reference.py and op.cpp. Three kernels: weights, inputs, products and results.
#include "../common/device.cuh"
#include "matrices.h"

namespace qexp {
namespace {

using Count = unsigned long long;

struct Shape {
  int64_t images, channels, height, width, filters, rows, columns, tiles, bands, lines, padding;
  int reach, outputs, positions, taps;
  bool two_d, clamp;
};

__device__ __forceinline__ int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }
__device__ __forceinline__ int64_t threads_of_grid() { return static_cast<int64_t>(gridDim.x) * kThreads; }

// Saturates to 16 bits where asked, and counts.
__device__ __forceinline__ int64_t saturated(int64_t v, bool clamps, Count& count) {
  if (!clamps || (v >= -32768 && v <= 32767)) return v;
  ++count;
  return v < 0 ? -32768 : 32767;
}

// Integer sums come out the same in any order, so counts may be added as they come.
__device__ __forceinline__ void add_to(Count* total, Count count) {
  if (count) atomicAdd(total, count);
}

// u is [filter][channel][tap][position]; a thread transforms one 3 x 3 filter.
__global__ void __launch_bounds__(kThreads)
    transform_weights(const int64_t* __restrict__ weight, int64_t* __restrict__ u, Matrices m, Shape s,
                      Count* __restrict__ count) {
  Count beyond = 0;
  for (int64_t f = thread_index(); f < s.filters * s.channels; f += threads_of_grid()) {
    int64_t half[3 * kMost], done[kMost * kMost];
    for (int r = 0; r < 3; ++r) apply(m.g, s.reach, 3, weight + f * 9 + r * 3, half + r * s.reach, 1);
    if (s.two_d)
      for (int c = 0; c < s.reach; ++c) apply(m.g, s.reach, 3, half + c, done + c, s.reach);
    for (int p = 0; p < s.taps * s.positions; ++p)
      u[f * s.taps * s.positions + p] = saturated(s.two_d ? done[p] : half[p], s.clamp, beyond);
  }
  add_to(count, beyond);
}

// v is [image][line][channel][position][tile]; a thread transforms one tile.
__global__ void __launch_bounds__(kThreads)
    transform_inputs(const int64_t* __restrict__ x, int64_t* __restrict__ v, Matrices m, Shape s,
                     Count* __restrict__ count) {
  Count beyond = 0;
  for (int64_t i = thread_index(); i < s.images * s.lines * s.channels * s.tiles; i += threads_of_grid()) {
    const int64_t t = i % s.tiles, c = i / s.tiles % s.channels, at_line = i / (s.tiles * s.channels);
    const int64_t top = at_line % s.lines * (s.two_d ? s.outputs : 1) - s.padding, left = t * s.outputs - s.padding;
    const int64_t* image = x + (at_line / s.lines * s.channels + c) * s.height * s.width;
    int64_t tile[kMost * kMost], half[kMost * kMost], done[kMost * kMost];
    const int high = s.two_d ? s.reach : 1;
    for (int r = 0; r < high; ++r)
      for (int q = 0; q < s.reach; ++q) {
        const int64_t y = top + r, z = left + q;
        tile[r * s.reach + q] = y >= 0 && y < s.height && z >= 0 && z < s.width ? image[y * s.width + z] : 0;
      }
    for (int r = 0; r < high; ++r) apply(m.bt, s.reach, s.reach, tile + r * s.reach, half + r * s.reach, 1);
    if (s.two_d)
      for (int q = 0; q < s.reach; ++q) apply(m.bt, s.reach, s.reach, half + q, done + q, s.reach);
    int64_t* to = v + (at_line * s.channels + c) * s.positions * s.tiles + t;
    for (int p = 0; p < s.positions; ++p) to[p * s.tiles] = saturated(s.two_d ? done[p] : half[p], s.clamp, beyond);
  }
  add_to(count, beyond);
}

// A thread computes the results of one tile of one filter.
__global__ void __launch_bounds__(kThreads)
    multiply(const int64_t* __restrict__ u, const int64_t* __restrict__ v, int64_t* __restrict__ out, Matrices m,
             Shape s) {
  for (int64_t i = thread_index(); i < s.images * s.filters * s.bands * s.tiles; i += threads_of_grid()) {
    const int64_t t = i % s.tiles, band = i / s.tiles % s.bands, f = i / (s.tiles * s.bands) % s.filters;
    const int64_t n = i / (s.tiles * s.bands * s.filters);
    int64_t sums[kMost * kMost] = {}, half[kMost * kMost], done[kMost * kMost];
    for (int64_t c = 0; c < s.channels; ++c)
      for (int r = 0; r < s.taps; ++r) {
        const int64_t* us = u + ((f * s.channels + c) * s.taps + r) * s.positions;
        const int64_t* vs = v + ((n * s.lines + band + r) * s.channels + c) * s.positions * s.tiles + t;
        for (int p = 0; p < s.positions; ++p) sums[p] += us[p] * vs[p * s.tiles];
      }
    const int high = s.two_d ? s.reach : 1, results = s.two_d ? s.outputs : 1;
    for (int r = 0; r < high; ++r) apply(m.at, s.outputs, s.reach, sums + r * s.reach, half + r * s.reach, 1);
    if (s.two_d)
      for (int q = 0; q < s.outputs; ++q) apply(m.at, s.outputs, s.reach, half + q, done + q, s.reach);
    const int64_t divisor = s.two_d ? m.divisor * m.divisor : m.divisor;
    for (int r = 0; r < results; ++r)
      for (int q = 0; q < s.outputs; ++q) {
        const int64_t y = s.two_d ? band * s.outputs + r : band, z = t * s.outputs + q;
        if (y < s.rows && z < s.columns)
          out[((n * s.filters + f) * s.rows + y) * s.columns + z] = (s.two_d ? done : half)[r * s.reach + q] / divisor;
      }
  }
}

std::tuple<Tensor, Tensor> conv2d(const Tensor& x, const Tensor& weight, int64_t outputs, bool two_d, int64_t padding,
                                  bool clamp) {
  const Matrices& m = matrices(outputs);
  const Tensor input = torch::stable::contiguous(torch::stable::to(x, ScalarType::Long));
  const Tensor filters = torch::stable::contiguous(torch::stable::to(weight, ScalarType::Long));
  Shape s{};
  s.images = x.size(0), s.channels = x.size(1), s.height = x.size(2), s.width = x.size(3), s.filters = weight.size(0);
  s.rows = s.height + 2 * padding - 2, s.columns = s.width + 2 * padding - 2, s.padding = padding;
  s.tiles = up(s.columns, outputs), s.bands = two_d ? up(s.rows, outputs) : s.rows;
  s.lines = two_d ? s.bands : s.rows + 2;
  s.reach = m.reach, s.outputs = m.outputs, s.two_d = two_d, s.clamp = clamp;
  s.positions = two_d ? m.reach * m.reach : m.reach, s.taps = two_d ? 1 : 3;
  Tensor out = empty_of({s.images, s.filters, s.rows, s.columns}, ScalarType::Long, x);
  Tensor counts = torch::stable::new_zeros(x, {2}, ScalarType::Long);
  Count* count = reinterpret_cast<Count*>(writable<int64_t>(counts));
  Tensor u = empty_of({s.filters * s.channels * s.taps * s.positions}, ScalarType::Long, x);
  Tensor v = empty_of({s.images * s.lines * s.channels * s.positions * s.tiles}, ScalarType::Long, x);
  launch(transform_weights, blocks_for(s.filters * s.channels), kThreads, 0, x, data<int64_t>(filters),
         writable<int64_t>(u), m, s, count);
  launch(transform_inputs, blocks_for(v.numel() / s.positions), kThreads, 0, x, data<int64_t>(input),
         writable<int64_t>(v), m, s, count + 1);
  launch(multiply, blocks_for(s.images * s.filters * s.bands * s.tiles), kThreads, 0, x, data<int64_t>(u),
         data<int64_t>(v), writable<int64_t>(out), m, s);
  return {out, counts};
}

QEXP_LIBRARY_IMPL(m) { m.impl("winograd_conv2d", TORCH_BOX(&conv2d)); }

}  // namespace
}  // namespace qexp
