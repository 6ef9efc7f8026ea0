// Codes in float32, which is sure of nearly all of them: the others are those that lie close to the middle between two codes.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "steps.h"

namespace qexp::regrid {

constexpr int64_t kPiece = 128;  // elements that are computed again in float64 where one of them is not sure

QEXP_INLINE constexpr bool is_nearest(int64_t kind) {
  return kind == static_cast<int64_t>(Rounding::half_even) || kind == static_cast<int64_t>(Rounding::half_up) ||
         kind == static_cast<int64_t>(Rounding::half_away);
}

// A step's constants in float32, where a bound of all its roundings shows which codes are those of float64.
struct Single {
  std::vector<float> factor, summand;
  float low, high, after, second;
  float sure;  // distance from a code up to which no rounding of float32 can change it

  // `c`: what all channels share. Returns nothing where float32 is too coarse, or where the limits are no codes.
  static std::optional<Single> of(const std::vector<double>& factor, const std::vector<double>& summand, const Limits& c) {
    constexpr double kWide = 1 << 20;
    for (const double v : {c.low, c.high, c.after})
      if (!(std::fabs(v) <= kWide) || v != std::rint(v)) return std::nullopt;
    double most = 0;
    for (const double v : summand) most = std::fabs(v) <= most ? most : std::fabs(v);
    for (const double v : factor)
      if (!is_ordinary(v)) return std::nullopt;
    if (!is_ordinary(c.second)) return std::nullopt;
    // A result near a code: products and sums round five times at most, each by 2^-24 of terms no greater than these.
    const double other = 255 * std::fabs(c.second), end = std::fmax(std::fabs(c.low), std::fabs(c.high)) + 1;
    const double error = 5.1 * 0x1p-24 * (end + other + most);
    if (!(error < 0.05)) return std::nullopt;
    return Single{{factor.begin(), factor.end()}, {summand.begin(), summand.end()}, static_cast<float>(c.low),
                  static_cast<float>(c.high), static_cast<float>(c.after), static_cast<float>(c.second),
                  static_cast<float>(0.5 - error)};
  }

 private:
  static bool is_ordinary(double v) { return v == 0 || (std::fabs(v) >= 0x1p-100 && std::fabs(v) <= 0x1p100); }
};

// Whether trying float32 first pays: constants whose results often lie in the middle between two codes make it useless.
class Tries {
 public:
  bool pay() const { return failed_ < 16 || failed_ * 4 < tried_; }
  void add(bool sure) {
    ++tried_;
    failed_ += !sure;
  }

 private:
  int64_t tried_ = 0, failed_ = 0;
};

template <bool Two, bool Spread, class I>
bool map_singly_as(const I* __restrict x, const uint8_t* __restrict z, uint8_t* __restrict y, int64_t n,
                   const float* __restrict factor, const float* __restrict summand, const Single& c) {
  const float low = c.low, high = c.high, after = c.after, second = c.second, sure = c.sure;
  int32_t unsure = 0;
  for (int64_t i = 0; i < n; ++i) {
    float v = static_cast<float>(x[i]) * factor[Spread ? i : 0];
    if constexpr (Two) v += static_cast<float>(z[i]) * second;
    v = clamp(v + summand[Spread ? i : 0], low, high);
    const float code = std::rint(v);
    unsure |= !(std::fabs(v - code) < sure);
    y[i] = static_cast<uint8_t>(static_cast<int32_t>(code + after));
  }
  return !unsure;
}

// Writes n codes and returns true, or returns false where one of them is not sure. `spread`: the channel varies.
template <bool Two, class I>
bool map_singly(const I* x, const uint8_t* z, uint8_t* y, int64_t n, const Single& c, bool spread, int64_t channel) {
  const float* f = c.factor.data() + (c.factor.size() > 1 ? channel : 0);
  const float* s = c.summand.data() + (c.summand.size() > 1 ? channel : 0);
  return spread ? map_singly_as<Two, true>(x, z, y, n, f, s, c) : map_singly_as<Two, false>(x, z, y, n, f, s, c);
}

}  // namespace qexp::regrid
