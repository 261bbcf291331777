// Marks for functions that are compiled for the host and for the device. No torch header here.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FB_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: the CPU kernels compile the formula once for each instruction set, inside a
// function that has that target.
#define FB_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace fastbandit {

template <class To, class From>
FB_HOST_DEVICE To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

// One rounding, asked for by name: contraction is off everywhere else, so that all devices agree.
FB_HOST_DEVICE double fused(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return fma(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}

}  // namespace fastbandit
