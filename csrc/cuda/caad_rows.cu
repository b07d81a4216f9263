// The one-read row kernel (sm_90 and up): a cluster of thread blocks keeps one row in its shared memory.
//
// Clusters are persistent: cluster i takes rows i, i + clusters, ... Block b of a cluster owns a slice of columns of the student's,
// the audio and the text logits. It works in chunks of 4096 columns. For each row:
//
//   1  Bulk copies bring each chunk and complete on the chunk's own barrier. The threads take a chunk's maxima and sums as it arrives.
//   2  The sums are merged over the warp, then the block, then the cluster. The order is fixed, so results repeat to the bit.
//   3  The threads make each chunk's gradient from shared memory. When the block has finished a chunk, it starts the copy of the same
//      chunk of the cluster's next row. So copies run during all arithmetic except the merging.
//
// Each logit is read once from global memory. The plausibility mask needs the maximum of audio, and the JSD needs two more sums. Each
// costs one more walk over shared memory and one more merge.
//
// The gradient may lie in the student's memory: row r of grad may overlap row r of student, and no other row. No block writes
// gradients of a row before the cluster barrier of the merge. Every block has its whole slice in shared memory when it arrives there.
//
// Threads only read a chunk's shared memory, and bulk copies only write it. A barrier of the block stands between the last read and
// the next copy, so no other fence is needed.

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "caad_rows.h"
#include "row_phases.cuh"

namespace kdkernels::cuda {
namespace {

// Older devices get an empty kernel. usable_shared_bytes prevents its launch there.
#if __CUDA_ARCH__ >= 900

#define DEVICE __device__ __forceinline__

// -- barriers, copies, clusters -----------------------------------------------------------------------------------------------

DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
DEVICE int grid_blocks() { return static_cast<int>(gridDim.x); }

DEVICE char* block_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

DEVICE void block_barrier() { __syncthreads(); }
DEVICE float shuffle_down(float x, int lanes) { return __shfl_down_sync(0xffffffffu, x, lanes); }
DEVICE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }
DEVICE float shuffle_first(float x) { return __shfl_sync(0xffffffffu, x, 0); }

DEVICE SharedAddress shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

// The same address, kept in a register. Otherwise the compiler computes it at every access from a slow special register.
DEVICE SharedAddress fixed_address(const void* p) {
  SharedAddress address = shared_address(p);
  asm volatile("" : "+r"(address));
  return address;
}

DEVICE void barrier_init(SharedAddress barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}

// Shows the initialised barriers to the copy engine.
DEVICE void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

DEVICE void barrier_expect(SharedAddress barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

DEVICE void barrier_wait(SharedAddress barrier, std::uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra WAIT;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

DEVICE void bulk_copy(SharedAddress to, const char* from, std::uint32_t bytes, SharedAddress barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
               "r"(bytes), "r"(barrier)
               : "memory");
}

DEVICE void cluster_arrive() {
  __syncwarp();  // the instruction is "aligned": all threads of a warp arrive together
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

DEVICE int cluster_rank() {
  std::uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// Stores 16 bytes into another block's shared memory, at the place that `local` has in this block's memory.
DEVICE void store_remote(SharedAddress local, int rank, const float* v) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.v4.f32 [remote], {%2, %3, %4, %5};\n"
      "}\n" ::"r"(local),
      "r"(rank), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
      : "memory");
}

}  // namespace
}  // namespace kdkernels::cuda

#include "row_kernel.cuh"

namespace kdkernels::cuda {
namespace {

#endif  // __CUDA_ARCH__ >= 900

template <int DIVERGENCE, int CASE>
__global__ void __launch_bounds__(THREADS, BLOCKS_A_MULTIPROCESSOR)
    caad_rows_kernel(const __grid_constant__ RowProblem p, const __grid_constant__ RowLayout layout) {
#if __CUDA_ARCH__ >= 900
  run_thread<DIVERGENCE, CASE>(p, layout);
#endif
}

// -- launching ----------------------------------------------------------------------------------------------------------------

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

struct Launch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute cluster = {};

  Launch(int clusters, int blocks, int shared_bytes, cudaStream_t stream) {
    config.gridDim = dim3(static_cast<unsigned>(clusters * blocks));
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
    config.stream = stream;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(blocks);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
};

}  // namespace

namespace {

template <int DIVERGENCE>
const void* kernel_of(int kind) {
  static const void* const kernels[CASES] = {
      reinterpret_cast<const void*>(&caad_rows_kernel<DIVERGENCE, PLAIN>),
      reinterpret_cast<const void*>(&caad_rows_kernel<DIVERGENCE, TRANSFORMED>),
      reinterpret_cast<const void*>(&caad_rows_kernel<DIVERGENCE, ALL_BF16>),
      reinterpret_cast<const void*>(&caad_rows_kernel<DIVERGENCE, F32_TO_BF16>),
  };
  return kernels[kind];
}

}  // namespace

const void* row_kernel(const RowProblem& p) {
  const int kind = case_of(p);
  if (p.divergence == FORWARD_KL) return kernel_of<FORWARD_KL>(kind);
  return p.divergence == REVERSE_KL ? kernel_of<REVERSE_KL>(kind) : kernel_of<JSD>(kind);
}

int usable_shared_bytes(int device) {
  int major = 0, bytes = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
  return major < 9 ? 0 : bytes;
}

int resident_clusters(const void* kernel, int device, int blocks, int shared_bytes) {
  // The answer is kept: it does not change, and the queries take longer than a launch.
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(kernel, device, blocks, shared_bytes);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  check(cudaSetDevice(device), "cudaSetDevice");
  // A driver may make code for a new device out of PTX of an old architecture. There the kernel is empty.
  cudaFuncAttributes compiled{};
  cudaError_t status = cudaFuncGetAttributes(&compiled, kernel);
  if (status == cudaSuccess && compiled.ptxVersion < 90) return known[key] = 0;
  Launch launch(1, blocks, shared_bytes, nullptr);
  int resident = 0;
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, usable_shared_bytes(device));
  if (status == cudaSuccess) status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (status == cudaSuccess) status = cudaOccupancyMaxActiveClusters(&resident, kernel, &launch.config);
  if (status == cudaSuccess) return known[key] = resident;
  cudaGetLastError();  // clears the error: here it means 0 clusters and is no fault of the caller
  // A query that fails for another reason, such as a capture under way, is asked again.
  const bool lasting = status == cudaErrorInvalidClusterSize || status == cudaErrorInvalidValue ||
                       status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction;
  if (lasting) known[key] = 0;
  return 0;
}

// The shared memory that a block may use if `share` blocks are on a multiprocessor.
int shared_bytes_of(int device, int share) {
  int all = 0, reserved = 0;
  check(cudaDeviceGetAttribute(&all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device), "shared memory");
  check(cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device), "shared memory");
  const int bytes = all / share - reserved, most = usable_shared_bytes(device);
  return bytes < most ? bytes : most;
}

RowPlan plan_rows(const RowProblem& p, int device, int blocks) {
  RowPlan plan;
  const std::int64_t rows = rows_of(p);
  if (usable_shared_bytes(device) == 0 || rows >= 1ll << 31) return plan;
  // Two blocks a multiprocessor if a cluster of some size allows it, otherwise one.
  for (int share = BLOCKS_A_MULTIPROCESSOR; share >= 1 && plan.layout.blocks == 0; --share) {
    const int shared = shared_bytes_of(device, share);
    for (int size = 1; size <= MAX_BLOCKS; size *= 2) {
      if (blocks > 0 && size != blocks) continue;
      const RowLayout layout = layout_of(p, size, shared);
      if (layout.blocks == 0) continue;
      // If there are too few rows for all blocks, a cluster twice as large is faster, until a block has one chunk.
      if (plan.layout.blocks > 0 && (rows >= 2 * plan.clusters || plan.layout.slice <= CHUNK)) break;
      const int resident = resident_clusters(row_kernel(p), device, size, layout.bytes);
      if (resident == 0) continue;
      if (plan.layout.blocks > 0 && rows >= 2 * static_cast<std::int64_t>(resident)) break;
      plan.layout = layout;
      plan.clusters = static_cast<int>(rows < resident ? rows : resident);
    }
  }
  return plan;
}

void caad_rows(const RowProblem& p, const RowPlan& plan, int device, std::uintptr_t stream) {
  if (plan.clusters == 0) return;  // no rows
  check(cudaSetDevice(device), "cudaSetDevice");
  Launch launch(plan.clusters, plan.layout.blocks, plan.layout.bytes, reinterpret_cast<cudaStream_t>(stream));
  RowProblem problem = p;
  RowLayout layout = plan.layout;
  void* arguments[] = {&problem, &layout};
  check(cudaLaunchKernelExC(&launch.config, row_kernel(p), arguments), "the one-read row kernel");
}

}  // namespace kdkernels::cuda
