// Walks tensors of any layout in the memory order of the output, a block at a time and without copying them.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <vector>

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
  Walk(const at::Tensor& out, std::initializer_list<const at::Tensor*> inputs, std::optional<int64_t> axis)
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

// A parameter with one element or one a channel, repeated where the channel varies inside a block.
template <class C>
class Table {
 public:
  Table(const at::Tensor& parameter, const Walk& walk) {
    const at::Tensor p = parameter.detach().to(c10::CppTypeToScalarType<C>::value).contiguous();
    const C* from = p.const_data_ptr<C>();
    shared_ = p.numel() == 1;
    const int64_t n = walk.varies ? walk.channels + kBlock : p.numel();
    data_.resize(n);
    for (int64_t i = 0, c = 0; i < n; ++i, c = c + 1 == p.numel() ? 0 : c + 1) data_[i] = from[c];
    shared_ = shared_ && !walk.varies;
  }
  Table(C value, const Walk& walk) : data_(walk.varies ? walk.channels + kBlock : 1, value), shared_(!walk.varies) {}

  const C* at(int64_t channel) const { return data_.data() + (shared_ ? 0 : channel); }
  template <class F>
  void apply(F&& f) {
    for (auto& v : data_) v = f(v);
  }
  C& operator[](int64_t i) { return data_[i]; }
  int64_t size() const { return static_cast<int64_t>(data_.size()); }

 private:
  std::vector<C> data_;
  bool shared_;
};

}  // namespace qexp
