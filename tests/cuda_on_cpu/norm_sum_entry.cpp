// The launchers of norm_sum take arrays of pointers, which the harness cannot pass: four terms.
#include "cuda/norm_sum.h"

extern "C" const char* enter_norm_sum(
    const void* x0, const void* x1, const void* x2, const void* x3, const int64_t* kinds,
    const void* v0, const void* v1, const void* v2, const void* v3, const void* v4, const void* v5,
    const void* v6, const void* v7, const void* v8, const void* v9, const void* v10,
    const void* v11, const void* v12, const void* v13, const void* v14, const void* v15,
    int64_t terms, void* y, void* mean, void* inverse, void* variance, void* partial,
    int64_t numbers, int dtype, int64_t pixels, int64_t channels, double eps) {
  if (norm_sum_partial_numbers(pixels, channels, terms) > numbers) return "partial is too small";
  const void* xs[] = {x0, x1, x2, x3};
  const void* vectors[] = {v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15};
  return launch_norm_sum(xs, kinds, vectors, terms, y, mean, inverse, variance, partial, dtype,
                         pixels, channels, eps, nullptr);
}

// Six terms, more than a group.
extern "C" const char* enter_norm_sum_backward(
    const void* grad, const void* x0, const void* x1, const void* x2, const void* x3,
    const void* x4, const void* x5, const void* w0, const void* w1, const void* w2, const void* w3,
    const void* w4, const void* w5, int64_t terms, const void* mean, const void* inverse, void* g0,
    void* g1, void* g2, void* g3, void* g4, void* g5, void* by_weight, void* by_bias,
    void* partial, int64_t numbers, int dtype, int64_t pixels, int64_t channels) {
  if (norm_sum_partial_numbers(pixels, channels, terms) > numbers) return "partial is too small";
  const void* xs[] = {x0, x1, x2, x3, x4, x5};
  const void* weights[] = {w0, w1, w2, w3, w4, w5};
  void* by_x[] = {g0, g1, g2, g3, g4, g5};
  return launch_norm_sum_backward(grad, xs, weights, terms, mean, inverse, by_x, by_weight,
                                  by_bias, partial, dtype, pixels, channels, nullptr);
}
