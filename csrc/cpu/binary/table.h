// Dense convolution of signs by table look-up, for CPUs with a byte shuffle and no count of bits in
// vectors.
//
// Four channels of a pixel are a number from 0 to 15, four weights of a filter are another one. A row of
// the table, chosen by the first, holds how many of the four differ for each of the second: so one
// shuffle and one addition of bytes do four products of as many filters as a vector has bytes. Zero
// padding is a row of the constant 2, which adds as much as it takes away. Bytes hold the counts of 63
// such steps; then they are added to 16 bits.
//
// A block of pixels is written out as rows of table offsets, one for each step, so that the inner loop
// knows neither taps nor edges; then all filters are worked through, a chunk of 63 steps after another,
// while offsets, weights and counts stay in the first level of the cache.
#pragma once

#include "cpu/binary/geometry.h"
#include "cpu/binary/result.h"

#if defined(FB_ISA_AVX512) || defined(FB_ISA_AVX2)
namespace fastbandit::cpu::FB_ISA {

#if defined(FB_ISA_AVX512)
constexpr int kBytes = 64;
struct Bytes {
  __m512i v;
};
FB_INLINE Bytes no_bytes() { return {_mm512_setzero_si512()}; }
FB_INLINE Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
FB_INLINE void store_bytes(uint8_t* p, Bytes a) { _mm512_storeu_si512(p, a.v); }
FB_INLINE Bytes table_row(const uint8_t* p) {
  return {_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
FB_INLINE Bytes look_up(Bytes row, Bytes which) { return {_mm512_shuffle_epi8(row.v, which.v)}; }
FB_INLINE void add_to(Bytes& sum, Bytes a) { sum.v = _mm512_add_epi8(sum.v, a.v); }
FB_INLINE void in_register(Bytes&) {}
template <bool kFirst>
FB_INLINE void add_to_words(uint16_t* to, Bytes a) {
  FB_UNROLL
  for (int half = 0; half < 2; ++half) {
    __m512i wide = _mm512_cvtepu8_epi16(half ? _mm512_extracti64x4_epi64(a.v, 1)
                                             : _mm512_castsi512_si256(a.v));
    if (!kFirst) wide = _mm512_add_epi16(wide, _mm512_loadu_si512(to + 32 * half));
    _mm512_storeu_si512(to + 32 * half, wide);
  }
}
#else
constexpr int kBytes = 32;
struct Bytes {
  __m256i v;
};
FB_INLINE Bytes no_bytes() { return {_mm256_setzero_si256()}; }
FB_INLINE Bytes load_bytes(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
FB_INLINE void store_bytes(uint8_t* p, Bytes a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v);
}
FB_INLINE Bytes table_row(const uint8_t* p) {
  return {_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
FB_INLINE Bytes look_up(Bytes row, Bytes which) { return {_mm256_shuffle_epi8(row.v, which.v)}; }
// With the intrinsic gcc adds into another register and copies it back, and reads a vector of weights
// from memory for each pixel: a third of the loop.
FB_INLINE void add_to(Bytes& sum, Bytes a) {
  asm("vpaddb %1, %0, %0" : "+x"(sum.v) : "x"(a.v));
}
FB_INLINE void in_register(Bytes& a) { asm("" : "+x"(a.v)); }
template <bool kFirst>
FB_INLINE void add_to_words(uint16_t* to, Bytes a) {
  FB_UNROLL
  for (int half = 0; half < 2; ++half) {
    __m256i wide = _mm256_cvtepu8_epi16(half ? _mm256_extracti128_si256(a.v, 1)
                                             : _mm256_castsi256_si128(a.v));
    __m256i* const at = reinterpret_cast<__m256i*>(to + 16 * half);
    if (!kFirst) wide = _mm256_add_epi16(wide, _mm256_loadu_si256(at));
    _mm256_storeu_si256(at, wide);
  }
}
#endif

// ---- the table -----------------------------------------------------------------------------------

constexpr int kHalf = 2;  // an offset of the table in a byte, times this
constexpr int kRowBytes = 16;
constexpr int kTwo = 16, kOne = 17, kNone = 18;  // rows that count 2, 1 and 0 whatever the weights
constexpr uint8_t offset_of_row(int row) {
  return static_cast<uint8_t>(row * kRowBytes / kHalf);
}

// As long as any byte can reach: what lies past a block's last pixel is looked up too, for nothing.
struct DifferenceTable {
  alignas(64) uint8_t rows[kHalf * 255 + kRowBytes + 2] = {};

  constexpr DifferenceTable() {
    for (int a = 0; a < 16; ++a)
      for (int w = 0; w < 16; ++w) {
        const int x = a ^ w;
        rows[a * kRowBytes + w] =
            static_cast<uint8_t>((x & 1) + (x >> 1 & 1) + (x >> 2 & 1) + (x >> 3 & 1));
      }
    for (int w = 0; w < 16; ++w) {
      rows[kTwo * kRowBytes + w] = 2;
      rows[kOne * kRowBytes + w] = 1;
    }
  }
};
static constexpr DifferenceTable kTable;

// ---- sizes ---------------------------------------------------------------------------------------

constexpr int64_t kBlock = 64;      // pixels of a block
constexpr int64_t kSpare = 8;       // a block is worked through in tiles of at most this
constexpr int64_t kMostSteps = 63;  // of 4, in a byte
constexpr int64_t kOffsets = 64;    // bytes between the offsets of two pixels

struct TablePlan {
  SignBlocks blocks;
  int64_t steps_of_tap, tap_bytes;  // steps of a tap; bytes of a pixel of the map, in offsets
  int64_t steps, chunks, chunk;     // all steps; how they are cut
  int64_t vectors;                  // of filters
  int64_t chunk_bytes, rows;        // offsets of a chunk; rows of the map under a block

  explicit TablePlan(const SignConv& p) : blocks(p, kBlock) {
    steps_of_tap = (p.channels + 3) / 4;
    tap_bytes = p.words * 16;
    steps = p.taps() * steps_of_tap;
    chunks = (steps + kMostSteps - 1) / kMostSteps;
    chunk = (steps + chunks - 1) / chunks;
    chunks = (steps + chunk - 1) / chunk;
    vectors = (p.filters + kBytes - 1) / kBytes;
    chunk_bytes = (blocks.size + kSpare) * kOffsets + 64;
    const int64_t out_rows = std::min(p.oh, blocks.size / p.ow + 2);
    rows = std::min(p.h, (out_rows - 1) * p.stride_h + (p.kernel_h - 1) * p.dilation_h + 1);
  }

  int64_t map_at() const { return chunks * chunk_bytes; }
  int64_t sums_at() const { return map_at() + (rows * blocks_width() + 64 + 63) / 64 * 64; }
  int64_t counts_at() const { return sums_at() + ((blocks.size + kSpare) * 4 + 63) / 64 * 64; }
  int64_t bytes() const { return counts_at() + (blocks.size + kSpare) * 4 * kBytes * 2; }

  int64_t width = 0;  // of the map
  int64_t blocks_width() const { return width * tap_bytes; }
};

FB_INLINE TablePlan table_plan(const SignConv& p) {
  TablePlan plan(p);
  plan.width = p.w;
  return plan;
}

inline int64_t table_prepared_bytes(const SignConv& p) {
  const TablePlan plan(p);
  return plan.vectors * kBytes * plan.steps + 2 * plan.tap_bytes + 64;
}
inline int64_t table_scratch_bytes(const SignConv& p) { return table_plan(p).bytes(); }
inline int64_t table_items(const SignConv& p) { return TablePlan(p).blocks.count; }

// The vectors of filters that are worked through together, of those that are left.
FB_INLINE int64_t group_of(int64_t vectors) { return vectors >= 4 ? 4 : vectors >= 2 ? 2 : 1; }

// ---- weights -------------------------------------------------------------------------------------

// A word of each of 32 filters as 16 vectors of nibbles, the filters side by side.
FB_INLINE void nibbles_of_filters(const uint64_t* const (&filter)[32], __m256i (&nibble)[16]) {
  __m256i a[8], b[8];
  const auto word = [&](int f) __attribute__((always_inline)) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(filter[f]));
  };
  const auto both = [&](int f) __attribute__((always_inline)) {
    return _mm256_set_m128i(word(f + 16), word(f));
  };
  // A byte of rows i and i + 8, then of every fourth, of every second, of all 16 rows of a lane.
  FB_UNROLL
  for (int i = 0; i < 8; ++i) a[i] = _mm256_unpacklo_epi8(both(i), both(i + 8));
  FB_UNROLL
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm256_unpacklo_epi8(a[i], a[i + 4]);
    b[i + 4] = _mm256_unpackhi_epi8(a[i], a[i + 4]);
  }
  FB_UNROLL
  for (int half = 0; half < 2; ++half) {
    FB_UNROLL
    for (int i = 0; i < 2; ++i) {
      a[half * 4 + i] = _mm256_unpacklo_epi8(b[half * 4 + i], b[half * 4 + i + 2]);
      a[half * 4 + i + 2] = _mm256_unpackhi_epi8(b[half * 4 + i], b[half * 4 + i + 2]);
    }
  }
  const __m256i low = _mm256_set1_epi8(15);
  FB_UNROLL
  for (int pair = 0; pair < 4; ++pair) {
    const __m256i first = a[pair * 2], second = a[pair * 2 + 1];
    const __m256i bytes[2] = {_mm256_unpacklo_epi8(first, second),
                              _mm256_unpackhi_epi8(first, second)};
    FB_UNROLL
    for (int i = 0; i < 2; ++i) {
      nibble[pair * 4 + i * 2] = _mm256_and_si256(bytes[i], low);
      nibble[pair * 4 + i * 2 + 1] = _mm256_and_si256(_mm256_srli_epi16(bytes[i], 4), low);
    }
  }
}

// Weights [group][step][vector of the group][filter], one nibble in a byte; then the offsets of a
// padded tap.
inline void table_prepare(const SignConv& p, void* prepared) {
  const TablePlan plan(p);
  static const uint64_t nothing = 0;
  const int64_t filter_words = p.taps() * p.words;
  const int64_t rest = p.channels % 4;
  const __m256i last = _mm256_set1_epi8(static_cast<char>(rest == 0 ? 15 : (1 << rest) - 1));
  uint8_t* const panel = static_cast<uint8_t*>(prepared);
  for (int64_t first = 0, group; first < plan.vectors; first += group) {
    group = group_of(plan.vectors - first);
    uint8_t* const to = panel + first * kBytes * plan.steps;
    for (int64_t part = 0; part < group * kBytes; part += 32)
      for (int64_t tap = 0; tap < p.taps(); ++tap)
        for (int64_t word = 0; word < p.words; ++word) {
          const uint64_t* filter[32];
          for (int i = 0; i < 32; ++i) {
            const int64_t f = first * kBytes + part + i;
            filter[i] =
                f < p.filters ? p.weight + f * filter_words + tap * p.words + word : &nothing;
          }
          __m256i nibble[16];
          nibbles_of_filters(filter, nibble);
          const int64_t count = std::min<int64_t>(16, plan.steps_of_tap - word * 16);
          uint8_t* at = to + (tap * plan.steps_of_tap + word * 16) * group * kBytes + part;
          for (int64_t i = 0; i < count; ++i, at += group * kBytes) {
            const bool ends = word * 16 + i + 1 == plan.steps_of_tap;
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(at),
                                ends ? _mm256_and_si256(nibble[i], last) : nibble[i]);
          }
        }
  }
  uint8_t* const padding = panel + plan.vectors * kBytes * plan.steps;
  for (int64_t i = 0; i < plan.steps_of_tap; ++i)
    padding[i] = offset_of_row(p.plus_one ? 15 : kTwo);
  if (rest != 0)
    padding[plan.steps_of_tap - 1] =
        offset_of_row(p.plus_one ? (1 << rest) - 1 : rest == 1 ? kNone : kOne);
}

// ---- offsets -------------------------------------------------------------------------------------

// A word of channels as 16 table offsets.
FB_INLINE void offsets_of_word(uint64_t word, uint8_t* to) {
  const __m128i bytes = _mm_cvtsi64_si128(static_cast<int64_t>(word));
  const __m128i mask = _mm_set1_epi8(15);
  const __m128i low = _mm_and_si128(bytes, mask);
  const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  static_assert(kRowBytes / kHalf == 8, "a nibble times 8 is its offset");
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm_slli_epi16(_mm_unpacklo_epi8(low, high), 3));
}

// Writes the steps of one pixel, one stretch after another, over the chunks.
struct OffsetWriter {
  uint8_t* to;
  int64_t chunk, chunk_bytes, room;

  // Copies whole vectors: what follows is written later, or belongs to nobody.
  FB_INLINE void put(const uint8_t* from, int64_t count) {
    while (count > room) {
      copy(from, room);
      from += room, count -= room;
      to += chunk_bytes - (chunk - room), room = chunk;
    }
    copy(from, count);
    to += count, room -= count;
  }

 private:
  FB_INLINE void copy(const uint8_t* from, int64_t count) const {
    for (int64_t i = 0; i < count; i += 16)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
  }
};

// The offsets of the output pixels [begin, end), and the sum of each where nothing differs.
inline void write_offsets(const SignConv& p, const TablePlan& plan, const uint8_t* padding,
                          int64_t begin, int64_t end, uint8_t* scratch) {
  uint8_t* const map = scratch + plan.map_at();
  int32_t* const sums = reinterpret_cast<int32_t*>(scratch + plan.sums_at());
  const uint64_t last = last_word_mask(p.channels);
  const int64_t row_bytes = p.w * plan.tap_bytes;
  const int64_t all = p.taps() * p.channels;
  // A padded tap of an odd number of channels counts half a difference less than half of them.
  const int32_t less = !p.plus_one && p.channels % 2 == 1 ? 1 : 0;
  const bool whole = p.dilation_w == 1 && plan.steps_of_tap == plan.tap_bytes;
  if (p.taps() == 1 && p.stride_h == 1 && p.stride_w == 1 && p.pad_h == 0 && p.pad_w == 0) {
    const uint64_t* words = p.bits + begin * p.words;
    for (int64_t at = 0; at < end - begin; ++at, words += p.words) {
      for (int64_t word = 0; word < p.words; ++word)
        offsets_of_word(words[word] & (word + 1 == p.words ? last : ~uint64_t{0}),
                        map + word * 16);
      OffsetWriter{scratch + at * kOffsets, plan.chunk, plan.chunk_bytes, plan.chunk}.put(
          map, plan.steps);
      sums[at] = static_cast<int32_t>(all);
    }
    return;
  }
  int64_t image = -1, from_row = 0, to_row = 0;  // the rows of the map that are written out
  for_pixels(p, begin, end, [&](int64_t n, int64_t y, int64_t x, int64_t at)
                                __attribute__((always_inline)) {
    const int64_t top = y * p.stride_h - p.pad_h, left = x * p.stride_w - p.pad_w;
    if (n != image) {
      image = n;
      // Down to the last output row of this block in this image.
      const int64_t last_y = std::min(p.oh - 1, y + (x + end - begin - at - 1) / p.ow);
      from_row = std::max<int64_t>(0, top);
      to_row = std::min(p.h, last_y * p.stride_h - p.pad_h + (p.kernel_h - 1) * p.dilation_h + 1);
      for (int64_t row = from_row; row < to_row; ++row) {
        const uint64_t* const words = p.bits + (n * p.h + row) * p.w * p.words;
        uint8_t* to = map + (row - from_row) * row_bytes;
        for (int64_t i = 0; i < p.w; ++i)
          for (int64_t word = 0; word < p.words; ++word, to += 16)
            offsets_of_word(words[i * p.words + word] & (word + 1 == p.words ? last : ~uint64_t{0}),
                            to);
      }
    }
    OffsetWriter writer{scratch + at * kOffsets, plan.chunk, plan.chunk_bytes, plan.chunk};
    int64_t first, stop, padded = 0;
    inside_taps(left, p.kernel_w, p.dilation_w, p.w, first, stop);
    for (int64_t i = 0; i < p.kernel_h; ++i) {
      const int64_t row = top + i * p.dilation_h;
      if (row < 0 || row >= p.h) {
        for (int64_t j = 0; j < p.kernel_w; ++j) writer.put(padding, plan.steps_of_tap);
        padded += p.kernel_w;
        continue;
      }
      const uint8_t* const from = map + (row - from_row) * row_bytes + left * plan.tap_bytes;
      for (int64_t j = 0; j < first; ++j) writer.put(padding, plan.steps_of_tap);
      if (whole) {
        writer.put(from + first * plan.tap_bytes, (stop - first) * plan.steps_of_tap);
      } else {
        for (int64_t j = first; j < stop; ++j)
          writer.put(from + j * p.dilation_w * plan.tap_bytes, plan.steps_of_tap);
      }
      for (int64_t j = stop; j < p.kernel_w; ++j) writer.put(padding, plan.steps_of_tap);
      padded += p.kernel_w - (stop - first);
    }
    sums[at] = static_cast<int32_t>(all) - less * static_cast<int32_t>(padded);
  });
}

// ---- sums ----------------------------------------------------------------------------------------

enum class Keep { kBytes, kFirst, kMore };  // counts of one chunk only; of the first; of a later one

// G vectors of filters for P pixels, over the steps of a chunk.
template <int G, int P, Keep kKeep>
FB_INLINE void count_tile(int64_t steps, const uint8_t* offsets, const uint8_t* weights,
                          uint8_t* counts) {
  Bytes sum[G][P];
  FB_UNROLL
  for (int g = 0; g < G; ++g) {
    FB_UNROLL
    for (int i = 0; i < P; ++i) sum[g][i] = no_bytes();
  }
  const uint8_t* const end = offsets + steps;
  do {  // a loop that may not run costs gcc a copy of each sum in every round
    if constexpr (G > P) {
      Bytes row[P];
      FB_UNROLL
      for (int i = 0; i < P; ++i)
        row[i] = table_row(kTable.rows + static_cast<size_t>(offsets[i * kOffsets]) * kHalf);
      FB_UNROLL
      for (int g = 0; g < G; ++g) {
        Bytes which = load_bytes(weights + g * kBytes);
        in_register(which);
        FB_UNROLL
        for (int i = 0; i < P; ++i) add_to(sum[g][i], look_up(row[i], which));
      }
    } else {
      Bytes which[G];
      FB_UNROLL
      for (int g = 0; g < G; ++g) which[g] = load_bytes(weights + g * kBytes), in_register(which[g]);
      FB_UNROLL
      for (int i = 0; i < P; ++i) {
        const Bytes row =
            table_row(kTable.rows + static_cast<size_t>(offsets[i * kOffsets]) * kHalf);
        FB_UNROLL
        for (int g = 0; g < G; ++g) add_to(sum[g][i], look_up(row, which[g]));
      }
    }
    weights += G * kBytes;
  } while (++offsets != end);
  FB_UNROLL
  for (int i = 0; i < P; ++i) {
    FB_UNROLL
    for (int g = 0; g < G; ++g) {
      const int64_t at = (i * G + g) * kBytes;
      if constexpr (kKeep == Keep::kBytes)
        store_bytes(counts + at, sum[g][i]);
      else
        add_to_words<kKeep == Keep::kFirst>(reinterpret_cast<uint16_t*>(counts) + at, sum[g][i]);
    }
  }
}

// The pixels of a tile: as many as leave registers for G vectors of each.
template <int G>
constexpr int kTilePixels = G == 4 ? 2 : G == 2 ? 5 : 8;

template <int G, Keep kKeep>
void count_chunk(int64_t pixels, int64_t steps, const uint8_t* offsets, const uint8_t* weights,
                 uint8_t* counts) {
  constexpr int P = kTilePixels<G>;
  constexpr int64_t kSize = kKeep == Keep::kBytes ? 1 : 2;
  for (int64_t at = 0; at < pixels; at += P)
    count_tile<G, P, kKeep>(steps, offsets + at * kOffsets, weights,
                            counts + at * G * kBytes * kSize);
}

// The counts of G vectors of filters for a block.
template <int G>
void count_group(const TablePlan& plan, int64_t pixels, const uint8_t* offsets,
                 const uint8_t* weights, uint8_t* counts) {
  if (plan.chunks == 1)
    return count_chunk<G, Keep::kBytes>(pixels, plan.steps, offsets, weights, counts);
  count_chunk<G, Keep::kFirst>(pixels, plan.chunk, offsets, weights, counts);
  for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) {
    offsets += plan.chunk_bytes, weights += plan.chunk * G * kBytes;
    const int64_t steps = std::min(plan.chunk, plan.steps - chunk * plan.chunk);
    count_chunk<G, Keep::kMore>(pixels, steps, offsets, weights, counts);
  }
}

inline void table_run(const SignConv& p, const void* prepared, void* memory, int64_t from,
                      int64_t to) {
  const TablePlan plan = table_plan(p);
  const uint8_t* const panel = static_cast<const uint8_t*>(prepared);
  const uint8_t* const padding = panel + plan.vectors * kBytes * plan.steps;
  uint8_t* const scratch = static_cast<uint8_t*>(memory);
  const int32_t* const sums = reinterpret_cast<const int32_t*>(scratch + plan.sums_at());
  uint8_t* const counts = scratch + plan.counts_at();
  for (int64_t block = from; block < to; ++block) {
    const int64_t begin = plan.blocks.begin(block), pixels = plan.blocks.end(block) - begin;
    write_offsets(p, plan, padding, begin, begin + pixels, scratch);
    for (int64_t vector = 0, group; vector < plan.vectors; vector += group) {
      group = group_of(plan.vectors - vector);
      const auto count = group == 4   ? &count_group<4>
                         : group == 2 ? &count_group<2>
                                      : &count_group<1>;
      count(plan, pixels, scratch, panel + vector * kBytes * plan.steps, counts);
      const int64_t first = vector * kBytes, row = group * kBytes;
      const int64_t filters = std::min(row, p.filters - first);
      if (plan.chunks == 1)
        write_results(p.result, begin, pixels, p.filters, first, filters, sums, counts, row);
      else
        write_results(p.result, begin, pixels, p.filters, first, filters, sums,
                      reinterpret_cast<const uint16_t*>(counts), row);
    }
  }
}

inline SignWork table_work() {
  return {&table_prepared_bytes, &table_prepare, &table_scratch_bytes, &table_items, &table_run};
}

}  // namespace fastbandit::cpu::FB_ISA
#endif
