// Convolution with every product rounded and saturated, on a CUDA device; see reference.py and op.cpp. A block computes a tile of pixels
// and output channels from pieces of both operands in shared memory; no tensor of products or of unfolded inputs exists.
#include <cstring>

#include "../common/device.cuh"
#include "../common/elementwise.cuh"

namespace qexp {
namespace {

constexpr int kDepth = 8;               // terms in shared memory at a time
constexpr float kMagic = 12582912.0f;   // 1.5 * 2^23: added to a product, it leaves the rounded product in the low bits
constexpr uint32_t kMagicBits = 0x4B400000u;

struct Shape {
  int64_t channels, height, width;  // input channels of one group
  int64_t outputs, rows, columns, pixels;  // output channels of one group; pixels of all images
  int64_t kernel_height, kernel_width, terms, groups;
  int64_t stride[2], padding[2], dilation[2], in[4], out[4];
};

struct Format {
  double low, high, one;  // codes, and the value of 1.0 in codes
  bool per_add, may_be_fast;
  Rounding rounding;
};

// Counts the elements that are not finite, or (of x) that scaling by 2^f changes in float32.
struct NotExact {
  const float *x, *weight;
  int64_t inputs;
  double one;

  __device__ __forceinline__ void operator()(int64_t i, double* terms) const {
    const float v = i < inputs ? x[i] : weight[i - inputs];
    const double scaled = v * one;
    const bool exact = i >= inputs || static_cast<double>(static_cast<float>(scaled)) == scaled;
    terms[0] = fabsf(v) < INFINITY && exact ? 0.0 : 1.0;
  }
};

// The input that output pixel `pixel` of group `group` multiplies with term `k`.
__device__ __forceinline__ float input_at(const float* x, const Shape& s, int64_t group, int64_t pixel, int64_t k) {
  if (pixel >= s.pixels || k >= s.terms) return 0.0f;
  const int64_t c = k / (s.kernel_height * s.kernel_width), r = k / s.kernel_width % s.kernel_height;
  const int64_t n = pixel / (s.rows * s.columns), row = pixel / s.columns % s.rows;
  const int64_t y = row * s.stride[0] - s.padding[0] + r * s.dilation[0];
  const int64_t z = pixel % s.columns * s.stride[1] - s.padding[1] + k % s.kernel_width * s.dilation[1];
  if (y < 0 || y >= s.height || z < 0 || z >= s.width) return 0.0f;
  return x[n * s.in[0] + (group * s.channels + c) * s.in[1] + y * s.in[2] + z * s.in[3]];
}

// Rounds by one fused multiply-add and sums bit patterns.
struct Fast {
  using Sum = uint32_t;
  float low, high, one;

  __device__ explicit Fast(const Format& f)
      : low(kMagic + static_cast<float>(f.low)), high(kMagic + static_cast<float>(f.high)),
        one(static_cast<float>(f.one)) {}
  __device__ __forceinline__ void add(Sum& sum, float x, float w) const {
    const float product = fminf(fmaxf(fmaf(x * one, w, kMagic), low), high);
    uint32_t bits;
    memcpy(&bits, &product, sizeof bits);
    sum += bits;
  }
  __device__ __forceinline__ double total(Sum sum, int64_t terms) const {
    return static_cast<int32_t>(sum - static_cast<uint32_t>(terms) * kMagicBits);
  }
};

struct Exact {
  using Sum = double;
  Format f;

  __device__ explicit Exact(const Format& format) : f(format) {}
  __device__ __forceinline__ void add(Sum& sum, float x, float w) const {
    const double product = static_cast<double>(x) * (static_cast<double>(w) * f.one);
    sum += clamp(round_any(f.rounding, product, 0.0), f.low, f.high);
    if (f.per_add) sum = clamp(sum, f.low, f.high);
  }
  __device__ __forceinline__ double total(Sum sum, int64_t) const { return sum; }
};

// A thread computes P x P of the tile's (P * across) x (P * down) pixels and outputs; across * down = kThreads.
template <int P, int across, int down, class Rule, class T, class A, class B>
__device__ void compute_tile(const float* x, const float* weight, const double* bias, T* out, const Shape& s,
                             const Format& f, int64_t tile, A a, B b) {
  const int64_t wide = P * across, high = P * down, pixel_tiles = (s.pixels + wide - 1) / wide;
  const int64_t output_tiles = (s.outputs + high - 1) / high, group = tile / (pixel_tiles * output_tiles);
  const int64_t first_pixel = tile / output_tiles % pixel_tiles * wide, first_output = tile % output_tiles * high;
  const int column = threadIdx.y % across, row = threadIdx.y / across;
  const Rule rule(f);
  typename Rule::Sum sums[P][P] = {};
  for (int64_t k = 0; k < s.terms; k += kDepth) {
    for (int i = threadIdx.y; i < kDepth * wide; i += kThreads)
      a[i] = input_at(x, s, group, first_pixel + i % wide, k + i / wide);
    for (int i = threadIdx.y; i < kDepth * high; i += kThreads) {
      const int64_t output = first_output + i % high, term = k + i / high;
      b[i] = output < s.outputs && term < s.terms ? weight[(group * s.outputs + output) * s.terms + term] : 0.0f;
    }
    __syncthreads();
    const int depth = static_cast<int>(s.terms - k < kDepth ? s.terms - k : kDepth);
    for (int d = 0; d < depth; ++d) {
      float inputs[P], weights[P];
      for (int p = 0; p < P; ++p) inputs[p] = a[d * wide + p * across + column];
      for (int p = 0; p < P; ++p) weights[p] = b[d * high + p * down + row];
      for (int p = 0; p < P; ++p)
        for (int q = 0; q < P; ++q) rule.add(sums[p][q], inputs[p], weights[q]);
    }
    __syncthreads();
  }
  for (int p = 0; p < P; ++p)
    for (int q = 0; q < P; ++q) {
      const int64_t pixel = first_pixel + p * across + column, output = first_output + q * down + row;
      if (pixel >= s.pixels || output >= s.outputs) continue;
      const int64_t channel = group * s.outputs + output;
      double v = clamp(rule.total(sums[p][q], s.terms), f.low, f.high);
      if (bias) v = clamp(round_any(f.rounding, v + bias[channel] * f.one, 0.0), f.low, f.high);
      const int64_t n = pixel / (s.rows * s.columns);
      out[n * s.out[0] + channel * s.out[1] + pixel / s.columns % s.rows * s.out[2] + pixel % s.columns * s.out[3]] =
          static_cast<T>(static_cast<Compute<T>>(v / f.one));
    }
}

// not_exact[0] is what NotExact counted.
template <int P, int across, int down, class T>
__global__ void __launch_bounds__(kThreads)
    convolve(const float* __restrict__ x, const float* __restrict__ weight, const double* __restrict__ bias,
             const double* __restrict__ not_exact, T* __restrict__ out, Shape s, Format f, int64_t tiles) {
  QEXP_SHARED(float, a, kDepth * P * across);
  QEXP_SHARED(float, b, kDepth * P * down);
  const bool fast = f.may_be_fast && not_exact[0] == 0;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    if (fast) {
      compute_tile<P, across, down, Fast>(x, weight, bias, out, s, f, tile, a, b);
    } else {
      compute_tile<P, across, down, Exact>(x, weight, bias, out, s, f, tile, a, b);
    }
  }
}

template <int P, int across, int down, class T>
void start(const Tensor& x, const Tensor& weight, const Held<double>& bias, const Tensor& not_exact, Tensor& out,
           const Shape& s, const Format& f) {
  const int64_t tiles = s.groups * up(s.pixels, P * across) * up(s.outputs, P * down);
  launch(convolve<P, across, down, T>, dim3(std::min(tiles, kMaxBlocks)), dim3(1, kThreads), 0, x, data<float>(x),
         data<float>(weight), bias.view().data, data<double>(not_exact), writable<T>(out), s, f, tiles);
}

Tensor conv2d(const Tensor& given, const Tensor& weight, const OptionalTensor& bias, const Ints& stride,
              const Ints& padding, const Ints& dilation, int64_t groups, int64_t bits, int64_t fraction_bits,
              std::string_view accumulate, std::string_view rounding) {
  STD_TORCH_CHECK(given.dim() == 4 && weight.dim() == 4 && given.size(1) == weight.size(1) * groups, "weight: does not fit x");
  const auto extent = [&](int d) {
    return (given.size(d + 2) + 2 * padding[d] - dilation[d] * (weight.size(d + 2) - 1) - 1) / stride[d] + 1;
  };
  const int64_t rows = extent(0), columns = extent(1);
  const bool last = is_channels_last(given) && !given.is_contiguous();
  Tensor out = torch::stable::empty({given.size(0), weight.size(0), rows, columns}, given.scalar_type(), std::nullopt,
                                    given.device(), std::nullopt,
                                    last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  if (out.numel() == 0) return out;
  const Tensor floats = torch::stable::to(given, ScalarType::Float);
  const Tensor x = is_dense(floats) ? floats : torch::stable::contiguous(floats);
  const Tensor w = torch::stable::contiguous(torch::stable::to(weight, ScalarType::Float));
  const Held<double> b(Parameter(bias ? OptionalTensor(torch::stable::to(*bias, ScalarType::Float)) : bias, 0.0));
  Shape s{weight.size(1), given.size(2), given.size(3), weight.size(0) / groups, rows, columns,
          given.size(0) * rows * columns, weight.size(2), weight.size(3),
          weight.size(1) * weight.size(2) * weight.size(3), groups, {}, {}, {}, {}, {}};
  for (int d = 0; d < 2; ++d) s.stride[d] = stride[d], s.padding[d] = padding[d], s.dilation[d] = dilation[d];
  for (int d = 0; d < 4; ++d) s.in[d] = x.stride(d), s.out[d] = out.stride(d);
  Format f{-std::ldexp(1.0, bits - 1), std::ldexp(1.0, bits - 1) - 1, std::ldexp(1.0, fraction_bits),
           accumulate == "per_add", false, parse_rounding(rounding)};
  f.may_be_fast = !f.per_add && f.rounding == Rounding::half_even && bits <= 22 && s.terms < (int64_t{1} << (32 - bits));
  const NotExact looked_at{data<float>(x), data<float>(w), x.numel(), f.one};
  const Tensor not_exact = launch_sums<1>(f.may_be_fast ? x.numel() + w.numel() : 0, x, looked_at);
  with_type(given, [&](auto tag) {
    using T = decltype(tag);
    if (s.outputs >= 8) {
      start<4, 16, 16, T>(x, w, b, not_exact, out, s, f);
    } else {  // a depthwise convolution: one output channel to a tile
      start<1, kThreads, 1, T>(x, w, b, not_exact, out, s, f);
    }
  });
  return out;
}

QEXP_LIBRARY_IMPL(m) { m.impl("fixed_point_conv2d", TORCH_BOX(&conv2d)); }

}  // namespace
}  // namespace qexp
