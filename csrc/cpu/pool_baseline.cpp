#define FB_ISA_BASELINE
#define FB_ISA_NAMESPACE baseline
#include "pool_kernels.h"

namespace fastbandit::cpu {

const PoolKernels& pool_kernels_baseline() {
  static const PoolKernels table = baseline::make_pool_table();
  return table;
}

}  // namespace fastbandit::cpu
