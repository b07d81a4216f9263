// What the CUDA device of this process can do, found by asking it, not by its compute capability alone.
#pragma once

namespace kdkernels {

struct CudaProbe {
  int capability = 0;           // 10 * major + minor
  int multiprocessors = 0;
  int shared_bytes_per_block = 0;  // with opt-in
  int max_cluster_blocks = 0;       // largest cluster of the row kernel, at full shared memory, that can be resident; 0: none
};

// Throws std::runtime_error with CUDA's own words where there is no usable device.
CudaProbe probe_cuda(int device);

}  // namespace kdkernels
