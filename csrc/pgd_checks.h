// Argument checks that the CPU and the CUDA glue of the PGD ops share.
#pragma once

#include <cmath>
#include <utility>

#include "check.h"

namespace fastbandit {

inline void check_image(const char* op, const Tensor& image, ScalarType delta_dtype) {
  const ScalarType dtype = image.scalar_type();
  FB_CHECK(dtype == delta_dtype || dtype == ScalarType::Float || dtype == ScalarType::Byte, op,
           "image: expected ", dtype_name(delta_dtype), ", float32 or uint8, got ",
           dtype_name(dtype));
}

inline void check_bounds(const char* op, double epsilon, std::optional<double> lower,
                         std::optional<double> upper) {
  FB_CHECK(epsilon >= 0 && std::isfinite(epsilon), op,
           "epsilon: expected a finite number >= 0, got ", epsilon);
  FB_CHECK(!lower || std::isfinite(*lower), op, "lower: expected a finite number, got ", *lower);
  FB_CHECK(!upper || std::isfinite(*upper), op, "upper: expected a finite number, got ", *upper);
  FB_CHECK(!lower || !upper || *lower <= *upper, op, "lower: expected at most upper = ", *upper,
           ", got ", *lower);
}

inline void check_out_dtype(const char* op, ScalarType out_dtype) {
  FB_CHECK(is_floating(out_dtype), op,
           "out_dtype: expected float32, float64, bfloat16 or float16, got ",
           dtype_name(out_dtype));
}

// mean and std: one number for each channel of `like`, [N, C, H, W]; float32 or `dtype`.
inline void check_statistics(const char* op, const char* like_name, const Tensor& like,
                             ScalarType dtype, const Tensor& mean, const Tensor& std) {
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"mean", mean},
                                     std::pair<const char*, const Tensor&>{"std", std}}) {
    const ScalarType own = tensor.scalar_type();
    FB_CHECK(own == ScalarType::Float || own == dtype, op, name, ": expected float32 or ",
             dtype_name(dtype), ", got ", dtype_name(own));
    FB_CHECK(tensor.dim() == 1 && tensor.size(0) == like.size(1), op, name,
             ": expected one value for each of ", like.size(1), " channels, got shape ",
             shape_text(tensor));
    check_same_device(op, name, tensor, like_name, like);
  }
}

inline void check_pgd_normalize(const char* op, const Tensor& delta, const Tensor& mean,
                                const Tensor& std, ScalarType out_dtype) {
  FB_CHECK(delta.dim() == 4, op, "delta: expected shape [N, C, H, W], got ", shape_text(delta));
  check_statistics(op, "delta", delta, delta.scalar_type(), mean, std);
  check_out_dtype(op, out_dtype);
}

// Strides of a dense [N, C, H, W] tensor in one of the two formats.
inline void format_strides(const int64_t* sizes, bool channels_last, int64_t (&strides)[4]) {
  const int64_t c = sizes[1], h = sizes[2], w = sizes[3];
  if (channels_last) {
    strides[0] = c * h * w, strides[1] = 1, strides[2] = c * w, strides[3] = c;
  } else {
    strides[0] = c * h * w, strides[1] = h * w, strides[2] = w, strides[3] = 1;
  }
}

inline bool is_channels_last(const char* op, torch::headeronly::MemoryFormat format) {
  using torch::headeronly::MemoryFormat;
  FB_CHECK(format == MemoryFormat::Contiguous || format == MemoryFormat::ChannelsLast, op,
           "memory_format: expected torch.contiguous_format or torch.channels_last");
  return format == MemoryFormat::ChannelsLast;
}

// The numbers of a draw: on the host, or each in an int64 tensor of one element.
inline void check_draw(const char* op, const char* like_name, const Tensor& like, int64_t seed,
                       int64_t offset, const std::optional<Tensor>& seed_tensor,
                       const std::optional<Tensor>& offset_tensor) {
  FB_CHECK(seed >= 0, op, "seed: expected an integer in [0, 2^63), got ", seed);
  FB_CHECK(offset >= 0 && offset < (int64_t{1} << 32), op,
           "offset: expected an integer in [0, 2^32), got ", offset);
  const auto check_word = [&](const char* name, const std::optional<Tensor>& tensor) {
    if (!tensor) return;
    check_dtype(op, name, *tensor, ScalarType::Long);
    FB_CHECK(tensor->numel() == 1, op, name, ": expected one element, got shape ",
             shape_text(*tensor));
    check_same_device(op, name, *tensor, like_name, like);
  };
  check_word("seed", seed_tensor);
  check_word("offset", offset_tensor);
}

inline void check_random_start(const char* op, const Tensor& image, double epsilon, int64_t seed,
                               int64_t offset, const std::optional<Tensor>& seed_tensor,
                               const std::optional<Tensor>& offset_tensor,
                               const std::optional<Tensor>& index, std::optional<double> lower,
                               std::optional<double> upper) {
  const ScalarType dtype = image.scalar_type();
  FB_CHECK(is_floating(dtype) || dtype == ScalarType::Byte, op,
           "image: expected float32, float64, bfloat16, float16 or uint8, got ",
           dtype_name(dtype));
  FB_CHECK(image.dim() > 0, op, "image: expected shape [N, ...], got []");
  check_draw(op, "image", image, seed, offset, seed_tensor, offset_tensor);
  if (index) {
    check_dtype(op, "index", *index, ScalarType::Long);
    FB_CHECK(index->dim() == 1 && index->size(0) == image.size(0), op,
             "index: expected shape [", image.size(0), "], got ", shape_text(*index));
    check_same_device(op, "index", *index, "image", image);
  }
  check_bounds(op, epsilon, lower, upper);
}

inline void check_pgd(const char* op, const Tensor& delta, const Tensor& grad, const Tensor& image,
                      double step_size, double epsilon, std::optional<double> lower,
                      std::optional<double> upper) {
  check_floating(op, "delta", delta);
  check_dtype(op, "grad", grad, delta.scalar_type());
  check_image(op, image, delta.scalar_type());
  check_same_shape(op, "grad", grad, "delta", delta);
  check_same_shape(op, "image", image, "delta", delta);
  check_same_device(op, "grad", grad, "delta", delta);
  check_same_device(op, "image", image, "delta", delta);
  FB_CHECK(std::isfinite(step_size), op, "step_size: expected a finite number, got ", step_size);
  check_bounds(op, epsilon, lower, upper);
  check_no_overlap(op, "delta", delta);
}

}  // namespace fastbandit
