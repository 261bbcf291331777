// The bandit ops' walk over rows, compiled once for each instruction set (see cpu/isa.h).
//
// Rows are taken sixteen at a time and moved into arrays [arm][row], so that every step is the same
// for the rows of a vector, whatever the number of arms. The cumulative sums run in the order of
// the arms.
#include <algorithm>
#include <limits>
#include <memory>
#include <type_traits>

#include "cpu/bandit_problem.h"
#include "layout.h"
// Begins the instruction set; what is before it is compiled for any CPU.
#include "cpu/simd/simd.h"
// Only functions that are always inlined, for the instruction set of who calls them.
#include "math/bandit.h"

namespace fastbandit::cpu::FB_ISA {

// ---- blocks of rows ------------------------------------------------------------------------------

constexpr int kRows = 16;  // of a block: two vectors of AVX-512, four of AVX2
constexpr double kInfinity = std::numeric_limits<double>::infinity();

using Lane = double[kRows];

// The state of one block of rows. Every array begins on a cache line, so that no vector lies across
// two. Flags are words of equal bits.
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

  // Counts come in as words if they are whole numbers, and are numbers after find_bounds.
  enum { kMeans, kCounts, kAlives, kLowers, kUppers, kWeights, kFields };
  static constexpr int64_t kFewArms = 16;  // 12 KiB, which need no allocation
  Lane* field(int which) { return lanes + static_cast<size_t>(which) * static_cast<size_t>(arms); }

  alignas(64) double few[kFewArms * kFields * kRows];
  alignas(64) Lane prune, uniform;  // in; prune is flags
  Lane dropped;                     // out: the arm abandoned, -1 for none
  Lane total;                       // the weights' sum
  Lane choice;                      // out
  int64_t arms;

 private:
  std::unique_ptr<double[]> many;
  Lane* lanes;
};

// The steps below work on the rows of one vector: `at` is the first of them.

template <bool kWhole>
FB_INLINE void find_bounds(Block& block, int at, double bonus) {
  const int64_t arms = block.arms;
  const Lane* const mean = block.field(Block::kMeans);
  Lane* const count = block.field(Block::kCounts);
  Lane* const lower = block.field(Block::kLowers);
  Lane* const upper = block.field(Block::kUppers);
  Reals total = 0.0;
  for (int64_t k = 0; k < arms; ++k) {
    if constexpr (kWhole) {
      const Reals n = to_reals(load_words(count[k] + at));
      store(count[k] + at, n);
      total = total + n;
    } else {
      total = total + load_reals(count[k] + at);
    }
  }
  const Reals scale = bonus * root(twice_log_total(total));
  for (int64_t k = 0; k < arms; ++k) {
    const Reals n = load_reals(count[k] + at), m = load_reals(mean[k] + at);
    const Flags tried = n > 0.0;
    const Reals width = scale * inverse_root(select(tried, n, Reals(1.0)));
    store(lower[k] + at, select(tried, m - width, Reals(-kInfinity)));
    store(upper[k] + at, select(tried, m + width, Reals(kInfinity)));
  }
}

// Eq. 4.13. Clears the flag of the arm that each row drops. A bound that is NaN, which is equal to
// nothing, is the smallest.
FB_INLINE void abandon(Block& block, int at) {
  const int64_t arms = block.arms;
  const Lane* const upper = block.field(Block::kUppers);
  Lane* const alive = block.field(Block::kAlives);
  Reals smallest = kInfinity, left = 0.0, dropped = -1.0;
  for (int64_t k = 0; k < arms; ++k) {
    const Flags here = highest_bits(load_words(alive[k] + at));
    const Reals given = load_reals(upper[k] + at);
    const Reals bound = select(given == given, given, Reals(-kInfinity));
    left = left + select(here, Reals(1.0), Reals(0.0));
    // The first arm alive is a candidate even when its bound is infinite.
    const Flags less = here & ((smallest > bound) | (Reals(0.0) > dropped));
    smallest = select(less, bound, smallest);
    dropped = select(less, Reals(static_cast<double>(k)), dropped);
  }
  const Flags allowed = (left > 1.5) & highest_bits(load_words(block.prune + at));
  dropped = select(allowed, dropped, Reals(-1.0));
  for (int64_t k = 0; k < arms; ++k) {
    const Flags here = highest_bits(load_words(alive[k] + at));
    store(alive[k] + at, without(here, dropped == Reals(static_cast<double>(k))));
  }
  store(block.dropped + at, dropped);
}

// Eq. 4.10 without the normalisation: the probability of an arm is weight / total. A bound that is
// NaN is passed over by `smaller` and has the weight 0.
FB_INLINE void find_weights(Block& block, int at) {
  const int64_t arms = block.arms;
  const Lane* const count = block.field(Block::kCounts);
  const Lane* const alive = block.field(Block::kAlives);
  const Lane* const lower = block.field(Block::kLowers);
  Lane* const weight = block.field(Block::kWeights);
  Reals smallest = kInfinity, waiting = 0.0, total = 0.0;
  for (int64_t k = 0; k < arms; ++k) {
    const Flags here = highest_bits(load_words(alive[k] + at));
    const Flags untried = without(here, load_reals(count[k] + at) > 0.0);
    smallest = smaller(select(here, load_reals(lower[k] + at), Reals(kInfinity)), smallest);
    waiting = select(untried, Reals(1.0), waiting);
  }
  const Flags uniform = waiting > 0.0;
  for (int64_t k = 0; k < arms; ++k) {
    const Flags here = highest_bits(load_words(alive[k] + at));
    const Flags untried = without(here, load_reals(count[k] + at) > 0.0);
    // Where an arm is untried the difference is inf or NaN, and not used.
    const Reals tried =
        select(here, exp_to_zero(smallest - load_reals(lower[k] + at)), Reals(0.0));
    const Reals w = select(uniform, select(untried, Reals(1.0), Reals(0.0)), tried);
    total = total + w;
    store(weight[k] + at, w);
  }
  store(block.total + at, select(total > 0.0, total, Reals(1.0)));
}

// The first arm alive whose cumulative probability exceeds the uniform number; the last arm alive
// for a number not below 1; -1 where no arm is alive. Weights are compared with uniform * total:
// that saves divisions, and for a number below 1 the product is below the total in any rounding.
FB_INLINE void draw(Block& block, int at) {
  const int64_t arms = block.arms;
  const Lane* const alive = block.field(Block::kAlives);
  const Lane* const weight = block.field(Block::kWeights);
  const Reals limit = load_reals(block.uniform + at) * load_reals(block.total + at);
  Reals sum = 0.0, first = kInfinity, last = -1.0;
  for (int64_t k = 0; k < arms; ++k) {
    const Reals arm = static_cast<double>(k);
    const Flags here = highest_bits(load_words(alive[k] + at));
    sum = sum + load_reals(weight[k] + at);
    first = smaller(select(here & (sum > limit), arm, Reals(kInfinity)), first);
    last = select(here, arm, last);
  }
  store(block.choice + at, select(Reals(kInfinity) > first, first, last));
}

template <bool kWhole>
void compute(Block& block, bool prune, bool weights, bool sample, double bonus) {
  for (int at = 0; at < kRows; at += kReals) {
    find_bounds<kWhole>(block, at, bonus);
    if (prune) abandon(block, at);
    if (weights) find_weights(block, at);
    if (sample) draw(block, at);
  }
}

// ---- rows in memory ------------------------------------------------------------------------------

// Where the rows [first, first + count) lie in each tensor but the row numbers themselves.
using Offsets = int64_t[kBanditTensors][kRows];

FB_INLINE void find_offsets(const Layout<kBanditTensors>& layout, int64_t first, int count,
                            Offsets& at) {
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

// Asks for the rows [first, first + count) of a tensor if they lie densely one after the other. The
// credit of a block touches one arm of each row, which no hardware prefetcher foresees.
template <class T>
FB_INLINE void prefetch_rows(const T* data, int64_t row_step, int64_t arms, int64_t first,
                             int64_t count) {
  if (row_step != arms) return;
  const char* p = reinterpret_cast<const char*>(data + first * arms);
  const char* const end = reinterpret_cast<const char*>(data + (first + count) * arms);
  for (; p < end; p += 64) __builtin_prefetch(p, 0, 3);
}

FB_INLINE double word(uint64_t bits) { return fastbandit::from_bits(bits); }
FB_INLINE double flag(bool value) { return word(value ? ~uint64_t{0} : 0); }

// One row into column r of [arm][row]: a value is moved as it is and converted a vector at a time.
template <class T, class N>
FB_INLINE void spread(const T* mean, int64_t mean_step, const N* count, int64_t count_step,
                      const uint8_t* alive, int64_t alive_step, int64_t arms, Lane* means,
                      Lane* counts, Lane* alives, int r) {
  for (int64_t k = 0; k < arms; ++k) {
    means[k][r] = static_cast<double>(mean[k * mean_step]);
    const N n = count[k * count_step];
    if constexpr (std::is_same_v<N, int64_t>) {
      counts[k][r] = word(static_cast<uint64_t>(n));
    } else {
      counts[k][r] = static_cast<double>(n);
    }
    alives[k][r] = word(-static_cast<uint64_t>(alive[k * alive_step]));
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
  const bool adjacent =
      step[kMean] == 1 && step[kCount] == 1 && alive != nullptr && alive_step == 1;
  Lane* const means = block.field(Block::kMeans);
  Lane* const counts = block.field(Block::kCounts);
  Lane* const alives = block.field(Block::kAlives);
  const Lane* const weights = block.field(Block::kWeights);

  for (int64_t first = begin; first < end; first += kRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kRows, end - first));
    Offsets at;
    find_offsets(task.rows, first, rows, at);
    if (adjacent && task.rows.dims == 1 && first + kRows < end) {
      const int64_t next = first + kRows, here = std::min<int64_t>(kRows, end - next);
      prefetch_rows(mean, task.rows.stride[kMean][0], arms, next, here);
      prefetch_rows(count, task.rows.stride[kCount][0], arms, next, here);
      prefetch_rows(alive, task.rows.stride[kAlive][0], arms, next, here);
    }

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
      const T* const m = mean + at[kMean][r];
      const N* const n = count + at[kCount][r];
      const uint8_t* const a = alive != nullptr ? alive + at[kAlive][r] : &nothing;
      if (adjacent) {
        spread(m, 1, n, 1, a, 1, arms, means, counts, alives, r);
      } else {
        spread(m, step[kMean], n, step[kCount], a, alive_step, arms, means, counts, alives, r);
      }
      block.prune[r] = flag(task.prune != nullptr ? task.prune[at[kPrune][r]] : task.prune_all);
      block.uniform[r] =
          sample ? real_at(task.uniform, task.uniform_is_double, at[kUniform][r]) : 0.0;
    }
    for (int r = rows; r < kRows; ++r) {  // rows past the end compute on harmless numbers
      for (int64_t k = 0; k < arms; ++k) means[k][r] = counts[k][r] = alives[k][r] = 0.0;
      block.prune[r] = block.uniform[r] = 0.0;
    }
    bool prunes_here = task.prune_all;
    if (task.prune != nullptr)
      for (int r = 0; r < rows; ++r) prunes_here |= task.prune[at[kPrune][r]];
    compute<std::is_same_v<N, int64_t>>(block, prunes_here, probabilities, sample, task.bonus);

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

inline BanditKernels make_bandit_table() {
  return {run_rows<float, int64_t>, run_rows<float, float>, run_rows<double, int64_t>,
          run_rows<double, double>};
}

}  // namespace fastbandit::cpu::FB_ISA

namespace fastbandit::cpu {

template <>
const BanditKernels& kernels_for<BanditKernels, FB_ISA::kIsa>() {
  static const BanditKernels table = FB_ISA::make_bandit_table();
  return table;
}

}  // namespace fastbandit::cpu

#include "cpu/simd/end.h"
