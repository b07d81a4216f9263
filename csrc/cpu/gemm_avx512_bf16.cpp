// c = a w^T with vdpbf16ps, which adds pairs of bf16 products to a float32, or with vpdpwssd, which adds pairs of products of 16-bit
// integers to an int32. A thread takes 64 rows of w, which are 64 columns of c.
// It packs them: a register then holds the pair k, k + 1 of 16 columns. It multiplies all of a with them, and keeps tiles of
// 6 x 64 results in registers.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "gemm.h"
#include "parallel.h"

namespace kdkernels {
namespace {

constexpr int COLUMNS = 64;  // of a tile: four registers
constexpr int ROWS = 6;      // 24 accumulators, 4 registers of w, 1 of a: 29 of 32
constexpr std::int64_t PAIRS = 1024;  // of a packed panel: its 256 KiB fit into L2
constexpr int GROUP_PAIRS = ITEM_GROUP / 2;
static_assert(PAIRS % GROUP_PAIRS == 0);

inline __m512i load_pairs(const std::uint32_t* row, __mmask16 mask) { return _mm512_maskz_loadu_epi32(mask, row); }

// 16 x 16 dwords, transposed in registers
inline void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    __m512i a = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), b = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    __m512i c = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88), d = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    t[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    t[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// panel[pair][column] = w[column][2 pair, 2 pair + 1]; columns from `columns` on are 0
void pack(const std::uint16_t* w, std::int64_t ldw, int columns, std::int64_t pairs, std::uint32_t* panel) {
  for (int group = 0; group < COLUMNS; group += 16) {
    for (std::int64_t first = 0; first < pairs; first += 16) {
      const int count = int(std::min<std::int64_t>(16, pairs - first));
      const __mmask16 mask = __mmask16((1u << count) - 1u);
      __m512i r[16];
      for (int i = 0; i < 16; ++i) {
        r[i] = group + i < columns
                   ? load_pairs(reinterpret_cast<const std::uint32_t*>(w + (group + i) * ldw) + first, mask)
                   : _mm512_setzero_si512();
      }
      transpose(r);
      for (int i = 0; i < count; ++i) _mm512_store_si512(panel + (first + i) * COLUMNS + group, r[i]);
    }
  }
}

// The same from w as (k, n): two rows, interleaved
void pack_rows(const std::uint16_t* w, std::int64_t ldw, int columns, std::int64_t pairs, std::uint32_t* panel) {
  for (std::int64_t pair = 0; pair < pairs; ++pair) {
    const std::uint16_t* row = w + 2 * pair * ldw;
    for (int group = 0; group < COLUMNS; group += 16) {
      const int count = std::clamp(columns - group, 0, 16);
      const __mmask16 mask = __mmask16((1u << count) - 1u);
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row + group));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row + ldw + group));
      _mm512_store_si512(panel + pair * COLUMNS + group, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}

struct Tile {
  const std::uint16_t* a[2];
  std::int64_t lda[2];
  const std::uint32_t* panel;
  std::int64_t pairs;
  float* c;
  std::int64_t ldc;
  int columns;
  bool add;  // to what c holds
};

// Which of the 16 columns j, j + 1, ... of a tile are there
inline __mmask16 columns_of(int columns, int j) { return __mmask16((1u << std::clamp(columns - 16 * j, 0, 16)) - 1u); }

// Every loop over the sums is unrolled: an index that changes would keep them in memory.
template <int R, int PARTS>
[[gnu::noinline]] void multiply(const Tile& t) {
  __m512 sum[R][4];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[r][j] = _mm512_setzero_ps();
  }
  const std::uint32_t* rows[PARTS][R];
  for (int p = 0; p < PARTS; ++p)
    for (int r = 0; r < R; ++r) rows[p][r] = reinterpret_cast<const std::uint32_t*>(t.a[p] + r * t.lda[p]);
  for (std::int64_t k = 0; k < t.pairs; ++k) {
    __m512bh w[4];
    for (int j = 0; j < 4; ++j) w[j] = (__m512bh)_mm512_load_si512(t.panel + k * COLUMNS + j * 16);
#pragma GCC unroll 2
    for (int p = 0; p < PARTS; ++p) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512bh x = (__m512bh)_mm512_set1_epi32(int(rows[p][r][k]));
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], x, w[j]);
      }
    }
  }
  __mmask16 masks[4];
  for (int j = 0; j < 4; ++j) masks[j] = columns_of(t.columns, j);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __mmask16 mask = masks[j];
      float* to = t.c + r * t.ldc + 16 * j;
      if (t.add) sum[r][j] = _mm512_add_ps(sum[r][j], _mm512_maskz_loadu_ps(mask, to));
      _mm512_mask_storeu_ps(to, mask, sum[r][j]);
    }
  }
}

template <int PARTS>
void multiply_rows(int rows, const Tile& t) {
  switch (rows) {
    case 6: return multiply<6, PARTS>(t);
    case 5: return multiply<5, PARTS>(t);
    case 4: return multiply<4, PARTS>(t);
    case 3: return multiply<3, PARTS>(t);
    case 2: return multiply<2, PARTS>(t);
    default: return multiply<1, PARTS>(t);
  }
}

// One group of a panel becomes pairs of 16-bit integers: w times the factor of its k, in steps of step[column]. The steps are powers
// of two, so most of the integers are exact. Returns false, with the panel as it was, where w is not finite.
bool to_items(std::uint32_t* panel, std::int64_t pairs, const float* factor, float* step) {
  const __m512i upper = _mm512_set1_epi32(int(0xffff0000u)), low = _mm512_set1_epi32(0xffff);
  auto first_of = [](__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); };
  auto second_of = [&](__m512i x) { return _mm512_castsi512_ps(_mm512_and_si512(x, upper)); };
  auto usual = [&](std::int64_t p) { return factor[2 * p] == 1.f && factor[2 * p + 1] == 1.f; };
  __m512 square[4] = {}, inverse[4];
  for (std::int64_t p = 0; p < pairs; ++p) {
    const std::uint32_t* at = panel + p * COLUMNS;
    if (usual(p)) {
      for (int j = 0; j < 4; ++j) {
        const __m512bh x = (__m512bh)_mm512_load_si512(at + 16 * j);
        square[j] = _mm512_dpbf16_ps(square[j], x, x);
      }
    } else {
      for (int j = 0; j < 4; ++j) {
        const __m512i x = _mm512_load_si512(at + 16 * j);
        const __m512 a = _mm512_mul_ps(first_of(x), _mm512_set1_ps(factor[2 * p]));
        const __m512 b = _mm512_mul_ps(second_of(x), _mm512_set1_ps(factor[2 * p + 1]));
        square[j] = _mm512_fmadd_ps(a, a, _mm512_fmadd_ps(b, b, square[j]));
      }
    }
  }
  for (int j = 0; j < 4; ++j) {
    if (_mm512_cmp_ps_mask(square[j], _mm512_set1_ps(1e37f), _CMP_NLT_UQ)) return false;
    // A group that is nearly 0 counts as 0: its reciprocal would be infinite.
    const __mmask16 plain = _mm512_cmp_ps_mask(square[j], _mm512_set1_ps(1e-37f), _CMP_GT_OQ);
    // The power of two above norm / W_ITEM_NORM
    const __m512 twice = _mm512_mul_ps(_mm512_sqrt_ps(square[j]), _mm512_set1_ps(2.f / W_ITEM_NORM));
    const __m512 power = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(twice), _mm512_set1_epi32(0x7f800000)));
    _mm512_store_ps(step + 16 * j, _mm512_maskz_mov_ps(plain, power));
    inverse[j] = _mm512_maskz_div_ps(plain, _mm512_set1_ps(1.f), power);
  }
  auto convert = [&](std::int64_t p, auto scaled) {
    for (int j = 0; j < 4; ++j) {
      std::uint32_t* at = panel + p * COLUMNS + 16 * j;
      const __m512i x = _mm512_load_si512(at);
      const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(scaled(first_of(x), 0), inverse[j]));
      const __m512i b = _mm512_cvtps_epi32(_mm512_mul_ps(scaled(second_of(x), 1), inverse[j]));
      _mm512_store_si512(at, _mm512_ternarylogic_epi32(low, a, _mm512_slli_epi32(b, 16), 0xca));
    }
  };
  for (std::int64_t p = 0; p < pairs; ++p) {
    if (usual(p)) {
      convert(p, [](__m512 x, int) { return x; });
    } else {
      convert(p, [&](__m512 x, int which) { return _mm512_mul_ps(x, _mm512_set1_ps(factor[2 * p + which])); });
    }
  }
  return true;
}

// In arrays of __m512i GCC 12 would store the sums to memory in every step.
typedef int Sums __attribute__((vector_size(64)));

struct ItemTile {
  const std::int16_t* a;
  const float* step;    // of a row of a
  std::int64_t groups;  // of a row, which is `groups` * ITEM_GROUP long
  const std::uint32_t* panel;
  const float* w_step;
  std::int64_t pairs;
};

// total (R, COLUMNS) = or += the product of one group. total begins a line of the cache.
template <int R>
[[gnu::noinline]] void multiply_group(const ItemTile& t, float* total, bool add) {
  Sums sum[R][4];
  const std::uint32_t* rows[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    rows[r] = reinterpret_cast<const std::uint32_t*>(t.a + r * t.groups * ITEM_GROUP);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[r][j] = (Sums)_mm512_setzero_si512();
  }
  for (std::int64_t k = 0; k < t.pairs; ++k) {
    __m512i w[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) w[j] = _mm512_load_si512(t.panel + k * COLUMNS + j * 16);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512i x = _mm512_set1_epi32(int(rows[r][k]));
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[r][j] = (Sums)_mm512_dpwssd_epi32((__m512i)sum[r][j], x, w[j]);
    }
  }
  const __mmask16 kept = add ? __mmask16(0xffff) : __mmask16(0);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const __m512 step = _mm512_set1_ps(t.step[r * t.groups]);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      float* to = total + r * COLUMNS + 16 * j;
      const __m512 factor = _mm512_mul_ps(step, _mm512_load_ps(t.w_step + 16 * j));
      const __m512 before = _mm512_maskz_load_ps(kept, to);
      _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps((__m512i)sum[r][j]), factor, before));
    }
  }
}

void multiply_groups(int rows, const ItemTile& t, float* total, bool add) {
  switch (rows) {
    case 6: return multiply_group<6>(t, total, add);
    case 5: return multiply_group<5>(t, total, add);
    case 4: return multiply_group<4>(t, total, add);
    case 3: return multiply_group<3>(t, total, add);
    case 2: return multiply_group<2>(t, total, add);
    default: return multiply_group<1>(t, total, add);
  }
}

// c += or = total, for a tile
void store(const float* total, int rows, const Tile& t) {
  for (int r = 0; r < rows; ++r) {
    for (int j = 0; j < 4; ++j) {
      const __mmask16 mask = columns_of(t.columns, j);
      float* to = t.c + r * t.ldc + 16 * j;
      const __m512 sum = _mm512_load_ps(total + r * COLUMNS + 16 * j);
      _mm512_mask_storeu_ps(to, mask, t.add ? _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, to)) : sum);
    }
  }
}

// --- few rows of a --------------------------------------------------------------------------------------------------------------
// To pack w takes longer than to multiply it. So w is read as it lies: a register holds 32 k of one row, and a sum of its 16 lanes
// is one item of c.

constexpr int FEW_ROWS = 8, FEW_COLUMNS = 3;  // of a tile: 24 accumulators, 3 registers of w
constexpr int FEW_AHEAD = 10;                 // tiles whose rows of w are fetched: the processor foresees no jumps from row to row
constexpr std::int64_t FEW = 48;              // rows of a up to which this is faster

// The sums of eight registers, in order
inline __m256 sums_of(const __m512 x[8]) {
  __m512 t[4], u[2];
  for (int i = 0; i < 4; ++i) t[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  for (int i = 0; i < 2; ++i) {
    const __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
    u[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const __m512 v = _mm512_add_ps(_mm512_shuffle_f32x4(u[0], u[1], 0x88), _mm512_shuffle_f32x4(u[0], u[1], 0xdd));
  const __m512 w = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0xb1));
  return _mm512_castps512_ps256(_mm512_shuffle_f32x4(w, w, 0x88));
}

// c (R, C) = or += for R rows of a and C of w
template <int R, int C, int PARTS>
[[gnu::noinline]] void multiply_few(const Bf16Gemm& g, std::int64_t row, std::int64_t column) {
  const auto* w = reinterpret_cast<const std::uint16_t*>(g.w) + column * g.ldw;
  const std::uint16_t* a[PARTS];
  for (int p = 0; p < PARTS; ++p) a[p] = reinterpret_cast<const std::uint16_t*>(g.a[p]) + row * g.lda[p];
  __m512 sum[C][8];
#pragma GCC unroll 3
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) sum[c][r] = _mm512_setzero_ps();
  }
  auto step = [&](std::int64_t k, auto load) __attribute__((always_inline)) {
    __m512bh x[C];
#pragma GCC unroll 3
    for (int c = 0; c < C; ++c) x[c] = load(w + c * g.ldw + k);
#pragma GCC unroll 2
    for (int p = 0; p < PARTS; ++p) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512bh y = load(a[p] + r * g.lda[p] + k);
#pragma GCC unroll 3
        for (int c = 0; c < C; ++c) sum[c][r] = _mm512_dpbf16_ps(sum[c][r], x[c], y);
      }
    }
  };
  const std::int64_t whole = g.k / 32 * 32;
  const std::uint16_t* later = w + FEW_AHEAD * C * g.ldw;
  for (std::int64_t k = 0; k < whole; k += 32) {
#pragma GCC unroll 3
    for (int c = 0; c < C; ++c) _mm_prefetch(later + c * g.ldw + k, _MM_HINT_T0);
    step(k, [](const std::uint16_t* from) { return (__m512bh)_mm512_loadu_si512(from); });
  }
  if (whole < g.k) {
    const __mmask32 mask = (__mmask32(1) << (g.k - whole)) - 1u;
    step(whole, [mask](const std::uint16_t* from) { return (__m512bh)_mm512_maskz_loadu_epi16(mask, from); });
  }
  float* to = reinterpret_cast<float*>(g.c) + row * g.ldc + column;
#pragma GCC unroll 3
  for (int c = 0; c < C; ++c) {
    alignas(32) float found[8];
    _mm256_store_ps(found, sums_of(sum[c]));
    for (int r = 0; r < R; ++r) to[r * g.ldc + c] = g.accumulate ? to[r * g.ldc + c] + found[r] : found[r];
  }
}

template <int C, int PARTS>
void multiply_few_rows(const Bf16Gemm& g, std::int64_t row, std::int64_t column) {
  switch (std::min<std::int64_t>(FEW_ROWS, g.m - row)) {
    case 8: return multiply_few<8, C, PARTS>(g, row, column);
    case 7: return multiply_few<7, C, PARTS>(g, row, column);
    case 6: return multiply_few<6, C, PARTS>(g, row, column);
    case 5: return multiply_few<5, C, PARTS>(g, row, column);
    case 4: return multiply_few<4, C, PARTS>(g, row, column);
    case 3: return multiply_few<3, C, PARTS>(g, row, column);
    case 2: return multiply_few<2, C, PARTS>(g, row, column);
    default: return multiply_few<1, C, PARTS>(g, row, column);
  }
}

template <int PARTS>
void run_few(const Bf16Gemm& g) {
  constexpr std::int64_t BLOCK = 32 * FEW_COLUMNS;
  parallel_rows((g.n + BLOCK - 1) / BLOCK, g.m * BLOCK, g.threads, [&](auto&& next) {
    for (std::int64_t block; (block = next()) >= 0;) {
      const std::int64_t stop = std::min(g.n, (block + 1) * BLOCK);
      std::int64_t column = block * BLOCK;
      for (; column + FEW_COLUMNS <= stop; column += FEW_COLUMNS)
        for (std::int64_t row = 0; row < g.m; row += FEW_ROWS) multiply_few_rows<FEW_COLUMNS, PARTS>(g, row, column);
      for (; column < stop; ++column)
        for (std::int64_t row = 0; row < g.m; row += FEW_ROWS) multiply_few_rows<1, PARTS>(g, row, column);
    }
  });
}

// --- many rows ------------------------------------------------------------------------------------------------------------------

template <int PARTS>
void run(const Bf16Gemm& g) {
  const std::int64_t blocks = (g.n + COLUMNS - 1) / COLUMNS, pairs = g.k / 2;
  const auto* w = reinterpret_cast<const std::uint16_t*>(g.w);
  parallel_rows(blocks, g.m * COLUMNS, g.threads, [&](auto&& next) {
    constexpr std::align_val_t LINE{64};
    auto release = [](std::uint32_t* x) { ::operator delete[](x, std::align_val_t{64}); };
    using Scratch = std::unique_ptr<std::uint32_t[], decltype(release)>;
    const std::int64_t longest = std::min(pairs, PAIRS), groups = (g.k + ITEM_GROUP - 1) / ITEM_GROUP;
    Scratch panel(new (LINE) std::uint32_t[std::size_t(longest * COLUMNS)], release);
    alignas(64) float w_step[PAIRS / GROUP_PAIRS * COLUMNS];
    for (std::int64_t block; (block = next()) >= 0;) {
      const std::int64_t column = block * COLUMNS;
      const int columns = int(std::min<std::int64_t>(COLUMNS, g.n - column));
      for (std::int64_t first = 0; first < pairs; first += PAIRS) {
        const std::int64_t count = std::min(PAIRS, pairs - first);
        auto pack_from = [&](std::int64_t start, std::int64_t some) {  // of the panel
          const std::int64_t k = 2 * (first + start);
          std::uint32_t* to = panel.get() + start * COLUMNS;
          if (g.w_by_rows) {
            pack_rows(w + k * g.ldw + column, g.ldw, columns, some, to);
          } else {
            pack(w + column * g.ldw + k, g.ldw, columns, some, to);
          }
        };
        bool as_items = g.items != 0;
        for (std::int64_t start = 0; as_items && start < count; start += GROUP_PAIRS) {
          const std::int64_t some = std::min<std::int64_t>(GROUP_PAIRS, count - start);
          pack_from(start, some);  // 16 KiB, which are still in L1 when they become integers
          as_items = to_items(panel.get() + start * COLUMNS, some, reinterpret_cast<const float*>(g.column_factor) + 2 * (first + start),
                              w_step + start / GROUP_PAIRS * COLUMNS);
        }
        if (!as_items) pack_from(0, count);
        for (std::int64_t row = 0; row < g.m; row += ROWS) {
          Tile t{};
          for (int p = 0; p < PARTS; ++p) {
            t.a[p] = reinterpret_cast<const std::uint16_t*>(g.a[p]) + row * g.lda[p] + 2 * first;
            t.lda[p] = g.lda[p];
          }
          t.panel = panel.get();
          t.pairs = count;
          t.c = reinterpret_cast<float*>(g.c) + row * g.ldc + column;
          t.ldc = g.ldc;
          t.columns = columns;
          t.add = g.accumulate || first > 0;
          const int rows = int(std::min<std::int64_t>(ROWS, g.m - row));
          if (!as_items) {
            multiply_rows<PARTS>(rows, t);
            continue;
          }
          alignas(64) float total[ROWS * COLUMNS];
          for (std::int64_t done = 0; done < count; done += GROUP_PAIRS) {
            const std::int64_t at = row * groups + (first + done) / GROUP_PAIRS;
            const ItemTile group{reinterpret_cast<const std::int16_t*>(g.items) + at * ITEM_GROUP,
                                 reinterpret_cast<const float*>(g.item_step) + at, groups, panel.get() + done * COLUMNS,
                                 w_step + done / GROUP_PAIRS * COLUMNS, std::min<std::int64_t>(GROUP_PAIRS, count - done)};
            multiply_groups(rows, group, total, done > 0);
          }
          store(total, rows, t);
        }
      }
    }
  });
}

// Rounds to nearest even; NaN stays NaN. vcvtneps2bf16 is not used, because it turns denormals into 0.
inline __m256i narrow(__m512i x) {
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512 value = _mm512_castsi512_ps(x);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0)));
}

// 32 rows of x (a line of `out`) by 16 columns
void transpose_tile(const float* x, std::int64_t ldx, int rows, int columns, std::uint16_t* out, std::int64_t ldo) {
  const __mmask16 mask = __mmask16((1u << columns) - 1u);
  __m256i half[2][16];
  for (int h = 0; h < 2; ++h) {
    __m512i r[16];
    for (int i = 0; i < 16; ++i) {
      const int row = 16 * h + i;
      r[i] = row < rows ? _mm512_castps_si512(_mm512_maskz_loadu_ps(mask, x + row * ldx)) : _mm512_setzero_si512();
    }
    transpose(r);
    for (int i = 0; i < 16; ++i) half[h][i] = narrow(r[i]);
  }
  const __mmask32 kept = rows < 32 ? (__mmask32(1) << rows) - 1u : ~__mmask32(0);
  for (int i = 0; i < columns; ++i) {
    const __m512i line = _mm512_inserti64x4(_mm512_castsi256_si512(half[0][i]), half[1][i], 1);
    _mm512_mask_storeu_epi16(out + i * ldo, kept, line);
  }
}

}  // namespace

void transpose_to_bf16_avx512(const TransposeToBf16& t) {
  constexpr std::int64_t WIDTH = 64;  // columns of x that a thread takes at a time: 4 lines of a page
  const auto* x = reinterpret_cast<const float*>(t.x);
  auto* out = reinterpret_cast<std::uint16_t*>(t.out);
  parallel_rows((t.n + WIDTH - 1) / WIDTH, t.m * WIDTH, t.threads, [&](auto&& next) {
    for (std::int64_t block; (block = next()) >= 0;) {
      const std::int64_t stop = std::min(t.n, (block + 1) * WIDTH);
      for (std::int64_t row = 0; row < t.m; row += 32) {
        const int rows = int(std::min<std::int64_t>(32, t.m - row));
        for (std::int64_t column = block * WIDTH; column < stop; column += 16) {
          const int columns = int(std::min<std::int64_t>(16, stop - column));
          transpose_tile(x + row * t.ldx + column, t.ldx, rows, columns, out + column * t.ldo + row, t.ldo);
        }
      }
    }
  });
}

void gemm_avx512_bf16(const Bf16Gemm& problem) {
  if (problem.m <= FEW && !problem.w_by_rows && !problem.items) {
    problem.a[1] ? run_few<2>(problem) : run_few<1>(problem);
  } else {
    problem.a[1] ? run<2>(problem) : run<1>(problem);
  }
}

}  // namespace kdkernels
