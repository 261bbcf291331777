// mma_and_popc by itself: the registers of one warp in, its registers out.
#include "cuda/mma_bits.h"

namespace fastbandit {
namespace {

// a: [32][4], b: [32][2], d: [32][4], a row for each lane.
__global__ void mma_bits_kernel(const unsigned* a, const unsigned* b, int* d) {
  const int lane = static_cast<int>(threadIdx.x);
  unsigned left[4], right[2];
  int sums[4];
  for (int i = 0; i < 4; ++i) left[i] = a[4 * lane + i], sums[i] = d[4 * lane + i];
  for (int i = 0; i < 2; ++i) right[i] = b[2 * lane + i];
  mma_and_popc(sums, left, right);
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = sums[i];
}

}  // namespace

FB_LAUNCHER launch_mma_bits(const unsigned* a, const unsigned* b, int* d, void* stream) {
  FB_LAUNCH((mma_bits_kernel), 1, 32, 0, stream, a, b, d);
  return launch_error();
}

}  // namespace fastbandit
