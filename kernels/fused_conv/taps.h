// Sums of products of bytes and 8-bit weights of each channel by itself, for a tile of output pixels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "window.h"

#if defined(__x86_64__) && defined(__GNUC__) && defined(__AVX512BW__)
#include <immintrin.h>
#define QEXP_TAPS 1
#endif

namespace qexp::fused_conv {

// Sums of one pixel, N channels at a time; the last N may overlap those before.
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
  if (taps == 9 && channels >= 64) return taps_of<64>(x, weight, less, channels, to, std::make_index_sequence<9>());
  if (taps == 9 && channels >= 32) return taps_of<32>(x, weight, less, channels, to, std::make_index_sequence<9>());
  for (int64_t c = 0; c < channels; ++c) {
    int32_t sum = -less[c];
    for (int64_t t = 0; t < taps; ++t) sum += static_cast<int32_t>(x[t][c]) * weight[t * channels + c];
    to[c] = static_cast<S>(sum);
  }
}

#ifdef QEXP_TAPS
#define QEXP_TAPS_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define QEXP_WITH_TAPS QEXP_TAPS_TARGET __attribute__((always_inline)) inline

inline bool has_taps() {
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  return has;
}

// 64 channels: four registers of 16 sums. Bytes of four pixels are interleaved within 128 bits, so that a register of sums holds four
// channels of each 16; `natural` puts the channels into their order.
struct Wide {
  using Reg = __m512i;
  static constexpr int64_t kSums = 16;
  template <bool All>
  QEXP_WITH_TAPS static Reg load(uint64_t lanes, const uint8_t* p) {
    return All ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(lanes, p);
  }
  QEXP_WITH_TAPS static Reg numbers(const int32_t* p) { return _mm512_loadu_si512(p); }
  QEXP_WITH_TAPS static Reg zero() { return _mm512_setzero_si512(); }
  QEXP_WITH_TAPS static Reg low8(Reg a, Reg b) { return _mm512_unpacklo_epi8(a, b); }
  QEXP_WITH_TAPS static Reg high8(Reg a, Reg b) { return _mm512_unpackhi_epi8(a, b); }
  QEXP_WITH_TAPS static Reg low16(Reg a, Reg b) { return _mm512_unpacklo_epi16(a, b); }
  QEXP_WITH_TAPS static Reg high16(Reg a, Reg b) { return _mm512_unpackhi_epi16(a, b); }
  QEXP_WITH_TAPS static void natural(Reg& a, Reg& b, Reg& c, Reg& d) {
    const Reg ab = _mm512_shuffle_i32x4(a, b, 0x88), cd = _mm512_shuffle_i32x4(c, d, 0x88);
    const Reg ab1 = _mm512_shuffle_i32x4(a, b, 0xdd), cd1 = _mm512_shuffle_i32x4(c, d, 0xdd);
    a = _mm512_shuffle_i32x4(ab, cd, 0x88), b = _mm512_shuffle_i32x4(ab1, cd1, 0x88);
    c = _mm512_shuffle_i32x4(ab, cd, 0xdd), d = _mm512_shuffle_i32x4(ab1, cd1, 0xdd);
  }
  QEXP_WITH_TAPS static void put(float* to, Reg sum, const int32_t* less, uint64_t lanes) {
    const auto m = static_cast<__mmask16>(lanes);
    _mm512_mask_storeu_ps(to, m, _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_maskz_loadu_epi32(m, less))));
  }
  QEXP_WITH_TAPS static void put(double* to, Reg sum, const int32_t* less, uint64_t lanes) {
    const auto m = static_cast<__mmask16>(lanes);
    sum = _mm512_sub_epi32(sum, _mm512_maskz_loadu_epi32(m, less));
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>(m), _mm512_cvtepi32_pd(_mm512_castsi512_si256(sum)));
    _mm512_mask_storeu_pd(to + 8, static_cast<__mmask8>(m >> 8), _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(sum, 1)));
  }
};

// The same for 32 channels.
struct Half {
  using Reg = __m256i;
  static constexpr int64_t kSums = 8;
  template <bool All>
  QEXP_WITH_TAPS static Reg load(uint64_t lanes, const uint8_t* p) {
    return All ? _mm256_loadu_si256(reinterpret_cast<const Reg*>(p)) : _mm256_maskz_loadu_epi8(static_cast<__mmask32>(lanes), p);
  }
  QEXP_WITH_TAPS static Reg numbers(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Reg*>(p)); }
  QEXP_WITH_TAPS static Reg zero() { return _mm256_setzero_si256(); }
  QEXP_WITH_TAPS static Reg low8(Reg a, Reg b) { return _mm256_unpacklo_epi8(a, b); }
  QEXP_WITH_TAPS static Reg high8(Reg a, Reg b) { return _mm256_unpackhi_epi8(a, b); }
  QEXP_WITH_TAPS static Reg low16(Reg a, Reg b) { return _mm256_unpacklo_epi16(a, b); }
  QEXP_WITH_TAPS static Reg high16(Reg a, Reg b) { return _mm256_unpackhi_epi16(a, b); }
  QEXP_WITH_TAPS static void natural(Reg& a, Reg& b, Reg& c, Reg& d) {
    const Reg first = _mm256_permute2x128_si256(a, b, 0x20), third = _mm256_permute2x128_si256(a, b, 0x31);
    b = _mm256_permute2x128_si256(c, d, 0x20), d = _mm256_permute2x128_si256(c, d, 0x31);
    a = first, c = third;
  }
  QEXP_WITH_TAPS static void put(float* to, Reg sum, const int32_t* less, uint64_t lanes) {
    const auto m = static_cast<__mmask8>(lanes);
    _mm256_mask_storeu_ps(to, m, _mm256_cvtepi32_ps(_mm256_sub_epi32(sum, _mm256_maskz_loadu_epi32(m, less))));
  }
  QEXP_WITH_TAPS static void put(double* to, Reg sum, const int32_t* less, uint64_t lanes) {
    const auto m = static_cast<__mmask8>(lanes);
    _mm512_mask_storeu_pd(to, m, _mm512_cvtepi32_pd(_mm256_sub_epi32(sum, _mm256_maskz_loadu_epi32(m, less))));
  }
};

// Weights as the dot products read them: for each block of channels, groups of four taps as [register][128 bits][channel][tap].
class Interleaved {
 public:
  Interleaved(const int16_t* weight, int64_t taps, int64_t channels) : groups_((taps + kQuad - 1) / kQuad) {
    const int64_t padded = (channels + kBlocks - 1) / kBlocks * kBlocks;
    std::vector<int32_t> natural(groups_ * padded);
    for (int64_t t = 0; t < taps; ++t) {
      int32_t* to = natural.data() + t / kQuad * padded;
      for (int64_t c = 0; c < channels; ++c)
        to[c] |= static_cast<int32_t>(static_cast<uint32_t>(weight[t * channels + c] & 255) << 8 * (t % kQuad));
    }
    numbers_.resize(natural.size());
    int32_t* to = numbers_.data();
    for (int64_t first = 0; first < channels; first += width(channels - first))
      for (int64_t g = 0; g < groups_; ++g)
        for (int64_t k = 0; k < 4; ++k)
          for (int64_t l = 0; l < width(channels - first) / 16; ++l, to += 4)
            std::copy_n(natural.data() + g * padded + first + 16 * l + 4 * k, 4, to);
  }
  static int64_t width(int64_t left) { return left > kBlocks / 2 ? kBlocks : kBlocks / 2; }  // channels of a block
  const int32_t* at(int64_t first) const { return numbers_.data() + groups_ * first; }
  int64_t groups() const { return groups_; }

 private:
  static constexpr int64_t kBlocks = 64;
  int64_t groups_;
  std::vector<int32_t> numbers_;
};

template <class W>
struct Four {
  typename W::Reg a, b, c, d;  // by name: in an array the compiler would keep them in memory
};

template <class W>
QEXP_WITH_TAPS Four<W> four(const int32_t* p) {
  constexpr int64_t N = W::kSums;
  return {W::numbers(p), W::numbers(p + N), W::numbers(p + 2 * N), W::numbers(p + 3 * N)};
}

template <class R>
QEXP_WITH_TAPS void add(R& sum, R bytes, R weights) {
  // The intrinsic function makes the compiler keep sums in memory.
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(weights));
}

template <class W, class R = typename W::Reg>
QEXP_WITH_TAPS void add(Four<W>& s, R a, R b, R c, R d, const Four<W>& w) {
  const R ab = W::low8(a, b), ab1 = W::high8(a, b), cd = W::low8(c, d), cd1 = W::high8(c, d);
  add(s.a, W::low16(ab, cd), w.a), add(s.b, W::high16(ab, cd), w.b);
  add(s.c, W::low16(ab1, cd1), w.c), add(s.d, W::high16(ab1, cd1), w.d);
}

// A block of channels of some pixels, each a `stride` of bytes further in the input.
struct Run {
  int64_t count, stride, groups, channels;
  uint64_t lanes;  // channels that there are
};

// Sums of a block of channels. `x`: four pixels per group; of the last of three groups only the first has a weight.
template <class W, bool Nine, bool All, class S>
QEXP_TAPS_TARGET void dots_of(const uint8_t* const* x, int64_t first, const int32_t* weight, const int32_t* less,
                              const Run& run, S* to) {
  constexpr int64_t N = W::kSums;
  const uint64_t lanes = run.lanes;
  const Four<W> w = four<W>(weight), w1 = Nine ? four<W>(weight + 4 * N) : w, w2 = Nine ? four<W>(weight + 8 * N) : w;
  const auto read = [&](int64_t t, int64_t at) __attribute__((always_inline)) QEXP_TAPS_TARGET {
    return W::template load<All>(lanes, x[t] + at);
  };
  for (int64_t p = 0, at = first; p < run.count; ++p, at += run.stride, to += run.channels) {
    Four<W> s{W::zero(), W::zero(), W::zero(), W::zero()};
    add<W>(s, read(0, at), read(1, at), read(2, at), read(3, at), w);
    if constexpr (Nine) {
      add<W>(s, read(4, at), read(5, at), read(6, at), read(7, at), w1);
      const auto last = read(8, at);
      add<W>(s, last, last, last, last, w2);
    } else {
      for (int64_t g = 1; g < run.groups; ++g)
        add<W>(s, read(4 * g, at), read(4 * g + 1, at), read(4 * g + 2, at), read(4 * g + 3, at), four<W>(weight + 4 * N * g));
    }
    W::natural(s.a, s.b, s.c, s.d);
    W::put(to, s.a, less, lanes), W::put(to + N, s.b, less + N, lanes >> N);
    W::put(to + 2 * N, s.c, less + 2 * N, lanes >> 2 * N), W::put(to + 3 * N, s.d, less + 3 * N, lanes >> 3 * N);
  }
}

template <class W, class S>
void dots_of(const uint8_t* const* x, int64_t first, const int32_t* weight, const int32_t* less, const Run& run, bool nine,
             bool all, S* to) {
  if (nine && all) return dots_of<W, true, true>(x, first, weight, less, run, to);
  if (nine) return dots_of<W, true, false>(x, first, weight, less, run, to);
  dots_of<W, false, false>(x, first, weight, less, run, to);
}

template <class S>
void dots_of(const uint8_t* const* x, const Interleaved& weight, int64_t taps, const int32_t* less, int64_t channels,
             int64_t count, int64_t stride, S* to) {
  for (int64_t first = 0; first < channels; first += Interleaved::width(channels - first)) {
    const int64_t width = Interleaved::width(channels - first), there = std::min(channels - first, width);
    const Run run{count, stride, weight.groups(), channels, ~uint64_t{0} >> (64 - there)};
    const auto block = width == 64 ? &dots_of<Wide, S> : &dots_of<Half, S>;
    block(x, first, weight.at(first), less + first, run, taps == 9, there == width, to + first);
  }
}
#else
inline bool has_taps() { return false; }
class Interleaved {
 public:
  Interleaved(const int16_t*, int64_t, int64_t) {}
  int64_t groups() const { return 0; }
};
template <class S>
void dots_of(const uint8_t* const*, const Interleaved&, int64_t, const int32_t*, int64_t, int64_t, int64_t, S*) {}
#endif

// Where the taps of an output pixel lie; beyond the border lies a row that is zero, as wide as the image.
class Taps {
 public:
  Taps(const uint8_t* x, const uint8_t* border, const Window& w)
      : x_(x), border_(border), w_(w), from_((w.kernel[0] * w.kernel[1] + kQuad - 1) / kQuad * kQuad) {}

  // Returns of how many pixels, this one and those to its right, all taps lie inside their rows; 0 if not of this one.
  int64_t inside(const Pixel& p) const {
    const int64_t left = p.column * w_.stride[1] - w_.padding[1], reach = (w_.kernel[1] - 1) * w_.dilation[1];
    if (left < 0 || left + reach >= w_.width) return 0;
    return std::min(w_.columns - p.column, (w_.width - 1 - reach - left) / w_.stride[1] + 1);
  }

  const uint8_t* const* of(const Pixel& p) {
    const int64_t left = p.column * w_.stride[1] - w_.padding[1], taps = w_.kernel[0] * w_.kernel[1];
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t row = p.row * w_.stride[0] - w_.padding[0] + t / w_.kernel[1] * w_.dilation[0];
      const int64_t column = left + t % w_.kernel[1] * w_.dilation[1];
      const bool out = row < 0 || row >= w_.height || column < 0 || column >= w_.width;
      const int64_t within = column < 0 || column >= w_.width ? 0 : column;
      from_[t] = out ? border_ + within * w_.channels
                     : x_ + ((p.image * w_.height + row) * w_.width + column) * w_.channels;
    }
    for (size_t t = taps; t < from_.size(); ++t) from_[t] = from_[taps - 1];  // their weights are zero
    return from_.data();
  }

 private:
  const uint8_t *x_, *border_;
  const Window& w_;
  std::vector<const uint8_t*> from_;
};

// Sums of the pixels [first, last), to `to` [pixels, channels]. `weight`: [taps][channels]; `border`: a row beyond the border.
template <class S>
void depthwise(const uint8_t* x, const int16_t* weight, const Interleaved* dots, const int32_t* less, const uint8_t* border,
               const Window& w, int64_t first, int64_t last, S* to) {
  const int64_t taps = w.kernel[0] * w.kernel[1];
  Taps found(x, border, w);
  Pixel p = pixel_of(w, first);
  while (first < last) {
    const int64_t count = dots ? std::clamp<int64_t>(found.inside(p), 1, last - first) : 1;
    if (dots) {
      dots_of(found.of(p), *dots, taps, less, w.channels, count, w.stride[1] * w.channels, to);
    } else {
      taps_of(found.of(p), weight, taps, less, w.channels, to);
    }
    first += count, to += count * w.channels, p.column += count - 1;
    p.forward(w);
  }
}

}  // namespace qexp::fused_conv
