// fastbandit::binary_conv2d, binary_conv2d_bits and binary_sep_conv2d on the CPU.
#include "cpu/binary_tensor.h"
#include "cpu/walk.h"
#include "dispatch.h"

namespace fastbandit::cpu {
namespace {

// Products, and words of a depthwise convolution, below which a second thread does not pay.
constexpr int64_t kGrainProducts = int64_t{1} << 23;
constexpr int64_t kGrainWords = int64_t{1} << 17;

SignConv problem_of(const SignShape& s, const Tensor& bits, const Tensor& weight_bits,
                    int64_t channels, bool plus_one) {
  SignConv p;
  p.n = s.conv.n, p.h = s.conv.h, p.w = s.conv.w, p.oh = s.conv.oh, p.ow = s.conv.ow;
  p.channels = channels, p.words = words_of(channels), p.filters = s.conv.c;
  p.kernel_h = s.conv.kernel_h, p.kernel_w = s.conv.kernel_w;
  p.stride_h = s.conv.stride_h, p.stride_w = s.conv.stride_w;
  p.pad_h = s.conv.pad_h, p.pad_w = s.conv.pad_w;
  p.dilation_h = s.conv.dilation_h, p.dilation_w = s.conv.dilation_w;
  p.plus_one = plus_one;
  p.bits = sign_words_of(bits), p.weight = sign_words_of(weight_bits);
  return p;
}

void run(const SignConv& p, bool depthwise) {
  const SignKernels& sign = kernels<SignKernels>();
  const int64_t taps = p.taps() * p.channels;
  const SignWork& work = depthwise                                      ? sign.depthwise
                         : sign.by_table && taps <= kMostTableTaps ? sign.table
                                                                        : sign.count;
  static thread_local Memory shared;
  void* const prepared = shared.get(work.prepared_bytes(p));
  work.prepare(p, prepared);
  const int64_t items = work.items(p), bytes = work.scratch_bytes(p);
  const int64_t all = depthwise ? p.pixels() * p.words * p.taps() : p.pixels() * p.filters * taps;
  const int64_t each = std::max<int64_t>(1, all / items);
  const int64_t grain = (depthwise ? kGrainWords : kGrainProducts) / each;
  parallel(items, std::max<int64_t>(1, grain), [&](int64_t begin, int64_t end) {
    static thread_local Memory own;
    work.run(p, prepared, own.get(bytes), begin, end);
  });
}

// The values of a filter vector in type C, `none` where there is no vector.
template <class C>
const C* filter_values(const char* op, const char* name, const std::optional<Tensor>& value,
                       int64_t filters, C none, std::vector<C>& memory) {
  memory.assign(static_cast<size_t>(filters), none);
  if (value) {
    const int64_t step = value->stride(0);
    dispatch_floating(op, name, value->scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      const T* const from = static_cast<const T*>(value->const_data_ptr());
      for (int64_t i = 0; i < filters; ++i)
        memory[static_cast<size_t>(i)] = static_cast<C>(to_compute(from[i * step]));
    });
  }
  return memory.data();
}

// Sums of `p` as `type`, scaled and shifted.
void run_scaled(const char* op, SignConv& p, bool depthwise, const std::optional<Tensor>& scale,
                const std::optional<Tensor>& bias, ScalarType type, Tensor& y) {
  p.result.type = real_of(type);
  p.result.values = y.mutable_data_ptr();
  const auto finish = [&](auto number) {
    using C = decltype(number);
    static thread_local std::vector<C> scales, biases;
    p.result.scale = filter_values<C>(op, "scale", scale, p.filters, C{1}, scales);
    p.result.bias = filter_values<C>(op, "bias", bias, p.filters, C{-0.0}, biases);
    run(p, depthwise);
  };
  if (type == ScalarType::Double)
    finish(double{});
  else
    finish(float{});
}

// Sums of `p` as bits in `y`.
void run_bits(SignConv& p, bool depthwise, const Tensor& threshold, const Tensor& flip,
              uint64_t* y) {
  static thread_local std::vector<int32_t> thresholds;
  static thread_local std::vector<int16_t> below;
  static thread_local std::vector<uint64_t> flips;
  const size_t count = static_cast<size_t>(p.filters);
  thresholds.resize(count);
  below.resize(count);
  flips.assign(static_cast<size_t>(words_of(p.filters)), 0);
  const auto read = [&](const auto* from) {
    const int64_t step = threshold.stride(0);
    for (size_t i = 0; i < count; ++i) {
      const int32_t value = from[static_cast<int64_t>(i) * step];
      thresholds[i] = value;
      below[i] = static_cast<int16_t>(
          std::min<int32_t>(std::max<int32_t>(value, -kMostShortTaps), kMostShortTaps + 1) - 1);
    }
  };
  if (threshold.scalar_type() == ScalarType::Short)
    read(static_cast<const int16_t*>(threshold.const_data_ptr()));
  else
    read(static_cast<const int32_t*>(threshold.const_data_ptr()));
  const bool* const turned = static_cast<const bool*>(flip.const_data_ptr());
  const int64_t step = flip.stride(0);
  for (size_t i = 0; i < count; ++i)
    flips[i / 64] |= static_cast<uint64_t>(turned[static_cast<int64_t>(i) * step]) << i % 64;
  p.result.bits = y;
  p.result.threshold = thresholds.data();
  p.result.flips = flips.data();
  if (p.taps() * (depthwise ? 1 : p.channels) <= kMostShortTaps) p.result.below = below.data();
  run(p, depthwise);
}

Tensor empty_map(const SignConv& p, const Tensor& like, ScalarType type) {
  const int64_t sizes[4] = {p.n, p.filters, p.oh, p.ow};
  const int64_t strides[4] = {p.oh * p.ow * p.filters, 1, p.ow * p.filters, p.filters};
  return empty_strided(like, sizes, strides, 4, type);
}

Tensor binary_conv2d(Tensor bits, Tensor weight_bits, int64_t channels, Pair stride, Pair padding,
                     Pair dilation, int64_t groups, bool plus_one, std::optional<Tensor> scale,
                     std::optional<Tensor> bias, ScalarType out_dtype) {
  constexpr const char* op = "binary_conv2d";
  const SignShape s =
      sign_conv_shape(op, bits, weight_bits, channels, stride, padding, dilation, groups);
  check_affine(op, scale, bias, out_dtype, s.conv.c, bits);
  const Tensor map = dense(bits), filters = dense(weight_bits);
  SignConv p = problem_of(s, map, filters, channels, plus_one);
  Tensor y = empty_map(p, bits, out_dtype);
  if (y.numel() != 0) run_scaled(op, p, s.depthwise, scale, bias, out_dtype, y);
  return y;
}

Tensor binary_conv2d_bits(Tensor bits, Tensor weight_bits, int64_t channels, Pair stride,
                          Pair padding, Pair dilation, int64_t groups, bool plus_one,
                          Tensor threshold, Tensor flip) {
  constexpr const char* op = "binary_conv2d_bits";
  const SignShape s =
      sign_conv_shape(op, bits, weight_bits, channels, stride, padding, dilation, groups);
  check_threshold(op, threshold, flip, s.conv.c, bits);
  const int64_t sizes[4] = {s.conv.n, s.conv.oh, s.conv.ow, words_of(s.conv.c)};
  Tensor y = empty_contiguous(bits, sizes, 4, ScalarType::Long);
  if (y.numel() == 0) return y;
  const Tensor map = dense(bits), filters = dense(weight_bits);
  SignConv p = problem_of(s, map, filters, channels, plus_one);
  run_bits(p, s.depthwise, threshold, flip, sign_words_of(y));
  return y;
}

// The two above one after the other; the map between them belongs to the thread.
Tensor binary_sep_conv2d(Tensor bits, Tensor depthwise_bits, Tensor threshold, Tensor flip,
                         Tensor pointwise_bits, std::optional<Tensor> scale,
                         std::optional<Tensor> bias, int64_t channels, int64_t stride,
                         int64_t padding, int64_t dilation, bool plus_one, ScalarType out_dtype) {
  constexpr const char* op = "binary_sep_conv2d";
  const SignShape first =
      sign_conv_shape(op, bits, depthwise_bits, channels, {stride, stride}, {padding, padding},
                      {dilation, dilation}, channels);
  // With one channel a dense filter would do, of which there may be several.
  FB_CHECK(depthwise_bits.size(0) == 1, op, "depthwise_bits: expected [1, k, k, ",
           words_of(channels), "], got ", shape_text(depthwise_bits));
  check_threshold(op, threshold, flip, channels, bits);
  check_dtype(op, "pointwise_bits", pointwise_bits, ScalarType::Long);
  check_same_device(op, "pointwise_bits", pointwise_bits, "bits", bits);
  FB_CHECK(pointwise_bits.dim() == 4 && pointwise_bits.size(0) >= 1 &&
               pointwise_bits.size(1) == 1 && pointwise_bits.size(2) == 1 &&
               pointwise_bits.size(3) == words_of(channels),
           op, "pointwise_bits: expected [C_out, 1, 1, ", words_of(channels), "], got ",
           shape_text(pointwise_bits));
  check_affine(op, scale, bias, out_dtype, pointwise_bits.size(0), bits);
  const Tensor map = dense(bits), depthwise = dense(depthwise_bits);
  const Tensor pointwise = dense(pointwise_bits);
  SignConv p = problem_of(first, map, depthwise, channels, plus_one);
  SignConv q;
  q.n = p.n, q.h = q.oh = p.oh, q.w = q.ow = p.ow;
  q.channels = channels, q.words = p.words, q.filters = pointwise.size(0);
  q.weight = sign_words_of(pointwise);
  Tensor y = empty_map(q, bits, out_dtype);
  if (y.numel() == 0) return y;
  static thread_local Memory between;
  uint64_t* const words = static_cast<uint64_t*>(between.get(p.pixels() * p.words * 8));
  run_bits(p, first.depthwise, threshold, flip, words);
  q.bits = words;
  run_scaled(op, q, false, scale, bias, out_dtype, y);
  return y;
}

// The overloads `short`, whose numbers are one: each argument of a call costs time.
struct Settings {
  int64_t channels, kernel_size;
  Pair stride, padding, dilation;
  bool depthwise, plus_one;
  ScalarType out_dtype = ScalarType::Float;

  explicit Settings(int64_t packed) {  // as in fastbandit/ops/binary_conv2d.py
    const auto next = [&](int width) {
      const int64_t value = packed & ((int64_t{1} << width) - 1);
      packed >>= width;
      return value;
    };
    channels = next(20), kernel_size = next(6);
    stride.assign(2, next(6));
    padding.assign(2, next(8));
    dilation.assign(2, next(6));
    depthwise = next(1) != 0, plus_one = next(1) != 0;
    constexpr ScalarType types[] = {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16,
                                    ScalarType::Half};
    out_dtype = types[next(2)];
  }

  int64_t groups() const { return depthwise ? channels : 1; }

  void check(const char* op, const Tensor& weight_bits) const {
    FB_CHECK(weight_bits.dim() == 4 && weight_bits.size(1) == kernel_size &&
                 weight_bits.size(2) == kernel_size,
             op, "weight_bits: expected filters of ", kernel_size, " x ", kernel_size, ", got ",
             shape_text(weight_bits));
  }
};

Tensor short_conv2d(Tensor bits, Tensor weight_bits, int64_t settings, std::optional<Tensor> scale,
                    std::optional<Tensor> bias) {
  const Settings s(settings);
  s.check("binary_conv2d", weight_bits);
  return binary_conv2d(bits, weight_bits, s.channels, s.stride, s.padding, s.dilation, s.groups(),
                       s.plus_one, scale, bias, s.out_dtype);
}

Tensor short_conv2d_bits(Tensor bits, Tensor weight_bits, int64_t settings, Tensor threshold,
                         Tensor flip) {
  const Settings s(settings);
  s.check("binary_conv2d_bits", weight_bits);
  return binary_conv2d_bits(bits, weight_bits, s.channels, s.stride, s.padding, s.dilation,
                            s.groups(), s.plus_one, threshold, flip);
}

Tensor short_sep_conv2d(Tensor bits, Tensor depthwise_bits, Tensor threshold, Tensor flip,
                        Tensor pointwise_bits, std::optional<Tensor> scale,
                        std::optional<Tensor> bias, int64_t settings) {
  const Settings s(settings);
  return binary_sep_conv2d(bits, depthwise_bits, threshold, flip, pointwise_bits, scale, bias,
                           s.channels, s.stride[0], s.padding[0], s.dilation[0], s.plus_one,
                           s.out_dtype);
}

}  // namespace
}  // namespace fastbandit::cpu

STABLE_TORCH_LIBRARY_IMPL(fastbandit, CPU, library) {
  library.impl("binary_conv2d", TORCH_BOX(&fastbandit::cpu::binary_conv2d));
  library.impl("binary_conv2d_bits", TORCH_BOX(&fastbandit::cpu::binary_conv2d_bits));
  library.impl("binary_sep_conv2d", TORCH_BOX(&fastbandit::cpu::binary_sep_conv2d));
  library.impl("binary_conv2d.short", TORCH_BOX(&fastbandit::cpu::short_conv2d));
  library.impl("binary_conv2d_bits.short", TORCH_BOX(&fastbandit::cpu::short_conv2d_bits));
  library.impl("binary_sep_conv2d.short", TORCH_BOX(&fastbandit::cpu::short_sep_conv2d));
}
