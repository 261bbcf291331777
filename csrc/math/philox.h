// Philox4x32-10: a counter-based generator, so each element of a tensor draws its own numbers in
// any order, on any device.
//
// Source: Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
#pragma once

#include "math/number.h"

namespace fastbandit {

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxIncrement0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxIncrement1 = 0xBB67AE85u;

struct PhiloxWords {
  uint32_t word[4];
};

FB_HOST_DEVICE PhiloxWords philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                                      uint32_t k0, uint32_t k1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(c0) * kPhiloxMultiplier0;
    const uint64_t product1 = static_cast<uint64_t>(c2) * kPhiloxMultiplier1;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += kPhiloxIncrement0;
    k1 += kPhiloxIncrement1;
  }
  return {{c0, c1, c2, c3}};
}

// The key and the part of the counter that one image shares.
struct PhiloxStream {
  uint32_t key0, key1, offset, index0, index1;
};

FB_HOST_DEVICE PhiloxStream philox_stream(int64_t seed, int64_t offset, int64_t index) {
  const uint64_t s = static_cast<uint64_t>(seed), i = static_cast<uint64_t>(index);
  return {static_cast<uint32_t>(s), static_cast<uint32_t>(s >> 32),
          static_cast<uint32_t>(static_cast<uint64_t>(offset)), static_cast<uint32_t>(i),
          static_cast<uint32_t>(i >> 32)};
}

// The four words of elements 4 quarter ... 4 quarter + 3 of an image.
FB_HOST_DEVICE PhiloxWords philox_quarter(const PhiloxStream& stream, uint32_t quarter) {
  return philox4x32(quarter, stream.offset, stream.index0, stream.index1, stream.key0,
                    stream.key1);
}

// 32 random bits to a uniform number in (-1, 1): the upper 24 bits as an odd multiple of 2^-24,
// symmetric, never 0, exact in float32.
template <class C>
FB_HOST_DEVICE C uniform_symmetric(uint32_t bits) {
  const int32_t odd = static_cast<int32_t>((bits >> 7) | 1u) - (1 << 24);
  return static_cast<C>(odd) * static_cast<C>(0x1p-24);
}

}  // namespace fastbandit
