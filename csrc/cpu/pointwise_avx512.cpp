#define FB_ISA_AVX512
#define FB_ISA_NAMESPACE avx512
#include "pointwise_kernels.h"

namespace fastbandit::cpu {

const PointwiseKernels& pointwise_kernels_avx512() {
  static const PointwiseKernels table = avx512::make_pointwise_table();
  return table;
}

}  // namespace fastbandit::cpu
