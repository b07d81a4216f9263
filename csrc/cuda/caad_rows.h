// The host side of the row kernel that reads each logit once. Functions that take a device make it the current one and leave it so.
// This module has a CUDA runtime of its own beside torch's, and both share the driver's current device. The caller knows which
// device torch had, so the caller restores it.
#pragma once

#include "row_problem.h"

namespace kdkernels::cuda {

struct RowPlan {
  RowLayout layout;  // blocks 0: the row does not fit into any cluster that the device can hold
  int clusters = 0;  // resident at a time; at most one for each row
};

// The kernel that a problem runs, for the runtime's queries.
const void* row_kernel(const RowProblem& problem);

// How many clusters of `blocks` blocks of this kernel, each block with `shared_bytes`, the device holds at a time; 0 if it holds none.
int resident_clusters(const void* kernel, int device, int blocks, int shared_bytes);

// The shared memory that a block can have. It is 0 on a device without clusters and bulk copies, and on a device for which the
// kernel is not compiled.
int usable_shared_bytes(int device);

// How the problem would run on the device: in the smallest cluster that holds a row, or in a larger one if there are few rows.
// blocks > 0 asks for that size.
RowPlan plan_rows(const RowProblem& problem, int device, int blocks);

// Enqueues the kernel on `stream` and does not synchronise. Throws std::runtime_error with CUDA's message.
void caad_rows(const RowProblem& problem, const RowPlan& plan, int device, std::uintptr_t stream);

}  // namespace kdkernels::cuda
