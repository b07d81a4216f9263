// The one-read row kernel (sm_90 and up): a cluster of thread blocks keeps one row in its shared memory.
//
// Clusters are persistent; cluster i takes rows i, i + clusters, ... Block b of a cluster owns a slice of columns of the student's,
// the audio and the text logits, in chunks of 4096 columns. Per row:
//
//   1  every chunk arrives by bulk copies that complete on the chunk's own barrier; its maxima and sums are taken as it arrives
//   2  thread -> warp -> block -> cluster: the sums are merged pairwise in a fixed order, so results repeat to the bit
//   3  the gradient of each chunk is made from shared memory; as soon as the block is through with a chunk, the same chunk of the
//      cluster's next row is on its way into it, so that copies run under all of the arithmetic but the merging
//
// Each logit is read once from global memory. Plausibility (maximum of audio) and the jsd (its two sums) take one more walk over
// shared memory and one more merge each.
//
// A gradient in the student's memory: row r of grad may overlap row r of student alone. No block writes gradients of a row before
// the cluster barrier of the merge, and every block has all of its slice in shared memory when it arrives there.
//
// Ordering between the ordinary and the bulk copies' view of memory: a chunk's shared memory is only ever read by threads, and a
// barrier of the block stands between their last read and the next copy into it.

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

// Older devices get an empty kernel: usable_shared_bytes keeps it from being launched there.
#if __CUDA_ARCH__ >= 900

// -- barriers, copies, clusters -----------------------------------------------------------------------------------------------

__device__ __forceinline__ std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

// The same in a register of its own: the compiler would work it out anew at every access, from a slow special register.
__device__ __forceinline__ std::uint32_t fixed_address(const void* p) {
  std::uint32_t address = shared_address(p);
  asm volatile("" : "+r"(address));
  return address;
}

__device__ __forceinline__ void barrier_init(std::uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}

// Makes the initialised barriers known to the copy engine.
__device__ __forceinline__ void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_expect(std::uint32_t barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(std::uint32_t barrier, std::uint32_t parity) {
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

__device__ __forceinline__ void bulk_copy(std::uint32_t to, const char* from, std::uint32_t bytes, std::uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
               "r"(bytes), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void cluster_arrive() {
  __syncwarp();  // "aligned": a warp arrives as one
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

__device__ __forceinline__ int cluster_rank() {
  std::uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// 16 bytes into another block's shared memory, at the address that is `local` in this block's.
__device__ __forceinline__ void store_remote(std::uint32_t local, int rank, const float* v) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.v4.f32 [remote], {%2, %3, %4, %5};\n"
      "}\n" ::"r"(local),
      "r"(rank), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
      : "memory");
}

// -- merging ------------------------------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ T shuffled_down(const T& value, int offset) {
  T other;
  const float* in = reinterpret_cast<const float*>(&value);
  float* out = reinterpret_cast<float*>(&other);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / 4); ++i) out[i] = __shfl_down_sync(0xffffffffu, in[i], offset);
  return other;
}

template <class T>
__device__ __forceinline__ T from_lane_0(const T& value) {
  T other;
  const float* in = reinterpret_cast<const float*>(&value);
  float* out = reinterpret_cast<float*>(&other);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / 4); ++i) out[i] = __shfl_sync(0xffffffffu, in[i], 0);
  return other;
}

// The merge of the lower 2 * HALF lanes' values, in lane 0.
template <int DIVERGENCE, int HALF, class T>
__device__ __forceinline__ T merged_lanes(T value, const Formula& f) {
#pragma unroll
  for (int offset = HALF; offset > 0; offset /= 2) value = T::template merge<DIVERGENCE>(value, shuffled_down(value, offset), f);
  return value;
}

// The merge over all threads of the cluster, in every thread: warp, then block, then cluster, each a tree in a fixed order.
// A block hands its partial to every block of the cluster (slots of even and odd exchanges alternate: whoever writes a slot again
// has passed a barrier that its readers arrived at after reading it). Nobody reads another block's memory, so a block may end
// after its last exchange.
template <int DIVERGENCE, class T>
__device__ __forceinline__ T merged_cluster(T value, const Formula& f, char* memory, int rank, int blocks, int& exchange) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T* warps = reinterpret_cast<T*>(memory + WARP_PARTIALS);
  char* slots = memory + BLOCK_PARTIALS + exchange % 2 * MAX_BLOCKS * PARTIAL_BYTES;
  ++exchange;
  value = merged_lanes<DIVERGENCE, 16>(value, f);
  if (lane == 0) warps[warp] = value;
  __syncthreads();
  if (warp == 0) {
    const T block = from_lane_0(merged_lanes<DIVERGENCE, WARPS / 2>(lane < WARPS ? warps[lane] : T(), f));
    float words[PARTIAL_BYTES / 4] = {};
    memcpy(words, &block, sizeof(T));
    if (lane < blocks) {
      const std::uint32_t slot = shared_address(slots + rank * PARTIAL_BYTES);
      store_remote(slot, lane, words);
      if (sizeof(T) > 16) store_remote(slot + 16, lane, words + 4);
    }
  }
  cluster_arrive();
  cluster_wait();
  value = lane < blocks ? *reinterpret_cast<const T*>(slots + lane * PARTIAL_BYTES) : T();
  return from_lane_0(merged_lanes<DIVERGENCE, MAX_BLOCKS / 2>(value, f));
}

// -- the kernel ---------------------------------------------------------------------------------------------------------------

// Sends for one chunk of a row's slice.
__device__ __forceinline__ void fetch_chunk(const RowProblem& p, const RowLayout& layout, std::uint32_t base,
                                            const RowSources& from, int columns, int chunk) {
  const std::uint32_t barrier = base + 8 * chunk;
  const int student_bytes = chunk_bytes(columns, chunk, item_bytes(p.student.dtype));
  const int audio_bytes = from.audio ? chunk_bytes(columns, chunk, item_bytes(p.audio.dtype)) : 0;
  const int text_bytes = from.text ? chunk_bytes(columns, chunk, item_bytes(p.text.dtype)) : 0;
  const int student_at = chunk * CHUNK * item_bytes(p.student.dtype);
  const int audio_at = chunk * CHUNK * item_bytes(p.audio.dtype), text_at = chunk * CHUNK * item_bytes(p.text.dtype);
  barrier_expect(barrier, student_bytes + audio_bytes + text_bytes);
  bulk_copy(base + HEAD_BYTES + student_at, from.student + student_at, student_bytes, barrier);
  if (from.audio) bulk_copy(base + layout.audio_offset + audio_at, from.audio + audio_at, audio_bytes, barrier);
  if (from.text) bulk_copy(base + layout.text_offset + text_at, from.text + text_at, text_bytes, barrier);
}

#endif  // __CUDA_ARCH__ >= 900

template <int DIVERGENCE, bool TRANSFORM>
__global__ void __launch_bounds__(THREADS, 1)
    caad_rows_kernel(const __grid_constant__ RowProblem p, const __grid_constant__ RowLayout layout) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char memory[];
  const int thread = threadIdx.x, rank = cluster_rank(), blocks = layout.blocks;
  const int clusters = gridDim.x / blocks;
  const std::int64_t rows = rows_of(p);
  const Formula f = formula_of(p);
  Slice slice;
  const std::uint32_t base = fixed_address(memory);
  slice.student = base + HEAD_BYTES;
  slice.audio = base + layout.audio_offset;
  slice.text = base + layout.text_offset;
  slice.start = rank * layout.slice;
  slice.columns = valid_columns(p, layout, rank);
  const int chunks = chunks_of(slice.columns);
  const Columns columns = columns_of(layout.arrangement, thread);
  const bool want_grad = p.grad.data != 0;

  // The first row from `row` on that is not ignored, and its inputs.
  auto find_row = [&](std::int64_t row, RowInputs& inputs) {
    for (; row < rows; row += clusters) {
      inputs = inputs_of(p, row);
      if (!is_ignored(p, inputs)) break;
    }
    return row;
  };
  // An ignored row is not read; its results are written by the cluster that passes over it.
  auto zero_rows = [&](std::int64_t from, std::int64_t to) {
    for (std::int64_t row = from; row < to && row < rows; row += clusters) {
      if (want_grad) zero_gradient(p, row, 0, rank * THREADS + thread, blocks * THREADS);
      if (rank == 0 && thread == 0) {
        reinterpret_cast<float*>(p.kd)[row] = 0.f;
        reinterpret_cast<float*>(p.ce)[row] = 0.f;
      }
    }
  };

  const std::int64_t first = blockIdx.x / blocks;
  RowInputs r;
  std::int64_t row = find_row(first, r);
  if (thread == 0) {
    for (int chunk = 0; chunk < chunks; ++chunk) barrier_init(base + 8 * chunk);
    publish_barriers();
    if (row < rows) {
      const RowSources from = sources_of(p, r, row, slice.start);
      for (int chunk = 0; chunk < chunks; ++chunk) fetch_chunk(p, layout, base, from, slice.columns, chunk);
    }
  }
  zero_rows(first, row);
  cluster_arrive();  // every block of the cluster has begun, so its shared memory can be written to
  cluster_wait();

  int exchange = 0;
  std::uint32_t parity = 0;
  while (row < rows) {
    // Asked for now, looked at after the sums, when they have arrived.
    RowInputs next_inputs;
    if (row + clusters < rows) next_inputs = inputs_of(p, row + clusters);

    float threshold = FLOOR;
    if (p.has_plausibility && reads_teacher(p)) {
      AudioMax audio_max;
      for (int chunk = 0; chunk < chunks; ++chunk) {
        barrier_wait(base + 8 * chunk, parity);
        add_audio_max<TRANSFORM>(p, slice, in_chunk(columns, chunk, slice.columns), audio_max);
      }
      threshold = merged_cluster<DIVERGENCE>(audio_max, f, memory, rank, blocks, exchange).value + p.log_plausibility;
    }

    RowSums sums;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      barrier_wait(base + 8 * chunk, parity);
      add_group<DIVERGENCE, TRANSFORM>(p, f, slice, r, threshold, in_chunk(columns, chunk, slice.columns), sums);
    }
    if (thread == 0) add_label(p, slice, r, sums);
    sums = merged_cluster<DIVERGENCE>(sums, f, memory, rank, blocks, exchange);

    RowScalars k = normalised(sums, f);
    JsdSums jsd;
    if (DIVERGENCE == JSD && p.with_kd) {
      for (int chunk = 0; chunk < chunks; ++chunk)
        add_jsd<TRANSFORM>(p, f, slice, r, threshold, in_chunk(columns, chunk, slice.columns), k, jsd);
      jsd = merged_cluster<DIVERGENCE>(jsd, f, memory, rank, blocks, exchange);
    }
    finish_row<DIVERGENCE>(p, f, r, sums, jsd, k);
    if (rank == 0 && thread == 0) {
      reinterpret_cast<float*>(p.kd)[row] = k.kd;
      reinterpret_cast<float*>(p.ce)[row] = k.ce;
    }

    std::int64_t next = row + clusters;
    if (next < rows && is_ignored(p, next_inputs)) next = find_row(next + clusters, next_inputs);
    RowSources from = {};
    if (next < rows) from = sources_of(p, next_inputs, next, slice.start);
    char* grad = want_grad ? row_address(p, p.grad, row, slice.start) : nullptr;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      if (want_grad)
        write_gradient<DIVERGENCE, TRANSFORM>(p, f, slice, r, threshold, in_chunk(columns, chunk, slice.columns), k, grad);
      if (next < rows) {
        __syncthreads();  // the block is through with this chunk
        if (thread == 0) fetch_chunk(p, layout, base, from, slice.columns, chunk);
      }
    }
    if (want_grad) zero_gradient(p, row, first_untouched(p, layout), rank * THREADS + thread, blocks * THREADS);
    zero_rows(row + clusters, next);
    row = next;
    r = next_inputs;
    parity ^= 1;
  }
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

const void* row_kernel(const RowProblem& p) {
  static const void* const kernels[3][2] = {
      {reinterpret_cast<const void*>(&caad_rows_kernel<FORWARD_KL, false>),
       reinterpret_cast<const void*>(&caad_rows_kernel<FORWARD_KL, true>)},
      {reinterpret_cast<const void*>(&caad_rows_kernel<REVERSE_KL, false>),
       reinterpret_cast<const void*>(&caad_rows_kernel<REVERSE_KL, true>)},
      {reinterpret_cast<const void*>(&caad_rows_kernel<JSD, false>), reinterpret_cast<const void*>(&caad_rows_kernel<JSD, true>)},
  };
  return kernels[p.divergence][is_transformed(p)];
}

int usable_shared_bytes(int device) {
  int major = 0, bytes = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
  return major < 9 ? 0 : bytes;
}

int resident_clusters(const void* kernel, int device, int blocks, int shared_bytes) {
  // The answer does not change, and the queries take longer than a launch.
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(kernel, device, blocks, shared_bytes);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  check(cudaSetDevice(device), "cudaSetDevice");
  Launch launch(1, blocks, shared_bytes, nullptr);
  int resident = 0;
  const bool allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, usable_shared_bytes(device)) ==
                           cudaSuccess &&
                       cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess &&
                       cudaOccupancyMaxActiveClusters(&resident, kernel, &launch.config) == cudaSuccess;
  cudaGetLastError();  // a refusal is an answer here, not a fault of the caller's
  return known[key] = allowed ? resident : 0;
}

RowPlan plan_rows(const RowProblem& p, int device, int blocks) {
  RowPlan plan;
  const int shared = usable_shared_bytes(device);
  const std::int64_t rows = rows_of(p);
  if (shared == 0 || rows >= 1ll << 31) return plan;
  for (int size = 1; size <= MAX_BLOCKS; size *= 2) {
    if (blocks > 0 && size != blocks) continue;
    const RowLayout layout = layout_of(p, size, shared);
    if (layout.blocks == 0) continue;
    // A cluster twice as large pays where rows are too few for all blocks, until a block has one chunk.
    if (plan.layout.blocks > 0 && (rows >= 2 * plan.clusters || plan.layout.slice <= CHUNK)) break;
    const int resident = resident_clusters(row_kernel(p), device, size, layout.bytes);
    if (resident == 0) continue;
    if (plan.layout.blocks > 0 && rows >= 2 * static_cast<std::int64_t>(resident)) break;
    plan.layout = layout;
    plan.clusters = static_cast<int>(rows < resident ? rows : resident);
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
