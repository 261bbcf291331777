#define FB_ISA_AVX2
#define FB_ISA_NAMESPACE avx2
#include "pool_kernels.h"

namespace fastbandit::cpu {

const PoolKernels& pool_kernels_avx2() {
  static const PoolKernels table = avx2::make_pool_table();
  return table;
}

}  // namespace fastbandit::cpu
