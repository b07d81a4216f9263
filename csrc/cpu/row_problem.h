// The row problem on the CPU: raw pointers, sizes and strides. So nothing here needs torch's headers.
// kdkernels/ops/rows.py says what each field means.
#pragma once

#include <cstdint>

namespace kdkernels {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };
enum class Divergence : int { forward_kl = 0, reverse_kl = 1, jsd = 2 };

// A (outer, inner, width) view; row r = o * inner + i begins at data + (o * stride_outer + i * stride_inner) items.
struct RowTensor {
  std::uintptr_t data = 0;  // 0: absent
  DType dtype = DType::f32;
  std::int64_t stride_outer = 0;
  std::int64_t stride_inner = 0;
};

struct RowProblem {
  std::int64_t outer = 0, inner = 0;  // N = outer * inner rows
  std::int64_t vocab = 0;             // valid ids
  std::int64_t student_width = 0;     // V_s: gradient columns from vocab on are zeroed

  RowTensor student, audio, text, grad;
  std::uintptr_t target = 0;  // int64 (N,), or 0
  std::uintptr_t alpha = 0;   // float32 (N,) or (1,)
  std::int64_t alpha_stride = 0;
  std::uintptr_t kd_coef = 0, ce_coef = 0;  // float32 (N,)
  std::uintptr_t kd = 0, ce = 0;            // float32 (N,), written
  std::uintptr_t loss = 0;                  // float32 (N,), written: kd_coef kd + ce_coef ce; or 0
  std::uintptr_t stats = 0;                 // float32 (4, N), written, or 0

  float temperature = 1.f;
  Divergence divergence = Divergence::forward_kl;
  float jsd_beta = 0.5f;
  float log_plausibility = 0.f;
  bool has_plausibility = false;
  std::int64_t ignore_index = -100;
  bool with_kd = true, with_ce = true;
  float student_scale = 1.f, teacher_scale = 1.f;
  float student_softcap = 0.f, teacher_softcap = 0.f;  // 0: none

  int threads = 1;
};

// The factors of the tokens' terms in a loss where no token has a weight. kdkernels/ops/native.py says what each field means.
struct TokenFactors {
  std::int64_t rows = 0;
  std::int64_t vocab = 0;        // an id outside [0, vocab) is bad
  std::int64_t ignore_index = -100;
  std::uintptr_t target = 0;     // int64 (N,), or 0: every token counts
  float kd_share = 1.f, ce_share = 0.f;
  float kd_norm = 1.f, ce_norm = 1.f;           // below 0: the number of tokens that count
  std::uintptr_t kd_coef = 0, ce_coef = 0;      // float32 (N,), written: share / norm, and 0 for a token that does not count
};

// Returns the number of bad ids.
std::int64_t token_factors(const TokenFactors& problem);

// token_factors and caad_rows in one call: for few tokens each call from Python takes as long as many rows. `rows` has no addresses
// but those of logits, gradient, target and loss; the others are scratch of this call. Returns the number of bad ids. With one
// nothing is computed.
std::int64_t plain_rows(RowProblem rows, TokenFactors factors, float alpha, const char* isa);

// Squared errors of rows (N, width). kdkernels/ops/layer_rows.py says what each field means.
struct LayerProblem {
  std::int64_t rows = 0, width = 0;
  RowTensor u, v, text, grad_u, grad_v;  // row r begins at item stride_outer * r
  std::uintptr_t valid = 0;              // uint8 (N,), or 0: all
  std::uintptr_t alpha = 0;              // float32 (N,) or (1,)
  std::int64_t alpha_stride = 0;
  std::uintptr_t coef = 0, loss = 0;  // float32 (N,)
  bool normalize = false;
  int threads = 1;
};

// Adds one teacher's rows to the mixture of several. kdkernels/ops/mixture.py says what each field means.
struct MixProblem {
  RowProblem source;         // its target, temperature, divergence, threads and all about the teacher matter
  RowTensor total;           // float32
  std::uintptr_t share = 0;  // float32 (N,)
  std::uintptr_t sums = 0;   // float64 (2, N)
  bool first = true, last = true;
};

// A student's rows against a projected teacher: kdkernels/ops/projection.py gives the meaning of every field.
struct ProjectedProblem {
  RowProblem source;  // its student, gradient, target, coefficients, results, temperature and student_scale count
  std::int64_t top_k = 0;
  std::uintptr_t ids = 0;            // int32 (N, top_k); below 0: none
  std::uintptr_t probabilities = 0;  // float32 (N, top_k)
  std::uintptr_t mass = 0;           // float32 (N,)
  std::uintptr_t rest = 0;           // float64 (N,)
};

// This rank's slice of rows over several ranks: kdkernels/ops/shards.py gives the meaning of every field.
enum class ShardPart : int { audio_max = 0, sums = 1, jsd = 2, gradient = 3 };
constexpr int SHARD_SUMS = 7, SHARD_STAT_SUMS = 9, SHARD_FACTORS = 7;
struct ShardProblem {
  RowProblem source;              // its target holds ids of all ranks; its coefficients and results are not used
  ShardPart part = ShardPart::sums;
  std::int64_t first = 0;         // id of the slice's first column
  bool with_stats = false;
  std::uintptr_t audio_max = 0;   // float32 (N,), or 0
  std::uintptr_t sums = 0;        // float64 (SHARD_SUMS, N), with statistics (SHARD_SUMS + SHARD_STAT_SUMS, N)
  std::uintptr_t factors = 0;     // float32 (SHARD_FACTORS, N); of jsd the first two
  std::uintptr_t out = 0;         // of audio_max float32 (N,), of jsd float64 (2, N)
};

// There is one of each for every instruction set: the same sources (rows.inl, layer_rows.inl, ...) compiled with other flags.
void caad_rows_generic(const RowProblem& problem);
void layer_rows_generic(const LayerProblem& problem);
void mix_rows_generic(const MixProblem& problem);
void projected_rows_generic(const ProjectedProblem& problem);
void shard_rows_generic(const ShardProblem& problem);
#if defined(KDKERNELS_X86)
void caad_rows_avx2(const RowProblem& problem);
void layer_rows_avx2(const LayerProblem& problem);
void mix_rows_avx2(const MixProblem& problem);
void projected_rows_avx2(const ProjectedProblem& problem);
void shard_rows_avx2(const ShardProblem& problem);
void caad_rows_avx512(const RowProblem& problem);
void layer_rows_avx512(const LayerProblem& problem);
void mix_rows_avx512(const MixProblem& problem);
void projected_rows_avx512(const ProjectedProblem& problem);
void shard_rows_avx512(const ShardProblem& problem);
void caad_rows_avx512_bf16(const RowProblem& problem);
void layer_rows_avx512_bf16(const LayerProblem& problem);
void mix_rows_avx512_bf16(const MixProblem& problem);
void projected_rows_avx512_bf16(const ProjectedProblem& problem);
void shard_rows_avx512_bf16(const ShardProblem& problem);
#endif

// They run with this machine's best instruction set, or with the named one ("generic", "avx2", "avx512", "avx512_bf16").
// They throw std::invalid_argument if the name is unknown or the machine lacks that set.
void caad_rows(const RowProblem& problem, const char* isa);
void layer_rows(const LayerProblem& problem, const char* isa);
void mix_rows(const MixProblem& problem, const char* isa);
void projected_rows(const ProjectedProblem& problem, const char* isa);
void shard_rows(const ShardProblem& problem, const char* isa);

// The name of this machine's best instruction set.
const char* best_isa();

}  // namespace kdkernels
