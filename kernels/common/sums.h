// Sums whose bits do not depend on how wide the vectors of the processor are.
#pragma once

#include <cstdint>
#include <cstring>

namespace qexp {

// 64 bytes of C: one register with AVX-512, two with AVX2, four with SSE; the arithmetic of each element is the same.
template <class C>
struct VectorOf {
  typedef C type __attribute__((vector_size(64)));
};
template <class C>
using Vector = typename VectorOf<C>::type;
template <class C>
constexpr int64_t kVector = 64 / sizeof(C);

template <class C>
Vector<C> vector_at(const C* from) {
  Vector<C> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class C>
C total_of(const Vector<C>& v) {
  C total = 0;
  for (int64_t k = 0; k < kVector<C>; ++k) total += v[k];
  return total;
}

template <class C>
C sum_of(const C* values, int64_t n) {
  Vector<C> sums{};
  int64_t i = 0;
  for (; i + kVector<C> <= n; i += kVector<C>) sums += vector_at(values + i);
  for (int64_t k = 0; i < n; ++i, ++k) sums[k] += values[i];
  return total_of<C>(sums);
}

}  // namespace qexp
