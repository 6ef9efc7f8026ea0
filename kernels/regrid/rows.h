// The constants of a step on the CPU.
#pragma once

#include <memory>

#include "../common/walk.h"
#include "single.h"
#include "steps.h"

namespace qexp::regrid {

// A step's constants; where the channel varies inside a block, repeated so that a block starts anywhere.
class Rows {
 public:
  Rows(const Tensor& given, const Walk& walk) {
    const Tensor t = given.is_contiguous() ? given : torch::stable::contiguous(given);
    const auto* from = data<double>(t);
    columns_ = t.size(1);
    spread_ = walk.varies && columns_ > 1;
    for (int64_t i = 2 * columns_; i < kRows * columns_; ++i) shared_ &= from[i] == from[i / columns_ * columns_];
    const int64_t length = spread_ ? walk.channels + std::min(kBlock, walk.numel) : columns_;
    for (int r = 0; r < kRows; ++r) row_[r] = repeated(from + r * columns_, r < 2 || !shared_ ? length : 1);
    for (int r = 0; r < 2; ++r) plain_[r].assign(row_[r].begin(), row_[r].end());
    if (shared_) single_ = Single::of(row_[0], row_[1], limits(0));
  }
  const double* at(int row, int64_t channel) const { return row_[row].data() + (columns_ > 1 ? channel : 0); }
  Limits limits(int64_t channel) const {
    return {*at(0, channel), *at(1, channel), *after(2, channel), *after(3, channel), *after(4, channel), *after(5, channel)};
  }
  // Factor (0) or summand (1) as float32.
  const float* single_at(int row, int64_t channel) const { return plain_[row].data() + (columns_ > 1 ? channel : 0); }
  bool spread() const { return spread_; }  // a number for each element of a block
  bool shared() const { return shared_; }  // what follows factor and summand is the same for all channels
  const Single* single() const { return single_ ? &*single_ : nullptr; }  // the same in float32, if that can be sure

 private:
  std::vector<double> repeated(const double* from, int64_t length) const {
    std::vector<double> row(length);
    for (int64_t i = 0; i < std::min(columns_, length); ++i) row[i] = from[i];
    for (int64_t i = columns_; i < length; ++i) row[i] = row[i - columns_];
    return row;
  }
  const double* after(int row, int64_t channel) const { return row_[row].data() + (columns_ > 1 && !shared_ ? channel : 0); }

  std::array<std::vector<double>, kRows> row_;
  int64_t columns_;
  bool spread_, shared_ = true;
  std::array<std::vector<float>, 2> plain_;
  std::optional<Single> single_;
};

}  // namespace qexp::regrid
