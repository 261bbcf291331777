// Argument checks of the glue code. A message names the op, the argument, what was expected and
// what came. The public Python functions check the same things first; these catch whoever calls
// torch.ops.fastbandit.* directly.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastbandit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] inline void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << op << ": ";
  ((text << parts), ...);
  throw std::runtime_error(text.str());
}

// FB_CHECK(condition, op, parts of the message...)
#define FB_CHECK(condition, op, ...)       \
  do {                                     \
    if (__builtin_expect(!(condition), 0)) \
      ::fastbandit::fail(op, __VA_ARGS__); \
  } while (0)

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Short: return "int16";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << ']';
  return text.str();
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double ||
         dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// Sides, paddings and the like beyond the first of these, and maps of more elements than the second,
// are refused: no memory holds them, and below them no product of sizes overflows int64, which would
// be a wrong address.
constexpr int64_t kMostSide = (int64_t{1} << 31) - 1;
constexpr int64_t kMostElements = int64_t{1} << 56;

inline void check_elements(const char* op, const char* name, std::initializer_list<int64_t> sizes,
                           int64_t most = kMostElements) {
  int64_t elements = 1;
  for (const int64_t size : sizes) {
    FB_CHECK(size == 0 || elements <= most / size, op, name, ": expected at most ", most,
             " elements, got more");
    elements *= size;
  }
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const int64_t dims = a.dim();
  if (b.dim() != dims) return false;
  const auto sizes_a = a.sizes();
  const auto sizes_b = b.sizes();
  for (int64_t d = 0; d < dims; ++d)
    if (sizes_a[d] != sizes_b[d]) return false;
  return true;
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  int32_t type_a = 0, type_b = 0;
  aoti_torch_get_device_type(a.get(), &type_a);
  aoti_torch_get_device_type(b.get(), &type_b);
  return type_a == type_b && a.get_device_index() == b.get_device_index();
}

inline void check_same_shape(const char* op, const char* name, const Tensor& tensor,
                             const char* like_name, const Tensor& like) {
  FB_CHECK(same_shape(tensor, like), op, name, ": expected the shape of ", like_name, " ",
           shape_text(like), ", got ", shape_text(tensor));
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor,
                              const char* like_name, const Tensor& like) {
  FB_CHECK(same_device(tensor, like), op, name, ": expected the device of ", like_name,
           ", got another");
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor,
                        ScalarType expected) {
  FB_CHECK(tensor.scalar_type() == expected, op, name, ": expected ", dtype_name(expected), ", got ",
           dtype_name(tensor.scalar_type()));
}

// Each element of a tensor that is written must have its own place in memory.
inline void check_no_overlap(const char* op, const char* name, const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    FB_CHECK(sizes[d] <= 1 || strides[d] != 0, op, name,
             ": expected a tensor without internal overlap, got one where several elements of dimension ",
             d, " share a single memory location");
}

inline void check_floating(const char* op, const char* name, const Tensor& tensor) {
  FB_CHECK(is_floating(tensor.scalar_type()), op, name,
           ": expected float32, float64, bfloat16 or float16, got ",
           dtype_name(tensor.scalar_type()));
}

// The C interface of torch gives a code in place of its error. Where a new tensor is asked for it
// stands for memory that could not be had, and the caller, who suggests a smaller batch, reads the
// words.
inline void check_allocated(int32_t code) {
  if (__builtin_expect(code != 0, 0))
    throw std::runtime_error("fastbandit: out of memory: cannot allocate memory for a result");
}

// A tensor of the given sizes and strides, on the device of `like`. Nothing is written into it.
inline Tensor empty_strided(const Tensor& like, const int64_t* sizes, const int64_t* strides,
                            int64_t dims, ScalarType dtype) {
  int32_t device_type = 0;
  aoti_torch_get_device_type(like.get(), &device_type);
  AtenTensorHandle handle = nullptr;
  // The shim's dtype codes are those of ScalarType.
  check_allocated(aoti_torch_empty_strided(dims, sizes, strides, static_cast<int32_t>(dtype),
                                           device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor empty_contiguous(const Tensor& like, const int64_t* sizes, int64_t dims,
                               ScalarType dtype) {
  std::vector<int64_t> strides(static_cast<size_t>(dims));
  int64_t step = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[static_cast<size_t>(d)] = step;
    step *= sizes[d] > 1 ? sizes[d] : 1;
  }
  return empty_strided(like, sizes, strides.data(), dims, dtype);
}

// A tensor of the shape and layout of `like`, in another dtype.
inline Tensor empty_like(const Tensor& like, ScalarType dtype) {
  using torch::stable::detail::from;
  StableIValue stack[6] = {from(like),         from(std::optional<ScalarType>(dtype)),
                           from(std::nullopt), from(std::nullopt),
                           from(std::nullopt), from(std::nullopt)};
  check_allocated(torch_call_dispatcher("aten::empty_like", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace fastbandit
