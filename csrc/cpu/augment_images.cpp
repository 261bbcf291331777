// fastbandit::augment_images on the CPU.
#include "augment_checks.h"
#include "cpu/walk.h"
#include "dispatch.h"
#include "math/augment.h"
#include "math/pgd.h"
#include "pgd_checks.h"

namespace fastbandit {
namespace {

constexpr const char* kOp = "augment_images";

struct Image {
  int64_t channels, height, width;
  int64_t in[4], out[4];  // strides
};

// Every byte has one result, so a table of 256 saves the division.
template <class T>
void augment_image(const Image& shape, const uint8_t* source, const Augmentation& change,
                   const T* table, const T* fill, T* target) {
  const int64_t inner_pixels = shape.out[1] == 1 && shape.channels > 1;  // channels-last
  for (int64_t h = 0; h < shape.height; ++h) {
    const int64_t row = change.source_row(h);
    const bool row_inside = row >= 0 && row < shape.height;
    const uint8_t* const from = source + (row_inside ? row : 0) * shape.in[2];
    T* const to = target + h * shape.out[2];
    const auto pixel = [&](int64_t c, int64_t w) {
      const int64_t column = change.source_column(w, shape.width);
      const bool inside = row_inside && column >= 0 && column < shape.width;
      const uint8_t value = inside ? from[c * shape.in[1] + column * shape.in[3]] : 0;
      to[c * shape.out[1] + w * shape.out[3]] = change.painted(h, w) ? fill[c] : table[value];
    };
    if (inner_pixels) {
      for (int64_t w = 0; w < shape.width; ++w)
        for (int64_t c = 0; c < shape.channels; ++c) pixel(c, w);
    } else {
      for (int64_t c = 0; c < shape.channels; ++c)
        for (int64_t w = 0; w < shape.width; ++w) pixel(c, w);
    }
  }
}

Tensor augment_images(Tensor images, Tensor ids, std::optional<Tensor> draws,
                      std::optional<Tensor> fill, int64_t crop_padding, bool flip,
                      int64_t cutout_length, ScalarType out_dtype,
                      torch::headeronly::MemoryFormat memory_format) {
  check_augment(kOp, images, ids, draws, fill, crop_padding, flip, cutout_length, out_dtype);
  const int64_t count = ids.size(0), total = images.size(0);
  Image shape = {images.size(1), images.size(2), images.size(3), {}, {}};
  const int64_t sizes[4] = {count, shape.channels, shape.height, shape.width};
  format_strides(sizes, is_channels_last(kOp, memory_format), shape.out);
  for (int d = 0; d < 4; ++d) shape.in[d] = images.stride(d);
  const int64_t* const id_data = static_cast<const int64_t*>(ids.const_data_ptr());
  const int64_t id_stride = ids.stride(0);
  for (int64_t n = 0; n < count; ++n) {
    const int64_t id = id_data[n * id_stride];
    FB_CHECK(id >= 0 && id < total, kOp, "ids: expected 0 to ", total - 1, ", got ", id);
  }
  Tensor out = empty_strided(images, sizes, shape.out, 4, out_dtype);
  if (count == 0) return out;
  const uint8_t* const source = static_cast<const uint8_t*>(images.const_data_ptr());
  const int64_t* const draw_data =
      draws ? static_cast<const int64_t*>(draws->const_data_ptr()) : nullptr;
  const int64_t draw_row = draws ? draws->stride(0) : 0, draw_step = draws ? draws->stride(1) : 0;

  dispatch_floating(kOp, "out_dtype", out_dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = compute_t<T>;
    T table[256];
    for (int v = 0; v < 256; ++v)
      table[v] = round_to_nearest<T>(image_value<C>(static_cast<uint8_t>(v)));
    std::vector<T> colour(static_cast<size_t>(shape.channels), round_to_nearest<T>(C(0)));
    if (fill) {
      const float* const values = static_cast<const float*>(fill->const_data_ptr());
      for (int64_t c = 0; c < shape.channels; ++c)
        colour[static_cast<size_t>(c)] =
            round_to_nearest<T>(static_cast<C>(values[c * fill->stride(0)]));
    }
    T* const target = static_cast<T*>(out.mutable_data_ptr());
    const int64_t elements = shape.channels * shape.height * shape.width;
    parallel(count, std::max<int64_t>(1, kGrain / elements), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const int64_t id = id_data[n * id_stride];
        const Augmentation change =
            augmentation(draw_data ? draw_data + id * draw_row : nullptr, draw_step, crop_padding,
                         flip, cutout_length);
        augment_image(shape, source + id * shape.in[0], change, table, colour.data(),
                      target + n * shape.out[0]);
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastbandit, CPU, library) {
  library.impl("augment_images", TORCH_BOX(&augment_images));
}

}  // namespace fastbandit
