// Rounding on a CUDA device; see reference.py.
#include "../common/device.cuh"

namespace qexp {
namespace {

Tensor forward(const Tensor& x, std::string_view rounding, const OptionalTensor& noise) {
  return uniform_forward(x, {.scale = 1.0, .low = -INFINITY, .high = INFINITY, .rounding = rounding, .noise = noise});
}

QEXP_LIBRARY_IMPL(m) { m.impl("round_to", TORCH_BOX(&forward)); }

}  // namespace
}  // namespace qexp
