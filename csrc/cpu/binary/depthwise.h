// Depthwise convolution of signs: a bit of a word is a channel, and the channels of a vector of words
// are counted at once.
//
// Each tap gives a word of the channels that differ. Their number is added up in bit planes, by full
// adders that turn three bits of one weight into two: 25 taps end in five planes. A threshold is
// compared with the planes, by the borrow of a subtraction, so bits go in and bits come out; numbers
// are made from the planes for 64 channels at a time.
#pragma once

#include "cpu/binary/geometry.h"
#include "cpu/binary/result.h"

namespace fastbandit::cpu::FB_ISA {

// Words beside each other: as many as a vector holds, or one.
constexpr int kPlaneWords = kIsa >= Isa::avx512 ? 8 : kIsa == Isa::avx2 ? 4 : 2;
typedef uint64_t PlaneVec __attribute__((vector_size(8 * kPlaneWords)));

template <class W>
FB_INLINE W load_plane(const uint64_t* p) {
  W word;
  std::memcpy(&word, p, sizeof(W));
  return word;
}
template <class W>
FB_INLINE void store_plane(uint64_t* p, W word) {
  std::memcpy(p, &word, sizeof(W));
}

// Functions of three bits a, b, c as tables of their values, a the highest bit of the place: the sum; the
// carry; of two numbers a and b whether the first is below the second, where c is what the lower bits
// said; what differs in a and b where c counts. With AVX-512 each is one instruction.
enum Function : int { kSum = 0x96, kCarry = 0xe8, kBelow = 0x8e, kDiffer = 0x28 };
template <Function kTable, class W>
FB_INLINE W of_three(W a, W b, W c) {
#if defined(FB_ISA_AVX512)
  if constexpr (sizeof(W) == 64) {
    const auto register_of = [](W w) __attribute__((always_inline)) {
      return reinterpret_cast<__m512i>(w);
    };
    return reinterpret_cast<W>(_mm512_ternarylogic_epi64(register_of(a), register_of(b),
                                                         register_of(c), kTable));
  } else
#endif
  {
    if constexpr (kTable == kSum) return a ^ b ^ c;
    if constexpr (kTable == kCarry) return (a & b) | ((a ^ b) & c);
    if constexpr (kTable == kBelow) return ((a ^ b) & b) | (~(a ^ b) & c);
    if constexpr (kTable == kDiffer) return (a ^ b) & c;
  }
}

// ---- sizes ---------------------------------------------------------------------------------------

constexpr int planes_of(int64_t taps) {
  int planes = 1;
  while (taps >> planes != 0) ++planes;
  return planes;
}
constexpr int kMostPlanes = 26;  // of 2^24 taps and the bit beyond

struct PlanePlan {
  int64_t taps, period, planes;
  int64_t row_classes, column_classes;

  explicit PlanePlan(const SignConv& p) {
    taps = p.taps();
    planes = planes_of(taps);
    // Weights and thresholds are repeated, so that a vector at any place of a row finds its own.
    period = p.words;
    while (period % kPlaneWords != 0) period += p.words;
    row_classes = p.kernel_h + 1, column_classes = p.kernel_w + 1;
  }
  // Thresholds for each number of taps inside the map, rows by columns: planes + 1 and the flips.
  int64_t class_words() const { return (planes + 1) * period; }
  int64_t classes() const { return row_classes * column_classes; }
  int64_t flip_at() const { return taps * period; }
  int64_t mask_at() const { return flip_at() + period; }
  int64_t used_at() const { return mask_at() + period; }
  int64_t thresholds_at() const { return used_at() + classes(); }
  int64_t zeros_at(bool bits) const {
    return thresholds_at() + (bits ? classes() * class_words() : 0);
  }
  // What a padded tap is read from: a row of it, and a period, of all taps of a row.
  int64_t zeros(const SignConv& p) const {
    return whole_rows(p) ? std::max(under_row(p), p.kernel_w * period)
                         : std::max(p.ow * p.words, period);
  }

  // Whether rows are worked through whole, bits to bits: pixels beside an edge too, by masks.
  bool whole_rows(const SignConv& p) const {
    return p.result.bits != nullptr && !p.plus_one && p.stride_w == 1 &&
           p.kernel_h == p.kernel_w && (taps == 9 || taps == 25) &&
           p.ow * p.words >= kPlaneWords;
  }
  // Words that are read for a whole output row from the map under a row of taps.
  int64_t under_row(const SignConv& p) const {
    return (p.ow + (p.kernel_w - 1) * p.dilation_w) * p.words;
  }
  // For each word of a row: of each column of taps whether it lies in the map, and the thresholds,
  // for each number of rows of taps inside.
  int64_t row_masks_at(const SignConv& p) const {
    return zeros_at(p.result.bits != nullptr) + zeros(p);
  }
  int64_t row_thresholds_at(const SignConv& p) const {
    return row_masks_at(p) + p.kernel_w * p.ow * p.words;
  }
  int64_t row_class_words(const SignConv& p) const { return (planes + 1) * p.ow * p.words; }
  int64_t words(const SignConv& p) const {
    return whole_rows(p) ? row_thresholds_at(p) + row_classes * row_class_words(p)
                         : row_masks_at(p);
  }
};

inline int64_t planes_prepared_bytes(const SignConv& p) { return PlanePlan(p).words(p) * 8; }
// The counts of a word, or copies of rows at the ends of the map.
inline int64_t planes_scratch_bytes(const SignConv& p) {
  const PlanePlan plan(p);
  return std::max<int64_t>(64 * 4, plan.whole_rows(p) ? p.kernel_h * plan.under_row(p) * 8 : 0);
}
inline int64_t planes_items(const SignConv& p) { return p.n * p.oh; }

// Planes of the smallest count that does not reach the threshold of each channel.
inline void write_thresholds(const SignConv& p, const PlanePlan& plan, int64_t inside,
                             uint64_t* to) {
  const int32_t top = int32_t{1} << plan.planes;
  for (int64_t word = 0; word < p.words; ++word) {
    alignas(64) int32_t bound[64] = {};
    const int64_t count = std::min(kWordBits, p.channels - word * kWordBits);
    const int32_t* const threshold = p.result.threshold + word * kWordBits;
    for (int64_t i = 0; i < count; ++i) {
      // sum = inside - 2 differing >= threshold
      const int64_t room = inside - static_cast<int64_t>(threshold[i]);
      bound[i] =
          room < 0 ? 0 : static_cast<int32_t>(std::min<int64_t>(2 * int64_t{top} - 2, room) / 2 + 1);
    }
    for (int64_t plane = 0; plane <= plan.planes; ++plane) {
      alignas(64) uint8_t ones[64];
      for (int i = 0; i < 64; ++i) ones[i] = static_cast<uint8_t>(bound[i] >> plane & 1);
      to[plane * plan.period + word] = bits_of_bytes(ones);
    }
  }
  for (int64_t plane = 0; plane <= plan.planes; ++plane)
    for (int64_t i = p.words; i < plan.period; ++i)
      to[plane * plan.period + i] = to[plane * plan.period + i % p.words];
}

// What a row needs that is worked through whole; `used` tells the numbers of taps that occur.
inline void write_rows(const SignConv& p, const PlanePlan& plan, const uint64_t* used,
                       uint64_t* base) {
  const int64_t length = p.ow * p.words;
  for (int64_t x = 0; x < p.ow; ++x) {
    int64_t first, stop;
    inside_taps(x - p.pad_w, p.kernel_w, p.dilation_w, p.w, first, stop);
    uint64_t* const masks = base + plan.row_masks_at(p) + x * p.words;
    for (int64_t j = 0; j < p.kernel_w; ++j)
      for (int64_t i = 0; i < p.words; ++i)
        masks[j * length + i] = j >= first && j < stop ? ~uint64_t{0} : 0;
    for (int64_t rows = 0; rows < plan.row_classes; ++rows) {
      const int64_t at = rows * plan.column_classes + stop - first;
      if (!(used[at] & 1)) continue;
      const uint64_t* const from = base + plan.thresholds_at() + at * plan.class_words();
      uint64_t* const to = base + plan.row_thresholds_at(p) + rows * plan.row_class_words(p) +
                           x * p.words;
      for (int64_t plane = 0; plane <= plan.planes; ++plane)
        for (int64_t i = 0; i < p.words; ++i)
          to[plane * length + i] = from[plane * plan.period + i];
    }
  }
}

inline void planes_prepare(const SignConv& p, void* prepared) {
  const PlanePlan plan(p);
  uint64_t* const base = static_cast<uint64_t*>(prepared);
  for (int64_t tap = 0; tap < plan.taps; ++tap)
    for (int64_t i = 0; i < plan.period; ++i)
      base[tap * plan.period + i] = p.weight[tap * p.words + i % p.words];
  uint64_t* const masks = base + plan.mask_at();
  uint64_t* const padding = base + plan.zeros_at(p.result.bits != nullptr);
  for (int64_t i = 0; i < plan.period; ++i) {
    const int64_t word = i % p.words;
    masks[i] = word + 1 == p.words ? last_word_mask(p.channels) : ~uint64_t{0};
  }
  std::fill_n(padding, plan.zeros(p), p.plus_one ? ~uint64_t{0} : 0);
  if (p.result.bits == nullptr) return;
  uint64_t* const flips = base + plan.flip_at();
  for (int64_t i = 0; i < plan.period; ++i) flips[i] = p.result.flips[i % p.words];
  // Those numbers of taps that occur.
  uint64_t* const used = base + plan.used_at();
  for (int64_t i = 0; i < plan.classes(); ++i) used[i] = 0;
  if (p.plus_one) {
    used[plan.classes() - 1] = 1;
  } else {
    for (int64_t x = 0; x < p.ow; ++x) {
      int64_t first, stop;
      inside_taps(x * p.stride_w - p.pad_w, p.kernel_w, p.dilation_w, p.w, first, stop);
      used[stop - first] |= 2;
    }
    for (int64_t y = 0; y < p.oh; ++y) {
      int64_t first, stop;
      inside_taps(y * p.stride_h - p.pad_h, p.kernel_h, p.dilation_h, p.h, first, stop);
      for (int64_t columns = 0; columns < plan.column_classes; ++columns)
        if (used[columns] & 2) used[(stop - first) * plan.column_classes + columns] |= 1;
    }
  }
  for (int64_t rows = 0; rows < plan.row_classes; ++rows)
    for (int64_t columns = 0; columns < plan.column_classes; ++columns) {
      const int64_t at = rows * plan.column_classes + columns;
      if (used[at] & 1)
        write_thresholds(p, plan, rows * columns,
                         base + plan.thresholds_at() + at * plan.class_words());
    }
  if (plan.whole_rows(p)) write_rows(p, plan, used, base);
}

// ---- adders --------------------------------------------------------------------------------------

// The sum of N bits given by get(0), get(1), ...: its lowest plane; N / 2 carries are left over.
template <int N, class W, class Get>
FB_INLINE W add_bits(const Get& get, W* carries) {
  W sum = get(0);
  FB_UNROLL
  for (int i = 1; i + 1 < N; i += 2) {
    const W a = get(i), b = get(i + 1);
    carries[i / 2] = of_three<kCarry>(sum, a, b);
    sum = of_three<kSum>(sum, a, b);
  }
  if constexpr (N % 2 == 0) {
    const W a = get(N - 1);
    carries[N / 2 - 1] = sum & a;
    sum ^= a;
  }
  return sum;
}

template <int N, class W, class Get>
FB_INLINE void add_planes(const Get& get, W* planes) {
  if constexpr (N == 1) {
    planes[0] = get(0);
  } else {
    W carries[N / 2];
    planes[0] = add_bits<N, W>(get, carries);
    add_planes<N / 2, W>([&](int i) __attribute__((always_inline)) { return carries[i]; },
                         planes + 1);
  }
}

// Any number of taps: one bit after another through all planes.
template <class W, class Get>
FB_INLINE void add_any(int64_t taps, int64_t count, const Get& get, W* planes) {
  for (int64_t i = 0; i < count; ++i) planes[i] = W{};
  for (int64_t tap = 0; tap < taps; ++tap) {
    W carry = get(tap);
    for (int64_t i = 0; i < count; ++i) {
      const W both = planes[i] & carry;
      planes[i] ^= carry;
      carry = both;
    }
  }
}

// ---- rows ----------------------------------------------------------------------------------------

// Neighbouring words of an output row, and where their taps lie.
struct PlaneRun {
  const uint64_t* const* taps;     // the map under each tap
  const uint64_t* const* weights;  // of each tap; what is padded has the map's own
  const uint64_t* thresholds;      // planes of the counts that do not reach it
  int64_t length;                  // in words
};

template <int kTaps, class W>
FB_INLINE void planes_at(const PlanePlan& plan, const PlaneRun& run, int64_t i, int64_t place,
                         W* planes) {
  const auto get = [&](int64_t tap) __attribute__((always_inline)) {
    return static_cast<W>(load_plane<W>(run.taps[tap] + i) ^
                          load_plane<W>(run.weights[tap] + place));
  };
  if constexpr (kTaps > 0)
    add_planes<kTaps, W>(get, planes);
  else
    add_any<W>(plan.taps, plan.planes, get, planes);
}

// Whether the count of each channel is below its bound.
template <int kTaps, class W>
FB_INLINE W below(const PlanePlan& plan, const uint64_t* bounds, const W* planes) {
  const int64_t count = kTaps > 0 ? planes_of(kTaps) : plan.planes;
  W borrow{};
  FB_UNROLL
  for (int64_t i = 0; i < count; ++i) {
    borrow = of_three<kBelow>(planes[i], load_plane<W>(bounds + i * plan.period), borrow);
  }
  return borrow | load_plane<W>(bounds + count * plan.period);
}

template <int kTaps, class W>
FB_INLINE void write_bits(const PlanePlan& plan, const uint64_t* base, const PlaneRun& run,
                          int64_t i, int64_t place, uint64_t* to) {
  W planes[kTaps > 0 ? planes_of(kTaps) : kMostPlanes];
  planes_at<kTaps, W>(plan, run, i, place, planes);
  const W reached = below<kTaps, W>(plan, run.thresholds + place, planes);
  const W flips = load_plane<W>(base + plan.flip_at() + place);
  const W mask = load_plane<W>(base + plan.mask_at() + place);
  store_plane<W>(to + i, (reached ^ flips) & mask);
}

// The counts of the 64 channels of a word, from its planes; `step` words lie between two planes.
template <class Count>
FB_INLINE void counts_of_planes(const uint64_t* planes, int64_t step, int64_t count, Count* to) {
#if defined(FB_ISA_AVX2)
  if constexpr (sizeof(Count) == 1) {
    const __m256i byte = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2,
                                          2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
    for (int half = 0; half < 2; ++half) {
      __m256i sum = _mm256_setzero_si256();
      for (int64_t i = 0; i < count; ++i) {
        const int32_t word = static_cast<int32_t>(planes[i * step] >> (32 * half));
        const __m256i spread =
            _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(word), byte), bit);
        const __m256i set = _mm256_cmpeq_epi8(spread, bit);
        sum = _mm256_or_si256(
            sum, _mm256_and_si256(set, _mm256_set1_epi8(static_cast<char>(1 << i))));
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32 * half), sum);
    }
    return;
  }
#elif defined(FB_ISA_AVX512)
  if constexpr (sizeof(Count) == 1) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; ++i)
      sum = _mm512_mask_add_epi8(sum, static_cast<__mmask64>(planes[i * step]), sum,
                                 _mm512_set1_epi8(static_cast<char>(1 << i)));
    _mm512_storeu_si512(to, sum);
    return;
  }
#endif
  for (int c = 0; c < 64; ++c) {
    Count sum = 0;
    for (int64_t i = 0; i < count; ++i)
      sum = static_cast<Count>(sum | static_cast<Count>(planes[i * step] >> c & 1) << i);
    to[c] = sum;
  }
}

template <int kTaps, class W>
FB_INLINE void write_floats(const SignConv& p, const PlanePlan& plan, const PlaneRun& run,
                            int64_t i, int64_t place, int64_t pixel, int64_t word, int32_t sum,
                            void* memory) {
  constexpr int kWords = sizeof(W) / 8;
  using Count = std::conditional_t<(kTaps > 0), uint8_t, uint32_t>;
  W planes[kTaps > 0 ? planes_of(kTaps) : kMostPlanes];
  planes_at<kTaps, W>(plan, run, i, place, planes);
  const int64_t count = kTaps > 0 ? planes_of(kTaps) : plan.planes;
  Count* const counts = static_cast<Count*>(memory);
  uint64_t bits[kWords * (kTaps > 0 ? planes_of(kTaps) : kMostPlanes)];
  std::memcpy(bits, planes, sizeof(W) * static_cast<size_t>(count));
  for (int k = 0; k < kWords; ++k) {
    counts_of_planes<Count>(bits + k, kWords, count, counts);
    const int64_t first = word * kWordBits;
    write_results(p.result, pixel, 1, p.filters, first, std::min(kWordBits, p.channels - first),
                  &sum, static_cast<const Count*>(counts), 0);
    if (++word == p.words) word = 0, ++pixel;
  }
}

// `pixel` is the first of the run; each has p.words words.
template <int kTaps>
FB_INLINE void work_through(const SignConv& p, const PlanePlan& plan, const uint64_t* base,
                            const PlaneRun& run, int64_t pixel, int32_t sum, void* memory) {
  int64_t i = 0, place = 0;
  if (p.result.bits != nullptr) {
    uint64_t* const to = p.result.bits + pixel * p.words;
    for (; i + kPlaneWords <= run.length; i += kPlaneWords) {
      write_bits<kTaps, PlaneVec>(plan, base, run, i, place, to);
      place += kPlaneWords;
      if (place == plan.period) place = 0;
    }
    for (; i < run.length; ++i, ++place)
      write_bits<kTaps, uint64_t>(plan, base, run, i, place, to);
    return;
  }
  int64_t word = 0;
  for (; i + kPlaneWords <= run.length; i += kPlaneWords) {
    write_floats<kTaps, PlaneVec>(p, plan, run, i, place, pixel, word, sum, memory);
    place += kPlaneWords;
    if (place == plan.period) place = 0;
    word += kPlaneWords;
    pixel += word / p.words, word %= p.words;
  }
  for (; i < run.length; ++i, ++place) {
    write_floats<kTaps, uint64_t>(p, plan, run, i, place, pixel, word, sum, memory);
    if (++word == p.words) word = 0, ++pixel;
  }
}

// The pixels [x, x + count) of an output row, which look at the same taps; more than one only at
// stride 1.
template <int kTaps>
__attribute__((noinline)) void plane_pixels(const SignConv& p, const PlanePlan& plan, const uint64_t* base,
                            int64_t image, int64_t y, int64_t x, int64_t count,
                            const uint64_t** taps, const uint64_t** weights, void* memory) {
  const int64_t top = y * p.stride_h - p.pad_h, left = x * p.stride_w - p.pad_w;
  const uint64_t* const padding = base + plan.zeros_at(p.result.bits != nullptr);
  int64_t first_row, last_row, first_column, last_column;
  inside_taps(top, p.kernel_h, p.dilation_h, p.h, first_row, last_row);
  inside_taps(left, p.kernel_w, p.dilation_w, p.w, first_column, last_column);
  for (int64_t i = 0, tap = 0; i < p.kernel_h; ++i) {
    const uint64_t* const row =
        p.bits + ((image * p.h + top + i * p.dilation_h) * p.w + left) * p.words;
    for (int64_t j = 0; j < p.kernel_w; ++j, ++tap) {
      weights[tap] = base + tap * plan.period;
      if (i >= first_row && i < last_row && j >= first_column && j < last_column) {
        taps[tap] = row + j * p.dilation_w * p.words;
      } else {
        taps[tap] = padding;
        if (!p.plus_one) weights[tap] = padding;  // nothing differs
      }
    }
  }
  int64_t rows = last_row - first_row, columns = last_column - first_column;
  if (p.plus_one) rows = p.kernel_h, columns = p.kernel_w;
  PlaneRun run;
  run.taps = taps, run.weights = weights, run.length = count * p.words;
  run.thresholds =
      base + plan.thresholds_at() + (rows * plan.column_classes + columns) * plan.class_words();
  work_through<kTaps>(p, plan, base, run, (image * p.oh + y) * p.ow + x,
                      static_cast<int32_t>(rows * columns), memory);
}

// A whole output row at stride 1, bits to bits. What lies beyond the sides of the map belongs to its
// neighbours in memory, and a mask takes it out. `map` and `weights` are those of each row of taps, the
// first tap of pixel 0; where the row is padded both are 0, and nothing differs. If kSame each vector
// holds the same channels, and what belongs to them stays in registers, of few taps.
template <int kSide, bool kSame>
__attribute__((noinline)) void plane_row(const SignConv& p, const PlanePlan& plan,
                                         const uint64_t* base, int64_t output_row, int64_t rows,
                                         int64_t inner, int64_t outer,
                                         const uint64_t* const (&map)[kSide],
                                         const uint64_t* const (&weights)[kSide]) {
  constexpr int kTaps = kSide * kSide, kPlanes = planes_of(kTaps);
  const int64_t length = p.ow * p.words, column = p.dilation_w * p.words, period = plan.period;
  const uint64_t* const masks = base + plan.row_masks_at(p);
  const uint64_t* const edge_bounds =
      base + plan.row_thresholds_at(p) + rows * plan.row_class_words(p);
  const uint64_t* const bounds =
      base + plan.thresholds_at() +
      (rows * plan.column_classes + plan.column_classes - 1) * plan.class_words();
  const uint64_t* const flips = base + plan.flip_at();
  const uint64_t* const channels = base + plan.mask_at();
  uint64_t* const to = p.result.bits + output_row * length;
  // Weights, bounds, flips and the mask of channels.
  PlaneVec kept[kSame ? kTaps : 1], kept_bounds[kSame ? kPlanes + 1 : 1], kept_flips, kept_mask;
  if constexpr (kSame) {
    FB_UNROLL
    for (int tap = 0; tap < kTaps; ++tap)
      kept[tap] = load_plane<PlaneVec>(weights[tap / kSide] + tap % kSide * period);
    FB_UNROLL
    for (int i = 0; i <= kPlanes; ++i) kept_bounds[i] = load_plane<PlaneVec>(bounds + i * period);
    kept_flips = load_plane<PlaneVec>(flips), kept_mask = load_plane<PlaneVec>(channels);
  }
  const auto map_at = [&](int tap, int64_t i) __attribute__((always_inline)) {
    return load_plane<PlaneVec>(map[tap / kSide] + tap % kSide * column + i);
  };
  const auto weight_at = [&](int tap, int64_t place) __attribute__((always_inline)) {
    if constexpr (kSame) return kept[tap];
    return load_plane<PlaneVec>(weights[tap / kSide] + tap % kSide * period + place);
  };
  const auto work = [&](auto beside_an_edge, int64_t i, int64_t place)
                        __attribute__((always_inline)) {
    constexpr bool kEdge = decltype(beside_an_edge)::value;
    PlaneVec inside[kSide], planes[kPlanes], borrow{};
    FB_UNROLL
    for (int j = 0; kEdge && j < kSide; ++j)
      inside[j] = load_plane<PlaneVec>(masks + j * length + i);
    add_planes<kTaps, PlaneVec>(
        [&](int tap) __attribute__((always_inline)) {
          const PlaneVec a = map_at(tap, i), b = weight_at(tap, place);
          return kEdge ? of_three<kDiffer>(a, b, inside[tap % kSide]) : PlaneVec(a ^ b);
        },
        planes);
    FB_UNROLL
    for (int plane = 0; plane <= kPlanes; ++plane) {
      const PlaneVec bound = kEdge   ? load_plane<PlaneVec>(edge_bounds + plane * length + i)
                             : kSame ? kept_bounds[plane]
                                     : load_plane<PlaneVec>(bounds + plane * period + place);
      borrow = plane < kPlanes ? of_three<kBelow>(planes[plane], bound, borrow) : borrow | bound;
    }
    const PlaneVec flip = kSame ? kept_flips : load_plane<PlaneVec>(flips + place);
    const PlaneVec mask = kSame ? kept_mask : load_plane<PlaneVec>(channels + place);
    store_plane<PlaneVec>(to + i, of_three<kDiffer>(borrow, flip, mask));
  };
  const int64_t first = inner * p.words, last = outer * p.words;  // between them no tap is outside
  const int64_t step = kPlaneWords % p.words;
  for (int64_t i = 0, place = 0; i < length; i += kPlaneWords) {
    if (i + kPlaneWords > length) {  // the last one ends with the row
      i = length - kPlaneWords;
      place = i % p.words;
    }
    if (i < first || i + kPlaneWords > last)
      work(std::true_type{}, i, place);
    else
      work(std::false_type{}, i, place);
    if constexpr (!kSame) {
      place += step;
      if (place >= p.words) place -= p.words;
    }
  }
}

// Output rows that are worked through whole.
template <int kSide>
void whole_rows(const SignConv& p, const PlanePlan& plan, const uint64_t* base, int64_t begin,
                int64_t end, int64_t inner, int64_t outer, uint64_t* copies) {
  const uint64_t* const padding = base + plan.zeros_at(true);
  const int64_t all = p.n * p.h * p.w * p.words, under = plan.under_row(p);
  const auto run = kPlaneWords % p.words == 0 ? &plane_row<kSide, true> : &plane_row<kSide, false>;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t image = at / p.oh, top = at % p.oh * p.stride_h - p.pad_h;
    int64_t first_row, last_row;
    inside_taps(top, p.kernel_h, p.dilation_h, p.h, first_row, last_row);
    const uint64_t *map[kSide], *weights[kSide];
    for (int64_t i = 0; i < kSide; ++i) {
      map[i] = weights[i] = padding;
      if (i < first_row || i >= last_row) continue;
      weights[i] = base + i * kSide * plan.period;
      const int64_t from = ((image * p.h + top + i * p.dilation_h) * p.w - p.pad_w) * p.words;
      map[i] = p.bits + from;
      if (from >= 0 && from + under <= all) continue;
      // Nothing may be read beyond the whole map. What is not copied is masked.
      uint64_t* const copy = copies + i * under;
      const int64_t skipped = std::max<int64_t>(0, -from);
      std::copy(p.bits + from + skipped, p.bits + std::min(all, from + under), copy + skipped);
      map[i] = copy;
    }
    run(p, plan, base, at, last_row - first_row, inner, outer, map, weights);
  }
}

template <int kTaps>
void plane_rows(const SignConv& p, const PlanePlan& plan, const uint64_t* base, void* memory,
                int64_t begin, int64_t end, const uint64_t** taps, const uint64_t** weights) {
  // Pixels at stride 1 whose taps all lie between the sides.
  int64_t inner = std::min(p.ow, p.pad_w);
  int64_t outer = p.w + p.pad_w - (p.kernel_w - 1) * p.dilation_w;
  outer = std::max(inner, std::min(p.ow, outer));
  if (p.stride_w != 1 || outer - inner < 2) inner = outer = p.ow;
  if constexpr (kTaps > 0) {
    if (plan.whole_rows(p))
      return whole_rows<kTaps == 9 ? 3 : 5>(p, plan, base, begin, end, inner, outer,
                                            static_cast<uint64_t*>(memory));
  }
  for (int64_t at = begin; at < end; ++at) {
    const int64_t image = at / p.oh, y = at % p.oh;
    const auto pixels = [&](int64_t x, int64_t count) __attribute__((always_inline)) {
      plane_pixels<kTaps>(p, plan, base, image, y, x, count, taps, weights, memory);
    };
    for (int64_t x = 0; x < inner; ++x) pixels(x, 1);
    if (outer > inner) pixels(inner, outer - inner);
    for (int64_t x = outer; x < p.ow; ++x) pixels(x, 1);
  }
}

inline void planes_run(const SignConv& p, const void* prepared, void* memory, int64_t begin,
                       int64_t end) {
  const PlanePlan plan(p);
  const uint64_t* const base = static_cast<const uint64_t*>(prepared);
  if (plan.taps == 9 || plan.taps == 25) {
    const uint64_t *taps[25], *weights[25];
    if (plan.taps == 9)
      plane_rows<9>(p, plan, base, memory, begin, end, taps, weights);
    else
      plane_rows<25>(p, plan, base, memory, begin, end, taps, weights);
    return;
  }
  const auto taps = std::unique_ptr<const uint64_t*[]>(
      new const uint64_t*[static_cast<size_t>(2 * plan.taps)]);
  plane_rows<0>(p, plan, base, memory, begin, end, taps.get(), taps.get() + plan.taps);
}

inline SignWork planes_work() {
  return {&planes_prepared_bytes, &planes_prepare, &planes_scratch_bytes, &planes_items,
          &planes_run};
}

}  // namespace fastbandit::cpu::FB_ISA
