// The row kernel that reads each logit once, on a CPU, for the tests. It has a C interface: a test compiles this file alone and calls
// it.
//
// emulate_rows runs the phases of row_phases.cuh thread by thread and block by block, with the kernel's own layout, copies and order
// of merging. It is quick, and nothing can go wrong between threads.
//
// run_kernel runs row_kernel.cuh itself, with each CUDA thread as a coroutine. Where barriers leave the order open, a seed draws it.
// Copies arrive late and out of order, and their destination is NaN until then. So these faults show as a deadlock, or as bits that
// differ from those of emulate_rows: a missing barrier, a barrier that not all threads reach, memory that is reused too early, a slot
// that is written before it was read. Only a GPU can show that its instructions do what their manual says.

#include <ucontext.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "row_phases.cuh"

#define DEVICE inline

namespace kdkernels::cuda {
namespace {

// -- the machine ----------------------------------------------------------------------------------------------------------------

// A barrier of threads. It opens when all have arrived.
struct ThreadBarrier {
  int expected = 0, arrived = 0;
  std::uint64_t generation = 0;

  void arrive() {
    if (++arrived == expected) arrived = 0, ++generation;
  }
};

// A barrier of copies, like an mbarrier initialised for one arrival. A phase completes when that arrival and all announced bytes are
// there.
struct CopyBarrier {
  bool arrived = false;
  std::int64_t bytes = 0;
  std::uint64_t generation = 0;

  void settle() {
    if (arrived && bytes == 0) arrived = false, ++generation;
  }
};

struct PendingCopy {
  char* to;
  const char* from;
  std::uint32_t bytes;
  CopyBarrier* barrier;
};

struct Warp {
  ThreadBarrier barrier;
  float lanes[2][32];
};

struct MachineBlock {
  std::vector<std::uint32_t> memory;
  std::vector<Warp> warps = std::vector<Warp>(WARPS);
  std::map<const char*, CopyBarrier> copy_barriers;
  ThreadBarrier barrier;

  char* bytes() { return reinterpret_cast<char*>(memory.data()); }
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int block, index;
  const std::uint64_t* watched = nullptr;  // the thread does not run before this differs from `seen`
  std::uint64_t seen = 0, cluster_generation = 0;
  bool done = false;
};

struct Machine {
  std::vector<MachineBlock> blocks;
  std::vector<Thread> threads;
  std::vector<PendingCopy> copies;
  ThreadBarrier cluster_barrier;
  ucontext_t scheduler;
  Thread* current = nullptr;
  std::int64_t cluster = 0, clusters = 0;
  bool broken = false;

  MachineBlock& block() { return blocks[current->block]; }

  void wait(const std::uint64_t& generation, std::uint64_t seen) {
    if (generation != seen) return;
    current->watched = &generation;
    current->seen = seen;
    swapcontext(&current->context, &scheduler);
  }
};

Machine* machine;  // the one that runs

DEVICE int thread_index() { return machine->current->index; }
DEVICE int cluster_rank() { return machine->current->block; }
DEVICE int block_index() { return static_cast<int>(machine->cluster * machine->blocks.size()) + cluster_rank(); }
DEVICE int grid_blocks() { return static_cast<int>(machine->clusters * machine->blocks.size()); }
DEVICE char* block_memory() { return machine->block().bytes(); }

DEVICE void block_barrier() {
  ThreadBarrier& barrier = machine->block().barrier;
  const std::uint64_t seen = barrier.generation;
  barrier.arrive();
  machine->wait(barrier.generation, seen);
}

DEVICE void cluster_arrive() {
  machine->current->cluster_generation = machine->cluster_barrier.generation;
  machine->cluster_barrier.arrive();
}

DEVICE void cluster_wait() { machine->wait(machine->cluster_barrier.generation, machine->current->cluster_generation); }

// Buffers alternate. A thread that writes one again has passed a barrier, and the buffer's readers reached that barrier after reading.
DEVICE float from_lane(float x, int lane) {
  Warp& warp = machine->block().warps[thread_index() / 32];
  const std::uint64_t seen = warp.barrier.generation;
  float(&lanes)[32] = warp.lanes[seen % 2];
  lanes[thread_index() % 32] = x;
  warp.barrier.arrive();
  machine->wait(warp.barrier.generation, seen);
  return lane < 32 ? lanes[lane] : x;
}

DEVICE float shuffle_down(float x, int lanes) { return from_lane(x, thread_index() % 32 + lanes); }
DEVICE float shuffle_xor(float x, int lanes) { return from_lane(x, thread_index() % 32 ^ lanes); }
DEVICE float shuffle_first(float x) { return from_lane(x, 0); }

DEVICE SharedAddress fixed_address(const char* p) { return p; }
DEVICE void barrier_init(SharedAddress barrier) { machine->block().copy_barriers[barrier] = CopyBarrier(); }
DEVICE void publish_barriers() {}

DEVICE CopyBarrier& copy_barrier(SharedAddress address) {
  const auto found = machine->block().copy_barriers.find(address);
  if (found != machine->block().copy_barriers.end()) return found->second;
  machine->broken = true;
  static CopyBarrier none;
  return none;
}

DEVICE void barrier_expect(SharedAddress address, std::uint32_t bytes) {
  CopyBarrier& barrier = copy_barrier(address);
  if (barrier.arrived) machine->broken = true;  // announced twice in one phase
  barrier.arrived = true;
  barrier.bytes += bytes;
  barrier.settle();
}

DEVICE void barrier_wait(SharedAddress address, std::uint32_t parity) {
  CopyBarrier& barrier = copy_barrier(address);
  while (barrier.generation % 2 == parity && !machine->broken) machine->wait(barrier.generation, barrier.generation);
}

DEVICE void bulk_copy(SharedAddress to, const char* from, std::uint32_t bytes, SharedAddress address) {
  char* target = const_cast<char*>(to);
  if (bytes % 16 != 0 || reinterpret_cast<std::uintptr_t>(from) % 16 != 0 || (to - block_memory()) % 16 != 0) machine->broken = true;
  std::fill_n(reinterpret_cast<std::uint32_t*>(target), bytes / 4, 0x7fffffffu);
  machine->copies.push_back({target, from, bytes, &copy_barrier(address)});
}

DEVICE void store_remote(SharedAddress local, int rank, const float* v) {
  std::memcpy(machine->blocks[rank].bytes() + (local - block_memory()), v, 16);
}

}  // namespace
}  // namespace kdkernels::cuda

#include "row_kernel.cuh"

namespace kdkernels::cuda {
namespace {

// The shared memory of one block. A place to which nothing was copied reads as NaN.
struct Block {
  std::vector<std::uint32_t> memory;
  Slice slice = {};
  int chunks = 0;

  char* bytes() { return reinterpret_cast<char*>(memory.data()); }
};

// -- the phases in sequence ---------------------------------------------------------------------------------------------------

// The merge of the lower 2 * half values: moved to the maxima of all, then added pairwise from far to near, as shuffles down a warp do it.
template <int DIVERGENCE, class T>
T merged_values(std::vector<T> values, int half, const Formula& f) {
  typename T::Maxima maxima = values[0].maxima;
  for (int lane = 1; lane < 2 * half; ++lane) maxima = T::Maxima::merge(maxima, values[lane].maxima);
  for (T& value : values) value = value.template moved<DIVERGENCE>(maxima, f);
  for (int offset = half; offset > 0; offset /= 2)
    for (int lane = 0; lane < offset; ++lane) values[lane].sums = T::Sums::add(values[lane].sums, values[lane + offset].sums);
  return values[0];
}

// threads[b * THREADS + t]: what thread t of block b holds.
template <int DIVERGENCE, class T>
T merged_threads(const std::vector<T>& threads, int blocks, const Formula& f) {
  std::vector<T> of_blocks(MAX_BLOCKS);
  for (int b = 0; b < blocks; ++b) {
    std::vector<T> of_warps;
    for (int w = 0; w < WARPS; ++w) {
      const auto first = threads.begin() + b * THREADS + w * 32;
      of_warps.push_back(merged_values<DIVERGENCE>(std::vector<T>(first, first + 32), 16, f));
    }
    of_blocks[b] = merged_values<DIVERGENCE>(of_warps, WARPS / 2, f);
  }
  return merged_values<DIVERGENCE>(of_blocks, MAX_BLOCKS / 2, f);
}

template <int DIVERGENCE, int CASE>
class Cluster {
 public:
  Cluster(const RowProblem& problem, const RowLayout& layout, std::int64_t clusters)
      : p(problem), layout_(layout), clusters_(clusters), f(formula_of(problem)), blocks_(layout.blocks) {
    for (int b = 0; b < layout.blocks; ++b) {
      Block& block = blocks_[b];
      block.memory.assign(layout.bytes / 4, 0x7fffffffu);  // NaN as float, as two bf16 and as two fp16
      block.slice.student = block.bytes() + HEAD_BYTES;
      block.slice.audio = block.bytes() + layout.audio_offset;
      block.slice.text = block.bytes() + layout.text_offset;
      block.slice.start = b * layout.slice;
      block.slice.columns = valid_columns(p, layout, b);
      block.chunks = chunks_of(block.slice.columns);
    }
  }

  void run(std::int64_t first) {
    RowInputs r;
    std::int64_t row = find_row(first, r);
    zero_rows(first, row);
    if (row < rows_of(p)) {
      for (Block& block : blocks_) {
        const RowSources from = sources_of(p, r, row, block.slice.start);
        for (int chunk = 0; chunk < block.chunks; ++chunk) fetch_chunk(block, from, chunk);
      }
    }
    while (row < rows_of(p)) {
      RowInputs next_inputs;
      const std::int64_t next = find_row(row + clusters_, next_inputs);
      one_row(row, r, next, next_inputs);
      zero_rows(row + clusters_, next);
      row = next;
      r = next_inputs;
    }
  }

 private:
  const RowProblem& p;
  const RowLayout& layout_;
  const std::int64_t clusters_;
  const Formula f;
  std::vector<Block> blocks_;

  std::int64_t find_row(std::int64_t row, RowInputs& inputs) {
    for (; row < rows_of(p); row += clusters_) {
      inputs = inputs_of(p, row);
      if (!is_ignored(p, inputs)) break;
    }
    return row;
  }

  void zero_columns(std::int64_t row, std::int64_t from) {
    if (p.grad.data == 0) return;
    const int lanes = layout_.blocks * THREADS;
    for (int lane = 0; lane < lanes; ++lane) zero_gradient(p, row, from, lane, lanes);
  }

  void zero_rows(std::int64_t from, std::int64_t to) {
    for (std::int64_t row = from; row < to && row < rows_of(p); row += clusters_) {
      zero_columns(row, 0);
      reinterpret_cast<float*>(p.kd)[row] = 0.f;
      reinterpret_cast<float*>(p.ce)[row] = 0.f;
    }
  }

  void fetch_chunk(Block& block, const RowSources& from, int chunk) {
    const auto copy = [&](int offset, const char* source, int item) {
      const int at = chunk * CHUNK * item;
      std::memcpy(block.bytes() + offset + at, source + at, chunk_bytes(block.slice.columns, chunk, item));
    };
    copy(HEAD_BYTES, from.student, item_bytes(p.student.dtype));
    if (from.audio) copy(layout_.audio_offset, from.audio, item_bytes(p.audio.dtype));
    if (from.text) copy(layout_.text_offset, from.text, item_bytes(p.text.dtype));
  }

  // phase(slice, groups, value) for every thread of every block, chunk by chunk; a T a thread.
  template <class T, class Phase>
  std::vector<T> each_thread(Phase phase) {
    std::vector<T> threads(layout_.blocks * THREADS);
    for (int b = 0; b < layout_.blocks; ++b)
      for (int chunk = 0; chunk < blocks_[b].chunks; ++chunk)
        for (int t = 0; t < THREADS; ++t)
          each_group(blocks_[b].slice, columns_of(layout_.arrangement, t), chunk,
                     [&](const auto& c) { phase(blocks_[b].slice, c, threads[b * THREADS + t]); });
    return threads;
  }

  void one_row(std::int64_t row, const RowInputs& r, std::int64_t next, const RowInputs& next_inputs) {
    float threshold = FLOOR;
    if (p.has_plausibility && reads_teacher(p)) {
      const auto maxima =
          each_thread<AudioMax>([&](const Slice& s, const auto& c, AudioMax& m) { add_audio_max<CASE>(p, s, c, m); });
      threshold = merged_threads<DIVERGENCE>(maxima, layout_.blocks, f).maxima.value + p.log_plausibility;
    }
    auto threads = each_thread<RowSums>(
        [&](const Slice& s, const auto& c, RowSums& sums) { add_groups<DIVERGENCE, CASE>(p, f, s, r, threshold, c, sums); });
    for (int b = 0; b < layout_.blocks; ++b) add_label(p, blocks_[b].slice, r, threads[b * THREADS]);
    const RowSums sums = merged_threads<DIVERGENCE>(threads, layout_.blocks, f);
    RowScalars k = normalised(sums, f);
    JsdSums jsd;
    if (DIVERGENCE == JSD && p.with_kd) {
      const auto parts =
          each_thread<JsdSums>([&](const Slice& s, const auto& c, JsdSums& j) { add_jsd<CASE>(p, f, s, r, threshold, c, k, j); });
      jsd = merged_threads<DIVERGENCE>(parts, layout_.blocks, f);
    }
    finish_row<DIVERGENCE>(p, f, r, sums, jsd, k);
    reinterpret_cast<float*>(p.kd)[row] = k.kd;
    reinterpret_cast<float*>(p.ce)[row] = k.ce;

    for (Block& block : blocks_) {
      RowSources from = {};
      if (next < rows_of(p)) from = sources_of(p, next_inputs, next, block.slice.start);
      for (int chunk = 0; chunk < block.chunks; ++chunk) {
        if (p.grad.data != 0) {
          char* grad = row_address(p, p.grad, row, block.slice.start);
          for (int t = 0; t < THREADS; ++t) {
            each_group(block.slice, columns_of(layout_.arrangement, t), chunk, [&](const auto& c) {
              write_gradient<DIVERGENCE, CASE>(p, f, block.slice, r, threshold, c, k, grad);
            });
          }
        }
        if (next < rows_of(p)) fetch_chunk(block, from, chunk);
      }
    }
    zero_columns(row, first_untouched(p, layout_));
  }
};

template <int DIVERGENCE, int CASE>
void run_clusters(const RowProblem& p, const RowLayout& layout, std::int64_t clusters) {
  for (std::int64_t first = 0; first < clusters; ++first) Cluster<DIVERGENCE, CASE>(p, layout, clusters).run(first);
}

// -- the kernel -------------------------------------------------------------------------------------------------------------------

template <int DIVERGENCE, int CASE>
struct Arguments {
  static const RowProblem* problem;
  static const RowLayout* layout;

  static void enter() {
    run_thread<DIVERGENCE, CASE>(*problem, *layout);
    machine->current->done = true;
  }
};
template <int DIVERGENCE, int CASE>
const RowProblem* Arguments<DIVERGENCE, CASE>::problem;
template <int DIVERGENCE, int CASE>
const RowLayout* Arguments<DIVERGENCE, CASE>::layout;

// A function of its own, apart from its caller's variables, because getcontext may return twice.
[[gnu::noinline]] void prepare(Thread& thread, ucontext_t* scheduler, void (*entry)()) {
  constexpr std::size_t STACK_BYTES = 64 << 10;
  thread.stack = std::make_unique<char[]>(STACK_BYTES);
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.get();
  thread.context.uc_stack.ss_size = STACK_BYTES;
  thread.context.uc_link = scheduler;
  makecontext(&thread.context, entry, 0);
}

// False where threads wait for what cannot come, or copies are used as they may not be.
template <int DIVERGENCE, int CASE>
bool run_machine(const RowProblem& p, const RowLayout& layout, std::int64_t cluster, std::int64_t clusters, std::uint64_t seed) {
  using Entry = Arguments<DIVERGENCE, CASE>;
  Entry::problem = &p;
  Entry::layout = &layout;
  Machine m;
  machine = &m;
  m.cluster = cluster;
  m.clusters = clusters;
  m.cluster_barrier.expected = layout.blocks * THREADS;
  m.blocks.resize(layout.blocks);
  m.threads.resize(static_cast<std::size_t>(layout.blocks) * THREADS);
  for (int b = 0; b < layout.blocks; ++b) {
    m.blocks[b].memory.assign(layout.bytes / 4, 0x7fffffffu);
    m.blocks[b].barrier.expected = THREADS;
    for (Warp& warp : m.blocks[b].warps) warp.barrier.expected = 32;
    for (int t = 0; t < THREADS; ++t) {
      Thread& thread = m.threads[b * THREADS + t];
      thread.block = b;
      thread.index = t;
      prepare(thread, &m.scheduler, &Entry::enter);
    }
  }

  std::mt19937_64 random(seed);
  const auto deliver = [&] {
    std::swap(m.copies[random() % m.copies.size()], m.copies.back());
    const PendingCopy copy = m.copies.back();
    m.copies.pop_back();
    std::memcpy(copy.to, copy.from, copy.bytes);
    copy.barrier->bytes -= copy.bytes;
    copy.barrier->settle();
  };
  std::vector<Thread*> order;
  for (Thread& thread : m.threads) order.push_back(&thread);
  std::size_t left = order.size();
  // One warp stands still until the others can do no more, and then another warp stands still. No order is more unfair.
  const int warps = layout.blocks * WARPS, nobody = -1;
  int still = nobody;
  while (left > 0 && !m.broken) {
    std::shuffle(order.begin(), order.end(), random);
    bool progress = false;
    for (Thread* thread : order) {
      if (thread->done || (thread->watched && *thread->watched == thread->seen)) continue;
      if (thread->block * WARPS + thread->index / 32 == still) continue;
      if (!m.copies.empty() && random() % 256 == 0) deliver();
      thread->watched = nullptr;
      m.current = thread;
      swapcontext(&m.scheduler, &thread->context);
      left -= thread->done;
      progress = true;
    }
    if (!progress && still != nobody) {
      still = nobody;
    } else if (!progress) {
      if (m.copies.empty()) return false;
      deliver();
    } else if (still == nobody) {
      still = static_cast<int>(random() % warps);
    }
  }
  return left == 0 && m.copies.empty() && !m.broken;
}

template <int DIVERGENCE, int CASE>
bool run_machines(const RowProblem& p, const RowLayout& layout, std::int64_t clusters, std::uint64_t seed) {
  for (std::int64_t cluster = 0; cluster < clusters; ++cluster)
    if (!run_machine<DIVERGENCE, CASE>(p, layout, cluster, clusters, seed + cluster)) return false;
  return true;
}

}  // namespace
}  // namespace kdkernels::cuda

using namespace kdkernels::cuda;

extern "C" std::int64_t row_problem_bytes() { return sizeof(RowProblem); }

// Runs the problem in clusters of `blocks` blocks with `shared_bytes` each. Returns the arrangement of columns, or -1 if a row does
// not fit.
extern "C" int emulate_rows(const RowProblem* problem, int blocks, int shared_bytes, std::int64_t clusters) {
  const RowLayout layout = layout_of(*problem, blocks, shared_bytes);
  if (layout.blocks == 0) return -1;
  constexpr void (*RUN[3][CASES])(const RowProblem&, const RowLayout&, std::int64_t) = {
      {run_clusters<FORWARD_KL, PLAIN>, run_clusters<FORWARD_KL, TRANSFORMED>, run_clusters<FORWARD_KL, ALL_BF16>, run_clusters<FORWARD_KL, F32_TO_BF16>},
      {run_clusters<REVERSE_KL, PLAIN>, run_clusters<REVERSE_KL, TRANSFORMED>, run_clusters<REVERSE_KL, ALL_BF16>, run_clusters<REVERSE_KL, F32_TO_BF16>},
      {run_clusters<JSD, PLAIN>, run_clusters<JSD, TRANSFORMED>, run_clusters<JSD, ALL_BF16>, run_clusters<JSD, F32_TO_BF16>},
  };
  RUN[problem->divergence][case_of(*problem)](*problem, layout, std::min(clusters, rows_of(*problem)));
  return layout.arrangement;
}

// The same by the kernel's own code, with the threads in the order of `seed`. Returns -2 if not all of them come to an end.
extern "C" int run_kernel(const RowProblem* problem, int blocks, int shared_bytes, std::int64_t clusters, std::uint64_t seed) {
  const RowLayout layout = layout_of(*problem, blocks, shared_bytes);
  if (layout.blocks == 0) return -1;
  constexpr bool (*RUN[3][CASES])(const RowProblem&, const RowLayout&, std::int64_t, std::uint64_t) = {
      {run_machines<FORWARD_KL, PLAIN>, run_machines<FORWARD_KL, TRANSFORMED>, run_machines<FORWARD_KL, ALL_BF16>, run_machines<FORWARD_KL, F32_TO_BF16>},
      {run_machines<REVERSE_KL, PLAIN>, run_machines<REVERSE_KL, TRANSFORMED>, run_machines<REVERSE_KL, ALL_BF16>, run_machines<REVERSE_KL, F32_TO_BF16>},
      {run_machines<JSD, PLAIN>, run_machines<JSD, TRANSFORMED>, run_machines<JSD, ALL_BF16>, run_machines<JSD, F32_TO_BF16>},
  };
  const bool ended = RUN[problem->divergence][case_of(*problem)](*problem, layout, std::min(clusters, rows_of(*problem)), seed);
  return ended ? layout.arrangement : -2;
}
