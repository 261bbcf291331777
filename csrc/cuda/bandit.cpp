// The bandit ops on CUDA: checks, results, device, stream.
#include "cuda/bandit.h"

#include "bandit_task.h"
#include "cuda/glue.h"

namespace fastbandit {
namespace {

void run_bandit(const char* op, const Tensor& mean, const Tensor& count, const BanditTask& task) {
  const DeviceGuard guard(mean.get_device_index());
  check_launch(op, launch_bandit(&task, mean.scalar_type() == ScalarType::Double,
                                 count.scalar_type() == ScalarType::Long, current_stream(mean)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastbandit, CUDA, library) { register_bandit<run_bandit>(library); }

}  // namespace fastbandit
