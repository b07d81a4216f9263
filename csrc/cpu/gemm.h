// Products of bf16 matrices with a float32 result, which torch's CPU library offers only by way of float32 operands, and the
// narrowing of such a result that lies transposed.
#pragma once

#include <cstdint>

namespace kdkernels {

// c (m, n) = sum over parts of a_part (m, k) w (n, k)^T, accumulated in float32; added to what c holds with `accumulate`; w given
// as (k, n) with `w_by_rows`. Rows lie `ld*` items apart, items of a row beside each other; k is even. Scratch: 256 KiB a thread.
struct Bf16Gemm {
  std::uintptr_t a[2] = {0, 0};  // bf16; the second is 0 where there is one part
  std::int64_t lda[2] = {0, 0};
  std::uintptr_t w = 0;  // bf16
  std::int64_t ldw = 0;
  std::uintptr_t c = 0;  // float32
  std::int64_t ldc = 0;
  std::int64_t m = 0, n = 0, k = 0;
  bool accumulate = false, w_by_rows = false;
  int threads = 1;
};

// out (n, m) bf16 = x (m, n)^T, rounded to nearest even as torch does. Rows lie `ld*` items apart. No scratch.
struct TransposeToBf16 {
  std::uintptr_t x = 0;  // float32
  std::int64_t ldx = 0;
  std::uintptr_t out = 0;  // bf16
  std::int64_t ldo = 0;
  std::int64_t m = 0, n = 0;
  int threads = 1;
};

#if defined(KDKERNELS_X86)
void transpose_to_bf16_avx512(const TransposeToBf16& problem);
void gemm_avx512_bf16(const Bf16Gemm& problem);  // on a processor whose best_isa() is avx512_bf16
#endif

}  // namespace kdkernels
