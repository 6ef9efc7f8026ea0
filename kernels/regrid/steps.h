// What a pass consists of, the same on the CPU and in CUDA as in reference.py.
#pragma once

#include "../common/numbers.h"
#include "../common/rounding.h"

namespace qexp::regrid {

constexpr int kMost = 4, kSteps = 8, kFields = 5, kRows = 6;
enum Kind : int64_t { kNone = 5, kFloat32 = 6, kTable = 7, kGrid = 8, kScaled = 9 };  // below: a rounding
enum Form : int64_t { kSingle, kDouble, kByte };

struct Step {
  int64_t kind, source, other, target, at;
};

struct Limits {
  double factor, summand, low, high, after, second;
};

// x is read as a double, which holds every float32 and byte; so is `other`, where there is one.
template <int64_t K, bool Two>
QEXP_INLINE double mapped(double x, double other, const Limits& c) {
  double y;
  if constexpr (K == kScaled) {
    float v = static_cast<float>(x) * static_cast<float>(c.second) * static_cast<float>(c.factor) + static_cast<float>(c.summand);
    if constexpr (Two) v += static_cast<float>(other);
    return static_cast<double>(clamp(v, static_cast<float>(c.low), static_cast<float>(c.high)));
  }
  if constexpr (K == kGrid) {
    const float v = static_cast<float>(x) / static_cast<float>(c.factor) + static_cast<float>(c.summand);
    return static_cast<double>(std::rint(clamp(v, static_cast<float>(c.low), static_cast<float>(c.high)))) + c.after;
  }
  if constexpr (K == kFloat32) {
    y = static_cast<double>(std::rint(static_cast<float>(x) * static_cast<float>(c.factor)));
  } else {
    y = x * c.factor;
    if constexpr (Two) y = y + other * c.second;
    y = y + c.summand;
    if constexpr (K != kNone) y = round_to<static_cast<Rounding>(K)>(y, 0.0);
  }
  y = y < c.low ? c.low : y;
  return (y > c.high ? c.high : y) + c.after;
}

template <class F>
QEXP_INLINE void with_kind(int64_t kind, F&& f) {
  switch (kind) {
    case 0: return f(std::integral_constant<int64_t, 0>{});
    case 1: return f(std::integral_constant<int64_t, 1>{});
    case 2: return f(std::integral_constant<int64_t, 2>{});
    case 3: return f(std::integral_constant<int64_t, 3>{});
    case 4: return f(std::integral_constant<int64_t, 4>{});
    case kNone: return f(std::integral_constant<int64_t, kNone>{});
    case kGrid: return f(std::integral_constant<int64_t, kGrid>{});
    case kScaled: return f(std::integral_constant<int64_t, kScaled>{});
    default: return f(std::integral_constant<int64_t, kFloat32>{});
  }
}

// Calls f(T{}) with the element type of a form.
template <class F>
QEXP_INLINE void with_form(int64_t form, F&& f) {
  if (form == kSingle) return f(float{});
  if (form == kDouble) return f(double{});
  return f(uint8_t{});
}

inline std::vector<Step> parse(const Ints& flat) {
  std::vector<Step> steps;
  for (size_t i = 0; i + kFields <= flat.size(); i += kFields)
    steps.push_back({flat[i], flat[i + 1], flat[i + 2], flat[i + 3], flat[i + 4]});
  return steps;
}

inline int64_t form_of(const Tensor& x) {
  return x.scalar_type() == ScalarType::Byte ? kByte : x.scalar_type() == ScalarType::Double ? kDouble : kSingle;
}

inline ScalarType type_of(int64_t form) {
  return form == kByte ? ScalarType::Byte : form == kDouble ? ScalarType::Double : ScalarType::Float;
}

// Returns `x` laid out as `model`, copied only where it is not.
inline Tensor as_laid_out(const Tensor& x, const Tensor& model) {
  bool same = true;
  for (int64_t d = 0; d < x.dim(); ++d) same &= x.size(d) == 1 || x.stride(d) == model.stride(d);
  if (same) return x;
  Tensor copy = empty_as(model, x.scalar_type());
  return torch::stable::copy_(copy, x);
}

}  // namespace qexp::regrid
