// Vectors of the compiler for float32 and single numbers for float64: SSE2, NEON or plain scalars,
// whatever the target has.
#pragma once

#include "math/bandit.h"

namespace fastbandit::cpu::FB_ISA {

// ---- float32: Vec ----------------------------------------------------------------------------

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // every function that takes a vector is inlined
#endif

constexpr Isa kIsa = Isa::baseline;
constexpr int kLanes = 8;
typedef float RawVec __attribute__((vector_size(32)));
typedef int32_t RawMask __attribute__((vector_size(32)));
struct Vec {
  RawVec v;
};
FB_INLINE Vec zero() { return {RawVec{}}; }
FB_INLINE Vec broadcast(float value) { return {RawVec{} + value}; }
FB_INLINE Vec load(const float* p) {
  Vec a;
  std::memcpy(&a.v, p, sizeof(a.v));
  return a;
}
FB_INLINE void store(float* p, Vec a) { std::memcpy(p, &a.v, sizeof(a.v)); }
FB_INLINE Vec add(Vec a, Vec b) { return {a.v + b.v}; }
FB_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
FB_INLINE Vec relu(Vec a) {
  const RawMask drop = a.v <= RawVec{};
  return {(RawVec)((RawMask)a.v & ~drop)};
}
FB_INLINE Vec where_positive(Vec x, Vec a) {
  const RawMask drop = x.v <= RawVec{};
  return {(RawVec)((RawMask)a.v & ~drop)};
}
FB_INLINE float horizontal_sum(Vec a) {
  return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}
template <class T>
FB_INLINE Vec load(const T* p) {
  Vec a;
  for (int i = 0; i < kLanes; ++i) a.v[i] = to_compute(p[i]);
  return a;
}
template <class T>
FB_INLINE void store(T* p, Vec a) {
  for (int i = 0; i < kLanes; ++i) p[i] = round_to_nearest<T>(a.v[i]);
}
FB_INLINE void transpose(Vec (&r)[8]) {
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < i; ++j) {
      const float upper = r[j].v[i];
      r[j].v[i] = r[i].v[j];
      r[i].v[j] = upper;
    }
  }
}

FB_INLINE void keep(Vec&) {}

// ---- float64: Reals, their bits as Words, comparisons as Flags ---------------------------------

// One number at a time; larger, smaller, select, fused and the bits are those of math/bandit.h.
constexpr int kReals = 1;
using Reals = double;
using Words = uint64_t;
using Flags = bool;
FB_INLINE double load_reals(const double* p) { return *p; }
FB_INLINE uint64_t load_words(const double* p) { return bits_of(*p); }
FB_INLINE void store(double* p, double a) { *p = a; }
FB_INLINE double root(double a) { return __builtin_sqrt(a); }
FB_INLINE bool without(bool a, bool b) { return a && !b; }
FB_INLINE bool highest_bits(uint64_t a) { return (a >> 63) != 0; }
FB_INLINE void store(double* p, bool a) { *p = from_bits(a ? ~uint64_t{0} : 0); }
FB_INLINE double to_reals(uint64_t a) { return static_cast<double>(static_cast<int64_t>(a)); }

}  // namespace fastbandit::cpu::FB_ISA
