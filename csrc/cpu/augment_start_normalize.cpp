// fastbandit::augment_start_normalize on the CPU: one image after the other, so that what is read
// of it again is still in the L1 or L2 cache.
#include "cpu/augment_run.h"
#include "cpu/normalize_run.h"
#include "cpu/start_run.h"
#include "pgd_checks.h"

namespace fastbandit {
namespace {

constexpr const char* kOp = "augment_start_normalize";

// The channels' statistics as they follow one another in memory, for `period` elements.
struct Pattern {
  std::vector<float> mean, std;
  int64_t period;
};

// channels-last: so many whole pixels that a block of results is full.
Pattern pattern_of(const Tensor& mean, const Tensor& std, bool channels_last) {
  const int64_t channels = mean.size(0);
  const int64_t repeat =
      channels_last ? std::max<int64_t>(1, kNormalizeBlock / channels) : 1;
  Pattern pattern = {{}, {}, channels * repeat};
  const auto read = [&](const Tensor& tensor, std::vector<float>& to) {
    const float* const from = static_cast<const float*>(tensor.const_data_ptr());
    for (int64_t i = 0; i < pattern.period; ++i)
      to.push_back(from[i % channels * tensor.stride(0)]);
  };
  read(mean, pattern.mean);
  read(std, pattern.std);
  return pattern;
}

std::tuple<Tensor, Tensor, Tensor> augment_start_normalize(
    Tensor images, Tensor ids, std::optional<Tensor> draws, std::optional<Tensor> fill,
    int64_t crop_padding, bool flip, int64_t cutout_length, double epsilon, int64_t seed,
    int64_t offset, std::optional<Tensor> seed_tensor, std::optional<Tensor> offset_tensor,
    std::optional<double> lower, std::optional<double> upper, Tensor mean, Tensor std,
    ScalarType out_dtype, torch::headeronly::MemoryFormat memory_format) {
  check_augment(kOp, images, ids, draws, fill, crop_padding, flip, cutout_length);
  check_draw(kOp, "images", images, seed, offset, seed_tensor, offset_tensor);
  check_bounds(kOp, epsilon, lower, upper);
  check_statistics(kOp, "images", images, ScalarType::Float, mean, std);
  check_out_dtype(kOp, out_dtype);
  const int64_t sizes[4] = {ids.size(0), images.size(1), images.size(2), images.size(3)};
  const bool channels_last = is_channels_last(kOp, memory_format);
  int64_t strides[4];
  format_strides(sizes, channels_last, strides);
  Tensor image = empty_strided(images, sizes, strides, 4, ScalarType::Float);
  Tensor delta = empty_strided(images, sizes, strides, 4, ScalarType::Float);
  Tensor out = empty_strided(images, sizes, strides, 4, out_dtype);
  check_ids(kOp, ids, images.size(0));  // after memory for as many images could be had
  if (sizes[0] == 0) return {std::move(image), std::move(delta), std::move(out)};

  const AugmentedBatch<float> batch(images, ids, draws, fill, crop_padding, flip, cutout_length,
                                    strides);
  const Pattern pattern = pattern_of(mean, std, channels_last);
  const auto bounds = projection_bounds<float>(epsilon, lower.has_value(), lower.value_or(0),
                                               upper.has_value(), upper.value_or(0));
  const int64_t plane = sizes[2] * sizes[3], elements = sizes[1] * plane;
  const int64_t number_strides[3] = {plane, sizes[3], 1};
  const int64_t* const numbering[kStartTensors] = {number_strides, strides + 1, strides + 1};
  const auto layout = merge_dims<kStartTensors>(3, sizes + 1, numbering);
  const int64_t key = word_of(seed, seed_tensor), draw = word_of(offset, offset_tensor);
  float* const image_data = static_cast<float*>(image.mutable_data_ptr());
  float* const delta_data = static_cast<float*>(delta.mutable_data_ptr());
  void* const out_data = out.mutable_data_ptr();

  parallel(sizes[0], std::max<int64_t>(1, kGrain / 4 / elements), [&](int64_t begin, int64_t end) {
    alignas(64) uint32_t words[kStartChunk];
    alignas(64) float result[kNormalizeBlock];
    for (int64_t n = begin; n < end; ++n) {
      float* const x = image_data + n * elements;
      float* const d = delta_data + n * elements;
      // 1. The image.
      batch.write(n, x);
      // 2. The perturbation, in the order of the numbering.
      const auto stream = philox_stream(key, draw, batch.id(n));
      for (int64_t from = 0; from < elements; from += kStartChunk) {
        const int64_t to = std::min(from + kStartChunk, elements);
        draw_words(stream, static_cast<uint32_t>(from / 4), words, (to - from + 3) / 4 * 4);
        start_chunk(layout, from, to, d, x, words, bounds);
      }
      // 3. What the model reads, in the order of memory.
      const auto block = [&](int64_t at, int64_t count, const float* m, const float* s, auto step) {
        constexpr int64_t kStep = decltype(step)::value;
        with_isa(
            FB_BODY { normalize_run<true>(d + at, 1, x + at, 1, m, s, kStep, result, count); });
        write_results(kOp, result, out_data, out_dtype, n * elements + at, 1, count);
      };
      const float* const means = pattern.mean.data();
      const float* const stds = pattern.std.data();
      if (channels_last) {
        for (int64_t first = 0; first < elements; first += pattern.period) {
          const int64_t last = std::min(first + pattern.period, elements);
          for (int64_t at = first; at < last; at += kNormalizeBlock)
            block(at, std::min(kNormalizeBlock, last - at), means + (at - first),
                  stds + (at - first), std::integral_constant<int64_t, 1>{});
        }
      } else {
        for (int64_t c = 0; c < sizes[1]; ++c)
          for (int64_t at = c * plane; at < (c + 1) * plane; at += kNormalizeBlock)
            block(at, std::min(kNormalizeBlock, (c + 1) * plane - at), means + c, stds + c,
                  std::integral_constant<int64_t, 0>{});
      }
    }
  });
  return {std::move(image), std::move(delta), std::move(out)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastbandit, CPU, library) {
  library.impl("augment_start_normalize", TORCH_BOX(&augment_start_normalize));
}

}  // namespace fastbandit
