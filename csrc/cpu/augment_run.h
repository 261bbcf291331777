// One image of a batch out of a set of bytes: the ops that make batches share it.
#pragma once

#include <vector>

#include "augment_checks.h"
#include "math/augment.h"
#include "math/pgd.h"

namespace fastbandit {

// The arguments are checked; the tensors outlive this. T: dtype of the batch.
template <class T>
class AugmentedBatch {
 public:
  AugmentedBatch(const Tensor& images, const Tensor& ids, const std::optional<Tensor>& draws,
                 const std::optional<Tensor>& fill, int64_t crop_padding, bool flip,
                 int64_t cutout_length, const int64_t (&out_strides)[4])
      : channels_(images.size(1)), height_(images.size(2)), width_(images.size(3)),
        source_(static_cast<const uint8_t*>(images.const_data_ptr())),
        ids_(static_cast<const int64_t*>(ids.const_data_ptr())), id_stride_(ids.stride(0)),
        draws_(draws ? static_cast<const int64_t*>(draws->const_data_ptr()) : nullptr),
        draw_row_(draws ? draws->stride(0) : 0), draw_step_(draws ? draws->stride(1) : 0),
        crop_padding_(crop_padding), flip_(flip), cutout_length_(cutout_length),
        colour_(static_cast<size_t>(channels_), round_to_nearest<T>(compute_t<T>(0))) {
    using C = compute_t<T>;
    for (int d = 0; d < 4; ++d) {
      in_[d] = images.stride(d);
      out_[d] = out_strides[d];
    }
    // Every byte has one result, so a table of 256 saves the division.
    for (int v = 0; v < 256; ++v)
      table_[v] = round_to_nearest<T>(image_value<C>(static_cast<uint8_t>(v)));
    if (fill) {
      const float* const values = static_cast<const float*>(fill->const_data_ptr());
      for (int64_t c = 0; c < channels_; ++c)
        colour_[static_cast<size_t>(c)] =
            round_to_nearest<T>(static_cast<C>(values[c * fill->stride(0)]));
    }
  }

  int64_t id(int64_t n) const { return ids_[n * id_stride_]; }

  // Writes image n of the batch, whose first element is *target.
  void write(int64_t n, T* target) const {
    const uint8_t* const source = source_ + id(n) * in_[0];
    const Augmentation change =
        augmentation(draws_ != nullptr ? draws_ + id(n) * draw_row_ : nullptr, draw_step_,
                     crop_padding_, flip_, cutout_length_);
    const bool inner_channels = out_[1] == 1 && channels_ > 1;  // channels-last
    for (int64_t h = 0; h < height_; ++h) {
      const int64_t row = change.source_row(h);
      const bool row_inside = row >= 0 && row < height_;
      const uint8_t* const from = source + (row_inside ? row : 0) * in_[2];
      T* const to = target + h * out_[2];
      const auto pixel = [&](int64_t c, int64_t w) {
        const int64_t column = change.source_column(w, width_);
        const bool inside = row_inside && column >= 0 && column < width_;
        const uint8_t value = inside ? from[c * in_[1] + column * in_[3]] : 0;
        to[c * out_[1] + w * out_[3]] =
            change.painted(h, w) ? colour_[static_cast<size_t>(c)] : table_[value];
      };
      if (inner_channels) {
        for (int64_t w = 0; w < width_; ++w)
          for (int64_t c = 0; c < channels_; ++c) pixel(c, w);
      } else {
        for (int64_t c = 0; c < channels_; ++c)
          for (int64_t w = 0; w < width_; ++w) pixel(c, w);
      }
    }
  }

 private:
  int64_t channels_, height_, width_;
  int64_t in_[4], out_[4];  // strides
  const uint8_t* source_;
  const int64_t* ids_;
  int64_t id_stride_;
  const int64_t* draws_;
  int64_t draw_row_, draw_step_;
  int64_t crop_padding_;
  bool flip_;
  int64_t cutout_length_;
  T table_[256];
  std::vector<T> colour_;
};

// An id outside the set is an error here; a GPU cannot look without waiting.
inline void check_ids(const char* op, const Tensor& ids, int64_t total) {
  const int64_t* const data = static_cast<const int64_t*>(ids.const_data_ptr());
  for (int64_t n = 0; n < ids.size(0); ++n) {
    const int64_t id = data[n * ids.stride(0)];
    FB_CHECK(id >= 0 && id < total, op, "ids: expected 0 to ", total - 1, ", got ", id);
  }
}

}  // namespace fastbandit
