// Runtime dtype to template type. A call names the dtypes that the op takes; another one is an
// error with the op and argument in the message.
#pragma once

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
      fail(op, name, " must be float32, float64, bfloat16 or float16, got ", dtype_name(dtype));
  }
}

// body(std::true_type{}) or body(std::false_type{}).
template <class Body>
inline void dispatch_bool(bool value, Body&& body) {
  if (value) {
    body(std::true_type{});
  } else {
    body(std::false_type{});
  }
}

}  // namespace fastbandit
