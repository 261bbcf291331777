// Elements whose type is known at run time, and integer division by a number known on the host.
#pragma once

#include "launch.h"

namespace fastbandit {

template <class C>
__device__ __forceinline__ C load_element(const void* data, int dtype, int64_t at) {
  switch (dtype) {
    case kFloat32: return static_cast<C>(static_cast<const float*>(data)[at]);
    case kFloat64: return static_cast<C>(static_cast<const double*>(data)[at]);
    case kBFloat16: return static_cast<C>(to_compute(static_cast<const bfloat16*>(data)[at]));
    default: return static_cast<C>(to_compute(static_cast<const float16*>(data)[at]));
  }
}

template <class C>
__device__ __forceinline__ void store_element(void* data, int dtype, int64_t at, C value) {
  switch (dtype) {
    case kFloat32: static_cast<float*>(data)[at] = static_cast<float>(value); break;
    case kFloat64: static_cast<double*>(data)[at] = static_cast<double>(value); break;
    case kBFloat16:
      static_cast<bfloat16*>(data)[at] = round_to_nearest<bfloat16>(static_cast<float>(value));
      break;
    default:
      static_cast<float16*>(data)[at] = round_to_nearest<float16>(static_cast<float>(value));
  }
}

// n / divisor for 0 <= n < 2^31 by a multiplication (Granlund and Montgomery, 1994).
struct Divider {
  unsigned divisor = 1, multiplier = 1, shift = 0;

  Divider() = default;
  explicit Divider(int64_t by) : divisor(static_cast<unsigned>(by)) {
    while ((int64_t{1} << shift) < by) ++shift;
    multiplier = static_cast<unsigned>(
        ((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1);
  }
  __device__ __forceinline__ int divide(int n) const {
    const unsigned value = static_cast<unsigned>(n);
    return static_cast<int>((__umulhi(value, multiplier) + value) >> shift);
  }
  // n = quotient * divisor + rest
  __device__ __forceinline__ int divide(int n, int& rest) const {
    const int quotient = divide(n);
    rest = n - quotient * static_cast<int>(divisor);
    return quotient;
  }
};

// relu and its derivative as torch defines them: NaN passes.
template <class C>
__device__ __forceinline__ C relu_if(int relu, C value) {
  return relu && value <= C(0) ? C(0) : value;
}

}  // namespace fastbandit
