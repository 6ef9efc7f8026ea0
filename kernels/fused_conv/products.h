// Sums of products of bytes and 8-bit weights in windows of one pixel, for a tile of output pixels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "window.h"

#if defined(__x86_64__) && defined(__GNUC__) && defined(__AVX512BW__)
#include <immintrin.h>
#define QEXP_DOTS 1
#endif

namespace qexp::fused_conv {

constexpr int kRows = 6;  // pixels whose sums are in registers at a time

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
  Pixel at = pixel_of(w, first);
  for (int64_t p = 0; p < count; ++p, at.forward(w))
    a[p] = x + ((at.image * w.height + at.row * w.stride[0]) * w.width + at.column * w.stride[1]) * w.channels;
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

}  // namespace qexp::fused_conv
