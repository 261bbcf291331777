// What the ops on packed signs share: memory of a thread, dense copies.
#pragma once

#include <cstdlib>
#include <cstring>
#include <new>

#include "binary_checks.h"
#include "cpu/binary_problem.h"
#include "cpu/conv_tensor.h"

namespace fastbandit::cpu {

// Memory on cache lines that a thread keeps, so that a network allocates nothing call by call.
class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { std::free(data_); }

  void* get(int64_t bytes) {
    if (bytes > capacity_) {
      std::free(data_);
      capacity_ = (bytes + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(64, static_cast<size_t>(capacity_));
      if (data_ == nullptr) {
        capacity_ = 0;
        throw std::bad_alloc();
      }
      std::memset(data_, 0, static_cast<size_t>(capacity_));
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  int64_t capacity_ = 0;
};

inline uint64_t* sign_words_of(const Tensor& bits) {
  return static_cast<uint64_t*>(const_cast<void*>(bits.const_data_ptr()));
}

}  // namespace fastbandit::cpu
