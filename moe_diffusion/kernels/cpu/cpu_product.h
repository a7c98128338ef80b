// A blocked product of two f32 matrices: tiles of results in registers, copies of blocks.
//
// After Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication (2008): blocks of
// both operands are copied so that they lie as they are read, and a tile of results stays in
// registers.

#pragma once

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

namespace {

using Index = int64_t;

// A tile of results takes kRows x kVectors registers and leaves enough for kVectors of the right
// operand and one number of the left.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectors = 2, kRows = 14;
#elif defined(__AVX__)
constexpr int kLanes = 8, kVectors = 2, kRows = 6;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kVectors = 4, kRows = 6;
#else
constexpr int kLanes = 4, kVectors = 2, kRows = 6;
#endif
constexpr int kColumns = kLanes * kVectors;

constexpr Index parts(Index total, Index each) { return (total + each - 1) / each; }

// Blocks of the right operand, kDepth x kWide (512 KB), and of the left, kTall x kDepth (224 KB),
// share the L2 cache.
constexpr Index kDepth = 256, kWide = 512, kTall = 224;
constexpr Index kPitch = kDepth + 16;  // from one of the left block's rows to the next
constexpr int kStep = (kRows + kLanes - 1) / kLanes * kLanes;  // the same where it lies turned
// From one panel of kColumns columns, or of kRows turned rows, to the next. At a power of 2 all
// panels would share a few lines of the L1 cache.
constexpr Index panel(Index depth, Index width) { return depth * width + 32; }

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef float Anywhere __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Anywhere*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Anywhere*>(to) = value; }

// ---- a tile of results -------------------------------------------------------------------------

// tile(m, n) = the sum over k < depth of left[m * kDown + k * kAlong] right[k * kColumns + n].
template <int kNum, Index kDown, Index kAlong>
void multiply(Index depth, const float* left, const float* right, float* tile) {
  Vector sum[kNum][kVectors] = {};
  for (Index k = 0; k < depth; ++k) {
    Vector columns[kVectors];
    UNROLL for (int v = 0; v < kVectors; ++v) columns[v] = load(right + k * kColumns + v * kLanes);
    UNROLL for (int m = 0; m < kNum; ++m) {
      const float number = left[m * kDown + k * kAlong];
      UNROLL for (int v = 0; v < kVectors; ++v) sum[m][v] += number * columns[v];
    }
  }
  UNROLL for (int m = 0; m < kNum; ++m)
    UNROLL for (int v = 0; v < kVectors; ++v) store(tile + m * kColumns + v * kLanes, sum[m][v]);
}

using Multiply = void (*)(Index, const float*, const float*, float*);

// `multiply` of 1 to kRows rows: the last tile of a block costs no more than it must.
template <Index kDown, Index kAlong, int... kNums>
constexpr std::array<Multiply, kRows> all_heights(std::integer_sequence<int, kNums...>) {
  return {multiply<kNums + 1, kDown, kAlong>...};
}
constexpr auto kUpright = all_heights<kPitch, 1>(std::make_integer_sequence<int, kRows>());
constexpr auto kTurned = all_heights<1, kStep>(std::make_integer_sequence<int, kRows>());

// One row of a tile to its place: out = (tile [+ bias, or + what is there]) [* scale].
inline void put(const float* tile, Index count, const float* bias, bool add, float scale,
                float* out) {
  const float* more = add ? out : bias;
  if (count < kColumns) {
    for (Index n = 0; n < count; ++n) out[n] = (tile[n] + (more ? more[n] : 0)) * scale;
    return;
  }
  UNROLL for (int n = 0; n < kColumns; n += kLanes) {
    Vector value = load(tile + n);
    if (more) value += load(more + n);
    store(out + n, value * scale);
  }
}

// ---- copies ------------------------------------------------------------------------------------

// Copies a row in pieces of kWidth numbers, each `apart` after the one before. Zeros fill up the
// last piece, and every piece where there is no row. May write up to kPadded numbers of a piece.
template <int kWidth, int kPadded>
inline void cut(const float* row, Index count, Index apart, float* to) {
  for (; count > 0; count -= kWidth, to += apart) {
    if (row && count >= kPadded) {
      UNROLL for (int n = 0; n < kPadded; n += kLanes) store(to + n, load(row + n));
    } else {
      for (Index n = 0; n < kWidth; ++n) to[n] = row && n < count ? row[n] : 0;
    }
    if (row) row += kWidth;
  }
}

// A block of the right operand: [depth, columns] of a matrix -> panels of [depth, kColumns].
void copy_right(const float* from, Index pitch, Index depth, Index columns, float* to) {
  for (Index k = 0; k < depth; ++k)
    cut<kColumns, kColumns>(from + k * pitch, columns, panel(depth, kColumns), to + k * kColumns);
}

// Two vectors woven into one: every other group of kApart numbers, the first or (kHigh) the second.
template <int kApart, bool kHigh, int... i>
inline Vector weave(Vector a, Vector b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(
      a, b, (i & kApart ? kLanes + i - (kHigh ? 0 : kApart) : i + (kHigh ? kApart : 0))...);
}

// Transposes kLanes vectors, in steps that exchange single numbers, pairs, fours, ...
template <int kApart = 1>
inline void transpose(Vector* rows) {
  if constexpr (kApart < kLanes) {
    constexpr auto all = std::make_integer_sequence<int, kLanes>();
    UNROLL for (int i = 0; i < kLanes; ++i) {
      if (i & kApart) continue;
      const Vector a = rows[i], b = rows[i + kApart];
      rows[i] = weave<kApart, false>(a, b, all);
      rows[i + kApart] = weave<kApart, true>(a, b, all);
    }
    transpose<2 * kApart>(rows);
  }
}

// `copy_right` of a matrix that lies transposed, [columns, depth].
void copy_turned(const float* from, Index pitch, Index depth, Index columns, float* to) {
  for (Index n = 0; n < columns; n += kLanes) {
    float* place = to + n / kColumns * panel(depth, kColumns) + n % kColumns;
    const Index whole = n + kLanes <= columns ? depth / kLanes * kLanes : 0;
    for (Index k = 0; k < whole; k += kLanes) {
      Vector rows[kLanes];
      UNROLL for (int i = 0; i < kLanes; ++i) rows[i] = load(from + (n + i) * pitch + k);
      transpose(rows);
      UNROLL for (int i = 0; i < kLanes; ++i) store(place + (k + i) * kColumns, rows[i]);
    }
    for (Index k = whole; k < depth; ++k)
      for (Index i = 0; i < kLanes; ++i)
        place[k * kColumns + i] = n + i < columns ? from[(n + i) * pitch + k] : 0;
  }
}

// Memory of this thread for one block, aligned to a cache line; there are two.
float* block(int which, Index size) {
  thread_local std::vector<float> memory[2];
  if (static_cast<Index>(memory[which].size()) < size + 16) memory[which].resize(size + 16);
  const auto address = reinterpret_cast<uintptr_t>(memory[which].data());
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

// Gathered rows follow no pattern that a CPU could predict. So rows are prefetched this many rows
// ahead, and the places of results before the results are computed.
constexpr Index kAhead = 4;

inline void fetch(const float* row, Index first, Index count) {
  if (row)
    for (Index i = 0; i < count; i += 16) __builtin_prefetch(row + first + i);
}

inline void expect(const float* out, Index count) {
  for (Index i = 0; i < count; i += 16) __builtin_prefetch(out + i, 1);
}

}  // namespace
