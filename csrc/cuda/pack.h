// Loads and stores of several elements as one access, for elementwise CUDA kernels.
#pragma once

#include "launch.h"

namespace fastbandit {

// kCount elements, aligned so that they move in accesses of up to 16 bytes.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  static_assert((kCount & (kCount - 1)) == 0, "a power of two, or the alignment is none");
  T value[kCount];
};

template <int kCount, class T>
inline bool pack_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % alignof(Pack<T, kCount>) == 0;
}

inline bool aligned16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

template <int kCount, class T>
__device__ __forceinline__ Pack<T, kCount> load_pack(const T* data, int64_t pack) {
  return reinterpret_cast<const Pack<T, kCount>*>(data)[pack];
}

template <int kCount, class T>
__device__ __forceinline__ void store_pack(T* data, int64_t pack, const Pack<T, kCount>& value) {
  reinterpret_cast<Pack<T, kCount>*>(data)[pack] = value;
}

__device__ __forceinline__ int64_t thread_in_grid() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ int64_t threads_of_grid() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x;
}

}  // namespace fastbandit
