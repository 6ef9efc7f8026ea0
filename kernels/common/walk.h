// Walks tensors of any layout in the memory order of the output, a block at a time and without copying them.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <vector>

#include "numbers.h"
#include "uniform.h"

namespace qexp {

constexpr int64_t kBlock = 1024;  // 4 KiB of float32: a block and its parameters stay in the first-level cache
constexpr int64_t kGrain = 32768;  // elements below which a second thread does not pay
constexpr int kOperands = 3;

struct Block {
  int64_t out;                        // first element of the output
  std::array<int64_t, kOperands> in;  // first element of each input
  int64_t n;                          // elements, at most kBlock
  int64_t channel;                    // channel of the first element
};

class Walk {
 public:
  int64_t numel = 0;
  int64_t channels = 1;
  bool varies = false;  // the channel changes from one element of a block to the next
  std::array<int64_t, kOperands> stride{};

  // `out` is dense (in any order of its dimensions); `inputs` have its shape and any strides.
  Walk(const Tensor& out, std::initializer_list<const Tensor*> inputs, Axis axis)
      : numel(out.numel()) {
    std::vector<int64_t> order;
    for (int64_t d = 0; d < out.dim(); ++d)
      if (out.size(d) != 1) order.push_back(d);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return out.stride(a) > out.stride(b); });
    if (axis && out.size(*axis) != 1) channels = out.size(*axis);
    for (auto d = order.rbegin(); d != order.rend(); ++d) {  // innermost first
      Dim dim{out.size(*d), {}, channels > 1 && axis && *d == *axis};
      int k = 0;
      for (const auto* t : inputs) dim.stride[k++] = t->stride(*d);
      if (!dims_.empty() && joins(dim, dims_.back())) {
        dims_.back().size *= dim.size;
      } else {
        dims_.push_back(dim);
      }
    }
    if (dims_.empty()) dims_.push_back({1, {}, false});
    stride = dims_[0].stride;
    varies = dims_[0].channel;
  }

  // Calls f(Block) for the output elements [begin, end).
  template <class F>
  void blocks(int64_t begin, int64_t end, F&& f) const {
    if (begin >= end) return;
    std::vector<int64_t> index(dims_.size());
    int64_t rest = begin;
    for (size_t d = 0; d < dims_.size(); ++d) {
      index[d] = rest % dims_[d].size;
      rest /= dims_[d].size;
    }
    while (begin < end) {
      Block b{begin, {}, 0, 0};
      for (size_t d = 0; d < dims_.size(); ++d) {
        for (int k = 0; k < kOperands; ++k) b.in[k] += index[d] * dims_[d].stride[k];
        if (dims_[d].channel) b.channel = index[d] % channels;
      }
      const int64_t run = std::min(dims_[0].size - index[0], end - begin);
      for (int64_t done = 0; done < run; done += b.n) {
        b.n = std::min(length(b.channel), run - done);
        f(static_cast<const Block&>(b));
        b.out += b.n;
        for (int k = 0; k < kOperands; ++k) b.in[k] += b.n * stride[k];
        if (varies) b.channel = (b.channel + b.n) % channels;
      }
      begin += run;
      index[0] += run;
      for (size_t d = 0; d + 1 < dims_.size() && index[d] == dims_[d].size; ++d) {
        index[d] = 0;
        ++index[d + 1];
      }
    }
  }

  // The channels [first, end) that the output elements [begin, end) lie in; all of them where they take turns (an outermost dimension
  // that is longer than the channels goes through them again for each image).
  std::array<int64_t, 2> channels_of(int64_t begin, int64_t end) const {
    if (varies || !dims_.back().channel || dims_.back().size != channels || begin >= end) return {0, channels};
    const int64_t run = numel / channels;
    return {begin / run, (end - 1) / run + 1};
  }

  // Pieces of the output for reductions: their number does not depend on the number of threads, nor does the sum.
  int64_t chunks() const { return std::clamp<int64_t>(numel / 65536, 1, 64); }
  int64_t chunk_begin(int64_t k) const { return numel / chunks() * k + std::min(k, numel % chunks()); }

 private:
  struct Dim {
    int64_t size;
    std::array<int64_t, kOperands> stride;
    bool channel;
  };

  // Elements of the next block. Where the channel varies, blocks are whole rows of channels once they start at one.
  int64_t length(int64_t channel) const {
    if (!varies || channels > kBlock) return kBlock;
    return channel == 0 ? kBlock / channels * channels : channels - channel;
  }

  // Whether `outer` continues where `inner` ends. Channels that are innermost repeat along the joined dimension.
  bool joins(const Dim& outer, const Dim& inner) const {
    if (outer.channel || (inner.channel && dims_.size() > 1)) return false;
    for (int k = 0; k < kOperands; ++k)
      if (outer.stride[k] != inner.stride[k] * inner.size) return false;
    return true;
  }

  std::vector<Dim> dims_;  // innermost first
};

// The elements of a parameter, or its fallback.
template <class C>
std::vector<C> values_of(const Parameter& p) {
  if (!p.tensor) return {static_cast<C>(p.fallback)};
  const Tensor t = p.tensor->is_contiguous() ? *p.tensor : torch::stable::contiguous(*p.tensor);
  const int64_t n = p.numel();
  std::vector<C> values(n);
  with_type(t, [&](auto tag) {
    using P = Compute<decltype(tag)>;
    const auto* from = data<decltype(tag)>(t) + p.row * n;
    for (int64_t i = 0; i < n; ++i) {
      const P v = static_cast<P>(from[i]);
      values[i] = static_cast<C>((p.magnitude ? std::fabs(v) : v) / static_cast<P>(p.divisor));
    }
  });
  return values;
}

// A parameter with one element or one per channel, repeated where the channel varies inside a block.
template <class C>
class Table {
 public:
  Table(const Parameter& parameter, const Walk& walk) : data_(values_of<C>(parameter)) {
    const size_t n = data_.size();
    shared_ = n == 1 && !walk.varies;
    if (!walk.varies || n == 0) return;
    data_.resize(walk.channels + kBlock);
    for (size_t i = n; i < data_.size(); ++i) data_[i] = data_[i - n];
  }

  const C* at(int64_t channel) const { return data_.data() + (shared_ ? 0 : channel); }
  template <class F>
  void apply(F&& f) {
    for (auto& v : data_) v = f(v);
  }

 private:
  std::vector<C> data_;
  bool shared_;
};

}  // namespace qexp
