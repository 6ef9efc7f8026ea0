// Convolution with every product rounded and saturated, in registers; see reference.py.
//
// A product is rounded by one fused multiply-add: `fma(w 2^f, x, 1.5 * 2^23)` has a unit in the last place of one, so
// the hardware rounds the exact product to an integer, half to even, and the low bits of the result are that integer.
// Saturation is a minimum and a maximum, and sums of codes are sums of bit patterns. What this does not cover (other
// roundings, partial sums that saturate, wide formats, values that are not finite) takes the float64 path.

#include <algorithm>
#include <vector>

#include "../common/numbers.h"
#include "../common/rounding.h"
#include "../common/walk.h"
#include "lanes.h"

namespace qexp {
namespace {

constexpr int kVectors = 2;                            // vectors of lanes a tile
constexpr int kWidth = Lanes::kLanes * kVectors;       // what a tile holds on its vector side ...
constexpr int kDepth = 4;                              // ... and on its broadcast side
constexpr float kMagic = 12582912.0f;                  // 1.5 * 2^23
constexpr uint32_t kMagicBits = 0x4B400000u;

struct Format {
  double low, high, one;  // codes, and the value of 1.0 in codes
  bool per_add, fast;
  Rounding rounding;
};

// The side of the products that is broadcast: element (p, k) is data[p * row + k * step].
struct Scalars {
  const float* data;
  int64_t row, step;
  float at(int64_t p, int64_t k) const { return data[p * row + k * step]; }
};

// sums[p][l] = sum over k of the rounded products a[k][l] b(p, k), l < kWidth, p < P. In the fast tile one side comes
// in output steps.
template <int P>
void fast_tile(const float* a, Scalars b, int64_t terms, const Format& format, double* sums) {
  const auto magic = Lanes::set(kMagic);
  const auto low = Lanes::set(kMagic + static_cast<float>(format.low));
  const auto high = Lanes::set(kMagic + static_cast<float>(format.high));
  Lanes::Int total[P][kVectors];
  for (auto& row : total)
    for (auto& t : row) t = Lanes::zero();
  for (int64_t k = 0; k < terms; ++k) {
    Lanes::Float v[kVectors];
    for (int i = 0; i < kVectors; ++i) v[i] = Lanes::load(a + k * kWidth + i * Lanes::kLanes);
    for (int p = 0; p < P; ++p) {
      const auto scalar = Lanes::set(b.at(p, k));
      for (int i = 0; i < kVectors; ++i)
        total[p][i] = Lanes::add_bits(total[p][i], Lanes::clamp(Lanes::fma(v[i], scalar, magic), low, high));
    }
  }
  const uint32_t bias = static_cast<uint32_t>(terms) * kMagicBits;
  alignas(64) int32_t raw[kWidth];
  for (int p = 0; p < P; ++p) {
    for (int i = 0; i < kVectors; ++i) Lanes::store(raw + i * Lanes::kLanes, total[p][i]);
    for (int l = 0; l < kWidth; ++l)
      sums[p * kWidth + l] = static_cast<int32_t>(static_cast<uint32_t>(raw[l]) - bias);
  }
}

// One row of sums. (A sum of codes is a whole number: rounding it changes nothing, so only its clip is there.)
template <Rounding R, bool A>
void exact_tile(const float* a, Scalars b, int64_t terms, const Format& format, double* sums) {
  std::fill_n(sums, kWidth, 0.0);
  for (int64_t k = 0; k < terms; ++k) {
    const double scalar = static_cast<double>(b.at(0, k)) * format.one;
    for (int l = 0; l < kWidth; ++l) {
      const double product = clamp(round_to<R>(a[k * kWidth + l] * scalar, 0.0), format.low, format.high);
      const double sum = sums[l] + product;
      sums[l] = A ? clamp(sum, format.low, format.high) : sum;
    }
  }
}

using Tile = void (*)(const float*, Scalars, int64_t, const Format&, double*);

Tile pick_exact(const Format& format) {
  return with_rounding(format.rounding, [&](auto r) -> Tile {
    constexpr Rounding R = decltype(r)::value;
    return format.per_add ? exact_tile<R, true> : exact_tile<R, false>;
  });
}

struct Shape {
  int64_t n, channels, height, width;              // input channels of one group
  int64_t outputs, rows, columns, pixels;          // output channels of one group
  int64_t kernel_height, kernel_width, terms, groups;
  Ints stride, padding, dilation;
};

// `count` rows [terms] as panels [terms][kWidth], zeros where rows run out.
void pack(const float* rows, int64_t count, int64_t terms, float* panels) {
  for (int64_t first = 0; first < count; first += kWidth)
    for (int64_t k = 0; k < terms; ++k)
      for (int64_t i = 0; i < kWidth; ++i) *panels++ = first + i < count ? rows[(first + i) * terms + k] : 0.0f;
}

// The inputs of `count` <= kWidth output pixels of one image and group as a panel [terms][kWidth], times `factor`.
void unfold(const float* image, const Ints& strides, const Shape& s, int64_t first, int64_t count, float factor,
            float* panel) {
  for (int64_t i = 0; i < count; ++i) {
    float* to = panel + i;
    const int64_t top = (first + i) / s.columns * s.stride[0] - s.padding[0];
    const int64_t left = (first + i) % s.columns * s.stride[1] - s.padding[1];
    for (int64_t c = 0; c < s.channels; ++c)
      for (int64_t r = 0; r < s.kernel_height; ++r) {
        const int64_t y = top + r * s.dilation[0];
        const float* line = image + c * strides[1] + y * strides[2];
        for (int64_t q = 0; q < s.kernel_width; ++q, to += kWidth) {
          const int64_t x = left + q * s.dilation[1];
          *to = y >= 0 && y < s.height && x >= 0 && x < s.width ? line[x * strides[3]] * factor : 0.0f;
        }
      }
  }
}

bool all_finite(const Tensor& t) {
  const float* p = data<float>(t);
  bool finite = true;
  for (int64_t i = 0; i < t.numel(); ++i) finite &= std::fabs(p[i]) < INFINITY;
  return finite;
}

// Whether the inputs survive scaling by 2^f in float32, to the last bit.
bool scales_exactly(const Tensor& t, double one) {
  const float* p = data<float>(t);
  bool exact = true;
  for (int64_t i = 0; i < t.numel(); ++i) exact &= static_cast<double>(static_cast<float>(p[i] * one)) == p[i] * one;
  return exact;
}

// Computes the outputs of one group. Pixels are the vector side and the weights are read where they lie; with few
// pixels (a linear layer, a small batch) the weights are packed to be the vector side instead.
class Group {
 public:
  Group(const Shape& s, const Format& format, const float* weight, const double* bias)
      : s_(s), f_(format), weight_(weight), bias_(bias), four_(fast_tile<kDepth>), single_(format.fast ? fast_tile<1> : pick_exact(format)) {
    if (s.pixels >= kWidth / 2 || s.outputs < kWidth / 2) return;
    packed_.resize((s.outputs + kWidth - 1) / kWidth * kWidth * s.terms);
    pack(weight, s.outputs, s.terms, packed_.data());
  }

  // write(channel, pixel, value) for the output channels [from, to), `from` a multiple of kWidth, and `count` pixels.
  template <class Write>
  void run(const float* panel, int64_t count, int64_t from, int64_t to, Write&& write) const {
    if (packed_.empty()) {
      each(panel, {weight_ + from * s_.terms, s_.terms, 1}, to - from, [&](int64_t p, int64_t l, double sum) {
        if (l < count) write(from + p, l, finish(sum, from + p));
      });
      return;
    }
    for (int64_t v = from; v < to; v += kWidth)
      each(packed_.data() + v * s_.terms, {panel, 1, kWidth}, count, [&](int64_t p, int64_t l, double sum) {
        if (v + l < to) write(v + l, p, finish(sum, v + l));
      });
  }

 private:
  // f(p, l, sum) for `count` scalars and every lane.
  template <class F>
  void each(const float* vectors, Scalars scalars, int64_t count, F&& f) const {
    alignas(64) double sums[kDepth * kWidth];
    for (int64_t p = 0; p < count;) {
      const int64_t depth = f_.fast && count - p >= kDepth ? kDepth : 1;
      const Scalars here{scalars.data + p * scalars.row, scalars.row, scalars.step};
      (depth == 1 ? single_ : four_)(vectors, here, s_.terms, f_, sums);
      for (int64_t i = 0; i < depth; ++i, ++p)
        for (int64_t l = 0; l < kWidth; ++l) f(p, l, sums[i * kWidth + l]);
    }
  }
  double finish(double sum, int64_t channel) const {
    double q = clamp(sum, f_.low, f_.high);
    if (bias_) q = clamp(rounded(q + bias_[channel]), f_.low, f_.high);
    return q / f_.one;
  }
  double rounded(double v) const {
    if (f_.rounding == Rounding::half_even) return round_to<Rounding::half_even>(v, 0.0);
    return with_rounding(f_.rounding, [&](auto r) { return round_to<decltype(r)::value>(v, 0.0); });
  }

  const Shape& s_;
  const Format& f_;
  const float* weight_;
  const double* bias_;
  Tile four_, single_;
  std::vector<float> packed_;
};

Tensor conv2d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Ints& stride,
              const Ints& padding, const Ints& dilation, int64_t groups, int64_t bits, int64_t fraction_bits,
              std::string_view accumulate, std::string_view rounding) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4 && x.size(1) == weight.size(1) * groups, "weight: does not fit x");
  auto extent = [&](int d) {
    return (x.size(d + 2) + 2 * padding[d] - dilation[d] * (weight.size(d + 2) - 1) - 1) / stride[d] + 1;
  };
  Shape s{x.size(0), weight.size(1), x.size(2), x.size(3), weight.size(0) / groups, extent(0), extent(1), 0,
          weight.size(2), weight.size(3), 0, groups, stride, padding, dilation};
  s.pixels = s.rows * s.columns;
  s.terms = s.channels * s.kernel_height * s.kernel_width;
  const bool last = is_channels_last(x) && !x.is_contiguous();
  Tensor out = torch::stable::empty({s.n, weight.size(0), s.rows, s.columns}, x.scalar_type(), std::nullopt, x.device(),
                                    std::nullopt, last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  if (out.numel() == 0) return out;

  Format f{-std::ldexp(1.0, bits - 1), std::ldexp(1.0, bits - 1) - 1, std::ldexp(1.0, fraction_bits),
           accumulate == "per_add", false, parse_rounding(rounding)};
  const Tensor given = torch::stable::to(x, ScalarType::Float);
  const Tensor plain = torch::stable::contiguous(torch::stable::to(weight, ScalarType::Float));
  const Tensor input = is_dense(given) ? given : torch::stable::contiguous(given);
  f.fast = !f.per_add && f.rounding == Rounding::half_even && bits <= 22 && s.terms < (int64_t{1} << (32 - bits)) &&
           all_finite(input) && all_finite(plain) && scales_exactly(input, f.one);
  const float factor = f.fast ? static_cast<float>(f.one) : 1.0f;
  std::vector<double> biases;
  if (bias) {
    for (const float b : values_of<float>(*bias)) biases.push_back(b * f.one);
  }
  std::vector<Group> parts;
  parts.reserve(groups);
  for (int64_t g = 0; g < groups; ++g)
    parts.emplace_back(s, f, data<float>(plain) + g * s.outputs * s.terms,
                       bias ? biases.data() + g * s.outputs : nullptr);

  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    T* to = writable<T>(out);
    const float* from = data<float>(input);
    const Ints in(input.strides().begin(), input.strides().end());
    const Ints to_stride(out.strides().begin(), out.strides().end());
    const int64_t tiles = (s.pixels + kWidth - 1) / kWidth, pieces = s.n * groups * tiles;
    // Few pieces: share the output channels between threads too.
    const int64_t wanted = std::clamp<int64_t>(2 * int64_t{torch::stable::get_num_threads()} / pieces, 1, (s.outputs + kWidth - 1) / kWidth);
    const int64_t share = ((s.outputs + wanted - 1) / wanted + kWidth - 1) / kWidth * kWidth;
    const int64_t splits = (s.outputs + share - 1) / share;
    torch::stable::parallel_for(0, pieces * splits, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> panel(kWidth * s.terms, 0.0f);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t split = task % splits, piece = task / splits;
        const int64_t first = piece % tiles * kWidth, g = piece / tiles % groups, n = piece / tiles / groups;
        const int64_t count = std::min<int64_t>(kWidth, s.pixels - first);
        unfold(from + n * in[0] + g * s.channels * in[1], in, s, first, count, factor, panel.data());
        T* image = to + n * to_stride[0] + g * s.outputs * to_stride[1];
        const auto write = [&](int64_t channel, int64_t pixel, double value) {
          const int64_t p = first + pixel;
          image[channel * to_stride[1] + p / s.columns * to_stride[2] + p % s.columns * to_stride[3]] =
              static_cast<T>(static_cast<Compute<T>>(value));
        };
        parts[g].run(panel.data(), count, split * share, std::min(s.outputs, (split + 1) * share), write);
      }
    });
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(qexp, CPU, m) { m.impl("fixed_point_conv2d", TORCH_BOX(&conv2d)); }

}  // namespace
}  // namespace qexp
