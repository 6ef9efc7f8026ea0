// Batch normalisation of a training step on a CUDA device; see reference.py.
#include "../common/elementwise.cuh"

namespace qexp {
namespace {

constexpr int kGuesses = 16;  // elements of a channel that give a first guess of its mean

// The mean of a few elements of each channel that lie far apart: sums of differences from it lose no digits.
template <class T, class C>
__global__ void __launch_bounds__(kThreads)
    guess_kernel(const T* __restrict__ x, int64_t outer, int64_t channels, int64_t inner, C* __restrict__ guess) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (channel >= channels) return;
  double sum = 0;
  for (int64_t k = 0; k < kGuesses; ++k)
    sum += static_cast<double>(static_cast<C>(x[(k * outer / kGuesses * channels + channel) * inner + 7919 * k % inner]));
  guess[channel] = sum - sum == 0 ? static_cast<C>(sum / kGuesses) : C(0);
}

// sums [2][channels]: of differences from the guess, and of their squares.
template <class C>
__global__ void __launch_bounds__(kThreads)
    moments_kernel(const double* __restrict__ sums, const C* __restrict__ guess, int64_t channels, double count,
                   C* __restrict__ mean, C* __restrict__ variance) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= channels) return;
  const double off = sums[c] / count, square = sums[channels + c] / count - off * off;
  mean[c] = static_cast<C>(guess[c] + off);
  variance[c] = static_cast<C>(square < 0 ? 0 : square);
}

// What the gradient of x takes from the sums [2][channels].
template <class C, class W>
__global__ void __launch_bounds__(kThreads)
    gradients_kernel(const double* __restrict__ sums, const W* __restrict__ weight, const C* __restrict__ variance, C eps,
                     int64_t channels, double count, C* __restrict__ down, C* __restrict__ less, W* __restrict__ dweight,
                     W* __restrict__ dbias) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= channels) return;
  const C square = variance[c] + eps, deviation = std::sqrt(square), slope = static_cast<C>(weight[c]) / deviation;
  down[c] = static_cast<C>(slope / square * sums[channels + c] / count);
  less[c] = static_cast<C>(slope * sums[c] / count);
  dweight[c] = static_cast<W>(static_cast<C>(sums[channels + c] / deviation));
  dbias[c] = static_cast<W>(static_cast<C>(sums[c]));
}

template <class C>
struct Moments {
  const C* guess;
  __device__ __forceinline__ void operator()(C x, C, int64_t channel, C& dx, C* terms) const {
    const C d = x - guess[channel];
    dx = d;
    terms[0] = d;
    terms[1] = d * d;
  }
};

// How a channel is normalised.
template <class C>
struct Line {
  const C *mean, *variance, *weight, *bias;
  C eps;
  __device__ __forceinline__ C slope(int64_t c) const { return weight[c] / std::sqrt(variance[c] + eps); }
  __device__ __forceinline__ C operator()(C x, int64_t c) const { return (x - mean[c]) * slope(c) + bias[c]; }
};

template <class T, class C>
struct Normalize {
  Line<C> line;
  const T* added;
  C low, high;
  __device__ __forceinline__ C operator()(C x, int64_t channel, int64_t i) const {
    const C v = line(x, channel);
    return clamp(added ? v + static_cast<C>(added[i]) : v, low, high);
  }
};

// The gradient that passes limits that were applied to stored values, and the sum of two gradients.
template <class T, class C>
struct Passes {
  const T *y, *more;
  C low, high;
  __device__ __forceinline__ C operator()(C g, int64_t, int64_t i) const {
    const C both = more ? g + static_cast<C>(more[i]) : g;
    if (!y) return both;
    const C limited = static_cast<C>(y[i]);
    return limited > low && limited < high ? both : C(0);
  }
};

template <class C>
struct Products {
  Line<C> line;
  bool limits;
  C low, high;
  __device__ __forceinline__ void operator()(C x, C g, int64_t channel, C& dx, C* terms) const {
    const C limited = limits ? line(x, channel) : C(0);
    dx = !limits || (limited > low && limited < high) ? g : C(0);
    terms[0] = dx;
    terms[1] = dx * (x - line.mean[channel]);
  }
};

template <class T, class C>
struct Gradient {
  Line<C> line;
  const T* x;
  const C *down, *less;
  __device__ __forceinline__ C operator()(C g, int64_t c, int64_t i) const {
    return g * line.slope(c) - (static_cast<C>(x[i]) - line.mean[c]) * down[c] - less[c];
  }
};

// Returns `x` dense with its channels outermost or innermost.
Tensor dense(const Tensor& x) {
  return x.is_contiguous() || (x.dim() == 4 && is_channels_last(x)) ? x : torch::stable::contiguous(x);
}

template <class C>
Tensor as(const Tensor& t) {
  return torch::stable::contiguous(torch::stable::to(t, scalar_type_of<C>));
}

// Returns the sums [2][channels] of all splits.
Tensor total(const Sums& sums, const Tensor& where) {
  Tensor out = empty_of({2, sums.channels}, ScalarType::Double, where);
  for (int64_t s = 0; s < 2; ++s)
    launch(finish_sums<double>, dim3(sums.channels), dim3(1, kThreads), 0, where, data<double>(sums.partial), sums.splits,
           sums.count, s, sums.channels, 1.0, 1.0, nullptr, writable<double>(out) + s * sums.channels);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& given, const Tensor& weight, const Tensor& bias,
                                           const OptionalTensor& added, double eps, double low, double high) {
  const Tensor x = dense(given);
  const Extent extent(x, 1);
  const int64_t channels = x.size(1), count = extent.numel / channels;
  const ScalarType wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor y = empty_as(x), mean = empty_of({channels}, wide, x), variance = empty_of({channels}, wide, x);
  Tensor guess = empty_of({channels}, wide, x);
  const Tensor more = added ? laid_out_as(*added, x) : x;
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    const Tensor w = as<C>(weight), b = as<C>(bias);
    launch(guess_kernel<T, C>, blocks_for(channels), kThreads, 0, x, data<T>(x), count / extent.inner, channels,
           extent.inner, writable<C>(guess));
    // `y` only lends its room here
    const Tensor sums = total(launch_backward<T, 2>(x, x, y, extent, Moments<C>{data<C>(guess)}), x);
    launch(moments_kernel<C>, blocks_for(channels), kThreads, 0, x, data<double>(sums), data<C>(guess), channels,
           static_cast<double>(count), writable<C>(mean), writable<C>(variance));
    const Line<C> line{data<C>(mean), data<C>(variance), data<C>(w), data<C>(b), static_cast<C>(eps)};
    launch_forward<T, T>(x, y, extent,
                         Normalize<T, C>{line, added ? data<T>(more) : nullptr, static_cast<C>(low), static_cast<C>(high)});
  });
  return {laid_out_as(y, empty_as(given)), mean, variance};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const OptionalTensor& more, const Tensor& given,
                                                    const OptionalTensor& y, const Tensor& weight, const Tensor& bias,
                                                    const Tensor& mean, const Tensor& variance, double eps, double low,
                                                    double high, bool added) {
  const Tensor x = dense(given), g = laid_out_as(grad, x);
  const Tensor result = y ? laid_out_as(*y, x) : x, second = more ? laid_out_as(*more, x) : x;
  const Extent extent(x, 1);
  const int64_t channels = x.size(1), count = extent.numel / channels;
  Tensor dx = empty_as(x), passed = empty_as(x);
  Tensor dweight = empty_of({channels}, weight.scalar_type(), x), dbias = empty_of({channels}, weight.scalar_type(), x);
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    using C = Compute<T>;
    const Tensor w = as<C>(weight), b = as<C>(bias), m = as<C>(mean), v = as<C>(variance);
    const Line<C> line{data<C>(m), data<C>(v), data<C>(w), data<C>(b), static_cast<C>(eps)};
    const C lowest = static_cast<C>(low), highest = static_cast<C>(high);
    const bool prepared = y || more, limits = !y && !(low == -INFINITY && high == INFINITY);
    if (prepared)
      launch_forward<T, T>(g, dx, extent,
                           Passes<T, C>{y ? data<T>(result) : nullptr, more ? data<T>(second) : nullptr, lowest, highest});
    const Tensor sums = total(
        launch_backward<T, 2>(x, prepared ? dx : g, passed, extent, Products<C>{line, limits, lowest, highest}), x);
    Tensor down = empty_of({channels}, scalar_type_of<C>, x), less = empty_of({channels}, scalar_type_of<C>, x);
    const Tensor given_weight = torch::stable::contiguous(weight);
    with_type(dweight, [&](auto kind) {
      using W = decltype(kind);
      launch(gradients_kernel<C, W>, blocks_for(channels), kThreads, 0, x, data<double>(sums), data<W>(given_weight), data<C>(v),
             static_cast<C>(eps), channels, static_cast<double>(count), writable<C>(down), writable<C>(less),
             writable<W>(dweight), writable<W>(dbias));
    });
    launch_forward<T, T>(passed, dx, extent, Gradient<T, C>{line, data<T>(x), data<C>(down), data<C>(less)});
  });
  const Tensor like = empty_as(given);
  return {laid_out_as(dx, like), added ? laid_out_as(passed, like) : empty_of({0}, x.scalar_type(), x), dweight, dbias};
}

QEXP_LIBRARY_IMPL(m) {
  m.impl("batch_norm", TORCH_BOX(&forward));
  m.impl("batch_norm_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace qexp
