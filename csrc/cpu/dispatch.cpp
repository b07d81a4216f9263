#include <stdexcept>
#include <string>

#include "row_problem.h"

namespace kdkernels {

const char* best_isa() {
#if defined(KDKERNELS_X86)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
  return "generic";
}

void caad_rows(const RowProblem& problem, const char* isa) {
  const std::string wanted = isa, best = best_isa();
#if defined(KDKERNELS_X86)
  if (wanted == "avx512" && best == "avx512") return caad_rows_avx512(problem);
  if (wanted == "avx2" && best != "generic") return caad_rows_avx2(problem);
#endif
  if (wanted == "generic") return caad_rows_generic(problem);
  throw std::invalid_argument("isa: expected generic, avx2 or avx512, as far as this machine has it (best here: " + best +
                              "), got " + wanted);
}

}  // namespace kdkernels
