// Sums of products of bytes and 8-bit weights in windows of several pixels, for some rows of an image's output pixels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "products.h"

namespace qexp::fused_conv {

// A window's parts, each of bytes that lie together: its rows, or its pixels where the window leaves out columns.
struct Parts {
  int64_t count, bytes, quads;
  bool joined;
  explicit Parts(const Window& w) {
    joined = w.kernel[1] == 1 || w.dilation[1] == 1;
    count = w.kernel[0] * (joined ? 1 : w.kernel[1]);
    bytes = w.channels * (joined ? w.kernel[1] : 1);
    quads = (bytes + kQuad - 1) / kQuad;
  }
};

// The input rows that some output rows read, with what lies beyond the border.
class Framed {
 public:
  Framed(const Window& w, const Parts& parts, int64_t rows)
      : w_(w), wide_((w.columns - 1) * w.stride[1] + w.dilation[1] * (w.kernel[1] - 1) + 1), at_(parts.count) {
    for (int64_t k = 0; k < parts.count; ++k) {
      const int64_t row = parts.joined ? k : k / w.kernel[1], column = parts.joined ? 0 : k % w.kernel[1];
      at_[k] = (row * w.dilation[0] * wide_ + column * w.dilation[1]) * w.channels;
    }
    // The last part is read in whole groups of four bytes; the weights of what follows it are zero.
    bytes_.resize(reach(rows) * wide_ * w.channels + kQuad);
  }

  // Copies what the output rows [first, first + rows) of an image `x` read.
  void fill(const uint8_t* x, int64_t first, int64_t rows, uint8_t zero) {
    const int64_t c = w_.channels, before = std::min(w_.padding[1], wide_), there = std::min(w_.width, wide_ - before);
    uint8_t* to = bytes_.data();
    for (int64_t r = 0, y = first * w_.stride[0] - w_.padding[0]; r < reach(rows); ++r, ++y, to += wide_ * c) {
      if (y < 0 || y >= w_.height) {
        std::memset(to, zero, wide_ * c);
        continue;
      }
      std::memset(to, zero, before * c);
      std::memcpy(to + before * c, x + y * w_.width * c, there * c);
      std::memset(to + (before + there) * c, zero, (wide_ - before - there) * c);
    }
  }

  const uint8_t* pixel(int64_t row, int64_t column) const {  // the first byte of an output pixel's window
    return bytes_.data() + (row * w_.stride[0] * wide_ + column * w_.stride[1]) * w_.channels;
  }
  int64_t at(int64_t part) const { return at_[part]; }

 private:
  int64_t reach(int64_t rows) const { return (rows - 1) * w_.stride[0] + w_.dilation[0] * (w_.kernel[0] - 1) + 1; }

  const Window& w_;
  int64_t wide_;  // pixels of a row
  std::vector<int64_t> at_;
  std::vector<uint8_t> bytes_;
};

#ifdef QEXP_DOTS
template <int R, int V>
QEXP_WITH_DOTS void add(Sums<R, V>& sums, const uint8_t* a, int64_t step, const Row<V>& weights) {
  if constexpr (R > 0) {
    int32_t four;
    __builtin_memcpy(&four, a, sizeof four);
    add(sums.here, _mm512_set1_epi32(four), weights);
    add(sums.rest, a + step, step, weights);
  }
}

// What all pixels of a block of outputs have in common.
template <class S>
struct Outputs {
  const int8_t* weight;
  const int32_t* less;
  int64_t all, left;  // outputs of a pixel, and from this block on
};

// Sums of R pixels, `step` bytes apart, and V blocks of 16 outputs, of which the last may be cut.
template <int R, int V, class S>
__attribute__((target("avx512f,avx512vnni"))) void window_dots(const Framed& x, const uint8_t* first, int64_t step,
                                                               const Parts& parts, const Outputs<S>& o, S* to) {
  const int64_t block = parts.count * parts.quads * kLanes * kQuad;
  const int8_t* b = o.weight;
  Sums<R, V> sums;
  clear(sums);
  for (int64_t k = 0; k < parts.count; ++k) {
    const uint8_t* a = first + x.at(k);
    for (int64_t q = 0; q < parts.quads; ++q, a += kQuad, b += kLanes * kQuad) {
      Row<V> weights;
      read(weights, b, block);
      add(sums, a, step, weights);
    }
  }
  put(sums, o.less, to, o.all, o.left);
}

// Sums of a row of pixels, as many at a time as there are registers for.
template <int R, int V, class S>
void row_of_dots(const Framed& x, int64_t row, int64_t& column, const Window& w, const Parts& parts, const Outputs<S>& o, S* to) {
  const int64_t step = w.stride[1] * w.channels;
  for (; column + R <= w.columns; column += R)
    window_dots<R, V>(x, x.pixel(row, column), step, parts, o, to + (row * w.columns + column) * o.all);
}

template <int V, class S>
void block_of_dots(const Framed& x, int64_t rows, const Window& w, const Parts& parts, const Outputs<S>& o, S* to) {
  for (int64_t row = 0; row < rows; ++row) {
    int64_t column = 0;
    if constexpr (V == 1) row_of_dots<16, V>(x, row, column, w, parts, o, to);
    if constexpr (V <= 2) row_of_dots<8, V>(x, row, column, w, parts, o, to);
    if constexpr (V > 2) {
      if (w.columns % 4 == 2) row_of_dots<6, V>(x, row, column, w, parts, o, to);
    }
    row_of_dots<4, V>(x, row, column, w, parts, o, to);
    row_of_dots<3, V>(x, row, column, w, parts, o, to);
    row_of_dots<1, V>(x, row, column, w, parts, o, to);
  }
}
#endif

// Sums of `rows` rows of output pixels, to `to` [rows, columns, outputs]. `weight`: [O / 16][parts][quads][16][4].
template <class S>
void dense(const Framed& x, const int8_t* weight, const int32_t* less, const Window& w, const Parts& parts, int64_t outputs,
           int64_t rows, S* to) {
  const int64_t block = parts.count * parts.quads * kQuad;  // bytes per output
#ifdef QEXP_DOTS
  if (has_dots()) {
    for (int64_t o = 0; o < outputs; o += 4 * kLanes) {
      const Outputs<S> here{weight + o * block, less + o, outputs, outputs - o};
      if (here.left > 3 * kLanes) block_of_dots<4>(x, rows, w, parts, here, to + o);
      else if (here.left > 2 * kLanes) block_of_dots<3>(x, rows, w, parts, here, to + o);
      else if (here.left > kLanes) block_of_dots<2>(x, rows, w, parts, here, to + o);
      else block_of_dots<1>(x, rows, w, parts, here, to + o);
    }
    return;
  }
#endif
  for (int64_t o = 0; o < outputs; o += kLanes) {
    for (int64_t p = 0; p < rows * w.columns; ++p) {
      int32_t sum[kLanes] = {};
      const uint8_t* from = x.pixel(p / w.columns, p % w.columns);
      for (int64_t k = 0; k < parts.count; ++k)
        dots_of(from + x.at(k), parts.bytes, weight + o * block + k * parts.quads * kLanes * kQuad, sum);
      for (int64_t j = 0; j < std::min(kLanes, outputs - o); ++j) to[p * outputs + o + j] = static_cast<S>(sum[j] - less[o + j]);
    }
  }
}

}  // namespace qexp::fused_conv
