// Vectors of elements that are stored in a narrower type. What is written for vectors compiles for single elements too.
#pragma once

#include <cstring>

#include "numbers.h"
#include "sums.h"

namespace qexp {

template <class E, int64_t N>
struct PackedOf {
  typedef E type __attribute__((vector_size(sizeof(E) * N)));
};
template <class E, int64_t N>
using Packed = typename PackedOf<E, N>::type;

template <class V>
constexpr int64_t lanes = 1;
template <>
inline constexpr int64_t lanes<Vector<float>> = kVector<float>;
template <>
inline constexpr int64_t lanes<Vector<double>> = kVector<double>;

// Returns the elements that start at `from`.
template <class V, class T>
V elements(const T* from) {
  if constexpr (lanes<V> == 1) {
    return static_cast<V>(*from);
  } else if constexpr (sizeof(V) == lanes<V> * sizeof(T)) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    using Bits = Packed<uint32_t, lanes<V>>;
    using Stored = Packed<uint16_t, lanes<V>>;
    Stored stored;
    std::memcpy(&stored, from, sizeof stored);
    const Bits bits = __builtin_convertvector(stored, Bits) << 16;
    V v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
  } else {
    V v;
    for (int64_t k = 0; k < lanes<V>; ++k) v[k] = static_cast<float>(from[k]);
    return v;
  }
}

// Writes elements from `to` on, rounded to its type.
template <class V, class T>
void put(const V& v, T* to) {
  if constexpr (lanes<V> == 1) {
    *to = static_cast<T>(v);
  } else if constexpr (sizeof(V) == lanes<V> * sizeof(T)) {
    std::memcpy(to, &v, sizeof v);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    using Bits = Packed<uint32_t, lanes<V>>;
    using Stored = Packed<uint16_t, lanes<V>>;
    Bits bits;
    std::memcpy(&bits, &v, sizeof bits);
    const Bits even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to the nearest, ties to even
    const Bits nan{};
    const Stored stored = __builtin_convertvector(v == v ? even : nan + 0x7FC0, Stored);
    std::memcpy(to, &stored, sizeof stored);
  } else {
    for (int64_t k = 0; k < lanes<V>; ++k) to[k] = static_cast<T>(v[k]);
  }
}

// Returns one value in all elements.
template <class V, class C>
V all(C value) {
  if constexpr (lanes<V> == 1) {
    return value;
  } else {
    return V{} + value;
  }
}

}  // namespace qexp
