// c = a w^T with vdpbf16ps, which adds pairs of bf16 products to a float32. A thread takes 64 rows of w, which are 64 columns of c.
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
static_assert(2 * PAIRS % REST_GROUP == 0);

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
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __mmask16 mask = columns_of(t.columns, j);
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

// bytes[quad][column] = 128 + w[column][4 quad .. 4 quad + 3] / scale[group][column], from a panel of pairs. Infinities and NaN get
// a scale of 0: the product with the first part has them already.
void pack_bytes(const std::uint32_t* panel, std::int64_t pairs, std::uint32_t* bytes, float* scale) {
  constexpr int GROUP_PAIRS = REST_GROUP / 2;
  const __m512i upper = _mm512_set1_epi32(int(0xffff0000u)), low_byte = _mm512_set1_epi32(0xff);
  auto first_of = [](__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); };
  auto second_of = [&](__m512i x) { return _mm512_castsi512_ps(_mm512_and_si512(x, upper)); };
  for (std::int64_t start = 0; start < pairs; start += GROUP_PAIRS, scale += COLUMNS) {
    const int count = int(std::min<std::int64_t>(GROUP_PAIRS, pairs - start));
    for (int column = 0; column < COLUMNS; column += 16) {
      const std::uint32_t* from = panel + start * COLUMNS + column;
      __m512 most = _mm512_setzero_ps();
      for (int p = 0; p < count; ++p) {
        const __m512i x = _mm512_load_si512(from + p * COLUMNS);
        most = _mm512_max_ps(_mm512_abs_ps(first_of(x)), most);
        most = _mm512_max_ps(_mm512_abs_ps(second_of(x)), most);
      }
      // A group of denormal weights counts as 0: its reciprocal would be infinite.
      const __mmask16 plain = _mm512_cmp_ps_mask(most, _mm512_set1_ps(1e30f), _CMP_LT_OQ) &
                              _mm512_cmp_ps_mask(most, _mm512_set1_ps(1e-30f), _CMP_GT_OQ);
      const __m512 inverse = _mm512_maskz_div_ps(plain, _mm512_set1_ps(127.f), most);
      _mm512_store_ps(scale + column, _mm512_maskz_mul_ps(plain, most, _mm512_set1_ps(1.f / 127.f)));
      for (int p = 0; p < count; p += 2) {
        const __m512i x = _mm512_load_si512(from + p * COLUMNS);
        const __m512i y = p + 1 < count ? _mm512_load_si512(from + (p + 1) * COLUMNS) : _mm512_setzero_si512();
        auto byte = [&](__m512 value) { return _mm512_and_si512(_mm512_cvtps_epi32(_mm512_mul_ps(value, inverse)), low_byte); };
        const __m512i low = _mm512_or_si512(byte(first_of(x)), _mm512_slli_epi32(byte(second_of(x)), 8));
        const __m512i high = _mm512_or_si512(byte(first_of(y)), _mm512_slli_epi32(byte(second_of(y)), 8));
        const __m512i four = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
        _mm512_store_si512(bytes + (start + p) / 2 * COLUMNS + column, _mm512_xor_si512(four, _mm512_set1_epi32(int(0x80808080u))));
      }
    }
  }
}

// In arrays of __m512i GCC 12 would store the sums to memory in every step.
typedef int Sums __attribute__((vector_size(64)));

struct RestTile {
  const std::int8_t* a;
  std::int64_t groups;   // of a row of a, which lie `groups` * REST_GROUP apart
  const float* scale;    // of a row, `groups` apart, like start
  const std::int32_t* start;
  const std::uint32_t* bytes;
  const float* w_scale;
  int quads;
  float* c;
  std::int64_t ldc;
  int columns;
};

// c += rest w^T for the k of one group
template <int R>
[[gnu::noinline]] void multiply_rest(const RestTile& t) {
  Sums sum[R][4];
  const std::uint32_t* rows[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    rows[r] = reinterpret_cast<const std::uint32_t*>(t.a + r * t.groups * REST_GROUP);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[r][j] = (Sums)_mm512_set1_epi32(t.start[r * t.groups]);
  }
  for (std::int64_t k = 0; k < t.quads; ++k) {
    __m512i w[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) w[j] = _mm512_load_si512(t.bytes + k * COLUMNS + j * 16);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512i x = _mm512_set1_epi32(int(rows[r][k]));
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[r][j] = (Sums)_mm512_dpbusd_epi32((__m512i)sum[r][j], w[j], x);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const __m512 scale = _mm512_set1_ps(t.scale[r * t.groups]);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __mmask16 mask = columns_of(t.columns, j);
      const __m512 factor = _mm512_mul_ps(scale, _mm512_load_ps(t.w_scale + 16 * j));
      float* to = t.c + r * t.ldc + 16 * j;
      _mm512_mask_storeu_ps(to, mask, _mm512_fmadd_ps(_mm512_cvtepi32_ps((__m512i)sum[r][j]), factor, _mm512_maskz_loadu_ps(mask, to)));
    }
  }
}

void multiply_rest_rows(int rows, const RestTile& t) {
  switch (rows) {
    case 6: return multiply_rest<6>(t);
    case 5: return multiply_rest<5>(t);
    case 4: return multiply_rest<4>(t);
    case 3: return multiply_rest<3>(t);
    case 2: return multiply_rest<2>(t);
    default: return multiply_rest<1>(t);
  }
}

template <int PARTS>
void run(const Bf16Gemm& g) {
  const std::int64_t blocks = (g.n + COLUMNS - 1) / COLUMNS, pairs = g.k / 2;
  const auto* w = reinterpret_cast<const std::uint16_t*>(g.w);
  parallel_rows(blocks, g.m * COLUMNS, g.threads, [&](auto&& next) {
    constexpr std::align_val_t LINE{64};
    auto release = [](std::uint32_t* x) { ::operator delete[](x, std::align_val_t{64}); };
    auto release_floats = [](float* x) { ::operator delete[](x, std::align_val_t{64}); };
    using Scratch = std::unique_ptr<std::uint32_t[], decltype(release)>;
    const std::int64_t longest = std::min(pairs, PAIRS), most_groups = (2 * longest + REST_GROUP - 1) / REST_GROUP;
    Scratch panel(new (LINE) std::uint32_t[std::size_t(longest * COLUMNS)], release);
    const std::int64_t groups = (g.k + REST_GROUP - 1) / REST_GROUP;
    Scratch bytes(g.rest ? new (LINE) std::uint32_t[std::size_t((longest + 1) / 2 * COLUMNS)] : nullptr, release);
    std::unique_ptr<float[], decltype(release_floats)> scale(
        g.rest ? new (LINE) float[std::size_t(most_groups * COLUMNS)] : nullptr, release_floats);
    for (std::int64_t block; (block = next()) >= 0;) {
      const std::int64_t column = block * COLUMNS;
      const int columns = int(std::min<std::int64_t>(COLUMNS, g.n - column));
      for (std::int64_t first = 0; first < pairs; first += PAIRS) {
        const std::int64_t count = std::min(PAIRS, pairs - first);
        if (g.w_by_rows) {
          pack_rows(w + 2 * first * g.ldw + column, g.ldw, columns, count, panel.get());
        } else {
          pack(w + column * g.ldw + 2 * first, g.ldw, columns, count, panel.get());
        }
        if (g.rest) pack_bytes(panel.get(), count, bytes.get(), scale.get());
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
          multiply_rows<PARTS>(rows, t);
          if (!g.rest) continue;
          for (std::int64_t done = 0, group = 0; done < count; done += REST_GROUP / 2, ++group) {
            const std::int64_t at = row * groups + 2 * first / REST_GROUP + group;
            const std::int64_t here = std::min<std::int64_t>(REST_GROUP / 2, count - done);
            multiply_rest_rows(rows, {reinterpret_cast<const std::int8_t*>(g.rest) + at * REST_GROUP, groups,
                                      reinterpret_cast<const float*>(g.rest_scale) + at,
                                      reinterpret_cast<const std::int32_t*>(g.rest_start) + at, bytes.get() + done / 2 * COLUMNS,
                                      scale.get() + group * COLUMNS, int((here + 1) / 2), t.c, t.ldc, t.columns});
          }
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

void gemm_avx512_bf16(const Bf16Gemm& problem) { problem.a[1] ? run<2>(problem) : run<1>(problem); }

}  // namespace kdkernels
