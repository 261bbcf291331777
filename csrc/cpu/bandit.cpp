// The bandit ops on the CPU: the walk over rows of bandit_kernels.h on torch's threads.
#include "bandit_task.h"
#include "cpu/bandit_rows.h"
#include "cpu/isa.h"
#include "cpu/walk.h"

namespace fastbandit {
namespace {

constexpr int64_t kRowGrain = 256;  // rows below which a second thread costs more than it brings

const cpu::BanditKernels& bandit_kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::avx512: return cpu::bandit_kernels_avx512();
    case Isa::avx2: return cpu::bandit_kernels_avx2();
    case Isa::baseline: break;
  }
#endif
  return cpu::bandit_kernels_baseline();
}

void run_bandit(const char* /*op*/, const Tensor& mean, const Tensor& count,
                const BanditTask& task) {
  const cpu::BanditKernels& kernels = bandit_kernels();
  const bool whole = count.scalar_type() == ScalarType::Long;
  const cpu::BanditRows rows =
      mean.scalar_type() == ScalarType::Double
          ? (whole ? kernels.double_whole : kernels.double_real)
          : (whole ? kernels.float_whole : kernels.float_real);
  parallel(task.rows.numel, kRowGrain,
           [&](int64_t begin, int64_t end) { rows(task, begin, end); });
}

}  // namespace

FB_REGISTER_BANDIT(CPU, run_bandit)

}  // namespace fastbandit
