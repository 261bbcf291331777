// fastbandit::conv_block and its backward on the CPU: ReLU, perhaps a depthwise convolution, a 1x1
// convolution and batch norm (or a bias), for float32 in channels-last.
//
// Pixels are worked through in tiles that stay in the cache, so that what lies between two parts is
// not written to memory and read again: the ReLU, the maps that are put side by side, and in
// backward the gradient between batch norm and 1x1 convolution. How pixels are cut into blocks and
// chunks depends on the sizes alone: the same bits for every number of threads.
#include "cpu/depthwise_conv2d.h"
#include "cpu/norm.h"
#include "cpu/pointwise_problem.h"

namespace fastbandit::cpu {
namespace {

using namespace norm;

constexpr int64_t kTileFloats = 8192;       // of the input of a tile: 32 KiB, the first cache
constexpr int64_t kThreadProducts = 1 << 19;  // below this many a second thread does not pay
constexpr int64_t kMostChunks = 32;         // partial sums of the weight gradient
constexpr int64_t kMostPartial = 1 << 20;   // floats of them
constexpr int64_t kChunkPixels = 512;       // fewer cost less than to clear and to add their sums

// What both directions know of the problem.
struct Block {
  const char* op;
  std::vector<Tensor> xs;
  std::optional<Tensor> depthwise;
  Pair stride, padding, dilation;
  int64_t n, oh, ow;     // of the output
  int64_t inner, outer;  // channels into and out of the 1x1 convolution
  const PointwiseKernels& kernels = cpu::kernels<PointwiseKernels>();

  Block(const char* op, std::vector<Tensor> tensors, std::optional<Tensor> taps,
        const Tensor& pointwise, int64_t s, int64_t p, int64_t d)
      : op(op), xs(std::move(tensors)), depthwise(std::move(taps)), stride{s, s}, padding{p, p},
        dilation{d, d} {
    FB_CHECK(!xs.empty(), op, "xs: expected at least one tensor, got none");
    inner = 0;
    for (const Tensor& x : xs) {
      check_dtype(op, "xs", x, ScalarType::Float);
      FB_CHECK(x.dim() == 4 && x.size(1) > 0 && is_dense_channels_last(x), op,
               "xs: expected dense channels-last tensors [N, C, H, W], got shape ", shape_text(x));
      FB_CHECK(x.size(0) == xs[0].size(0) && x.size(2) == xs[0].size(2) &&
                   x.size(3) == xs[0].size(3),
               op, "xs: expected maps of one size, got ", shape_text(xs[0]), " and ",
               shape_text(x));
      inner += x.size(1);
    }
    n = xs[0].size(0), oh = xs[0].size(2), ow = xs[0].size(3);
    if (depthwise) {
      FB_CHECK(xs.size() == 1, op, "xs: expected one tensor before a depthwise convolution, got ",
               xs.size());
      const ConvShape shape = depthwise_shape(op, xs[0], *depthwise, stride, padding, dilation);
      oh = shape.oh, ow = shape.ow;
    } else {
      FB_CHECK(s == 1 && p == 0, op,
               "stride, padding: expected 1 and 0 without a depthwise convolution, got ", s, " and ",
               p);
    }
    check_dtype(op, "pointwise", pointwise, ScalarType::Float);
    FB_CHECK(pointwise.dim() == 4 && pointwise.size(0) > 0 && pointwise.size(1) == inner &&
                 pointwise.size(2) == 1 && pointwise.size(3) == 1,
             op, "pointwise: expected [C_out, ", inner, ", 1, 1], got ", shape_text(pointwise));
    outer = pointwise.size(0);
  }

  int64_t padded(int64_t columns) const {
    return (columns + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
  }
  int64_t tile() const {
    return std::max<int64_t>(24, std::min<int64_t>(96, kTileFloats / inner / 24 * 24));
  }
  int64_t grain(const Shape& shape) const {
    return std::max<int64_t>(
        1, kThreadProducts / (shape.block_pixels * inner * outer + 1));
  }
  Tensor output(int64_t channels) const {
    const int64_t sizes[4] = {n, channels, oh, ow};
    const int64_t strides[4] = {oh * ow * channels, 1, ow * channels, channels};
    return empty_strided(xs[0], sizes, strides, 4, ScalarType::Float);
  }
  Tensor vector(int64_t length) const {
    return empty_contiguous(xs[0], &length, 1, ScalarType::Float);
  }
  void check_output(const char* name, const Tensor& tensor) const {
    check_dtype(op, name, tensor, ScalarType::Float);
    FB_CHECK(tensor.dim() == 4 && tensor.size(0) == n && tensor.size(1) == outer &&
                 tensor.size(2) == oh && tensor.size(3) == ow,
             op, name, ": expected the shape of the output [", n, ", ", outer, ", ", oh, ", ", ow,
             "], got ", shape_text(tensor));
  }
  void check_vector(const char* name, const std::optional<Tensor>& tensor) const {
    if (!tensor) return;
    check_dtype(op, name, *tensor, ScalarType::Float);
    FB_CHECK(tensor->dim() == 1 && tensor->size(0) == outer && tensor->stride(0) == 1, op, name,
             ": expected one value for each of ", outer, " channels, got shape ",
             shape_text(*tensor));
  }
  // The sources of the 1x1 convolution; grads[i], if there are any, belongs to xs[i].
  std::vector<Source> sources(const std::vector<Tensor>& grads) const {
    std::vector<Source> result;
    for (size_t i = 0; i < xs.size(); ++i)
      result.push_back({floats(xs[i]), grads.empty() ? nullptr : floats_to_write(grads[i]),
                        xs[i].size(1)});
    return result;
  }
};

// float32 values of one thread; kept, so that a training loop allocates nothing. 3 is that of the
// thread that calls, which the others read.
float* scratch(int which, int64_t count) {
  static thread_local std::vector<float> buffers[4];
  auto& buffer = buffers[which];
  if (static_cast<int64_t>(buffer.size()) < count) buffer.resize(static_cast<size_t>(count));
  return buffer.data();
}

// f(first pixel, end) for the tiles of a block of pixels.
template <class F>
void for_tiles(const Shape& shape, int64_t block, int64_t tile, const F& f) {
  for (int64_t p = shape.begin(block); p < shape.end(block); p += tile)
    f(p, std::min(p + tile, shape.end(block)));
}

// y, then d (the output of the depthwise convolution) if there is one, then, if normalize, z (the
// output of the 1x1 convolution), mean and inverse deviation. If deferred, z in place of y, and not
// again: the batch norm is left to norm_sum.
std::vector<Tensor> conv_block(std::vector<Tensor> xs, std::optional<Tensor> depthwise,
                               Tensor pointwise, std::optional<Tensor> weight,
                               std::optional<Tensor> bias, int64_t stride, int64_t padding,
                               int64_t dilation, bool normalize, double eps, bool deferred) {
  const Block block("conv_block", std::move(xs), std::move(depthwise), pointwise, stride, padding,
                    dilation);
  block.check_vector("weight", weight);
  block.check_vector("bias", bias);
  FB_CHECK(normalize || !weight, block.op, "weight: expected none without a batch norm");
  const int64_t pixels = block.n * block.oh * block.ow, inner = block.inner, outer = block.outer;
  FB_CHECK(!deferred || (normalize && !weight && !bias), block.op,
           "deferred: expected a batch norm whose weight and bias are left out");
  FB_CHECK(!normalize || pixels > 1, block.op,
           "xs: expected more than one value for each channel, got ", pixels);
  const PointwiseKernels& kernels = block.kernels;
  std::vector<Tensor> results{block.output(outer)};
  const float* middle_map = nullptr;  // what the 1x1 convolution reads, if not the sources
  if (block.depthwise) {
    results.push_back(depthwise_conv2d(block.xs[0], *block.depthwise, block.stride, block.padding,
                                       block.dilation, true));
    middle_map = floats(results.back());
  }
  if (pixels == 0) return results;
  Tensor z = normalize && !deferred ? block.output(outer) : results[0];
  float* const out = floats_to_write(z);
  const Shape shape(outer, pixels);

  const int64_t width = block.padded(outer);
  float* const matrix = scratch(3, (inner + 1) * width);
  kernels.pack(inner, outer, floats(pointwise), pointwise.stride(1), pointwise.stride(0), matrix);
  const float* added = nullptr;
  if (bias && !normalize) {
    kernels.pack(1, outer, floats(bias), 0, 1, matrix + inner * width);
    added = matrix + inner * width;
  }
  const auto sources = block.sources({});
  const int64_t tile = block.tile();
  const auto run = [&](int64_t begin, int64_t end) {
    const float* a = middle_map;
    if (a != nullptr) {
      a += begin * inner;
    } else {
      float* const gathered = scratch(0, tile * inner);
      kernels.gather_relu(begin, end, sources.data(), static_cast<int64_t>(sources.size()),
                          gathered, inner);
      a = gathered;
    }
    kernels.multiply(end - begin, inner, outer, a, inner, matrix, added, out + begin * outer,
                     outer);
  };
  if (!normalize) {
    parallel(shape.blocks, block.grain(shape), [&](int64_t from, int64_t to) {
      for (int64_t b = from; b < to; ++b) for_tiles(shape, b, tile, run);
    });
    return results;
  }
  // About the first value: a mean that is large beside the deviation costs no digits.
  run(0, 1);
  const std::vector<float> centre = repeated(shape, out);
  std::vector<double> parts(static_cast<size_t>(2 * outer * shape.blocks));
  parallel(shape.blocks, block.grain(shape), [&](int64_t from, int64_t to) {
    float* const sums = scratch(1, 2 * shape.width);
    for (int64_t b = from; b < to; ++b) {
      for_tiles(shape, b, tile, run);
      block_sums<false>(shape, {out, centre.data(), nullptr}, b, sums,
                        parts.data() + 2 * outer * b);
    }
  });
  Tensor mean = block.vector(outer), inverse = block.vector(outer);
  statistics(shape, total_of(shape, parts), centre.data(), eps, floats_to_write(mean),
             floats_to_write(inverse));
  if (deferred) {
    results.insert(results.end(), {mean, inverse});
    return results;
  }
  const ForwardNorm transform(shape, floats(mean), floats(inverse), floats(weight), floats(bias));
  transform.run(shape, out, floats_to_write(results[0]));
  results.insert(results.end(), {z, mean, inverse});
  return results;
}

// If input: the gradient of each of xs. If weights: those of pointwise, of depthwise if there is
// one, of weight if a batch norm follows, and of bias (the last two whether they were given or not,
// but without a batch norm only if `added`).
std::vector<Tensor> conv_block_backward(Tensor grad, std::vector<Tensor> xs,
                                        std::optional<Tensor> depthwise, Tensor pointwise,
                                        std::optional<Tensor> weight, std::optional<Tensor> d,
                                        std::optional<Tensor> z, std::optional<Tensor> mean,
                                        std::optional<Tensor> inverse, int64_t stride,
                                        int64_t padding, int64_t dilation, bool input,
                                        bool weights, bool added) {
  constexpr const char* kOp = "conv_block_backward";
  for (Tensor& x : xs) x = dense_channels_last(kOp, "xs", x);
  if (d) d = dense_channels_last(kOp, "d", *d);
  if (z) z = dense_channels_last(kOp, "z", *z);
  const Block block(kOp, std::move(xs), std::move(depthwise), pointwise, stride, padding,
                    dilation);
  const bool normalize = z.has_value();
  block.check_output("grad", grad);
  if (normalize) {
    block.check_output("z", *z);
    FB_CHECK(mean && inverse, block.op, "mean, inverse: expected what conv_block returned");
    block.check_vector("mean", mean);
    block.check_vector("inverse", inverse);
    block.check_vector("weight", weight);
  }
  const int64_t pixels = block.n * block.oh * block.ow, inner = block.inner, outer = block.outer;
  const PointwiseKernels& kernels = block.kernels;
  if (block.depthwise) {
    FB_CHECK(d && d->size(0) == block.n && d->size(1) == inner && d->size(2) == block.oh &&
                 d->size(3) == block.ow,
             block.op, "d: expected what conv_block returned");
    check_dtype(block.op, "d", *d, ScalarType::Float);
  }

  std::vector<Tensor> grads;  // of xs, or of d
  if (block.depthwise) {
    grads.push_back(empty_like(*d, ScalarType::Float));
  } else if (input) {
    for (const Tensor& x : block.xs) grads.push_back(empty_like(x, ScalarType::Float));
  }
  Tensor by_weight = block.vector(outer), by_bias = block.vector(outer);
  const Shape shape(outer, std::max<int64_t>(1, pixels));
  std::optional<BackwardNorm> transform;
  Tensor dense = grad;
  if (pixels > 0) {
    dense = dense_channels_last(grad, [&] { return block.output(outer); });
    if (normalize) {
      transform.emplace(shape, gradient_sums(shape, floats(dense), floats(*z), floats(*mean)),
                        floats(*mean), floats(*inverse), floats(weight),
                        floats_to_write(by_weight), floats_to_write(by_bias));
    } else if (weights && added) {
      const std::vector<float> zeros(static_cast<size_t>(shape.width));
      const auto sums = channel_sums<true>(shape, {floats(dense), zeros.data(), floats(dense)});
      for (int64_t i = 0; i < outer; ++i)
        floats_to_write(by_bias)[i] = static_cast<float>(sums[static_cast<size_t>(i)]);
    }
  }

  const float* const gradient = floats(dense);
  const float* const middle_map = block.depthwise ? floats(*d) : nullptr;
  const bool inward = block.depthwise ? (input || weights) : input;
  const int64_t width = block.padded(inner), tile = block.tile();
  float* const matrix = scratch(3, outer * width);
  kernels.pack(outer, inner, floats(pointwise), pointwise.stride(0), pointwise.stride(1), matrix);
  const auto sources = block.sources(block.depthwise ? std::vector<Tensor>{} : grads);
  const int64_t count = static_cast<int64_t>(sources.size());
  float* const by_map = block.depthwise ? floats_to_write(grads[0]) : nullptr;
  const int64_t chunks =
      std::max<int64_t>(1, std::min({shape.blocks, kMostChunks, pixels / kChunkPixels,
                                     kMostPartial / (outer * width)}));
  std::vector<float> partial(static_cast<size_t>(weights ? chunks * outer * width : 0));

  if (pixels > 0 && (inward || weights)) {
    const int64_t of_chunk = (shape.blocks + chunks - 1) / chunks;
    parallel(chunks, std::max<int64_t>(1, block.grain(shape) / of_chunk), [&](int64_t from,
                                                                             int64_t to) {
      const int64_t block_floats = shape.block_pixels * outer;
      float* const inner_grad = normalize ? scratch(0, block_floats) : nullptr;
      float* const gathered = scratch(1, tile * width);
      float* const tile_grad = scratch(2, tile * width);
      for (int64_t chunk = from; chunk < to; ++chunk) {
        const int64_t last = (chunk + 1) * shape.blocks / chunks;
        for (int64_t b = chunk * shape.blocks / chunks; b < last; ++b) {
          const int64_t first = shape.begin(b);
          const float* g = gradient + first * outer;
          if (normalize) {
            with_isa(FB_BODY {
              for_rows(shape, first, shape.end(b), [&](int64_t at, int64_t n) FB_INLINE_LAMBDA {
                transform->row(at, n, gradient, floats(*z), inner_grad + at - first * outer);
              });
            });
            g = inner_grad;
          }
          for_tiles(shape, b, tile, [&](int64_t p, int64_t end) {
            const float* const here = g + (p - first) * outer;
            if (weights) {
              const float* x = middle_map;
              if (x != nullptr) x += p * inner;
              if (x == nullptr) {
                kernels.gather_relu(p, end, sources.data(), count, gathered, width);
                x = gathered;
              } else if (width != inner) {  // rows of d are not padded
                for (int64_t i = 0; i < end - p; ++i)
                  std::memcpy(gathered + i * width, x + i * inner,
                              static_cast<size_t>(inner) * sizeof(float));
                x = gathered;
              }
              kernels.accumulate(end - p, outer, inner, here, outer, x, width,
                                 partial.data() + chunk * outer * width);
            }
            if (!inward) return;
            if (by_map != nullptr) {
              kernels.multiply(end - p, outer, inner, here, outer, matrix, nullptr,
                               by_map + p * inner, inner);
            } else {
              kernels.multiply(end - p, outer, width, here, outer, matrix, nullptr, tile_grad,
                               width);
              kernels.scatter_masked(p, end, sources.data(), count, tile_grad, width);
            }
          });
        }
      }
    });
  }

  std::vector<Tensor> results;
  if (input) {
    if (block.depthwise)
      results.push_back(depthwise_conv2d_backward_input(grads[0], block.xs[0], *block.depthwise,
                                                        block.stride, block.padding,
                                                        block.dilation, true));
    else
      results = grads;
  }
  if (!weights) return results;
  const int64_t sizes[4] = {outer, inner, 1, 1};
  Tensor by_pointwise = empty_contiguous(block.xs[0], sizes, 4, ScalarType::Float);
  float* const product = floats_to_write(by_pointwise);
  const float* const sums = partial.data();
  for (int64_t m = 0; m < outer; ++m) {
    float* const row = product + m * inner;
    std::copy_n(sums + m * width, inner, row);
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const float* const more = sums + (chunk * outer + m) * width;
#pragma GCC ivdep
      for (int64_t k = 0; k < inner; ++k) row[k] += more[k];
    }
  }
  results.push_back(by_pointwise);
  if (block.depthwise)
    results.push_back(depthwise_conv2d_backward_weight(grads[0], block.xs[0], *block.depthwise,
                                                       block.stride, block.padding,
                                                       block.dilation, true));
  if (pixels == 0) {
    torch::stable::zero_(by_weight);
    torch::stable::zero_(by_bias);
  }
  if (normalize) results.push_back(by_weight);
  if (normalize || added) results.push_back(by_bias);
  return results;
}

}  // namespace
}  // namespace fastbandit::cpu

STABLE_TORCH_LIBRARY_IMPL(fastbandit, CPU, library) {
  library.impl("conv_block", TORCH_BOX(&fastbandit::cpu::conv_block));
  library.impl("conv_block_backward", TORCH_BOX(&fastbandit::cpu::conv_block_backward));
}
