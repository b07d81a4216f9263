#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>

#include "row_problem.h"

namespace kdkernels {
namespace {

struct Isa {
  const char* name;
  void (*rows)(const RowProblem&);
};

// From the plainest to the best; each has what those before it have.
const Isa ISAS[] = {
    {"generic", caad_rows_generic},
#if defined(KDKERNELS_X86)
    {"avx2", caad_rows_avx2},
    {"avx512", caad_rows_avx512},
    {"avx512_bf16", caad_rows_avx512_bf16},
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

}  // namespace

const char* best_isa() { return ISAS[best()].name; }

void caad_rows(const RowProblem& problem, const char* isa) {
  const Isa* end = ISAS + best() + 1;
  const Isa* found = std::find_if(std::begin(ISAS), end, [&](const Isa& x) { return x.name == std::string(isa); });
  if (found == end)
    throw std::invalid_argument("isa: expected generic, avx2, avx512 or avx512_bf16, as far as this machine has it (best here: " +
                                std::string(best_isa()) + "), got " + isa);
  found->rows(problem);
}

}  // namespace kdkernels
