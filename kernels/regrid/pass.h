// The steps of a pass over elements of the CPU's memory; the first place may be a tile that exists only while it is mapped.
#pragma once

#include "rows.h"
#include "single.h"
#include "steps.h"

namespace qexp::regrid {

template <class T>
T kept(double y) {
  if constexpr (std::is_same_v<T, uint8_t>) {
    return static_cast<uint8_t>(static_cast<int32_t>(y));
  } else {
    return static_cast<T>(y);
  }
}

template <int64_t K, bool Two, class I, class O, class Z>
void map_exactly(const I* __restrict x, const Z* __restrict z, O* __restrict y, int64_t n, const Rows& rows,
                 int64_t channel) {
  const double *f = rows.at(0, channel), *s = rows.at(1, channel);
  const Limits all = rows.limits(channel);
  const auto other = [&](int64_t i) { return Two ? static_cast<double>(z[i]) : 0.0; };
  if (!rows.spread()) {
    for (int64_t i = 0; i < n; ++i) y[i] = kept<O>(mapped<K, Two>(static_cast<double>(x[i]), other(i), all));
  } else if (rows.shared()) {
    for (int64_t i = 0; i < n; ++i)
      y[i] = kept<O>(mapped<K, Two>(static_cast<double>(x[i]), other(i),
                                    Limits{f[i], s[i], all.low, all.high, all.after, all.second}));
  } else {
    const double *low = rows.at(2, channel), *high = rows.at(3, channel), *after = rows.at(4, channel),
                 *second = rows.at(5, channel);
    for (int64_t i = 0; i < n; ++i)
      y[i] = kept<O>(mapped<K, Two>(static_cast<double>(x[i]), other(i),
                                    Limits{f[i], s[i], low[i], high[i], after[i], second[i]}));
  }
}

// Nearest codes come from float32 where that is sure of them, a piece at a time.
template <int64_t K, bool Two, class I, class O>
void map_block(const I* x, const void* other, O* y, int64_t n, const Rows& rows, int64_t channel, Tries& tries) {
  if constexpr (K == kScaled) {
    const auto* z = static_cast<const float*>(other);
    if constexpr (std::is_same_v<O, float>) {
      if (scale<Two>(x, z, y, n, rows, channel)) return;
    }
    map_exactly<K, Two>(x, z, y, n, rows, channel);
    return;
  }
  if constexpr (K == kGrid && std::is_same_v<I, float> && std::is_same_v<O, uint8_t>) {
    if (to_grid(x, y, n, rows, channel)) return;
  }
  const auto* z = static_cast<const uint8_t*>(other);
  if constexpr (std::is_same_v<O, uint8_t> && is_nearest(K)) {
    if (rows.single() && tries.pay()) {
      for (int64_t i = 0; i < n; i += kPiece) {
        const int64_t m = std::min(kPiece, n - i), first = rows.spread() ? channel + i : channel;
        const bool sure = map_singly<Two>(x + i, Two ? z + i : z, y + i, m, *rows.single(), rows.spread(), first);
        if (!sure) map_exactly<K, Two>(x + i, Two ? z + i : z, y + i, m, rows, first);
        tries.add(sure);
      }
      return;
    }
  }
  map_exactly<K, Two>(x, z, y, n, rows, channel);
}

// Loops over float32 that the compiler turns into vectors: layers on codes spend their time here. False: not of this shape.
template <bool Two, class I>
bool scale(const I* __restrict x, const float* __restrict z, float* __restrict y, int64_t n, const Rows& rows, int64_t channel) {
  if (!rows.shared()) return false;
  const Limits c = rows.limits(channel);
  const float first = static_cast<float>(c.second), low = static_cast<float>(c.low), high = static_cast<float>(c.high);
  const auto all = [&](auto factor, auto summand) {
    for (int64_t i = 0; i < n; ++i) {
      float v = static_cast<float>(x[i]) * first * factor(i) + summand(i);
      if constexpr (Two) v += z[i];
      y[i] = clamp(v, low, high);
    }
  };
  const float *f = rows.single_at(0, channel), *s = rows.single_at(1, channel);
  if (rows.spread()) {
    all([=](int64_t i) { return f[i]; }, [=](int64_t i) { return s[i]; });
  } else {
    all([=, v = *f](int64_t) { return v; }, [=, v = *s](int64_t) { return v; });
  }
  return true;
}

inline bool to_grid(const float* __restrict x, uint8_t* __restrict y, int64_t n, const Rows& rows, int64_t channel) {
  constexpr double kWide = 1 << 22;
  const Limits c = rows.limits(channel);
  if (rows.spread() || std::fabs(c.low) > kWide || std::fabs(c.high) > kWide || std::fabs(c.after) > kWide) return false;
  const auto step = static_cast<float>(c.factor), zero = static_cast<float>(c.summand);
  const auto low = static_cast<float>(c.low), high = static_cast<float>(c.high);
  const auto after = static_cast<int32_t>(c.after);
  for (int64_t i = 0; i < n; ++i)
    y[i] = static_cast<uint8_t>(static_cast<int32_t>(std::rint(clamp(x[i] / step + zero, low, high))) + after);
  return true;
}

inline void look_up(const uint8_t* __restrict a, const uint8_t* __restrict b, uint8_t* __restrict y, int64_t n,
             const uint8_t* __restrict table) {
  if (b) {
    for (int64_t i = 0; i < n; ++i) y[i] = table[a[i] * 256 + b[i]];
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = table[a[i]];
  }
}

struct Place {
  char* at;  // nullptr: in a tile
  int64_t form;
};

class Pass {
 public:
  // `outs`: the results, dense. `inputs`: laid out as they are; an empty one lies in the tile, of form `tiled`.
  Pass(const std::vector<OptionalTensor>& inputs, std::vector<Tensor>& outs, const std::vector<Tensor>& constants,
       const std::vector<Tensor>& tables, const Ints& flat, int64_t tiled = kSingle)
      : walk_(outs[0], {}, outs[0].dim() > 1 ? Axis(1) : std::nullopt), steps_(parse(flat)) {
    for (const auto& x : inputs)
      places_.push_back({x ? static_cast<char*>(const_cast<void*>(x->const_data_ptr())) : nullptr, x ? form_of(*x) : tiled});
    for (Tensor& y : outs) places_.push_back({static_cast<char*>(y.mutable_data_ptr()), form_of(y)});
    for (const Step& s : steps_)
      if (s.kind == kScaled && static_cast<size_t>(s.target) >= places_.size()) between_[s.target - places_.size()] = kSingle;
    for (const Tensor& c : constants) rows_.emplace_back(c, walk_);
    for (const Tensor& t : tables) held_.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
  }

  int64_t numel() const { return walk_.numel; }
  std::vector<Tries> tries() const { return std::vector<Tries>(rows_.size()); }

  // Maps the elements [first, last) in the memory order of the results; `tile` begins at the first of them.
  void run(int64_t first, int64_t last, std::vector<Tries>& tries, const void* tile = nullptr) const {
    alignas(64) uint8_t between[kMost][kBlock * sizeof(float)];
    walk_.blocks(first, last, [&](const Block& b) {
      const auto place = [&](int64_t p) -> void* {
        const auto k = static_cast<size_t>(p);
        if (k >= places_.size()) return between[k - places_.size()];
        if (places_[k].at) return places_[k].at + b.out * kWidth[places_[k].form];
        return static_cast<char*>(const_cast<void*>(tile)) + (b.out - first) * kWidth[places_[k].form];
      };
      for (const Step& s : steps_) map(s, b, place, tries);
    });
  }

 private:
  static constexpr int64_t kWidth[] = {4, 8, 1};  // bytes of an element, by form

  template <class At>
  void map(const Step& s, const Block& b, const At& place, std::vector<Tries>& tries) const {
    const void* second = s.other < 0 ? nullptr : place(s.other);
    if (s.kind == kTable) {
      look_up(static_cast<uint8_t*>(place(s.source)), static_cast<const uint8_t*>(second), static_cast<uint8_t*>(place(s.target)), b.n,
              data<uint8_t>(held_[s.at]));
      return;
    }
    with_kind(s.kind, [&](auto kind) {
      constexpr int64_t K = decltype(kind)::value;
      with_form(form_at(s.target), [&](auto out) {
        auto* to = static_cast<decltype(out)*>(place(s.target));
        if (second) {
          if constexpr (K != kScaled) {
            map_block<K, true>(static_cast<const uint8_t*>(place(s.source)), second, to, b.n, rows_[s.at], b.channel,
                               tries[s.at]);
            return;
          }
        }
        with_form(form_at(s.source), [&](auto in) {
          if constexpr (K == kScaled) {
            if (second) {
              map_block<K, true>(static_cast<const decltype(in)*>(place(s.source)), second, to, b.n, rows_[s.at], b.channel,
                                 tries[s.at]);
              return;
            }
          }
          map_block<K, false>(static_cast<const decltype(in)*>(place(s.source)), second, to, b.n, rows_[s.at], b.channel,
                              tries[s.at]);
        });
      });
    });
  }

  int64_t form_at(int64_t p) const { return static_cast<size_t>(p) < places_.size() ? places_[p].form : between_[p - places_.size()]; }

  Walk walk_;
  std::vector<Step> steps_;
  std::vector<Place> places_;
  int64_t between_[kMost] = {kByte, kByte, kByte, kByte};  // forms of what lies in between
  std::vector<Rows> rows_;
  std::vector<Tensor> held_;
};

}  // namespace qexp::regrid
