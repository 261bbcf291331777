// What the families of depthwise_conv2d share, and how they are launched: see
// csrc/cuda/depthwise_conv2d_kernel.cu. A launcher returns false where its family does not apply.
#pragma once

#include "cuda/depthwise_conv2d.h"
#include "cuda/element.h"
#include "cuda/pack.h"

namespace fastbandit::depthwise {

constexpr int kRows = 4, kCols = 4;       // sums of a thread
constexpr int64_t kPartialBlocks = 528;   // blocks of a weight gradient: 4 for each of 132 processors
constexpr int64_t kIndexLimit = (int64_t{1} << 31) - 1;

struct Map {
  const void* data;
  int dtype;
  int64_t n, c, h, w;  // strides
};

// One convolution of stride 1, seen from the map that is written.
struct Geometry {
  int n, c, in_h, in_w, out_h, out_w;
  int pad_h, pad_w, dilation;
  int relu;  // of the input as it is loaded
  int flip;  // taps in reverse: the input gradient
};

// kRows x kCols pixels of a thread, `dilation` apart; phases interleave.
struct Groups {
  int rows, cols;  // groups along h and w
  Divider by_cols, by_rows, by_dilation;

  static int count(int size, int dilation, int each) {
    const int phase = (size + dilation - 1) / dilation;
    return dilation * ((phase + each - 1) / each);
  }
  Groups() = default;
  Groups(int h, int w, int dilation)
      : rows(count(h, dilation, kRows)),
        cols(count(w, dilation, kCols)),
        by_cols(cols),
        by_rows(rows),
        by_dilation(dilation) {}
  // First pixel of group g along one side.
  __device__ __forceinline__ int first(int g, int each) const {
    int phase;
    const int block = by_dilation.divide(g, phase);
    return phase + block * each * static_cast<int>(by_dilation.divisor);
  }
};

// The map that a convolution writes, and the map that masks it (data null for none).
struct Output {
  void* data;
  int dtype;
  const int64_t* strides;
  Map mask;
};

struct Weight {
  const void* data;
  int dtype;
};

// body(Constant<K>) for the filter sizes that are unrolled.
template <int V>
struct Constant {
  static constexpr int value = V;
};
template <class Body>
void with_kernel_size(int64_t k, const Body& body) {
  if (k == 3) body(Constant<3>{});
  if (k == 5) body(Constant<5>{});
  if (k == 7) body(Constant<7>{});
}

inline bool is_half(int dtype) { return dtype == kBFloat16 || dtype == kFloat16; }
inline bool known(int dtype) { return dtype == kFloat32 || is_half(dtype); }
inline int size_of(int dtype) { return is_half(dtype) ? 2 : 4; }

inline int log2_ceil(int value, int limit) {
  int bits = 0;
  while (bits < limit && (1 << bits) < value) ++bits;
  return bits;
}

// k: taps along a side, one of those of with_kernel_size.
bool launch_planar(int64_t k, const Geometry& g, const Map& from, const Weight& weight,
                   const Output& to, void* stream);
bool launch_staged(int64_t k, const Geometry& g, const Map& from, const Weight& weight,
                   const Output& to, void* stream);
bool launch_strided(int64_t k, const Geometry& g, const Map& from, const Weight& weight,
                    const Output& to, void* stream);

// Partial sums [tap][channel][split] of the weight gradient: how many splits, 0 where the family does
// not apply.
int planar_weight_splits(int64_t k, const Geometry& g, const Map& grad, const Map& x);
int staged_weight_splits(int64_t k, const Geometry& g, const Map& grad, const Map& x);
int strided_weight_splits(const Geometry& g);
bool launch_planar_weight(int64_t k, const Geometry& g, const Map& grad, const Map& x,
                          float* partial, void* stream);
bool launch_staged_weight(int64_t k, const Geometry& g, const Map& grad, const Map& x,
                          float* partial, void* stream);
bool launch_strided_weight(int64_t k, const Geometry& g, const Map& grad, const Map& x,
                           float* partial, void* stream);

// shape: the fields of ConvField.
void launch_general(const int64_t* shape, const Map& from, const Weight& weight, const Output& to,
                    int backward, void* stream);
// An error, or null.
const char* launch_general_weight(const int64_t* shape, const Map& grad, const Map& x,
                                  void* grad_weight, int dtype, void* stream);

}  // namespace fastbandit::depthwise
