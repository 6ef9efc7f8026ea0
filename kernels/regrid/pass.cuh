// The steps of a pass over elements of a CUDA device's memory.
#pragma once

#include "../common/elementwise.cuh"
#include "steps.h"

namespace qexp::regrid {
namespace {  // a kernel belongs to its source

struct Place {
  void* at;
  int64_t form;
};

struct Pass {
  Place place[2 * kMost];
  Step step[kSteps];
  const double* constants[kSteps];
  int64_t columns[kSteps];
  const uint8_t* table[kSteps];
  int64_t places, steps;
};

__device__ __forceinline__ double read(const Place& p, int64_t i) {
  double v = 0;
  with_form(p.form, [&](auto tag) { v = static_cast<double>(static_cast<const decltype(tag)*>(p.at)[i]); });
  return v;
}

__device__ __forceinline__ void write(const Place& p, int64_t i, double v) {
  with_form(p.form, [&](auto tag) { static_cast<decltype(tag)*>(p.at)[i] = static_cast<decltype(tag)>(v); });
}

__global__ void __launch_bounds__(kThreads) pass_kernel(Pass pass, Extent extent) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < extent.numel; i += stride) {
    float between[kMost] = {};  // bytes, or what a step of the kind `kScaled` gives
    const auto value = [&](int64_t p) {
      return p < pass.places ? read(pass.place[p], i) : static_cast<double>(between[p - pass.places]);
    };
    for (int64_t k = 0; k < pass.steps; ++k) {
      const Step& s = pass.step[k];
      double y = value(s.source);
      if (s.kind == kTable) {
        const int64_t one = static_cast<int64_t>(y);
        y = pass.table[s.at][s.other < 0 ? one : one * 256 + static_cast<int64_t>(value(s.other))];
      } else {
        const int64_t columns = pass.columns[s.at], column = columns > 1 ? extent.channel(i) : 0;
        const double* c = pass.constants[s.at] + column;
        const Limits all{c[0], c[columns], c[2 * columns], c[3 * columns], c[4 * columns], c[5 * columns]};
        const double other = s.other < 0 ? 0.0 : value(s.other);
        with_kind(s.kind, [&](auto kind) {
          constexpr int64_t K = decltype(kind)::value;
          y = s.other < 0 ? mapped<K, false>(y, other, all) : mapped<K, true>(y, other, all);
        });
      }
      if (s.target < pass.places) {
        write(pass.place[s.target], i, y);
      } else {
        between[s.target - pass.places] = s.kind == kScaled ? static_cast<float>(y) : static_cast<float>(static_cast<uint8_t>(y));
      }
    }
  }
}

// Writes the results `outs`, dense, from inputs that are laid out as they are.
inline void run_pass(const std::vector<Tensor>& inputs, std::vector<Tensor>& outs, const std::vector<Tensor>& constants,
                     const std::vector<Tensor>& tables, const Ints& flat) {
  Pass pass{};
  std::vector<Tensor> held;
  for (const Tensor& x : inputs) pass.place[pass.places++] = {const_cast<void*>(x.const_data_ptr()), form_of(x)};
  for (Tensor& y : outs) pass.place[pass.places++] = {y.mutable_data_ptr(), form_of(y)};
  for (const Step& s : parse(flat)) pass.step[pass.steps++] = s;
  for (size_t k = 0; k < constants.size(); ++k) {
    held.push_back(torch::stable::contiguous(constants[k]));
    pass.constants[k] = data<double>(held.back());
    pass.columns[k] = constants[k].size(1);
  }
  for (size_t k = 0; k < tables.size(); ++k) {
    held.push_back(torch::stable::contiguous(tables[k]));
    pass.table[k] = data<uint8_t>(held.back());
  }
  const Extent extent(outs[0], outs[0].dim() > 1 ? Axis(1) : std::nullopt);
  if (extent.numel > 0) launch(pass_kernel, blocks_for(extent.numel), kThreads, 0, outs[0], pass, extent);
}

}  // namespace
}  // namespace qexp::regrid
