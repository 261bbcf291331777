#define FB_ISA_AVX512
#define FB_ISA_NAMESPACE avx512
#include "conv_kernels.h"

namespace fastbandit::cpu {

const ConvKernels& conv_kernels_avx512() {
  static const ConvKernels table = avx512::make_table();
  return table;
}

}  // namespace fastbandit::cpu
