// The row problem on a CUDA device, and how a row lies over a cluster. It needs neither torch's nor CUDA's headers.
// kdkernels/ops/rows.py says what each field of RowProblem means.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define KD_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define KD_HOST_DEVICE inline
#endif

// This namespace keeps it apart from the CPU's kdkernels::RowProblem, because both modules may live in one process.
namespace kdkernels::cuda {

constexpr int F32 = 0, BF16 = 1, F16 = 2;
constexpr int FORWARD_KL = 0, REVERSE_KL = 1, JSD = 2;

// An (outer, inner, width) view. Row r = o * inner + i begins at data + (o * stride_outer + i * stride_inner) items.
struct RowTensor {
  std::uint64_t data = 0;  // 0: absent
  std::int64_t stride_outer = 0, stride_inner = 0;
  std::int32_t dtype = F32, unused = 0;
};

struct RowProblem {
  std::int64_t outer = 0, inner = 0;      // N = outer * inner rows
  std::int64_t vocab = 0;                 // number of valid ids
  std::int64_t student_width = 0;         // V_s: gradient columns from vocab on are zeroed
  RowTensor student, audio, text, grad;   // every row begins at a multiple of 16 bytes
  std::uint64_t target = 0;               // int64 (N,), or 0
  std::uint64_t alpha = 0;                // float32 (N,) or (1,)
  std::int64_t alpha_stride = 0;
  std::uint64_t kd_coef = 0, ce_coef = 0;  // float32 (N,)
  std::uint64_t kd = 0, ce = 0;            // float32 (N,), written
  std::int64_t ignore_index = -100;
  std::int64_t divergence = FORWARD_KL;
  std::int64_t has_plausibility = 0, with_kd = 1, with_ce = 1;
  float temperature = 1.f, jsd_beta = 0.5f, log_plausibility = 0.f;
  float student_scale = 1.f, teacher_scale = 1.f;
  float student_softcap = 0.f, teacher_softcap = 0.f;  // 0: none
};

// A block has 8 warps. A thread takes 2 groups of 8 logits of each tensor at a time, and a chunk is what the whole block takes at a
// time. Two blocks share a multiprocessor, so that one computes while the other merges or waits.
constexpr int THREADS = 256, WARPS = THREADS / 32, GROUP = 8, GROUPS = 2, BLOCKS_A_MULTIPROCESSOR = 2;
constexpr int WARP_COLUMNS = 32 * GROUP, CHUNK = THREADS * GROUP * GROUPS;
constexpr int MAX_CHUNKS = 16, MAX_BLOCKS = 16;  // chunks of a block's slice; blocks of a cluster
constexpr int PARTIAL_BYTES = 32;                // the size of what threads, warps and blocks send to each other

// Shared memory before the slices: a barrier for each chunk, a partial for each warp, and two partials for each block of the cluster.
constexpr int BARRIER_BYTES = 8 * MAX_CHUNKS;
constexpr int WARP_PARTIALS = BARRIER_BYTES;
constexpr int BLOCK_PARTIALS = WARP_PARTIALS + WARPS * PARTIAL_BYTES;
constexpr int HEAD_BYTES = 2048;
static_assert(BLOCK_PARTIALS + 2 * MAX_BLOCKS * PARTIAL_BYTES <= HEAD_BYTES, "the head of shared memory is too small");

// A thread takes two halves of 4 of a warp's 256 columns. Then no access of 16 bytes has bank conflicts, and every store to
// global memory fills whole sectors.
//   ADJACENT  8 neighbours, for tensors of 2-byte items: a single access.
//   SWAPPED   8 neighbours, if some tensors have 4-byte and some have 2-byte items. Lanes 4 to 7 of every 8 begin with their second
//             half. Otherwise 8 lanes, each reading 16 bytes of its 32, would meet in the same banks.
//   SPLIT     4 neighbours, and 4 more that lie 128 columns further, if all tensors have 4-byte items.
constexpr int ADJACENT = 0, SWAPPED = 1, SPLIT = 2;

// How a row lies over a cluster: block b keeps columns [b * slice, (b + 1) * slice) of every tensor.
struct RowLayout {
  int blocks = 0;       // blocks of the cluster; 0: the row does not fit
  int slice = 0;        // a multiple of WARP_COLUMNS
  int arrangement = 0;
  int audio_offset = 0, text_offset = 0;  // offsets in shared memory; the student's slice begins at HEAD_BYTES
  int bytes = 0;                          // shared memory of a block
};

KD_HOST_DEVICE int item_bytes(int dtype) { return dtype == F32 ? 4 : 2; }

KD_HOST_DEVICE std::int64_t rows_of(const RowProblem& p) { return p.outer * p.inner; }

// A teacher is not read when nothing depends on its logits.
KD_HOST_DEVICE bool reads_teacher(const RowProblem& p) { return p.with_kd != 0; }
KD_HOST_DEVICE bool reads_text(const RowProblem& p) { return reads_teacher(p) && p.text.data != 0; }

// Whether a scale or a softcap changes the values in memory.
inline bool is_transformed(const RowProblem& p) {
  return p.student_scale != 1.f || p.teacher_scale != 1.f || p.student_softcap != 0.f || p.teacher_softcap != 0.f;
}

// What a kernel knows of a problem when it is compiled. The last two are the common cases: no scale and no softcap, all logits and the
// gradient in bf16, or float32 logits with a bf16 gradient, the distillation term, no plausibility mask, and tau 1 or 2 with a label.
constexpr int PLAIN = 0, TRANSFORMED = 1, ALL_BF16 = 2, F32_TO_BF16 = 3, CASES = 4;

KD_HOST_DEVICE constexpr bool is_common(int kind) { return kind == ALL_BF16 || kind == F32_TO_BF16; }

inline int case_of(const RowProblem& p) {
  if (is_transformed(p)) return TRANSFORMED;
  const int logits = p.student.dtype;
  const bool alike = p.audio.dtype == logits && (p.text.data == 0 || p.text.dtype == logits);
  const bool to_bf16 = p.grad.data != 0 && p.grad.dtype == BF16;
  const bool own_softmax = p.with_ce != 0 && p.temperature != 1.f && p.temperature != 2.f;
  if (!p.with_kd || !alike || !to_bf16 || p.has_plausibility || own_softmax || logits == F16) return PLAIN;
  return logits == BF16 ? ALL_BF16 : F32_TO_BF16;
}

inline RowLayout layout_of(const RowProblem& p, int blocks, int shared_bytes) {
  const std::int64_t columns = (p.vocab + blocks - 1) / blocks;
  const std::int64_t slice = (columns + WARP_COLUMNS - 1) / WARP_COLUMNS * WARP_COLUMNS;
  const std::int64_t audio = reads_teacher(p) ? item_bytes(p.audio.dtype) : 0, text = reads_text(p) ? item_bytes(p.text.dtype) : 0;
  const std::int64_t student = item_bytes(p.student.dtype);
  const std::int64_t bytes = HEAD_BYTES + slice * (student + audio + text);
  RowLayout layout;
  if (slice > CHUNK * MAX_CHUNKS || bytes > shared_bytes) return layout;
  const int grad = p.grad.data != 0 ? item_bytes(p.grad.dtype) : 0;
  const bool wide = student == 4 || audio == 4 || text == 4 || grad == 4;
  const bool narrow = student == 2 || audio == 2 || text == 2 || grad == 2;
  layout.blocks = blocks;
  layout.slice = static_cast<int>(slice);
  layout.arrangement = !wide ? ADJACENT : narrow ? SWAPPED : SPLIT;
  layout.audio_offset = static_cast<int>(HEAD_BYTES + slice * student);
  layout.text_offset = static_cast<int>(HEAD_BYTES + slice * (student + audio));
  layout.bytes = static_cast<int>(bytes);
  return layout;
}

}  // namespace kdkernels::cuda
