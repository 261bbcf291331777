// fastbandit::gabor_filters, fastbandit::gabor_conv2d and their gradients on the CPU.
#include "math/gabor.h"

#include <tuple>
#include <type_traits>

#include "cpu/conv_tensor.h"
#include "dispatch.h"

namespace fastbandit::cpu {
namespace {

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The parameters of filter c, in the type of the computation.
template <class T>
GaborParameters<compute_t<T>> parameters_at(const GaborTensors& p, int64_t c) {
  const auto at = [c](const Tensor& t) {
    return to_compute(static_cast<const T*>(t.data_ptr())[c * t.strides()[0]]);
  };
  return {at(p.theta), at(p.sigma), at(p.gamma), at(p.wavelength), at(p.psi)};
}

// body(c) for every filter; a filter costs about as much as a hundred additions for each tap.
template <class Body>
void for_each_filter(int64_t count, int64_t taps, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, 512 / taps);
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) body(c);
  });
}

// [C_out][k][k]
template <class T, class Out>
void build_filters(const GaborTensors& p, int64_t kernel_size, Out* out) {
  using C = compute_t<T>;
  const int64_t half = kernel_size / 2, taps = kernel_size * kernel_size;
  for_each_filter(p.theta.size(0), taps, [&](int64_t c) {
    const GaborFilter<C> filter(parameters_at<T>(p, c));
    for (int64_t i = 0; i < taps; ++i) {
      const C value = filter.value(C(i / kernel_size - half), C(i % kernel_size - half));
      if constexpr (std::is_same_v<Out, T>) {
        out[c * taps + i] = round_to_nearest<T>(value);
      } else {
        out[c * taps + i] = static_cast<Out>(value);
      }
    }
  });
}

GaborTensors empty_gradients(const GaborTensors& p, bool wanted) {
  const int64_t size[1] = {wanted ? p.theta.size(0) : 0};
  const auto make = [&] { return empty_contiguous(p.theta, size, 1, p.theta.scalar_type()); };
  return {make(), make(), make(), make(), make()};
}

// grad: [C_out][k][k] with strides
template <class T, class G>
void filter_gradients(const GaborTensors& p, int64_t kernel_size, const G* grad, int64_t stride_c,
                      int64_t stride_h, int64_t stride_w, const GaborTensors& out) {
  using C = compute_t<T>;
  const int64_t half = kernel_size / 2;
  for_each_filter(p.theta.size(0), kernel_size * kernel_size, [&](int64_t c) {
    const GaborFilter<C> filter(parameters_at<T>(p, c));
    GaborParameters<C> sum{C(0), C(0), C(0), C(0), C(0)};
    for (int64_t i = 0; i < kernel_size; ++i) {
      for (int64_t j = 0; j < kernel_size; ++j) {
        const C g = static_cast<C>(to_compute(grad[c * stride_c + i * stride_h + j * stride_w]));
        filter.add_gradient(C(i - half), C(j - half), g, sum);
      }
    }
    const auto write = [c](const Tensor& t, C value) {
      static_cast<T*>(t.mutable_data_ptr())[c] = round_to_nearest<T>(value);
    };
    write(out.theta, sum.theta);
    write(out.sigma, sum.sigma);
    write(out.gamma, sum.gamma);
    write(out.wavelength, sum.wavelength);
    write(out.psi, sum.psi);
  });
}

Tensor gabor_filters(Tensor theta, Tensor sigma, Tensor gamma, Tensor wavelength, Tensor psi,
                     int64_t kernel_size) {
  const char* op = "gabor_filters";
  const GaborTensors p{theta, sigma, gamma, wavelength, psi};
  check_gabor_parameters(op, p, kernel_size);
  const int64_t sizes[3] = {theta.size(0), kernel_size, kernel_size};
  Tensor bank = empty_contiguous(theta, sizes, 3, theta.scalar_type());
  dispatch_floating(op, "theta", theta.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    build_filters<T>(p, kernel_size, static_cast<T*>(bank.mutable_data_ptr()));
  });
  return bank;
}

FiveTensors gabor_filters_backward(Tensor grad, Tensor theta, Tensor sigma, Tensor gamma,
                                   Tensor wavelength, Tensor psi, int64_t kernel_size) {
  const char* op = "gabor_filters_backward";
  const GaborTensors p{theta, sigma, gamma, wavelength, psi};
  check_gabor_parameters(op, p, kernel_size);
  FB_CHECK(grad.dim() == 3 && grad.size(0) == theta.size(0) && grad.size(1) == kernel_size &&
               grad.size(2) == kernel_size,
           op, "grad: expected [", theta.size(0), ", ", kernel_size, ", ", kernel_size, "], got ",
           shape_text(grad));
  check_dtype(op, "grad", grad, theta.scalar_type());
  check_same_device(op, "grad", grad, "theta", theta);
  const GaborTensors out = empty_gradients(p, true);
  const auto strides = grad.strides();
  dispatch_floating(op, "theta", theta.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    filter_gradients<T>(p, kernel_size, static_cast<const T*>(grad.data_ptr()), strides[0],
                        strides[1], strides[2], out);
  });
  return {out.theta, out.sigma, out.gamma, out.wavelength, out.psi};
}

// ---- float64, for gradient checks ----------------------------------------------------------------

double& at(const Array4& a, int64_t n, int64_t c, int64_t h, int64_t w) {
  return static_cast<double*>(a.data)[n * a.n + c * a.c + h * a.h + w * a.w];
}

// [H][W] of image n
std::vector<double> channel_sum_double(const ConvProblem& p, int64_t channels, const Array4& x,
                                       int64_t n) {
  std::vector<double> sum(static_cast<size_t>(p.h * p.w), 0.0);
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t h = 0; h < p.h; ++h)
      for (int64_t w = 0; w < p.w; ++w) sum[static_cast<size_t>(h * p.w + w)] += at(x, n, c, h, w);
  return sum;
}

// visit(output channel, output row, output column, tap, input pixel) for one image
template <class Visit>
void for_each_tap(const ConvProblem& p, const Visit& visit) {
  for (int64_t c = 0; c < p.c; ++c)
    for (int64_t oh = 0; oh < p.oh; ++oh)
      for (int64_t ow = 0; ow < p.ow; ++ow)
        for (int64_t i = 0; i < p.kernel_h; ++i)
          for (int64_t j = 0; j < p.kernel_w; ++j) {
            const int64_t h = oh * p.stride_h + i * p.dilation_h - p.pad_h;
            const int64_t w = ow * p.stride_w + j * p.dilation_w - p.pad_w;
            if (h < 0 || h >= p.h || w < 0 || w >= p.w) continue;
            visit(c, oh, ow, static_cast<size_t>((c * p.kernel_h + i) * p.kernel_w + j),
                  static_cast<size_t>(h * p.w + w));
          }
}

// ---- the convolution -----------------------------------------------------------------------------

// The filter bank in the kernels' order; both buffers are kept, as the taps of depthwise_conv2d.
float* packed_bank(const ConvKernels& kernels, const char* op, const ConvProblem& p,
                   const GaborTensors& parameters, const Array4& first) {
  static thread_local std::vector<float> bank, packed;
  const int64_t taps = p.kernel_h * p.kernel_w;
  bank.resize(static_cast<size_t>(p.c * taps));
  float* out = bank.data();
  dispatch_floating(op, "theta", parameters.theta.scalar_type(), [&](auto tag) {
    build_filters<typename decltype(tag)::type>(parameters, p.kernel_h, out);
  });
  ConvProblem as_float = p;
  as_float.type = Real::kFloat32;
  packed.resize(static_cast<size_t>(kernels.packed_size(p, first)));
  kernels.pack(as_float, first, {out, taps, taps, p.kernel_w, 1}, packed.data());
  return packed.data();
}

Tensor gabor_conv2d(Tensor x, Tensor theta, Tensor sigma, Tensor gamma, Tensor wavelength,
                    Tensor psi, int64_t kernel_size, Pair stride, Pair padding, Pair dilation) {
  const char* op = "gabor_conv2d";
  const GaborTensors parameters{theta, sigma, gamma, wavelength, psi};
  const ConvShape s = gabor_shape(op, x, parameters, kernel_size, stride, padding, dilation);
  Tensor y = empty_map(x, s.n, s.c, s.oh, s.ow);
  if (y.numel() == 0) return y;
  ConvProblem p = problem_of(s, x.scalar_type(), false);
  p.shared = true;
  const Array4 in = array_of(x), out = array_of(y);
  const int64_t channels = x.size(1);
  if (p.type == Real::kFloat64) {
    std::vector<double> bank(static_cast<size_t>(p.c * kernel_size * kernel_size));
    build_filters<double>(parameters, kernel_size, bank.data());
    torch::stable::zero_(y);
    torch::stable::parallel_for(0, p.n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const std::vector<double> sum = channel_sum_double(p, channels, in, n);
        for_each_tap(p, [&](int64_t c, int64_t oh, int64_t ow, size_t tap, size_t pixel) {
          at(out, n, c, oh, ow) += bank[tap] * sum[pixel];
        });
      }
    });
    return y;
  }
  const ConvKernels& kernels = cpu::kernels<ConvKernels>();
  const float* packed = packed_bank(kernels, op, p, parameters, out);
  torch::stable::parallel_for(
      0, kernels.shared_forward_items(p), 1, [&](int64_t begin, int64_t end) {
        kernels.shared_forward(p, channels, in, packed, out, begin, end);
      });
  return y;
}

// First result: the gradient of the channel sum, [N, 1, H, W]; that of x is the same for every
// channel, and Python expands it.
SixTensors gabor_conv2d_backward(Tensor grad, Tensor x, Tensor theta, Tensor sigma, Tensor gamma,
                                 Tensor wavelength, Tensor psi, int64_t kernel_size, Pair stride,
                                 Pair padding, Pair dilation, std::vector<bool> output_mask) {
  const char* op = "gabor_conv2d_backward";
  const GaborTensors parameters{theta, sigma, gamma, wavelength, psi};
  const ConvShape s = gabor_shape(op, x, parameters, kernel_size, stride, padding, dilation);
  check_grad(op, grad, x, s);
  FB_CHECK(output_mask.size() == 2, op, "output_mask: expected two values");
  const bool need_x = output_mask[0], need_filters = output_mask[1];
  const int64_t none[1] = {0}, plane[4] = {s.n, 1, s.h, s.w};
  Tensor grad_sum = need_x ? empty_contiguous(x, plane, 4, x.scalar_type())
                           : empty_contiguous(x, none, 1, x.scalar_type());
  const GaborTensors gradients = empty_gradients(parameters, need_filters);
  ConvProblem p = problem_of(s, x.scalar_type(), false);
  p.shared = true;
  const Array4 g = array_of(grad), in = array_of(x);
  const int64_t channels = x.size(1), taps = kernel_size * kernel_size;

  if (p.type == Real::kFloat64) {
    std::vector<double> bank(static_cast<size_t>(p.c * taps)), grad_bank(bank.size(), 0.0);
    build_filters<double>(parameters, kernel_size, bank.data());
    if (need_x) torch::stable::zero_(grad_sum);
    for (int64_t n = 0; n < p.n; ++n) {
      const std::vector<double> sum = channel_sum_double(p, channels, in, n);
      double* to = need_x ? static_cast<double*>(grad_sum.mutable_data_ptr()) + n * p.h * p.w
                          : nullptr;
      for_each_tap(p, [&](int64_t c, int64_t oh, int64_t ow, size_t tap, size_t pixel) {
        const double value = at(g, n, c, oh, ow);
        grad_bank[tap] += value * sum[pixel];
        if (to) to[pixel] += value * bank[tap];
      });
    }
    if (need_filters) {
      filter_gradients<double>(parameters, kernel_size, grad_bank.data(), taps, kernel_size,
                               int64_t{1}, gradients);
    }
  } else {
    static thread_local std::vector<float> partial, grad_bank;
    const ConvKernels& kernels = cpu::kernels<ConvKernels>();
    grad_bank.assign(static_cast<size_t>(p.c * taps), 0.0f);
    if (grad.numel() > 0) {
      const float* packed = packed_bank(kernels, op, p, parameters, g);
      if (need_filters) {
        const auto size = static_cast<size_t>(kernels.partial_size(p, g, g));
        if (partial.size() < size) partial.resize(size);
      }
      float* sums = need_filters ? partial.data() : nullptr;
      void* to = need_x ? grad_sum.mutable_data_ptr() : nullptr;
      torch::stable::parallel_for(
          0, kernels.shared_backward_items(p, g), 1, [&](int64_t begin, int64_t end) {
            kernels.shared_backward(p, channels, g, in, packed, to, sums, begin, end);
          });
      if (need_filters) {
        ConvProblem as_float = p;
        as_float.type = Real::kFloat32;
        kernels.reduce(as_float, g, g, sums, {grad_bank.data(), taps, taps, kernel_size, 1});
      }
    } else if (need_x) {
      torch::stable::zero_(grad_sum);
    }
    if (need_filters) {
      const float* from = grad_bank.data();
      dispatch_floating(op, "theta", theta.scalar_type(), [&](auto tag) {
        using T = typename decltype(tag)::type;
        if constexpr (!std::is_same_v<T, double>) {
          filter_gradients<T>(parameters, kernel_size, from, taps, kernel_size, int64_t{1},
                              gradients);
        }
      });
    }
  }
  return {grad_sum,        gradients.theta,      gradients.sigma,
          gradients.gamma, gradients.wavelength, gradients.psi};
}

}  // namespace
}  // namespace fastbandit::cpu

STABLE_TORCH_LIBRARY_IMPL(fastbandit, CPU, m) {
  m.impl("gabor_filters", TORCH_BOX(&fastbandit::cpu::gabor_filters));
  m.impl("gabor_filters_backward", TORCH_BOX(&fastbandit::cpu::gabor_filters_backward));
  m.impl("gabor_conv2d", TORCH_BOX(&fastbandit::cpu::gabor_conv2d));
  m.impl("gabor_conv2d_backward", TORCH_BOX(&fastbandit::cpu::gabor_conv2d_backward));
}
