// What the glue files share: the current stream, the dtype codes of the launchers, launch errors.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "check.h"
#include "dtype.h"

namespace fastbandit {

using torch::stable::accelerator::DeviceGuard;

// The stream that torch runs on now, on the tensor's device. A launch anywhere else gives wrong
// results inside a CUDA graph, without an error.
inline void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

inline int dtype_code(const char* op, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::Double: return kFloat64;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kFloat16;
    case ScalarType::Byte: return kUInt8;
    case ScalarType::Long: return kInt64;
    default: fail(op, "no kernel for ", dtype_name(tensor.scalar_type()));
  }
}

// A number of a draw that the kernel reads on the device; null where the host has it.
inline const int64_t* device_word(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const int64_t*>(tensor->const_data_ptr()) : nullptr;
}

inline void check_launch(const char* op, const char* error) {
  FB_CHECK(error == nullptr, op, "the kernel did not launch: ", error);
}

}  // namespace fastbandit
