// Sums of products of bytes and 8-bit weights, for a tile of output pixels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "window.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define QEXP_DOTS 1
#endif

namespace qexp::fused_conv {

constexpr int kRows = 6;  // pixels whose sums are in registers at a time

struct Pixel {
  int64_t image, row, column;
};

inline Pixel pixel_of(const Window& w, int64_t number) {
  return {number / (w.rows * w.columns), number / w.columns % w.rows, number % w.columns};
}

// Sums of one pixel and 16 outputs, in any processor's instructions. `b`: [quads][16][4].
inline void dots_of(const uint8_t* a, int64_t inputs, const int8_t* b, int32_t* sum) {
  for (int64_t k = 0; k < inputs; ++k) {
    const int8_t* w = b + k / kQuad * kLanes * kQuad + k % kQuad;
    for (int64_t j = 0; j < kLanes; ++j) sum[j] += static_cast<int32_t>(a[k]) * w[j * kQuad];
  }
}

#ifdef QEXP_DOTS
#define QEXP_WITH_DOTS __attribute__((target("avx512f,avx512vnni"), always_inline)) inline

inline bool has_dots() {
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni");
  return has;
}

QEXP_WITH_DOTS void put(float* to, __m512i sum, __mmask16 lanes) {
  _mm512_mask_storeu_ps(to, lanes, _mm512_cvtepi32_ps(sum));
}

QEXP_WITH_DOTS void put(double* to, __m512i sum, __mmask16 lanes) {
  _mm512_mask_storeu_pd(to, static_cast<__mmask8>(lanes), _mm512_cvtepi32_pd(_mm512_castsi512_si256(sum)));
  _mm512_mask_storeu_pd(to + 8, static_cast<__mmask8>(lanes >> 8), _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(sum, 1)));
}

// Registers by name: in an array the compiler would keep them in memory. A row has V of them, sums have R rows.
template <int V>
struct Row {
  __m512i here;
  Row<V - 1> rest;
};
template <>
struct Row<0> {};

template <int R, int V>
struct Sums {
  Row<V> here;
  Sums<R - 1, V> rest;
};
template <int V>
struct Sums<0, V> {};

template <int V>
QEXP_WITH_DOTS void clear(Row<V>& row) {
  if constexpr (V > 0) row.here = _mm512_setzero_si512(), clear(row.rest);
}

template <int V>
QEXP_WITH_DOTS void read(Row<V>& row, const int8_t* b, int64_t block) {
  if constexpr (V > 0) row.here = _mm512_loadu_si512(b), read(row.rest, b + block, block);
}

template <int V>
QEXP_WITH_DOTS void add(Row<V>& row, __m512i x, const Row<V>& weights) {
  if constexpr (V > 0) {
    // The intrinsic function makes the compiler keep every sum in memory as well.
    __asm__("vpdpbusd %2, %1, %0" : "+v"(row.here) : "v"(x), "v"(weights.here));
    add(row.rest, x, weights.rest);
  }
}

template <int V, class S>
QEXP_WITH_DOTS void put(const Row<V>& row, const int32_t* less, S* to, int64_t left) {
  if constexpr (V > 0) {
    const auto lanes = static_cast<__mmask16>((1u << std::min(left, kLanes)) - 1);
    put(to, _mm512_sub_epi32(row.here, _mm512_maskz_loadu_epi32(lanes, less)), lanes);
    if constexpr (V > 1) put(row.rest, less + kLanes, to + kLanes, left - kLanes);
  }
}

template <int R, int V>
QEXP_WITH_DOTS void clear(Sums<R, V>& sums) {
  if constexpr (R > 0) clear(sums.here), clear(sums.rest);
}

template <int R, int V>
QEXP_WITH_DOTS void add(Sums<R, V>& sums, const uint8_t* const* a, int64_t at, const Row<V>& weights) {
  if constexpr (R > 0) {
    int32_t four;
    __builtin_memcpy(&four, *a + at, sizeof four);
    add(sums.here, _mm512_set1_epi32(four), weights);
    add(sums.rest, a + 1, at, weights);
  }
}

template <int R, int V, class S>
QEXP_WITH_DOTS void put(const Sums<R, V>& sums, const int32_t* less, S* to, int64_t outputs, int64_t left) {
  if constexpr (R > 0) put(sums.here, less, to, left), put(sums.rest, less, to + outputs, outputs, left);
}

// Sums of R pixels and V blocks of 16 outputs, of which the last may be cut.
template <int R, int V, class S>
__attribute__((target("avx512f,avx512vnni"))) void dots(const uint8_t* const* a, const int8_t* b, int64_t quads,
                                                        const int32_t* less, S* to, int64_t outputs, int64_t left) {
  const int64_t block = quads * kLanes * kQuad;
  Sums<R, V> sums;
  clear(sums);
  for (int64_t q = 0; q < quads; ++q) {
    Row<V> weights;
    read(weights, b + q * kLanes * kQuad, block);
    add(sums, a, q * kQuad, weights);
  }
  put(sums, less, to, outputs, left);
}

template <int R, class S>
void dots_in_blocks(const uint8_t* const* a, const int8_t* b, int64_t quads, const int32_t* less, S* to, int64_t outputs,
                    int64_t left) {
  if (left > 3 * kLanes) return dots<R, 4>(a, b, quads, less, to, outputs, left);
  if (left > 2 * kLanes) return dots<R, 3>(a, b, quads, less, to, outputs, left);
  if (left > kLanes) return dots<R, 2>(a, b, quads, less, to, outputs, left);
  return dots<R, 1>(a, b, quads, less, to, outputs, left);
}
#else
inline bool has_dots() { return false; }
#endif

// Sums of the pixels [first, last) of a convolution with windows of one pixel, to `to` [pixels, outputs].
template <class S>
void pointwise(const uint8_t* x, const int8_t* weight, const int32_t* less, const Window& w, int64_t outputs, int64_t first,
               int64_t last, S* to) {
  const int64_t quads = (w.channels + kQuad - 1) / kQuad, count = last - first;
  std::vector<const uint8_t*> a(count);
  for (int64_t p = 0; p < count; ++p) {
    const Pixel at = pixel_of(w, first + p);
    a[p] = x + ((at.image * w.height + at.row * w.stride[0]) * w.width + at.column * w.stride[1]) * w.channels;
  }
#ifdef QEXP_DOTS
  if (has_dots() && w.channels % kQuad == 0) {
    for (int64_t o = 0; o < outputs; o += 4 * kLanes) {
      const int8_t* b = weight + o * quads * kQuad;
      int64_t p = 0;
      for (; p + kRows <= count; p += kRows)
        dots_in_blocks<kRows>(&a[p], b, quads, less + o, to + p * outputs + o, outputs, outputs - o);
      for (; p < count; ++p)
        dots_in_blocks<1>(&a[p], b, quads, less + o, to + p * outputs + o, outputs, outputs - o);
    }
    return;
  }
#endif
  for (int64_t o = 0; o < outputs; o += kLanes) {
    for (int64_t p = 0; p < count; ++p) {
      int32_t sum[kLanes] = {};
      dots_of(a[p], w.channels, weight + o * quads * kQuad, sum);
      for (int64_t j = 0; j < std::min(kLanes, outputs - o); ++j) to[p * outputs + o + j] = static_cast<S>(sum[j] - less[o + j]);
    }
  }
}

// Sums of one pixel of a convolution of each channel by itself, N channels at a time; the last N may overlap those before.
template <int64_t N, class S, size_t... T>
void taps_of(const uint8_t* const* x, const int16_t* weight, const int32_t* less, int64_t channels, S* to,
             std::index_sequence<T...>) {
  for (int64_t next = 0; next < channels; next += N) {
    const int64_t first = std::min(next, channels - N);
    const uint8_t* const from[] = {x[T] + first...};
    const int16_t* const by[] = {weight + T * channels + first...};
#pragma GCC ivdep
    for (int64_t c = 0; c < N; ++c) {
      // The product of a byte and a weight fits into 16 bits.
      const int32_t sum = (static_cast<int16_t>(static_cast<int16_t>(from[T][c]) * by[T][c]) + ...);
      to[first + c] = static_cast<S>(sum - less[first + c]);
    }
  }
}

template <class S>
void taps_of(const uint8_t* const* x, const int16_t* weight, int64_t taps, const int32_t* less, int64_t channels, S* to) {
  for (int64_t c = 0; c < channels; ++c) {
    int32_t sum = -less[c];
    for (int64_t t = 0; t < taps; ++t) sum += static_cast<int32_t>(x[t][c]) * weight[t * channels + c];
    to[c] = static_cast<S>(sum);
  }
}

// The same for each channel by itself. `weight`: [taps][channels]; `border`: the pixel beyond the border.
template <class S>
void depthwise(const uint8_t* x, const int16_t* weight, const int32_t* less, const uint8_t* border, const Window& w,
               int64_t first, int64_t last, S* to) {
  const int64_t taps = w.kernel[0] * w.kernel[1];
  std::vector<const uint8_t*> from(taps);
  for (int64_t p = first; p < last; ++p, to += w.channels) {
    const Pixel at = pixel_of(w, p);
    for (int64_t i = 0, t = 0; i < w.kernel[0]; ++i) {
      const int64_t row = at.row * w.stride[0] - w.padding[0] + i * w.dilation[0];
      const bool inside = row >= 0 && row < w.height;
      for (int64_t j = 0; j < w.kernel[1]; ++j, ++t) {
        const int64_t column = at.column * w.stride[1] - w.padding[1] + j * w.dilation[1];
        from[t] = inside && column >= 0 && column < w.width
                      ? x + ((at.image * w.height + row) * w.width + column) * w.channels
                      : border;
      }
    }
    if (taps == 9 && w.channels >= 64) {
      taps_of<64>(from.data(), weight, less, w.channels, to, std::make_index_sequence<9>());
    } else if (taps == 9 && w.channels >= 32) {
      taps_of<32>(from.data(), weight, less, w.channels, to, std::make_index_sequence<9>());
    } else {
      taps_of(from.data(), weight, taps, less, w.channels, to);
    }
  }
}

}  // namespace qexp::fused_conv
