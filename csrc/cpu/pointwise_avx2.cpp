#define FB_ISA_AVX2
#define FB_ISA_NAMESPACE avx2
#include "pointwise_kernels.h"

namespace fastbandit::cpu {

const PointwiseKernels& pointwise_kernels_avx2() {
  static const PointwiseKernels table = avx2::make_pointwise_table();
  return table;
}

}  // namespace fastbandit::cpu
