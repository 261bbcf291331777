// Enough of CUDA to compile the kernels with a C++ compiler and run them on the CPU.
//
// Each thread of a block is a fiber with its own stack; blocks run one after another. A fiber runs until
// it meets a barrier or a warp operation, where the next one goes on. This is slow and faithful: a read past a buffer, a missing barrier or a shuffle from a lane that left is
// found here without a GPU, by AddressSanitizer, by wrong numbers or by the checks below.
//
// CUDA_ON_CPU_ORDER=reverse runs the threads of a block from the last to the first: a kernel whose
// result depends on the order lacks a barrier.
#pragma once

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

// ---- language -----------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __constant__ static const
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__
#ifndef __restrict__
#define __restrict__ __restrict
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline constexpr int warpSize = 32;
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

// ---- runtime ------------------------------------------------------------------------------

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// Few multiprocessors, so that small tests already go round the grid-stride loops.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount      ? 2
           : attribute == cudaDevAttrComputeCapabilityMajor ? 9
                                                            : 227 * 1024;
  return cudaSuccess;
}
template <class Kernel>
inline cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  std::memset(pointer, value, bytes);
  return cudaSuccess;
}

// ---- fibers -------------------------------------------------------------------------------

namespace cuda_on_cpu {

enum class State { ready, at_block_barrier, at_warp_barrier, done };

// Where a stack that does not run at the moment goes on.
#if defined(__x86_64__)
using Context = void*;
// swapcontext asks the kernel for the signal mask at each switch, and AddressSanitizer clears the
// shadow of a whole stack before it: together most of the time of a test. So this saves only what a
// function may not change.
__attribute__((naked, noinline)) inline void swap_stacks(Context* /*from*/, Context* /*to*/) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n\t"
      "movq %rsp, (%rdi); movq (%rsi), %rsp\n\t"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
inline void make_context(Context* context, char* stack, size_t bytes, void (*start)()) {
  // A function begins with its return address, of which there is none, on a multiple of 16 plus 8.
  auto* top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) / 16 * 16);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(start);
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the registers
  *context = top;
}
#else
using Context = ucontext_t;
inline void swap_stacks(Context* from, Context* to) { swapcontext(from, to); }
inline void make_context(Context* context, char* stack, size_t bytes, void (*start)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = bytes;
  context->uc_link = nullptr;
  makecontext(context, start, 0);
}
#endif

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack;
  State state = State::done;
  uint3 index{};
  unsigned mask = 0;      // lanes that take part in the warp barrier this fiber waits at
  uint64_t exchange = 0;  // the value this lane offers to a shuffle
};

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline Context scheduler;
inline size_t running = 0;
inline const std::function<void()>* body = nullptr;
inline std::unique_ptr<char[]> dynamic_shared;

[[noreturn]] inline void die(const char* message) {
  std::fprintf(stderr, "cuda_on_cpu: %s (block %u,%u,%u thread %u,%u,%u)\n", message, blockIdx.x,
               blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
  std::abort();
}

inline void wait(State state) {
  Fiber& self = *fibers[running];
  self.state = state;
  swap_stacks(&self.context, &scheduler);
}

// A fiber never ends: the next block goes on with it.
inline void fiber_main() {
  for (;;) {
    (*body)();
    wait(State::done);
  }
}

inline void warp_wait(unsigned mask) {
  if (!(mask >> (running % 32) & 1u)) die("a lane outside the mask called a warp operation");
  fibers[running]->mask = mask;
  wait(State::at_warp_barrier);
}

// Lanes of the warp of fiber `first` that are in `mask` and in the block, or 0 while one of them
// is not waiting there yet.
inline void release_warps(size_t count) {
  for (size_t first = 0; first < count; first += 32) {
    const size_t lanes = std::min<size_t>(32, count - first);
    for (size_t lane = 0; lane < lanes; ++lane) {
      Fiber& fiber = *fibers[first + lane];
      if (fiber.state != State::at_warp_barrier) continue;
      bool complete = true;
      for (size_t other = 0; other < lanes; ++other) {
        if (!(fiber.mask >> other & 1u)) continue;
        const Fiber& peer = *fibers[first + other];
        if (peer.state == State::done) die("a warp operation names a lane that has left");
        complete &= peer.state == State::at_warp_barrier && peer.mask == fiber.mask;
      }
      if (!complete) continue;
      const unsigned mask = fiber.mask;
      for (size_t other = 0; other < lanes; ++other)
        if (mask >> other & 1u) fibers[first + other]->state = State::ready;
    }
  }
}

inline void run_block(size_t count) {
  static const char* order = std::getenv("CUDA_ON_CPU_ORDER");
  const bool reverse = order != nullptr && std::strcmp(order, "reverse") == 0;
  for (size_t i = 0; i < count; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.state = State::ready;
    fiber.index = {static_cast<unsigned>(i % blockDim.x),
                   static_cast<unsigned>(i / blockDim.x % blockDim.y),
                   static_cast<unsigned>(i / blockDim.x / blockDim.y)};
  }
  for (;;) {
    bool progress = false;
    size_t done = 0, at_barrier = 0;
    for (size_t step = 0; step < count; ++step) {
      const size_t i = reverse ? count - 1 - step : step;
      if (fibers[i]->state == State::ready) {
        progress = true;
        running = i;
        threadIdx = fibers[i]->index;
        swap_stacks(&scheduler, &fibers[i]->context);
      }
    }
    release_warps(count);
    for (size_t i = 0; i < count; ++i) {
      done += fibers[i]->state == State::done;
      at_barrier += fibers[i]->state == State::at_block_barrier;
    }
    if (done == count) return;
    if (at_barrier == count) {
      for (size_t i = 0; i < count; ++i) fibers[i]->state = State::ready;
    } else if (at_barrier > 0 && at_barrier + done == count) {
      die("__syncthreads() was not reached by every thread of the block");
    } else if (!progress) {
      bool any_ready = false;
      for (size_t i = 0; i < count; ++i) any_ready |= fibers[i]->state == State::ready;
      if (!any_ready) die("the threads of a block wait for each other at different barriers");
    }
  }
}

template <class Kernel, class... Arguments>
inline void launch(Kernel kernel, dim3 grid, dim3 block, size_t shared, Arguments... arguments) {
  const size_t count = static_cast<size_t>(block.x) * block.y * block.z;
  if (count == 0 || count > 1024) die("a block has 1 to 1024 threads");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) die("an empty grid");
  if (grid.y > 65535 || grid.z > 65535) die("grid.y and grid.z are at most 65535");
  while (fibers.size() < count) {
    Fiber& fiber = *fibers.emplace_back(std::make_unique<Fiber>());
    fiber.stack.reset(new char[kStackBytes]);
    make_context(&fiber.context, fiber.stack.get(), kStackBytes, fiber_main);
  }
  const std::function<void()> call = [=] { kernel(arguments...); };
  body = &call;
  blockDim = block;
  gridDim = grid;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        // A new allocation for each block, of exactly the size asked for and full of NaN.
        dynamic_shared.reset(new char[shared]);
        std::memset(dynamic_shared.get(), 0xff, shared);
        run_block(count);
      }
  body = nullptr;
}

inline int64_t launches = 0;  // so far; what a GPU gets as one node of a graph each

inline size_t warp_base() { return running / 32 * 32; }

// Every lane of the mask offers `value`; returns what lane `source` of this warp offered.
template <class T>
inline T exchange(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle carries at most 8 bytes");
  std::memcpy(&fibers[running]->exchange, &value, sizeof(T));
  warp_wait(mask);
  if (!(mask >> (source % 32) & 1u)) source = static_cast<unsigned>(running % 32);
  T result;
  std::memcpy(&result, &fibers[warp_base() + source % 32]->exchange, sizeof(T));
  warp_wait(mask);
  return result;
}

}  // namespace cuda_on_cpu

extern "C" __attribute__((used)) inline int64_t launches_made() { return cuda_on_cpu::launches; }

#define FB_LAUNCH(kernel, grid, block, shared, stream, ...)                     \
  ((void)(stream), ++cuda_on_cpu::launches,                                     \
   cuda_on_cpu::launch(kernel, dim3(grid), dim3(block), shared, __VA_ARGS__))
#define FB_DYNAMIC_SHARED(type, name) \
  type* const name = reinterpret_cast<type*>(cuda_on_cpu::dynamic_shared.get())

// ---- device functions ---------------------------------------------------------------------

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::State::at_block_barrier); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_on_cpu::warp_wait(mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  const unsigned self = static_cast<unsigned>(cuda_on_cpu::running % 32);
  const unsigned first = self / static_cast<unsigned>(width) * static_cast<unsigned>(width);
  return cuda_on_cpu::exchange(mask, value, first + static_cast<unsigned>(lane % width));
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const unsigned self = static_cast<unsigned>(cuda_on_cpu::running % 32);
  const unsigned source = self ^ static_cast<unsigned>(lanes);
  const bool inside = source / static_cast<unsigned>(width) <= self / static_cast<unsigned>(width);
  return cuda_on_cpu::exchange(mask, value, inside ? source : self);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned self = static_cast<unsigned>(cuda_on_cpu::running % 32);
  const bool inside = self % static_cast<unsigned>(width) + delta < static_cast<unsigned>(width);
  return cuda_on_cpu::exchange(mask, value, inside ? self + delta : self);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned self = static_cast<unsigned>(cuda_on_cpu::running % 32);
  const bool inside = self % static_cast<unsigned>(width) >= delta;
  return cuda_on_cpu::exchange(mask, value, inside ? self - delta : self);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  cuda_on_cpu::fibers[cuda_on_cpu::running]->exchange = predicate != 0;
  cuda_on_cpu::warp_wait(mask);
  unsigned result = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    if ((mask >> lane & 1u) && cuda_on_cpu::warp_base() + lane < cuda_on_cpu::fibers.size() &&
        cuda_on_cpu::fibers[cuda_on_cpu::warp_base() + lane]->exchange)
      result |= 1u << lane;
  cuda_on_cpu::warp_wait(mask);
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

// Fibers never run at the same time, so a plain read-modify-write is atomic.
template <class T>
inline T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <class T>
inline T atomicMax(T* address, T value) {
  const T old = *address;
  *address = std::max(old, value);
  return old;
}
template <class T>
inline T atomicMin(T* address, T value) {
  const T old = *address;
  *address = std::min(old, value);
  return old;
}
template <class T>
inline T atomicCAS(T* address, T expected, T value) {
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}

template <class T>
inline T __ldg(const T* address) {
  return *address;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
inline float __expf(float value) { return std::exp(value); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
using std::max;
using std::min;
