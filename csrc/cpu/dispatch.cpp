#include <stdexcept>
#include <string>

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
  return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
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

void caad_rows(const RowProblem& problem, const char* isa) { find(isa).rows(problem); }
void layer_rows(const LayerProblem& problem, const char* isa) { find(isa).layers(problem); }
void mix_rows(const MixProblem& problem, const char* isa) { find(isa).mix(problem); }
void projected_rows(const ProjectedProblem& problem, const char* isa) { find(isa).projected(problem); }
void shard_rows(const ShardProblem& problem, const char* isa) { find(isa).shards(problem); }

}  // namespace kdkernels
