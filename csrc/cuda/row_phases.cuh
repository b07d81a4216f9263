// The arithmetic of the one-read row kernel, thread by thread. caad_rows.cu puts barriers, copies and exchanges between these
// functions. For the tests emulate_rows.cpp calls the same functions on a CPU, in the same order of merging.
//
// Notation: s is the student, a audio, t text, and z = a + alpha (a - t) the contrast. q and p are the softmax of s and z at
// temperature tau, and q1 is the softmax of s at temperature 1.
//
// Exponents are in units of log 2: x * rate - top, one fused multiply-add, where rate = log2(e) / tau and top = max * rate rounded
// to fp32. Every place uses the same rounded top, so its rounding cancels, however large the logits are.
//
// Masked logits are treated as in ops/triton_shared.py: a logit below -1e30, such as -inf, becomes the finite MASKED after its load.
// Running maxima start at FLOOR > MASKED. So e^(MASKED - max) is 0 even in a row where everything is masked, and inf - inf and
// 0 * inf do not occur. NaN compares false and passes through.
#pragma once

#include <cmath>
#include <cstring>

#include "row_problem.h"

#if defined(__CUDA_ARCH__)
#define KD_UNROLL _Pragma("unroll")
#else
#define KD_UNROLL
#endif

namespace kdkernels::cuda {

constexpr float MASKED = -2e30f, FLOOR = -1e30f;
constexpr float LOG2E = 1.44269504088896340736f, LN2 = 0.69314718055994530942f;

// -- numbers ------------------------------------------------------------------------------------------------------------------

KD_HOST_DEVICE float as_float(std::uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
#endif
}

KD_HOST_DEVICE std::uint32_t as_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
#endif
}

KD_HOST_DEVICE float infinity() { return as_float(0x7f800000u); }
KD_HOST_DEVICE float not_a_number() { return as_float(0x7fc00000u); }

KD_HOST_DEVICE float half_to_float(std::uint32_t half) {  // the lower 16 bits
#if defined(__CUDA_ARCH__)
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<unsigned short>(half)));
  return x;
#else
  const std::uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  return as_float(sign | as_bits(as_float(magnitude << 13) * 0x1p112f));  // exact, also for subnormal halves
#endif
}

#if !defined(__CUDA_ARCH__)
inline std::uint32_t nearest_bf16(float x) {
  const std::uint32_t bits = as_bits(x);
  if (x != x) return 0x7fffu;
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

inline std::uint32_t nearest_half(float x) {
  const std::uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (x != x) return 0x7fffu;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;                                                 // from 65520 on
  if (magnitude < 0x38800000u) return sign | static_cast<std::uint32_t>(std::nearbyint(as_float(magnitude) * 0x1p24f));
  return sign | (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
}
#endif

// Packs two items of 2 bytes, rounded to nearest. The first is in the lower half.
KD_HOST_DEVICE std::uint32_t pack(float first, float second, bool bf16) {
#if defined(__CUDA_ARCH__)
  std::uint32_t packed;
  if (bf16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
#else
  return bf16 ? nearest_bf16(first) | nearest_bf16(second) << 16 : nearest_half(first) | nearest_half(second) << 16;
#endif
}

// The larger or the smaller of two pairs of bf16, item by item. Of a number and NaN it returns the number.
KD_HOST_DEVICE std::uint32_t packed_max(std::uint32_t a, std::uint32_t b) {
#if defined(__CUDA_ARCH__)
  std::uint32_t m;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(m) : "r"(a), "r"(b));
  return m;
#else
  return as_bits(fmaxf(as_float(a << 16), as_float(b << 16))) >> 16 |
         as_bits(fmaxf(as_float(a & 0xffff0000u), as_float(b & 0xffff0000u)));
#endif
}

KD_HOST_DEVICE std::uint32_t packed_min(std::uint32_t a, std::uint32_t b) {
#if defined(__CUDA_ARCH__)
  std::uint32_t m;
  asm("min.bf16x2 %0, %1, %2;" : "=r"(m) : "r"(a), "r"(b));
  return m;
#else
  return as_bits(fminf(as_float(a << 16), as_float(b << 16))) >> 16 |
         as_bits(fminf(as_float(a & 0xffff0000u), as_float(b & 0xffff0000u)));
#endif
}

KD_HOST_DEVICE float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// The product is rounded: a compiler must not fuse it with an addition.
KD_HOST_DEVICE float product(float x, float y) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(x, y);
#else
  return x * y;
#endif
}

// x * y + z in one rounding.
KD_HOST_DEVICE float fused(float x, float y, float z) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(x, y, z);
#else
  return std::fma(x, y, z);
#endif
}

KD_HOST_DEVICE float quotient(float x, float y) {
#if defined(__CUDA_ARCH__)
  return __fdividef(x, y);
#else
  return x / y;
#endif
}

KD_HOST_DEVICE float reciprocal(float x) { return x == 0.f ? 0.f : 1.f / x; }

// e^x - 1 for x <= 0. It has fp32 relative accuracy near 0 too.
KD_HOST_DEVICE float exp_minus_1(float x) {
  float series = 1.f + x * (1.f / 7.f);
  series = 1.f + x * (1.f / 6.f) * series;
  series = 1.f + x * (1.f / 5.f) * series;
  series = 1.f + x * (1.f / 4.f) * series;
  series = 1.f + x * (1.f / 3.f) * series;
  series = x * (1.f + x * 0.5f * series);
  return x > -0.3f ? series : power_of_two(x * LOG2E) - 1.f;
}

// log(1 + x) for -1 < x <= 0. A division corrects the rounding of 1 + x.
KD_HOST_DEVICE float log_1_plus(float x) {
  const float rounded = 1.f + x;
  return rounded == 1.f ? x : logf(rounded) * quotient(x, rounded - 1.f);
}

KD_HOST_DEVICE float lowest(const float (&x)[GROUP]) {
  float m = x[0];
  KD_UNROLL for (int e = 1; e < GROUP; ++e) m = fminf(m, x[e]);
  return m;
}

KD_HOST_DEVICE float highest(const float (&x)[GROUP]) {
  float m = x[0];
  KD_UNROLL for (int e = 1; e < GROUP; ++e) m = fmaxf(m, x[e]);
  return m;
}

// -- where things are ---------------------------------------------------------------------------------------------------------

// The two halves of a thread's group: columns first + e and second + e of the block's slice, for e < 4.
struct Columns {
  int first, second;
  bool inside;  // the whole chunk is valid: equal in all threads. Such a chunk skips the checks that the last chunk needs
};

// The group in chunk 0.
KD_HOST_DEVICE Columns columns_of(int arrangement, int thread) {
  if (arrangement == SPLIT) {
    const int first = thread / 32 * WARP_COLUMNS + thread % 32 * 4;
    return {first, first + WARP_COLUMNS / 2, false};
  }
  const int first = thread * GROUP;
  if (arrangement == SWAPPED && (thread & 4) != 0) return {first + 4, first, false};
  return {first, first + 4, false};
}

// The thread's groups in a chunk of a slice with `columns` valid ones.
KD_HOST_DEVICE Columns in_chunk(Columns c, int chunk, int columns, int group = 0) {
  const int at = chunk * CHUNK, from = at + group * (CHUNK / GROUPS);
  return {c.first + from, c.second + from, at + CHUNK <= columns};
}

// The address of a row's column `start`.
KD_HOST_DEVICE char* row_address(const RowProblem& p, const RowTensor& t, std::int64_t row, int start) {
  const std::uint32_t inner = static_cast<std::uint32_t>(p.inner), r = static_cast<std::uint32_t>(row);  // plan_rows: under 2^31
  const std::int64_t outer_index = r / inner, inner_index = r % inner;
  const std::int64_t items = outer_index * t.stride_outer + inner_index * t.stride_inner + start;
  return reinterpret_cast<char*>(t.data) + items * item_bytes(t.dtype);
}

// The number of valid columns in a block's slice.
KD_HOST_DEVICE int valid_columns(const RowProblem& p, const RowLayout& layout, int block) {
  const std::int64_t left = p.vocab - static_cast<std::int64_t>(block) * layout.slice;
  return static_cast<int>(left < 0 ? 0 : left < layout.slice ? left : layout.slice);
}

KD_HOST_DEVICE int chunks_of(int columns) { return (columns + CHUNK - 1) / CHUNK; }

// The bytes of a tensor's chunk, a multiple of 16. The last 16 may reach beyond the vocabulary. They do not reach beyond the tensor's
// memory, because the caller checks that.
KD_HOST_DEVICE int chunk_bytes(int columns, int chunk, int item) {
  const int left = columns - chunk * CHUNK;
  return ((left < CHUNK ? left : CHUNK) * item + 15) / 16 * 16;
}

// What all blocks of a cluster know of a row before they read it. The values stay as they lie in memory, so that their loads can start
// long before their use.
struct RowInputs {
  std::int64_t target = -1;
  float alpha = 0.f, kd_coef = 0.f, ce_coef = 0.f;
};

KD_HOST_DEVICE RowInputs inputs_of(const RowProblem& p, std::int64_t row) {
  RowInputs r;
  if (p.target != 0) r.target = reinterpret_cast<const std::int64_t*>(p.target)[row];
  if (reads_text(p)) r.alpha = reinterpret_cast<const float*>(p.alpha)[row * p.alpha_stride];
  if (p.grad.data != 0) {
    r.kd_coef = reinterpret_cast<const float*>(p.kd_coef)[row];
    r.ce_coef = reinterpret_cast<const float*>(p.ce_coef)[row];
  }
  return r;
}

KD_HOST_DEVICE bool is_ignored(const RowProblem& p, const RowInputs& r) { return p.target != 0 && r.target == p.ignore_index; }
KD_HOST_DEVICE bool is_inside(const RowProblem& p, const RowInputs& r) { return r.target >= 0 && r.target < p.vocab; }
KD_HOST_DEVICE bool is_legal(const RowProblem& p, const RowInputs& r) {
  return !reads_text(p) || (r.alpha >= 0.f && r.alpha < infinity());
}

// If alpha is 0 the text path is not read, and it may hold anything.
KD_HOST_DEVICE bool uses_text(const RowProblem& p, const RowInputs& r) { return reads_text(p) && r.alpha != 0.f; }

// The start of a row's slice of each tensor in global memory. A null pointer means that the tensor is not read.
struct RowSources {
  const char *student, *audio, *text;
};

KD_HOST_DEVICE RowSources sources_of(const RowProblem& p, const RowInputs& r, std::int64_t row, int start) {
  RowSources from;
  from.student = row_address(p, p.student, row, start);
  from.audio = reads_teacher(p) ? row_address(p, p.audio, row, start) : nullptr;
  from.text = uses_text(p, r) ? row_address(p, p.text, row, start) : nullptr;
  return from;
}

// A place in a block's shared memory. It is a number of that address space, so the compiler cannot take it for an address in the cluster.
#if defined(__CUDA_ARCH__)
using SharedAddress = std::uint32_t;
#else
using SharedAddress = const char*;
#endif

// A block's part of a row.
struct Slice {
  SharedAddress student, audio, text;
  int start;    // column of the row where it begins
  int columns;  // the number of valid columns
};

// The first column of a group whose halves are neighbours.
KD_HOST_DEVICE int leftmost(Columns c) { return c.second < c.first ? c.second : c.first; }

// -- reading ------------------------------------------------------------------------------------------------------------------

// Volatile, like the wait for the copies, so that the compiler does not move this read before the wait.
KD_HOST_DEVICE void load_16_bytes(SharedAddress address, std::uint32_t (&words)[4]) {
#if defined(__CUDA_ARCH__)
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address));
#else
  std::memcpy(words, address, 16);
#endif
}

KD_HOST_DEVICE void store_16_bytes(char* address, const std::uint32_t (&words)[4]) {
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<uint4*>(address) = make_uint4(words[0], words[1], words[2], words[3]);
#else
  std::memcpy(address, words, 16);
#endif
}

KD_HOST_DEVICE void swap_halves(std::uint32_t (&words)[4], Columns c) {
  const bool swap = c.second < c.first;
  const std::uint32_t lower[2] = {words[0], words[1]}, upper[2] = {words[2], words[3]};
  words[0] = swap ? upper[0] : lower[0], words[1] = swap ? upper[1] : lower[1];
  words[2] = swap ? lower[0] : upper[0], words[3] = swap ? lower[1] : upper[1];
}

// The dtypes: read from the problem, or known when the kernel is compiled.
template <int CASE>
KD_HOST_DEVICE int logits_dtype(const RowTensor& t) {
  return CASE == ALL_BF16 ? BF16 : CASE == F32_TO_BF16 ? F32 : t.dtype;
}
template <int CASE>
KD_HOST_DEVICE int gradient_dtype(const RowProblem& p) {
  return is_common(CASE) ? BF16 : p.grad.dtype;
}

// `words` are the items of 2 bytes as they lie in memory.
template <int CASE>
KD_HOST_DEVICE void load_group(SharedAddress slice, const RowTensor& tensor, Columns c, float (&x)[GROUP], std::uint32_t (&words)[4]) {
  const int dtype = logits_dtype<CASE>(tensor);
  if (dtype == F32) {
    load_16_bytes(slice + c.first * 4, words);
    KD_UNROLL for (int e = 0; e < 4; ++e) x[e] = as_float(words[e]);
    load_16_bytes(slice + c.second * 4, words);
    KD_UNROLL for (int e = 0; e < 4; ++e) x[4 + e] = as_float(words[e]);
    return;
  }
  load_16_bytes(slice + leftmost(c) * 2, words);
  if (CASE != ALL_BF16) swap_halves(words, c);  // ALL_BF16 is ADJACENT
  if (dtype == BF16) {
    KD_UNROLL for (int e = 0; e < 4; ++e) x[2 * e] = as_float(words[e] << 16), x[2 * e + 1] = as_float(words[e] & 0xffff0000u);
  } else {
    KD_UNROLL for (int e = 0; e < 4; ++e) x[2 * e] = half_to_float(words[e]), x[2 * e + 1] = half_to_float(words[e] >> 16);
  }
}

// The logit of a value in memory and its derivative: softcap * tanh(scale * value / softcap), or scale * value without a softcap.
KD_HOST_DEVICE float transformed(float value, float scale, float softcap, float& slope) {
  value *= scale;
  slope = scale;
  if (softcap == 0.f) return value;
  const float x = value * reciprocal(softcap);
  const float twice = -2.f * fabsf(x);
  const float decay = power_of_two(twice * LOG2E), minus = exp_minus_1(twice);
  const float tanh = quotient(-minus, 2.f + minus);
  slope = scale * quotient(4.f * decay, (1.f + decay) * (1.f + decay));  // 1 - tanh^2 without its cancellation
  return (x < 0.f ? -softcap : softcap) * tanh;
}

KD_HOST_DEVICE void transform_group(float (&x)[GROUP], float scale, float softcap) {
  float slope;
  KD_UNROLL for (int e = 0; e < GROUP; ++e) x[e] = transformed(x[e], scale, softcap, slope);
}

KD_HOST_DEVICE bool is_whole(const Slice& s, Columns c) {
  return c.inside || (c.first + 4 <= s.columns && c.second + 4 <= s.columns);
}
KD_HOST_DEVICE bool is_beyond(const Slice& s, Columns c) {
  return !c.inside && c.first >= s.columns && c.second >= s.columns;
}

// Masks columns beyond the vocabulary, because shared memory holds other values there.
KD_HOST_DEVICE void mask_beyond(const Slice& s, Columns c, float (&x)[GROUP]) {
  KD_UNROLL for (int e = 0; e < 4; ++e) {
    if (c.first + e >= s.columns) x[e] = MASKED;
    if (c.second + e >= s.columns) x[4 + e] = MASKED;
  }
}

template <int G>
KD_HOST_DEVICE float lowest_of(const float (&x)[G][GROUP]) {
  float m = lowest(x[0]);
  KD_UNROLL for (int g = 1; g < G; ++g) m = fminf(m, lowest(x[g]));
  return m;
}

template <int G>
KD_HOST_DEVICE float highest_of(const float (&x)[G][GROUP]) {
  float m = highest(x[0]);
  KD_UNROLL for (int g = 1; g < G; ++g) m = fmaxf(m, highest(x[g]));
  return m;
}

// G groups: one, or all groups of a chunk whose columns are all valid.
template <int G>
KD_HOST_DEVICE bool mask_ends(const Slice& s, const Columns (&c)[G], float (&x)[G][GROUP]) {
  if (G > 1 || is_whole(s, c[0])) return false;
  mask_beyond(s, c[0], x[0]);
  return true;
}

// The least and the largest logit of G groups. Items of bf16 are compared two at a time.
struct Range {
  float least, most;
};

template <int CASE, int G>
KD_HOST_DEVICE Range range_of(const float (&x)[G][GROUP], const std::uint32_t (&words)[G][4]) {
  if (CASE != ALL_BF16) return {lowest_of(x), highest_of(x)};
  std::uint32_t low = words[0][0], high = words[0][0];
  KD_UNROLL for (int i = 1; i < 4 * G; ++i) {
    low = packed_min(low, words[i / 4][i % 4]);
    high = packed_max(high, words[i / 4][i % 4]);
  }
  return {fminf(as_float(low << 16), as_float(low & 0xffff0000u)), fmaxf(as_float(high << 16), as_float(high & 0xffff0000u))};
}

// Masks the masked logits, and returns whether there is one. One comparison serves all groups. `range` is the range of x, before and after.
template <int G>
KD_HOST_DEVICE bool mask(const Slice& s, const Columns (&c)[G], float (&x)[G][GROUP], Range& range) {
  const bool any = range.least < FLOOR;
  if (any) {
    KD_UNROLL for (int g = 0; g < G; ++g)
      KD_UNROLL for (int e = 0; e < GROUP; ++e) x[g][e] = x[g][e] < FLOOR ? MASKED : x[g][e];
  }
  if (!mask_ends(s, c, x)) return any;
  range.most = highest_of(x);
  return true;
}

template <int CASE, int G>
KD_HOST_DEVICE Range load_student(const RowProblem& p, const Slice& s, const Columns (&c)[G], float (&x)[G][GROUP],
                                  float (&slope)[G][GROUP]) {
  std::uint32_t words[G][4];
  KD_UNROLL for (int g = 0; g < G; ++g) {
    load_group<CASE>(s.student, p.student, c[g], x[g], words[g]);
    if (CASE == TRANSFORMED) {
      KD_UNROLL for (int e = 0; e < GROUP; ++e) x[g][e] = transformed(x[g][e], p.student_scale, p.student_softcap, slope[g][e]);
    }
  }
  return range_of<CASE>(x, words);
}

template <int CASE, int G>
KD_HOST_DEVICE Range load_teacher(const RowProblem& p, SharedAddress path, const RowTensor& tensor, const Columns (&c)[G],
                                  float (&x)[G][GROUP]) {
  std::uint32_t words[G][4];
  KD_UNROLL for (int g = 0; g < G; ++g) {
    load_group<CASE>(path, tensor, c[g], x[g], words[g]);
    if (CASE == TRANSFORMED) transform_group(x[g], p.teacher_scale, p.teacher_softcap);
  }
  return range_of<CASE>(x, words);
}

// The masked contrast. Returns whether any logit is masked, and puts the largest into `most`. Audio logits below `threshold` are masked.
// If MASKS is false, a masked logit may stay -inf or any number below -1e30. That is enough for an exponential.
template <int CASE, bool MASKS, int G>
KD_HOST_DEVICE bool read_contrast(const RowProblem& p, const Slice& s, const RowInputs& r, float threshold, const Columns (&c)[G],
                                  float (&z)[G][GROUP], float& most) {
  Range range = load_teacher<CASE>(p, s.audio, p.audio, c, z);
  unsigned below[G] = {};  // one bit for each logit that is masked before z is the contrast; a NaN does not hide it
  bool any = false;
  if (!is_common(CASE) && p.has_plausibility) {
    KD_UNROLL for (int g = 0; g < G; ++g)
      KD_UNROLL for (int e = 0; e < GROUP; ++e) below[g] |= z[g][e] < threshold ? 1u << e : 0u;
    any = true;
  }
  if (uses_text(p, r)) {
    float t[G][GROUP];
    const Range of_text = load_teacher<CASE>(p, s.text, p.text, c, t);
    if (fminf(of_text.least, range.least) < FLOOR) {
      // An -inf on either path would make the contrast +inf or NaN.
      KD_UNROLL for (int g = 0; g < G; ++g)
        KD_UNROLL for (int e = 0; e < GROUP; ++e) below[g] |= z[g][e] < FLOOR || t[g][e] < FLOOR ? 1u << e : 0u;
      any = true;
    }
    // Not (1 + alpha) a - alpha t: here a constant in both paths cancels first.
    KD_UNROLL for (int g = 0; g < G; ++g)
      KD_UNROLL for (int e = 0; e < GROUP; ++e) z[g][e] += r.alpha * (z[g][e] - t[g][e]);
    if (MASKS) range.least = lowest_of(z);
    range.most = highest_of(z);
  }
  if (MASKS) any |= range.least < FLOOR;
  if (any) {
    KD_UNROLL for (int g = 0; g < G; ++g)
      KD_UNROLL for (int e = 0; e < GROUP; ++e) z[g][e] = z[g][e] < FLOOR || (below[g] >> e & 1u) != 0 ? MASKED : z[g][e];
    range.most = highest_of(z);
  }
  if (mask_ends(s, c, z)) {
    any = true;
    range.most = highest_of(z);
  }
  most = range.most;
  return any;
}

// -- sums ---------------------------------------------------------------------------------------------------------------------

// The source of the softmax at temperature 1: not needed, tau is 1, tau is 2 (e^s = (e^(s/2))^2), or an exponential of its own.
constexpr int Q1_NONE = 0, Q1_SAME = 1, Q1_SQUARE = 2, Q1_OWN = 3;

struct Formula {
  float inverse_tau, rate;  // rate: log2(e) / tau
  int q1;
};

KD_HOST_DEVICE Formula formula_of(const RowProblem& p) {
  Formula f;
  const float tau = p.with_kd ? p.temperature : 1.f;  // without kd only the label's softmax is needed
  f.inverse_tau = tau == 2.f ? 0.5f : 1.f / tau;
  f.rate = f.inverse_tau * LOG2E;
  f.q1 = !p.with_ce ? Q1_NONE : tau == 1.f ? Q1_SAME : tau == 2.f ? Q1_SQUARE : Q1_OWN;
  return f;
}

// Partials of a thread, a warp, a block or a row. A merge takes three steps: the Maxima are merged, each partial is moved to the common
// maxima (`moved`), and the moved partials are added.

// Sums are relative to the maxima beside them.
struct RowSums {
  struct Maxima {
    float s = FLOOR, z = FLOOR;
    float hole = MASKED;  // the largest logit of the weighting side among columns where the other side is masked

    KD_HOST_DEVICE static Maxima merge(const Maxima& a, const Maxima& b) {
      return {fmaxf(a.s, b.s), fmaxf(a.z, b.z), fmaxf(a.hole, b.hole)};
    }
  };
  struct Sums {
    float q = 0.f, q1 = 0.f, p = 0.f;
    float cross = 0.f;  // a sum over exponents: forward sum 2^z (z - s), reverse sum 2^s (s - z)
    float label = 0.f;  // the label's logit, in the sums of the one thread that read it

    KD_HOST_DEVICE static Sums add(const Sums& a, const Sums& b) {
      return {a.q + b.q, a.q1 + b.q1, a.p + b.p, a.cross + b.cross, a.label + b.label};
    }
  };
  Maxima maxima;
  Sums sums;

  template <int DIVERGENCE>
  KD_HOST_DEVICE RowSums moved(const Maxima& to, const Formula& f) const {
    RowSums m = {to, sums};
    const float s_step = product(maxima.s, f.rate) - product(to.s, f.rate), z_step = product(maxima.z, f.rate) - product(to.z, f.rate);
    const float of_q = power_of_two(s_step), of_p = power_of_two(z_step);
    m.sums.q *= of_q;
    m.sums.p *= of_p;
    if (f.q1 == Q1_SQUARE) m.sums.q1 *= of_q * of_q;
    if (f.q1 == Q1_OWN) m.sums.q1 *= power_of_two(product(maxima.s, LOG2E) - product(to.s, LOG2E));
    if (DIVERGENCE == FORWARD_KL) m.sums.cross = of_p * (sums.cross + sums.p * (z_step - s_step));
    if (DIVERGENCE == REVERSE_KL) m.sums.cross = of_q * (sums.cross + sums.q * (s_step - z_step));
    return m;
  }
};

// sum p log(p/m) and sum q log(q/m), before the division by their sums.
struct JsdSums {
  struct Maxima {
    KD_HOST_DEVICE static Maxima merge(const Maxima& a, const Maxima&) { return a; }
  };
  struct Sums {
    float p = 0.f, q = 0.f;

    KD_HOST_DEVICE static Sums add(const Sums& a, const Sums& b) { return {a.p + b.p, a.q + b.q}; }
  };
  Maxima maxima;
  Sums sums;

  template <int DIVERGENCE>
  KD_HOST_DEVICE JsdSums moved(const Maxima&, const Formula&) const {
    return *this;
  }
};

struct AudioMax {
  struct Maxima {
    float value = FLOOR;

    KD_HOST_DEVICE static Maxima merge(const Maxima& a, const Maxima& b) { return {fmaxf(a.value, b.value)}; }
  };
  struct Sums {
    KD_HOST_DEVICE static Sums add(const Sums& a, const Sums&) { return a; }
  };
  Maxima maxima;
  Sums sums;

  template <int DIVERGENCE>
  KD_HOST_DEVICE AudioMax moved(const Maxima& to, const Formula&) const {
    return {to, sums};
  }
};

static_assert(sizeof(RowSums) <= PARTIAL_BYTES && sizeof(JsdSums) <= PARTIAL_BYTES && sizeof(AudioMax) <= PARTIAL_BYTES,
              "partials do not fit");

// The work of a thread on one chunk. `work` takes all groups at once if all columns of the chunk are valid, otherwise one by one.
template <class Work>
KD_HOST_DEVICE void each_group(const Slice& slice, Columns c, int chunk, Work work) {
  static_assert(GROUPS == 2, "the groups are listed");
  const Columns all[GROUPS] = {in_chunk(c, chunk, slice.columns, 0), in_chunk(c, chunk, slice.columns, 1)};
  if (all[0].inside) {
    work(all);
    return;
  }
  for (int g = 0; g < GROUPS; ++g) {
    const Columns one[1] = {in_chunk(c, chunk, slice.columns, g)};
    if (!is_beyond(slice, one[0])) work(one);
  }
}

template <int CASE, int G>
KD_HOST_DEVICE void add_audio_max(const RowProblem& p, const Slice& s, const Columns (&c)[G], AudioMax& m) {
  float a[G][GROUP];
  Range range = load_teacher<CASE>(p, s.audio, p.audio, c, a);
  mask(s, c, a, range);
  m.maxima.value = fmaxf(m.maxima.value, range.most);
}

// Some groups of an online softmax: the maxima move first, then the earlier sums, and then the groups are added.
template <int DIVERGENCE, int CASE, int G>
KD_HOST_DEVICE void add_groups(const RowProblem& p, const Formula& f, const Slice& slice, const RowInputs& r, float threshold,
                               const Columns (&c)[G], RowSums& row) {
  RowSums::Maxima &maxima = row.maxima;
  RowSums::Sums &sums = row.sums;
  float s[G][GROUP], z[G][GROUP], slope[G][GROUP];
  Range s_range = load_student<CASE>(p, slice, c, s, slope);
  const bool s_masked = mask(slice, c, s, s_range);
  const float s_max = fmaxf(maxima.s, s_range.most), s_top = product(s_max, f.rate);
  const float s_step = product(maxima.s, f.rate) - s_top, s_keep = power_of_two(s_step);
  const float q_old = sums.q, p_old = sums.p;
  sums.q *= s_keep;
  if (is_common(CASE) || f.q1 == Q1_SQUARE) sums.q1 *= s_keep * s_keep;
  if (!is_common(CASE) && f.q1 == Q1_OWN) {
    const float top = product(s_max, LOG2E);
    sums.q1 *= power_of_two(product(maxima.s, LOG2E) - top);
    KD_UNROLL for (int g = 0; g < G; ++g)
      KD_UNROLL for (int e = 0; e < GROUP; ++e) sums.q1 += power_of_two(fused(s[g][e], LOG2E, -top));
  }
  maxima.s = s_max;
  if (!is_common(CASE) && !reads_teacher(p)) {
    KD_UNROLL for (int g = 0; g < G; ++g)
      KD_UNROLL for (int e = 0; e < GROUP; ++e) sums.q += power_of_two(fused(s[g][e], f.rate, -s_top));
    return;
  }
  float z_most;
  const bool z_masked = read_contrast<CASE, true>(p, slice, r, threshold, c, z, z_most);
  const float z_max = fmaxf(maxima.z, z_most), z_top = product(z_max, f.rate);
  const float z_step = product(maxima.z, f.rate) - z_top, z_keep = power_of_two(z_step);
  maxima.z = z_max;
  sums.p *= z_keep;
  if (DIVERGENCE == FORWARD_KL) {
    sums.cross = z_keep * (sums.cross + p_old * (z_step - s_step));
    if (s_masked) {
      KD_UNROLL for (int g = 0; g < G; ++g)
        KD_UNROLL for (int e = 0; e < GROUP; ++e) maxima.hole = fmaxf(maxima.hole, s[g][e] < FLOOR ? z[g][e] : MASKED);
    }
  }
  if (DIVERGENCE == REVERSE_KL) {
    sums.cross = s_keep * (sums.cross + q_old * (s_step - z_step));
    if (z_masked) {
      KD_UNROLL for (int g = 0; g < G; ++g)
        KD_UNROLL for (int e = 0; e < GROUP; ++e) maxima.hole = fmaxf(maxima.hole, z[g][e] < FLOOR ? s[g][e] : MASKED);
    }
  }
  float square_sum = 0.f;
  KD_UNROLL for (int g = 0; g < G; ++g)
    KD_UNROLL for (int e = 0; e < GROUP; ++e) {
      const float s_exponent = fused(s[g][e], f.rate, -s_top), z_exponent = fused(z[g][e], f.rate, -z_top);
      const float s_exp = power_of_two(s_exponent), z_exp = power_of_two(z_exponent);
      sums.q += s_exp;
      sums.p += z_exp;
      square_sum += s_exp * s_exp;
      if (DIVERGENCE == FORWARD_KL) sums.cross += z_exp * (z_exponent - s_exponent);
      if (DIVERGENCE == REVERSE_KL) sums.cross += s_exp * (s_exponent - z_exponent);
    }
  if (is_common(CASE) || f.q1 == Q1_SQUARE) sums.q1 += square_sum;
}

// The label's logit. One thread of the block that owns the label's column reads it.
KD_HOST_DEVICE void add_label(const RowProblem& p, const Slice& s, const RowInputs& r, RowSums& row) {
  const std::int64_t column = r.target - s.start;
  if (!is_inside(p, r) || column < 0 || column >= s.columns) return;
  const int index = static_cast<int>(column), item = item_bytes(p.student.dtype);
  std::uint32_t words[4];
  load_16_bytes(s.student + index * item / 16 * 16, words);
  const int word = index * item / 4 % 4;
  const std::uint32_t bits = word == 0 ? words[0] : word == 1 ? words[1] : word == 2 ? words[2] : words[3];
  const std::uint32_t half = index % 2 == 0 ? bits : bits >> 16;
  float x = p.student.dtype == F32 ? as_float(bits) : p.student.dtype == BF16 ? as_float(half << 16) : half_to_float(half);
  float slope;
  x = transformed(x, p.student_scale, p.student_softcap, slope);
  row.sums.label = x < FLOOR ? MASKED : x;
}

// -- results of the whole row ---------------------------------------------------------------------------------------------------------

struct RowScalars {
  float s_top, z_top, q1_top;  // maxima times the rate of their softmax
  float inverse_q, inverse_p;
  float log_z;   // log(p/q) = (z_exponent - s_exponent) log 2 - log_z; any number if one side is masked everywhere
  float centre;  // reverse: KL(q||p), jsd: KL(q||m). It makes the gradient sum to 0
  // Factors of the gradient: of 2^s and 2^z for the divergence, of the label's softmax (2^s, its square, or an exponential of its own),
  // and what is subtracted in the label's column.
  float of_q, of_p, of_same, of_square, of_own, of_label;
  float kd, ce;
  int infinite;  // forward KL only: p has mass in a column where s is masked
};

KD_HOST_DEVICE RowScalars normalised(const RowSums& row, const Formula& f) {
  RowScalars k = {};
  k.s_top = product(row.maxima.s, f.rate);
  k.z_top = product(row.maxima.z, f.rate);
  k.q1_top = product(row.maxima.s, LOG2E);
  k.inverse_q = reciprocal(row.sums.q);
  k.inverse_p = reciprocal(row.sums.p);
  k.log_z = row.sums.p == 0.f || row.sums.q == 0.f ? 0.f : logf(row.sums.p / row.sums.q);
  return k;
}

// Computes kd, ce and the factors of the gradient.
template <int DIVERGENCE>
KD_HOST_DEVICE void finish_row(const RowProblem& p, const Formula& f, const RowInputs& r, const RowSums& row, const JsdSums& jsd,
                               RowScalars& k) {
  if (p.with_kd) {
    const bool empty = row.sums.p == 0.f;
    bool infinite = false;
    float kd;
    if (DIVERGENCE == FORWARD_KL) {
      kd = row.sums.cross * k.inverse_p * LN2 - k.log_z;
      infinite = power_of_two(fused(row.maxima.hole, f.rate, -k.z_top)) > 0.f;
      k.infinite = infinite;
    } else if (DIVERGENCE == REVERSE_KL) {
      k.centre = row.sums.q == 0.f ? 0.f : row.sums.cross * k.inverse_q * LN2 + k.log_z;
      kd = k.centre;
      infinite = power_of_two(fused(row.maxima.hole, f.rate, -k.s_top)) > 0.f;
    } else {
      k.centre = jsd.sums.q * k.inverse_q;
      kd = p.jsd_beta * jsd.sums.p * k.inverse_p + (1.f - p.jsd_beta) * k.centre;
    }
    kd /= f.inverse_tau * f.inverse_tau;
    if (kd < 0.f) kd = 0.f;          // rounding; NaN passes
    if (infinite) kd += infinity();  // an addition, so that a NaN from elsewhere in the row stays NaN
    if (empty) kd = 0.f;
    k.kd = is_legal(p, r) ? kd : not_a_number();
    // kd has the factor tau^2, and d (s / tau) / d s is 1 / tau
    float scale = empty || (DIVERGENCE == REVERSE_KL && infinite) ? 0.f : r.kd_coef / f.inverse_tau;
    if (!is_legal(p, r) && r.kd_coef != 0.f) scale = not_a_number();
    // A term whose factor is 0 may be NaN.
    k.of_q = scale == 0.f ? 0.f : scale * k.inverse_q;
    k.of_p = scale == 0.f ? 0.f : scale * k.inverse_p;
    if (DIVERGENCE == JSD) k.of_q *= 1.f - p.jsd_beta;
  }
  if (p.with_ce) {
    const float q1_sum = f.q1 == Q1_SAME ? row.sums.q : row.sums.q1;
    const float exponent = f.q1 == Q1_SQUARE ? 2.f * fused(row.sums.label, f.rate, -k.s_top) : fused(row.sums.label, LOG2E, -k.q1_top);
    // The loss of a masked label is +inf, also in a row where everything is masked and the sum is 0.
    float ce = logf(q1_sum == 0.f ? 1.f : q1_sum) - exponent * LN2;
    ce = row.sums.label == MASKED ? ce + infinity() : ce < 0.f ? 0.f : ce;
    k.ce = is_inside(p, r) ? ce : not_a_number();
    k.of_label = is_inside(p, r) || r.ce_coef == 0.f ? r.ce_coef : not_a_number();
    const float factor = k.of_label == 0.f ? 0.f : k.of_label * reciprocal(q1_sum);
    k.of_same = f.q1 == Q1_SAME ? factor : 0.f;
    k.of_square = f.q1 == Q1_SQUARE ? factor : 0.f;
    k.of_own = f.q1 == Q1_OWN ? factor : 0.f;
  }
}

// log(p / m) and log(q / m) from log(p / q), m = beta p + (1 - beta) q. The larger of the two is
// -log(1 + c (e^-|log p/q| - 1)), where c is the other one's share of m. The smaller is |log p/q| less.
KD_HOST_DEVICE void jsd_terms(float log_ratio, float beta, float& log_p_m, float& log_q_m) {
  const float distance = fabsf(log_ratio);
  const bool p_larger = log_ratio >= 0.f;
  const float larger = -log_1_plus((p_larger ? 1.f - beta : beta) * exp_minus_1(-distance));
  const float smaller = larger - distance;
  log_p_m = p_larger ? larger : smaller;
  log_q_m = p_larger ? smaller : larger;
}

template <int CASE, int G>
KD_HOST_DEVICE void add_jsd(const RowProblem& p, const Formula& f, const Slice& slice, const RowInputs& r, float threshold,
                            const Columns (&c)[G], const RowScalars& k, JsdSums& row) {
  float s[G][GROUP], z[G][GROUP], slope[G][GROUP];
  float z_most;
  Range range = load_student<CASE>(p, slice, c, s, slope);
  mask(slice, c, s, range);
  read_contrast<CASE, true>(p, slice, r, threshold, c, z, z_most);
  KD_UNROLL for (int g = 0; g < G; ++g)
    KD_UNROLL for (int e = 0; e < GROUP; ++e) {
      const float s_exponent = fused(s[g][e], f.rate, -k.s_top), z_exponent = fused(z[g][e], f.rate, -k.z_top);
      float log_p_m, log_q_m;
      jsd_terms((z_exponent - s_exponent) * LN2 - k.log_z, p.jsd_beta, log_p_m, log_q_m);
      row.sums.p += power_of_two(z_exponent) * log_p_m;
      row.sums.q += power_of_two(s_exponent) * log_q_m;
    }
}

// -- gradient -----------------------------------------------------------------------------------------------------------------

// Stores a group's items at `slice`, of which `writable` columns exist. The 2-byte items of a group are neighbours: one access stores
// them. WHOLE means that all columns of the group exist.
template <int CASE, bool WHOLE>
KD_HOST_DEVICE void store_group(char* slice, int dtype, Columns c, int writable, const float (&x)[GROUP]) {
  std::uint32_t words[4];
  if (dtype == F32) {
    const float first[4] = {x[0], x[1], x[2], x[3]}, second[4] = {x[4], x[5], x[6], x[7]};
    bool whole = c.first + 4 <= writable && c.second + 4 <= writable;
    if (WHOLE) whole = true;
    if (whole) {
      KD_UNROLL for (int e = 0; e < 4; ++e) words[e] = as_bits(first[e]);
      store_16_bytes(slice + c.first * 4, words);
      KD_UNROLL for (int e = 0; e < 4; ++e) words[e] = as_bits(second[e]);
      store_16_bytes(slice + c.second * 4, words);
      return;
    }
    KD_UNROLL for (int e = 0; e < 4; ++e) {
      if (c.first + e < writable) reinterpret_cast<float*>(slice)[c.first + e] = first[e];
      if (c.second + e < writable) reinterpret_cast<float*>(slice)[c.second + e] = second[e];
    }
    return;
  }
  const int column = leftmost(c);
  KD_UNROLL for (int e = 0; e < 4; ++e) words[e] = pack(x[2 * e], x[2 * e + 1], dtype == BF16);
  if (CASE != ALL_BF16) swap_halves(words, c);
  bool whole = column + GROUP <= writable;
  if (WHOLE) whole = true;
  if (whole) {
    store_16_bytes(slice + column * 2, words);
    return;
  }
  KD_UNROLL for (int e = 0; e < GROUP; ++e) {
    if (column + e < writable)
      reinterpret_cast<std::uint16_t*>(slice)[column + e] = static_cast<std::uint16_t>(words[e / 2] >> 16 * (e % 2));
  }
}

// The gradient of some groups, from shared memory into `grad`. `grad` is the address of the slice's first column.
template <int DIVERGENCE, int CASE, int G>
KD_HOST_DEVICE void write_gradient(const RowProblem& p, const Formula& f, const Slice& slice, const RowInputs& r, float threshold,
                                   const Columns (&c)[G], const RowScalars& k, char* grad) {
  // The forward KL has only exponentials of masked logits, and they are 0. A row of infinite KL is the exception.
  constexpr bool MASKS = !(DIVERGENCE == FORWARD_KL && is_common(CASE));
  float s[G][GROUP], slope[G][GROUP], d[G][GROUP];
  const std::int64_t exist = p.student_width - slice.start;
  const int writable = static_cast<int>(exist < 0x7fffffff ? exist : 0x7fffffff);
  const bool teaches = (is_common(CASE) || p.with_kd) && (k.of_q != 0.f || k.of_p != 0.f);
  if (!teaches && (!p.with_ce || k.of_label == 0.f)) {  // with factors of 0 the gradient is 0, even beside NaN
    const float none[GROUP] = {};
    KD_UNROLL for (int g = 0; g < G; ++g) store_group<CASE, (G > 1)>(grad, gradient_dtype<CASE>(p), c[g], writable, none);
    return;
  }
  Range range = load_student<CASE>(p, slice, c, s, slope);
  const bool masked = MASKS ? mask(slice, c, s, range) : mask_ends(slice, c, s) || k.infinite;
  if (teaches) {
    float z[G][GROUP], z_most;
    read_contrast<CASE, MASKS>(p, slice, r, threshold, c, z, z_most);
    const float of_q = k.of_same + k.of_q;
    KD_UNROLL for (int g = 0; g < G; ++g)
      KD_UNROLL for (int e = 0; e < GROUP; ++e) {
        const float s_exponent = fused(s[g][e], f.rate, -k.s_top), z_exponent = fused(z[g][e], f.rate, -k.z_top);
        const float s_exp = power_of_two(s_exponent);
        if (DIVERGENCE == FORWARD_KL) {
          d[g][e] = s_exp * fused(s_exp, k.of_square, of_q) - power_of_two(z_exponent) * k.of_p;
        } else {
          const float log_ratio = (z_exponent - s_exponent) * LN2 - k.log_z, of_label_softmax = fused(s_exp, k.of_square, k.of_same);
          float log_p_m, log_q_m = -log_ratio;
          if (DIVERGENCE == JSD) jsd_terms(log_ratio, p.jsd_beta, log_p_m, log_q_m);
          d[g][e] = s_exp * (k.of_q * (log_q_m - k.centre) + of_label_softmax);
        }
      }
  } else {
    KD_UNROLL for (int g = 0; g < G; ++g)
      KD_UNROLL for (int e = 0; e < GROUP; ++e) {
        const float s_exp = power_of_two(fused(s[g][e], f.rate, -k.s_top));
        d[g][e] = s_exp * fused(s_exp, k.of_square, k.of_same);
      }
  }
  if (!is_common(CASE) && f.q1 == Q1_OWN) {
    KD_UNROLL for (int g = 0; g < G; ++g)
      KD_UNROLL for (int e = 0; e < GROUP; ++e) d[g][e] += power_of_two(fused(s[g][e], LOG2E, -k.q1_top)) * k.of_own;
  }
  if (p.with_ce) {
    // In other groups the unsigned difference is 4 or more.
    const unsigned label = static_cast<unsigned>(r.target - slice.start);
    KD_UNROLL for (int g = 0; g < G; ++g) {
      if (label - c[g].first < 4u || label - c[g].second < 4u) {
        KD_UNROLL for (int e = 0; e < 4; ++e) {
          // Not "if": the compiler would use the column as an index and move the array to local memory.
          d[g][e] -= label - c[g].first == static_cast<unsigned>(e) ? k.of_label : 0.f;
          d[g][4 + e] -= label - c[g].second == static_cast<unsigned>(e) ? k.of_label : 0.f;
        }
      }
    }
  }
  if (CASE == TRANSFORMED) {
    KD_UNROLL for (int g = 0; g < G; ++g)
      KD_UNROLL for (int e = 0; e < GROUP; ++e) d[g][e] *= slope[g][e];
  }
  if (masked) {
    KD_UNROLL for (int g = 0; g < G; ++g)
      KD_UNROLL for (int e = 0; e < GROUP; ++e) d[g][e] = s[g][e] < FLOOR ? 0.f : d[g][e];
  }
  KD_UNROLL for (int g = 0; g < G; ++g) store_group<CASE, (G > 1)>(grad, gradient_dtype<CASE>(p), c[g], writable, d[g]);
}

// The first gradient column that no group writes. The group that holds the last valid id is written whole (if halves lie apart, the half).
KD_HOST_DEVICE std::int64_t first_untouched(const RowProblem& p, const RowLayout& layout) {
  const int step = layout.arrangement == SPLIT ? 4 : GROUP;
  return (p.vocab + step - 1) / step * step;
}

// Writes 0 to columns [from, V_s) of a row's gradient, as thread `lane` of `lanes`. `from` columns are a multiple of 16 bytes.
KD_HOST_DEVICE void zero_gradient(const RowProblem& p, std::int64_t row, std::int64_t from, int lane, int lanes) {
  const int item = item_bytes(p.grad.dtype);
  char* grad = row_address(p, p.grad, row, 0);
  const std::int64_t end = p.student_width * item;
  const std::uint32_t zero[4] = {0, 0, 0, 0};
  for (std::int64_t at = from * item + 16ll * lane; at < end; at += 16ll * lanes) {
    if (at + 16 <= end) {
      store_16_bytes(grad + at, zero);
    } else {
      for (std::int64_t b = at; b < end; b += 2) *reinterpret_cast<std::uint16_t*>(grad + b) = 0;
    }
  }
}

}  // namespace kdkernels::cuda
