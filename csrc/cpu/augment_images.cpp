// fastbandit::augment_images on the CPU.
#include "cpu/augment_run.h"
#include "cpu/walk.h"
#include "dispatch.h"
#include "pgd_checks.h"

namespace fastbandit {
namespace {

constexpr const char* kOp = "augment_images";

Tensor augment_images(Tensor images, Tensor ids, std::optional<Tensor> draws,
                      std::optional<Tensor> fill, int64_t crop_padding, bool flip,
                      int64_t cutout_length, ScalarType out_dtype,
                      torch::headeronly::MemoryFormat memory_format) {
  check_augment(kOp, images, ids, draws, fill, crop_padding, flip, cutout_length);
  check_out_dtype(kOp, out_dtype);
  const int64_t sizes[4] = {ids.size(0), images.size(1), images.size(2), images.size(3)};
  int64_t strides[4];
  format_strides(sizes, is_channels_last(kOp, memory_format), strides);
  Tensor out = empty_strided(images, sizes, strides, 4, out_dtype);
  check_ids(kOp, ids, images.size(0));  // after memory for as many images could be had
  if (sizes[0] == 0) return out;

  dispatch_floating(kOp, "out_dtype", out_dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const AugmentedBatch<T> batch(images, ids, draws, fill, crop_padding, flip, cutout_length,
                                  strides);
    T* const target = static_cast<T*>(out.mutable_data_ptr());
    const int64_t elements = sizes[1] * sizes[2] * sizes[3];
    parallel(sizes[0], std::max<int64_t>(1, kGrain / elements), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) batch.write(n, target + n * strides[0]);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastbandit, CPU, library) {
  library.impl("augment_images", TORCH_BOX(&augment_images));
}

}  // namespace fastbandit
