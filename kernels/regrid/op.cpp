// Several results of one pass on the CPU; see reference.py.
#include "../common/walk.h"
#include "rows.h"
#include "single.h"
#include "steps.h"

namespace qexp {
namespace {

using namespace regrid;

template <class T>
T kept(double y) {
  if constexpr (std::is_same_v<T, uint8_t>) {
    return static_cast<uint8_t>(static_cast<int32_t>(y));
  } else {
    return static_cast<T>(y);
  }
}

template <int64_t K, bool Two, class I, class O>
void map_exactly(const I* __restrict x, const uint8_t* __restrict z, O* __restrict y, int64_t n, const Rows& rows,
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
void map_block(const I* x, const uint8_t* z, O* y, int64_t n, const Rows& rows, int64_t channel, Tries& tries) {
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

void look_up(const uint8_t* __restrict a, const uint8_t* __restrict b, uint8_t* __restrict y, int64_t n,
             const uint8_t* __restrict table) {
  if (b) {
    for (int64_t i = 0; i < n; ++i) y[i] = table[a[i] * 256 + b[i]];
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = table[a[i]];
  }
}

std::vector<Tensor> forward(const std::vector<Tensor>& given, const std::vector<Tensor>& constants,
                            const std::vector<Tensor>& tables, const Ints& flat, const Ints& forms) {
  const std::vector<Step> steps = parse(flat);
  std::vector<Tensor> places, outs;
  for (const int64_t form : forms) outs.push_back(empty_as(given[0], type_of(form)));
  for (const Tensor& x : given) places.push_back(as_laid_out(x, outs[0]));
  places.insert(places.end(), outs.begin(), outs.end());
  const Walk walk(outs[0], {}, given[0].dim() > 1 ? Axis(1) : std::nullopt);
  std::vector<Rows> rows;
  for (const Tensor& c : constants) rows.emplace_back(c, walk);
  std::vector<Tensor> held;
  for (const Tensor& t : tables) held.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
  std::vector<char*> base;
  std::vector<int64_t> form;
  for (size_t p = 0; p < places.size(); ++p) {
    const void* at = p < given.size() ? places[p].const_data_ptr() : places[p].mutable_data_ptr();
    base.push_back(static_cast<char*>(const_cast<void*>(at)));
    form.push_back(form_of(places[p]));
  }
  constexpr int64_t kWidth[] = {4, 8, 1};
  torch::stable::parallel_for(0, walk.numel, kGrain, [&](int64_t first, int64_t last) {
    alignas(64) uint8_t between[kMost][kBlock];
    std::vector<Tries> tries(rows.size());
    walk.blocks(first, last, [&](const Block& b) {
      const auto place = [&](int64_t p) {
        const auto k = static_cast<size_t>(p);
        if (k < base.size()) return static_cast<void*>(base[k] + b.out * kWidth[form[k]]);
        return static_cast<void*>(between[k - base.size()]);
      };
      const auto form_at = [&](int64_t p) { return static_cast<size_t>(p) < form.size() ? form[p] : int64_t{kByte}; };
      for (const Step& s : steps) {
        if (s.kind == kTable) {
          look_up(static_cast<uint8_t*>(place(s.source)), s.other < 0 ? nullptr : static_cast<uint8_t*>(place(s.other)),
                  static_cast<uint8_t*>(place(s.target)), b.n, data<uint8_t>(held[s.at]));
          continue;
        }
        const auto* second = s.other < 0 ? nullptr : static_cast<const uint8_t*>(place(s.other));
        with_kind(s.kind, [&](auto kind) {
          with_form(form_at(s.target), [&](auto out) {
            auto* to = static_cast<decltype(out)*>(place(s.target));
            if (second) {
              map_block<decltype(kind)::value, true>(static_cast<const uint8_t*>(place(s.source)), second, to, b.n,
                                                     rows[s.at], b.channel, tries[s.at]);
              return;
            }
            with_form(form_at(s.source), [&](auto in) {
              map_block<decltype(kind)::value, false>(static_cast<const decltype(in)*>(place(s.source)), second, to,
                                                      b.n, rows[s.at], b.channel, tries[s.at]);
            });
          });
        });
      }
    });
  });
  return outs;
}

STABLE_TORCH_LIBRARY_IMPL(qexp, CPU, m) { m.impl("regrid", TORCH_BOX(&forward)); }

}  // namespace
}  // namespace qexp
