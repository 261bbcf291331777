// fastbandit::pgd_step_ on the CPU.
#include "math/pgd.h"

#include "cpu/isa.h"
#include "cpu/walk.h"
#include "dispatch.h"
#include "pgd_checks.h"

namespace fastbandit {
namespace {

constexpr const char* kOp = "pgd_step_";

// `count` elements at the given strides; kUnit: all strides are 1, which is what vectorises.
template <bool kLower, bool kUpper, bool kUnit, class T, class X, class C>
inline __attribute__((always_inline)) void pgd_step_run(T* delta, int64_t delta_stride,
                                                        const T* grad, int64_t grad_stride,
                                                        const X* image, int64_t image_stride,
                                                        int64_t count, C step,
                                                        ProjectionBounds<C> bounds) {
  if (kUnit) delta_stride = grad_stride = image_stride = 1;
  // Elements of different tensors never overlap: delta is the only one written.
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const C value = pgd_update<kLower, kUpper, C>(
        to_compute(delta[i * delta_stride]), to_compute(grad[i * grad_stride]),
        kLower || kUpper ? image_value<C>(image[i * image_stride]) : C(0), step, bounds);
    delta[i * delta_stride] = round_toward_zero<T>(value);
  }
}

template <bool kLower, bool kUpper, class T, class X>
void pgd_step_range(const Layout<3>& layout, int64_t begin, int64_t end, T* delta, const T* grad,
                    const X* image, compute_t<T> step, ProjectionBounds<compute_t<T>> bounds) {
  const int inner = layout.dims - 1;
  const bool unit = layout.unit_inner();
  with_isa(FB_BODY {
    for_each_run(layout, begin, end,
                 [&](const int64_t* at, int64_t count) __attribute__((always_inline)) {
                   if (unit) {
                     pgd_step_run<kLower, kUpper, true>(delta + at[0], 1, grad + at[1], 1,
                                                        image + at[2], 1, count, step, bounds);
                   } else {
                     pgd_step_run<kLower, kUpper, false>(
                         delta + at[0], layout.stride[0][inner], grad + at[1],
                         layout.stride[1][inner], image + at[2], layout.stride[2][inner], count,
                         step, bounds);
                   }
                 });
  });
}

void pgd_step_(Tensor delta, Tensor grad, Tensor image, double step_size, double epsilon,
               std::optional<double> lower, std::optional<double> upper) {
  check_pgd(kOp, delta, grad, image, step_size, epsilon, lower, upper);
  const auto layout = merged_layout(kOp, delta, grad, image);
  if (layout.numel == 0) return;
  dispatch_floating(kOp, "delta", delta.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = compute_t<T>;
    const ProjectionBounds<C> bounds{static_cast<C>(epsilon), static_cast<C>(lower.value_or(0)),
                                     static_cast<C>(upper.value_or(0))};
    T* delta_data = static_cast<T*>(delta.mutable_data_ptr());
    const T* grad_data = static_cast<const T*>(grad.const_data_ptr());
    const auto launch = [&](auto image_tag) {
      using X = typename decltype(image_tag)::type;
      const X* image_data = static_cast<const X*>(image.const_data_ptr());
      dispatch_bool(lower.has_value(), [&](auto has_lower) {
        dispatch_bool(upper.has_value(), [&](auto has_upper) {
          parallel(layout.numel, kGrain, [&](int64_t begin, int64_t end) {
            pgd_step_range<has_lower, has_upper>(layout, begin, end, delta_data, grad_data,
                                                 image_data, static_cast<C>(step_size), bounds);
          });
        });
      });
    };
    if (image.scalar_type() == delta.scalar_type()) {
      launch(TypeTag<T>{});
    } else if (image.scalar_type() == ScalarType::Byte) {
      launch(TypeTag<uint8_t>{});
    } else {
      launch(TypeTag<float>{});
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastbandit, CPU, library) {
  library.impl("pgd_step_", TORCH_BOX(&pgd_step_));
}

}  // namespace fastbandit
