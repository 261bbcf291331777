// A launch whose last block goes on with what all blocks wrote, which saves a second launch.
#pragma once

#include <atomic>

#include "launch.h"

namespace fastbandit {
namespace {

// Blocks that have arrived, of those that add up to one result; 0 between launches, since the last
// one to arrive sets it back. Each launch takes other counters than the ones before it, so that two
// streams share one only if a million were given out between two launches that run at once.
#if defined(__CUDACC__)
constexpr unsigned kCounters = 1u << 20;
#else
constexpr unsigned kCounters = 64;  // so that tests come to use one again
#endif
__device__ unsigned arrived[kCounters];

unsigned take_counters(unsigned number) {
  static std::atomic<unsigned> next{0};
  return next.fetch_add(number);
}

// Whether this is the last of the blocks with its blockIdx.y and z; it then sees what all wrote. For
// all threads of a block.
__device__ __forceinline__ bool is_last_block(unsigned first_counter) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned* const counter =
        arrived + (first_counter + blockIdx.z * gridDim.y + blockIdx.y) % kCounters;
    last = atomicAdd(counter, 1u) + 1 == gridDim.x;
    if (last) *counter = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// What another block wrote in this launch: not from the cache of this multiprocessor.
template <class C>
__device__ __forceinline__ double fresh(const C* at) {
#if defined(__CUDACC__)
  return static_cast<double>(__ldcg(at));
#else
  return static_cast<double>(*at);
#endif
}

}  // namespace
}  // namespace fastbandit
