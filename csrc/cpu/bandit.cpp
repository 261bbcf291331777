// The bandit ops on the CPU: the walk over rows of cpu/kernels/bandit.cpp on torch's threads.
#include "bandit_task.h"
#include "cpu/bandit_problem.h"
#include "cpu/walk.h"

namespace fastbandit {
namespace {

constexpr int64_t kRowGrain = 256;  // rows below which a second thread costs more than it brings

void run_bandit(const char* /*op*/, const Tensor& mean, const Tensor& count,
                const BanditTask& task) {
  const cpu::BanditKernels& kernels = cpu::kernels<cpu::BanditKernels>();
  const bool whole = count.scalar_type() == ScalarType::Long;
  const cpu::BanditRows rows =
      mean.scalar_type() == ScalarType::Double
          ? (whole ? kernels.double_whole : kernels.double_real)
          : (whole ? kernels.float_whole : kernels.float_real);
  parallel(task.rows.numel, kRowGrain,
           [&](int64_t begin, int64_t end) { rows(task, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastbandit, CPU, library) { register_bandit<run_bandit>(library); }

}  // namespace fastbandit
