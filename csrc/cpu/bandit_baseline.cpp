#define FB_ISA_NAMESPACE baseline
#include "bandit_kernels.h"

namespace fastbandit::cpu {

const BanditKernels& bandit_kernels_baseline() {
  static const BanditKernels table = baseline::make_bandit_table();
  return table;
}

}  // namespace fastbandit::cpu
