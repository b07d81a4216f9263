// Host side of the one-read row kernel. Functions that take a device make it current and leave it so: this module has a CUDA
// runtime of its own beside torch's, and the driver's current device is what both share, so the caller, who knows torch's, is the
// one to put it back.
#pragma once

#include "row_problem.h"

namespace kdkernels::cuda {

struct RowPlan {
  RowLayout layout;  // blocks 0: no cluster that the device can hold has room for the row
  int clusters = 0;  // resident at a time, at most one a row
};

// The kernel that a problem runs, for the runtime's queries.
const void* row_kernel(const RowProblem& problem);

// Clusters of `blocks` blocks of this kernel, each with `shared_bytes`, that the device holds at a time; 0 where it cannot.
int resident_clusters(const void* kernel, int device, int blocks, int shared_bytes);

// Shared memory a block can have; 0 on a device without clusters and bulk copies, or for which the kernel is not compiled.
int usable_shared_bytes(int device);

// How the problem would run on the device: in the smallest cluster that holds a row, or a larger one where rows are few.
// blocks > 0 asks for that size.
RowPlan plan_rows(const RowProblem& problem, int device, int blocks);

// Enqueues the kernel on `stream`; no synchronisation. Throws std::runtime_error with CUDA's words.
void caad_rows(const RowProblem& problem, const RowPlan& plan, int device, std::uintptr_t stream);

}  // namespace kdkernels::cuda
