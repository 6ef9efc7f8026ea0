// Several results of one pass on the CPU; see reference.py.
#include "pass.h"

namespace qexp {
namespace {

using namespace regrid;

std::vector<Tensor> forward(const std::vector<Tensor>& given, const std::vector<Tensor>& constants,
                            const std::vector<Tensor>& tables, const Ints& flat, const Ints& forms) {
  std::vector<Tensor> outs;
  for (const int64_t form : forms) outs.push_back(empty_as(given[0], type_of(form)));
  std::vector<OptionalTensor> inputs;
  for (const Tensor& x : given) inputs.push_back(as_laid_out(x, outs[0]));
  const Pass pass(inputs, outs, constants, tables, flat);
  torch::stable::parallel_for(0, pass.numel(), kGrain, [&](int64_t first, int64_t last) {
    auto tries = pass.tries();
    pass.run(first, last, tries);
  });
  return outs;
}

STABLE_TORCH_LIBRARY_IMPL(qexp, CPU, m) { m.impl("regrid", TORCH_BOX(&forward)); }

}  // namespace
}  // namespace qexp
