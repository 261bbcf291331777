// fastbandit::pack_sign and unpack_sign on the CPU.
#include "cpu/binary_tensor.h"
#include "cpu/walk.h"
#include "dispatch.h"
#include "pgd_checks.h"

namespace fastbandit::cpu {
namespace {

SignMap map_of(const Tensor& x, const Tensor& bits) {
  SignMap map;
  map.type = real_of(x.scalar_type());
  map.values = const_cast<void*>(x.const_data_ptr());
  map.n = x.size(0), map.c = x.size(1), map.h = x.size(2), map.w = x.size(3);
  map.stride_n = x.stride(0), map.stride_c = x.stride(1);
  map.stride_h = x.stride(2), map.stride_w = x.stride(3);
  map.bits = sign_words_of(bits);
  // Short rows of planes are one long row.
  if (map.stride_c != 1 && map.w < 64 && map.stride_h == map.w * map.stride_w) {
    map.w *= map.h;
    map.h = 1;
  }
  return map;
}

template <class Run>
void for_map_rows(const SignMap& map, const Run& run) {
  const int64_t row = std::max<int64_t>(1, map.w * map.c);
  parallel(map.n * map.h, std::max<int64_t>(1, 2 * kGrain / row), run);
}

// The thresholds in the type that they are compared in.
template <class C>
const void* thresholds_in(const Tensor& threshold, std::vector<double>& memory) {
  memory.resize(static_cast<size_t>(threshold.size(0)));
  C* const to = reinterpret_cast<C*>(memory.data());
  dispatch_floating("pack_sign", "threshold", threshold.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* const from = static_cast<const T*>(threshold.const_data_ptr());
    for (int64_t i = 0; i < threshold.size(0); ++i)
      to[i] = static_cast<C>(to_compute(from[i * threshold.stride(0)]));
  });
  return to;
}

Tensor pack_sign(Tensor x, std::optional<Tensor> threshold) {
  constexpr const char* op = "pack_sign";
  check_sign_map(op, x, threshold);
  const int64_t sizes[4] = {x.size(0), x.size(2), x.size(3), words_of(x.size(1))};
  Tensor bits = empty_contiguous(x, sizes, 4, ScalarType::Long);
  if (bits.numel() == 0) return bits;
  SignMap map = map_of(x, bits);
  std::vector<double> memory;
  if (threshold)
    map.threshold = map.type == Real::kFloat64 ? thresholds_in<double>(*threshold, memory)
                                               : thresholds_in<float>(*threshold, memory);
  const SignKernels& sign = kernels<SignKernels>();
  for_map_rows(map, [&](int64_t begin, int64_t end) { sign.pack(map, begin, end); });
  return bits;
}

Tensor unpack_sign(Tensor bits, int64_t channels, ScalarType dtype,
                   torch::headeronly::MemoryFormat memory_format) {
  constexpr const char* op = "unpack_sign";
  check_sign_bits(op, bits, channels);
  FB_CHECK(is_floating(dtype), op, "dtype: expected float32, float64, bfloat16 or float16, got ",
           dtype_name(dtype));
  const int64_t sizes[4] = {bits.size(0), channels, bits.size(1), bits.size(2)};
  check_elements(op, "bits", {sizes[0], sizes[1], sizes[2], sizes[3]});
  int64_t strides[4];
  format_strides(sizes, is_channels_last(op, memory_format), strides);
  Tensor x = empty_strided(bits, sizes, strides, 4, dtype);
  if (x.numel() == 0) return x;
  const Tensor source = dense(bits);
  const SignMap map = map_of(x, source);
  const SignKernels& sign = kernels<SignKernels>();
  for_map_rows(map, [&](int64_t begin, int64_t end) { sign.unpack(map, begin, end); });
  return x;
}

}  // namespace
}  // namespace fastbandit::cpu

STABLE_TORCH_LIBRARY_IMPL(fastbandit, CPU, library) {
  library.impl("pack_sign", TORCH_BOX(&fastbandit::cpu::pack_sign));
  library.impl("unpack_sign", TORCH_BOX(&fastbandit::cpu::unpack_sign));
}
