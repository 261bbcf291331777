// What the kernels of packed signs are told, and their table for each instruction set. Knows nothing
// of torch.
//
// A map of C channels is uint64 [N, H, W, ceil(C / 64)]: bit c % 64 of word c / 64 is 1 where channel c
// is +1. What lies past the last channel is not read, and written as 0. A sum of products is
// taps - 2 * (bits that differ).
#pragma once

#include <cstdint>

#include "cpu/conv_problem.h"
#include "cpu/isa.h"

namespace fastbandit::cpu {

constexpr int64_t kWordBits = 64;

inline int64_t sign_words(int64_t channels) { return (channels + kWordBits - 1) / kWordBits; }

// The bits of the last word that stand for channels.
inline uint64_t last_word_mask(int64_t channels) {
  const int64_t rest = channels % kWordBits;
  return rest == 0 ? ~uint64_t{0} : (uint64_t{1} << rest) - 1;
}

// A map in numbers beside its bits.
struct SignMap {
  Real type = Real::kFloat32;
  void* values = nullptr;  // read by pack, written by unpack
  int64_t n = 0, c = 0, h = 0, w = 0;
  int64_t stride_n = 0, stride_c = 0, stride_h = 0, stride_w = 0;  // in elements
  uint64_t* bits = nullptr;  // dense
  // [C], or null for 0: float, or double for values of kFloat64.
  const void* threshold = nullptr;
};

// What becomes of a sum: scale * sum + bias in `type`, or a bit.
struct SignResult {
  Real type = Real::kFloat32;
  void* values = nullptr;  // [N, OH, OW, filters]
  // [filters], float, or double for kFloat64. For none the identities: 1, and -0.0, which as 0 does
  // not would keep a negative zero.
  const void* scale = nullptr;
  const void* bias = nullptr;
  uint64_t* bits = nullptr;  // [N, OH, OW, words]; not null: bits
  const int32_t* threshold = nullptr;  // [filters]
  const uint64_t* flips = nullptr;     // [words], a bit for each filter
  // The thresholds less one in 16 bits, those beyond at their ends; null where sums are larger.
  const int16_t* below = nullptr;
};

// The largest sum of 16 bits.
constexpr int64_t kMostShortTaps = 32767;

struct SignConv {
  int64_t n = 0, h = 0, w = 0, oh = 0, ow = 0;
  int64_t channels = 0, words = 0, filters = 0;
  int64_t kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1;
  int64_t pad_h = 0, pad_w = 0, dilation_h = 1, dilation_w = 1;
  bool plus_one = false;              // the padding
  const uint64_t* bits = nullptr;     // [N, H, W, words]
  const uint64_t* weight = nullptr;   // [filters, kernel_h, kernel_w, words]; depthwise [kh, kw, words]
  SignResult result;

  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t pixels() const { return n * oh * ow; }
};

// Work is cut into items, as in conv_problem.h. `prepared` holds prepared_bytes and is filled by
// prepare, once a call; `scratch` holds scratch_bytes and belongs to a thread. Both lie on cache lines.
struct SignWork {
  int64_t (*prepared_bytes)(const SignConv&);
  void (*prepare)(const SignConv&, void* prepared);
  int64_t (*scratch_bytes)(const SignConv&);
  int64_t (*items)(const SignConv&);
  void (*run)(const SignConv&, const void* prepared, void* scratch, int64_t begin, int64_t end);
};

struct SignKernels {
  // Rows of the map: n * h of them.
  void (*pack)(const SignMap&, int64_t begin, int64_t end);
  void (*unpack)(const SignMap&, int64_t begin, int64_t end);
  SignWork table;      // dense, by table look-up: filters of at most kMostTableTaps products
  SignWork count;      // dense, by counting bits
  SignWork depthwise;  // a filter for each channel
  bool by_table;       // the faster of the two, where both serve
};

// What the 16-bit counts of the table kernel hold.
constexpr int64_t kMostTableTaps = 65535;

template <>
constexpr bool kCountsBits<SignKernels> = true;

template <>
const SignKernels& kernels_for<SignKernels, Isa::baseline>();
template <>
const SignKernels& kernels_for<SignKernels, Isa::avx2>();
template <>
const SignKernels& kernels_for<SignKernels, Isa::avx512>();
template <>
const SignKernels& kernels_for<SignKernels, Isa::avx512vpopcntdq>();

}  // namespace fastbandit::cpu
