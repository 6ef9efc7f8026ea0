// Several results of one pass on a CUDA device; see reference.py.
#include "pass.cuh"

namespace qexp {
namespace {

using namespace regrid;

std::vector<Tensor> forward(const std::vector<Tensor>& given, const std::vector<Tensor>& constants,
                            const std::vector<Tensor>& tables, const Ints& flat, const Ints& forms) {
  std::vector<Tensor> outs, inputs;
  for (const int64_t form : forms) outs.push_back(empty_as(given[0], type_of(form)));
  for (const Tensor& x : given) inputs.push_back(as_laid_out(x, outs[0]));
  run_pass(inputs, outs, constants, tables, flat);
  return outs;
}

QEXP_LIBRARY_IMPL(m) { m.impl("regrid", TORCH_BOX(&forward)); }

}  // namespace
}  // namespace qexp
