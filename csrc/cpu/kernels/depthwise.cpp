// Depthwise convolution over lanes, compiled once for each instruction set (see cpu/isa.h).
//
// A lane is one channel of one image. In channels-last memory the lanes of a vector are neighbouring
// channels and float32 maps are read where they lie. Any other layout or type goes through a scratch
// map [rows][w][kLanes] of float32 that stays in the cache: contiguous maps are transposed in
// registers, 16-bit values are converted once, relu is applied on the way. So there is one set of
// inner loops, and small maps (8 x 8) fill the vectors as well as large ones. Where there are fewer
// channels than lanes, the lanes of a contiguous array run on into the next images ("flat").
//
// The inner loops are unrolled for square filters of 1, 3, 5, 7 taps with dilation and stride 1 or
// 2 (see with_shape); every other shape takes the loops named *_any, which are vectorised but not
// unrolled, and a few times slower for each tap.
#include <cstdlib>
#include <new>
#include <type_traits>

#include "cpu/conv_problem.h"
#include "cpu/isa.h"
#include "cpu/conv_simd.h"

namespace fastbandit::cpu::FB_ISA {

constexpr int64_t kScratchFloats = 128 * 1024;  // rows of one item: half a MiB, inside L2
constexpr int64_t kChunkVectors = 8192;         // products per tap that one partial sum holds
constexpr int64_t kMaxChunks = 64;
constexpr int64_t kWantedItems = 32;  // enough to balance threads; a constant, not their number
constexpr int64_t kMaxTaps = 64;      // rows of taps whose pointers fit the small array of an item

// ---- scratch memory: grows, is kept for the thread's life, so it never page-faults twice ---------

class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  float* get(int64_t floats) {
    if (floats > capacity_) {
      std::free(memory_);
      const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 4095) / 4096 * 4096;
      memory_ = static_cast<float*>(std::aligned_alloc(64, bytes));
      capacity_ = memory_ ? floats : 0;
      if (!memory_) throw std::bad_alloc();
    }
    return memory_;
  }

 private:
  float* memory_ = nullptr;
  int64_t capacity_ = 0;
};

enum ScratchUse { kScratchIn, kScratchOut, kScratchMask, kScratchPlane, kScratchUses };

inline float* scratch(ScratchUse use, int64_t floats) {
  static thread_local Scratch buffers[kScratchUses];
  return buffers[use].get(floats);
}

// ---- lanes ---------------------------------------------------------------------------------------

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How channels and images become blocks of kLanes lanes; `first` is the array that the op reads.
struct Blocks {
  bool flat;
  int64_t images, count;  // images x blocks cover every lane
  int64_t patterns;       // blocks whose filters differ

  Blocks(const ConvProblem& p, const Array4& first) {
    flat = !p.shared && p.c < kLanes && !(first.c == 1 && p.c > 1);
    images = flat ? 1 : p.n;
    count = flat ? ceil_div(p.n * p.c, kLanes) : ceil_div(p.c, kLanes);
    patterns = flat ? std::min(count, p.c) : count;
  }
};

struct LaneSet {
  int64_t n = 0, c = 0;  // image and channel of the first lane
  int64_t count = 0;     // lanes in use
  bool flat = false;
  int64_t channels = 0;

  LaneSet(const ConvProblem& p, const Blocks& blocks, int64_t image, int64_t block)
      : flat(blocks.flat), channels(p.c) {
    const int64_t first = block * kLanes;
    if (flat) {
      n = first / p.c;
      c = first % p.c;
      count = std::min<int64_t>(kLanes, p.n * p.c - first);
    } else {
      n = image;
      c = first;
      count = std::min<int64_t>(kLanes, p.c - first);
    }
  }

  template <class T>
  void pointers(const Array4& a, T* (&lane)[kLanes]) const {
    int64_t image = n, channel = c;
    for (int64_t l = 0; l < kLanes; ++l) {
      lane[l] = l < count ? static_cast<T*>(a.data) + image * a.n + channel * a.c : nullptr;
      if (++channel == channels && flat) {
        channel = 0;
        ++image;
      }
    }
  }
};

// Rows [row, row + rows) of the lanes, [rows][w][kLanes], as float32.
template <class T>
void gather_rows(const Array4& a, const LaneSet& lanes, int64_t row, int64_t rows, int64_t w,
                 bool use_relu, float* out) {
  T* lane[kLanes];
  lanes.pointers(a, lane);
  if (!lanes.flat && a.c == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      const T* p = lane[0] + (row + r) * a.h;
      for (int64_t i = 0; i < w; ++i, p += a.w, out += kLanes) {
        const Vec v = lanes.count == kLanes ? load(p) : load_first(p, lanes.count);
        store(out, use_relu ? relu(v) : v);
      }
    }
  } else if (a.w == 1) {
    const bool joined = a.h == w;  // rows follow each other: one long run instead of many short ones
    const int64_t run = joined ? rows * w : w, runs = joined ? 1 : rows;
    for (int64_t r = 0; r < runs; ++r) {
      for (int64_t i = 0; i < run; i += kLanes) {
        const int64_t offset = (row + r) * a.h + i, here = std::min<int64_t>(kLanes, run - i);
        Vec v[kLanes];
        if (here == kLanes && lanes.count == kLanes) {
#pragma GCC unroll 16
          for (int l = 0; l < kLanes; ++l) v[l] = load(lane[l] + offset);
        } else {
          for (int l = 0; l < kLanes; ++l) {
            v[l] = l < lanes.count ? load_partial(lane[l] + offset, 1, here) : zero();
          }
        }
        transpose(v);
        if (use_relu) {
#pragma GCC unroll 16
          for (int l = 0; l < kLanes; ++l) v[l] = relu(v[l]);
        }
        if (here == kLanes) {
#pragma GCC unroll 16
          for (int l = 0; l < kLanes; ++l) store(out + l * kLanes, v[l]);
        } else {
          for (int64_t l = 0; l < here; ++l) store(out + l * kLanes, v[l]);
        }
        out += here * kLanes;
      }
    }
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < w; ++i, out += kLanes) {
        const int64_t offset = (row + r) * a.h + i * a.w;
        T buffer[kLanes] = {};
        for (int64_t l = 0; l < lanes.count; ++l) buffer[l] = lane[l][offset];
        const Vec v = load(buffer);
        store(out, use_relu ? relu(v) : v);
      }
    }
  }
}

// The way back: [rows][w][kLanes] into rows [row, row + rows) of the lanes.
template <class T>
void scatter_rows(const Array4& a, const LaneSet& lanes, int64_t row, int64_t rows, int64_t w,
                  const float* in) {
  T* lane[kLanes];
  lanes.pointers(a, lane);
  if (!lanes.flat && a.c == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      T* p = lane[0] + (row + r) * a.h;
      for (int64_t i = 0; i < w; ++i, p += a.w, in += kLanes) {
        if (lanes.count == kLanes) {
          store(p, load(in));
        } else {
          store_first(p, lanes.count, load(in));
        }
      }
    }
  } else if (a.w == 1) {
    const bool joined = a.h == w;
    const int64_t run = joined ? rows * w : w, runs = joined ? 1 : rows;
    for (int64_t r = 0; r < runs; ++r) {
      for (int64_t i = 0; i < run; i += kLanes) {
        const int64_t offset = (row + r) * a.h + i, here = std::min<int64_t>(kLanes, run - i);
        Vec v[kLanes];
        if (here == kLanes) {
#pragma GCC unroll 16
          for (int l = 0; l < kLanes; ++l) v[l] = load(in + l * kLanes);
        } else {
          for (int l = 0; l < kLanes; ++l) v[l] = l < here ? load(in + l * kLanes) : zero();
        }
        in += here * kLanes;
        transpose(v);
        if (here == kLanes && lanes.count == kLanes) {
#pragma GCC unroll 16
          for (int l = 0; l < kLanes; ++l) store(lane[l] + offset, v[l]);
        } else {
          for (int l = 0; l < lanes.count; ++l) store_partial(lane[l] + offset, 1, here, v[l]);
        }
      }
    }
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < w; ++i, in += kLanes) {
        T buffer[kLanes];
        store(buffer, load(in));
        for (int64_t l = 0; l < lanes.count; ++l) {
          lane[l][(row + r) * a.h + i * a.w] = buffer[l];
        }
      }
    }
  }
}

template <class F>
FB_INLINE void with_type(Real type, const F& f) {
  if (type == Real::kFloat32) {
    f(float{});
  } else if (type == Real::kBFloat16) {
    f(bfloat16{});
  } else {
    f(float16{});
  }
}

inline void gather(const ConvProblem& p, const Array4& a, const LaneSet& lanes, int64_t row,
                   int64_t rows, int64_t w, bool use_relu, float* out) {
  with_type(p.type, [&](auto tag) {
    gather_rows<decltype(tag)>(a, lanes, row, rows, w, use_relu, out);
  });
}

inline void scatter(const ConvProblem& p, const Array4& a, const LaneSet& lanes, int64_t row,
                    int64_t rows, int64_t w, const float* in) {
  with_type(p.type, [&](auto tag) { scatter_rows<decltype(tag)>(a, lanes, row, rows, w, in); });
}

// ---- inner loops ---------------------------------------------------------------------------------

// Rows of a map seen by the inner loops: row r starts at data + r * row, pixels are `pixel` apart.
struct View {
  const float* data;
  int64_t row, pixel;
};

// Bit t tells whether position first + t lies in [0, size).
FB_INLINE uint64_t valid_bits(int64_t first, int64_t size) {
  const int64_t low = std::min<int64_t>(std::max<int64_t>(-first, 0), 63);
  const int64_t high = std::min<int64_t>(std::max<int64_t>(size - first, 0), 63);
  return high > low ? ((uint64_t{1} << high) - (uint64_t{1} << low)) : 0;
}

// Keeps the compiler from turning a walking pointer into one saved offset for each position.
template <class T>
FB_INLINE void opaque(T*& p) {
  __asm__("" : "+r"(p));
}

// Keeps a value that several products use in its register. Left alone, gcc reads it from memory in
// each of them, and an AVX-512 core loads no more vectors than it multiplies: on maps in the cache
// k = 3 took 1.4 times as long. An AVX2 core has the loads to spare, and no register.
FB_INLINE void keep(Vec& a) {
#if defined(FB_ISA_AVX512)
  __asm__("" : "+v"(a.v));
#else
  (void)a;
#endif
}

#define FB_UNROLL _Pragma("GCC unroll 64")

#if defined(FB_ISA_AVX512)
constexpr int kTile = 16;  // 16 sums, up to 7 taps and the input in 32 registers
#else
constexpr int kTile = 8;
#endif

// A tile looks at some positions of a row. Which of them lie in the map is known to the compiler
// (all but the first LOW and the last HIGH), or is asked at each: tests that took up to two
// fifths of the time. In the maps of a small network nearly every tile touches an edge.
template <int LOW, int HIGH>
struct Inside {
  static constexpr bool kKnown = true;
  static constexpr bool at(int t, int span, uint64_t /*valid*/) {
    return t >= LOW && t < span - HIGH;
  }
};
struct Asked {
  static constexpr bool kKnown = false;
  static FB_INLINE bool at(int t, int /*span*/, uint64_t valid) { return valid >> t & 1; }
};

// Each kind of edge costs compile time; vectors without a multiply-add are slow enough to ask.
#if defined(FB_ISA_AVX512) || defined(FB_ISA_AVX2)
constexpr bool kKnowsEdges = true;
#else
constexpr bool kKnowsEdges = false;
#endif

// How many positions lie outside on either side of a stride-1 convolution that keeps the size of
// its map; 0 where it makes no difference.
constexpr int same_padding(int k, int d, int s) {
  return kKnowsEdges && s == 1 ? (k - 1) * d / 2 : 0;
}

// Calls run(edge) for a tile whose first position is `low`, with `over` positions past the end.
// PAD: same_padding.
template <int PAD, class F>
FB_INLINE void with_edge(int64_t low, int64_t over, const F& run) {
  if (low >= 0 && over <= 0) return run(Inside<0, 0>{});
  if constexpr (PAD > 0) {
    if (low == -PAD && over <= 0) return run(Inside<PAD, 0>{});
    if (low >= 0 && over == PAD) return run(Inside<0, PAD>{});
    if (low == -PAD && over == PAD) return run(Inside<PAD, PAD>{});
  }
  run(Asked{});
}

// y[u] = sum_ij weight[i][j] * x[i][u * S + j * D - pad] for `count` <= T pixels from x column x0,
// all of them where the tile is Inside. BX: the input is one value for all lanes (Gabor).
template <int K, int D, int S, int T, bool RELU, bool BX, class Edge>
FB_INLINE void forward_tile(const float* const* rows, int64_t pixel, int64_t x0, int64_t width,
                            const float* weight, float* out, int64_t out_pixel, int64_t count) {
  constexpr int kSpan = (T - 1) * S + (K - 1) * D + 1;
  static_assert(kSpan <= 63, "valid_bits holds 63 positions");
  const uint64_t valid = Edge::kKnown ? 0 : valid_bits(x0, width);
  Vec sum[T];
  FB_UNROLL
  for (int u = 0; u < T; ++u) sum[u] = zero();
  for (int i = 0; i < K; ++i) {
    const float* p = rows[i];
    if (!p) continue;
    p += x0 * pixel;
    Vec tap[K];
    FB_UNROLL
    for (int j = 0; j < K; ++j) tap[j] = load(weight + (i * K + j) * kLanes);
    FB_UNROLL
    for (int t = 0; t < kSpan; ++t, p += pixel) {
      opaque(p);
      if (!Edge::at(t, kSpan, valid)) continue;
      Vec v = BX ? broadcast(*p) : load(p);
      if (RELU) v = relu(v);
      keep(v);
      FB_UNROLL
      for (int j = 0; j < K; ++j) {
        const int u = t - j * D;
        if (u >= 0 && u % S == 0 && u / S < T) sum[u / S] = fma(tap[j], v, sum[u / S]);
      }
    }
  }
  FB_UNROLL
  for (int u = 0; u < T; ++u, out += out_pixel) {
    opaque(out);
    if (Edge::kKnown || u < count) store(out, sum[u]);
  }
}

using ForwardRow = void (*)(const ConvProblem& p, const float* const* rows, int64_t pixel,
                            const float* weight, float* out, int64_t out_pixel);

template <int K, int D, int S, bool RELU, bool BX>
void forward_row(const ConvProblem& p, const float* const* rows, int64_t pixel, const float* weight,
                 float* out, int64_t out_pixel) {
  constexpr int kFull = S == 1 ? kTile : kTile / 2, kHalf = kFull / 2;
  constexpr int kPad = same_padding(K, D, S);
  for (int64_t u = 0; u < p.ow;) {
    const int64_t left = p.ow - u, x0 = u * S - p.pad_w;
    float* o = out + u * out_pixel;
    const auto run = [&](auto tile, auto edge) FB_INLINE_LAMBDA {
      forward_tile<K, D, S, tile(), RELU, BX, decltype(edge)>(
          rows, pixel, x0, p.w, weight, o, out_pixel, left);
      u += tile();
    };
    const std::integral_constant<int, kFull> full;
    const std::integral_constant<int, kHalf> half;
    if (left >= kFull) {
      with_edge<kPad>(x0, x0 + (kFull - 1) * S + (K - 1) * D + 1 - p.w,
                      [&](auto edge) FB_INLINE_LAMBDA { run(full, edge); });
    } else if (left > kHalf) {
      run(full, Asked{});
    } else if (kPad > 0 && left == kHalf && x0 == -kPad && p.w == kHalf) {
      run(half, Inside<kPad, kPad>{});  // a whole row of a small map
    } else {
      run(half, Asked{});
    }
  }
}

template <bool RELU, bool BX>
void forward_row_any(const ConvProblem& p, const float* const* rows, int64_t pixel,
                     const float* weight, float* out, int64_t out_pixel) {
  for (int64_t u = 0; u < p.ow; ++u) {
    Vec sum = zero();
    for (int64_t i = 0; i < p.kernel_h; ++i) {
      if (!rows[i]) continue;
      for (int64_t j = 0; j < p.kernel_w; ++j) {
        const int64_t x = u * p.stride_w + j * p.dilation_w - p.pad_w;
        if (x < 0 || x >= p.w) continue;
        Vec v = BX ? broadcast(rows[i][x * pixel]) : load(rows[i] + x * pixel);
        if (RELU) v = relu(v);
        sum = fma(load(weight + (i * p.kernel_w + j) * kLanes), v, sum);
      }
    }
    store(out + u * out_pixel, sum);
  }
}

// grad_x[u] = sum_ij weight[i][j] * grad[i][v] with v * S + j * D = u, seen from a tile whose first
// column is a multiple of S after the padding. ADD: added to out (sums over blocks of channels).
template <int K, int D, int S, int T, bool MASK, bool ADD, class Edge>
FB_INLINE void backward_input_tile(const float* const* rows, int64_t pixel, int64_t v0,
                                   int64_t width, const float* weight, float* out,
                                   int64_t out_pixel, const float* mask, int64_t mask_pixel,
                                   int64_t first, int64_t count) {
  constexpr int kLow = (K - 1) * D / S, kSpan = kLow + (T - 1) / S + 1;
  static_assert(kSpan <= 63, "valid_bits holds 63 positions");
  const uint64_t valid = Edge::kKnown ? 0 : valid_bits(v0 - kLow, width);
  Vec sum[T];
  FB_UNROLL
  for (int u = 0; u < T; ++u) sum[u] = zero();
  for (int i = 0; i < K; ++i) {
    const float* p = rows[i];
    if (!p) continue;
    p += (v0 - kLow) * pixel;
    Vec tap[K];
    FB_UNROLL
    for (int j = 0; j < K; ++j) tap[j] = load(weight + (i * K + j) * kLanes);
    FB_UNROLL
    for (int t = 0; t < kSpan; ++t, p += pixel) {
      opaque(p);
      if (!Edge::at(t, kSpan, valid)) continue;
      Vec g = load(p);
      keep(g);
      FB_UNROLL
      for (int j = 0; j < K; ++j) {
        const int u = (t - kLow) * S + j * D;
        if (u >= 0 && u < T) sum[u] = fma(tap[j], g, sum[u]);
      }
    }
  }
  FB_UNROLL
  for (int u = 0; u < T; ++u, out += out_pixel, mask += MASK ? mask_pixel : 0) {
    opaque(out);
    if (!Edge::kKnown && (u < first || u >= count)) continue;
    Vec value = sum[u];
    if (MASK) value = where_positive(load(mask), value);
    if (ADD) value = add(load(out), value);
    store(out, value);
  }
}

using BackwardInputRow = void (*)(const ConvProblem& p, const float* const* rows, int64_t pixel,
                                  const float* weight, float* out, int64_t out_pixel,
                                  const float* mask, int64_t mask_pixel);

template <int K, int D, int S, bool MASK, bool ADD>
void backward_input_row(const ConvProblem& p, const float* const* rows, int64_t pixel,
                        const float* weight, float* out, int64_t out_pixel, const float* mask,
                        int64_t mask_pixel) {
  static_assert(kTile / 2 % S == 0);
  constexpr int kPad = same_padding(K, D, S), kHalf = kTile / 2;
  const int64_t start = -(p.pad_w % S);
  for (int64_t u = start; u < p.w;) {
    const int64_t left = p.w - u, v0 = (u + p.pad_w) / S, first = u < 0 ? -u : 0;
    float* o = out + u * out_pixel;
    const float* m = MASK ? mask + u * mask_pixel : nullptr;
    const auto run = [&](auto tile, auto edge) FB_INLINE_LAMBDA {
      backward_input_tile<K, D, S, tile(), MASK, ADD, decltype(edge)>(
          rows, pixel, v0, p.ow, weight, o, out_pixel, m, mask_pixel, first, left);
      u += tile();
    };
    const std::integral_constant<int, kTile> full;
    const std::integral_constant<int, kHalf> half;
    const int64_t low = v0 - (K - 1) * D;
    if (S == 1 && left >= kTile) {
      with_edge<kPad>(low, v0 + kTile - p.ow,
                      [&](auto edge) FB_INLINE_LAMBDA { run(full, edge); });
    } else if (left > kHalf) {
      run(full, Asked{});
    } else if (kPad > 0 && left == kHalf && low == -kPad && p.ow == kHalf) {
      run(half, Inside<kPad, kPad>{});
    } else {
      run(half, Asked{});
    }
  }
}

template <bool MASK, bool ADD>
void backward_input_row_any(const ConvProblem& p, const float* const* rows, int64_t pixel,
                            const float* weight, float* out, int64_t out_pixel, const float* mask,
                            int64_t mask_pixel) {
  for (int64_t u = 0; u < p.w; ++u) {
    Vec sum = zero();
    for (int64_t i = 0; i < p.kernel_h; ++i) {
      if (!rows[i]) continue;
      for (int64_t j = 0; j < p.kernel_w; ++j) {
        const int64_t from = u + p.pad_w - j * p.dilation_w;
        if (from < 0 || from % p.stride_w != 0 || from / p.stride_w >= p.ow) continue;
        const Vec g = load(rows[i] + from / p.stride_w * pixel);
        sum = fma(load(weight + (i * p.kernel_w + j) * kLanes), g, sum);
      }
    }
    if (MASK) sum = where_positive(load(mask + u * mask_pixel), sum);
    if (ADD) sum = add(load(out + u * out_pixel), sum);
    store(out + u * out_pixel, sum);
  }
}

// sums[i][j] += sum_u grad[u] * x[i][u * S + j * D - pad] over rows [h0, h1) of the output map.
// R rows of taps are summed in registers at once, T values of grad held beside them.
template <int K, int D, int S, int R, int T, bool RELU, bool BX, class Edge>
FB_INLINE void backward_weight_tile(const float* const* rows, int64_t pixel, int64_t x0,
                                    int64_t width, const float* grad, int64_t grad_pixel,
                                    int64_t count, Vec (&sum)[R][K]) {
  constexpr int kSpan = (T - 1) * S + (K - 1) * D + 1;
  static_assert(kSpan <= 63, "valid_bits holds 63 positions");
  const uint64_t valid = Edge::kKnown ? 0 : valid_bits(x0, width);
  Vec g[T];
  FB_UNROLL
  for (int u = 0; u < T; ++u, grad += grad_pixel) {
    opaque(grad);
    g[u] = Edge::kKnown || u < count ? load(grad) : zero();
  }
  FB_UNROLL
  for (int r = 0; r < R; ++r) {
    const float* p = rows[r];
    if (!p) continue;
    p += x0 * pixel;
    FB_UNROLL
    for (int t = 0; t < kSpan; ++t, p += pixel) {
      opaque(p);
      if (!Edge::at(t, kSpan, valid)) continue;
      Vec v = BX ? broadcast(*p) : load(p);
      if (RELU) v = relu(v);
      keep(v);
      FB_UNROLL
      for (int j = 0; j < K; ++j) {
        const int u = t - j * D;
        if (u >= 0 && u % S == 0 && u / S < T) sum[r][j] = fma(g[u / S], v, sum[r][j]);
      }
    }
  }
}

template <int K, int D, int S, int R, int T, bool RELU, bool BX>
void backward_weight_rows(const ConvProblem& p, View x, View grad, int64_t h0, int64_t h1, int tap,
                          float* sums) {
  Vec sum[R][K];
  FB_UNROLL
  for (int r = 0; r < R; ++r) {
    FB_UNROLL
    for (int j = 0; j < K; ++j) sum[r][j] = load(sums + ((tap + r) * K + j) * kLanes);
  }
  for (int64_t h = h0; h < h1; ++h) {
    const float* rows[R];
    bool any = false;
    for (int r = 0; r < R; ++r) {
      const int64_t y = h * S + (tap + r) * D - p.pad_h;
      rows[r] = y >= 0 && y < p.h ? x.data + y * x.row : nullptr;
      any = any || rows[r];
    }
    if (!any) continue;
    const float* g = grad.data + h * grad.row;
    for (int64_t u = 0; u < p.ow; u += T, g += T * grad.pixel) {
      const int64_t x0 = u * S - p.pad_w;
      const auto run = [&](auto edge) FB_INLINE_LAMBDA {
        backward_weight_tile<K, D, S, R, T, RELU, BX, decltype(edge)>(
            rows, x.pixel, x0, p.w, g, grad.pixel, p.ow - u, sum);
      };
      if (p.ow - u >= T) {
        with_edge<same_padding(K, D, S)>(
            x0, x0 + (T - 1) * S + (K - 1) * D + 1 - p.w, run);
      } else {
        run(Asked{});
      }
    }
  }
  FB_UNROLL
  for (int r = 0; r < R; ++r) {
    FB_UNROLL
    for (int j = 0; j < K; ++j) store(sums + ((tap + r) * K + j) * kLanes, sum[r][j]);
  }
}

using BackwardWeightRows = void (*)(const ConvProblem& p, View x, View grad, int64_t h0, int64_t h1,
                                    float* sums);

template <int K, int D, int S, bool RELU, bool BX>
void backward_weight(const ConvProblem& p, View x, View grad, int64_t h0, int64_t h1, float* sums) {
#if defined(FB_ISA_AVX512)
  // R x K sums, T gradients and one input in 32 registers.
  constexpr int kRows = K <= 3 ? K : 3, kCols = 8;
#else
  constexpr int kRows = K <= 3 ? K : K == 5 ? 2 : 1, kCols = 4;
#endif
  constexpr int kRest = K % kRows;
  int tap = 0;
  for (; tap + kRows <= K; tap += kRows) {
    backward_weight_rows<K, D, S, kRows, kCols, RELU, BX>(p, x, grad, h0, h1, tap, sums);
  }
  if constexpr (kRest > 0) {
    backward_weight_rows<K, D, S, kRest, kCols, RELU, BX>(p, x, grad, h0, h1, tap, sums);
  }
}

template <bool RELU, bool BX>
void backward_weight_any(const ConvProblem& p, View x, View grad, int64_t h0, int64_t h1,
                         float* sums) {
  for (int64_t h = h0; h < h1; ++h) {
    for (int64_t i = 0; i < p.kernel_h; ++i) {
      const int64_t y = h * p.stride_h + i * p.dilation_h - p.pad_h;
      if (y < 0 || y >= p.h) continue;
      for (int64_t j = 0; j < p.kernel_w; ++j) {
        float* target = sums + (i * p.kernel_w + j) * kLanes;
        Vec even = load(target), odd = zero();
        for (int64_t u = 0; u < p.ow; ++u) {
          const int64_t at = u * p.stride_w + j * p.dilation_w - p.pad_w;
          if (at < 0 || at >= p.w) continue;
          const float* q = x.data + y * x.row + at * x.pixel;
          Vec v = BX ? broadcast(*q) : load(q);
          if (RELU) v = relu(v);
          const Vec g = load(grad.data + h * grad.row + u * grad.pixel);
          if (u & 1) {
            odd = fma(g, v, odd);
          } else {
            even = fma(g, v, even);
          }
        }
        store(target, add(even, odd));
      }
    }
  }
}

// ---- choosing the loop ---------------------------------------------------------------------------

template <int K, int D, int S>
struct Shape {};

// Calls f(K, D, S) as constants where the shape is one of the unrolled ones; else returns false.
// Each shape costs compile time three times over, so Gabor filters are unrolled only for stride 1
// and dilation 1, and the instruction sets without FMA only for stride 1.
template <bool SHARED, class F>
bool with_shape(const ConvProblem& p, const F& f) {
  if (p.kernel_h != p.kernel_w || p.stride_h != p.stride_w || p.dilation_h != p.dilation_w) {
    return false;
  }
  const int64_t d = p.kernel_w == 1 ? 1 : p.dilation_w;  // one tap has no dilation
  if (d > 2 || p.stride_w > 2) return false;
#define FB_SHAPE(K, D, S)                             \
  if (p.kernel_w == K && d == D && p.stride_w == S) { \
    f(Shape<K, D, S>{});                              \
    return true;                                      \
  }
  FB_SHAPE(3, 1, 1)
  FB_SHAPE(5, 1, 1)
  FB_SHAPE(7, 1, 1)
  if constexpr (!SHARED) {
    FB_SHAPE(1, 1, 1)
    FB_SHAPE(3, 2, 1)
    FB_SHAPE(5, 2, 1)
    FB_SHAPE(7, 2, 1)
#if defined(FB_ISA_AVX512) || defined(FB_ISA_AVX2)
    FB_SHAPE(1, 1, 2)
    FB_SHAPE(3, 1, 2)
    FB_SHAPE(5, 1, 2)
    FB_SHAPE(7, 1, 2)
    FB_SHAPE(3, 2, 2)
    FB_SHAPE(5, 2, 2)
    FB_SHAPE(7, 2, 2)
#endif
  }
#undef FB_SHAPE
  return false;
}

template <bool RELU, bool BX, int K, int D, int S>
constexpr ForwardRow forward_row_of(Shape<K, D, S>) {
  return &forward_row<K, D, S, RELU, BX>;
}
template <bool RELU, bool BX>
ForwardRow find_forward(const ConvProblem& p) {
  ForwardRow row = &forward_row_any<RELU, BX>;
  with_shape<BX>(p, [&](auto shape) { row = forward_row_of<RELU, BX>(shape); });
  return row;
}

template <bool MASK, bool ADD, int K, int D, int S>
constexpr BackwardInputRow backward_input_row_of(Shape<K, D, S>) {
  return &backward_input_row<K, D, S, MASK, ADD>;
}
// SHARED asks for the unrolled loops that the forward of the same op has.
template <bool MASK, bool ADD, bool SHARED>
BackwardInputRow find_backward_input(const ConvProblem& p) {
  BackwardInputRow row = &backward_input_row_any<MASK, ADD>;
  with_shape<SHARED>(p, [&](auto shape) { row = backward_input_row_of<MASK, ADD>(shape); });
  return row;
}

template <bool RELU, bool BX, int K, int D, int S>
constexpr BackwardWeightRows backward_weight_of(Shape<K, D, S>) {
  return &backward_weight<K, D, S, RELU, BX>;
}
template <bool RELU, bool BX>
BackwardWeightRows find_backward_weight(const ConvProblem& p) {
  BackwardWeightRows rows = &backward_weight_any<RELU, BX>;
  with_shape<BX>(p, [&](auto shape) { rows = backward_weight_of<RELU, BX>(shape); });
  return rows;
}

// Channels-last maps are read and written 64 bytes of every pixel at a time, which no hardware
// prefetcher follows from one block of channels to the next. So lines are asked for ahead, in the
// order of memory: part `part` of `parts` of rows [begin, end) of a map whose rows are dense.
// Always inline: gcc takes a function that only prefetches for one without effect and drops its calls.
template <bool WRITE>
FB_INLINE void prefetch_rows(const float* map, const Array4& a, int64_t channels, int64_t w,
                          int64_t begin, int64_t end, int64_t part, int64_t parts) {
  if (a.w != channels || a.h != w * channels || end <= begin) return;  // a view
  const int64_t floats = (end - begin) * a.h;
  const float* p = map + begin * a.h + part * floats / parts;
  const float* const last = map + begin * a.h + (part + 1) * floats / parts;
#pragma GCC unroll 4
  for (; p < last; p += 16) __builtin_prefetch(p, WRITE, 2);
}

// Rows of a map and of the images that follow it in memory: how far ahead of image n one may look.
inline int64_t rows_from(const Array4& a, int64_t images, int64_t n, int64_t h) {
  return a.n == h * a.h ? (images - n) * h : h;
}

// Whether the map that is read and the one that is written outgrow the caches together, so that it
// pays to ask for both ahead (asking for one of the two alone gains nothing, the other one waits). A
// layer's maps share the 32 MiB of the last level with the rest of its network: between other layers
// 8 MiB were 1.5 to 2.4 times as fast at k = 3, though 15 % slower where nothing else ran. The weight
// gradient gains nothing, so it does without.
constexpr int64_t kCachedBytes = 6 << 20;

inline bool outgrows_cache(const ConvProblem& p) {
  const int64_t pixels = p.h * p.w + p.oh * p.ow;
  return p.n * p.c * pixels * static_cast<int64_t>(sizeof(float)) > kCachedBytes;
}

// ---- items ---------------------------------------------------------------------------------------

// float32 channels-last maps are read and written where they lie.
inline bool in_place(const ConvProblem& p, const Array4& a, const Array4& b) {
  return p.type == Real::kFloat32 && a.c == 1 && b.c == 1 && p.c >= kLanes;
}

// Output rows of one item: what fits the scratch map, and enough items for every thread.
inline int64_t rows_per_item(int64_t rows, int64_t row_floats, int64_t others) {
  const int64_t fitting = std::max<int64_t>(1, kScratchFloats / std::max<int64_t>(1, row_floats));
  const int64_t pieces = ceil_div(kWantedItems, std::max<int64_t>(1, others));
  const int64_t wanted = std::max<int64_t>(4, ceil_div(rows, pieces));
  return std::max<int64_t>(1, std::min({rows, fitting, wanted}));
}

// Floats of an input row's lanes for each output row. A long stride fills the scratch map whatever
// it is; as it stands the product would overflow.
inline int64_t forward_row_floats(const ConvProblem& p) {
  return std::max(p.w * std::min(p.stride_h, kScratchFloats), p.ow) * kLanes;
}

struct MapItems {
  Blocks blocks;
  bool direct;
  int64_t rows, pieces, per_piece, count;

  // rows: of the map that is written; row_floats: of the larger of both maps, per written row
  MapItems(const ConvProblem& p, const Array4& in, const Array4& out, int64_t rows_,
           int64_t row_floats)
      : blocks(p, in), direct(in_place(p, in, out)), rows(rows_) {
    const int64_t others = direct ? p.n : blocks.images * blocks.count;
    per_piece = rows_per_item(rows, row_floats, others);
    pieces = rows > 0 ? ceil_div(rows, per_piece) : 0;
    count = others * pieces;
  }
};

inline MapItems forward_plan(const ConvProblem& p, const Array4& x, const Array4& y) {
  return MapItems(p, x, y, p.oh, forward_row_floats(p));
}
inline MapItems backward_input_plan(const ConvProblem& p, const Array4& grad,
                                    const Array4& grad_x) {
  return MapItems(p, grad, grad_x, p.h, std::max(p.w, p.ow) * kLanes);
}

inline int64_t packed_size(const ConvProblem& p, const Array4& first) {
  return Blocks(p, first).patterns * p.kernel_h * p.kernel_w * kLanes;
}

// [C, 1, kernel_h, kernel_w] -> [pattern][tap][lane], 0 where a lane has no channel.
inline void pack(const ConvProblem& p, const Array4& first, const Array4& weight, float* packed) {
  const Blocks blocks(p, first);
  const int64_t taps = p.kernel_h * p.kernel_w;
  with_type(p.type, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t b = 0; b < blocks.patterns; ++b) {
      for (int64_t tap = 0; tap < taps; ++tap, packed += kLanes) {
        const T* from = static_cast<const T*>(weight.data) + tap / p.kernel_w * weight.h +
            tap % p.kernel_w * weight.w;
        T buffer[kLanes] = {};
        for (int64_t l = 0; l < kLanes; ++l) {
          const int64_t lane = b * kLanes + l;
          if (blocks.flat) {
            buffer[l] = from[lane % p.c * weight.n];
          } else if (lane < p.c) {
            buffer[l] = from[lane * weight.n];
          }
        }
        store(packed, load(buffer));
      }
    }
  });
}

// Pointers to the rows of x that output row h needs; null where a row lies outside.
inline void forward_pointers(const ConvProblem& p, View x, int64_t h, const float** rows) {
  for (int64_t i = 0; i < p.kernel_h; ++i) {
    const int64_t y = h * p.stride_h + i * p.dilation_h - p.pad_h;
    rows[i] = y >= 0 && y < p.h ? x.data + y * x.row : nullptr;
  }
}
inline void backward_pointers(const ConvProblem& p, View grad, int64_t h, const float** rows) {
  for (int64_t i = 0; i < p.kernel_h; ++i) {
    const int64_t from = h + p.pad_h - i * p.dilation_h;
    const bool inside = from >= 0 && from % p.stride_h == 0 && from / p.stride_h < p.oh;
    rows[i] = inside ? grad.data + from / p.stride_h * grad.row : nullptr;
  }
}

// Row pointers of one filter: on the stack, or in scratch memory for enormous filters.
class RowPointers {
 public:
  explicit RowPointers(int64_t count) {
    if (count > kMaxTaps) heap_ = new const float*[static_cast<size_t>(count)];
  }
  ~RowPointers() { delete[] heap_; }
  RowPointers(const RowPointers&) = delete;
  RowPointers& operator=(const RowPointers&) = delete;
  const float** get() { return heap_ ? heap_ : stack_; }

 private:
  const float* stack_[kMaxTaps];
  const float** heap_ = nullptr;
};

struct RowRange {
  int64_t begin, end;
};
// Input rows that output rows [begin, end) need, and the other way round.
inline RowRange rows_in(const ConvProblem& p, int64_t begin, int64_t end) {
  const int64_t low = begin * p.stride_h - p.pad_h;
  const int64_t high = (end - 1) * p.stride_h + (p.kernel_h - 1) * p.dilation_h - p.pad_h + 1;
  const int64_t first = std::min(std::max<int64_t>(low, 0), p.h);
  return {first, std::max(first, std::min(high, p.h))};
}
inline RowRange rows_out(const ConvProblem& p, int64_t begin, int64_t end) {
  const int64_t low = begin + p.pad_h - (p.kernel_h - 1) * p.dilation_h;
  const int64_t high = (end - 1 + p.pad_h) / p.stride_h + 1;
  const int64_t first = std::min(low <= 0 ? 0 : ceil_div(low, p.stride_h), p.oh);
  return {first, std::max(first, std::min(high, p.oh))};
}

inline void forward_block(const ConvProblem& p, const Blocks& blocks, const Array4& x,
                          const float* packed, const Array4& y, int64_t image, int64_t block,
                          int64_t h0, int64_t h1, ForwardRow row, const float** rows) {
  const LaneSet lanes(p, blocks, image, block);
  const RowRange in = rows_in(p, h0, h1);
  const int64_t row_floats = p.w * kLanes, out_floats = p.ow * kLanes;
  float* source = scratch(kScratchIn, (in.end - in.begin) * row_floats);
  float* target = scratch(kScratchOut, (h1 - h0) * out_floats);
  gather(p, x, lanes, in.begin, in.end - in.begin, p.w, p.relu, source);
  const View view{source - in.begin * row_floats, row_floats, kLanes};
  const float* weight =
      packed + block % blocks.patterns * p.kernel_h * p.kernel_w * kLanes;
  for (int64_t h = h0; h < h1; ++h) {
    forward_pointers(p, view, h, rows);
    row(p, rows, kLanes, weight, target + (h - h0) * out_floats, kLanes);
  }
  scatter(p, y, lanes, h0, h1 - h0, p.ow, target);
}

inline void forward(const ConvProblem& p, const Array4& x, const float* packed, const Array4& y,
                    int64_t begin, int64_t end) {
  const MapItems items = forward_plan(p, x, y);
  const Blocks& blocks = items.blocks;
  const ForwardRow plain = find_forward<false, false>(p);
  const ForwardRow fused = p.relu ? find_forward<true, false>(p) : plain;
  const bool far = outgrows_cache(p);
  RowPointers pointers(p.kernel_h);
  const float** rows = pointers.get();
  const int64_t taps = p.kernel_h * p.kernel_w * kLanes;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t h0 = item % items.pieces * items.per_piece;
    const int64_t h1 = std::min(p.oh, h0 + items.per_piece), other = item / items.pieces;
    if (!items.direct) {
      forward_block(p, blocks, x, packed, y, other / blocks.count, other % blocks.count, h0, h1,
                    plain, rows);
      continue;
    }
    const float* image = static_cast<const float*>(x.data) + other * x.n;
    float* out = static_cast<float*>(y.data) + other * y.n;
    const int64_t full = p.c / kLanes;
    const int64_t x_rows = rows_from(x, p.n, other, p.h), y_rows = rows_from(y, p.n, other, p.oh);
    for (int64_t h = h0; h < h1; ++h) {
      // The rows after the last ones that this row of y needs.
      const int64_t ahead = h * p.stride_h + (p.kernel_h - 1) * p.dilation_h - p.pad_h + 1;
      const int64_t next = std::max<int64_t>(0, ahead + p.stride_h);
      const int64_t next_end = std::min(next + p.stride_h, x_rows);
      for (int64_t b = 0; b < full; ++b) {
        if (far) {
          prefetch_rows<false>(image, x, p.c, p.w, next, next_end, b, full);
          prefetch_rows<true>(out, y, p.c, p.ow, h + 2, std::min(h + 3, y_rows), b, full);
        }
        forward_pointers(p, {image + b * kLanes, x.h, x.w}, h, rows);
        fused(p, rows, x.w, packed + b * taps, out + b * kLanes + h * y.h, y.w);
      }
    }
    if (full < blocks.count) {
      forward_block(p, blocks, x, packed, y, other, full, h0, h1, plain, rows);
    }
  }
}

inline void backward_input_block(const ConvProblem& p, const Blocks& blocks, const Array4& grad,
                                 const Array4& x, const float* packed, const Array4& grad_x,
                                 int64_t image, int64_t block, int64_t h0, int64_t h1,
                                 BackwardInputRow row, const float** rows) {
  const LaneSet lanes(p, blocks, image, block);
  const RowRange in = rows_out(p, h0, h1);
  const int64_t row_floats = p.ow * kLanes, out_floats = p.w * kLanes;
  float* source = scratch(kScratchIn, (in.end - in.begin) * row_floats);
  float* target = scratch(kScratchOut, (h1 - h0) * out_floats);
  float* mask = nullptr;
  gather(p, grad, lanes, in.begin, in.end - in.begin, p.ow, false, source);
  if (p.relu) {
    mask = scratch(kScratchMask, (h1 - h0) * out_floats);
    gather(p, x, lanes, h0, h1 - h0, p.w, false, mask);
  }
  const View view{source - in.begin * row_floats, row_floats, kLanes};
  const float* weight =
      packed + block % blocks.patterns * p.kernel_h * p.kernel_w * kLanes;
  for (int64_t h = h0; h < h1; ++h) {
    backward_pointers(p, view, h, rows);
    const int64_t offset = (h - h0) * out_floats;
    row(p, rows, kLanes, weight, target + offset, kLanes, mask ? mask + offset : nullptr, kLanes);
  }
  scatter(p, grad_x, lanes, h0, h1 - h0, p.w, target);
}

inline void backward_input(const ConvProblem& p, const Array4& grad, const Array4& x,
                           const float* packed, const Array4& grad_x, int64_t begin, int64_t end) {
  const MapItems items = backward_input_plan(p, grad, grad_x);
  const Blocks& blocks = items.blocks;
  const bool direct_mask = !p.relu || x.c == 1, far = outgrows_cache(p);
  const BackwardInputRow row =
      p.relu ? find_backward_input<true, false, false>(p) : find_backward_input<false, false, false>(p);
  RowPointers pointers(p.kernel_h);
  const float** rows = pointers.get();
  const int64_t taps = p.kernel_h * p.kernel_w * kLanes;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t h0 = item % items.pieces * items.per_piece;
    const int64_t h1 = std::min(p.h, h0 + items.per_piece), other = item / items.pieces;
    if (!items.direct) {
      backward_input_block(p, blocks, grad, x, packed, grad_x, other / blocks.count,
                           other % blocks.count, h0, h1, row, rows);
      continue;
    }
    const int64_t full = direct_mask ? p.c / kLanes : 0;
    const float* image = static_cast<const float*>(grad.data) + other * grad.n;
    const float* mask = p.relu ? static_cast<const float*>(x.data) + other * x.n : nullptr;
    float* out = static_cast<float*>(grad_x.data) + other * grad_x.n;
    const int64_t x_rows = rows_from(grad_x, p.n, other, p.h);
    const int64_t grad_rows = rows_from(grad, p.n, other, p.oh);
    for (int64_t h = h0; h < h1; ++h) {
      const int64_t next = (h + p.pad_h) / p.stride_h + 2;  // the last row needed here, plus two
      const int64_t next_end = std::min(next + (h % p.stride_h == 0), grad_rows);
      for (int64_t b = 0; b < full; ++b) {
        if (far) {
          prefetch_rows<false>(image, grad, p.c, p.ow, next, next_end, b, full);
          prefetch_rows<true>(out, grad_x, p.c, p.w, h + 2, std::min(h + 3, x_rows), b, full);
        }
        backward_pointers(p, {image + b * kLanes, grad.h, grad.w}, h, rows);
        row(p, rows, grad.w, packed + b * taps, out + b * kLanes + h * grad_x.h, grad_x.w,
            mask ? mask + b * kLanes + h * x.h : nullptr, x.w);
      }
    }
    for (int64_t b = full; b < blocks.count; ++b) {
      backward_input_block(p, blocks, grad, x, packed, grad_x, other, b, h0, h1, row, rows);
    }
  }
}

// ---- weight gradient -----------------------------------------------------------------------------

struct WeightItems {
  Blocks blocks;
  bool direct;
  int64_t per_unit, row_pieces;  // output rows of a unit; units of one image
  int64_t units, chunks;         // a chunk of units is summed before the second reduction

  WeightItems(const ConvProblem& p, const Array4& grad, const Array4& x)
      : blocks(p, grad), direct(in_place(p, grad, x)) {
    const int64_t row_floats = std::max<int64_t>(1, forward_row_floats(p));
    const int64_t wanted = std::max<int64_t>(1, kChunkVectors / std::max<int64_t>(1, p.ow));
    per_unit = std::max<int64_t>(1, std::min({p.oh, kScratchFloats / row_floats, wanted}));
    row_pieces = ceil_div(p.oh, per_unit);
    units = blocks.images * row_pieces;
    const int64_t vectors = blocks.images * blocks.count * p.oh * p.ow;
    chunks = std::max<int64_t>(
        1, std::min({units, kMaxChunks, ceil_div(vectors, kChunkVectors)}));
  }
  // Channels-last rows hold every channel, so one item takes all of them while they are in the
  // cache; elsewhere each block of lanes is an item of its own.
  int64_t count() const { return direct ? chunks : chunks * blocks.count; }
  int64_t partials() const { return chunks * blocks.count; }
};

inline int64_t partial_size(const ConvProblem& p, const Array4& grad, const Array4& x) {
  return WeightItems(p, grad, x).partials() * p.kernel_h * p.kernel_w * kLanes;
}

inline void backward_weight_items(const ConvProblem& p, const Array4& grad, const Array4& x,
                                  float* partial, int64_t begin, int64_t end) {
  const WeightItems items(p, grad, x);
  const Blocks& blocks = items.blocks;
  const BackwardWeightRows plain = find_backward_weight<false, false>(p);
  const BackwardWeightRows fused = p.relu ? find_backward_weight<true, false>(p) : plain;
  const int64_t taps = p.kernel_h * p.kernel_w * kLanes;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t chunk = items.direct ? item : item / blocks.count;
    const int64_t first = items.direct ? 0 : item % blocks.count;
    const int64_t last = items.direct ? blocks.count : first + 1;
    float* sums = partial + chunk * blocks.count * taps;
    std::fill(sums + first * taps, sums + last * taps, 0.0f);
    const int64_t unit_end = (chunk + 1) * items.units / items.chunks;
    for (int64_t unit = chunk * items.units / items.chunks; unit < unit_end; ++unit) {
      const int64_t image = unit / items.row_pieces, h0 = unit % items.row_pieces * items.per_unit;
      const int64_t h1 = std::min(p.oh, h0 + items.per_unit);
      const int64_t full = items.direct ? p.c / kLanes : 0;
      if (full > 0) {
        const float* from = static_cast<const float*>(x.data) + image * x.n;
        const float* g = static_cast<const float*>(grad.data) + image * grad.n;
        for (int64_t b = 0; b < full; ++b) {
          fused(p, {from + b * kLanes, x.h, x.w}, {g + b * kLanes, grad.h, grad.w}, h0, h1,
                sums + b * taps);
        }
      }
      for (int64_t b = std::max(first, full); b < last; ++b) {
        const LaneSet lanes(p, blocks, image, b);
        const RowRange in = rows_in(p, h0, h1);
        const int64_t x_floats = p.w * kLanes, g_floats = p.ow * kLanes;
        float* source = scratch(kScratchIn, (in.end - in.begin) * x_floats);
        float* g = scratch(kScratchOut, (h1 - h0) * g_floats);
        gather(p, x, lanes, in.begin, in.end - in.begin, p.w, p.relu, source);
        gather(p, grad, lanes, h0, h1 - h0, p.ow, false, g);
        plain(p, {source - in.begin * x_floats, x_floats, kLanes},
              {g - h0 * g_floats, g_floats, kLanes}, h0, h1, sums + b * taps);
      }
    }
  }
}

template <class T>
FB_INLINE void store_one(T* p, float value) {
  store_partial(p, 1, 1, broadcast(value));
}

inline void reduce(const ConvProblem& p, const Array4& grad, const Array4& x, const float* partial,
                   const Array4& grad_weight) {
  const WeightItems items(p, grad, x);
  const Blocks& blocks = items.blocks;
  const int64_t taps = p.kernel_h * p.kernel_w;
  with_type(p.type, [&](auto tag) {
    using T = decltype(tag);
    T* out = static_cast<T*>(grad_weight.data);
    for (int64_t tap = 0; tap < taps; ++tap) {
      T* to = out + tap / p.kernel_w * grad_weight.h + tap % p.kernel_w * grad_weight.w;
      if (blocks.flat) {
        float channel[kLanes] = {};
        for (int64_t b = 0; b < blocks.count; ++b) {
          Vec sum = zero();
          for (int64_t chunk = 0; chunk < items.chunks; ++chunk) {
            sum = add(sum, load(partial + ((chunk * blocks.count + b) * taps + tap) * kLanes));
          }
          float lanes[kLanes];
          store(lanes, sum);
          const int64_t used = std::min<int64_t>(kLanes, p.n * p.c - b * kLanes);
          for (int64_t l = 0; l < used; ++l) channel[(b * kLanes + l) % p.c] += lanes[l];
        }
        for (int64_t c = 0; c < p.c; ++c) store_one(to + c * grad_weight.n, channel[c]);
        continue;
      }
      for (int64_t b = 0; b < blocks.count; ++b) {
        Vec sum = zero();
        for (int64_t chunk = 0; chunk < items.chunks; ++chunk) {
          sum = add(sum, load(partial + ((chunk * blocks.count + b) * taps + tap) * kLanes));
        }
        const int64_t used = std::min<int64_t>(kLanes, p.c - b * kLanes);
        store_partial(to + b * kLanes * grad_weight.n, grad_weight.n, used, sum);
      }
    }
  });
}

// ---- one input channel for all lanes (Gabor) -------------------------------------------------------

// Sum over the channels of rows [row, row + rows) of image n, [rows][w].
template <class T>
void channel_sum_rows(const Array4& x, int64_t n, int64_t channels, int64_t row, int64_t rows,
                      int64_t w, float* out) {
  const T* image = static_cast<const T*>(x.data) + n * x.n;
  if (x.c == 1 && channels >= kLanes) {
    for (int64_t r = 0; r < rows; ++r) {
      const T* p = image + (row + r) * x.h;
      for (int64_t i = 0; i < w; i += kLanes) {
        // The lanes of kLanes pixels, then all horizontal sums at once by a transposition.
        const int64_t here = std::min<int64_t>(kLanes, w - i);
        Vec sum[kLanes];
        for (int64_t u = 0; u < kLanes; ++u) {
          if (u >= here) {
            sum[u] = zero();
            continue;
          }
          const T* q = p + (i + u) * x.w;
          Vec s = load(q);
          int64_t c = kLanes;
          for (; c + kLanes <= channels; c += kLanes) s = add(s, load(q + c));
          if (c < channels) s = add(s, load_first(q + c, channels - c));
          sum[u] = s;
        }
        transpose(sum);
        Vec total = sum[0];
        for (int l = 1; l < kLanes; ++l) total = add(total, sum[l]);
        if (here == kLanes) {
          store(out, total);
        } else {
          store_partial(out, 1, here, total);
        }
        out += here;
      }
    }
    return;
  }
  const bool joined = x.h == w * x.w;
  const int64_t run = joined ? rows * w : w, runs = joined ? 1 : rows;
  for (int64_t r = 0; r < runs; ++r) {
    const T* p = image + (row + r) * x.h;
    for (int64_t i = 0; i < run;) {
      const int64_t left = run - i;
      if (x.w == 1 && left >= 4 * kLanes) {
        Vec sum[4] = {zero(), zero(), zero(), zero()};
        for (int64_t c = 0; c < channels; ++c) {
          for (int u = 0; u < 4; ++u) sum[u] = add(sum[u], load(p + c * x.c + i + u * kLanes));
        }
        for (int u = 0; u < 4; ++u) store(out + u * kLanes, sum[u]);
        i += 4 * kLanes;
        out += 4 * kLanes;
        continue;
      }
      const int64_t here = std::min<int64_t>(kLanes, left);
      Vec sum = zero();
      for (int64_t c = 0; c < channels; ++c) {
        const T* q = p + c * x.c + i * x.w;
        sum = add(sum, x.w == 1 && here == kLanes ? load(q) : load_partial(q, x.w, here));
      }
      store_partial(out, 1, here, sum);
      i += here;
      out += here;
    }
  }
}

inline void channel_sum(const ConvProblem& p, const Array4& x, int64_t n, int64_t channels,
                        int64_t row, int64_t rows, float* out) {
  with_type(p.type, [&](auto tag) {
    channel_sum_rows<decltype(tag)>(x, n, channels, row, rows, p.w, out);
  });
}

inline bool written_in_place(const ConvProblem& p, const Array4& a) {
  return p.type == Real::kFloat32 && a.c == 1;
}

inline int64_t shared_rows(const ConvProblem& p) {
  return rows_per_item(p.oh, forward_row_floats(p), p.n);
}

inline int64_t shared_forward_items(const ConvProblem& p) {
  return p.n * ceil_div(p.oh, shared_rows(p));
}

inline void shared_forward(const ConvProblem& p, int64_t channels, const Array4& x,
                           const float* packed, const Array4& y, int64_t begin, int64_t end) {
  const Blocks blocks(p, y);
  const int64_t per_piece = shared_rows(p), pieces = ceil_div(p.oh, per_piece);
  const ForwardRow row = find_forward<false, true>(p);
  RowPointers pointers(p.kernel_h);
  const float** rows = pointers.get();
  const int64_t taps = p.kernel_h * p.kernel_w * kLanes, out_floats = p.ow * kLanes;
  const int64_t full = written_in_place(p, y) ? p.c / kLanes : 0;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / pieces, h0 = item % pieces * per_piece;
    const int64_t h1 = std::min(p.oh, h0 + per_piece);
    const RowRange in = rows_in(p, h0, h1);
    float* sum = scratch(kScratchPlane, (in.end - in.begin) * p.w);
    channel_sum(p, x, n, channels, in.begin, in.end - in.begin, sum);
    const View view{sum - in.begin * p.w, p.w, 1};
    float* image = static_cast<float*>(y.data) + (full ? n * y.n : 0);
    for (int64_t h = h0; full > 0 && h < h1; ++h) {
      forward_pointers(p, view, h, rows);
      for (int64_t b = 0; b < full; ++b) {
        row(p, rows, 1, packed + b * taps, image + b * kLanes + h * y.h, y.w);
      }
    }
    if (full == blocks.count) continue;
    float* target = scratch(kScratchOut, (h1 - h0) * out_floats);
    for (int64_t b = full; b < blocks.count; ++b) {
      for (int64_t h = h0; h < h1; ++h) {
        forward_pointers(p, view, h, rows);
        row(p, rows, 1, packed + b * taps, target + (h - h0) * out_floats, kLanes);
      }
      scatter(p, y, LaneSet(p, blocks, n, b), h0, h1 - h0, p.ow, target);
    }
  }
}

// grad is read once for both gradients: that of the channel sum (grad_sum, [N, H, W] in the type of
// the problem) and that of the filters (partial sums). Either may be null.
inline void shared_backward(const ConvProblem& p, int64_t channels, const Array4& grad,
                            const Array4& x, const float* packed, void* grad_sum, float* partial,
                            int64_t begin, int64_t end) {
  const WeightItems items(p, grad, grad);
  const Blocks& blocks = items.blocks;
  const BackwardWeightRows weight_rows = find_backward_weight<false, true>(p);
  const BackwardInputRow first_row = find_backward_input<false, false, true>(p);
  const BackwardInputRow next_row = find_backward_input<false, true, true>(p);
  RowPointers pointers(p.kernel_h);
  const float** rows = pointers.get();
  const int64_t taps = p.kernel_h * p.kernel_w * kLanes, g_floats = p.ow * kLanes;
  const int64_t full = written_in_place(p, grad) ? p.c / kLanes : 0;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    float* sums = partial ? partial + chunk * blocks.count * taps : nullptr;
    if (sums) std::fill(sums, sums + blocks.count * taps, 0.0f);
    const int64_t unit_end = (chunk + 1) * items.units / items.chunks;
    for (int64_t unit = chunk * items.units / items.chunks; unit < unit_end; ++unit) {
      const int64_t n = unit / items.row_pieces, piece = unit % items.row_pieces;
      const int64_t h0 = piece * items.per_unit, h1 = std::min(p.oh, h0 + items.per_unit);
      View sum{nullptr, p.w, 1};
      if (sums) {
        const RowRange in = rows_in(p, h0, h1);
        float* plane = scratch(kScratchPlane, (in.end - in.begin) * p.w);
        channel_sum(p, x, n, channels, in.begin, in.end - in.begin, plane);
        sum.data = plane - in.begin * p.w;
      }
      // Rows of the input map that this unit writes, and the rows of grad that both parts read.
      const int64_t r0 = piece * p.h / items.row_pieces, r1 = (piece + 1) * p.h / items.row_pieces;
      RowRange need{h0, h1};
      if (grad_sum && r1 > r0) {
        const RowRange from = rows_out(p, r0, r1);
        if (from.end > from.begin) {
          need = {std::min(h0, from.begin), std::max(h1, from.end)};
        }
      }
      float* total =
          grad_sum ? scratch(kScratchOut, ceil_div((r1 - r0) * p.w, kLanes) * kLanes * kLanes)
                   : nullptr;
      const auto run = [&](int64_t b, bool input, bool weights) {
        View g;
        if (b < full) {
          g = {static_cast<const float*>(grad.data) + n * grad.n + b * kLanes, grad.h, grad.w};
        } else {
          float* source = scratch(kScratchIn, (need.end - need.begin) * g_floats);
          gather(p, grad, LaneSet(p, blocks, n, b), need.begin, need.end - need.begin, p.ow, false,
                 source);
          g = {source - need.begin * g_floats, g_floats, kLanes};
        }
        if (input && total) {
          for (int64_t r = r0; r < r1; ++r) {
            backward_pointers(p, g, r, rows);
            (b == 0 ? first_row : next_row)(p, rows, g.pixel, packed + b * taps,
                                            total + (r - r0) * p.w * kLanes, kLanes, nullptr, 0);
          }
        }
        if (weights && sums) weight_rows(p, sum, g, h0, h1, sums + b * taps);
      };
      // Where grad is read in place, both kinds read 64 bytes of every pixel at a time, which no
      // hardware prefetcher follows; the sums' kind waits less for it, and the other then finds it
      // in the cache.
      if (full > 0) {
        prefetch_rows<false>(static_cast<const float*>(grad.data) + n * grad.n, grad, p.c, p.ow,
                             need.begin, need.end, 0, 1);
      }
      for (int64_t b = 0; b < full; ++b) run(b, false, true);
      for (int64_t b = 0; b < full; ++b) run(b, true, false);
      for (int64_t b = full; b < blocks.count; ++b) run(b, true, true);
      if (!total) continue;
      with_type(p.type, [&](auto tag) {
        using T = decltype(tag);
        T* to = static_cast<T*>(grad_sum) + (n * p.h + r0) * p.w;
        const int64_t pixels = (r1 - r0) * p.w;
        for (int64_t i = 0; i < pixels; i += kLanes) {
          const int64_t here = std::min<int64_t>(kLanes, pixels - i);
          Vec lanes[kLanes];
          for (int64_t u = 0; u < kLanes; ++u) {
            lanes[u] = u < here ? load(total + (i + u) * kLanes) : zero();
          }
          transpose(lanes);
          Vec value = lanes[0];
          for (int l = 1; l < kLanes; ++l) value = add(value, lanes[l]);
          store_partial(to + i, 1, here, value);
        }
      });
    }
  }
}

inline ConvKernels make_table() {
  ConvKernels table;
  table.packed_size = &packed_size;
  table.pack = &pack;
  table.forward_items = [](const ConvProblem& p, const Array4& x, const Array4& y) {
    return forward_plan(p, x, y).count;
  };
  table.forward = &forward;
  table.backward_input_items = [](const ConvProblem& p, const Array4& grad, const Array4& grad_x) {
    return backward_input_plan(p, grad, grad_x).count;
  };
  table.backward_input = &backward_input;
  table.backward_weight_items = [](const ConvProblem& p, const Array4& grad, const Array4& x) {
    return WeightItems(p, grad, x).count();
  };
  table.partial_size = &partial_size;
  table.backward_weight = &backward_weight_items;
  table.reduce = &reduce;
  table.shared_forward_items = &shared_forward_items;
  table.shared_forward = &shared_forward;
  table.shared_backward_items = [](const ConvProblem& p, const Array4& grad) {
    return WeightItems(p, grad, grad).chunks;
  };
  table.shared_backward = &shared_backward;
  return table;
}

}  // namespace fastbandit::cpu::FB_ISA

namespace fastbandit::cpu {

template <>
const ConvKernels& kernels_for<ConvKernels, FB_ISA::kIsa>() {
  static const ConvKernels table = FB_ISA::make_table();
  return table;
}

}  // namespace fastbandit::cpu
