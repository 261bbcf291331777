#define FB_ISA_AVX2
#define FB_ISA_NAMESPACE avx2
#include "bandit_kernels.h"

namespace fastbandit::cpu {

const BanditKernels& bandit_kernels_avx2() {
  static const BanditKernels table = avx2::make_bandit_table();
  return table;
}

}  // namespace fastbandit::cpu
