// The kernels of packed signs, compiled once for each instruction set (see cpu/isa.h).
#include "cpu/binary/count.h"
#include "cpu/binary/depthwise.h"
#include "cpu/binary/pack.h"
#include "cpu/binary/table.h"

namespace fastbandit::cpu::FB_ISA {

inline SignKernels make_sign_table() {
  SignKernels table{};
  table.pack = &pack_signs;
  table.unpack = &unpack_signs;
  table.count = count_work();
  table.depthwise = planes_work();
#if defined(FB_ISA_AVX512) || defined(FB_ISA_AVX2)
  table.table = table_work();
  table.by_table = kIsa != Isa::avx512vpopcntdq;
#endif
  return table;
}

}  // namespace fastbandit::cpu::FB_ISA

namespace fastbandit::cpu {

template <>
const SignKernels& kernels_for<SignKernels, FB_ISA::kIsa>() {
  static const SignKernels table = FB_ISA::make_sign_table();
  return table;
}

}  // namespace fastbandit::cpu

#include "cpu/simd/end.h"
