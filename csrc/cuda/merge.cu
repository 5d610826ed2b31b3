// Merges without row sums: every element once, in and out. Also second passes, with a factor for
// each row, and many small tensors by a table of addresses.
#include "block.cuh"
#include "launch.h"
#include "store.cuh"

namespace mf {
namespace cuda {

// Where vector `n` of [rows, cols] lies. Rows start aligned where `aligned`.
MF_DEVICE Place place_of(int64_t n, int64_t per_row, int64_t cols, int64_t offset, bool aligned,
                         int64_t* row) {
  *row = per_row == 0 ? 0 : n / per_row;
  const int64_t first = (n - *row * per_row) * kVec, left = cols - first;
  Place p;
  p.at = *row * cols + first;
  p.flat = p.at + offset;
  p.count = left < kVec ? (int)left : kVec;
  p.whole = aligned && p.count == kVec;
  return p;
}

struct Shape {
  int64_t rows, cols, per_row;
  const float* factors;
  mf_gpu_table table;
  bool keeps, aligned;
};

// Walks over the vectors of a tensor, or over the blocks of a table: body(job, place, factor); and,
// by all threads of the block, begin() and end(job) around everything of one tensor.
template <class Begin, class Body, class End>
MF_DEVICE void each_vector(const mf_gpu_job& all, const Shape& shape, Begin begin, Body body,
                           End end) {
  if (shape.table.rows) {
    for (int64_t b = block_index(); b < shape.table.blocks; b += blocks_of_grid()) {
      const Job job = job_of(all, shape.table, shape.table.block_job[b]);
      const int64_t first = shape.table.block_start[b] + (int64_t)thread_index() * kVec;
      const int64_t left = job.row[job.k + 2] - first;
      begin();
      if (left > 0) {
        Place p;
        p.at = first, p.flat = first + job.offset;
        p.count = left < kVec ? (int)left : kVec;
        p.whole = shape.aligned && p.count == kVec;
        body(job, p, 1.0f);
      }
      end(job);
    }
    return;
  }
  const Job job = job_of(all);
  const int64_t total = shape.rows * shape.per_row;
  begin();
  for (int64_t n = (int64_t)block_index() * kThreads + thread_index(); n < total;
       n += (int64_t)blocks_of_grid() * kThreads) {
    int64_t row = 0;
    const Place p = place_of(n, shape.rows == 1 ? 0 : shape.per_row, shape.cols, job.offset,
                             shape.aligned, &row);
    body(job, p, shape.factors ? shape.factors[row] : 1.0f);
  }
  end(job);
}

template <int K, bool TRIM>
MF_KERNEL MF_BOUNDS(kThreads, K + TRIM <= 2 ? 5
                              : K <= 2      ? 4
                              : K <= 4      ? 3
                                            : 2)
    merge_fast(const MF_GRID_CONSTANT mf_gpu_job all, const MF_GRID_CONSTANT Shape shape) {
  __shared__ int32_t stayed[MF_GPU_MOST_EXPERTS];
  Seen<K> seen;
  each_vector(
      all, shape,
      [&] {
        seen.begin();
        if (TRIM) begin_counts(stayed);
      },
      [&](const Job& job, const Place& p, float factor) {
        Loaded<K> x;
        Eight d;
        seen.top = 0;
        load_all<K>(job, p, &x);
        fast_delta<K, TRIM, true>(job, p, &x, &d, &seen, [](int, const float*, float) {});
        write_result(job, p, x.base, d, factor, shape.keeps);
        if (seen.top >= kInfBits) note_inputs(job, p);
      },
      [&](const Job& job) {
        if (!TRIM) return;
        count<K>(seen, stayed);
        end_counts(job, stayed);
      });
}

MF_KERNEL MF_BOUNDS(kThreads, 3)
    merge_any(const MF_GRID_CONSTANT mf_gpu_job all, const MF_GRID_CONSTANT Shape shape) {
  __shared__ int32_t stayed[MF_GPU_MOST_EXPERTS];
  each_vector(
      all, shape, [&] { begin_counts(stayed); },
      [&](const Job& job, const Place& p, float factor) {
        Eight b, d;
        uint32_t top = 0;
        load_base(job, p, &b);
        any_delta(job, p, b, &d, &top, stayed);
        write_result(job, p, b, d, factor, shape.keeps);
        if (top >= kInfBits) note_inputs(job, p);
      },
      [&](const Job& job) { end_counts(job, stayed); });
}

template <int K>
static void launch_fast(const mf_gpu_job& job, const Shape& shape, int64_t blocks, void* stream) {
  if (has_trims(job)) {
    MF_LAUNCH((merge_fast<K, true>), blocks, kThreads, 0, stream, job, shape);
  } else {
    MF_LAUNCH((merge_fast<K, false>), blocks, kThreads, 0, stream, job, shape);
  }
}

mf_status launch_merge(const mf_gpu_job& job, int64_t rows, int64_t cols, const float* factors,
                       bool keeps, const mf_gpu_table* table, int processors, void* stream) {
  Shape shape = {rows, cols, (cols + kVec - 1) / kVec, factors, {}, keeps, false};
  int64_t work = shape.per_row * rows;
  if (table) {
    shape.table = *table;
    work = table->blocks * kThreads;
    shape.aligned = table->aligned != 0;
  } else {
    shape.aligned = is_aligned(job, rows, cols);
  }
  if (work <= 0) return MF_OK;
  const int64_t blocks = grid_of(work, kThreads, processors, 16);
  if (!is_fast(job)) {
    MF_LAUNCH(merge_any, blocks, kThreads, 0, stream, job, shape);
    return last_status();
  }
  by_experts(job.k, [&](auto k) { launch_fast<decltype(k)::value>(job, shape, blocks, stream); });
  return last_status();
}

}  // namespace cuda
}  // namespace mf
