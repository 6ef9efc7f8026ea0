// Element types: what is stored and what is computed with.
#pragma once

#include <cstdint>
#include <type_traits>

#include "tensor.h"

namespace qexp {

using Half = c10::Half;
using BFloat16 = c10::BFloat16;

template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls f(T{}) with the element type of a floating-point tensor.
template <class F>
void with_type(const Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Half: return f(Half{});
    case ScalarType::BFloat16: return f(BFloat16{});
    default: STD_TORCH_CHECK(false, "x: its dtype is not allowed; use a floating-point tensor");
  }
}

// Calls f(float{}) or f(double{}): the type that the elements of a floating-point tensor are computed in.
template <class F>
void with_compute_type(const Tensor& x, F&& f) {
  return x.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

template <class T>
constexpr ScalarType scalar_type_of = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

// Returns n elements starting at `from` as an array of C: the memory itself where it is one, else `buffer` filled.
template <class C, class T>
const C* load(const T* from, int64_t stride, int64_t n, C* __restrict buffer) {
  if constexpr (std::is_same_v<C, T>) {
    if (stride == 1) return from;
  }
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<C>(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<C>(from[i * stride]);
  }
  return buffer;
}

// Where the n results for `to` are computed: there, or in `buffer`, from which `store` then converts them.
template <class C, class T>
C* place(T* to, C* buffer) {
  if constexpr (std::is_same_v<C, T>) return to;
  return buffer;
}

template <class C, class T>
void store(T* __restrict to, const C* __restrict buffer, int64_t n) {
  if constexpr (!std::is_same_v<C, T>) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(buffer[i]);
  }
}

}  // namespace qexp
