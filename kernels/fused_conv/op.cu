// A convolution of bytes and the pass behind it on a CUDA device; see reference.py.
#include "../regrid/pass.cuh"
#include "window.h"

namespace qexp {
namespace {

using namespace fused_conv;

// One thread per sum. `weight`: [O / 16][parts][bytes / 4][16][4] of int8, or [taps][C] of int16, each channel by itself; `kind`:
// its dimensions, of which windows of one pixel leave out the parts.
template <class S>
__global__ void __launch_bounds__(kThreads) sums_kernel(const uint8_t* x, const void* weight, const int32_t* less, S* to,
                                                        Window w, int64_t outputs, int64_t numel, int32_t zero, int64_t kind) {
  // A window's parts lie together: its rows, or its pixels where it leaves out columns.
  const bool joined = w.kernel[1] == 1 || w.dilation[1] == 1;
  const int64_t parts = w.kernel[0] * (joined ? 1 : w.kernel[1]), quads = (w.channels * (joined ? w.kernel[1] : 1) + kQuad - 1) / kQuad;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < numel; i += stride) {
    const int64_t o = i % outputs, column = i / outputs % w.columns, row = i / outputs / w.columns % w.rows;
    const int64_t image = i / outputs / w.columns / w.rows;
    int32_t sum = -less[o];
    for (int64_t t = 0; t < w.kernel[0] * w.kernel[1]; ++t) {
      const int64_t y = row * w.stride[0] - w.padding[0] + t / w.kernel[1] * w.dilation[0];
      const int64_t z = column * w.stride[1] - w.padding[1] + t % w.kernel[1] * w.dilation[1];
      const bool inside = y >= 0 && y < w.height && z >= 0 && z < w.width;
      const uint8_t* from = x + ((image * w.height + y) * w.width + z) * w.channels;
      if (kind == 2) {
        sum += (inside ? from[o] : zero) * static_cast<const int16_t*>(weight)[t * w.channels + o];
        continue;
      }
      const int64_t part = joined ? t / w.kernel[1] : t, before = joined ? t % w.kernel[1] * w.channels : 0;
      const auto* of_part = static_cast<const int8_t*>(weight) + (o / kLanes * parts + part) * quads * kLanes * kQuad;
      for (int64_t k = before; k < before + w.channels; ++k) {
        const int32_t byte = inside ? from[k - before] : zero;
        sum += byte * of_part[(k / kQuad * kLanes + o % kLanes) * kQuad + k % kQuad];
      }
    }
    to[i] = static_cast<S>(sum);
  }
}

std::vector<Tensor> forward(const Tensor& given, const Tensor& weight, const Tensor& less, int64_t zero, const Ints& window,
                            const std::vector<Tensor>& others, const std::vector<Tensor>& constants,
                            const std::vector<Tensor>& tables, const Ints& flat, const Ints& forms, bool wide) {
  const Tensor x = channels_last(given);
  const Window w = window_of(x, window);
  const int64_t outputs = less.numel();
  const Ints sizes{x.size(0), outputs, w.rows, w.columns};
  Tensor sums = empty_channels_last(sizes, wide ? ScalarType::Double : ScalarType::Float, x);
  const int64_t numel = sums.numel();
  with_compute_type(sums, [&](auto tag) {
    using S = decltype(tag);
    if (numel > 0)
      launch(sums_kernel<S>, blocks_for(numel), kThreads, 0, x, data<uint8_t>(x), weight.const_data_ptr(),
             data<int32_t>(less), writable<S>(sums), w, outputs, numel, static_cast<int32_t>(zero), weight.dim());
  });
  std::vector<Tensor> outs, inputs{sums};
  for (const int64_t form : forms) outs.push_back(empty_channels_last(sizes, regrid::type_of(form), x));
  for (const Tensor& t : others) inputs.push_back(regrid::as_laid_out(t, outs[0]));
  regrid::run_pass(inputs, outs, constants, tables, flat);
  return outs;
}

QEXP_LIBRARY_IMPL(m) { m.impl("fused_conv", TORCH_BOX(&forward)); }

}  // namespace
}  // namespace qexp
