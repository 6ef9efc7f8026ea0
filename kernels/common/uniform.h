// The forward pass every uniform quantizer shares.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace qexp {

// One element or one a channel each; what is absent is `fallback`.
struct Parameter {
  std::optional<at::Tensor> tensor;
  double fallback = 0;

  Parameter(double value) : fallback(value) {}
  Parameter(at::Tensor t) : tensor(std::move(t)) {}
  Parameter(const std::optional<at::Tensor>& t, double value) : tensor(t), fallback(value) {}
  bool per_channel() const { return tensor && tensor->numel() != 1; }
};

struct Uniform {
  Parameter scale;
  Parameter zero_point = 0.0;
  Parameter low = 0.0;
  Parameter high = 0.0;
  Parameter offset = 0.0;
  std::optional<int64_t> axis;
  std::string_view rounding = "half_even";
  std::optional<at::Tensor> noise;
  bool additive_noise = false;  // the noise is centred and added before the clip, and rounding is deterministic

  std::optional<int64_t> channel_axis() const {
    const bool any = scale.per_channel() || zero_point.per_channel() || low.per_channel() || high.per_channel() ||
                     offset.per_channel();
    return any ? axis : std::nullopt;
  }
};

inline Parameter limit(double value, const std::optional<at::Tensor>& limits, int64_t row) {
  return limits ? Parameter(limits->select(0, row)) : Parameter(value);
}

// The CPU and the CUDA library both define these and live in one process: hidden, so that each calls its own.
#pragma GCC visibility push(hidden)
// q = round(clip((x - offset) / scale + zero_point, low, high)); returns (q - zero_point) * scale + offset.
at::Tensor uniform_forward(const at::Tensor& x, const Uniform& u);
// Returns q as int32.
at::Tensor uniform_codes(const at::Tensor& x, const Uniform& u);
#pragma GCC visibility pop

}  // namespace qexp
