// launch_bandit from plain arguments: what csrc/bandit_task.h does from torch's tensors.
#include "cuda/bandit.h"

using namespace fastbandit;

// strides: kBanditTensors times row_dims, the first being that of the rows' numbering.
extern "C" const char* bandit_on_cpu(int is_double, int whole_counts, int row_dims,
                                     const int64_t* row_sizes, const int64_t* strides,
                                     int64_t arms, const int64_t* arm_strides, void* mean,
                                     void* count, bool* alive, const int64_t* choice,
                                     const void* reward, const bool* prune, int prune_all,
                                     const void* uniform, int reward_is_double,
                                     int uniform_is_double, double rate, double bonus, void* lower,
                                     void* upper, void* probabilities, int64_t* next_choice,
                                     void* next_probability) {
  BanditTask task = {};
  const int64_t* of_tensor[kBanditTensors];
  for (int t = 0; t < kBanditTensors; ++t) of_tensor[t] = strides + t * row_dims;
  task.rows = merge_dims<kBanditTensors>(row_dims, row_sizes, of_tensor);
  task.arms = arms;
  for (int t = 0; t < 4; ++t) task.arm_stride[t] = arm_strides[t];
  task.mean = mean;
  task.count = count;
  task.alive = alive;
  task.choice = choice;
  task.reward = reward;
  task.prune = prune;
  task.prune_all = prune_all;
  task.uniform = uniform;
  task.reward_is_double = reward_is_double;
  task.uniform_is_double = uniform_is_double;
  task.rate = rate;
  task.bonus = bonus;
  task.lower = lower;
  task.upper = upper;
  task.probabilities = probabilities;
  task.next_choice = next_choice;
  task.next_probability = next_probability;
  return launch_bandit(&task, is_double, whole_counts, nullptr);
}
