// Rounding on the CPU; see reference.py.
#include <torch/library.h>

#include <cmath>

#include "../common/uniform.h"

namespace qexp {
namespace {

// A uniform quantizer of step one that never clips.
at::Tensor forward(const at::Tensor& x, std::string_view rounding, const std::optional<at::Tensor>& noise) {
  return uniform_forward(x, {.scale = 1.0, .low = -INFINITY, .high = INFINITY, .rounding = rounding, .noise = noise});
}

TORCH_LIBRARY_IMPL(qexp, CPU, m) { m.impl("round_to", &forward); }

}  // namespace
}  // namespace qexp
