// Dense convolution of signs by counting the bits that differ: where the CPU counts them in vectors
// (AVX-512 VPOPCNTDQ), where it has no byte shuffle, and for filters beyond the 16-bit counts of the
// table.
//
// A vector holds 32 channels of 16 filters each; 32 channels of a pixel go to all of them. The map is
// read where it lies. A padded tap of the value 0 is not worked through: the pixels of a band of rows
// are cut into tiles whose taps inside the map are the same ones, a rectangle of the filter, and the
// sum where nothing differs is that of these taps. Counting only the carries of two words at a time was
// no faster (docs/decisions.md#carries-of-pairs).
#pragma once

#include "cpu/binary/geometry.h"
#include "cpu/binary/result.h"

namespace fastbandit::cpu::FB_ISA {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words of 64 channels are read by halves");

constexpr int kCountLanes = 16;
constexpr int64_t kHalfBits = 32;

#if defined(FB_ISA_AVX512VPOPCNTDQ)
struct HalfVec {
  __m512i v;
};
FB_INLINE HalfVec no_halves() { return {_mm512_setzero_si512()}; }
FB_INLINE HalfVec load_halves(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
FB_INLINE HalfVec to_all(uint32_t half) { return {_mm512_set1_epi32(static_cast<int>(half))}; }
FB_INLINE HalfVec differing(HalfVec a, HalfVec b) { return {_mm512_xor_si512(a.v, b.v)}; }
FB_INLINE HalfVec differing_in(HalfVec mask, HalfVec a, HalfVec b) {
  return {_mm512_ternarylogic_epi64(mask.v, a.v, b.v, 0x60)};  // mask & (a ^ b)
}
FB_INLINE HalfVec add_counts(HalfVec sum, HalfVec bits) {
  return {_mm512_add_epi32(sum.v, _mm512_popcnt_epi32(bits.v))};
}
FB_INLINE void store_counts(uint32_t* to, HalfVec a) { _mm512_storeu_si512(to, a.v); }
#else
// In the vectors of the compiler, with the count that needs no instruction of its own.
struct HalfVec {
  uint32_t v __attribute__((vector_size(4 * kCountLanes)));
};
FB_INLINE HalfVec no_halves() { return {HalfVec{}.v ^ HalfVec{}.v}; }
FB_INLINE HalfVec load_halves(const uint32_t* p) {
  HalfVec a;
  std::memcpy(&a.v, p, sizeof(a.v));
  return a;
}
FB_INLINE HalfVec to_all(uint32_t half) { return {no_halves().v + half}; }
FB_INLINE HalfVec differing(HalfVec a, HalfVec b) { return {a.v ^ b.v}; }
FB_INLINE HalfVec differing_in(HalfVec mask, HalfVec a, HalfVec b) {
  return {mask.v & (a.v ^ b.v)};
}
FB_INLINE HalfVec add_counts(HalfVec sum, HalfVec bits) {
  constexpr uint32_t kPairs = 0x55555555, kFours = 0x33333333, kBytesOfFour = 0x0f0f0f0f;
  auto x = bits.v;
  x = x - (x >> 1 & kPairs);
  x = (x & kFours) + (x >> 2 & kFours);
  x = (x + (x >> 4)) & kBytesOfFour;
  // The sum of the bytes without a multiplication, which vectors of 32 bits may not have.
  x = x + (x >> 8);
  x = (x + (x >> 16)) & 0x3f;
  return {sum.v + x};
}
FB_INLINE void store_counts(uint32_t* to, HalfVec a) { std::memcpy(to, &a.v, sizeof(a.v)); }
#endif

// ---- sizes ---------------------------------------------------------------------------------------

constexpr bool kInRegisters = kIsa == Isa::avx512vpopcntdq;
constexpr int kTile = kInRegisters ? 4 : 2;  // pixels of a tile

using CountTile = SignTile<kTile>;

struct CountPlan {
  SignBands bands;
  int64_t halves, taps;     // of a tap, that hold channels; of a filter
  int64_t pixel, row;       // from a pixel and a row of the map to the next, in halves
  int64_t kernel_w;         // of the filter as it is walked
  int64_t step;             // from a half to the next where a row of taps is one run
  bool run;                 // whether it is one
  bool tail;                // the last half of a tap holds fewer than 32 channels
  int64_t groups;           // of 64 filters

  explicit CountPlan(const SignConv& p) : bands(p) {
    halves = (p.channels + kHalfBits - 1) / kHalfBits;
    taps = p.taps();
    pixel = p.words * 2;
    row = p.w * pixel;
    kernel_w = p.kernel_w;
    run = halves == 1 || (halves == pixel && p.dilation_w == 1);
    step = halves == 1 ? p.dilation_w * pixel : 1;
    tail = p.channels % kHalfBits != 0;
    groups = (p.filters + kWordBits - 1) / kWordBits;
  }

  // Of the weights, by group.
  static int64_t vectors(const SignConv& p, int64_t group) {
    const int64_t filters = std::min(kWordBits, p.filters - group * kWordBits);
    return (filters + kCountLanes - 1) / kCountLanes;
  }
  int64_t weights_of_group() const { return taps * halves * kWordBits; }
  int64_t masks_at(const SignConv& p) const {
    return (groups - 1) * weights_of_group() +
           taps * halves * vectors(p, groups - 1) * kCountLanes;
  }
};

inline int64_t count_prepared_bytes(const SignConv& p) {
  const CountPlan plan(p);
  return (plan.masks_at(p) + (plan.tail ? plan.taps * plan.halves : 0)) * 4;
}
// The tiles of a band, then, where the padding is +1, what lies under the taps of one tile.
inline int64_t count_scratch_bytes(const SignConv& p) {
  const CountPlan plan(p);
  return plan.bands.pixels() * static_cast<int64_t>(sizeof(CountTile)) +
         (p.plus_one ? kTile * plan.taps * plan.halves * 4 : 0);
}
inline int64_t count_items(const SignConv& p) { return SignBands(p).items(p); }

// ---- weights -------------------------------------------------------------------------------------

// transpose_tile of bits, with rows of kCountLanes.
inline void transpose_bits(const uint32_t* from, int64_t from_row, int64_t rows, int64_t columns,
                           uint32_t* to, int64_t to_row) {
#if defined(FB_ISA_AVX512)
  static_assert(kLanes == kCountLanes);
  transpose_tile(reinterpret_cast<const float*>(from), from_row, rows, columns,
                 reinterpret_cast<float*>(to), to_row);  // loads, stores and shuffles alone
#else
  for (int64_t i = 0; i < columns; ++i)
    for (int64_t f = 0; f < kCountLanes; ++f)
      to[i * to_row + f] = f < rows ? from[f * from_row + i] : 0;
#endif
}

// Weights [group][tap][half][vector of the group][filter]; then what of each half counts, where that
// is not all. Of weights past the last channel nothing needs to be known then.
inline void count_prepare(const SignConv& p, void* prepared) {
  const CountPlan plan(p);
  uint32_t* const panel = static_cast<uint32_t*>(prepared);
  const uint32_t* const weight = reinterpret_cast<const uint32_t*>(p.weight);
  const int64_t filter = plan.taps * plan.pixel;
  // Where no half is left out the taps of a filter are one row.
  const bool whole = plan.halves == plan.pixel;
  const int64_t parts = whole ? 1 : plan.taps, length = whole ? filter : plan.halves;
  for (int64_t group = 0; group < plan.groups; ++group) {
    const int64_t vectors = CountPlan::vectors(p, group), row = vectors * kCountLanes;
    for (int64_t vector = 0; vector < vectors; ++vector) {
      const int64_t first = group * kWordBits + vector * kCountLanes;
      const int64_t filters = std::min<int64_t>(kCountLanes, p.filters - first);
      for (int64_t part = 0; part < parts; ++part) {
        const uint32_t* const from = weight + first * filter + part * plan.pixel;
        uint32_t* const to = panel + group * plan.weights_of_group() + vector * kCountLanes +
                             part * plan.halves * row;
        for (int64_t i = 0; i < length; i += kCountLanes)
          transpose_bits(from + i, filter, filters, std::min<int64_t>(kCountLanes, length - i),
                         to + i * row, row);
      }
    }
  }
  if (!plan.tail) return;
  uint32_t* const masks = panel + plan.masks_at(p);
  for (int64_t i = 0; i < plan.taps * plan.halves; ++i)
    masks[i] = (i + 1) % plan.halves == 0 ? (1u << p.channels % kHalfBits) - 1 : ~0u;
}

// ---- tiles ---------------------------------------------------------------------------------------

// What lies under all taps of a tile's pixels, side by side, and +1 where there is no map; and the
// tile of these.
inline CountTile gather(const SignConv& p, const CountPlan& plan, const CountTile& tile,
                        uint32_t* to) {
  CountTile all = tile;
  all.top = all.left = 0, all.bottom = 1, all.right = plan.taps;
  for (int64_t i = 0; i < tile.count; ++i) {
    const int64_t place = tile.pixel[i] % (p.oh * p.ow);
    const int64_t y = place / p.ow * p.stride_h - p.pad_h, x = place % p.ow * p.stride_w - p.pad_w;
    const uint32_t* const map = reinterpret_cast<const uint32_t*>(p.bits) +
                                tile.pixel[i] / (p.oh * p.ow) * p.h * plan.row;
    all.place[i] = i;
    for (int64_t tap = 0; tap < plan.taps; ++tap, to += plan.halves) {
      const int64_t row = y + tap / p.kernel_w * p.dilation_h;
      const int64_t column = x + tap % p.kernel_w * p.dilation_w;
      const bool lies = row >= 0 && row < p.h && column >= 0 && column < p.w;
      for (int64_t half = 0; half < plan.halves; ++half)
        to[half] = lies ? map[row * plan.row + column * plan.pixel + half] : ~0u;
    }
  }
  return all;
}

// ---- sums ----------------------------------------------------------------------------------------

// What a tile is counted with.
struct CountTask {
  const CountPlan* plan;
  const uint32_t* map;
  int64_t pixel;            // of the map, in halves, from one to the next
  int64_t row, column;      // of taps
  const uint32_t* weights;  // of the group
  const uint32_t* masks;
  const SignResult* result;
  int64_t first, filters, all;  // of the group; of all
  int32_t sum;                  // where nothing differs
};

#if defined(FB_ISA_AVX512VPOPCNTDQ)
// The results of a tile whose counts are in registers.
template <int G, int P>
FB_INLINE void write_tile(const CountTask& task, const CountTile& tile,
                          const HalfVec (&differ)[G][P]) {
  const SignResult& result = *task.result;
  const __m512i sum = _mm512_set1_epi32(task.sum);
  const auto dot = [&](HalfVec d) __attribute__((always_inline)) {
    return _mm512_sub_epi32(sum, _mm512_add_epi32(d.v, d.v));
  };
  const auto lanes = [&](int g) __attribute__((always_inline)) {
    const int64_t count = task.filters - g * kCountLanes;
    return static_cast<__mmask16>(count >= kCountLanes ? 0xffffu : (1u << count) - 1);
  };
  if (result.bits != nullptr) {
    uint64_t word[P] = {};
    FB_UNROLL
    for (int g = 0; g < G; ++g) {
      const __m512i threshold = _mm512_maskz_loadu_epi32(
          lanes(g), result.threshold + task.first + g * kCountLanes);
      FB_UNROLL
      for (int i = 0; i < P; ++i)
        word[i] |= static_cast<uint64_t>(
                       _mm512_mask_cmpge_epi32_mask(lanes(g), dot(differ[g][i]), threshold))
                   << g * kCountLanes;
    }
    const int64_t at = task.first / kWordBits, words = sign_words(task.all);
    const uint64_t mask = last_word_mask(task.filters);
    for (int i = 0; i < P; ++i)
      result.bits[tile.pixel[i] * words + at] = (word[i] ^ result.flips[at]) & mask;
    return;
  }
  const float* const scale = static_cast<const float*>(result.scale) + task.first;
  const float* const bias = static_cast<const float*>(result.bias) + task.first;
  FB_UNROLL
  for (int g = 0; g < G; ++g) {
    const __mmask16 inside = lanes(g);
    const __m512 factor = _mm512_maskz_loadu_ps(inside, scale + g * kCountLanes);
    const __m512 shift = _mm512_maskz_loadu_ps(inside, bias + g * kCountLanes);
    FB_UNROLL
    for (int i = 0; i < P; ++i) {
      float* const to = static_cast<float*>(result.values) + tile.pixel[i] * task.all +
                        task.first + g * kCountLanes;
      const __m512 product = _mm512_mul_ps(factor, _mm512_cvtepi32_ps(dot(differ[g][i])));
      const __m512 y = _mm512_add_ps(product, shift);
      if (inside == 0xffff)
        _mm512_storeu_ps(to, y);
      else
        _mm512_mask_storeu_ps(to, inside, y);
    }
  }
}
#endif

// The results of a tile from counts of 64 filters for each pixel, where not made in registers.
inline void write_counts(const CountTask& task, const CountTile& tile, const uint32_t* counts) {
  for (int64_t i = 0; i < tile.count; ++i)
    write_results(*task.result, tile.pixel[i], 1, task.all, task.first, task.filters, &task.sum,
                  counts + i * kWordBits, kWordBits);
}

// G vectors of `vectors` for the P pixels of a tile, from the vector `from` on.
template <int G, int P, bool kTail>
void count_tile(const CountTask& task, const CountTile& tile, int64_t vectors, int64_t from,
                uint32_t* counts) {
  const CountPlan& plan = *task.plan;
  HalfVec sum[G][P];
  FB_UNROLL
  for (int g = 0; g < G; ++g) {
    FB_UNROLL
    for (int i = 0; i < P; ++i) sum[g][i] = no_halves();
  }
  const uint32_t* map[P];
  FB_UNROLL
  for (int i = 0; i < P; ++i) map[i] = task.map + tile.place[i] * task.pixel;
  const int64_t weight_step = vectors * kCountLanes;
  const int64_t columns = tile.right - tile.left;
  const int64_t runs = plan.run ? 1 : columns;
  const int64_t length = plan.run ? columns * plan.halves : plan.halves;
  for (int64_t tap_row = tile.top; tap_row < tile.bottom; ++tap_row)
    for (int64_t run = 0; run < runs; ++run) {
      const int64_t first = (tap_row * plan.kernel_w + tile.left + run) * plan.halves;
      const uint32_t* weights = task.weights + first * weight_step + from * kCountLanes;
      const uint32_t* masks = task.masks + first;
      int64_t at = (tap_row - tile.top) * task.row + run * task.column;
      for (int64_t i = 0; i < length; ++i, at += plan.step, weights += weight_step) {
        HalfVec weight[G];
        FB_UNROLL
        for (int g = 0; g < G; ++g) weight[g] = load_halves(weights + g * kCountLanes);
        const HalfVec mask = kTail ? to_all(masks[i]) : weight[0];
        FB_UNROLL
        for (int j = 0; j < P; ++j) {
          const HalfVec half = to_all(map[j][at]);
          FB_UNROLL
          for (int g = 0; g < G; ++g)
            sum[g][j] = add_counts(sum[g][j], kTail ? differing_in(mask, half, weight[g])
                                                    : differing(half, weight[g]));
        }
      }
    }
#if defined(FB_ISA_AVX512VPOPCNTDQ)
  if (counts == nullptr) return write_tile<G, P>(task, tile, sum);
#endif
  FB_UNROLL
  for (int j = 0; j < P; ++j) {
    FB_UNROLL
    for (int g = 0; g < G; ++g)
      store_counts(counts + j * kWordBits + (from + g) * kCountLanes, sum[g][j]);
  }
}

using CountFunction = void (*)(const CountTask&, const CountTile&, int64_t vectors, int64_t from,
                               uint32_t* counts);

template <int G, bool kTail>
CountFunction count_of_pixels(int64_t pixels) {
  if constexpr (kTile > 2) {
    if (pixels == 4) return &count_tile<G, 4, kTail>;
    if (pixels == 3) return &count_tile<G, 3, kTail>;
  }
  return pixels == 2 ? &count_tile<G, 2, kTail> : &count_tile<G, 1, kTail>;
}

// The counts of a group of 64 filters, or the last ones, for a tile.
template <bool kTail>
void count_group_of(const CountTask& task, const CountTile& tile, int64_t vectors,
                    uint32_t* counts) {
  if constexpr (kInRegisters) {
    const CountFunction count = vectors == 4   ? count_of_pixels<4, kTail>(tile.count)
                                : vectors == 3 ? count_of_pixels<3, kTail>(tile.count)
                                : vectors == 2 ? count_of_pixels<2, kTail>(tile.count)
                                               : count_of_pixels<1, kTail>(tile.count);
    count(task, tile, vectors, 0, counts);
  } else {
    for (int64_t from = 0; from < vectors; ++from)
      count_of_pixels<1, kTail>(tile.count)(task, tile, vectors, from, counts);
  }
}

inline void count_run(const SignConv& p, const void* prepared, void* memory, int64_t from,
                      int64_t to) {
  const CountPlan plan(p);
  const uint32_t* const panel = static_cast<const uint32_t*>(prepared);
  CountTile* const tiles = static_cast<CountTile*>(memory);
  uint32_t* const gathered = reinterpret_cast<uint32_t*>(tiles + plan.bands.pixels());
  CountPlan side = plan;  // taps side by side
  side.kernel_w = plan.taps, side.run = true, side.step = 1;
  CountTask task;
  task.plan = p.plus_one ? &side : &plan;
  task.map = p.plus_one ? gathered : reinterpret_cast<const uint32_t*>(p.bits);
  task.pixel = p.plus_one ? plan.taps * plan.halves : plan.pixel;
  task.row = p.dilation_h * plan.row, task.column = p.dilation_w * plan.pixel;
  task.masks = panel + plan.masks_at(p);
  task.result = &p.result;
  task.all = p.filters;
  uint32_t kept[kTile * kWordBits];
  const bool in_registers =
      kInRegisters && (p.result.bits != nullptr || p.result.type == Real::kFloat32);
  uint32_t* const counts = in_registers ? nullptr : kept;
  const auto count = [&](const CountTile& tile, int64_t group) {
    task.weights = panel + group * plan.weights_of_group();
    task.first = group * kWordBits;
    task.filters = std::min(kWordBits, p.filters - task.first);
    task.sum = static_cast<int32_t>((tile.bottom - tile.top) * (tile.right - tile.left) *
                                    p.channels);
    (plan.tail ? count_group_of<true> : count_group_of<false>)(
        task, tile, CountPlan::vectors(p, group), counts);
    if (counts != nullptr) write_counts(task, tile, counts);
  };
  for (int64_t item = from; item < to; ++item) {
    const SignBand band = plan.bands.band(p, item);
    const int64_t number = write_tiles(p, band, {-band.image * p.h, 0, p.w}, tiles);
    if (p.plus_one) {
      for (int64_t at = 0; at < number; ++at) {
        const CountTile tile = gather(p, plan, tiles[at], gathered);
        for (int64_t group = 0; group < plan.groups; ++group) count(tile, group);
      }
    } else {
      for (int64_t group = 0; group < plan.groups; ++group)
        for (int64_t at = 0; at < number; ++at) count(tiles[at], group);
    }
  }
}

inline SignWork count_work() {
  return {&count_prepared_bytes, &count_prepare, &count_scratch_bytes, &count_items, &count_run};
}

}  // namespace fastbandit::cpu::FB_ISA
