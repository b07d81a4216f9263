// A float vector of the widest kind for which the translation unit is compiled. It uses the compilers' vector extension (GCC, Clang).
// So one source serves AVX-512, AVX2, SSE and NEON. Everything here has internal linkage, since each instruction set has its own copy.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef std::int32_t vi __attribute__((vector_size(W * 4)));
typedef std::uint32_t vu __attribute__((vector_size(W * 4)));
typedef std::uint16_t vh __attribute__((vector_size(W * 2)));

inline vf splat(float x) { return x - vf{}; }
inline vf load(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }
inline vh load16(const std::uint16_t* p) {
  vh x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store16(std::uint16_t* p, vh x) { std::memcpy(p, &x, sizeof x); }

template <typename To, typename From>
inline To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

inline vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
inline vf vmax(vf a, vf b) { return a > b ? a : b; }

inline float hmax(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(bits<__m512>(x));
#else
  float m = x[0];
  for (int i = 1; i < W; ++i) m = x[i] > m ? x[i] : m;
  return m;
#endif
}
// In double, because the caller adds up the sums of hundreds of blocks of a row.
inline double hsum(vf x) {
#if defined(__AVX512F__)
  __m512 v = bits<__m512>(x);
  __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
  return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(v)), _mm512_cvtps_pd(high)));
#else
  double s = 0;
  for (int i = 0; i < W; ++i) s += x[i];
  return s;
#endif
}

inline vf from_bf16(vh h) { return bits<vf>(__builtin_convertvector(h, vu) << 16); }

inline vh to_bf16(vf x) {  // to nearest even; NaN stays NaN
#if defined(__AVX512BF16__)
  return bits<vh>(_mm512_cvtneps_pbh(bits<__m512>(x)));  // numbers below 1e-38 become 0
#else
  vu u = bits<vu>(x);
  vu rounded = (u + (0x7fffu + ((u >> 16) & 1u))) >> 16;
  vu nan = (u >> 16) | 0x40u;
  vi is_nan = x != x;
  return __builtin_convertvector(is_nan ? nan : rounded, vh);
#endif
}

inline vf from_f16(vh h) {
  vu u = __builtin_convertvector(h, vu);
  vu magnitude = (u & 0x7fffu) << 13;
  // Multiplying by 2^112 rebiases the exponent and normalises subnormals exactly.
  vf scaled = bits<vf>(magnitude) * splat(0x1p112f);
  vi special = (u & 0x7c00u) == 0x7c00u;
  vu inf_nan = magnitude | 0x7f800000u;
  vu value = special ? inf_nan : bits<vu>(scaled);
  return bits<vf>(value | ((u & 0x8000u) << 16));
}

inline vh to_f16(vf x) {  // to nearest even; overflow to infinity; NaN stays NaN
  vu u = bits<vu>(x);
  vu sign = (u >> 16) & 0x8000u;
  vu magnitude = u & 0x7fffffffu;
  // Subnormal halves: adding 0.5 aligns the mantissa, and the float adder does the rounding.
  vf aligned = bits<vf>(magnitude) + splat(0.5f);
  vu subnormal = bits<vu>(aligned) - 0x3f000000u;
  vu normal = (magnitude + (0xc8000fffu + ((magnitude >> 13) & 1u))) >> 13;
  vu inf_nan = magnitude > 0x7f800000u ? vu{} + 0x7e00u : vu{} + 0x7c00u;
  vu value = magnitude < 0x38800000u ? subnormal : normal;
  value = magnitude >= 0x47800000u ? inf_nan : value;
  return __builtin_convertvector(value | sign, vh);
}

// exp(x) for x <= 88; 0 below -87.3 (also at -inf); NaN stays NaN; exp(0) = 1. It is 2^n 2^f with |f| <= 1/2, and a polynomial gives
// 2^f within 1e-7. The rounding of x log2(e) adds an error of 6e-8 |x|. That error is large only where exp(x) is too small to matter.
inline vf vexp(vf x) {
  const vf log2e = splat(1.44269504088896341f);
#if defined(__AVX512F__)
  vf n = bits<vf>(_mm512_roundscale_ps(bits<__m512>(x * log2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding and subtracting it rounds to the nearest integer
  vf n = (x * log2e + magic) - magic;
#endif
  vf f = x * log2e - n;
  vf p = splat(1.326472731e-3f);
  p = p * f + splat(9.671512991e-3f);
  p = p * f + splat(5.550733581e-2f);
  p = p * f + splat(2.402224243e-1f);
  p = p * f + splat(6.931470037e-1f);
  p = p * f + splat(1.f);
#if defined(__AVX512F__)
  __mmask16 counts = _mm512_cmp_ps_mask(bits<__m512>(x), _mm512_set1_ps(-87.33f), _CMP_NLT_UQ);
  return bits<vf>(_mm512_maskz_scalef_ps(counts, bits<__m512>(p), bits<__m512>(n)));
#else
  vi exponent = __builtin_convertvector(n, vi) << 23;
  vf y = bits<vf>(bits<vi>(p) + exponent);
  return x < splat(-87.33f) ? vf{} : y;
#endif
}

// log(x) for normal x > 0 (Cephes' logf polynomial).
inline vf vlog(vf x) {
  vi u = bits<vi>(x);
  vi e = ((u >> 23) & 0xff) - 126;
  vf m = bits<vf>((u & 0x007fffff) | 0x3f000000);  // [0.5, 1)
  vi low = m < splat(0.707106781186547524f);
  vf k = __builtin_convertvector(e, vf) - select(low, splat(1.f), vf{});
  m = select(low, m + m, m) - splat(1.f);
  vf z = m * m;
  vf p = splat(7.0376836292e-2f);
  p = p * m + splat(-1.1514610310e-1f);
  p = p * m + splat(1.1676998740e-1f);
  p = p * m + splat(-1.2420140846e-1f);
  p = p * m + splat(1.4249322787e-1f);
  p = p * m + splat(-1.6668057665e-1f);
  p = p * m + splat(2.0000714765e-1f);
  p = p * m + splat(-2.4999993993e-1f);
  p = p * m + splat(3.3333331174e-1f);
  vf y = m * z * p + k * splat(-2.12194440e-4f) - splat(0.5f) * z;
  return m + y + k * splat(0.693359375f);
}

// log(1 + x) for x > -1. It is accurate for small |x|, because it corrects for the rounding error of 1 + x.
inline vf vlog1p(vf x) {
  vf u = splat(1.f) + x;
  return vlog(u) + (x - (u - splat(1.f))) / u;
}

inline vf vtanh(vf x) {
  vf z = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = p * z + splat(2.06390887954e-2f);
  p = p * z + splat(-5.37397155531e-2f);
  p = p * z + splat(1.33314422036e-1f);
  p = p * z + splat(-3.33332819422e-1f);
  vf small = x + x * z * p;
  vf magnitude = bits<vf>(bits<vi>(x) & 0x7fffffff);
  vf bounded = magnitude > splat(20.f) ? splat(20.f) : magnitude;
  vf large = splat(1.f) - splat(2.f) / (vexp(bounded + bounded) + splat(1.f));
  vf signed_large = bits<vf>(bits<vi>(large) | (bits<vi>(x) & vi(splat(-0.f))));
  vf y = magnitude < splat(0.625f) ? small : signed_large;
  return x != x ? x : y;
}

}  // namespace
