// The one-read row kernel on a CPU, for the tests: the phases of row_phases.cuh thread by thread and block by block, with the
// kernel's own layout, copies and order of merging. Only the hardware's part (barriers, the copy engine, addresses in other blocks'
// shared memory) is left to the GPU. A C interface, so that a test can compile this file alone and call it.

#include <algorithm>
#include <vector>

#include "row_phases.cuh"

namespace kdkernels::cuda {
namespace {

// Shared memory of one block; what was not copied there reads as NaN.
struct Block {
  std::vector<std::uint32_t> memory;
  Slice slice = {};
  int chunks = 0;

  char* bytes() { return reinterpret_cast<char*>(memory.data()); }
};

// The merge of the lower 2 * half values, pairwise from far to near, as shuffles down a warp do it.
template <int DIVERGENCE, class T>
T merged_lanes(std::vector<T> values, int half, const Formula& f) {
  for (int offset = half; offset > 0; offset /= 2)
    for (int lane = 0; lane < offset; ++lane) values[lane] = T::template merge<DIVERGENCE>(values[lane], values[lane + offset], f);
  return values[0];
}

// threads[b * THREADS + t]: what thread t of block b holds.
template <int DIVERGENCE, class T>
T merged_cluster(const std::vector<T>& threads, int blocks, const Formula& f) {
  std::vector<T> of_blocks(MAX_BLOCKS);
  for (int b = 0; b < blocks; ++b) {
    std::vector<T> of_warps;
    for (int w = 0; w < WARPS; ++w) {
      const auto first = threads.begin() + b * THREADS + w * 32;
      of_warps.push_back(merged_lanes<DIVERGENCE>(std::vector<T>(first, first + 32), 16, f));
    }
    of_blocks[b] = merged_lanes<DIVERGENCE>(of_warps, WARPS / 2, f);
  }
  return merged_lanes<DIVERGENCE>(of_blocks, MAX_BLOCKS / 2, f);
}

template <int DIVERGENCE, bool TRANSFORM>
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

  Columns columns(const Slice& slice, int chunk, int thread) const {
    return in_chunk(columns_of(layout_.arrangement, thread), chunk, slice.columns);
  }

  // phase(slice, columns, value) for every group of every thread of every block; a T a thread.
  template <class T, class Phase>
  std::vector<T> each_thread(Phase phase) {
    std::vector<T> threads(layout_.blocks * THREADS);
    for (int b = 0; b < layout_.blocks; ++b)
      for (int chunk = 0; chunk < blocks_[b].chunks; ++chunk)
        for (int t = 0; t < THREADS; ++t)
          phase(blocks_[b].slice, columns(blocks_[b].slice, chunk, t), threads[b * THREADS + t]);
    return threads;
  }

  void one_row(std::int64_t row, const RowInputs& r, std::int64_t next, const RowInputs& next_inputs) {
    float threshold = FLOOR;
    if (p.has_plausibility && reads_teacher(p)) {
      const auto maxima =
          each_thread<AudioMax>([&](const Slice& s, Columns c, AudioMax& m) { add_audio_max<TRANSFORM>(p, s, c, m); });
      threshold = merged_cluster<DIVERGENCE>(maxima, layout_.blocks, f).value + p.log_plausibility;
    }
    auto threads = each_thread<RowSums>(
        [&](const Slice& s, Columns c, RowSums& sums) { add_group<DIVERGENCE, TRANSFORM>(p, f, s, r, threshold, c, sums); });
    for (int b = 0; b < layout_.blocks; ++b) add_label(p, blocks_[b].slice, r, threads[b * THREADS]);
    const RowSums sums = merged_cluster<DIVERGENCE>(threads, layout_.blocks, f);
    RowScalars k = normalised(sums, f);
    JsdSums jsd;
    if (DIVERGENCE == JSD && p.with_kd) {
      const auto parts =
          each_thread<JsdSums>([&](const Slice& s, Columns c, JsdSums& j) { add_jsd<TRANSFORM>(p, f, s, r, threshold, c, k, j); });
      jsd = merged_cluster<DIVERGENCE>(parts, layout_.blocks, f);
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
            const Columns c = columns(block.slice, chunk, t);
            write_gradient<DIVERGENCE, TRANSFORM>(p, f, block.slice, r, threshold, c, k, grad);
          }
        }
        if (next < rows_of(p)) fetch_chunk(block, from, chunk);
      }
    }
    zero_columns(row, first_untouched(p, layout_));
  }
};

template <int DIVERGENCE, bool TRANSFORM>
void run_clusters(const RowProblem& p, const RowLayout& layout, std::int64_t clusters) {
  for (std::int64_t first = 0; first < clusters; ++first) Cluster<DIVERGENCE, TRANSFORM>(p, layout, clusters).run(first);
}

}  // namespace
}  // namespace kdkernels::cuda

using namespace kdkernels::cuda;

extern "C" std::int64_t row_problem_bytes() { return sizeof(RowProblem); }

// Runs the problem in clusters of `blocks` blocks with `shared_bytes` each. Returns the arrangement of columns, or -1 where a row
// does not fit.
extern "C" int emulate_rows(const RowProblem* problem, int blocks, int shared_bytes, std::int64_t clusters) {
  const RowLayout layout = layout_of(*problem, blocks, shared_bytes);
  if (layout.blocks == 0) return -1;
  constexpr void (*RUN[3][2])(const RowProblem&, const RowLayout&, std::int64_t) = {
      {run_clusters<FORWARD_KL, false>, run_clusters<FORWARD_KL, true>},
      {run_clusters<REVERSE_KL, false>, run_clusters<REVERSE_KL, true>},
      {run_clusters<JSD, false>, run_clusters<JSD, true>},
  };
  RUN[problem->divergence][is_transformed(*problem)](*problem, layout, std::min(clusters, rows_of(*problem)));
  return layout.arrangement;
}
