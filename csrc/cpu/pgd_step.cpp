// fastbandit::pgd_step_ on the CPU.
#include "cpu/pgd_run.h"
#include "dispatch.h"
#include "pgd_checks.h"

namespace fastbandit {
namespace {

// `count` elements at the given strides. With all strides 1 known to the compiler, it vectorises.
template <Bounds kBounds, class T, class X, class C>
inline __attribute__((always_inline)) void pgd_step_run(T* delta, int64_t delta_stride,
                                                        const T* grad, int64_t grad_stride,
                                                        const X* image, int64_t image_stride,
                                                        int64_t count, C step,
                                                        ProjectionBounds<C> bounds) {
  // Only delta is written, and no element of it is visited twice.
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const C pixel = kBounds == kNoBounds ? C(0) : image_value<C>(image[i * image_stride]);
    delta[i * delta_stride] = round_toward_zero<T>(pgd_update<kBounds, C>(
        to_compute(delta[i * delta_stride]), to_compute(grad[i * grad_stride]), pixel, step,
        bounds));
  }
}

// Any strides, and whatever bounds: compiled once for a pair of dtypes.
template <class T, class X, class C>
void pgd_step_strided(const Layout<3>& layout, int64_t begin, int64_t end, T* delta, const T* grad,
                      const X* image, C step, ProjectionBounds<C> bounds) {
  const int inner = layout.dims - 1;
  for_each_run(layout, begin, end, [&](const int64_t* at, int64_t count) {
    pgd_step_run<kSomeBounds>(delta + at[0], layout.stride[0][inner], grad + at[1],
                              layout.stride[1][inner], image + at[2], layout.stride[2][inner],
                              count, step, bounds);
  });
}

template <Bounds kBounds, class T, class X, class C>
void pgd_step_bounded(const Layout<3>& layout, int64_t begin, int64_t end, T* delta, const T* grad,
                      const X* image, C step, ProjectionBounds<C> bounds) {
  with_isa(FB_BODY {
    for_each_run(layout, begin, end, [&](const int64_t* at, int64_t count) FB_INLINE_LAMBDA {
      pgd_step_run<kBounds>(delta + at[0], 1, grad + at[1], 1, image + at[2], 1, count, step,
                            bounds);
    });
  });
}

}  // namespace

template <class T, class X, class C>
void pgd_step_range(const Layout<3>& layout, int64_t begin, int64_t end, T* delta, const T* grad,
                    const X* image, C step, ProjectionBounds<C> bounds) {
  if (!layout.unit_inner()) {
    return pgd_step_strided(layout, begin, end, delta, grad, image, step, bounds);
  }
  switch (bounds.kind()) {
    case kNoBounds:
      // The image is not read, so one instantiation serves all its types.
      return pgd_step_bounded<kNoBounds>(layout, begin, end, delta, grad,
                                         reinterpret_cast<const T*>(image), step, bounds);
    case kBothBounds:
      return pgd_step_bounded<kBothBounds>(layout, begin, end, delta, grad, image, step, bounds);
    case kSomeBounds:
      return pgd_step_bounded<kSomeBounds>(layout, begin, end, delta, grad, image, step, bounds);
  }
}

#define FB_INSTANTIATE(T, X)                                                                     \
  template void pgd_step_range(const Layout<3>&, int64_t, int64_t, T*, const T*, const X*,       \
                               compute_t<T>, ProjectionBounds<compute_t<T>>);
FB_INSTANTIATE(float, float)
FB_INSTANTIATE(float, uint8_t)
FB_INSTANTIATE(double, double)
FB_INSTANTIATE(double, float)
FB_INSTANTIATE(double, uint8_t)
FB_INSTANTIATE(bfloat16, bfloat16)
FB_INSTANTIATE(bfloat16, float)
FB_INSTANTIATE(bfloat16, uint8_t)
FB_INSTANTIATE(float16, float16)
FB_INSTANTIATE(float16, float)
FB_INSTANTIATE(float16, uint8_t)
#undef FB_INSTANTIATE

namespace {

void pgd_step_(Tensor delta, Tensor grad, Tensor image, double step_size, double epsilon,
               std::optional<double> lower, std::optional<double> upper) {
  constexpr const char* kOp = "pgd_step_";
  check_pgd(kOp, delta, grad, image, step_size, epsilon, lower, upper);
  const auto layout = merged_layout(kOp, delta, grad, image);
  if (layout.numel == 0) return;
  dispatch_floating(kOp, "delta", delta.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = compute_t<T>;
    const auto bounds = projection_bounds<C>(epsilon, lower.has_value(), lower.value_or(0),
                                             upper.has_value(), upper.value_or(0));
    T* const delta_data = static_cast<T*>(delta.mutable_data_ptr());
    const T* const grad_data = static_cast<const T*>(grad.const_data_ptr());
    dispatch_image<T>(kOp, image.scalar_type(), [&](auto image_tag) {
      using X = typename decltype(image_tag)::type;
      const X* const image_data = static_cast<const X*>(image.const_data_ptr());
      parallel(layout.numel, kGrain, [&](int64_t begin, int64_t end) {
        pgd_step_range(layout, begin, end, delta_data, grad_data, image_data,
                       static_cast<C>(step_size), bounds);
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastbandit, CPU, library) {
  library.impl("pgd_step_", TORCH_BOX(&pgd_step_));
}

}  // namespace fastbandit
