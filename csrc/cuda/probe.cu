#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "caad_rows.h"
#include "probe.h"

namespace kdkernels {
namespace {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

}  // namespace

CudaProbe probe_cuda(int device) {
  int count = 0;
  check(cudaGetDeviceCount(&count), "no CUDA device");
  if (device < 0 || device >= count)
    throw std::runtime_error("device: expected 0 to " + std::to_string(count - 1) + ", got " + std::to_string(device));
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  CudaProbe probe;
  probe.capability = properties.major * 10 + properties.minor;
  probe.multiprocessors = properties.multiProcessorCount;
  probe.shared_bytes_per_block = static_cast<int>(properties.sharedMemPerBlockOptin);
  const int usable = cuda::usable_shared_bytes(device);
  const void* kernel = cuda::row_kernel(cuda::RowProblem());
  for (int blocks = cuda::MAX_BLOCKS; usable > 0 && blocks >= 1; blocks /= 2) {
    if (cuda::resident_clusters(kernel, device, blocks, usable) > 0) {
      probe.max_cluster_blocks = blocks;
      break;
    }
  }
  return probe;
}

}  // namespace kdkernels
