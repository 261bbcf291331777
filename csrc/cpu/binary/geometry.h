// Where the taps of an output pixel lie in the map.
#pragma once

#include "cpu/simd/simd.h"
#include "cpu/binary_problem.h"

namespace fastbandit::cpu::FB_ISA {

// The pixels [begin, end) of a block, all images in a row; blocks are nearly of one size.
struct SignBlocks {
  int64_t count, size, pixels;

  SignBlocks(const SignConv& p, int64_t most) : pixels(p.pixels()) {
    count = (pixels + most - 1) / most;
    size = count == 0 ? 0 : (pixels + count - 1) / count;
    count = size == 0 ? 0 : (pixels + size - 1) / size;
  }
  int64_t begin(int64_t block) const { return block * size; }
  int64_t end(int64_t block) const { return std::min(pixels, (block + 1) * size); }
};

// f(image, y, x, number in the block) for the output pixels [begin, end).
template <class F>
FB_INLINE void for_pixels(const SignConv& p, int64_t begin, int64_t end, const F& f) {
  int64_t image = begin / (p.oh * p.ow), rest = begin % (p.oh * p.ow);
  int64_t y = rest / p.ow, x = rest % p.ow;
  for (int64_t at = begin; at < end; ++at) {
    f(image, y, x, at - begin);
    if (++x == p.ow) {
      x = 0;
      if (++y == p.oh) y = 0, ++image;
    }
  }
}

// The taps along one side that lie in a map of `size`: [first, last).
FB_INLINE void inside_taps(int64_t start, int64_t taps, int64_t dilation, int64_t size,
                           int64_t& first, int64_t& last) {
  if (start >= 0 && start + (taps - 1) * dilation < size) {  // most pixels; divisions are slow
    first = 0, last = taps;
    return;
  }
  first = start >= 0 ? 0 : std::min(taps, (-start + dilation - 1) / dilation);
  last = start >= size ? first
                       : std::max(first, std::min(taps, (size - start + dilation - 1) / dilation));
}

}  // namespace fastbandit::cpu::FB_ISA
