#pragma once

#include <cstdint>

namespace fastbandit {

constexpr int kMostNormTerms = 32;  // of a launch: their addresses are kernel parameters
constexpr int64_t kMostNormChannels = 4096;  // each 32 have a counter of the blocks of a launch

}  // namespace fastbandit

// All pointers on the device but the arrays of pointers. Maps are [pixels, channels] in memory, of
// `dtype`; vectors, statistics and sums are float32, or float64 where the maps are.

// Numbers of `partial`, for at most kMostNormTerms terms.
extern "C" int64_t norm_sum_partial_numbers(int64_t pixels, int64_t channels, int64_t terms);

// kinds: NormKind of each term. vectors: weight, bias, mean and inverse of each term, null where it
// has none. mean, inverse, variance (unbiased): [normalised terms, channels]. partial: scratch memory.
extern "C" const char* launch_norm_sum(const void* const* xs, const int64_t* kinds,
                                       const void* const* vectors, int64_t terms, void* y,
                                       void* mean, void* inverse, void* variance, void* partial,
                                       int dtype, int64_t pixels, int64_t channels, double eps,
                                       void* stream);

// weights: of each term, or null. by_x: of each term. by_weight [terms, channels], by_bias
// [channels].
extern "C" const char* launch_norm_sum_backward(const void* grad, const void* const* xs,
                                                const void* const* weights, int64_t terms,
                                                const void* mean, const void* inverse,
                                                void* const* by_x, void* by_weight, void* by_bias,
                                                void* partial, int dtype, int64_t pixels,
                                                int64_t channels, void* stream);
