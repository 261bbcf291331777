#define FB_ISA_BASELINE
#define FB_ISA_NAMESPACE baseline
#include "pointwise_kernels.h"

namespace fastbandit::cpu {

const PointwiseKernels& pointwise_kernels_baseline() {
  static const PointwiseKernels table = baseline::make_pointwise_table();
  return table;
}

}  // namespace fastbandit::cpu
