// bfloat16 and float16 as storage types: arithmetic is done in float32. Two roundings of float32
// into them exist, to nearest even and toward zero; the second keeps |delta| within its bound.
//
// The host versions are branch-free integer arithmetic, so that loops over them vectorise. The
// device versions are the hardware's conversions where it has one, with the same results but for the
// payload of NaN; what is left to integers there is bfloat16 toward zero, a single mask, and on
// devices before compute capability 8.0 all of bfloat16.
#pragma once

#include "math/portable.h"

namespace fastbandit {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

// The type in which values of T are computed.
template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class T>
using compute_t = typename ComputeType<T>::type;

// ---- to the compute type ------------------------------------------------------------------

FB_HOST_DEVICE float to_compute(float value) { return value; }
FB_HOST_DEVICE double to_compute(double value) { return value; }

FB_HOST_DEVICE float to_compute(bfloat16 value) {
  return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

FB_HOST_DEVICE float to_compute(float16 value) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  // Exponent and mantissa in place, the exponent's bias put right by an exact multiplication,
  // which also normalises subnormals.
  const float scaled = bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;  // infinity and NaN
  return bit_cast<float>(bit_cast<uint32_t>(scaled) | special | sign);
#endif
}

// ---- from the compute type, toward zero ---------------------------------------------------

template <class T>
FB_HOST_DEVICE T round_toward_zero(compute_t<T> value);

template <>
FB_HOST_DEVICE float round_toward_zero<float>(float value) {
  return value;
}

template <>
FB_HOST_DEVICE double round_toward_zero<double>(double value) {
  return value;
}

template <>
FB_HOST_DEVICE bfloat16 round_toward_zero<bfloat16>(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  // A NaN whose payload sits in the lower half must not become an infinity.
  const uint32_t quiet = value != value ? 0x40u : 0u;
  return {static_cast<uint16_t>((bits >> 16) | quiet)};
}

template <>
FB_HOST_DEVICE float16 round_toward_zero<float16>(float value) {
#if defined(__CUDA_ARCH__)
  uint16_t bits;
  asm("cvt.rz.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return {bits};
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const float size = bit_cast<float>(magnitude);
  const uint32_t normal = (magnitude - (112u << 23)) >> 13;
  // Below 2^-14 a float16 is a whole number of 2^-24; the conversion to integer truncates.
  const float small = size < 0x1p-14f ? size : 0.0f;
  const uint32_t subnormal = static_cast<uint32_t>(static_cast<int32_t>(small * 0x1p24f));
  uint32_t result = size < 0x1p-14f ? subnormal : normal;
  result = magnitude >= (143u << 23) ? 0x7bffu : result;   // 65536 and above: the largest finite
  result = magnitude == 0x7f800000u ? 0x7c00u : result;    // infinity stays
  result = magnitude > 0x7f800000u ? 0x7e00u : result;     // NaN stays
  return {static_cast<uint16_t>(result | ((bits >> 16) & 0x8000u))};
#endif
}

// ---- from the compute type, to nearest even -----------------------------------------------

template <class T>
FB_HOST_DEVICE T round_to_nearest(compute_t<T> value);

template <>
FB_HOST_DEVICE float round_to_nearest<float>(float value) {
  return value;
}

template <>
FB_HOST_DEVICE double round_to_nearest<double>(double value) {
  return value;
}

template <>
FB_HOST_DEVICE bfloat16 round_to_nearest<bfloat16>(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return {bits};
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return {static_cast<uint16_t>(value != value ? quiet : rounded)};
#endif
}

template <>
FB_HOST_DEVICE float16 round_to_nearest<float16>(float value) {
#if defined(__CUDA_ARCH__)
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return {bits};
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const float size = bit_cast<float>(magnitude);
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 aligns the subnormal result with the mantissa's lowest bits; the addition rounds
  // to nearest even.
  const uint32_t subnormal = bit_cast<uint32_t>(size + 0.5f) - bit_cast<uint32_t>(0.5f);
  uint32_t result = size < 0x1p-14f ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;    // 65520 and above: infinity
  result = magnitude > 0x7f800000u ? 0x7e00u : result;     // NaN stays
  return {static_cast<uint16_t>(result | ((bits >> 16) & 0x8000u))};
#endif
}

}  // namespace fastbandit
