// What the CUDA device of this process can do. The device itself is asked, because its compute capability does not say everything.
#pragma once

namespace kdkernels {

struct CudaProbe {
  int capability = 0;           // 10 * major + minor
  int multiprocessors = 0;
  int shared_bytes_per_block = 0;  // with opt-in
  int max_cluster_blocks = 0;       // the largest cluster of the row kernel that can be resident with full shared memory; 0: none
};

// Throws std::runtime_error with CUDA's message if there is no usable device.
CudaProbe probe_cuda(int device);

}  // namespace kdkernels
