// Dense convolution of signs by counting the bits that differ: where the CPU counts them in vectors
// (AVX-512 VPOPCNTDQ), where it has no byte shuffle, and for filters beyond the 16-bit counts of the
// table.
//
// A vector holds a word of eight filters each; a word of a pixel goes to all of them. A padded tap is
// masked out, and the sum where nothing differs is that of the taps inside the map.
#pragma once

#include "cpu/binary/geometry.h"
#include "cpu/binary/result.h"

namespace fastbandit::cpu::FB_ISA {

constexpr int kCountLanes = 8;

#if defined(FB_ISA_AVX512VPOPCNTDQ)
struct WordVec {
  __m512i v;
};
FB_INLINE WordVec no_words() { return {_mm512_setzero_si512()}; }
FB_INLINE WordVec load_word_vec(const uint64_t* p) { return {_mm512_loadu_si512(p)}; }
FB_INLINE WordVec to_all(uint64_t word) {
  return {_mm512_set1_epi64(static_cast<int64_t>(word))};
}
FB_INLINE WordVec differing(WordVec a, WordVec b) { return {_mm512_xor_si512(a.v, b.v)}; }
FB_INLINE WordVec differing_in(WordVec mask, WordVec a, WordVec b) {
  return {_mm512_ternarylogic_epi64(mask.v, a.v, b.v, 0x60)};  // mask & (a ^ b)
}
FB_INLINE WordVec add_counts(WordVec sum, WordVec bits) {
  return {_mm512_add_epi64(sum.v, _mm512_popcnt_epi64(bits.v))};
}
FB_INLINE void store_counts(uint32_t* to, WordVec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi64_epi32(a.v));
}
#else
// In the vectors of the compiler, with the count that needs no instruction of its own.
struct WordVec {
  uint64_t v __attribute__((vector_size(8 * kCountLanes)));
};
FB_INLINE WordVec no_words() { return {WordVec{}.v ^ WordVec{}.v}; }
FB_INLINE WordVec load_word_vec(const uint64_t* p) {
  WordVec a;
  std::memcpy(&a.v, p, sizeof(a.v));
  return a;
}
FB_INLINE WordVec to_all(uint64_t word) { return {no_words().v + word}; }
FB_INLINE WordVec differing(WordVec a, WordVec b) { return {a.v ^ b.v}; }
FB_INLINE WordVec differing_in(WordVec mask, WordVec a, WordVec b) {
  return {mask.v & (a.v ^ b.v)};
}
FB_INLINE WordVec add_counts(WordVec sum, WordVec bits) {
  constexpr uint64_t kPairs = 0x5555555555555555, kFours = 0x3333333333333333,
                     kBytesOfFour = 0x0f0f0f0f0f0f0f0f;
  auto x = bits.v;
  x = x - (x >> 1 & kPairs);
  x = (x & kFours) + (x >> 2 & kFours);
  x = (x + (x >> 4)) & kBytesOfFour;
  // The sum of the bytes without a multiplication, which vectors of 64 bits may not have.
  x = x + (x >> 8);
  x = x + (x >> 16);
  x = (x + (x >> 32)) & 0x7f;
  return {sum.v + x};
}
FB_INLINE void store_counts(uint32_t* to, WordVec a) {
  for (int i = 0; i < kCountLanes; ++i) to[i] = static_cast<uint32_t>(a.v[i]);
}
#endif

// ---- sizes ---------------------------------------------------------------------------------------

constexpr int64_t kCountBlock = 32;
// Vectors of filters, and pixels, of a tile.
constexpr int kCountGroup = kIsa == Isa::avx512vpopcntdq ? 4 : 1;
constexpr int kCountPixels = kIsa == Isa::avx512vpopcntdq ? 4 : 2;
constexpr int64_t kCountFilters = kCountGroup * kCountLanes;
// Words of a filter that are counted at once; a larger filter is worked through in parts, so that the
// memory of a thread does not grow with it: 36 pixels of these, twice, are 576 KiB.
constexpr int64_t kCountWords = 1024;

struct CountPlan {
  SignBlocks blocks;
  int64_t words, groups, rows;  // words of a filter; groups of filters; pixels with those to spare
  int64_t part;                 // words of a part

  explicit CountPlan(const SignConv& p) : blocks(p, kCountBlock) {
    words = p.taps() * p.words;
    groups = (p.filters + kCountFilters - 1) / kCountFilters;
    rows = blocks.size + kCountPixels;
    part = std::min(words, kCountWords);
  }
  int64_t mask_at() const { return rows * part * 8; }
  int64_t sums_at() const { return 2 * mask_at(); }
  int64_t counts_at() const { return sums_at() + (rows * 4 + 63) / 64 * 64; }
  // Bits come a word at a time, so the counts of 64 filters are kept.
  int64_t bytes() const { return counts_at() + rows * kWordBits * 4; }
};

// As large as the weights, with the filters rounded up to whole groups.
inline int64_t count_prepared_bytes(const SignConv& p) {
  const CountPlan plan(p);
  return plan.groups * kCountFilters * plan.words * 8;
}
inline int64_t count_scratch_bytes(const SignConv& p) { return CountPlan(p).bytes(); }
inline int64_t count_items(const SignConv& p) { return CountPlan(p).blocks.count; }

// Weights [group][word][vector of the group][filter].
inline void count_prepare(const SignConv& p, void* prepared) {
  const CountPlan plan(p);
  const uint64_t last = last_word_mask(p.channels);
  uint64_t* to = static_cast<uint64_t*>(prepared);
  for (int64_t group = 0; group < plan.groups; ++group)
    for (int64_t at = 0; at < plan.words; ++at)
      for (int64_t i = 0; i < kCountFilters; ++i) {
        const int64_t f = group * kCountFilters + i;
        const uint64_t mask = at % p.words + 1 == p.words ? last : ~uint64_t{0};
        *to++ = f < p.filters ? p.weight[f * plan.words + at] & mask : 0;
      }
}

// ---- pixels --------------------------------------------------------------------------------------

// The words [first, last) of those under the taps of each pixel, and what of them counts. True where
// a tap is padded.
inline bool write_words(const SignConv& p, const CountPlan& plan, int64_t begin, int64_t end,
                        int64_t first, int64_t last, uint64_t* words, uint64_t* masks) {
  const uint64_t end_mask = last_word_mask(p.channels);
  const int64_t first_tap = first / p.words, last_tap = (last - 1) / p.words;
  const int64_t first_row = first_tap / p.kernel_w, first_column = first_tap % p.kernel_w;
  bool padded = false;
  for_pixels(p, begin, end, [&](int64_t n, int64_t y, int64_t x, int64_t at)
                                __attribute__((always_inline)) {
    uint64_t* to = words + at * plan.part;
    uint64_t* mask = masks + at * plan.part;
    for (int64_t tap = first_tap, i = first_row, j = first_column; tap <= last_tap; ++tap) {
      const int64_t row = y * p.stride_h - p.pad_h + i * p.dilation_h;
      const int64_t column = x * p.stride_w - p.pad_w + j * p.dilation_w;
      if (++j == p.kernel_w) j = 0, ++i;
      const bool lies = row >= 0 && row < p.h && column >= 0 && column < p.w;
      const uint64_t* const from = p.bits + ((n * p.h + row) * p.w + column) * p.words;
      padded = padded || !(lies || p.plus_one);
      const int64_t start = std::max<int64_t>(0, first - tap * p.words);
      const int64_t stop = std::min(p.words, last - tap * p.words);
      for (int64_t word = start; word < stop; ++word) {
        const uint64_t all = word + 1 == p.words ? end_mask : ~uint64_t{0};
        *to++ = lies ? from[word] & all : p.plus_one ? all : 0;
        *mask++ = lies || p.plus_one ? ~uint64_t{0} : 0;
      }
    }
  });
  return padded;
}

// The sums of each pixel where nothing differs: the taps inside the map.
inline void write_sums(const SignConv& p, int64_t begin, int64_t end, int32_t* sums) {
  for_pixels(p, begin, end, [&](int64_t, int64_t y, int64_t x, int64_t at)
                                __attribute__((always_inline)) {
    int64_t inside = p.taps();
    if (!p.plus_one) {
      int64_t first_row, last_row, first_column, last_column;
      inside_taps(y * p.stride_h - p.pad_h, p.kernel_h, p.dilation_h, p.h, first_row, last_row);
      inside_taps(x * p.stride_w - p.pad_w, p.kernel_w, p.dilation_w, p.w, first_column,
                  last_column);
      inside = (last_row - first_row) * (last_column - first_column);
    }
    sums[at] = static_cast<int32_t>(inside * p.channels);
  });
}

template <bool kMasked>
FB_INLINE void count_words(int64_t count, const uint64_t* words, const uint64_t* masks,
                           int64_t row, const uint64_t* weights, bool further, uint32_t* counts,
                           int64_t counts_row) {
  constexpr int G = kCountGroup, P = kCountPixels;
  WordVec sum[G][P];
  FB_UNROLL
  for (int g = 0; g < G; ++g) {
    FB_UNROLL
    for (int i = 0; i < P; ++i) sum[g][i] = no_words();
  }
  for (int64_t at = 0; at < count; ++at, weights += kCountFilters) {
    WordVec weight[G];
    FB_UNROLL
    for (int g = 0; g < G; ++g) weight[g] = load_word_vec(weights + g * kCountLanes);
    FB_UNROLL
    for (int i = 0; i < P; ++i) {
      const WordVec word = to_all(words[i * row + at]);
      const WordVec mask = kMasked ? to_all(masks[i * row + at]) : word;
      FB_UNROLL
      for (int g = 0; g < G; ++g)
        sum[g][i] = add_counts(sum[g][i], kMasked ? differing_in(mask, word, weight[g])
                                                  : differing(word, weight[g]));
    }
  }
  FB_UNROLL
  for (int i = 0; i < P; ++i) {
    FB_UNROLL
    for (int g = 0; g < G; ++g) {
      uint32_t* const to = counts + i * counts_row + g * kCountLanes;
      if (!further) {
        store_counts(to, sum[g][i]);
        continue;
      }
      uint32_t part[kCountLanes];
      store_counts(part, sum[g][i]);
      for (int lane = 0; lane < kCountLanes; ++lane) to[lane] += part[lane];
    }
  }
}

inline void count_run(const SignConv& p, const void* prepared, void* memory, int64_t from,
                      int64_t to) {
  const CountPlan plan(p);
  const uint64_t* const panel = static_cast<const uint64_t*>(prepared);
  uint8_t* const scratch = static_cast<uint8_t*>(memory);
  uint64_t* const words = reinterpret_cast<uint64_t*>(scratch);
  uint64_t* const masks = reinterpret_cast<uint64_t*>(scratch + plan.mask_at());
  int32_t* const sums = reinterpret_cast<int32_t*>(scratch + plan.sums_at());
  uint32_t* const counts = reinterpret_cast<uint32_t*>(scratch + plan.counts_at());
  constexpr int64_t kGroups = kWordBits / kCountFilters;  // of the filters whose counts are kept
  for (int64_t block = from; block < to; ++block) {
    const int64_t begin = plan.blocks.begin(block), pixels = plan.blocks.end(block) - begin;
    write_sums(p, begin, begin + pixels, sums);
    bool padded = false;
    for (int64_t group = 0; group < plan.groups; group += kGroups) {
      const int64_t stop = std::min(plan.groups, group + kGroups);
      for (int64_t first = 0; first < plan.words; first += plan.part) {
        const int64_t last = std::min(plan.words, first + plan.part);
        // Those of a filter in one part serve all filters.
        if (group == 0 || plan.part < plan.words)
          padded = write_words(p, plan, begin, begin + pixels, first, last, words, masks);
        for (int64_t g = group; g < stop; ++g) {
          const uint64_t* const weights = panel + (g * plan.words + first) * kCountFilters;
          for (int64_t at = 0; at < pixels; at += kCountPixels) {
            uint32_t* const kept = counts + at * kWordBits + (g - group) * kCountFilters;
            const int64_t place = at * plan.part;
            if (padded)
              count_words<true>(last - first, words + place, masks + place, plan.part, weights,
                                first > 0, kept, kWordBits);
            else
              count_words<false>(last - first, words + place, masks, plan.part, weights, first > 0,
                                 kept, kWordBits);
          }
        }
      }
      const int64_t first = group * kCountFilters;
      const int64_t count = std::min(kWordBits, p.filters - first);
      write_results(p.result, begin, pixels, p.filters, first, count, sums,
                    static_cast<const uint32_t*>(counts), kWordBits);
    }
  }
}

inline SignWork count_work() {
  return {&count_prepared_bytes, &count_prepare, &count_scratch_bytes, &count_items, &count_run};
}

}  // namespace fastbandit::cpu::FB_ISA
