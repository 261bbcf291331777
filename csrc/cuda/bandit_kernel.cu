// The bandit ops on CUDA: one launch for whatever is asked of the rows.
//
// A block brings a tile of rows into shared memory with neighbouring threads reading neighbouring
// addresses, then each thread walks the arms of one row, which keeps the sums in their order.
#include "cuda/bandit.h"

#include "cuda/pack.h"

namespace fastbandit {
namespace {

constexpr int kRowsOfBlock = 128;
constexpr int64_t kTileBytes = 48 * 1024;  // shared memory that every device gives a block
constexpr double kInfinity = __builtin_huge_val();

// One row of the tile: [arms] of mean, [arms] of count and [arms] of alive.
struct Row {
  double* mean;
  double* count;
  bool* alive;
};

// scale: bonus * sqrt(2 ln N) of the row.
__device__ __forceinline__ double lower_bound(const Row& row, int64_t k, double scale) {
  const double n = row.count[k];
  return n > 0.0 ? row.mean[k] - scale * inverse_root(n) : -kInfinity;
}

__device__ __forceinline__ double upper_bound(const Row& row, int64_t k, double scale) {
  const double n = row.count[k];
  return n > 0.0 ? row.mean[k] + scale * inverse_root(n) : kInfinity;
}

// Eq. 4.13: the arm to drop, or -1. A bound that is NaN, which is equal to nothing, is the smallest.
__device__ __forceinline__ int64_t arm_to_drop(const Row& row, int64_t arms, double scale) {
  int64_t dropped = -1;
  int left = 0;
  double smallest = kInfinity;
  for (int64_t k = 0; k < arms; ++k) {
    if (!row.alive[k]) continue;
    ++left;
    const double given = upper_bound(row, k, scale);
    const double bound = given == given ? given : -kInfinity;
    if (dropped < 0 || bound < smallest) {
      dropped = k;
      smallest = bound;
    }
  }
  return left > 1 ? dropped : -1;
}

// Eq. 4.10 without the normalisation; a bound that is NaN has the weight 0. The count of arm k is
// overwritten by its weight.
__device__ __forceinline__ double find_weights(const Row& row, int64_t arms, double scale) {
  bool untried = false;
  double smallest = kInfinity;
  for (int64_t k = 0; k < arms; ++k) {
    if (!row.alive[k]) continue;
    untried |= !(row.count[k] > 0.0);
    const double bound = lower_bound(row, k, scale);
    smallest = bound < smallest ? bound : smallest;
  }
  double total = 0.0;
  for (int64_t k = 0; k < arms; ++k) {
    double weight = 0.0;
    if (row.alive[k]) {
      if (untried) {
        weight = row.count[k] > 0.0 ? 0.0 : 1.0;
      } else {
        weight = exp_to_zero(smallest - lower_bound(row, k, scale));
      }
    }
    row.count[k] = weight;
    total += weight;
  }
  return total > 0.0 ? total : 1.0;
}

template <class T, class N>
__global__ void __launch_bounds__(kRowsOfBlock, kBlocks)
    bandit_kernel(BanditTask task, int rows_of_tile, int64_t pitch) {
  const int64_t arms = task.arms;
  // [rows_of_tile][pitch] each; a pitch that is odd spreads a column over the banks.
  FB_DYNAMIC_SHARED(double, tile);
  double* const means = tile;
  double* const counts = means + rows_of_tile * pitch;
  bool* const alives = reinterpret_cast<bool*>(counts + rows_of_tile * pitch);
  T* const mean = static_cast<T*>(task.mean);
  N* const count = static_cast<N*>(task.count);
  const bool bounds = task.lower != nullptr;
  const bool sample = task.next_choice != nullptr;
  const bool probabilities = sample || task.probabilities != nullptr;

  for (int64_t first = static_cast<int64_t>(blockIdx.x) * rows_of_tile; first < task.rows.numel;
       first += static_cast<int64_t>(gridDim.x) * rows_of_tile) {
    const int64_t left = task.rows.numel - first;
    const int rows = static_cast<int>(left < rows_of_tile ? left : rows_of_tile);

    // 1. The tile of this block.
    for (int64_t e = threadIdx.x; e < rows * arms; e += blockDim.x) {
      const int64_t r = e / arms;
      const int64_t k = e - r * arms;
      int64_t at[kBanditTensors];
      layout_offsets(task.rows, first + r, at);
      means[r * pitch + k] =
          static_cast<double>(mean[at[kMean] + k * task.arm_stride[kMean]]);
      counts[r * pitch + k] =
          static_cast<double>(count[at[kCount] + k * task.arm_stride[kCount]]);
      alives[r * pitch + k] =
          task.alive != nullptr && task.alive[at[kAlive] + k * task.arm_stride[kAlive]];
    }
    __syncthreads();

    // 2. One thread for each row.
    for (int64_t r = threadIdx.x; r < rows; r += blockDim.x) {
      const Row row{means + r * pitch, counts + r * pitch, alives + r * pitch};
      int64_t at[kBanditTensors];
      layout_offsets(task.rows, first + r, at);

      if (task.choice != nullptr) {
        const int64_t arm = task.choice[at[kChoice]];
        if (arm >= 0 && arm < arms) {
          const double reward = real_at(task.reward, task.reward_is_double, at[kReward]);
          const T m = static_cast<T>(credited(row.mean[arm], reward, task.rate));
          mean[at[kMean] + arm * task.arm_stride[kMean]] = m;
          row.mean[arm] = static_cast<double>(m);
          N& n = count[at[kCount] + arm * task.arm_stride[kCount]];
          n += N(1);
          row.count[arm] = static_cast<double>(n);
        }
      }

      double total = 0.0;
      for (int64_t k = 0; k < arms; ++k) total += row.count[k];
      const double scale = task.bonus * sqrt(twice_log_total(total));

      if (bounds) {
        for (int64_t k = 0; k < arms; ++k) {
          const int64_t to = (first + r) * arms + k;
          static_cast<T*>(task.lower)[to] =
              static_cast<T>(lower_bound(row, k, scale));
          static_cast<T*>(task.upper)[to] =
              static_cast<T>(upper_bound(row, k, scale));
        }
      }

      if (task.prune_all || (task.prune != nullptr && task.prune[at[kPrune]])) {
        const int64_t arm = arm_to_drop(row, arms, scale);
        if (arm >= 0) {
          row.alive[arm] = false;
          task.alive[at[kAlive] + arm * task.arm_stride[kAlive]] = false;
        }
      }

      if (probabilities) {
        const double weights = find_weights(row, arms, scale);
        if (task.probabilities != nullptr)
          for (int64_t k = 0; k < arms; ++k)
            static_cast<T*>(task.probabilities)[(first + r) * arms + k] =
                static_cast<T>(row.count[k] / weights);
        if (sample) {
          const double uniform = real_at(task.uniform, task.uniform_is_double, at[kUniform]);
          int64_t choice = -1;
          // Weights against uniform * total, as on the CPU: one division for a row.
          const double limit = uniform * weights;
          double sum = 0.0, weight = 0.0;
          // The last arm alive stays chosen for a number that is not below 1.
          for (int64_t k = 0; k < arms; ++k) {
            sum += row.count[k];
            if (!row.alive[k]) continue;
            choice = k;
            weight = row.count[k];
            if (sum > limit) break;
          }
          task.next_choice[first + r] = choice;
          static_cast<T*>(task.next_probability)[first + r] = static_cast<T>(weight / weights);
        }
      }
    }
    __syncthreads();  // before the next tile overwrites this one
  }
}

template <class T, class N>
void launch(const BanditTask& task, int rows_of_tile, int64_t pitch, size_t bytes, void* stream) {
  const int64_t tiles = (task.rows.numel + rows_of_tile - 1) / rows_of_tile;
  const int64_t limit = static_cast<int64_t>(multiprocessors()) * 16;
  FB_LAUNCH((bandit_kernel<T, N>), static_cast<unsigned>(tiles < limit ? tiles : limit),
            kRowsOfBlock, bytes, stream, task, rows_of_tile, pitch);
}

}  // namespace
}  // namespace fastbandit

FB_LAUNCHER launch_bandit(const fastbandit::BanditTask* task, int is_double, int whole_counts,
                          void* stream) {
  using namespace fastbandit;
  if (task->rows.numel == 0) return nullptr;
  const int64_t pitch = task->arms | 1;
  const int64_t row_bytes = pitch * static_cast<int64_t>(2 * sizeof(double) + sizeof(bool));
  const int64_t fitting = kTileBytes / row_bytes;
  if (fitting < 1) return "more arms than fit into a block's shared memory (2800)";
  const int64_t wanted = task->rows.numel < kRowsOfBlock ? task->rows.numel : kRowsOfBlock;
  const int rows = static_cast<int>(fitting < wanted ? fitting : wanted);
  const size_t bytes = static_cast<size_t>(rows * row_bytes);
  if (is_double) {
    whole_counts ? launch<double, int64_t>(*task, rows, pitch, bytes, stream)
                 : launch<double, double>(*task, rows, pitch, bytes, stream);
  } else {
    whole_counts ? launch<float, int64_t>(*task, rows, pitch, bytes, stream)
                 : launch<float, float>(*task, rows, pitch, bytes, stream);
  }
  return launch_error();
}
