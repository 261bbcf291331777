#define FB_ISA_AVX512
#define FB_ISA_NAMESPACE avx512
#include "pool_kernels.h"

namespace fastbandit::cpu {

const PoolKernels& pool_kernels_avx512() {
  static const PoolKernels table = avx512::make_pool_table();
  return table;
}

}  // namespace fastbandit::cpu
