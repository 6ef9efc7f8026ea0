// A few vector operations by the width the processor has; `kLanes` products are rounded at a time.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#endif

namespace qexp {

#if defined(__AVX512F__)
struct Lanes {
  static constexpr int kLanes = 16;
  using Float = __m512;
  using Int = __m512i;
  static Float set(float v) { return _mm512_set1_ps(v); }
  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float clamp(Float v, Float low, Float high) { return _mm512_min_ps(_mm512_max_ps(v, low), high); }
  static Int zero() { return _mm512_setzero_si512(); }
  static Int add_bits(Int sum, Float v) { return _mm512_add_epi32(sum, _mm512_castps_si512(v)); }
  static void store(int32_t* p, Int v) { _mm512_storeu_si512(p, v); }
};
#elif defined(__AVX2__) && defined(__FMA__)
struct Lanes {
  static constexpr int kLanes = 8;
  using Float = __m256;
  using Int = __m256i;
  static Float set(float v) { return _mm256_set1_ps(v); }
  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float clamp(Float v, Float low, Float high) { return _mm256_min_ps(_mm256_max_ps(v, low), high); }
  static Int zero() { return _mm256_setzero_si256(); }
  static Int add_bits(Int sum, Float v) { return _mm256_add_epi32(sum, _mm256_castps_si256(v)); }
  static void store(int32_t* p, Int v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
};
#else
struct Lanes {
  static constexpr int kLanes = 1;
  using Float = float;
  using Int = uint32_t;  // sums of bit patterns wrap
  static Float set(float v) { return v; }
  static Float load(const float* p) { return *p; }
  static Float fma(Float a, Float b, Float c) { return std::fma(a, b, c); }
  static Float clamp(Float v, Float low, Float high) { return std::fmin(std::fmax(v, low), high); }
  static Int zero() { return 0; }
  static Int add_bits(Int sum, Float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    return sum + bits;
  }
  static void store(int32_t* p, Int v) { *p = static_cast<int32_t>(v); }
};
#endif

}  // namespace qexp
