// The bandit ops on the CPU.
//
// Rows are taken sixteen at a time, transposed into arrays [arm][row] of double: every step is then
// a loop over sixteen rows without a branch, which vectorises for any number of arms. The
// cumulative sums still run in the order of the arms.
#include "math/bandit.h"

#include <cmath>
#include <limits>
#include <memory>

#include "bandit_task.h"
#include "cpu/isa.h"
#include "cpu/walk.h"

namespace fastbandit {
namespace {

constexpr int kRows = 16;         // of a block: two registers of AVX-512
constexpr int64_t kRowGrain = 256;  // rows below which a second thread costs more than it brings
constexpr double kInfinity = std::numeric_limits<double>::infinity();

using Lane = double[kRows];

// The state of one block of rows. Flags are 0.0 and 1.0: masks of one width vectorise best. Every
// array begins on a cache line, so that no vector lies across two.
struct Block {
  explicit Block(int64_t arms) : arms(arms) {
    double* start = few;
    if (arms > kFewArms) {
      constexpr size_t kLine = 64 / sizeof(double);
      many.reset(new double[static_cast<size_t>(arms) * kFields * kRows + kLine]);
      start = many.get();
      while (reinterpret_cast<uintptr_t>(start) % 64 != 0) ++start;
    }
    lanes = reinterpret_cast<Lane*>(start);
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  enum { kMeans, kCounts, kAlives, kLowers, kUppers, kWeights, kFields };
  static constexpr int64_t kFewArms = 16;  // 12 KiB, which need no allocation
  Lane* field(int which) { return lanes + static_cast<size_t>(which) * static_cast<size_t>(arms); }

  alignas(64) double few[kFewArms * kFields * kRows];
  alignas(64) Lane prune, uniform;  // in
  Lane dropped;                     // out: the arm abandoned, -1 for none
  Lane total;                       // the weights' sum
  Lane choice;                      // out
  int64_t arms;

 private:
  std::unique_ptr<double[]> many;
  Lane* lanes;
};

// The arrays of the functions below never overlap; without that word the compiler looks for each arm.
inline __attribute__((always_inline)) void find_bounds(int64_t arms, const Lane* __restrict mean,
                                                       const Lane* __restrict count,
                                                       Lane* __restrict lower,
                                                       Lane* __restrict upper, double bonus) {
  Lane log_total = {}, scale;
  for (int64_t k = 0; k < arms; ++k)
    for (int r = 0; r < kRows; ++r) log_total[r] += count[k][r];
  // twice_log_total in two loops: in one, gcc branches around the logarithm of 1 and stays scalar.
  for (int r = 0; r < kRows; ++r) log_total[r] = log_total[r] > 1.0 ? log_total[r] : 1.0;
  for (int r = 0; r < kRows; ++r) log_total[r] = 2.0 * log_from_one(log_total[r]);
  for (int r = 0; r < kRows; ++r) scale[r] = bonus * __builtin_sqrt(log_total[r]);
  for (int64_t k = 0; k < arms; ++k) {
    for (int r = 0; r < kRows; ++r) {
      const double n = count[k][r] > 0.0 ? count[k][r] : 1.0;
      const double width = scale[r] * inverse_root(n);
      lower[k][r] = count[k][r] > 0.0 ? mean[k][r] - width : -kInfinity;
      upper[k][r] = count[k][r] > 0.0 ? mean[k][r] + width : kInfinity;
    }
  }
}

// Eq. 4.13. Clears the flag of the arm that each row drops.
inline __attribute__((always_inline)) void abandon(int64_t arms, const Lane& prune,
                                                   const Lane* __restrict upper,
                                                   Lane* __restrict alive, Lane& result) {
  Lane smallest, left = {}, dropped;
  for (int r = 0; r < kRows; ++r) smallest[r] = kInfinity;
  for (int r = 0; r < kRows; ++r) dropped[r] = -1.0;
  for (int64_t k = 0; k < arms; ++k) {
    for (int r = 0; r < kRows; ++r) {
      left[r] += alive[k][r];
      // The first arm alive is a candidate even when its bound is infinite.
      const double first = dropped[r] < 0.0 ? alive[k][r] : 0.0;
      const double less = upper[k][r] < smallest[r] ? alive[k][r] : first;
      smallest[r] = less != 0.0 ? upper[k][r] : smallest[r];
      dropped[r] = less != 0.0 ? static_cast<double>(k) : dropped[r];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const double allowed = left[r] > 1.5 ? prune[r] : 0.0;
    dropped[r] = allowed != 0.0 ? dropped[r] : -1.0;
  }
  for (int64_t k = 0; k < arms; ++k)
    for (int r = 0; r < kRows; ++r)
      alive[k][r] = dropped[r] == static_cast<double>(k) ? 0.0 : alive[k][r];
  for (int r = 0; r < kRows; ++r) result[r] = dropped[r];
}

// Eq. 4.10 without the normalisation: the probability of an arm is weight / total.
inline __attribute__((always_inline)) void find_weights(int64_t arms, const Lane* __restrict count,
                                                        const Lane* __restrict alive,
                                                        const Lane* __restrict lower,
                                                        Lane* __restrict weight, Lane& sum) {
  Lane smallest, untried = {}, total = {};
  for (int r = 0; r < kRows; ++r) smallest[r] = kInfinity;
  for (int64_t k = 0; k < arms; ++k) {
    for (int r = 0; r < kRows; ++r) {
      const double bound = alive[k][r] != 0.0 ? lower[k][r] : kInfinity;
      smallest[r] = bound < smallest[r] ? bound : smallest[r];
      untried[r] += count[k][r] > 0.0 ? 0.0 : alive[k][r];
    }
  }
  for (int64_t k = 0; k < arms; ++k) {
    for (int r = 0; r < kRows; ++r) {
      const double share = count[k][r] > 0.0 ? 0.0 : alive[k][r];
      // Where an arm is untried the difference is inf or NaN, and not used.
      const double tried = alive[k][r] != 0.0 ? exp_to_zero(smallest[r] - lower[k][r]) : 0.0;
      weight[k][r] = untried[r] != 0.0 ? share : tried;
      total[r] += weight[k][r];
    }
  }
  for (int r = 0; r < kRows; ++r) sum[r] = total[r] > 0.0 ? total[r] : 1.0;
}

// The first arm alive whose cumulative probability exceeds the uniform number; the last arm alive
// for a number not below 1; -1 where no arm is alive. Weights are compared with uniform * total:
// that saves divisions, and for a number below 1 the product is below the total in any rounding.
// The arm is a minimum or a maximum of candidates: of a choice between two values gcc makes a store
// behind a branch.
inline __attribute__((always_inline)) void draw(int64_t arms, const Lane& uniform,
                                                const Lane* __restrict alive,
                                                const Lane* __restrict weight, const Lane& total,
                                                Lane& choice) {
  Lane sum = {}, limit, first, last;
  for (int r = 0; r < kRows; ++r) limit[r] = uniform[r] * total[r];
  for (int r = 0; r < kRows; ++r) first[r] = kInfinity;
  for (int r = 0; r < kRows; ++r) last[r] = -1.0;
  for (int64_t k = 0; k < arms; ++k) {
    const double arm = static_cast<double>(k);
    for (int r = 0; r < kRows; ++r) {
      sum[r] += weight[k][r];
      const double reached = sum[r] > limit[r] ? alive[k][r] : 0.0;
      const double early = reached != 0.0 ? arm : kInfinity;
      const double late = alive[k][r] != 0.0 ? arm : -1.0;
      first[r] = early < first[r] ? early : first[r];
      last[r] = late > last[r] ? late : last[r];
    }
  }
  for (int r = 0; r < kRows; ++r) choice[r] = first[r] < kInfinity ? first[r] : last[r];
}

void compute(Block& block, bool prune, bool weights, bool sample, double bonus) {
  const int64_t arms = block.arms;
  const Lane* const mean = block.field(Block::kMeans);
  const Lane* const count = block.field(Block::kCounts);
  Lane* const alive = block.field(Block::kAlives);
  Lane* const lower = block.field(Block::kLowers);
  Lane* const upper = block.field(Block::kUppers);
  Lane* const weight = block.field(Block::kWeights);
  with_isa(FB_BODY {
    find_bounds(arms, mean, count, lower, upper, bonus);
    if (prune) abandon(arms, block.prune, upper, alive, block.dropped);
    if (weights) find_weights(arms, count, alive, lower, weight, block.total);
    if (sample) draw(arms, block.uniform, alive, weight, block.total, block.choice);
  });
}

// Where the rows [first, first + count) lie in each tensor but the row numbers themselves.
using Offsets = int64_t[kBanditTensors][kRows];

inline __attribute__((always_inline)) void find_offsets(const Layout<kBanditTensors>& layout,
                                                        int64_t first, int count, Offsets& at) {
  if (layout.dims == 1) {
    for (int t = kMean; t < kBanditTensors; ++t) {
      int64_t offset = first * layout.stride[t][0];
      for (int r = 0; r < count; ++r, offset += layout.stride[t][0]) at[t][r] = offset;
    }
    return;
  }
  for (int r = 0; r < count; ++r) {
    int64_t offset[kBanditTensors];
    layout_offsets(layout, first + r, offset);
    for (int t = kMean; t < kBanditTensors; ++t) at[t][r] = offset[t];
  }
}

// One row into column r of [arm][row], as doubles. Flags come as bytes of 0 and 1 and are converted:
// a branch on each of them is a guess that fails.
template <class T, class N>
inline __attribute__((always_inline)) void spread(const T* mean, int64_t mean_step, const N* count,
                                                  int64_t count_step, const uint8_t* alive,
                                                  int64_t alive_step, int64_t arms, Lane* means,
                                                  Lane* counts, Lane* alives, int r) {
  for (int64_t k = 0; k < arms; ++k) {
    means[k][r] = static_cast<double>(mean[k * mean_step]);
    counts[k][r] = static_cast<double>(count[k * count_step]);
    alives[k][r] = static_cast<double>(alive[k * alive_step]);
  }
}

// T: dtype of mean and of the results; N: dtype of count.
template <class T, class N>
void run_rows(const BanditTask& task, int64_t begin, int64_t end) {
  const int64_t arms = task.arms;
  T* const mean = static_cast<T*>(task.mean);
  N* const count = static_cast<N*>(task.count);
  const int64_t* const step = task.arm_stride;
  const bool prunes = task.prune != nullptr || task.prune_all;
  const bool bounds = task.lower != nullptr;
  const bool sample = task.next_choice != nullptr;
  const bool probabilities = sample || task.probabilities != nullptr;
  const bool computes = bounds || prunes || probabilities;
  Block block(computes ? arms : 0);
  const uint8_t* const alive = reinterpret_cast<const uint8_t*>(task.alive);
  const uint8_t nothing = 0;
  const int64_t alive_step = alive != nullptr ? step[kAlive] : 0;
  Lane* const means = block.field(Block::kMeans);
  Lane* const counts = block.field(Block::kCounts);
  Lane* const alives = block.field(Block::kAlives);
  const Lane* const weights = block.field(Block::kWeights);

  for (int64_t first = begin; first < end; first += kRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kRows, end - first));
    Offsets at;
    find_offsets(task.rows, first, rows, at);

    if (task.choice != nullptr) {
      for (int r = 0; r < rows; ++r) {
        const int64_t arm = task.choice[at[kChoice][r]];
        if (arm < 0 || arm >= arms) continue;
        T& m = mean[at[kMean][r] + arm * step[kMean]];
        const double reward = real_at(task.reward, task.reward_is_double, at[kReward][r]);
        m = static_cast<T>(credited(static_cast<double>(m), reward, task.rate));
        count[at[kCount][r] + arm * step[kCount]] += N(1);
      }
    }
    if (!computes) continue;

    for (int r = 0; r < rows; ++r) {
      spread(mean + at[kMean][r], step[kMean], count + at[kCount][r], step[kCount],
             alive != nullptr ? alive + at[kAlive][r] : &nothing, alive_step, arms, means, counts,
             alives, r);
      block.prune[r] =
          task.prune != nullptr ? (task.prune[at[kPrune][r]] ? 1.0 : 0.0) : task.prune_all;
      block.uniform[r] =
          sample ? real_at(task.uniform, task.uniform_is_double, at[kUniform][r]) : 0.0;
    }
    for (int r = rows; r < kRows; ++r) {  // rows past the end compute on harmless numbers
      for (int64_t k = 0; k < arms; ++k) {
        means[k][r] = 0.0;
        counts[k][r] = 1.0;
        alives[k][r] = 0.0;
      }
      block.prune[r] = block.uniform[r] = 0.0;
    }
    bool prunes_here = task.prune_all;
    for (int r = 0; r < rows; ++r) prunes_here |= block.prune[r] != 0.0;
    compute(block, prunes_here, probabilities, sample, task.bonus);

    for (int r = 0; r < rows; ++r) {
      const int64_t row = first + r;
      if (prunes_here && block.dropped[r] >= 0.0)
        task.alive[at[kAlive][r] + static_cast<int64_t>(block.dropped[r]) * step[kAlive]] = false;
      if (bounds) {
        const Lane* const lower = block.field(Block::kLowers);
        const Lane* const upper = block.field(Block::kUppers);
        for (int64_t k = 0; k < arms; ++k) {
          static_cast<T*>(task.lower)[row * arms + k] = static_cast<T>(lower[k][r]);
          static_cast<T*>(task.upper)[row * arms + k] = static_cast<T>(upper[k][r]);
        }
      }
      if (task.probabilities != nullptr) {
        for (int64_t k = 0; k < arms; ++k)
          static_cast<T*>(task.probabilities)[row * arms + k] =
              static_cast<T>(weights[k][r] / block.total[r]);
      }
      if (sample) {
        const int64_t arm = static_cast<int64_t>(block.choice[r]);
        task.next_choice[row] = arm;
        static_cast<T*>(task.next_probability)[row] =
            static_cast<T>(arm < 0 ? 0.0 : weights[arm][r] / block.total[r]);
      }
    }
  }
}

void run_bandit(const char* /*op*/, const Tensor& mean, const Tensor& count,
                const BanditTask& task) {
  const bool whole = count.scalar_type() == ScalarType::Long;
  const auto run = [&](auto kernel) {
    parallel(task.rows.numel, kRowGrain, [&](int64_t begin, int64_t end) {
      kernel(task, begin, end);
    });
  };
  if (mean.scalar_type() == ScalarType::Double) {
    whole ? run(run_rows<double, int64_t>) : run(run_rows<double, double>);
  } else {
    whole ? run(run_rows<float, int64_t>) : run(run_rows<float, float>);
  }
}

}  // namespace

FB_REGISTER_BANDIT(CPU, run_bandit)

}  // namespace fastbandit
