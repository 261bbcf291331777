// fastbandit::gabor_filters, fastbandit::gabor_conv2d and their gradients on CUDA: checks,
// allocation, device, stream.
//
// The convolution reads x once, into the sum over its channels (1 / C_in of its size, float32), and
// then runs the depthwise kernels on that sum with a channel stride of 0.
#include "cuda/gabor.h"

#include <optional>
#include <tuple>
#include <utility>

#include "cuda/conv_glue.h"

namespace fastbandit {
namespace {

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

struct ParameterPointers {
  const void* data[5];
  int64_t strides[5];

  explicit ParameterPointers(const GaborTensors& p) {
    const Tensor* all[5] = {&p.theta, &p.sigma, &p.gamma, &p.wavelength, &p.psi};
    for (int i = 0; i < 5; ++i) {
      data[i] = all[i]->const_data_ptr();
      strides[i] = all[i]->strides()[0];
    }
  }
};

// The type of sums and filters in between.
ScalarType wide_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void build_filters(const char* op, const GaborTensors& p, int64_t kernel_size, Tensor& filters) {
  const ParameterPointers pointers(p);
  check_launch(op, launch_gabor_filters(pointers.data, pointers.strides, dtype_code(op, p.theta),
                                        p.theta.size(0), kernel_size, filters.mutable_data_ptr(),
                                        dtype_code(op, filters), current_stream(p.theta)));
}

GaborTensors empty_gradients(const GaborTensors& p, bool wanted) {
  const int64_t size[1] = {wanted ? p.theta.size(0) : 0};
  const auto make = [&] { return empty_contiguous(p.theta, size, 1, p.theta.scalar_type()); };
  return {make(), make(), make(), make(), make()};
}

void filters_backward(const char* op, const Tensor& grad, const int64_t* strides,
                      const GaborTensors& p, int64_t kernel_size, const GaborTensors& out) {
  if (p.theta.numel() == 0) return;
  const ParameterPointers pointers(p);
  void* gradients[5] = {out.theta.mutable_data_ptr(), out.sigma.mutable_data_ptr(),
                        out.gamma.mutable_data_ptr(), out.wavelength.mutable_data_ptr(),
                        out.psi.mutable_data_ptr()};
  check_launch(op, launch_gabor_filters_backward(
                       grad.const_data_ptr(), dtype_code(op, grad), strides, pointers.data,
                       pointers.strides, dtype_code(op, p.theta), p.theta.size(0), kernel_size,
                       gradients, current_stream(p.theta)));
}

using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

FourTensors four_like(const Tensor& theta) {
  const int64_t size[1] = {theta.size(0)};
  const auto make = [&] { return empty_contiguous(theta, size, 1, theta.scalar_type()); };
  return {make(), make(), make(), make()};
}

FourTensors gabor_parameters(Tensor theta, Tensor sigma, Tensor gamma, Tensor wavelength,
                             double least_sigma, double more_sigma, double least_wavelength,
                             double more_wavelength) {
  constexpr const char* kOp = "gabor_parameters";
  const GaborTensors p{theta, sigma, gamma, wavelength, theta};
  check_gabor_parameters(kOp, p, 1);
  const DeviceGuard guard(theta.get_device_index());
  FourTensors out = four_like(theta);
  if (theta.numel() == 0) return out;
  const ParameterPointers pointers(p);
  const double intervals[4] = {least_sigma, more_sigma, least_wavelength, more_wavelength};
  auto& [to_theta, to_sigma, to_gamma, to_wavelength] = out;
  void* const results[4] = {to_theta.mutable_data_ptr(), to_sigma.mutable_data_ptr(),
                            to_gamma.mutable_data_ptr(), to_wavelength.mutable_data_ptr()};
  check_launch(kOp, launch_gabor_parameters(pointers.data, pointers.strides,
                                            dtype_code(kOp, theta), theta.size(0), intervals,
                                            results, current_stream(theta)));
  return out;
}

FourTensors gabor_parameters_backward(std::optional<Tensor> by_theta,
                                      std::optional<Tensor> by_sigma,
                                      std::optional<Tensor> by_gamma,
                                      std::optional<Tensor> by_wavelength, Tensor theta,
                                      Tensor sigma, Tensor wavelength, double more_sigma,
                                      double more_wavelength) {
  constexpr const char* kOp = "gabor_parameters_backward";
  const GaborTensors p{theta, sigma, theta, wavelength, theta};
  check_gabor_parameters(kOp, p, 1);
  const DeviceGuard guard(theta.get_device_index());
  FourTensors out = four_like(theta);
  if (theta.numel() == 0) return out;
  const void* grads[4] = {};
  int64_t grad_strides[4] = {};
  const std::pair<const char*, const std::optional<Tensor>*> given[4] = {
      {"by_theta", &by_theta},
      {"by_sigma", &by_sigma},
      {"by_gamma", &by_gamma},
      {"by_wavelength", &by_wavelength}};
  for (int i = 0; i < 4; ++i) {
    const auto& [name, grad] = given[i];
    if (!*grad) continue;
    check_dtype(kOp, name, **grad, theta.scalar_type());
    check_same_shape(kOp, name, **grad, "theta", theta);
    check_same_device(kOp, name, **grad, "theta", theta);
    grads[i] = (*grad)->const_data_ptr(), grad_strides[i] = (*grad)->strides()[0];
  }
  const void* const numbers[4] = {theta.const_data_ptr(), sigma.const_data_ptr(), nullptr,
                                  wavelength.const_data_ptr()};
  const int64_t strides[4] = {theta.strides()[0], sigma.strides()[0], 0, wavelength.strides()[0]};
  const double intervals[4] = {0.0, more_sigma, 0.0, more_wavelength};
  auto& [to_theta, to_sigma, to_gamma, to_wavelength] = out;
  void* const results[4] = {to_theta.mutable_data_ptr(), to_sigma.mutable_data_ptr(),
                            to_gamma.mutable_data_ptr(), to_wavelength.mutable_data_ptr()};
  check_launch(kOp, launch_gabor_parameters_backward(
                        grads, grad_strides, numbers, strides, dtype_code(kOp, theta),
                        theta.size(0), intervals, results, current_stream(theta)));
  return out;
}

// [N, 1, H, W], contiguous
Tensor channel_sum(const char* op, const Tensor& x) {
  const int64_t sizes[4] = {x.size(0), 1, x.size(2), x.size(3)};
  Tensor sum = empty_contiguous(x, sizes, 4, wide_type(x));
  if (sum.numel() == 0) return sum;
  check_launch(op, launch_channel_sum(x.const_data_ptr(), dtype_code(op, x), x.sizes().data(),
                                      x.strides().data(), sum.mutable_data_ptr(),
                                      current_stream(x)));
  return sum;
}

// One channel seen as many.
std::array<int64_t, 4> shared_strides(const Tensor& sum) {
  return {sum.size(2) * sum.size(3), 0, sum.size(3), 1};
}

Tensor gabor_filters(Tensor theta, Tensor sigma, Tensor gamma, Tensor wavelength, Tensor psi,
                     int64_t kernel_size) {
  constexpr const char* kOp = "gabor_filters";
  const GaborTensors p{theta, sigma, gamma, wavelength, psi};
  check_gabor_parameters(kOp, p, kernel_size);
  const DeviceGuard guard(theta.get_device_index());
  const int64_t sizes[3] = {theta.size(0), kernel_size, kernel_size};
  Tensor bank = empty_contiguous(theta, sizes, 3, theta.scalar_type());
  if (bank.numel() > 0) build_filters(kOp, p, kernel_size, bank);
  return bank;
}

FiveTensors gabor_filters_backward(Tensor grad, Tensor theta, Tensor sigma, Tensor gamma,
                                   Tensor wavelength, Tensor psi, int64_t kernel_size) {
  constexpr const char* kOp = "gabor_filters_backward";
  const GaborTensors p{theta, sigma, gamma, wavelength, psi};
  check_gabor_parameters(kOp, p, kernel_size);
  FB_CHECK(grad.dim() == 3 && grad.size(0) == theta.size(0) && grad.size(1) == kernel_size &&
               grad.size(2) == kernel_size,
           kOp, "grad: expected [", theta.size(0), ", ", kernel_size, ", ", kernel_size,
           "], got ", shape_text(grad));
  check_dtype(kOp, "grad", grad, theta.scalar_type());
  check_same_device(kOp, "grad", grad, "theta", theta);
  const DeviceGuard guard(theta.get_device_index());
  const GaborTensors out = empty_gradients(p, true);
  filters_backward(kOp, grad, grad.strides().data(), p, kernel_size, out);
  return {out.theta, out.sigma, out.gamma, out.wavelength, out.psi};
}

Tensor gabor_conv2d(Tensor x, Tensor theta, Tensor sigma, Tensor gamma, Tensor wavelength,
                    Tensor psi, int64_t kernel_size, Pair stride, Pair padding, Pair dilation) {
  constexpr const char* kOp = "gabor_conv2d";
  const GaborTensors p{theta, sigma, gamma, wavelength, psi};
  const ConvShape s = gabor_shape(kOp, x, p, kernel_size, stride, padding, dilation);
  const DeviceGuard guard(x.get_device_index());
  Tensor y = empty_map(x, s.n, s.c, s.oh, s.ow);
  if (y.numel() == 0) return y;
  const int64_t sizes[3] = {s.c, kernel_size, kernel_size};
  Tensor filters = empty_contiguous(x, sizes, 3, wide_type(x));
  build_filters(kOp, p, kernel_size, filters);
  const Tensor sum = channel_sum(kOp, x);
  const auto shape = shape_numbers(s, false);
  const auto strides = shared_strides(sum);
  check_launch(kOp, launch_depthwise_conv2d(
                        sum.const_data_ptr(), dtype_code(kOp, sum), filters.const_data_ptr(),
                        dtype_code(kOp, filters), nullptr, y.mutable_data_ptr(),
                        dtype_code(kOp, y), shape.data(), strides.data(), nullptr,
                        y.strides().data(), 0, current_stream(x)));
  return y;
}

// First result: the gradient of the channel sum, [N, 1, H, W]; that of x is the same for every
// channel, and Python expands it.
SixTensors gabor_conv2d_backward(Tensor grad, Tensor x, Tensor theta, Tensor sigma, Tensor gamma,
                                 Tensor wavelength, Tensor psi, int64_t kernel_size, Pair stride,
                                 Pair padding, Pair dilation, std::vector<bool> output_mask) {
  constexpr const char* kOp = "gabor_conv2d_backward";
  const GaborTensors p{theta, sigma, gamma, wavelength, psi};
  const ConvShape s = gabor_shape(kOp, x, p, kernel_size, stride, padding, dilation);
  check_grad(kOp, grad, x, s);
  FB_CHECK(output_mask.size() == 2, kOp, "output_mask: expected two values");
  const DeviceGuard guard(x.get_device_index());
  const bool need_x = output_mask[0], need_filters = output_mask[1];
  const int64_t none[1] = {0}, plane[4] = {s.n, 1, s.h, s.w};
  Tensor grad_sum = need_x ? empty_contiguous(x, plane, 4, x.scalar_type())
                           : empty_contiguous(x, none, 1, x.scalar_type());
  const GaborTensors gradients = empty_gradients(p, need_filters);
  const auto shape = shape_numbers(s, false);
  if (need_x && grad_sum.numel() > 0) {
    const int64_t sizes[3] = {s.c, kernel_size, kernel_size};
    Tensor filters = empty_contiguous(x, sizes, 3, wide_type(x));
    if (filters.numel() > 0) build_filters(kOp, p, kernel_size, filters);
    check_launch(kOp, launch_gabor_backward_input(
                          grad.const_data_ptr(), dtype_code(kOp, grad), shape.data(),
                          grad.strides().data(), filters.const_data_ptr(),
                          grad_sum.mutable_data_ptr(), current_stream(x)));
  }
  if (need_filters) {
    const int64_t sizes[4] = {s.c, 1, kernel_size, kernel_size};
    Tensor grad_filters = empty_contiguous(x, sizes, 4, wide_type(x));
    if (grad.numel() > 0) {
      const Tensor sum = channel_sum(kOp, x);
      filter_gradient(kOp, grad, sum, shared_strides(sum).data(), s, false, grad_filters);
    } else {
      torch::stable::zero_(grad_filters);
    }
    const int64_t strides[3] = {kernel_size * kernel_size, kernel_size, 1};
    filters_backward(kOp, grad_filters, strides, p, kernel_size, gradients);
  }
  return {grad_sum,        gradients.theta,      gradients.sigma,
          gradients.gamma, gradients.wavelength, gradients.psi};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastbandit, CUDA, library) {
  library.impl("gabor_filters", TORCH_BOX(&gabor_filters));
  library.impl("gabor_filters_backward", TORCH_BOX(&gabor_filters_backward));
  library.impl("gabor_parameters", TORCH_BOX(&gabor_parameters));
  library.impl("gabor_parameters_backward", TORCH_BOX(&gabor_parameters_backward));
  library.impl("gabor_conv2d", TORCH_BOX(&gabor_conv2d));
  library.impl("gabor_conv2d_backward", TORCH_BOX(&gabor_conv2d_backward));
}

}  // namespace fastbandit
