// fastbandit::max_pool2d and its backward on the CPU: windows of 3 x 3 with a padding of 1, for
// float32 in channels-last.
//
// A run of values that lie side by side (the channels of a pixel; at stride 1 those of all pixels
// that have whole windows) is compared with the same run under each tap of the window, in registers.
// The tap that won is kept in a byte; backward gathers from the windows around a pixel, so no
// thread writes where another one does.
#include "cpu/norm.h"
#include "cpu/pool_problem.h"

namespace fastbandit {
namespace {

using namespace norm;

constexpr const char* kOp = "max_pool2d";

using cpu::PoolKernels;
using cpu::Taps;

// Sizes of input and output, and which pixels an output looks at.
struct Windows {
  int64_t n, c, h, w, stride, oh, ow;

  Windows(const char* op, int64_t n, int64_t c, int64_t h, int64_t w, int64_t stride)
      : n(n), c(c), h(h), w(w), stride(stride) {
    FB_CHECK(stride == 1 || stride == 2, op, "stride: expected 1 or 2, got ", stride);
    FB_CHECK(c > 0 && h > 0 && w > 0, op, "expected at least one channel and pixel, got ", c,
             " channels and ", h, " x ", w, " pixels");
    oh = (h - 1) / stride + 1;
    ow = (w - 1) / stride + 1;
  }

  // The pixels under the window of output (y, x), in floats of their image.
  Taps pixels(int64_t y, int64_t x) const {
    Taps taps;
    const int64_t top = y * stride - 1, left = x * stride - 1;
    for (int64_t r = std::max<int64_t>(0, -top); r < 3 && top + r < h; ++r)
      for (int64_t q = std::max<int64_t>(0, -left); q < 3 && left + q < w; ++q)
        taps.add(((top + r) * w + left + q) * c, r * 3 + q);
    return taps;
  }

  // The outputs whose windows hold pixel (y, x), from the first on: so torch adds them up.
  Taps outputs(int64_t y, int64_t x) const {
    Taps taps;
    const int64_t shift = stride - 1;  // no division for each pixel
    for (int64_t r = 2; r >= 0; --r) {
      const int64_t row = y + 1 - r;
      if (row < 0 || (row & shift) != 0 || row >> shift >= oh) continue;
      for (int64_t q = 2; q >= 0; --q) {
        const int64_t column = x + 1 - q;
        if (column < 0 || (column & shift) != 0 || column >> shift >= ow) continue;
        taps.add(((row >> shift) * ow + (column >> shift)) * c, r * 3 + q);
      }
    }
    return taps;
  }

  // f(first pixel of a run, pixels in it) over a row of `columns`. At stride 1 all but the first
  // and the last pixel have the same neighbours.
  template <class F>
  void runs(int64_t columns, const F& f) const {
    for (int64_t x = 0; x < columns;) {
      const int64_t count = stride == 1 && x == 1 && columns > 2 ? columns - 2 : 1;
      f(x, count);
      x += count;
    }
  }

  Tensor map(const Tensor& like, int64_t height, int64_t width, ScalarType dtype) const {
    const int64_t sizes[4] = {n, c, height, width};
    const int64_t strides[4] = {height * width * c, 1, width * c, c};
    return empty_strided(like, sizes, strides, 4, dtype);
  }

  // f(image, row, row among all images) for the rows of all images.
  template <class F>
  void for_rows(int64_t rows, const F& f) const {
    parallel(n * rows, std::max<int64_t>(1, kGrain / (w * c)), [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) f(at / rows, at % rows, at);
    });
  }
};

std::tuple<Tensor, Tensor> max_pool2d(Tensor x, int64_t stride) {
  check_dtype(kOp, "x", x, ScalarType::Float);
  FB_CHECK(x.dim() == 4 && is_dense_channels_last(x), kOp,
           "x: expected a dense channels-last tensor [N, C, H, W], got shape ", shape_text(x));
  const Windows windows(kOp, x.size(0), x.size(1), x.size(2), x.size(3), stride);
  const int64_t c = windows.c, image_floats = windows.h * windows.w * c;
  Tensor y = windows.map(x, windows.oh, windows.ow, ScalarType::Float);
  Tensor which = windows.map(x, windows.oh, windows.ow, ScalarType::Byte);
  const PoolKernels& kernels = cpu::kernels<PoolKernels>();
  const float* const from = floats(x);
  float* const to = floats_to_write(y);
  uint8_t* const won = static_cast<uint8_t*>(which.mutable_data_ptr());
  windows.for_rows(windows.oh, [&](int64_t image, int64_t row, int64_t at) {
    windows.runs(windows.ow, [&](int64_t first, int64_t count) {
      const Taps taps = windows.pixels(row, first);
      const float* const values = from + image * image_floats;
      const int64_t out = (at * windows.ow + first) * c;
      kernels.largest(taps, values, count * c, to + out, won + out);
    });
  });
  return {y, which};
}

Tensor max_pool2d_backward(Tensor grad, Tensor which, int64_t height, int64_t width,
                           int64_t stride) {
  constexpr const char* kName = "max_pool2d_backward";
  check_dtype(kName, "grad", grad, ScalarType::Float);
  check_dtype(kName, "which", which, ScalarType::Byte);
  which = dense_channels_last(kName, "which", which);
  check_same_shape(kName, "grad", grad, "which", which);
  const Windows windows(kName, which.size(0), which.size(1), height, width, stride);
  const int64_t c = windows.c, image_floats = windows.oh * windows.ow * c;
  FB_CHECK(which.size(2) == windows.oh && which.size(3) == windows.ow, kName, "which: expected ",
           windows.oh, " x ", windows.ow, " windows, got shape ", shape_text(which));
  Tensor result = windows.map(grad, height, width, ScalarType::Float);
  const Tensor dense = dense_channels_last(
      grad, [&] { return windows.map(grad, windows.oh, windows.ow, ScalarType::Float); });
  const PoolKernels& kernels = cpu::kernels<PoolKernels>();
  const float* const g = floats(dense);
  const uint8_t* const taps = static_cast<const uint8_t*>(which.const_data_ptr());
  float* const to = floats_to_write(result);
  windows.for_rows(height, [&](int64_t image, int64_t row, int64_t at) {
    windows.runs(width, [&](int64_t first, int64_t count) {
      const Taps around = windows.outputs(row, first);
      const int64_t outputs = image * image_floats, in = (at * width + first) * c;
      kernels.gather(around, g + outputs, taps + outputs, count * c, to + in);
    });
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastbandit, CPU, library) {
  library.impl("max_pool2d", TORCH_BOX(&max_pool2d));
  library.impl("max_pool2d_backward", TORCH_BOX(&max_pool2d_backward));
}

}  // namespace fastbandit
