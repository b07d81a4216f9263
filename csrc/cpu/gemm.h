// Products of bf16 matrices with a float32 result. torch's CPU library has them only for float32 operands.
// Here is also the kernel that transposes such a result and rounds it to bf16.
#pragma once

#include <cstdint>

namespace kdkernels {

// c (m, n) = sum over parts of a_part (m, k) w (n, k)^T, accumulated in float32. `accumulate` adds the result to what c holds.
// `w_by_rows` says that w is given as (k, n). Rows lie `ld*` items apart, and the items of a row lie side by side. k is even.
// Each thread takes 256 KiB of scratch, and 136 KiB more with `rest`.
//
// `rest` is what one part leaves of a, as signed bytes: REST_GROUP of k share a factor. The kernel makes bytes of w too, and their
// product takes half the time of one with bf16. Its error is near 1% of that small part.
constexpr int REST_GROUP = 128;
struct Bf16Gemm {
  std::uintptr_t a[2] = {0, 0};  // bf16; with one part the second is 0
  std::int64_t lda[2] = {0, 0};
  std::uintptr_t w = 0;  // bf16
  std::int64_t ldw = 0;
  std::uintptr_t c = 0;  // float32
  std::int64_t ldc = 0;
  std::int64_t m = 0, n = 0, k = 0;
  bool accumulate = false, w_by_rows = false;
  std::uintptr_t rest = 0;        // int8 (m, groups * REST_GROUP), 0 from k on; or 0: none
  std::uintptr_t rest_scale = 0;  // float32 (m, groups): what a step of the bytes stands for
  std::uintptr_t rest_start = 0;  // int32 (m, groups): -128 times the sum of the group's bytes
  int threads = 1;
};

// out (n, m) bf16 = x (m, n)^T, rounded to nearest even as torch does. Rows lie `ld*` items apart. It takes no scratch.
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
void gemm_avx512_bf16(const Bf16Gemm& problem);  // needs a processor with best_isa() "avx512_bf16"
#endif

}  // namespace kdkernels
