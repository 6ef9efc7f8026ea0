// Tensors through torch's stable C++ interface: what is compiled against it runs on every torch from 2.11 on.
#pragma once

#ifndef TORCH_TARGET_VERSION
#error "TORCH_TARGET_VERSION names the oldest torch that the library is for; build.py defines it"
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace qexp {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Axis = std::optional<int64_t>;
using Ints = std::vector<int64_t>;

// Calls an operator of torch by its name; the arguments are all of its schema.
template <class... A>
Tensor call(const char* name, const char* overload, const A&... arguments) {
  std::array<StableIValue, sizeof...(A)> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Whether the elements fill a piece of memory, each once, in any order of the dimensions.
inline bool is_dense(const Tensor& x) {
  if (x.is_contiguous()) return true;
  Ints order;
  for (int64_t d = 0; d < x.dim(); ++d)
    if (x.size(d) != 1) order.push_back(d);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return x.stride(a) < x.stride(b); });
  int64_t next = 1;
  for (const int64_t d : order) {
    if (x.stride(d) != next) return false;
    next *= x.size(d);
  }
  return true;
}

// Returns an uninitialised tensor on the device of `x`.
inline Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType dtype, const Tensor& x) {
  int32_t type, index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &index));
  const auto number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, number, type, index, &made));
  return Tensor(made);
}

// Returns an uninitialised tensor of the shape of `x`, in its memory order where that is dense.
inline Tensor empty_as(const Tensor& x, std::optional<ScalarType> dtype = std::nullopt) {
  if (is_dense(x))
    return empty_strided(x.sizes().data(), x.strides().data(), x.dim(), dtype.value_or(x.scalar_type()), x);
  return call("aten::empty_like", "", x, dtype, std::nullopt, std::nullopt, std::nullopt, std::nullopt);
}

// Returns an uninitialised contiguous tensor on the device of `x`.
inline Tensor empty_of(const Ints& sizes, ScalarType dtype, const Tensor& x) {
  Ints strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  return empty_strided(sizes.data(), strides.data(), static_cast<int64_t>(sizes.size()), dtype, x);
}

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
T* writable(Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Whether [N, C, H, W] lies in memory as [N, H, W, C]; dimensions of size one may have any stride.
inline bool is_channels_last(const Tensor& x) {
  int64_t next = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (x.size(d) != 1 && x.stride(d) != next) return false;
    next *= x.size(d);
  }
  return true;
}

}  // namespace qexp
