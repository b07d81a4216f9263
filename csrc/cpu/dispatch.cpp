#include <stdexcept>
#include <string>
#include <vector>

#include "row_problem.h"

namespace kdkernels {
namespace {

struct Isa {
  const char* name;
  void (*rows)(const RowProblem&);
  void (*layers)(const LayerProblem&);
  void (*mix)(const MixProblem&);
  void (*projected)(const ProjectedProblem&);
  void (*shards)(const ShardProblem&);
};

// From the plainest to the best. Each one has what the ones before it have.
const Isa ISAS[] = {
    {"generic", caad_rows_generic, layer_rows_generic, mix_rows_generic, projected_rows_generic, shard_rows_generic},
#if defined(KDKERNELS_X86)
    {"avx2", caad_rows_avx2, layer_rows_avx2, mix_rows_avx2, projected_rows_avx2, shard_rows_avx2},
    {"avx512", caad_rows_avx512, layer_rows_avx512, mix_rows_avx512, projected_rows_avx512, shard_rows_avx512},
    {"avx512_bf16", caad_rows_avx512_bf16, layer_rows_avx512_bf16, mix_rows_avx512_bf16, projected_rows_avx512_bf16, shard_rows_avx512_bf16},
#endif
};

int best() {
#if defined(KDKERNELS_X86)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512dq"))
    return 1;
  // Every processor with BF16 has VNNI, but a hypervisor may hide one of them.
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") ? 3 : 2;
#else
  return 0;
#endif
}

const Isa& find(const char* isa) {
  for (int i = 0; i <= best(); ++i)
    if (ISAS[i].name == std::string(isa)) return ISAS[i];
  throw std::invalid_argument("isa: expected generic, avx2, avx512 or avx512_bf16, and one that this machine has (best here: " +
                              std::string(best_isa()) + "), got " + isa);
}

}  // namespace

const char* best_isa() { return ISAS[best()].name; }

std::int64_t token_factors(const TokenFactors& p) {
  const auto* target = reinterpret_cast<const std::int64_t*>(p.target);
  std::int64_t count = p.rows, bad = 0;
  if (target) {
    count = 0;
    for (std::int64_t i = 0; i < p.rows; ++i) {
      const bool counts = target[i] != p.ignore_index;
      count += counts;
      bad += counts && (target[i] < 0 || target[i] >= p.vocab);
    }
  }
  auto factor = [&](float share, float norm) {
    norm = norm < 0.f ? float(count) : norm;
    return norm > 0.f ? share * (1.f / norm) : 0.f;
  };
  const float kd = factor(p.kd_share, p.kd_norm), ce = factor(p.ce_share, p.ce_norm);
  auto* kd_coef = reinterpret_cast<float*>(p.kd_coef);
  auto* ce_coef = reinterpret_cast<float*>(p.ce_coef);
  for (std::int64_t i = 0; i < p.rows; ++i) {
    const bool counts = !target || target[i] != p.ignore_index;
    kd_coef[i] = counts ? kd : 0.f;
    ce_coef[i] = counts ? ce : 0.f;
  }
  return bad;
}

void caad_rows(const RowProblem& problem, const char* isa) { find(isa).rows(problem); }

std::int64_t plain_rows(RowProblem rows, TokenFactors factors, float alpha, const char* isa) {
  const std::int64_t n = rows.outer * rows.inner;
  std::vector<float> scratch(4 * n);
  auto part = [&](int i) { return reinterpret_cast<std::uintptr_t>(scratch.data() + i * n); };
  factors.rows = n;
  factors.vocab = rows.vocab;
  factors.ignore_index = rows.ignore_index;
  factors.target = rows.target;
  factors.kd_coef = rows.kd_coef = part(0);
  factors.ce_coef = rows.ce_coef = part(1);
  rows.kd = part(2);
  rows.ce = part(3);
  rows.alpha = reinterpret_cast<std::uintptr_t>(&alpha);
  const std::int64_t bad = token_factors(factors);
  if (!bad) caad_rows(rows, isa);
  return bad;
}

void layer_rows(const LayerProblem& problem, const char* isa) { find(isa).layers(problem); }
void mix_rows(const MixProblem& problem, const char* isa) { find(isa).mix(problem); }
void projected_rows(const ProjectedProblem& problem, const char* isa) { find(isa).projected(problem); }
void shard_rows(const ShardProblem& problem, const char* isa) { find(isa).shards(problem); }

}  // namespace kdkernels
