// fastbandit::pack_sign, unpack_sign, binary_conv2d and binary_conv2d_bits on CUDA.
//
// Dense convolutions count the bits in which map and filter differ, or on tensor cores those that
// agree; depthwise ones add bits of 32 channels at once. Sums are integers, so every kernel gives
// the same bits. None has been measured: which of the two takes a dense convolution is decided by
// what the architecture has as an instruction.
#include "cuda/binary.h"

#include "cuda/element.h"
#include "cuda/mma_bits.h"
#include "cuda/pack.h"

namespace fastbandit {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarp = 32;

__device__ __forceinline__ int halves_of(int64_t channels) {
  return static_cast<int>((channels + 63) / 64 * 2);
}

// The channels of half word `half` that there are; what lies past them is not read.
__device__ __forceinline__ unsigned mask_of(int64_t channels, int half) {
  const int64_t rest = channels - int64_t{32} * half;
  return rest >= 32 ? kAll : rest <= 0 ? 0u : (1u << rest) - 1u;
}

// ---- Packing ------------------------------------------------------------------------------------

struct PackArgs {
  const void* x;
  int64_t n, c, h, w, stride_n, stride_c, stride_h, stride_w;
  const void* threshold;
  int threshold_dtype;
  int64_t threshold_stride;
  uint32_t* bits;
};

template <class T>
__device__ __forceinline__ bool is_set(const PackArgs& a, const T* pixel, int64_t channel) {
  using C = compute_t<T>;
  const C limit = a.threshold == nullptr
                      ? C(0)
                      : load_element<C>(a.threshold, a.threshold_dtype,
                                        channel * a.threshold_stride);
  return static_cast<C>(to_compute(pixel[channel * a.stride_c])) >= limit;
}

// Channels together: a warp for 32 channels of a pixel.
template <class T>
__global__ void __launch_bounds__(kThreads) pack_inner_kernel(PackArgs a) {
  const int halves = halves_of(a.c), lane = threadIdx.x % kWarp;
  const int64_t total = a.n * a.h * a.w * halves;
  for (int64_t item = thread_in_grid() / kWarp; item < total; item += threads_of_grid() / kWarp) {
    const int64_t pixel = item / halves, channel = item % halves * 32 + lane;
    const int64_t w = pixel % a.w, row = pixel / a.w;
    const T* const from = static_cast<const T*>(a.x) + row / a.h * a.stride_n +
                          row % a.h * a.stride_h + w * a.stride_w;
    const unsigned word = __ballot_sync(kAll, channel < a.c && is_set(a, from, channel));
    if (lane == 0) a.bits[item] = word;
  }
}

// Channels apart: a thread for 32 channels of a pixel, neighbours of a warp beside each other.
template <class T>
__global__ void __launch_bounds__(kThreads) pack_planar_kernel(PackArgs a) {
  const int halves = halves_of(a.c);
  const int64_t plane = a.h * a.w, total = a.n * halves * plane;
  for (int64_t item = thread_in_grid(); item < total; item += threads_of_grid()) {
    const int64_t at = item % plane, outer = item / plane, half = outer % halves;
    const int64_t n = outer / halves, first = half * 32;
    const T* const from = static_cast<const T*>(a.x) + n * a.stride_n + at / a.w * a.stride_h +
                          at % a.w * a.stride_w;
    const int count = static_cast<int>(a.c - first < 32 ? a.c - first : 32);
    unsigned word = 0;
#pragma unroll 4
    for (int i = 0; i < count; ++i) word |= static_cast<unsigned>(is_set(a, from, first + i)) << i;
    a.bits[(n * plane + at) * halves + half] = word;
  }
}

__global__ void __launch_bounds__(kThreads) unpack_kernel(PackArgs a, void* x, int dtype) {
  const int halves = halves_of(a.c);
  const int64_t plane = a.h * a.w, total = a.n * a.c * plane;
  for (int64_t item = thread_in_grid(); item < total; item += threads_of_grid()) {
    int64_t n, c, at;  // in the order of the result in memory
    if (a.stride_c == 1) {
      c = item % a.c, at = item / a.c % plane, n = item / a.c / plane;
    } else {
      at = item % plane, c = item / plane % a.c, n = item / plane / a.c;
    }
    const unsigned word = a.bits[(n * plane + at) * halves + c / 32];
    store_element<float>(x, dtype,
                         n * a.stride_n + c * a.stride_c + at / a.w * a.stride_h +
                             at % a.w * a.stride_w,
                         (word >> c % 32 & 1u) != 0 ? 1.0f : -1.0f);
  }
}

// ---- Results ------------------------------------------------------------------------------------

__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }

// A filter's constant: float32, or float64 beside a result in float64.
template <class C>
__device__ __forceinline__ C constant_of(const void* data, int dtype, int64_t at) {
  if constexpr (sizeof(C) == sizeof(double))
    if (dtype == kFloat64) return static_cast<const double*>(data)[at];
  return static_cast<C>(static_cast<const float*>(data)[at]);
}

// scale * sum + bias, product and sum each rounded once in C, which is double for results in it.
template <class C>
struct Affine {
  static constexpr bool kBits = false;
  const void *scale, *bias;
  int scale_dtype, bias_dtype;
  int64_t scale_stride, bias_stride;
  void* y;
  int dtype;

  __device__ __forceinline__ void store(int64_t at, int64_t filter, int sum) const {
    C value = static_cast<C>(sum);
    if (scale != nullptr)
      value = multiply(constant_of<C>(scale, scale_dtype, filter * scale_stride), value);
    if (bias != nullptr)
      value = add(value, constant_of<C>(bias, bias_dtype, filter * bias_stride));
    if constexpr (sizeof(C) == sizeof(double))
      static_cast<C*>(y)[at] = value;
    else
      store_element<C>(y, dtype, at, value);
  }
  __device__ __forceinline__ bool reached(int64_t, int) const { return false; }
  __device__ __forceinline__ void word(int64_t, unsigned) const {}
};

// (sum >= threshold) != flip, as bits.
struct Threshold {
  static constexpr bool kBits = true;
  const void* threshold;
  const uint8_t* flip;
  int bytes;
  int64_t threshold_stride, flip_stride;
  uint32_t* y;

  __device__ __forceinline__ bool reached(int64_t filter, int sum) const {
    const int64_t at = filter * threshold_stride;
    const int limit = bytes == 2 ? static_cast<const int16_t*>(threshold)[at]
                                 : static_cast<const int32_t*>(threshold)[at];
    return (sum >= limit) != (flip[filter * flip_stride] != 0);
  }
  __device__ __forceinline__ void word(int64_t at, unsigned value) const { y[at] = value; }
  __device__ __forceinline__ void store(int64_t, int64_t, int) const {}
};

// ---- Convolutions -------------------------------------------------------------------------------

struct ConvArgs {
  const uint32_t *x, *weight;
  int64_t n, channels, filters;
  int h, w, oh, ow, kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, plus_one;
  int64_t pad_h, pad_w;
  int halves;      // of a pixel, and of a tap of a dense filter
  int used;        // those of them that have a channel
  int out_halves;  // of a pixel of the result
};

// Where a pixel of the result reads.
struct Window {
  int64_t image;  // first half word of its image
  int64_t top, left;

  Window() = default;
  __device__ __forceinline__ Window(const ConvArgs& a, int64_t pixel) {
    const int64_t column = pixel % a.ow, row = pixel / a.ow;
    image = row / a.oh * a.h * a.w * a.halves;
    top = row % a.oh * a.stride_h - a.pad_h;
    left = column * a.stride_w - a.pad_w;
  }
  // The first half word under a tap; -1 outside of the map.
  __device__ __forceinline__ int64_t at(const ConvArgs& a, int i, int j) const {
    const int64_t y = top + int64_t{i} * a.dilation_h, x = left + int64_t{j} * a.dilation_w;
    if (y < 0 || y >= a.h || x < 0 || x >= a.w) return -1;
    return image + (y * a.w + x) * a.halves;
  }
  // Taps that add to the sum.
  __device__ __forceinline__ int taps(const ConvArgs& a) const {
    if (a.plus_one) return a.kernel_h * a.kernel_w;
    return inside(top, a.dilation_h, a.kernel_h, a.h) * inside(left, a.dilation_w, a.kernel_w, a.w);
  }
  __device__ static __forceinline__ int inside(int64_t first, int dilation, int count, int size) {
    // Of the positions first + i dilation those in [0, size).
    const int64_t below = first >= 0 ? 0 : (-first + dilation - 1) / dilation;
    const int64_t end = first >= size ? 0 : (size - first + dilation - 1) / dilation;
    const int64_t last = end < count ? end : count;
    return last > below ? static_cast<int>(last - below) : 0;
  }
};

constexpr int kPixels = 4;  // of a warp of the counting kernel, which share the words of a filter

// A warp for 32 filters of kPixels pixels, a lane for each filter.
template <class Result>
__global__ void __launch_bounds__(kThreads, 2) count_kernel(ConvArgs a, Result result) {
  const int lane = threadIdx.x % kWarp;
  const int groups = Result::kBits ? a.out_halves : static_cast<int>((a.filters + 31) / 32);
  const int64_t pixels = a.n * a.oh * a.ow, total = (pixels + kPixels - 1) / kPixels * groups;
  for (int64_t item = thread_in_grid() / kWarp; item < total; item += threads_of_grid() / kWarp) {
    const int64_t filter = item % groups * 32 + lane, first = item / groups * kPixels;
    const bool real = filter < a.filters;
    const uint32_t* weight =
        a.weight + (real ? filter : 0) * a.kernel_h * a.kernel_w * a.halves;
    Window windows[kPixels];
    int differ[kPixels] = {};
#pragma unroll
    for (int p = 0; p < kPixels; ++p) windows[p] = Window(a, first + p);
#pragma unroll 1
    for (int i = 0; i < a.kernel_h; ++i) {
#pragma unroll 1
      for (int j = 0; j < a.kernel_w; ++j, weight += a.halves) {
        int64_t at[kPixels];
#pragma unroll
        for (int p = 0; p < kPixels; ++p)
          at[p] = first + p < pixels ? windows[p].at(a, i, j) : -1;
#pragma unroll 2
        for (int half = 0; half < a.used; ++half) {
          const unsigned mask = mask_of(a.channels, half), filter_word = weight[half];
#pragma unroll
          for (int p = 0; p < kPixels; ++p) {
            if (at[p] >= 0)
              differ[p] += __popc((a.x[at[p] + half] ^ filter_word) & mask);
            else if (a.plus_one)
              differ[p] += __popc(~filter_word & mask);
          }
        }
      }
    }
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      const int64_t pixel = first + p;
      if (pixel >= pixels) continue;
      const int sum = windows[p].taps(a) * static_cast<int>(a.channels) - 2 * differ[p];
      if (Result::kBits) {
        const unsigned word = __ballot_sync(kAll, real && result.reached(filter, sum));
        if (lane == 0) result.word(pixel * a.out_halves + item % groups, word);
      } else if (real) {
        result.store(pixel * a.filters + filter, filter, sum);
      }
    }
  }
}

// A position among the half words of a filter, tap after tap, and the step to the next one.
struct Place {
  int row, column, half;

  __device__ __forceinline__ Place(const ConvArgs& a, int at) {
    half = at % a.used;
    const int tap = at / a.used;
    row = tap / a.kernel_w, column = tap % a.kernel_w;
  }
  __device__ __forceinline__ bool there(const ConvArgs& a) const { return row < a.kernel_h; }
  __device__ __forceinline__ void forward(const ConvArgs& a, int by) {
    half += by;
    while (half >= a.used) {
      half -= a.used;
      if (++column == a.kernel_w) column = 0, ++row;
    }
  }
};

// Bits that are +1 and bits that are -1: a product of signs is +1 where both agree, and padding with
// 0 is neither.
struct Signs {
  unsigned plus, minus;
};

__device__ __forceinline__ Signs map_signs(const ConvArgs& a, const Window& window, bool real,
                                           const Place& place) {
  if (!real || !place.there(a)) return {0u, 0u};
  const unsigned mask = mask_of(a.channels, place.half);
  const int64_t at = window.at(a, place.row, place.column);
  if (at < 0) return {a.plus_one ? mask : 0u, 0u};
  const unsigned word = a.x[at + place.half];
  return {word & mask, ~word & mask};
}

__device__ __forceinline__ Signs filter_signs(const ConvArgs& a, int64_t filter,
                                              const Place& place) {
  if (filter >= a.filters || !place.there(a)) return {0u, 0u};
  const unsigned mask = mask_of(a.channels, place.half);
  const int64_t tap = (filter * a.kernel_h + place.row) * a.kernel_w + place.column;
  const unsigned word = a.weight[tap * a.halves + place.half];
  return {word & mask, ~word & mask};
}

// A warp for 32 filters of 16 pixels on tensor cores: sum = 2 (places that agree) - products.
template <class Result>
__global__ void __launch_bounds__(kThreads, 2) mma_kernel(ConvArgs a, Result result) {
  const int lane = threadIdx.x % kWarp, group = lane / 4, place = lane % 4;
  const int groups = Result::kBits ? a.out_halves : static_cast<int>((a.filters + 31) / 32);
  const int64_t pixels = a.n * a.oh * a.ow, total = (pixels + 15) / 16 * groups;
  const int words = a.kernel_h * a.kernel_w * a.used;
  for (int64_t item = thread_in_grid() / kWarp; item < total; item += threads_of_grid() / kWarp) {
    const int64_t base = item % groups * 32, pixel[2] = {item / groups * 16 + group,
                                                         item / groups * 16 + group + 8};
    const bool real[2] = {pixel[0] < pixels, pixel[1] < pixels};
    const Window windows[2] = {Window(a, real[0] ? pixel[0] : 0), Window(a, real[1] ? pixel[1] : 0)};
    int agree[4][4] = {};
    Place low(a, place), high(a, place + 4);
#pragma unroll 1
    for (int step = 0; step < words; step += 8, low.forward(a, 8), high.forward(a, 8)) {
      unsigned plus[4], minus[4];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const Signs first = map_signs(a, windows[r], real[r], low);
        const Signs second = map_signs(a, windows[r], real[r], high);
        plus[r] = first.plus, minus[r] = first.minus;
        plus[r + 2] = second.plus, minus[r + 2] = second.minus;
      }
#pragma unroll
      for (int tile = 0; tile < 4; ++tile) {
        const int64_t filter = base + tile * 8 + group;
        const Signs first = filter_signs(a, filter, low), second = filter_signs(a, filter, high);
        const unsigned with[2] = {first.plus, second.plus}, against[2] = {first.minus, second.minus};
        mma_and_popc(agree[tile], plus, with);
        mma_and_popc(agree[tile], minus, against);
      }
    }
    // One row after the other: the stores below are long, and eight of them are enough.
#pragma unroll 1
    for (int r = 0; r < 2; ++r) {
      const int64_t at = r == 0 ? pixel[0] : pixel[1];
      const bool there = at < pixels;
      const int products = Window(a, there ? at : 0).taps(a) * static_cast<int>(a.channels);
      unsigned word = 0;
#pragma unroll
      for (int tile = 0; tile < 4; ++tile) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = tile * 8 + 2 * place + e;
          const int64_t filter = base + column;
          if (!there || filter >= a.filters) continue;
          const int sum = 2 * (r == 0 ? agree[tile][e] : agree[tile][2 + e]) - products;
          if (Result::kBits)
            word |= static_cast<unsigned>(result.reached(filter, sum)) << column;
          else
            result.store(at * a.filters + filter, filter, sum);
        }
      }
      if (Result::kBits) {
        word |= __shfl_xor_sync(kAll, word, 1);
        word |= __shfl_xor_sync(kAll, word, 2);
        if (there && place == 0) result.word(at * a.out_halves + item % groups, word);
      }
    }
  }
}

// A thread for 32 channels of a pixel. Their counts of differing taps are numbers of kPlanes bits,
// bit p of all of them in plane[p]: a tap is added to all at once.
template <int kPlanes, class Result>
__global__ void __launch_bounds__(kThreads, 2) depthwise_kernel(ConvArgs a, Result result) {
  const int lane = threadIdx.x % kWarp;
  const int64_t pixels = a.n * a.oh * a.ow, total = pixels * a.halves;
  const int64_t step = threads_of_grid(), turns = (total + step - 1) / step;
  // Whole warps go on together: the lanes of one write the channels of each of its words in turn.
  for (int64_t turn = 0; turn < turns; ++turn) {
    const int64_t item = turn * step + thread_in_grid();
    const int64_t pixel = item < total ? item / a.halves : 0;
    const int half = item < total ? static_cast<int>(item % a.halves) : 0;
    const Window window(a, pixel);
    unsigned plane[kPlanes] = {};
    const uint32_t* weight = a.weight + half;
#pragma unroll 1
    for (int i = 0; i < a.kernel_h; ++i) {
#pragma unroll 1
      for (int j = 0; j < a.kernel_w; ++j, weight += a.halves) {
        const int64_t at = window.at(a, i, j);
        if (at < 0 && !a.plus_one) continue;
        unsigned carry = (at < 0 ? kAll : a.x[at + half]) ^ *weight;
#pragma unroll
        for (int p = 0; p < kPlanes; ++p) {
          const unsigned both = plane[p] & carry;
          plane[p] ^= carry;
          carry = both;
        }
      }
    }
    const int taps = window.taps(a);
    if (Result::kBits) {
      unsigned word = 0;
      const int64_t first = int64_t{half} * 32;
      const int count = static_cast<int>(a.filters - first < 32 ? a.filters - first : 32);
#pragma unroll 1
      for (int c = 0; c < count; ++c) {
        int differ = 0;
#pragma unroll
        for (int p = 0; p < kPlanes; ++p) differ |= static_cast<int>(plane[p] >> c & 1u) << p;
        word |= static_cast<unsigned>(result.reached(first + c, taps - 2 * differ)) << c;
      }
      if (item < total) result.word(item, word);
      continue;
    }
    const int64_t first = item - lane;
#pragma unroll 1
    for (int source = 0; source < kWarp; ++source) {
      int differ = 0;
#pragma unroll
      for (int p = 0; p < kPlanes; ++p)
        differ |= static_cast<int>(__shfl_sync(kAll, plane[p], source) >> lane & 1u) << p;
      const int valid = __shfl_sync(kAll, taps, source);
      const int64_t filter = (first + source) % a.halves * 32 + lane;
      if (first + source < total && filter < a.filters)
        result.store((first + source) / a.halves * a.filters + filter, filter, valid - 2 * differ);
    }
  }
}

// ---- Launching ----------------------------------------------------------------------------------

ConvArgs args_of(const uint32_t* bits, const uint32_t* weight, const int64_t* s) {
  ConvArgs a{};
  a.x = bits, a.weight = weight;
  a.n = s[kSignN], a.channels = s[kSignChannels], a.filters = s[kSignFilters];
  a.h = static_cast<int>(s[kSignH]), a.w = static_cast<int>(s[kSignW]);
  a.oh = static_cast<int>(s[kSignOutH]), a.ow = static_cast<int>(s[kSignOutW]);
  a.kernel_h = static_cast<int>(s[kSignKernelH]), a.kernel_w = static_cast<int>(s[kSignKernelW]);
  a.stride_h = static_cast<int>(s[kSignStrideH]), a.stride_w = static_cast<int>(s[kSignStrideW]);
  a.dilation_h = static_cast<int>(s[kSignDilationH]);
  a.dilation_w = static_cast<int>(s[kSignDilationW]);
  a.pad_h = s[kSignPadH], a.pad_w = s[kSignPadW];
  a.plus_one = static_cast<int>(s[kSignPlusOne]);
  a.halves = static_cast<int>((a.channels + 63) / 64 * 2);
  a.used = static_cast<int>((a.channels + 31) / 32);
  a.out_halves = static_cast<int>((a.filters + 63) / 64 * 2);
  return a;
}

// Whether the current device multiplies bits on tensor cores by an instruction of its own.
bool has_mma() {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major == 8 || major == 9;
}

template <class Result>
const char* launch_conv(const ConvArgs& a, const Result& result, bool depthwise, int kernel,
                        void* stream) {
  const int64_t pixels = a.n * a.oh * a.ow;
  const int64_t taps = int64_t{a.kernel_h} * a.kernel_w;
  if (depthwise) {
    const unsigned blocks = grid_size(pixels * a.halves, kThreads);
    if (taps < 16)
      FB_LAUNCH((depthwise_kernel<4, Result>), blocks, kThreads, 0, stream, a, result);
    else if (taps < 64)
      FB_LAUNCH((depthwise_kernel<6, Result>), blocks, kThreads, 0, stream, a, result);
    else  // at most 2^24
      FB_LAUNCH((depthwise_kernel<25, Result>), blocks, kThreads, 0, stream, a, result);
    return launch_error();
  }
  const int64_t groups = Result::kBits ? a.out_halves : (a.filters + 31) / 32;
  // A step takes 256 products; with less than half of one most of it would be empty.
  if (kernel == kSignAuto) kernel = has_mma() && taps * a.channels >= 128 ? kSignMma : kSignCount;
  if (kernel == kSignMma) {
    const unsigned blocks = grid_size((pixels + 15) / 16 * groups * kWarp, kThreads);
    FB_LAUNCH((mma_kernel<Result>), blocks, kThreads, 0, stream, a, result);
  } else {
    const unsigned blocks =
        grid_size((pixels + kPixels - 1) / kPixels * groups * kWarp, kThreads);
    FB_LAUNCH((count_kernel<Result>), blocks, kThreads, 0, stream, a, result);
  }
  return launch_error();
}

PackArgs map_args(const int64_t* sizes, const int64_t* strides) {
  PackArgs a{};
  a.n = sizes[0], a.c = sizes[1], a.h = sizes[2], a.w = sizes[3];
  a.stride_n = strides[0], a.stride_c = strides[1], a.stride_h = strides[2], a.stride_w = strides[3];
  return a;
}

}  // namespace

FB_LAUNCHER launch_pack_sign(const void* x, int dtype, const int64_t* sizes,
                             const int64_t* strides, const void* threshold, int threshold_dtype,
                             int64_t threshold_stride, uint32_t* bits, void* stream) {
  PackArgs a = map_args(sizes, strides);
  a.x = x, a.bits = bits;
  a.threshold = threshold, a.threshold_dtype = threshold_dtype;
  a.threshold_stride = threshold_stride;
  const int64_t items = a.n * a.h * a.w * ((a.c + 63) / 64 * 2);
  return launch_floating(dtype, [&](auto tag) {
    using T = decltype(tag);
    if (a.stride_c == 1) {
      const unsigned blocks = grid_size(items * kWarp, kThreads);
      FB_LAUNCH((pack_inner_kernel<T>), blocks, kThreads, 0, stream, a);
    } else {
      FB_LAUNCH((pack_planar_kernel<T>), grid_size(items, kThreads), kThreads, 0, stream, a);
    }
  });
}

FB_LAUNCHER launch_unpack_sign(const uint32_t* bits, void* x, int dtype, const int64_t* sizes,
                               const int64_t* strides, void* stream) {
  PackArgs a = map_args(sizes, strides);
  a.bits = const_cast<uint32_t*>(bits);
  const unsigned blocks = grid_size(a.n * a.c * a.h * a.w, kThreads);
  FB_LAUNCH((unpack_kernel), blocks, kThreads, 0, stream, a, x, dtype);
  return launch_error();
}

FB_LAUNCHER launch_sign_conv2d(const uint32_t* bits, const uint32_t* weight, const int64_t* shape,
                               const void* scale, int scale_dtype, int64_t scale_stride,
                               const void* bias, int bias_dtype, int64_t bias_stride, void* y,
                               int dtype, int kernel, void* stream) {
  const ConvArgs a = args_of(bits, weight, shape);
  const bool depthwise = shape[kSignDepthwise] != 0;
  if (dtype == kFloat64) {
    const Affine<double> result{scale,       bias,        scale_dtype, bias_dtype,
                                scale_stride, bias_stride, y,           dtype};
    return launch_conv(a, result, depthwise, kernel, stream);
  }
  const Affine<float> result{scale,        bias,        scale_dtype, bias_dtype,
                             scale_stride, bias_stride, y,           dtype};
  return launch_conv(a, result, depthwise, kernel, stream);
}

FB_LAUNCHER launch_sign_conv2d_bits(const uint32_t* bits, const uint32_t* weight,
                                    const int64_t* shape, const void* threshold,
                                    int threshold_bytes, int64_t threshold_stride,
                                    const void* flip, int64_t flip_stride, uint32_t* y, int kernel,
                                    void* stream) {
  const Threshold result{threshold,        static_cast<const uint8_t*>(flip),
                         threshold_bytes,  threshold_stride,
                         flip_stride,      y};
  return launch_conv(args_of(bits, weight, shape), result, shape[kSignDepthwise] != 0, kernel,
                     stream);
}

}  // namespace fastbandit
