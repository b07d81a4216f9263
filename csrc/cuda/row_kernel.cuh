// What every thread of the one-read row kernel does. caad_rows.cu includes this file with the hardware's primitives. emulate_rows.cpp
// includes it with primitives on a CPU, and runs the same code in any order of threads that the barriers allow.
//
// The includer defines, in this namespace: DEVICE (how a function is declared), thread_index, block_index, grid_blocks,
// cluster_rank, block_memory, block_barrier, cluster_arrive, cluster_wait, shuffle_down, shuffle_xor, shuffle_first, and over SharedAddress
// fixed_address, barrier_init, publish_barriers, barrier_expect, barrier_wait, bulk_copy and store_remote.
#pragma once

#include "row_phases.cuh"

namespace kdkernels::cuda {
namespace {

// -- merging ------------------------------------------------------------------------------------------------------------------

// Applies `shuffle` to every word of a partial.
template <class T, class Shuffle>
DEVICE T shuffled(const T& value, Shuffle shuffle) {
  T other;
  const float* in = reinterpret_cast<const float*>(&value);
  float* out = reinterpret_cast<float*>(&other);
  KD_UNROLL
  for (int i = 0; i < static_cast<int>(sizeof(T) / 4); ++i) out[i] = shuffle(in[i]);
  return other;
}

template <class T>
DEVICE T from_lane_0(const T& value) {
  return shuffled(value, [](float x) { return shuffle_first(x); });
}

// Lane 0 gets the merge of the lower 2 * HALF lanes' values.
template <int DIVERGENCE, int HALF, class T>
DEVICE T merged_lanes(T value, const Formula& f) {
  typename T::Maxima maxima = value.maxima;
  KD_UNROLL
  for (int offset = HALF; offset > 0; offset /= 2)
    maxima = T::Maxima::merge(maxima, shuffled(maxima, [offset](float x) { return shuffle_xor(x, offset); }));
  value = value.template moved<DIVERGENCE>(maxima, f);
  KD_UNROLL
  for (int offset = HALF; offset > 0; offset /= 2)
    value.sums = T::Sums::add(value.sums, shuffled(value.sums, [offset](float x) { return shuffle_down(x, offset); }));
  return value;
}

// Every thread gets the merge over all threads of the cluster: first the warp, then the block, then the cluster. Each is a tree in a
// fixed order. A block sends its partial to every block of the cluster. Even and odd exchanges have slots of their own: a block that
// writes a slot again has passed a barrier, and the slot's readers arrived at that barrier after reading. No block reads another
// block's memory, so a block may end after its last exchange.
template <int DIVERGENCE, class T>
DEVICE T merged_cluster(T value, const Formula& f, char* memory, int rank, int blocks, int& exchange) {
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  T* warps = reinterpret_cast<T*>(memory + WARP_PARTIALS);
  char* slots = memory + BLOCK_PARTIALS + exchange % 2 * MAX_BLOCKS * PARTIAL_BYTES;
  ++exchange;
  value = merged_lanes<DIVERGENCE, 16>(value, f);
  if (lane == 0) warps[warp] = value;
  block_barrier();
  if (warp == 0) {
    const T block = from_lane_0(merged_lanes<DIVERGENCE, WARPS / 2>(lane < WARPS ? warps[lane] : T(), f));
    float words[PARTIAL_BYTES / 4] = {};
    std::memcpy(words, &block, sizeof(T));
    if (lane < blocks) {
      const SharedAddress slot = fixed_address(slots + rank * PARTIAL_BYTES);
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

// Starts the copies of one chunk of a row's slice.
DEVICE void fetch_chunk(const RowProblem& p, const RowLayout& layout, SharedAddress base,
                                            const RowSources& from, int columns, int chunk) {
  const SharedAddress barrier = base + 8 * chunk;
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

template <int DIVERGENCE, int CASE>
DEVICE void run_thread(const RowProblem& p, const RowLayout& layout) {
  char* const memory = block_memory();
  const int thread = thread_index(), rank = cluster_rank(), blocks = layout.blocks;
  const int clusters = grid_blocks() / blocks;
  const std::int64_t rows = rows_of(p);
  const Formula f = formula_of(p);
  Slice slice;
  const SharedAddress base = fixed_address(memory);
  slice.student = base + HEAD_BYTES;
  slice.audio = base + layout.audio_offset;
  slice.text = base + layout.text_offset;
  slice.start = rank * layout.slice;
  slice.columns = valid_columns(p, layout, rank);
  const int chunks = chunks_of(slice.columns);
  const Columns columns = columns_of(layout.arrangement, thread);
  const bool want_grad = is_common(CASE) || p.grad.data != 0;

  // Finds the first row at or after `row` that is not ignored, and loads its inputs.
  auto find_row = [&](std::int64_t row, RowInputs& inputs) {
    for (; row < rows; row += clusters) {
      inputs = inputs_of(p, row);
      if (!is_ignored(p, inputs)) break;
    }
    return row;
  };
  // An ignored row is not read. The cluster that skips it writes its results.
  auto zero_rows = [&](std::int64_t from, std::int64_t to) {
    for (std::int64_t row = from; row < to && row < rows; row += clusters) {
      if (want_grad) zero_gradient(p, row, 0, rank * THREADS + thread, blocks * THREADS);
      if (rank == 0 && thread == 0) {
        reinterpret_cast<float*>(p.kd)[row] = 0.f;
        reinterpret_cast<float*>(p.ce)[row] = 0.f;
      }
    }
  };

  const std::int64_t first = block_index() / blocks;
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
  cluster_arrive();  // after the wait every block of the cluster has started, so others may write to its shared memory
  cluster_wait();

  int exchange = 0;
  std::uint32_t parity = 0;
  while (row < rows) {
    // The loads start here. Their values are used after the sums, when they have arrived.
    RowInputs next_inputs;
    if (row + clusters < rows) next_inputs = inputs_of(p, row + clusters);

    float threshold = FLOOR;
    if (!is_common(CASE) && p.has_plausibility && reads_teacher(p)) {
      AudioMax audio_max;
      for (int chunk = 0; chunk < chunks; ++chunk) {
        barrier_wait(base + 8 * chunk, parity);
        each_group(slice, columns, chunk, [&](const auto& c) { add_audio_max<CASE>(p, slice, c, audio_max); });
      }
      threshold = merged_cluster<DIVERGENCE>(audio_max, f, memory, rank, blocks, exchange).maxima.value + p.log_plausibility;
    }

    RowSums sums;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      barrier_wait(base + 8 * chunk, parity);
      each_group(slice, columns, chunk, [&](const auto& c) { add_groups<DIVERGENCE, CASE>(p, f, slice, r, threshold, c, sums); });
    }
    if (thread == 0) add_label(p, slice, r, sums);
    sums = merged_cluster<DIVERGENCE>(sums, f, memory, rank, blocks, exchange);

    RowScalars k = normalised(sums, f);
    JsdSums jsd;
    if (DIVERGENCE == JSD && p.with_kd) {
      for (int chunk = 0; chunk < chunks; ++chunk)
        each_group(slice, columns, chunk, [&](const auto& c) { add_jsd<CASE>(p, f, slice, r, threshold, c, k, jsd); });
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
      if (want_grad) {
        each_group(slice, columns, chunk, [&](const auto& c) {
          write_gradient<DIVERGENCE, CASE>(p, f, slice, r, threshold, c, k, grad);
        });
      }
      if (next < rows) {
        block_barrier();  // all threads of the block have read this chunk
        if (thread == 0) fetch_chunk(p, layout, base, from, slice.columns, chunk);
      }
    }
    if (want_grad) zero_gradient(p, row, first_untouched(p, layout), rank * THREADS + thread, blocks * THREADS);
    zero_rows(row + clusters, next);
    row = next;
    r = next_inputs;
    parity ^= 1;
  }
}

}  // namespace
}  // namespace kdkernels::cuda
