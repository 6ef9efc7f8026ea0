// Rounding on the CPU; see reference.py.
#include <cmath>

#include "../common/uniform.h"

namespace qexp {
namespace {

// A uniform quantizer of step one that never clips.
Tensor forward(const Tensor& x, std::string_view rounding, const std::optional<Tensor>& noise) {
  return uniform_forward(x, {.scale = 1.0, .low = -INFINITY, .high = INFINITY, .rounding = rounding, .noise = noise});
}

STABLE_TORCH_LIBRARY_IMPL(qexp, CPU, m) { m.impl("round_to", TORCH_BOX(&forward)); }

}  // namespace
}  // namespace qexp
