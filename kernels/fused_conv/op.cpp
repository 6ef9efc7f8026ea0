// A convolution of bytes and the pass behind it on the CPU, a tile of pixels at a time; see reference.py.
#include "../regrid/pass.h"
#include "dense.h"
#include "products.h"
#include "taps.h"
#include "window.h"

namespace qexp {
namespace {

using namespace fused_conv;

constexpr int64_t kTile = 8192;  // sums of a tile, at least, so that they stay in the second-level cache
constexpr uintptr_t kLine = 64;  // bytes of a cache line, at which a tile begins
constexpr int64_t kPixels = 48;  // pixels of a tile, at least, so that weights are read seldom

std::vector<Tensor> forward(const Tensor& given, const Tensor& weight, const Tensor& less, int64_t zero, const Ints& window,
                            const std::vector<Tensor>& others, const std::vector<Tensor>& constants,
                            const std::vector<Tensor>& tables, const Ints& flat, const Ints& forms, bool wide) {
  const Tensor x = channels_last(given);
  const Window w = window_of(x, window);
  const int64_t outputs = less.numel(), images = x.size(0);
  std::vector<Tensor> outs;
  for (const int64_t form : forms) outs.push_back(empty_channels_last({images, outputs, w.rows, w.columns}, regrid::type_of(form), x));
  std::vector<OptionalTensor> inputs{std::nullopt};
  for (const Tensor& t : others) inputs.push_back(regrid::as_laid_out(t, outs[0]));
  const regrid::Pass pass(inputs, outs, constants, tables, flat, wide ? regrid::kDouble : regrid::kSingle);
  const std::vector<uint8_t> border(w.channels * w.width, static_cast<uint8_t>(zero));
  std::optional<Interleaved> dots;
  if (weight.dim() == 2 && has_taps()) dots.emplace(data<int16_t>(weight), w.kernel[0] * w.kernel[1], w.channels);
  const int64_t pixels = images * w.rows * w.columns;
  const int64_t per = std::max(kPixels, (kTile / std::max<int64_t>(outputs, 1) + kRows) / kRows * kRows);
  const bool is_dense = weight.dim() == 5;
  const Parts parts(w);
  // A tile of a dense convolution is whole rows of one image.
  const int64_t rows = std::clamp<int64_t>(kTile / std::max<int64_t>(outputs * w.columns, 1), 1, w.rows);
  const int64_t in_image = (w.rows + rows - 1) / rows, most = is_dense ? rows * w.columns : per;
  const int64_t tiles = is_dense ? images * in_image : (pixels + per - 1) / per;
  regrid::with_form(wide ? regrid::kDouble : regrid::kSingle, [&](auto tag) {
    using S = decltype(tag);
    if constexpr (!std::is_same_v<S, uint8_t>) {
      torch::stable::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
        auto tries = pass.tries();
        std::optional<Framed> frame;
        if (is_dense) frame.emplace(w, parts, rows);
        std::vector<S> room(most * outputs + kLine / sizeof(S));
        S* tile = room.data() + (kLine - reinterpret_cast<uintptr_t>(room.data()) % kLine) / sizeof(S);
        for (int64_t k = first; k < last; ++k) {
          if (is_dense) {
            const int64_t image = k / in_image, row = k % in_image * rows, count = std::min(rows, w.rows - row);
            frame->fill(data<uint8_t>(x) + image * w.height * w.width * w.channels, row, count, static_cast<uint8_t>(zero));
            dense(*frame, data<int8_t>(weight), data<int32_t>(less), w, parts, outputs, count, tile);
            const int64_t begin = (image * w.rows + row) * w.columns;
            pass.run(begin * outputs, (begin + count * w.columns) * outputs, tries, tile);
            continue;
          }
          const int64_t begin = k * per, end = std::min(begin + per, pixels);
          if (weight.dim() == 4) {
            pointwise(data<uint8_t>(x), data<int8_t>(weight), data<int32_t>(less), w, outputs, begin, end, tile);
          } else {
            depthwise(data<uint8_t>(x), data<int16_t>(weight), dots ? &*dots : nullptr, data<int32_t>(less), border.data(), w, begin,
                      end, tile);
          }
          pass.run(begin * outputs, end * outputs, tries, tile);
        }
      });
    }
  });
  return outs;
}

STABLE_TORCH_LIBRARY_IMPL(qexp, CPU, m) { m.impl("fused_conv", TORCH_BOX(&forward)); }

}  // namespace
}  // namespace qexp
