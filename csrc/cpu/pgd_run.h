// The step on elements [begin, end) of the layout of delta, grad and image. Defined in pgd_step.cpp
// for every pair of dtypes.
#pragma once

#include "cpu/isa.h"
#include "cpu/walk.h"
#include "math/pgd.h"

namespace fastbandit {

template <class T, class X, class C>
void pgd_step_range(const Layout<3>& layout, int64_t begin, int64_t end, T* delta, const T* grad,
                    const X* image, C step, ProjectionBounds<C> bounds);

}  // namespace fastbandit
