// One binary for every x86-64 CPU: a loop is compiled for AVX-512, AVX2 and the baseline, and the
// best that this CPU has is taken at run time. There are two ways:
//
// - with_isa(FB_BODY { ... }): a loop that the compiler vectorises by itself stands where it is
//   used, and is compiled three times there.
// - a source in cpu/kernels: a kernel that is written with vectors (cpu/simd/simd.h) is compiled
//   once for each instruction set by setup.py, and puts its functions into a table (kernels_for).
//
// avx512vpopcntdq is AVX-512 with a count of bits in vectors: a level of its own for the kernels that
// count bits, AVX-512 for all others.
//
// FASTBANDIT_CPU=baseline|avx2|avx512|avx512vpopcntdq takes a lower one (to test all on one machine).
#pragma once

#include <cstdint>

namespace fastbandit {

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2, avx512vpopcntdq = 3 };

// The instruction set in use; decided once.
Isa isa();
const char* isa_name(Isa isa);

#if defined(__x86_64__)
#if defined(__clang__)  // a word that it does not know makes it ignore all of them
#define FB_VECTOR_WIDTH ""
#else
#define FB_VECTOR_WIDTH ",prefer-vector-width=512"
#endif
#define FB_TARGET_AVX512                                                                      \
  __attribute__((target(                                                                      \
      "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2" FB_VECTOR_WIDTH)))
#define FB_TARGET_AVX2 __attribute__((target("avx2,fma,f16c,bmi2")))

namespace detail {
// The body is an always-inline lambda, so it is compiled anew, with the target of each of these.
template <class Body>
FB_TARGET_AVX512 __attribute__((noinline)) void run_avx512(const Body& body) {
  body();
}
template <class Body>
FB_TARGET_AVX2 __attribute__((noinline)) void run_avx2(const Body& body) {
  body();
}
}  // namespace detail
#endif

// with_isa(FB_BODY { ... });  runs the block compiled for this CPU.
#define FB_INLINE_LAMBDA __attribute__((always_inline))
#define FB_BODY [&]() FB_INLINE_LAMBDA

template <class Body>
inline void with_isa(const Body& body) {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::avx512vpopcntdq:
    case Isa::avx512: return detail::run_avx512(body);
    case Isa::avx2: return detail::run_avx2(body);
    case Isa::baseline: break;
  }
#endif
  body();
}

namespace cpu {

// The table of functions that a source in cpu/kernels defines for the instruction set that it is
// compiled for. The header of the table declares one for each set.
template <class Kernels, Isa kIsa>
const Kernels& kernels_for();

// Whether there is a table for avx512vpopcntdq; its header says so.
template <class Kernels>
constexpr bool kCountsBits = false;

// The best table for this CPU.
template <class Kernels>
const Kernels& kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::avx512vpopcntdq:
      if constexpr (kCountsBits<Kernels>) return kernels_for<Kernels, Isa::avx512vpopcntdq>();
      [[fallthrough]];
    case Isa::avx512: return kernels_for<Kernels, Isa::avx512>();
    case Isa::avx2: return kernels_for<Kernels, Isa::avx2>();
    case Isa::baseline: break;
  }
#endif
  return kernels_for<Kernels, Isa::baseline>();
}

}  // namespace cpu
}  // namespace fastbandit
