#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "probe.h"

namespace kdkernels {
namespace {

// Stands in for a row kernel that keeps a slice of the row in all of a block's shared memory.
__global__ void row_slice_kernel(float* out) {
  extern __shared__ float slice[];
  slice[threadIdx.x] = static_cast<float>(blockIdx.x);
  __syncthreads();
  if (out != nullptr) out[threadIdx.x] = slice[threadIdx.x];
}

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

}  // namespace

CudaProbe probe_cuda(int device) {
  int count = 0;
  check(cudaGetDeviceCount(&count), "no CUDA device");
  if (device < 0 || device >= count)
    throw std::runtime_error("device: expected 0 to " + std::to_string(count - 1) + ", got " + std::to_string(device));
  int before = 0;
  check(cudaGetDevice(&before), "cudaGetDevice");
  check(cudaSetDevice(device), "cudaSetDevice");
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  CudaProbe probe;
  probe.capability = properties.major * 10 + properties.minor;
  probe.multiprocessors = properties.multiProcessorCount;
  probe.shared_bytes_per_block = static_cast<int>(properties.sharedMemPerBlockOptin);

  int shared = probe.shared_bytes_per_block;
  bool clusters = cudaFuncSetAttribute(row_slice_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared) == cudaSuccess &&
                  cudaFuncSetAttribute(row_slice_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess;
  for (int blocks = 16; clusters && blocks >= 2; blocks /= 2) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(256);
    config.dynamicSmemBytes = shared;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = blocks;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int resident = 0;
    if (cudaOccupancyMaxActiveClusters(&resident, row_slice_kernel, &config) == cudaSuccess && resident > 0) {
      probe.max_cluster_blocks = blocks;
      break;
    }
  }
  cudaGetLastError();  // a refused attribute is an answer here, not a fault of the caller's
  check(cudaSetDevice(before), "cudaSetDevice");
  return probe;
}

}  // namespace kdkernels
