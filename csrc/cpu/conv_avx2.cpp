#define FB_ISA_AVX2
#define FB_ISA_NAMESPACE avx2
#include "conv_kernels.h"

namespace fastbandit::cpu {

const ConvKernels& conv_kernels_avx2() {
  static const ConvKernels table = avx2::make_table();
  return table;
}

}  // namespace fastbandit::cpu
