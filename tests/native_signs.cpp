// Kernels of packed signs on random problems against plain loops; see test_native_signs.py. Each buffer
// is an allocation of its size, so that the address sanitizer sees what is read beside it.
#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/binary_problem.h"

using namespace fastbandit::cpu;

namespace {

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count, int junk = 0xab) {
    const size_t bytes = static_cast<size_t>(std::max<int64_t>(1, count)) * sizeof(T);
    if (posix_memalign(&data_, 64, bytes) != 0) std::abort();
    std::memset(data_, junk, bytes);
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() { return static_cast<T*>(data_); }

 private:
  void* data_ = nullptr;
};

std::mt19937_64 generator;

int64_t pick(int64_t least, int64_t most) {
  return least + static_cast<int64_t>(generator() % static_cast<uint64_t>(most - least + 1));
}

int64_t channels_of_a_problem() {
  constexpr int64_t usual[] = {16, 32, 64, 65, 96, 128, 256};
  return pick(0, 1) ? pick(1, 200) : usual[pick(0, 6)];
}

bool fits(SignConv& p) {
  const int64_t height = p.h + 2 * p.pad_h - p.dilation_h * (p.kernel_h - 1) - 1;
  const int64_t width = p.w + 2 * p.pad_w - p.dilation_w * (p.kernel_w - 1) - 1;
  if (height < 0 || width < 0) return false;
  p.oh = height / p.stride_h + 1, p.ow = width / p.stride_w + 1;
  return true;
}

SignConv random_problem(bool depthwise) {
  SignConv p;
  do {
    p = SignConv{};
    p.n = pick(1, 3), p.channels = channels_of_a_problem(), p.words = sign_words(p.channels);
    p.filters = depthwise ? p.channels : pick(1, 140);
    p.h = pick(1, 14), p.w = pick(0, 9) == 0 ? pick(60, 140) : pick(1, 14);
    p.kernel_h = pick(1, 5), p.kernel_w = pick(0, 1) ? p.kernel_h : pick(1, 5);
    if (depthwise && pick(0, 1)) p.kernel_h = p.kernel_w = pick(0, 1) ? 3 : 5;
    p.stride_h = pick(1, 3), p.stride_w = pick(0, 1) ? 1 : pick(1, 3);
    p.dilation_h = pick(1, 3), p.dilation_w = pick(0, 1) ? 1 : pick(1, 3);
    p.pad_h = pick(0, p.kernel_h * p.dilation_h), p.pad_w = pick(0, p.kernel_w * p.dilation_w);
    p.plus_one = pick(0, 3) == 0;
  } while (!fits(p));
  return p;
}

// By its definition.
int64_t sum_at(const SignConv& p, bool depthwise, int64_t pixel, int64_t filter) {
  const int64_t image = pixel / (p.oh * p.ow), y = pixel / p.ow % p.oh, x = pixel % p.ow;
  int64_t sum = 0;
  for (int64_t i = 0; i < p.kernel_h; ++i)
    for (int64_t j = 0; j < p.kernel_w; ++j) {
      const int64_t row = y * p.stride_h - p.pad_h + i * p.dilation_h;
      const int64_t column = x * p.stride_w - p.pad_w + j * p.dilation_w;
      const bool lies = row >= 0 && row < p.h && column >= 0 && column < p.w;
      if (!lies && !p.plus_one) continue;
      const uint64_t* const bits = p.bits + ((image * p.h + row) * p.w + column) * p.words;
      const uint64_t* const weight =
          p.weight + ((depthwise ? 0 : filter) * p.taps() + i * p.kernel_w + j) * p.words;
      const int64_t first = depthwise ? filter : 0;
      for (int64_t c = first; c < (depthwise ? filter + 1 : p.channels); ++c) {
        const uint64_t one = lies ? bits[c / 64] >> c % 64 & 1 : 1;
        sum += one == (weight[c / 64] >> c % 64 & 1) ? 1 : -1;
      }
    }
  return sum;
}

void run(const SignWork& work, const SignConv& p) {
  Buffer<uint8_t> prepared(work.prepared_bytes(p)), scratch(work.scratch_bytes(p), pick(0, 255));
  work.prepare(p, prepared);
  const int64_t items = work.items(p), half = items / 2;
  work.run(p, prepared, scratch, half, items);
  work.run(p, prepared, scratch, 0, half);
}

bool check(const SignWork& work, SignConv p, bool depthwise) {
  const int64_t words = sign_words(p.filters);
  Buffer<float> scale(p.filters), bias(p.filters), y(p.pixels() * p.filters);
  Buffer<int32_t> threshold(p.filters);
  Buffer<int16_t> below(p.filters);
  Buffer<uint64_t> flips(words), z(p.pixels() * words);
  for (int64_t f = 0; f < p.filters; ++f) {
    scale[f] = 0.5f, bias[f] = static_cast<float>(f);
    threshold[f] = static_cast<int32_t>(pick(-20, 20));
    below[f] = static_cast<int16_t>(threshold[f] - 1);
  }
  for (int64_t i = 0; i < words; ++i) flips[i] = generator();
  SignConv q = p;
  p.result.values = y, p.result.scale = scale, p.result.bias = bias;
  q.result.bits = z, q.result.threshold = threshold, q.result.flips = flips;
  q.result.below = below;
  run(work, p);
  run(work, q);
  for (int i = 0; i < 60; ++i) {
    const int64_t filter = pick(0, p.filters - 1), pixel = pick(0, p.pixels() - 1);
    const int64_t sum = sum_at(p, depthwise, pixel, filter);
    const auto bit = [&](uint64_t* from, int64_t word) {
      return from[word + filter / 64] >> filter % 64 & 1;
    };
    const bool reached = (sum >= threshold[filter]) != (bit(flips, 0) != 0);
    if (y[pixel * p.filters + filter] == 0.5f * static_cast<float>(sum) + bias[filter] &&
        bit(z, pixel * words) == static_cast<uint64_t>(reached))
      continue;
    std::printf("wrong at pixel %" PRId64 ", filter %" PRId64 "\n", pixel, filter);
    return false;
  }
  return true;
}

}  // namespace

int main(int, char** arguments) {
  const SignKernels& kernels = kernels_for<SignKernels, fastbandit::Isa::FB_ISA>();
  generator.seed(std::strtoull(arguments[1], nullptr, 10));
  const int problems = std::atoi(arguments[2]);
  for (int at = 0; at < problems; ++at) {
    const bool depthwise = pick(0, 3) == 0;
    SignConv p = random_problem(depthwise);
    const int64_t taps = p.taps() * p.words;
    Buffer<uint64_t> bits(p.n * p.h * p.w * p.words), weight((depthwise ? 1 : p.filters) * taps);
    for (int64_t i = 0; i < p.n * p.h * p.w * p.words; ++i) bits[i] = generator();
    for (int64_t i = 0; i < (depthwise ? 1 : p.filters) * taps; ++i) weight[i] = generator();
    p.bits = bits, p.weight = weight;
    std::vector<const SignWork*> works{depthwise ? &kernels.depthwise : &kernels.count};
    if (!depthwise && kernels.table.run != nullptr) works.push_back(&kernels.table);
    for (const SignWork* work : works)
      if (!check(*work, p, depthwise)) {
        std::printf("problem %d: depthwise %d, %" PRId64 " x %" PRId64 " x %" PRId64 " x %" PRId64
                    ", filters %" PRId64 ", taps %" PRId64 " x %" PRId64 "\n",
                    at, depthwise, p.n, p.channels, p.h, p.w, p.filters, p.kernel_h, p.kernel_w);
        return 1;
      }
  }
  std::printf("%d problems\n", problems);
  return 0;
}
