#define FB_ISA_BASELINE
#define FB_ISA_NAMESPACE baseline
#include "conv_kernels.h"

namespace fastbandit::cpu {

const ConvKernels& conv_kernels_baseline() {
  static const ConvKernels table = baseline::make_table();
  return table;
}

}  // namespace fastbandit::cpu
