// Integer Winograd convolution on the CPU; see reference.py and matrices.py.
#include <algorithm>
#include <vector>

#include "../common/tensor.h"
#include "matrices.h"

namespace qexp {
namespace {

int64_t saturate(int64_t* values, int64_t n) {
  int64_t saturated = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t v = std::clamp<int64_t>(values[i], -32768, 32767);
    saturated += v != values[i];
    values[i] = v;
  }
  return saturated;
}

// One axis (1D): a term is an input channel and a kernel row, a tile is `reach` wide. Both axes (2D): a term is an
// input channel, a tile is `reach` x `reach`. Transformed inputs are [image][term row][channel][position][tile].
std::tuple<Tensor, Tensor> conv2d(const Tensor& x, const Tensor& weight, int64_t outputs, bool two_d, int64_t padding,
                                  bool clamp) {
  const Matrices& m = matrices(outputs);
  const int reach = m.reach, positions = two_d ? reach * reach : reach, taps = two_d ? 1 : 3;
  const Tensor input = torch::stable::contiguous(torch::stable::to(x, ScalarType::Long));
  const Tensor filters = torch::stable::contiguous(torch::stable::to(weight, ScalarType::Long));
  const int64_t images = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  const int64_t filters_count = weight.size(0), rows = height + 2 * padding - 2, columns = width + 2 * padding - 2;
  const int64_t tiles = (columns + outputs - 1) / outputs, bands = two_d ? (rows + outputs - 1) / outputs : rows;
  const int64_t lines = two_d ? bands : rows + 2;  // rows of transformed inputs
  Tensor out = empty_of({images, filters_count, rows, columns}, ScalarType::Long, x), counts = empty_of({2}, ScalarType::Long, x);
  const int64_t *from = data<int64_t>(input), *w = data<int64_t>(filters);
  int64_t *to = writable<int64_t>(out), *saturated = writable<int64_t>(counts);

  std::vector<int64_t> u(filters_count * channels * taps * positions);
  for (int64_t f = 0; f < filters_count * channels; ++f) {
    const int64_t* kernel = w + f * 9;
    int64_t* target = u.data() + f * taps * positions;
    if (!two_d) {
      for (int r = 0; r < 3; ++r) apply(m.g, reach, 3, kernel + r * 3, target + r * reach, 1);
      continue;
    }
    int64_t half[3 * kMost];  // [3 rows][reach]
    for (int r = 0; r < 3; ++r) apply(m.g, reach, 3, kernel + r * 3, half + r * reach, 1);
    for (int c = 0; c < reach; ++c) apply(m.g, reach, 3, half + c, target + c, reach);
  }
  saturated[0] = clamp ? saturate(u.data(), static_cast<int64_t>(u.size())) : 0;

  std::vector<int64_t> v(images * lines * channels * positions * tiles);
  torch::stable::parallel_for(0, images * lines, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at_line = begin; at_line < end; ++at_line)
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t t = 0; t < tiles; ++t) {
          int64_t tile[kMost * kMost], half[kMost * kMost], done[kMost * kMost];
          const int high = two_d ? reach : 1;
          const int64_t top = at_line % lines * (two_d ? outputs : 1) - padding, left = t * outputs - padding;
          const int64_t* image = from + (at_line / lines * channels + c) * height * width;
          for (int r = 0; r < high; ++r)
            for (int q = 0; q < reach; ++q) {
              const int64_t y = top + r, z = left + q;
              tile[r * reach + q] = y >= 0 && y < height && z >= 0 && z < width ? image[y * width + z] : 0;
            }
          for (int r = 0; r < high; ++r) apply(m.bt, reach, reach, tile + r * reach, half + r * reach, 1);
          if (two_d)
            for (int q = 0; q < reach; ++q) apply(m.bt, reach, reach, half + q, done + q, reach);
          int64_t* target = v.data() + (at_line * channels + c) * positions * tiles + t;
          for (int p = 0; p < positions; ++p) target[p * tiles] = two_d ? done[p] : half[p];
        }
  });
  saturated[1] = clamp ? saturate(v.data(), static_cast<int64_t>(v.size())) : 0;

  torch::stable::parallel_for(0, images * filters_count * bands, 1, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> sums(positions * tiles);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t band = task % bands, f = task / bands % filters_count, n = task / bands / filters_count;
      std::fill(sums.begin(), sums.end(), 0);
      for (int64_t c = 0; c < channels; ++c)
        for (int r = 0; r < taps; ++r) {
          const int64_t* us = u.data() + ((f * channels + c) * taps + r) * positions;
          const int64_t* vs = v.data() + ((n * lines + band + r) * channels + c) * positions * tiles;
          for (int p = 0; p < positions; ++p)
            for (int64_t t = 0; t < tiles; ++t) sums[p * tiles + t] += us[p] * vs[p * tiles + t];
        }
      int64_t* image = to + (n * filters_count + f) * rows * columns;
      for (int64_t t = 0; t < tiles; ++t) {
        int64_t tile[kMost * kMost], half[kMost * kMost], done[kMost * kMost];
        for (int p = 0; p < positions; ++p) tile[p] = sums[p * tiles + t];
        const int high = two_d ? reach : 1, results = two_d ? m.outputs : 1;
        for (int r = 0; r < high; ++r) apply(m.at, m.outputs, reach, tile + r * reach, half + r * reach, 1);
        if (two_d)
          for (int q = 0; q < m.outputs; ++q) apply(m.at, m.outputs, reach, half + q, done + q, reach);
        const int64_t divisor = two_d ? m.divisor * m.divisor : m.divisor;
        for (int r = 0; r < results; ++r)
          for (int q = 0; q < m.outputs; ++q) {
            const int64_t y = two_d ? band * outputs + r : band, z = t * outputs + q;
            if (y < rows && z < columns) image[y * columns + z] = (two_d ? done : half)[r * reach + q] / divisor;
          }
      }
    }
  });
  return {out, counts};
}

STABLE_TORCH_LIBRARY_IMPL(qexp, CPU, m) { m.impl("winograd_conv2d", TORCH_BOX(&conv2d)); }

}  // namespace
}  // namespace qexp
