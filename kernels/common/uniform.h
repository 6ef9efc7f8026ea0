// The forward pass every uniform quantizer shares.
#pragma once

#include <string_view>
#include <utility>

#include "rounding.h"
#include "tensor.h"

namespace qexp {

// One element, or one per channel; an absent parameter is `fallback`. Of [rows, C] it is one row.
struct Parameter {
  OptionalTensor tensor;
  double fallback = 0;
  int64_t row = 0, rows = 1;
  bool magnitude = false;  // the element is taken without its sign, ...
  double divisor = 1;      // ... and divided by this, in the type of the tensor

  Parameter(double value) : fallback(value) {}
  Parameter(Tensor t) : tensor(std::move(t)) {}
  Parameter(const OptionalTensor& t, double value) : tensor(t), fallback(value) {}
  Parameter(Tensor t, int64_t row_, int64_t rows_) : tensor(std::move(t)), row(row_), rows(rows_) {}
  Parameter(Tensor t, bool magnitude_, double divisor_)
      : tensor(std::move(t)), magnitude(magnitude_), divisor(divisor_) {}
  int64_t numel() const { return tensor ? tensor->numel() / rows : 1; }
  bool per_channel() const { return numel() != 1; }
};

struct Uniform {
  Parameter scale;
  Parameter zero_point = 0.0;
  Parameter low = 0.0;
  Parameter high = 0.0;
  Parameter offset = 0.0;
  Axis axis;
  std::string_view rounding = "half_even";
  OptionalTensor noise;
  bool additive_noise = false;  // the noise is centred and added before the clip, and rounding is deterministic

  Axis channel_axis() const {
    const bool any = scale.per_channel() || zero_point.per_channel() || low.per_channel() || high.per_channel() ||
                     offset.per_channel();
    return any ? axis : std::nullopt;
  }
};

inline Parameter limit(double value, const OptionalTensor& limits, int64_t row) {
  return limits ? Parameter(*limits, row, 2) : Parameter(value);
}

// Rounds v[0] to v[n - 1] in place; u holds the noise of `stochastic`.
void round_block(Rounding mode, float* v, const float* u, int64_t n);
void round_block(Rounding mode, double* v, const float* u, int64_t n);
// q = round(clip((x - offset) / scale + zero_point, low, high)); returns (q - zero_point) * scale + offset.
Tensor uniform_forward(const Tensor& x, const Uniform& u);
// Returns q as int32.
Tensor uniform_codes(const Tensor& x, const Uniform& u);

}  // namespace qexp
