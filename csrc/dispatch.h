// Runtime dtype to template type. A call names the dtypes that the op takes; another one is an
// error with the op and argument in the message.
#pragma once

#include <type_traits>

#include "check.h"
#include "math/number.h"

namespace fastbandit {

template <class T>
struct TypeTag {
  using type = T;
};

// body(TypeTag<T>{}) with T the element type of `dtype`: float, double, bfloat16 or float16.
template <class Body>
inline void dispatch_floating(const char* op, const char* name, ScalarType dtype, Body&& body) {
  switch (dtype) {
    case ScalarType::Float: return body(TypeTag<float>{});
    case ScalarType::Double: return body(TypeTag<double>{});
    case ScalarType::BFloat16: return body(TypeTag<bfloat16>{});
    case ScalarType::Half: return body(TypeTag<float16>{});
    default:
      fail(op, name, ": expected float32, float64, bfloat16 or float16, got ", dtype_name(dtype));
  }
}

// body(TypeTag<X>{}) with X the element type of an image beside a perturbation of type T: T,
// float or uint8_t.
template <class T, class Body>
inline void dispatch_image(const char* op, ScalarType dtype, Body&& body) {
  if (dtype == ScalarType::Byte) {
    body(TypeTag<uint8_t>{});
  } else if (dtype == ScalarType::Float) {
    body(TypeTag<float>{});
  } else if constexpr (!std::is_same_v<T, float>) {
    body(TypeTag<T>{});
  } else {
    fail(op, "image: no kernel for ", dtype_name(dtype));
  }
}

}  // namespace fastbandit
