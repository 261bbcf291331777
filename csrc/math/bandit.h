// The anti-bandit rules, Eqs. 4.9 to 4.13 of *Binary Neural Networks* (Zhang, Xu et al.); Chen et
// al., "Anti-Bandit Neural Architecture Search for Model Defense", ECCV 2020.
//
// The CPU and CUDA kernels share the logarithm, the exponential and the root below, so that their
// bounds, probabilities and choices are the same bits; all are within 2 units in the last place.
#pragma once

#include "layout.h"
#include "math/portable.h"

namespace fastbandit {

// The formulas work on numbers one by one, which these functions serve, and on vectors of numbers,
// which bring their own (cpu/kernels/bandit.cpp).
FB_HOST_DEVICE uint64_t bits_of(double value) { return bit_cast<uint64_t>(value); }
FB_HOST_DEVICE double from_bits(uint64_t bits) { return bit_cast<double>(bits); }
FB_HOST_DEVICE double select(bool condition, double yes, double no) {
  return condition ? yes : no;
}
// b where either is NaN.
FB_HOST_DEVICE double larger(double a, double b) { return a > b ? a : b; }
FB_HOST_DEVICE double smaller(double a, double b) { return a < b ? a : b; }

// Natural logarithm of a finite value >= 1.
template <class D>
FB_HOST_DEVICE D log_from_one(D value) {
  // value = 2^exponent * m with m in [sqrt(1/2), sqrt(2)), and ln m = 2 artanh((m - 1) / (m + 1)),
  // whose series in s^2 <= 0.0295 is below half a unit after these terms.
  const auto shifted = bits_of(value) - 0x3fe6a09e667f3bcdull;  // the bits of sqrt(1/2)
  // The exponent as a double without a conversion from 64-bit integers, which AVX2 lacks:
  // 2^52 + e has e in its lowest bits.
  const D exponent = from_bits((shifted >> 52) | 0x4330000000000000ull) - 0x1p52;
  const D m = from_bits((shifted & 0x000fffffffffffffull) + 0x3fe6a09e667f3bcdull);
  const D s = (m - 1.0) / (m + 1.0);
  const D z = s * s;
  D sum = 1.0 / 23.0;
  sum = fused(sum, z, 1.0 / 21.0);
  sum = fused(sum, z, 1.0 / 19.0);
  sum = fused(sum, z, 1.0 / 17.0);
  sum = fused(sum, z, 1.0 / 15.0);
  sum = fused(sum, z, 1.0 / 13.0);
  sum = fused(sum, z, 1.0 / 11.0);
  sum = fused(sum, z, 1.0 / 9.0);
  sum = fused(sum, z, 1.0 / 7.0);
  sum = fused(sum, z, 1.0 / 5.0);
  sum = fused(sum, z, 1.0 / 3.0);
  const D two_s = s + s;
  // ln 2 in two parts; the first has its low 32 bits clear, so exponent * high is exact.
  const double high = 0x1.62e42feep-1;
  const double low = 0x1.a39ef35793c76p-33;
  return exponent * high + (two_s + (two_s * (z * sum) + exponent * low));
}

// e^x for x <= 0; 0 for NaN and at -708 and below, where it leaves the normal range.
template <class D>
FB_HOST_DEVICE D exp_to_zero(D x) {
  const D clamped = larger(x, -708.0);
  // x = whole * ln 2 + r with |r| <= ln(2) / 2; adding 1.5 * 2^52 rounds to a whole number and
  // leaves it in the low bits.
  const double magic = 0x1.8p52;
  const D shifted = clamped * 0x1.71547652b82fep0 + magic;
  const D whole = shifted - magic;
  const D r = fused(-whole, 0x1.a39ef35793c76p-33, fused(-whole, 0x1.62e42feep-1, clamped));
  // The Taylor series up to r^13, in pairs: short chains of dependent operations.
  const D z = r * r;
  const D z2 = z * z;
  const D a = fused(fused(1.0 / 120.0, r, 1.0 / 24.0), z, fused(1.0 / 6.0, r, 0.5));
  const D b = fused(fused(1.0 / 362880.0, r, 1.0 / 40320.0), z,
                    fused(1.0 / 5040.0, r, 1.0 / 720.0));
  const D c = fused(fused(1.0 / 6227020800.0, r, 1.0 / 479001600.0), z,
                    fused(1.0 / 39916800.0, r, 1.0 / 3628800.0));
  const D sum = fused(fused(c, z2, b), z2, a);
  const D mantissa = 1.0 + fused(z, sum, r);
  const auto scale = (bits_of(shifted) + 1023ull) << 52;
  return select(x > -708.0, mantissa * from_bits(scale), 0.0);
}

// 2 ln N, the numerator under the root of both bounds; counts below one sample, or NaN, have no
// bonus.
template <class D>
FB_HOST_DEVICE D twice_log_total(D total) {
  return 2.0 * log_from_one(larger(total, 1.0));
}

// y of value -> 1 / sqrt(value): with u = 1 - value y^2, the series of 1 / sqrt(1 - u) up to u^3.
template <class D>
FB_HOST_DEVICE D nearer_inverse_root(D value, D y) {
  const D u = fused(-(value * y), y, 1.0);
  const D series = fused(fused(u, 5.0 / 16.0, 3.0 / 8.0), u, 0.5);
  return fused(y, series * u, y);
}

// 1 / sqrt(value), value normal and > 0: a division and a root together are the slowest part of an
// arm. Half the exponent, negated, by arithmetic on the bits is 3.5 % off at most.
template <class D>
FB_HOST_DEVICE D inverse_root(D value) {
  const D y = from_bits(0x5fe6eb50c7b537a9ull - (bits_of(value) >> 1));
  return nearer_inverse_root(value, nearer_inverse_root(value, y));
}

// m <- (1 - rate) m + rate a, Eq. 4.11.
FB_HOST_DEVICE double credited(double mean, double reward, double rate) {
  return (1.0 - rate) * mean + rate * reward;
}

// The tensors of a bandit op, in the order of Layout::stride of BanditTask::rows.
enum BanditTensor {
  kRowIndex,  // the rows in logical order, which is where the results go
  kMean,
  kCount,
  kAlive,
  kChoice,
  kReward,
  kPrune,
  kUniform,
  kBanditTensors
};

// All six ops are one walk over the rows that does what is asked: credit, prune, and any of the
// results. An absent tensor is null. Plain data, passed to the CUDA kernel as it is.
struct BanditTask {
  Layout<kBanditTensors> rows;
  int64_t arms;
  int64_t arm_stride[4];  // indexed by kMean, kCount, kAlive
  void* mean;
  void* count;
  bool* alive;
  const int64_t* choice;  // credit these arms
  const void* reward;
  const bool* prune;      // prune these rows
  const void* uniform;    // draw with these
  int reward_is_double, uniform_is_double;
  int prune_all;          // prune every row (`prune` is null then)
  double rate, bonus;
  // Results, contiguous, in the dtype of mean: [rows, arms] and [rows].
  void* lower;
  void* upper;
  void* probabilities;
  int64_t* next_choice;
  void* next_probability;
};

FB_HOST_DEVICE double real_at(const void* data, int is_double, int64_t at) {
  return is_double ? static_cast<const double*>(data)[at]
                   : static_cast<double>(static_cast<const float*>(data)[at]);
}

}  // namespace fastbandit
