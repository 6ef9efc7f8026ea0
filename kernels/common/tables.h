// The parameters of a uniform quantizer, laid out for the blocks of a walk.
#pragma once

#include "rounding.h"
#include "uniform.h"
#include "walk.h"

namespace qexp {

template <class C>
struct Row {
  const C *scale, *zero, *low, *high, *offset;
};

template <class C>
class Tables {
 public:
  Tables(const Uniform& u, const Walk& walk)
      : scale_(u.scale, walk), zero_(u.zero_point, walk), low_(u.low, walk), high_(u.high, walk), offset_(u.offset, walk) {
    scale_.apply([](C s) { return valid(s); });
  }

  Row<C> row(int64_t channel) const {
    return {scale_.at(channel), zero_.at(channel), low_.at(channel), high_.at(channel), offset_.at(channel)};
  }

 private:
  Table<C> scale_, zero_, low_, high_, offset_;
};

}  // namespace qexp
