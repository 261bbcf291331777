// Dense convolution of signs by table look-up, for CPUs with a byte shuffle and no count of bits in
// vectors.
//
// Four channels of a pixel are a number from 0 to 15, four weights of a filter are another one. A row of
// the table, chosen by the first, holds how many of the four differ for each of the second: so one
// shuffle and one addition of bytes do four products of as many filters as a vector has bytes. Bytes
// hold the counts of 63 such steps; then they are added to 16 bits.
//
// The part of the map under a band of pixels is written out as table offsets, one for each step.
// A padded tap of the value 0 is not worked through: pixels that look at the same taps are one class,
// whose steps are the same stretches of offsets beside each pixel and of weights. The tiles of a class
// are worked through 63 steps after another, while offsets, weights and counts stay in the first level
// of the cache.
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

struct DifferenceTable {
  alignas(64) uint8_t rows[16 * kRowBytes] = {};

  constexpr DifferenceTable() {
    for (int a = 0; a < 16; ++a)
      for (int w = 0; w < 16; ++w) {
        const int x = a ^ w;
        rows[a * kRowBytes + w] =
            static_cast<uint8_t>((x & 1) + (x >> 1 & 1) + (x >> 2 & 1) + (x >> 3 & 1));
      }
  }
};
static constexpr DifferenceTable kTable;

// ---- sizes ---------------------------------------------------------------------------------------

constexpr int64_t kMostSteps = 63;  // of 4, in a byte

// The pixels of a tile: as many as leave registers for G vectors of filters of each; and of a smaller
// one, for what is left of a class.
template <int G>
constexpr int kTilePixels = G == 4 ? 2 : G == 2 ? 5 : 8;
template <int G>
constexpr int kLastPixels = G == 4 ? 1 : 2;
constexpr int kMostTile = 8;     // of pixels
constexpr int kMostVectors = 10;  // of a tile: pixels times vectors of filters
using TableTile = SignTile<kMostTile>;

// Steps beside each other: offsets from a pixel of the map on, weights from a step of the filter on.
struct TableRun {
  int64_t map, step, length;
};

struct TablePlan {
  SignConv seen;  // the map as tiles see it; with a padding of +1 all taps of a pixel are one of it
  SignBands bands;
  int64_t steps_of_tap;           // in the map given
  int64_t steps_of_pixel, steps;  // of a pixel of the map seen; of a filter
  int64_t vectors;                // of filters
  int64_t rows, columns;          // of the map seen, under a band

  explicit TablePlan(const SignConv& p) : seen(p), bands(p) {
    steps_of_tap = steps_of_pixel = (p.channels + 3) / 4;
    steps = p.taps() * steps_of_tap;
    vectors = (p.filters + kBytes - 1) / kBytes;
    if (p.plus_one) {
      steps_of_pixel = steps;
      seen.h = p.oh, seen.w = p.ow;
      seen.kernel_h = seen.kernel_w = seen.stride_h = seen.stride_w = 1;
      seen.dilation_h = seen.dilation_w = 1;
      seen.pad_h = seen.pad_w = 0;
    }
    rows = under(bands.rows, seen.kernel_h, seen.stride_h, seen.dilation_h, seen.h);
    columns = under(bands.columns, seen.kernel_w, seen.stride_w, seen.dilation_w, seen.w);
  }

  // The offsets, and what a store of 16 may write past them.
  int64_t runs_at() const { return (rows * columns * steps_of_pixel + 16 + 63) / 64 * 64; }
  int64_t most_runs() const { return seen.taps() + steps / kMostSteps + 2; }
  // The runs, and after which of them bytes are full.
  int64_t tiles_at() const {
    return runs_at() + most_runs() * static_cast<int64_t>(sizeof(TableRun) + sizeof(int64_t));
  }
  int64_t counts_at() const {
    return (tiles_at() + pixels() * static_cast<int64_t>(sizeof(TableTile)) + 63) / 64 * 64;
  }
  int64_t bytes() const { return counts_at() + pixels() * kMostVectors * kBytes * 2; }
  int64_t pixels() const { return bands.pixels(); }

 private:
  static int64_t under(int64_t outputs, int64_t taps, int64_t stride, int64_t dilation,
                       int64_t size) {
    return std::min(size, (outputs - 1) * stride + (taps - 1) * dilation + 1);
  }
};

inline int64_t table_prepared_bytes(const SignConv& p) {
  const TablePlan plan(p);
  return plan.vectors * kBytes * plan.steps;
}
inline int64_t table_scratch_bytes(const SignConv& p) { return TablePlan(p).bytes(); }
inline int64_t table_items(const SignConv& p) { return SignBands(p).items(p); }

// The vectors of filters that are worked through together, of those that are left.
FB_INLINE int64_t group_of(int64_t vectors) { return vectors >= 4 ? 4 : vectors >= 2 ? 2 : 1; }

// ---- weights -------------------------------------------------------------------------------------

// A word of each of 32 filters as 16 vectors of nibbles, the filters side by side.
FB_INLINE void nibbles_of_filters(const uint64_t* const* filter, int64_t at,
                                  __m256i (&nibble)[16]) {
  __m256i a[8], b[8];
  const auto word = [&](int f) __attribute__((always_inline)) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(filter[f] + at));
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

// Weights [group][step][vector of the group][filter], one nibble in a byte. In place of filters past the
// last one that one stands again.
inline void table_prepare(const SignConv& p, void* prepared) {
  const TablePlan plan(p);
  const int64_t filter_words = p.taps() * p.words;
  const int64_t rest = p.channels % 4;
  const __m256i last = _mm256_set1_epi8(static_cast<char>(rest == 0 ? 15 : (1 << rest) - 1));
  uint8_t* const panel = static_cast<uint8_t*>(prepared);
  for (int64_t first = 0, group; first < plan.vectors; first += group) {
    group = group_of(plan.vectors - first);
    const uint64_t* filter[4 * kBytes];
    for (int64_t i = 0; i < group * kBytes; ++i)
      filter[i] = p.weight + std::min(p.filters - 1, first * kBytes + i) * filter_words;
    uint8_t* to = panel + first * kBytes * plan.steps;
    for (int64_t word = 0, of_tap = 0; word < filter_words; ++word) {
      const int64_t count = std::min<int64_t>(16, plan.steps_of_tap - of_tap * 16);
      const bool ends = ++of_tap == p.words;
      if (ends) of_tap = 0;
      for (int64_t part = 0; part < group * kBytes; part += 32) {
        __m256i nibble[16];
        nibbles_of_filters(filter + part, word, nibble);
        if (ends) nibble[count - 1] = _mm256_and_si256(nibble[count - 1], last);
        uint8_t* at = to + part;
        for (int64_t i = 0; i < count; ++i, at += group * kBytes)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), nibble[i]);
      }
      to += count * group * kBytes;
    }
  }
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

// The offsets of the words of a pixel, of +1 for none; whole stores, so that 16 bytes past the end may
// be written.
FB_INLINE uint8_t* offsets_of_pixel(const SignConv& p, int64_t steps, uint64_t last,
                                    const uint64_t* words, uint8_t* to) {
  for (int64_t word = 0; word < p.words; ++word)
    offsets_of_word((words == nullptr ? ~uint64_t{0} : words[word]) &
                        (word + 1 == p.words ? last : ~uint64_t{0}),
                    to + word * 16);
  return to + steps;
}

// The offsets of the part of the map under a band; returns where that is.
inline MapPart write_offsets(const SignConv& p, const TablePlan& plan, const SignBand& band,
                             uint8_t* to) {
  const uint64_t last = last_word_mask(p.channels);
  const uint64_t* const map = p.bits + band.image * p.h * p.w * p.words;
  if (!p.plus_one) {
    const auto begin = [](int64_t first, int64_t stride, int64_t pad) {
      return std::max<int64_t>(0, first * stride - pad);
    };
    const auto end = [](int64_t last_output, int64_t stride, int64_t pad, int64_t taps,
                        int64_t dilation, int64_t size) {
      return std::min(size, (last_output - 1) * stride - pad + (taps - 1) * dilation + 1);
    };
    const int64_t top = begin(band.top, p.stride_h, p.pad_h);
    const int64_t left = begin(band.left, p.stride_w, p.pad_w);
    const int64_t bottom =
        end(band.bottom, p.stride_h, p.pad_h, p.kernel_h, p.dilation_h, p.h);
    const int64_t right = end(band.right, p.stride_w, p.pad_w, p.kernel_w, p.dilation_w, p.w);
    for (int64_t row = top; row < bottom; ++row)
      for (int64_t column = left; column < right; ++column)
        to = offsets_of_pixel(p, plan.steps_of_tap, last, map + (row * p.w + column) * p.words,
                              to);
    return {top, left, std::max<int64_t>(0, right - left)};
  }
  for (int64_t y = band.top; y < band.bottom; ++y)
    for (int64_t x = band.left; x < band.right; ++x)
      for (int64_t i = 0; i < p.kernel_h; ++i)
        for (int64_t j = 0; j < p.kernel_w; ++j) {
          const int64_t row = y * p.stride_h - p.pad_h + i * p.dilation_h;
          const int64_t column = x * p.stride_w - p.pad_w + j * p.dilation_w;
          const bool lies = row >= 0 && row < p.h && column >= 0 && column < p.w;
          to = offsets_of_pixel(p, plan.steps_of_tap, last,
                                lies ? map + (row * p.w + column) * p.words : nullptr, to);
        }
  return {band.top, band.left, band.right - band.left};
}

// The steps of a class as runs, and the run after which bytes are full, for each time they are.
inline int64_t write_runs(const TablePlan& plan, const TableTile& tile, int64_t width,
                          TableRun* runs, int64_t* full) {
  const SignConv& p = plan.seen;
  const int64_t columns = tile.right - tile.left;
  const int64_t all = (tile.bottom - tile.top) * columns * plan.steps_of_pixel;
  const int64_t most = std::max<int64_t>(1, (all + kMostSteps - 1) / kMostSteps);
  const int64_t size = (all + most - 1) / most;
  const int64_t beside = p.dilation_w == 1 ? columns : 1;  // taps of a run
  int64_t count = 0, times = 0, room = size;
  for (int64_t i = tile.top; i < tile.bottom; ++i)
    for (int64_t j = 0; j < columns; j += beside) {
      int64_t left = beside * plan.steps_of_pixel;
      int64_t map = ((i - tile.top) * p.dilation_h * width + j * p.dilation_w) * plan.steps_of_pixel;
      int64_t step = (i * p.kernel_w + tile.left + j) * plan.steps_of_pixel;
      while (left > 0) {
        const int64_t taken = std::min(left, room);
        runs[count++] = {map, step, taken};
        map += taken, step += taken, left -= taken, room -= taken;
        if (room == 0) full[times++] = count, room = size;
      }
    }
  if (room != size || times == 0) full[times++] = count;
  return times;
}

// ---- sums ----------------------------------------------------------------------------------------

enum class Keep { kBytes, kFirst, kMore };  // counts of one chunk only; of the first; of a later one

// G vectors of filters for P pixels, over the steps of some runs.
template <int G, int P, Keep kKeep>
FB_INLINE void count_tile(const TableRun* run, const TableRun* end, const uint8_t* const (&map)[P],
                          const uint8_t* panel, uint8_t* counts) {
  Bytes sum[G][P];
  FB_UNROLL
  for (int g = 0; g < G; ++g) {
    FB_UNROLL
    for (int i = 0; i < P; ++i) sum[g][i] = no_bytes();
  }
  for (; run != end; ++run) {
    const uint8_t* weights = panel + run->step * G * kBytes;
    int64_t at = run->map;
    const int64_t stop = at + run->length;
    const auto row_of = [&](int i) __attribute__((always_inline)) {
      return table_row(kTable.rows + static_cast<size_t>(map[i][at]) * kHalf);
    };
    do {  // a loop that may not run costs gcc a copy of each sum in every round
      if constexpr (G > P) {
        Bytes row[P];
        FB_UNROLL
        for (int i = 0; i < P; ++i) row[i] = row_of(i);
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
        for (int g = 0; g < G; ++g)
          which[g] = load_bytes(weights + g * kBytes), in_register(which[g]);
        FB_UNROLL
        for (int i = 0; i < P; ++i) {
          const Bytes row = row_of(i);
          FB_UNROLL
          for (int g = 0; g < G; ++g) add_to(sum[g][i], look_up(row, which[g]));
        }
      }
      weights += G * kBytes;
    } while (++at != stop);
  }
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

// The tiles of a class and what they are counted with.
struct TableClass {
  const TableTile *begin, *end;
  const uint8_t* map;     // offsets
  int64_t pixel, width;   // from a pixel of the map to the next, in offsets; pixels of a row
  const uint8_t* panel;   // of the group
};

template <int G, Keep kKeep>
void count_class(const TableClass& tiles, const TableRun* run, const TableRun* end,
                 uint8_t* counts) {
  constexpr int P = kTilePixels<G>, L = kLastPixels<G>;
  for (const TableTile* tile = tiles.begin; tile != tiles.end; ++tile) {
    const auto place = [&](int i) __attribute__((always_inline)) {
      // What is past the last pixel is the first one again.
      return tiles.map + tile->place[i < tile->count ? i : 0] * tiles.pixel;
    };
    if (tile->count > L) {
      const uint8_t* map[P];
      FB_UNROLL
      for (int i = 0; i < P; ++i) map[i] = place(i);
      count_tile<G, P, kKeep>(run, end, map, tiles.panel, counts);
    } else {
      const uint8_t* map[L];
      FB_UNROLL
      for (int i = 0; i < L; ++i) map[i] = place(i);
      count_tile<G, L, kKeep>(run, end, map, tiles.panel, counts);
    }
    counts += P * G * kBytes * (kKeep == Keep::kBytes ? 1 : 2);
  }
}

// The results of the filters [first, first + filters) for a class.
template <class Count>
void write_class(const SignConv& p, const TableClass& tiles, int32_t sum, int64_t first,
                 int64_t filters, const Count* counts, int64_t row, int64_t tile_pixels) {
  int32_t sums[kMostTile];
  std::fill(sums, sums + kMostTile, sum);
  for (const TableTile* tile = tiles.begin; tile != tiles.end; ++tile, counts += tile_pixels * row)
    for (int64_t i = 0, next; i < tile->count; i = next) {
      for (next = i + 1; next < tile->count && tile->pixel[next] == tile->pixel[next - 1] + 1;)
        ++next;
      write_results(p.result, tile->pixel[i], next - i, p.filters, first, filters, sums,
                    counts + i * row, row);
    }
}

// The filters of a group for a band.
template <int G>
void run_group(const SignConv& p, const TablePlan& plan, TableClass tiles, const TableTile* end,
               int64_t first, TableRun* runs, uint8_t* counts) {
  constexpr int64_t kRow = G * kBytes;
  int64_t* const full = reinterpret_cast<int64_t*>(runs + plan.most_runs());
  const int64_t filters = std::min(kRow, p.filters - first);
  for (; tiles.begin != end; tiles.begin = tiles.end) {
    const TableTile& tile = *tiles.begin;
    while (tiles.end != end && tiles.end->same_taps(tile)) ++tiles.end;
    const int64_t times = write_runs(plan, tile, tiles.width, runs, full);
    const int64_t taps = (tile.bottom - tile.top) * (tile.right - tile.left);
    const int32_t sum = static_cast<int32_t>((p.plus_one ? p.taps() : taps) * p.channels);
    if (times == 1) {
      count_class<G, Keep::kBytes>(tiles, runs, runs + full[0], counts);
      write_class(p, tiles, sum, first, filters, counts, kRow, kTilePixels<G>);
      continue;
    }
    count_class<G, Keep::kFirst>(tiles, runs, runs + full[0], counts);
    for (int64_t i = 1; i < times; ++i)
      count_class<G, Keep::kMore>(tiles, runs + full[i - 1], runs + full[i], counts);
    write_class(p, tiles, sum, first, filters, reinterpret_cast<const uint16_t*>(counts), kRow,
                kTilePixels<G>);
  }
}

inline void table_run(const SignConv& p, const void* prepared, void* memory, int64_t from,
                      int64_t to) {
  const TablePlan plan(p);
  const uint8_t* const panel = static_cast<const uint8_t*>(prepared);
  uint8_t* const scratch = static_cast<uint8_t*>(memory);
  TableRun* const runs = reinterpret_cast<TableRun*>(scratch + plan.runs_at());
  TableTile* const tiles = reinterpret_cast<TableTile*>(scratch + plan.tiles_at());
  uint8_t* const counts = scratch + plan.counts_at();
  for (int64_t item = from; item < to; ++item) {
    const SignBand band = plan.bands.band(p, item);
    const MapPart part = write_offsets(p, plan, band, scratch);
    TableClass all;
    all.begin = all.end = tiles;
    all.map = scratch, all.pixel = plan.steps_of_pixel, all.width = part.width;
    const TableTile* last = tiles;
    for (int64_t vector = 0, group, before = 0; vector < plan.vectors; vector += group) {
      group = group_of(plan.vectors - vector);
      const int64_t size = group == 4   ? kTilePixels<4>
                           : group == 2 ? kTilePixels<2>
                                        : kTilePixels<1>;
      if (group != before) last = tiles + write_tiles(plan.seen, band, part, tiles, size);
      before = group;
      all.panel = panel + vector * kBytes * plan.steps;
      const auto run = group == 4 ? &run_group<4> : group == 2 ? &run_group<2> : &run_group<1>;
      run(p, plan, all, last, vector * kBytes, runs, counts);
    }
  }
}

inline SignWork table_work() {
  return {&table_prepared_bytes, &table_prepare, &table_scratch_bytes, &table_items, &table_run};
}

}  // namespace fastbandit::cpu::FB_ISA
#endif
