// From the tensors of a bandit op to a BanditTask: checks, strides and results. The CPU and CUDA
// glue share it; they differ in the function that runs the task.
#pragma once

#include <cmath>
#include <tuple>

#include "check.h"
#include "math/bandit.h"

namespace fastbandit {

// Collects the arguments of one call. `like` is mean: [..., K] on the op's device.
class BanditCall {
 public:
  BanditCall(const char* op, const Tensor& mean, const Tensor& count, double bonus)
      : op_(op), mean_(mean), count_(count), rows_(mean.dim() - 1) {
    FB_CHECK(rows_ >= 0 && rows_ < kMaxRowDims && mean.size(rows_) > 0 &&
                 mean.size(rows_) <= kMostSide,
             op, "mean: expected shape [..., K] with at least one arm and fewer than 2^31, got ",
             shape_text(mean));
    const ScalarType dtype = mean.scalar_type();
    FB_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op,
             "mean: expected float32 or float64, got ", dtype_name(dtype));
    FB_CHECK(count.scalar_type() == ScalarType::Long || count.scalar_type() == dtype, op,
             "count: expected int64 or ", dtype_name(dtype), ", got ",
             dtype_name(count.scalar_type()));
    FB_CHECK(bonus >= 0 && std::isfinite(bonus), op,
             "bonus: expected a finite number >= 0, got ", bonus);
    check_same_shape(op, "count", count, "mean", mean);
    check_same_device(op, "count", count, "mean", mean);
    const int64_t* sizes = mean.sizes().data();
    int64_t step = 1;
    for (int64_t d = rows_ - 1; d >= 0; --d) {
      logical_[d] = step;
      step *= sizes[d] > 1 ? sizes[d] : 1;
    }
    for (auto& strides : strides_) strides = kZeros;
    strides_[kRowIndex] = logical_;
    task.arms = mean.size(rows_);
    task.bonus = bonus;
    task.mean = mean.mutable_data_ptr();
    task.count = count.mutable_data_ptr();
    use(kMean, mean);
    use(kCount, count);
  }

  void set_alive(const Tensor& alive, bool written) {
    check_dtype(op_, "alive", alive, ScalarType::Bool);
    check_same_shape(op_, "alive", alive, "mean", mean_);
    check_same_device(op_, "alive", alive, "mean", mean_);
    if (written) check_no_overlap(op_, "alive", alive);
    task.alive = static_cast<bool*>(alive.mutable_data_ptr());
    use(kAlive, alive);
  }

  void set_credit(const Tensor& choice, const Tensor& reward, double rate) {
    check_no_overlap(op_, "mean", mean_);
    check_no_overlap(op_, "count", count_);
    check_row_tensor("choice", choice);
    check_dtype(op_, "choice", choice, ScalarType::Long);
    FB_CHECK(rate >= 0 && rate <= 1, op_, "rate: expected a number in [0, 1], got ", rate);
    task.choice = static_cast<const int64_t*>(choice.const_data_ptr());
    strides_[kChoice] = choice.strides().data();
    task.reward_is_double = real_is_double("reward", reward);
    task.reward = reward.const_data_ptr();
    use_broadcast(kReward, "reward", reward, reward_strides_);
    task.rate = rate;
  }

  void set_prune(const Tensor& prune) {
    check_dtype(op_, "prune", prune, ScalarType::Bool);
    task.prune = static_cast<const bool*>(prune.const_data_ptr());
    use_broadcast(kPrune, "prune", prune, prune_strides_);
  }

  void set_uniform(const Tensor& uniform) {
    check_row_tensor("uniform", uniform);
    task.uniform_is_double = real_is_double("uniform", uniform);
    task.uniform = uniform.const_data_ptr();
    strides_[kUniform] = uniform.strides().data();
  }

  // A result of shape [...] or [..., K], contiguous.
  Tensor result(bool per_arm, ScalarType dtype) const {
    return empty_contiguous(mean_, mean_.sizes().data(), rows_ + (per_arm ? 1 : 0), dtype);
  }

  // Merges the rows; call once, after everything is set.
  const BanditTask& finish() {
    task.rows = merge_dims<kBanditTensors>(rows_, mean_.sizes().data(), strides_);
    FB_CHECK(task.rows.fits, op_, "more than ", kMaxDims, " row dimensions with unrelated strides");
    return task;
  }

  BanditTask task = {};

 private:
  static constexpr int64_t kMaxRowDims = 64;

  void use(int which, const Tensor& tensor) {
    const auto strides = tensor.strides();
    strides_[which] = strides.data();
    task.arm_stride[which] = strides[static_cast<size_t>(rows_)];
  }

  void check_row_tensor(const char* name, const Tensor& tensor) {
    bool same = tensor.dim() == rows_;
    for (int64_t d = 0; same && d < rows_; ++d) same = tensor.size(d) == mean_.size(d);
    FB_CHECK(same, op_, name, ": expected the shape of mean ", shape_text(mean_),
             " without its last dimension, got ", shape_text(tensor));
    check_same_device(op_, name, tensor, "mean", mean_);
  }

  // Strides of a tensor that broadcasts to the rows.
  void use_broadcast(int which, const char* name, const Tensor& tensor, int64_t* strides) {
    const int64_t lead = rows_ - tensor.dim();
    for (int64_t d = 0; d < lead; ++d) strides[d] = 0;
    bool fits = lead >= 0;
    for (int64_t d = 0; fits && d < tensor.dim(); ++d) {
      fits = tensor.size(d) == 1 || tensor.size(d) == mean_.size(lead + d);
      strides[lead + d] = tensor.size(d) == 1 ? 0 : tensor.stride(d);
    }
    FB_CHECK(fits, op_, name, ": expected a shape that broadcasts to the rows of mean ",
             shape_text(mean_), ", got ", shape_text(tensor));
    check_same_device(op_, name, tensor, "mean", mean_);
    strides_[which] = strides;
  }

  int real_is_double(const char* name, const Tensor& tensor) {
    const ScalarType dtype = tensor.scalar_type();
    FB_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op_, name,
             ": expected float32 or float64, got ", dtype_name(dtype));
    return dtype == ScalarType::Double;
  }

  const char* op_;
  const Tensor& mean_;
  const Tensor& count_;
  int64_t rows_;  // number of leading dimensions
  const int64_t* strides_[kBanditTensors];
  // The first rows_ entries are used; to clear four whole arrays would show in a small call.
  static constexpr int64_t kZeros[kMaxRowDims] = {};
  int64_t logical_[kMaxRowDims];
  int64_t reward_strides_[kMaxRowDims];
  int64_t prune_strides_[kMaxRowDims];
};

// The six ops on top of Run(op, mean, count, task), which walks the rows on one device.
template <void (*Run)(const char*, const Tensor&, const Tensor&, const BanditTask&)>
struct BanditOps {
  static void run(const char* op, const Tensor& mean, const Tensor& count, BanditCall& call) {
    const BanditTask& task = call.finish();
    if (task.rows.numel > 0) Run(op, mean, count, task);
  }

  static std::tuple<Tensor, Tensor> sample_into(const char* op, const Tensor& mean,
                                                const Tensor& count, BanditCall& call) {
    Tensor choice = call.result(false, ScalarType::Long);
    Tensor probability = call.result(false, mean.scalar_type());
    call.task.next_choice = static_cast<int64_t*>(choice.mutable_data_ptr());
    call.task.next_probability = probability.mutable_data_ptr();
    run(op, mean, count, call);
    return {std::move(choice), std::move(probability)};
  }

  static std::tuple<Tensor, Tensor> bounds(Tensor mean, Tensor count, double bonus) {
    constexpr const char* kOp = "bandit_bounds";
    BanditCall call(kOp, mean, count, bonus);
    Tensor lower = call.result(true, mean.scalar_type());
    Tensor upper = call.result(true, mean.scalar_type());
    call.task.lower = lower.mutable_data_ptr();
    call.task.upper = upper.mutable_data_ptr();
    run(kOp, mean, count, call);
    return {std::move(lower), std::move(upper)};
  }

  static Tensor probabilities(Tensor mean, Tensor count, Tensor alive, double bonus) {
    constexpr const char* kOp = "bandit_probabilities";
    BanditCall call(kOp, mean, count, bonus);
    call.set_alive(alive, false);
    Tensor result = call.result(true, mean.scalar_type());
    call.task.probabilities = result.mutable_data_ptr();
    run(kOp, mean, count, call);
    return result;
  }

  static std::tuple<Tensor, Tensor> sample(Tensor mean, Tensor count, Tensor alive, Tensor uniform,
                                           double bonus) {
    constexpr const char* kOp = "bandit_sample";
    BanditCall call(kOp, mean, count, bonus);
    call.set_alive(alive, false);
    call.set_uniform(uniform);
    return sample_into(kOp, mean, count, call);
  }

  static void update_(Tensor mean, Tensor count, Tensor choice, Tensor reward, double rate) {
    constexpr const char* kOp = "bandit_update_";
    BanditCall call(kOp, mean, count, 0.0);
    call.set_credit(choice, reward, rate);
    run(kOp, mean, count, call);
  }

  static void prune_(Tensor alive, Tensor mean, Tensor count, double bonus) {
    constexpr const char* kOp = "bandit_prune_";
    BanditCall call(kOp, mean, count, bonus);
    call.set_alive(alive, true);
    call.task.prune_all = 1;
    run(kOp, mean, count, call);
  }

  static std::tuple<Tensor, Tensor> step_(Tensor mean, Tensor count, Tensor alive, Tensor choice,
                                          Tensor reward, Tensor prune, Tensor uniform, double rate,
                                          double bonus) {
    constexpr const char* kOp = "bandit_step_";
    BanditCall call(kOp, mean, count, bonus);
    call.set_alive(alive, true);
    call.set_credit(choice, reward, rate);
    call.set_prune(prune);
    call.set_uniform(uniform);
    return sample_into(kOp, mean, count, call);
  }
};

template <auto run, class Library>
void register_bandit(Library& library) {
  using Ops = BanditOps<run>;
  library.impl("bandit_bounds", TORCH_BOX(&Ops::bounds));
  library.impl("bandit_probabilities", TORCH_BOX(&Ops::probabilities));
  library.impl("bandit_sample", TORCH_BOX(&Ops::sample));
  library.impl("bandit_update_", TORCH_BOX(&Ops::update_));
  library.impl("bandit_prune_", TORCH_BOX(&Ops::prune_));
  library.impl("bandit_step_", TORCH_BOX(&Ops::step_));
}

}  // namespace fastbandit
