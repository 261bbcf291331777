// fastbandit::depthwise_conv2d and its two gradients on the CPU.
#include <memory>

#include "cpu/conv_tensor.h"
#include "cpu/depthwise_conv2d.h"
#include "cpu/isa.h"

namespace fastbandit::cpu {

namespace {

// Eight channels fill a vector of AVX2 and half of one of AVX-512; with four, AVX-512 is the faster
// one (docs/decisions.md#depthwise-eight-channels).
const ConvKernels& depthwise_kernels(const ConvProblem& p, const Array4& first) {
#if defined(__x86_64__)
  if (isa() >= Isa::avx512 && p.c == 8 && first.c == 1)
    return kernels_for<ConvKernels, Isa::avx2>();
#endif
  return kernels<ConvKernels>();
}

// ---- float64, for gradient checks: plain loops, one channel of one image at a time ---------------

struct DoubleMap {
  double* data;
  int64_t h, w;
  double& operator()(int64_t row, int64_t column) const { return data[row * h + column * w]; }
};

DoubleMap map_of(const Array4& a, int64_t n, int64_t c) {
  return {static_cast<double*>(a.data) + n * a.n + c * a.c, a.h, a.w};
}

// visit(output row, output column, tap row, tap column, input row, input column)
template <class Visit>
void for_each_tap(const ConvProblem& p, const Visit& visit) {
  for (int64_t oh = 0; oh < p.oh; ++oh) {
    for (int64_t ow = 0; ow < p.ow; ++ow) {
      for (int64_t i = 0; i < p.kernel_h; ++i) {
        const int64_t h = oh * p.stride_h + i * p.dilation_h - p.pad_h;
        if (h < 0 || h >= p.h) continue;
        for (int64_t j = 0; j < p.kernel_w; ++j) {
          const int64_t w = ow * p.stride_w + j * p.dilation_w - p.pad_w;
          if (w >= 0 && w < p.w) visit(oh, ow, i, j, h, w);
        }
      }
    }
  }
}

double relu_of(double value) { return value <= 0 ? 0 : value; }

void forward_double(const ConvProblem& p, const Array4& x, const Array4& weight, const Array4& y,
                    int64_t n, int64_t c) {
  const DoubleMap in = map_of(x, n, c), taps = map_of(weight, c, 0), out = map_of(y, n, c);
  for (int64_t h = 0; h < p.oh; ++h)
    for (int64_t w = 0; w < p.ow; ++w) out(h, w) = 0;
  for_each_tap(p, [&](int64_t oh, int64_t ow, int64_t i, int64_t j, int64_t h, int64_t w) {
    out(oh, ow) += taps(i, j) * (p.relu ? relu_of(in(h, w)) : in(h, w));
  });
}

void backward_input_double(const ConvProblem& p, const Array4& grad, const Array4& x,
                           const Array4& weight, const Array4& grad_x, int64_t n, int64_t c) {
  const DoubleMap g = map_of(grad, n, c), in = map_of(x, n, c), taps = map_of(weight, c, 0),
                  out = map_of(grad_x, n, c);
  for (int64_t h = 0; h < p.h; ++h)
    for (int64_t w = 0; w < p.w; ++w) out(h, w) = 0;
  for_each_tap(p, [&](int64_t oh, int64_t ow, int64_t i, int64_t j, int64_t h, int64_t w) {
    if (!p.relu || !(in(h, w) <= 0)) out(h, w) += taps(i, j) * g(oh, ow);
  });
}

void backward_weight_double(const ConvProblem& p, const Array4& grad, const Array4& x,
                            const Array4& grad_weight, int64_t c) {
  const DoubleMap out = map_of(grad_weight, c, 0);
  for (int64_t i = 0; i < p.kernel_h; ++i)
    for (int64_t j = 0; j < p.kernel_w; ++j) out(i, j) = 0;
  for (int64_t n = 0; n < p.n; ++n) {
    const DoubleMap g = map_of(grad, n, c), in = map_of(x, n, c);
    for_each_tap(p, [&](int64_t oh, int64_t ow, int64_t i, int64_t j, int64_t h, int64_t w) {
      out(i, j) += g(oh, ow) * (p.relu ? relu_of(in(h, w)) : in(h, w));
    });
  }
}

template <class Body>
void parallel(int64_t count, const Body& body) {
  torch::stable::parallel_for(0, count, 1, body);
}

// float32 taps of one call; thread-local, so that a training loop allocates nothing.
float* packed_taps(int64_t floats) {
  static thread_local std::vector<float> taps;
  if (static_cast<int64_t>(taps.size()) < floats) taps.resize(static_cast<size_t>(floats));
  return taps.data();
}

}  // namespace

Tensor depthwise_conv2d(Tensor x, Tensor weight, Pair stride, Pair padding, Pair dilation,
                        bool relu) {
  const char* op = "depthwise_conv2d";
  const ConvShape s = depthwise_shape(op, x, weight, stride, padding, dilation);
  Tensor y = empty_map(x, s.n, s.c, s.oh, s.ow);
  const ConvProblem p = problem_of(s, x.scalar_type(), relu);
  const Array4 in = array_of(x), taps = array_of(weight), out = array_of(y);
  if (y.numel() == 0) return y;
  if (p.type == Real::kFloat64) {
    parallel(p.n * p.c, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) forward_double(p, in, taps, out, i / p.c, i % p.c);
    });
    return y;
  }
  const ConvKernels& kernels = depthwise_kernels(p, in);
  float* packed = packed_taps(kernels.packed_size(p, in));
  kernels.pack(p, in, taps, packed);
  parallel(kernels.forward_items(p, in, out), [&](int64_t begin, int64_t end) {
    kernels.forward(p, in, packed, out, begin, end);
  });
  return y;
}

Tensor depthwise_conv2d_backward_input(Tensor grad, Tensor x, Tensor weight, Pair stride,
                                       Pair padding, Pair dilation, bool relu) {
  const char* op = "depthwise_conv2d_backward_input";
  const ConvShape s = depthwise_shape(op, x, weight, stride, padding, dilation);
  check_grad(op, grad, x, s);
  Tensor grad_x = empty_map(x, s.n, s.c, s.h, s.w);
  const ConvProblem p = problem_of(s, x.scalar_type(), relu);
  const Array4 g = array_of(grad), in = array_of(x), taps = array_of(weight),
               out = array_of(grad_x);
  if (grad_x.numel() == 0) return grad_x;
  if (p.type == Real::kFloat64) {
    parallel(p.n * p.c, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        backward_input_double(p, g, in, taps, out, i / p.c, i % p.c);
    });
    return grad_x;
  }
  const ConvKernels& kernels = depthwise_kernels(p, g);
  float* packed = packed_taps(kernels.packed_size(p, g));
  kernels.pack(p, g, taps, packed);
  parallel(kernels.backward_input_items(p, g, out), [&](int64_t begin, int64_t end) {
    kernels.backward_input(p, g, in, packed, out, begin, end);
  });
  return grad_x;
}

Tensor depthwise_conv2d_backward_weight(Tensor grad, Tensor x, Tensor weight, Pair stride,
                                        Pair padding, Pair dilation, bool relu) {
  const char* op = "depthwise_conv2d_backward_weight";
  const ConvShape s = depthwise_shape(op, x, weight, stride, padding, dilation);
  check_grad(op, grad, x, s);
  const int64_t sizes[4] = {s.c, 1, s.kernel_h, s.kernel_w};
  Tensor grad_weight = empty_contiguous(weight, sizes, 4, weight.scalar_type());
  const ConvProblem p = problem_of(s, x.scalar_type(), relu);
  const Array4 g = array_of(grad), in = array_of(x), out = array_of(grad_weight);
  if (grad_weight.numel() == 0) return grad_weight;
  if (grad.numel() == 0) {
    torch::stable::zero_(grad_weight);
    return grad_weight;
  }
  if (p.type == Real::kFloat64) {
    parallel(p.c, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) backward_weight_double(p, g, in, out, c);
    });
    return grad_weight;
  }
  const ConvKernels& kernels = depthwise_kernels(p, g);
  float* partial = packed_taps(kernels.partial_size(p, g, in));
  parallel(kernels.backward_weight_items(p, g, in), [&](int64_t begin, int64_t end) {
    kernels.backward_weight(p, g, in, partial, begin, end);
  });
  kernels.reduce(p, g, in, partial, out);
  return grad_weight;
}

}  // namespace fastbandit::cpu

STABLE_TORCH_LIBRARY_IMPL(fastbandit, CPU, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&fastbandit::cpu::depthwise_conv2d));
  m.impl("depthwise_conv2d_backward_input",
         TORCH_BOX(&fastbandit::cpu::depthwise_conv2d_backward_input));
  m.impl("depthwise_conv2d_backward_weight",
         TORCH_BOX(&fastbandit::cpu::depthwise_conv2d_backward_weight));
}
