// Rows with WSC for every recipe, variant, number of experts and length that rows_fast does not
// take.
#pragma once

#include "rows.cuh"

namespace mf {
namespace cuda {

// Any recipe, variant, K and length of a row. Inner products in tiles of experts, in float64; what
// was read once comes from the caches. d of a row too long for the shared memory (not STORED) is
// formed again.
template <bool STORED>
struct AnyRow {
  static constexpr int kSide =
      STORED ? 3 : 1;  // of a tile of inner products: with more, registers spill
  const Job& job;
  const RowShape& s;
  float* delta;
  int32_t* stayed;
  int64_t row, vectors;

  MF_DEVICE_METHOD Place place(int64_t n) const {
    return vector_of(row, n, s.policy.cols, job.offset, s.aligned);
  }
  MF_DEVICE_METHOD void form(const Place& p, const Eight& b, Eight* d, uint32_t* top,
                             bool counts) const {
    any_delta(job, p, b, d, top, counts ? stayed : nullptr);
  }
  // Vector i of the row at place n: an expert's task vector, or (i = K) d.
  MF_DEVICE_METHOD void vector(int i, int64_t n, const Place& p, const Eight& b, Eight* x) const {
    if (i < job.k) {
      load_tau(job, i, p, b, x);
    } else if (STORED) {
      get_eight(delta + n * kVec, x);
    } else {
      uint32_t top = 0;
      form(p, b, x, &top, false);
    }
  }
};

template <bool STORED>
MF_DEVICE void tile_sums(const AnyRow<STORED>& a, int first, int second, int m, double* pairs,
                         double* room) {
  constexpr int kSide = AnyRow<STORED>::kSide;
  double sum[kSide][kSide];
  MF_UNROLL for (int i = 0; i < kSide; ++i) MF_UNROLL for (int j = 0; j < kSide; ++j) sum[i][j] = 0;
  for (int64_t n = thread_index(); n < a.vectors; n += kThreads) {
    const Place p = a.place(n);
    Eight b, left[kSide], right;
    load_base(a.job, p, &b);
    MF_UNROLL for (int i = 0; i < kSide; ++i) if (first + i < m)
        a.vector(first + i, n, p, b, &left[i]);
    MF_UNROLL for (int j = 0; j < kSide; ++j) {
      if (second + j >= m) continue;
      a.vector(second + j, n, p, b, &right);
      MF_UNROLL for (int i = 0; i < kSide; ++i) {
        if (first + i >= m) continue;
        MF_UNROLL for (int e = 0; e < kVec; ++e) sum[i][j] =
            fused((double)left[i].v[e], (double)right.v[e], sum[i][j]);
      }
    }
  }
  MF_UNROLL for (int i = 0; i < kSide; ++i) MF_UNROLL for (int j = 0; j < kSide; ++j) {
    if (first + i >= m || second + j >= m || first + i > second + j) continue;
    const double total = block_sum(sum[i][j], room);
    if (thread_index() == 0) pairs[pair_index(first + i, second + j, m)] = total;
  }
}

// |x|_p^p of every vector of the row (p = inf: the largest).
template <bool STORED>
MF_DEVICE void power_sums(const AnyRow<STORED>& a, int m, double* powers, double* room) {
  const double p_norm = a.s.policy.p;
  for (int i = 0; i < m; ++i) {
    double own = 0;
    for (int64_t n = thread_index(); n < a.vectors; n += kThreads) {
      const Place p = a.place(n);
      Eight b, x;
      load_base(a.job, p, &b);
      a.vector(i, n, p, b, &x);
      MF_UNROLL for (int e = 0; e < kVec; ++e) {
        const double y = fabs((double)x.v[e]);
        if (isinf(p_norm)) {
          own = y > own || y != y ? y : own;
        } else {
          double power = y;
          for (int q = 1; q < (int)p_norm; ++q) power *= y;
          own += power;
        }
      }
    }
    const double total = isinf(p_norm) ? block_largest(own, room) : block_sum(own, room);
    if (thread_index() == 0) powers[i] = total;
  }
}

template <bool STORED>
MF_KERNEL MF_BOUNDS(kThreads, 2)
    rows_any(const MF_GRID_CONSTANT mf_gpu_job all, const MF_GRID_CONSTANT RowShape s) {
  MF_DYNAMIC_SHARED(room);
  double* reduce = (double*)room;  // [kThreads]
  float* shared_factor = (float*)(reduce + kThreads);
  float* delta = shared_factor + 4;
  __shared__ int32_t stayed[MF_GPU_MOST_EXPERTS];
  const Job job = job_of(all);
  const int m = job.k + 1, count = pairs_of(m);
  // sums, those that count, powers, and what the rules of the coefficient work with
  double* pairs = s.work + block_index() * s.work_of_block;
  double *own = pairs + count, *powers = own + count, *own_powers = powers + m;
  double* work = own_powers + m;
  const bool power = s.policy.p != 2 && s.policy.variant == MF_SPHERE;
  begin_counts(stayed);
  for (int64_t row = block_index(); row < s.policy.rows; row += blocks_of_grid()) {
    constexpr int kSide = AnyRow<STORED>::kSide;
    const AnyRow<STORED> a = {job, s, delta, stayed, row, (s.policy.cols + kVec - 1) / kVec};
    uint32_t top = 0;
    for (int64_t n = thread_index(); n < a.vectors; n += kThreads) {
      const Place p = a.place(n);
      Eight b, d;
      load_base(job, p, &b);
      a.form(p, b, &d, &top, true);
      if (STORED) put_eight(delta + n * kVec, d);
    }
    sync();
    for (int i = 0; i < m; i += kSide)
      for (int j = i; j < m; j += kSide) tile_sums(a, i, j, m, pairs, reduce);
    if (power) power_sums(a, m, powers, reduce);
    if (thread_index() == 0) {
      if (s.pairs) {
        for (int i = 0; i < count; ++i) s.pairs[row * count + i] = pairs[i];
        for (int i = 0; i < m && power; ++i) s.powers[row * m + i] = powers[i];
      } else {
        *shared_factor =
            finish_row(s, row, job.k, pairs, power ? powers : nullptr, own, own_powers, work);
      }
    }
    const bool bad = any_thread(top >= kInfBits);
    const float factor = s.pairs ? 1.0f : *shared_factor;
    for (int64_t n = thread_index(); n < a.vectors && (bad || !s.pairs); n += kThreads) {
      const Place p = a.place(n);
      if (!s.pairs) {
        Eight b, d;
        load_base(job, p, &b);
        a.vector(job.k, n, p, b, &d);
        write_result(job, p, b, d, factor, s.keeps);
      }
      if (bad) note_inputs(job, p);
    }
    sync();
  }
  end_counts(job, stayed);
}

constexpr int kBlocksOfAny = 2;  // a multiprocessor

template <bool STORED>
static mf_status launch_any(const mf_gpu_job& job, RowShape s, int64_t shared, int processors,
                            void* stream) {
  const int64_t blocks = grid_of(s.policy.rows, 1, processors, kBlocksOfAny);
  s.work_of_block = rows_work(job.k, s.policy.variant, 1, 1);
  if (!s.work) return refuse("mf_cuda_rows: work memory is missing");
#if !defined(MF_EMULATE)
  const cudaError_t e = cudaFuncSetAttribute(
      rows_any<STORED>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
  if (e != cudaSuccess) return refuse(cudaGetErrorString(e));
#endif
  MF_LAUNCH(rows_any<STORED>, blocks, kThreads, shared, stream, job, s);
  return last_status();
}

}  // namespace cuda
}  // namespace mf
