#define FB_ISA_AVX512
#define FB_ISA_NAMESPACE avx512
#include "bandit_kernels.h"

namespace fastbandit::cpu {

const BanditKernels& bandit_kernels_avx512() {
  static const BanditKernels table = avx512::make_bandit_table();
  return table;
}

}  // namespace fastbandit::cpu
