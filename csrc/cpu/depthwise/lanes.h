// How channels and images become vectors of lanes, and the way into scratch memory and back.
#pragma once

#include "cpu/conv_problem.h"
#include "cpu/simd/simd.h"

namespace fastbandit::cpu::FB_ISA {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How channels and images become blocks of kLanes lanes; `first` is the array that the op reads.
struct Blocks {
  bool flat;
  int64_t images, count;  // images x blocks cover every lane
  int64_t patterns;       // blocks whose filters differ

  Blocks(const ConvProblem& p, const Array4& first) {
    flat = !p.shared && p.c < kLanes && !(first.c == 1 && p.c > 1);
    images = flat ? 1 : p.n;
    count = flat ? ceil_div(p.n * p.c, kLanes) : ceil_div(p.c, kLanes);
    patterns = flat ? std::min(count, p.c) : count;
  }
};

struct LaneSet {
  int64_t n = 0, c = 0;  // image and channel of the first lane
  int64_t count = 0;     // lanes in use
  bool flat = false;
  int64_t channels = 0;

  LaneSet(const ConvProblem& p, const Blocks& blocks, int64_t image, int64_t block)
      : flat(blocks.flat), channels(p.c) {
    const int64_t first = block * kLanes;
    if (flat) {
      n = first / p.c;
      c = first % p.c;
      count = std::min<int64_t>(kLanes, p.n * p.c - first);
    } else {
      n = image;
      c = first;
      count = std::min<int64_t>(kLanes, p.c - first);
    }
  }

  template <class T>
  void pointers(const Array4& a, T* (&lane)[kLanes]) const {
    int64_t image = n, channel = c;
    for (int64_t l = 0; l < kLanes; ++l) {
      lane[l] = l < count ? static_cast<T*>(a.data) + image * a.n + channel * a.c : nullptr;
      if (++channel == channels && flat) {
        channel = 0;
        ++image;
      }
    }
  }
};

// Rows [row, row + rows) of the lanes, [rows][w][kLanes], as float32.
template <class T>
void gather_rows(const Array4& a, const LaneSet& lanes, int64_t row, int64_t rows, int64_t w,
                 bool use_relu, float* out) {
  T* lane[kLanes];
  lanes.pointers(a, lane);
  if (!lanes.flat && a.c == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      const T* p = lane[0] + (row + r) * a.h;
      for (int64_t i = 0; i < w; ++i, p += a.w, out += kLanes) {
        const Vec v = lanes.count == kLanes ? load(p) : load_first(p, lanes.count);
        store(out, use_relu ? relu(v) : v);
      }
    }
  } else if (a.w == 1) {
    const bool joined = a.h == w;  // rows follow each other: one long run instead of many short ones
    const int64_t run = joined ? rows * w : w, runs = joined ? 1 : rows;
    for (int64_t r = 0; r < runs; ++r) {
      for (int64_t i = 0; i < run; i += kLanes) {
        const int64_t offset = (row + r) * a.h + i, here = std::min<int64_t>(kLanes, run - i);
        Vec v[kLanes];
        if (here == kLanes && lanes.count == kLanes) {
#pragma GCC unroll 16
          for (int l = 0; l < kLanes; ++l) v[l] = load(lane[l] + offset);
        } else {
          for (int l = 0; l < kLanes; ++l) {
            v[l] = l < lanes.count ? load_partial(lane[l] + offset, 1, here) : zero();
          }
        }
        transpose(v);
        if (use_relu) {
#pragma GCC unroll 16
          for (int l = 0; l < kLanes; ++l) v[l] = relu(v[l]);
        }
        if (here == kLanes) {
#pragma GCC unroll 16
          for (int l = 0; l < kLanes; ++l) store(out + l * kLanes, v[l]);
        } else {
          for (int64_t l = 0; l < here; ++l) store(out + l * kLanes, v[l]);
        }
        out += here * kLanes;
      }
    }
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < w; ++i, out += kLanes) {
        const int64_t offset = (row + r) * a.h + i * a.w;
        T buffer[kLanes] = {};
        for (int64_t l = 0; l < lanes.count; ++l) buffer[l] = lane[l][offset];
        const Vec v = load(buffer);
        store(out, use_relu ? relu(v) : v);
      }
    }
  }
}

// The way back: [rows][w][kLanes] into rows [row, row + rows) of the lanes.
template <class T>
void scatter_rows(const Array4& a, const LaneSet& lanes, int64_t row, int64_t rows, int64_t w,
                  const float* in) {
  T* lane[kLanes];
  lanes.pointers(a, lane);
  if (!lanes.flat && a.c == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      T* p = lane[0] + (row + r) * a.h;
      for (int64_t i = 0; i < w; ++i, p += a.w, in += kLanes) {
        if (lanes.count == kLanes) {
          store(p, load(in));
        } else {
          store_first(p, lanes.count, load(in));
        }
      }
    }
  } else if (a.w == 1) {
    const bool joined = a.h == w;
    const int64_t run = joined ? rows * w : w, runs = joined ? 1 : rows;
    for (int64_t r = 0; r < runs; ++r) {
      for (int64_t i = 0; i < run; i += kLanes) {
        const int64_t offset = (row + r) * a.h + i, here = std::min<int64_t>(kLanes, run - i);
        Vec v[kLanes];
        if (here == kLanes) {
#pragma GCC unroll 16
          for (int l = 0; l < kLanes; ++l) v[l] = load(in + l * kLanes);
        } else {
          for (int l = 0; l < kLanes; ++l) v[l] = l < here ? load(in + l * kLanes) : zero();
        }
        in += here * kLanes;
        transpose(v);
        if (here == kLanes && lanes.count == kLanes) {
#pragma GCC unroll 16
          for (int l = 0; l < kLanes; ++l) store(lane[l] + offset, v[l]);
        } else {
          for (int l = 0; l < lanes.count; ++l) store_partial(lane[l] + offset, 1, here, v[l]);
        }
      }
    }
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < w; ++i, in += kLanes) {
        T buffer[kLanes];
        store(buffer, load(in));
        for (int64_t l = 0; l < lanes.count; ++l) {
          lane[l][(row + r) * a.h + i * a.w] = buffer[l];
        }
      }
    }
  }
}

template <class F>
FB_INLINE void with_type(Real type, const F& f) {
  if (type == Real::kFloat32) {
    f(float{});
  } else if (type == Real::kBFloat16) {
    f(bfloat16{});
  } else {
    f(float16{});
  }
}

inline void gather(const ConvProblem& p, const Array4& a, const LaneSet& lanes, int64_t row,
                   int64_t rows, int64_t w, bool use_relu, float* out) {
  with_type(p.type, [&](auto tag) {
    gather_rows<decltype(tag)>(a, lanes, row, rows, w, use_relu, out);
  });
}

inline void scatter(const ConvProblem& p, const Array4& a, const LaneSet& lanes, int64_t row,
                    int64_t rows, int64_t w, const float* in) {
  with_type(p.type, [&](auto tag) { scatter_rows<decltype(tag)>(a, lanes, row, rows, w, in); });
}

}  // namespace fastbandit::cpu::FB_ISA
