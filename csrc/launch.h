// What every CUDA kernel file needs to launch: element types as plain integers, grid sizes, the
// launch itself and its check. Includes no torch header.
//
// The same files also compile with g++ against tests/cuda_on_cpu/cuda_shim.h, which runs each
// thread of a block as a fiber; FB_LAUNCH and FB_DYNAMIC_SHARED are the two places that differ.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "math/number.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
// FB_LAUNCH((kernel<A, B>), grid, block, shared bytes, stream, arguments...)
#define FB_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define FB_DYNAMIC_SHARED(type, name)              \
  extern __shared__ __align__(16) char name##_[];  \
  type* const name = reinterpret_cast<type*>(name##_)
#else
#include "cuda_shim.h"
#endif

// Launchers are called across the border to torch with plain types only. They return nullptr, or
// the CUDA runtime's text for the error of this launch.
#define FB_LAUNCHER extern "C" const char*

namespace fastbandit {

// What a launcher returns for arguments it has no kernel for.
constexpr const char* kTooManyDims = "more than 8 dimensions with unrelated strides";
constexpr const char* kUnknownDtype = "no kernel for this dtype";

constexpr int kThreads = 256;  // threads of a block in the elementwise kernels
// Blocks that a multiprocessor is to hold, where a kernel names them: left to itself, ptxas aims at
// so many that on one architecture or another it spills a few registers. Four with a few 16-byte
// loads for each thread are enough in flight.
constexpr int kBlocks = 4;

// The error of the launch just made, without waiting for the kernel.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// run(T{}) with T the element type of `dtype`, which is to launch; then the error of that launch.
template <class Run>
const char* launch_floating(int dtype, const Run& run) {
  switch (dtype) {
    case kFloat32: run(float{}); break;
    case kFloat64: run(double{}); break;
    case kBFloat16: run(bfloat16{}); break;
    case kFloat16: run(float16{}); break;
    default: return kUnknownDtype;
  }
  return launch_error();
}

// Multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Blocks for a grid-stride loop over `items`: enough to fill the device twice over (at most 8
// blocks of kThreads are resident on a multiprocessor), and no more than there is work for.
inline unsigned grid_size(int64_t items, int threads) {
  const int64_t wanted = (items + threads - 1) / threads;
  const int64_t limit = static_cast<int64_t>(multiprocessors()) * 16;
  return static_cast<unsigned>(wanted < 1 ? 1 : wanted < limit ? wanted : limit);
}

}  // namespace fastbandit
