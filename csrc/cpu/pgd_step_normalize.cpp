// fastbandit::pgd_step_normalize_ on the CPU.
//
// A block of delta is stepped, then normalised while it is in the L1 cache, in float32 (float64),
// then rounded to the dtype of the result.
#include "cpu/normalize_run.h"
#include "cpu/pgd_run.h"
#include "pgd_checks.h"

namespace fastbandit {
namespace {

constexpr const char* kOp = "pgd_step_normalize_";

enum { kDelta, kGrad, kImage, kOut, kChannel, kTensors };

Tensor pgd_step_normalize_(Tensor delta, Tensor grad, Tensor image, Tensor mean, Tensor std,
                           double step_size, double epsilon, std::optional<double> lower,
                           std::optional<double> upper, ScalarType out_dtype,
                           torch::headeronly::MemoryFormat memory_format) {
  check_pgd(kOp, delta, grad, image, step_size, epsilon, lower, upper);
  check_pgd_normalize(kOp, delta, mean, std, out_dtype);
  int64_t out_strides[4];
  const int64_t* const sizes = delta.sizes().data();
  format_strides(sizes, is_channels_last(kOp, memory_format), out_strides);
  Tensor out = empty_strided(delta, sizes, out_strides, 4, out_dtype);
  if (delta.numel() == 0) return out;

  // The statistics are a fifth tensor, with a stride in the channel dimension only.
  const int64_t channel_strides[4] = {0, 1, 0, 0};
  const int64_t* strides[kTensors] = {delta.strides().data(), grad.strides().data(),
                                      image.strides().data(), out_strides, channel_strides};
  auto layout = merge_dims<kTensors>(4, sizes, strides);
  const int64_t channels = sizes[1];
  // Channels-last everywhere leaves runs of a few channels. The pattern of the statistics is then
  // written out for a block of pixels, and the runs become that long.
  int64_t repeat = 1;
  const int last = layout.dims - 1;
  if (last > 0 && layout.stride[kChannel][last] == 1 && layout.unit_inner()) {
    bool dense = true;
    for (int t = kDelta; t <= kOut; ++t)
      dense &= layout.stride[t][last - 1] == layout.size[last] && layout.dims == 2;
    if (dense) repeat = std::max<int64_t>(1, kNormalizeBlock / channels);
  }

  dispatch_floating(kOp, "delta", delta.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = compute_t<T>;
    const auto bounds = projection_bounds<C>(epsilon, lower.has_value(), lower.value_or(0),
                                             upper.has_value(), upper.value_or(0));
    std::vector<C> statistics(static_cast<size_t>(2 * channels * repeat));
    C* const means = statistics.data();
    C* const stds = means + channels * repeat;
    const auto read = [&](const char* name, const Tensor& tensor, C* to) {
      dispatch_floating(kOp, name, tensor.scalar_type(), [&](auto statistic_tag) {
        using S = typename decltype(statistic_tag)::type;
        const S* const from = static_cast<const S*>(tensor.const_data_ptr());
        for (int64_t i = 0; i < channels * repeat; ++i)
          to[i] = static_cast<C>(to_compute(from[i % channels * tensor.stride(0)]));
      });
    };
    read("mean", mean, means);
    read("std", std, stds);
    T* const delta_data = static_cast<T*>(delta.mutable_data_ptr());
    const T* const grad_data = static_cast<const T*>(grad.const_data_ptr());
    void* const out_data = out.mutable_data_ptr();

    dispatch_image<T>(kOp, image.scalar_type(), [&](auto image_tag) {
      using X = typename decltype(image_tag)::type;
      const X* const image_data = static_cast<const X*>(image.const_data_ptr());
      const auto block = [&](const int64_t* at, const int64_t* step, int64_t count) {
        Layout<3> run;
        run.dims = 1;
        run.numel = run.size[0] = count;
        for (int t = 0; t < 3; ++t) run.stride[t][0] = step[t];
        T* const d = delta_data + at[kDelta];
        const X* const x = image_data + at[kImage];
        pgd_step_range(run, 0, count, d, grad_data + at[kGrad], x, static_cast<C>(step_size),
                       bounds);
        alignas(64) C result[kNormalizeBlock];
        const C* const m = means + at[kChannel];
        const C* const s = stds + at[kChannel];
        const int64_t channel_step = step[kChannel];
        if (run.unit_inner() && channel_step == 0) {
          with_isa(FB_BODY { normalize_run<true>(d, 1, x, 1, m, s, 0, result, count); });
        } else if (run.unit_inner()) {
          with_isa(FB_BODY { normalize_run<true>(d, 1, x, 1, m, s, 1, result, count); });
        } else {
          normalize_run<false>(d, step[kDelta], x, step[kImage], m, s, channel_step, result,
                               count);
        }
        write_results(kOp, result, out_data, out_dtype, at[kOut], step[kOut], count);
      };
      if (repeat > 1) {
        // Whole pixels for every thread, so that each block starts at the first channel.
        parallel(layout.numel / channels, std::max<int64_t>(1, kGrain / channels),
                 [&](int64_t begin, int64_t end) {
                   const int64_t step[kTensors] = {1, 1, 1, 1, 1};
                   for (int64_t pixel = begin; pixel < end; pixel += repeat) {
                     const int64_t e = pixel * channels;
                     const int64_t at[kTensors] = {e, e, e, e, 0};
                     block(at, step, std::min(repeat, end - pixel) * channels);
                   }
                 });
        return;
      }
      const int inner = layout.dims - 1;
      int64_t step[kTensors];
      for (int t = 0; t < kTensors; ++t) step[t] = layout.stride[t][inner];
      parallel(layout.numel, kGrain, [&](int64_t begin, int64_t end) {
        for_each_run(layout, begin, end, [&](const int64_t* start, int64_t count) {
          for (int64_t done = 0; done < count; done += kNormalizeBlock) {
            int64_t at[kTensors];
            for (int t = 0; t < kTensors; ++t) at[t] = start[t] + done * step[t];
            block(at, step, std::min(kNormalizeBlock, count - done));
          }
        });
      });
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastbandit, CPU, library) {
  library.impl("pgd_step_normalize_", TORCH_BOX(&pgd_step_normalize_));
}

}  // namespace fastbandit
