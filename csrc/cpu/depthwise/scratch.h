// Scratch memory of a thread: grows and is kept for the thread's life, so it never page-faults twice.
#pragma once

#include "cpu/simd/simd.h"

namespace fastbandit::cpu::FB_ISA {

class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  float* get(int64_t floats) {
    if (floats > capacity_) {
      std::free(memory_);
      const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 4095) / 4096 * 4096;
      memory_ = static_cast<float*>(std::aligned_alloc(64, bytes));
      capacity_ = memory_ ? floats : 0;
      if (!memory_) throw std::bad_alloc();
    }
    return memory_;
  }

 private:
  float* memory_ = nullptr;
  int64_t capacity_ = 0;
};

enum ScratchUse { kScratchIn, kScratchOut, kScratchMask, kScratchPlane, kScratchUses };

inline float* scratch(ScratchUse use, int64_t floats) {
  static thread_local Scratch buffers[kScratchUses];
  return buffers[use].get(floats);
}

}  // namespace fastbandit::cpu::FB_ISA
