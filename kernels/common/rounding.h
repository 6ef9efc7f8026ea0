// Rounding to integers, the same arithmetic on the CPU and in CUDA as in round_to/reference.py.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>

#ifdef __CUDACC__
#define QEXP_INLINE __host__ __device__ __forceinline__
#else
#define QEXP_INLINE inline __attribute__((always_inline))
#endif

namespace qexp {

enum class Rounding { half_even, half_up, half_away, floor, trunc, stochastic };

inline Rounding parse_rounding(std::string_view name) {
  if (name == "half_even") return Rounding::half_even;
  if (name == "half_up") return Rounding::half_up;
  if (name == "half_away") return Rounding::half_away;
  if (name == "floor") return Rounding::floor;
  if (name == "trunc") return Rounding::trunc;
  if (name == "stochastic") return Rounding::stochastic;
  STD_TORCH_CHECK(false, "rounding=", std::string(name), " is not allowed");
}

// `v - floor(v)` is exact wherever it decides; `floor(v + 0.5)` is not (0.49999997f would give 1).
template <Rounding R, class C>
QEXP_INLINE C round_to(C v, C noise) {
  if constexpr (R == Rounding::half_even) {
    return std::rint(v);
  } else if constexpr (R == Rounding::floor) {
    return std::floor(v);
  } else if constexpr (R == Rounding::trunc) {
    return std::trunc(v);
  } else if constexpr (R == Rounding::half_up) {
    const C low = std::floor(v);
    return low + (v - low >= C(0.5) ? C(1) : C(0));
  } else if constexpr (R == Rounding::half_away) {
    const C magnitude = std::fabs(v), low = std::floor(magnitude);
    return std::copysign(low + (magnitude - low >= C(0.5) ? C(1) : C(0)), v);
  } else {
    const C low = std::floor(v);
    return low + (noise >= C(1) - (v - low) ? C(1) : C(0));
  }
}

// Clamps as torch.clamp does: NaN stays, and the upper limit wins over the lower.
template <class C>
QEXP_INLINE C clamp(C v, C low, C high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

// The code as int32: what lies beyond saturates (2^31 - 1 is no float32), NaN gets the smallest.
template <class C>
QEXP_INLINE int32_t code_of(C q) {
  if (!(q >= C(-2147483648.0))) return INT32_MIN;
  return q >= C(2147483648.0) ? INT32_MAX : static_cast<int32_t>(q);
}

// A scale that is not positive and finite becomes NaN, so that it never gives a number.
template <class C>
QEXP_INLINE C valid(C scale) {
  return scale > C(0) && scale < C(INFINITY) ? scale : C(NAN);
}

// Calls `f` with the rounding mode as a compile-time constant.
template <class F>
auto with_rounding(Rounding mode, F&& f) {
  switch (mode) {
    case Rounding::half_even: return f(std::integral_constant<Rounding, Rounding::half_even>{});
    case Rounding::half_up: return f(std::integral_constant<Rounding, Rounding::half_up>{});
    case Rounding::half_away: return f(std::integral_constant<Rounding, Rounding::half_away>{});
    case Rounding::floor: return f(std::integral_constant<Rounding, Rounding::floor>{});
    case Rounding::trunc: return f(std::integral_constant<Rounding, Rounding::trunc>{});
    default: return f(std::integral_constant<Rounding, Rounding::stochastic>{});
  }
}

}  // namespace qexp
