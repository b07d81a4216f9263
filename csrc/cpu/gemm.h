// Products of bf16 matrices with a float32 result. torch's CPU library has them only for float32 operands.
// Here is also the kernel that transposes such a result and rounds it to bf16.
#pragma once

#include <cstdint>

namespace kdkernels {

// c (m, n) = sum over parts of a_part (m, k) w (n, k)^T, accumulated in float32. `accumulate` adds the result to what c holds.
// `w_by_rows` says that w is given as (k, n). Rows lie `ld*` items apart, and the items of a row lie side by side. k is even.
// Each thread takes 256 KiB of scratch.
//
// With `items` the sum of the two parts is also given as 16-bit integers: ITEM_GROUP of k share a step. The kernel makes integers of w
// too, and takes one product instead of two. The errors of both are near 2^-14 of their group's root mean square. A group's integers
// are so small that its sum fits 32 bits, whatever the signs. Where w has infinities or NaN, the kernel takes the parts after all.
constexpr int ITEM_GROUP = 128;
constexpr float ITEM_NORM = 65400.f, W_ITEM_NORM = 32767.f;  // bounds of sqrt(sum of squares) of a group; 2^31 over their product
struct Bf16Gemm {
  std::uintptr_t a[2] = {0, 0};  // bf16; with one part the second is 0
  std::int64_t lda[2] = {0, 0};
  std::uintptr_t w = 0;  // bf16
  std::int64_t ldw = 0;
  std::uintptr_t c = 0;  // float32
  std::int64_t ldc = 0;
  std::int64_t m = 0, n = 0, k = 0;
  bool accumulate = false, w_by_rows = false;
  std::uintptr_t items = 0;       // int16 (m, groups * ITEM_GROUP), 0 from k on; or 0: none
  std::uintptr_t item_step = 0;   // float32 (m, groups): what 1 of the items stands for
  std::uintptr_t column_factor = 0;  // float32 (groups * ITEM_GROUP): w is multiplied by it, and the items are divided by it
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
