// The shapes of a convolution of bytes, the same on the CPU and in CUDA.
#pragma once

#include "../common/tensor.h"

namespace qexp::fused_conv {

constexpr int64_t kLanes = 16, kQuad = 4;  // outputs of a block of weights; inputs that one instruction multiplies and adds

// Where the input pixels lie that an output pixel reads.
struct Window {
  int64_t channels, height, width;  // of the input
  int64_t rows, columns;            // of the output
  int64_t kernel[2], stride[2], padding[2], dilation[2];
};

// `window`: kernel, stride, padding and dilation, two numbers each.
inline Window window_of(const Tensor& x, const Ints& window) {
  Window w{x.size(1), x.size(2), x.size(3), 0, 0, {}, {}, {}, {}};
  for (int d = 0; d < 2; ++d) {
    w.kernel[d] = window[d], w.stride[d] = window[2 + d], w.padding[d] = window[4 + d], w.dilation[d] = window[6 + d];
    const int64_t reach = x.size(2 + d) + 2 * w.padding[d] - w.dilation[d] * (w.kernel[d] - 1) - 1;
    (d ? w.columns : w.rows) = reach / w.stride[d] + 1;
  }
  return w;
}

// An output pixel; the next one is found without a division.
struct Pixel {
  int64_t image, row, column;
  void forward(const Window& w) {
    if (++column < w.columns) return;
    column = 0;
    if (++row == w.rows) row = 0, ++image;
  }
};

inline Pixel pixel_of(const Window& w, int64_t number) {
  return {number / (w.rows * w.columns), number / w.columns % w.rows, number % w.columns};
}

inline Tensor empty_channels_last(const Ints& sizes, ScalarType dtype, const Tensor& x) {
  const Ints strides{sizes[1] * sizes[2] * sizes[3], 1, sizes[1] * sizes[3], sizes[1]};
  return empty_strided(sizes.data(), strides.data(), 4, dtype, x);
}

inline Tensor channels_last(const Tensor& x) {
  if (is_channels_last(x)) return x;
  Tensor copy = empty_channels_last({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type(), x);
  return torch::stable::copy_(copy, x);
}

}  // namespace qexp::fused_conv
