// Rounding on a CUDA device; see reference.py.
#include <torch/library.h>

#include <cmath>

#include "../common/uniform.h"

namespace qexp {
namespace {

at::Tensor forward(const at::Tensor& x, std::string_view rounding, const std::optional<at::Tensor>& noise) {
  return uniform_forward(x, {.scale = 1.0, .low = -INFINITY, .high = INFINITY, .rounding = rounding, .noise = noise});
}

TORCH_LIBRARY_IMPL(qexp, CUDA, m) { m.impl("round_to", &forward); }

}  // namespace
}  // namespace qexp
