// How the native libraries were built, for fastbandit.build_info(). Not a kernel: it loads without
// torch, so that the facts can be read where the kernels cannot be loaded.
#include <pybind11/pybind11.h>

#include "build_info.h"

namespace {

pybind11::object build_info() {
  return pybind11::module_::import("json").attr("loads")(FB_BUILD_INFO);
}

pybind11::dict cpu_features() {
  pybind11::dict features;
#if defined(__x86_64__)
  __builtin_cpu_init();
  features["avx2"] = __builtin_cpu_supports("avx2") != 0;
  features["fma"] = __builtin_cpu_supports("fma") != 0;
  features["avx512f"] = __builtin_cpu_supports("avx512f") != 0;
  features["avx512bw"] = __builtin_cpu_supports("avx512bw") != 0;
  features["avx512dq"] = __builtin_cpu_supports("avx512dq") != 0;
  features["avx512vpopcntdq"] = __builtin_cpu_supports("avx512vpopcntdq") != 0;
  features["avx512vl"] = __builtin_cpu_supports("avx512vl") != 0;
#endif
  return features;
}

}  // namespace

PYBIND11_MODULE(_native_info, module) {
  module.doc() = "How fastbandit's native libraries were built, and what this CPU offers.";
  module.def("build_info", &build_info, "Versions, compilers, flags and architectures, as a dict.");
  module.def("cpu_features", &cpu_features, "Instruction sets of this CPU that the kernels ask for.");
}
