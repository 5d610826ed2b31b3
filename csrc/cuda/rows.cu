// Merges with WSC: a block takes a row, keeps d in shared memory while the sums become the
// coefficient, and writes the row. Base and experts come from memory once.
#include "rows_any.cuh"

namespace mf {
namespace cuda {

template <int K, bool TRIM>
MF_KERNEL MF_BOUNDS(kThreads, K <= 2   ? 4
                              : K <= 4 ? 3
                                       : 2)
    rows_fast(const MF_GRID_CONSTANT mf_gpu_job all, const MF_GRID_CONSTANT RowShape s) {
  constexpr int M = K + 1, P = M * (M + 1) / 2;
  MF_DYNAMIC_SHARED(room);
  double* sums = (double*)room;  // [P]
  double* own = sums + P;        // [P]
  double* scratch = own + P;     // [K + M]
  float* shared_factor = (float*)(scratch + K + M);
  float* lanes = shared_factor + 2;  // [P * kThreads], and the same memory again:
  const int64_t skip = (2 * P + K + M + 1) * 8;
  float* delta = (float*)(room + (skip + 15) / 16 * 16 + (int64_t)P * kThreads * 4);
  __shared__ int32_t stayed[MF_GPU_MOST_EXPERTS];
  const Job job = job_of(all);
  const int64_t cols = s.policy.cols, vectors = (cols + kVec - 1) / kVec;
  Seen<K> seen;
  seen.begin();
  if (TRIM) begin_counts(stayed);
  for (int64_t row = block_index(); row < s.policy.rows; row += blocks_of_grid()) {
    float pair[P];
    MF_UNROLL for (int i = 0; i < P; ++i) pair[i] = 0;
    for (int64_t n = thread_index(); n < vectors; n += kThreads) {
      const Place p = vector_of(row, n, cols, job.offset, s.aligned);
      Loaded<K> x;
      Eight d;
      load_all<K>(job, p, &x);
      fast_delta<K, TRIM, false>(job, p, &x, &d, &seen, [&](int, const float* tau, float de) {
        int at = 0;
        MF_UNROLL for (int i = 0; i < K; ++i) {
          MF_UNROLL for (int j = i; j < K; ++j, ++at) pair[at] = fused(tau[i], tau[j], pair[at]);
          pair[at] = fused(tau[i], de, pair[at]);
          ++at;
        }
        pair[at] = fused(de, de, pair[at]);
      });
      put_eight(delta + n * kVec, d);
    }
    block_sums<P>(pair, lanes, sums);
    if (s.pairs) {  // only the sums
      for (int i = (int)thread_index(); i < P; i += kThreads) s.pairs[row * P + i] = sums[i];
    } else if (thread_index() == 0) {
      *shared_factor = finish_row(s, row, K, sums, nullptr, own, scratch + K, scratch);
    }
    sync();
    // what is not finite shows in the norms; finite values whose squares overflow only cost a look
    bool bad = false;
    for (int i = 0; i < M; ++i) bad |= !isfinite(sums[pair_index(i, i, M)]);
    const float factor = s.pairs ? 1.0f : *shared_factor;
    for (int64_t n = thread_index(); n < vectors && (bad || !s.pairs); n += kThreads) {
      const Place p = vector_of(row, n, cols, job.offset, s.aligned);
      if (!s.pairs) {
        Eight b, d;
        load_base(job, p, &b);
        get_eight(delta + n * kVec, &d);
        write_result(job, p, b, d, factor, s.keeps);
      }
      if (bad) note_inputs(job, p);
    }
    sync();  // the next row takes the shared memory
  }
  if (TRIM) {
    count<K>(seen, stayed);
    end_counts(job, stayed);
  }
}

int64_t rows_work(int k, int variant, int64_t rows, int processors) {
  const int64_t m = k + 1, exact = variant == MF_MANIFOLD_EXACT ? k + 2 * (int64_t)k * k : k;
  return grid_of(rows, 1, processors, kBlocksOfAny) * (2 * pairs_of((int)m) + 2 * m + exact);
}

static int64_t fast_shared(int k, int64_t cols) {
  const int64_t m = k + 1, p = pairs_of((int)m);
  const int64_t head = ((2 * p + k + m + 1) * 8 + 15) / 16 * 16;
  return head + p * kThreads * 4 + (cols + kVec - 1) / kVec * kVec * 4;
}

template <int K, bool TRIM>
static mf_status launch_one(const mf_gpu_job& job, const RowShape& s, int64_t shared,
                            int processors, void* stream) {
#if !defined(MF_EMULATE)
  if (shared > 48 << 10) {
    const cudaError_t e = cudaFuncSetAttribute(
        rows_fast<K, TRIM>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    if (e != cudaSuccess) return refuse(cudaGetErrorString(e));
  }
#endif
  // as many blocks as the shared memory lets on a multiprocessor, at most what registers do
  const int64_t fit = kSharedMost / shared;
  const int64_t blocks = grid_of(s.policy.rows, 1, processors,
                                 fit < 1   ? 1
                                 : fit > 4 ? 4
                                           : (int)fit);
  MF_LAUNCH((rows_fast<K, TRIM>), blocks, kThreads, shared, stream, job, s);
  return last_status();
}

template <int K>
static mf_status launch_trimmed(const mf_gpu_job& job, const RowShape& s, int64_t shared,
                                int processors, void* stream) {
  return has_trims(job) ? launch_one<K, true>(job, s, shared, processors, stream)
                        : launch_one<K, false>(job, s, shared, processors, stream);
}

mf_status launch_rows(const mf_gpu_job& job, const mf_gpu_rows& rows, int processors,
                      void* stream) {
  RowShape s = {rows.policy,
                0,
                rows.coefficient,
                rows.repaired,
                rows.norms2,
                rows.pairs,
                rows.powers,
                rows.work,
                0,
                rows.keeps,
                0};
  for (int k = 0; k < job.k; ++k)
    if (!rows.included || rows.included[k]) s.included |= 1ull << k;
  if (s.policy.rows <= 0 || s.policy.cols <= 0) return MF_OK;
  s.aligned = is_aligned(job, s.policy.rows, s.policy.cols);
  const bool simple =
      s.policy.variant == MF_MANIFOLD || (s.policy.variant == MF_SPHERE && s.policy.p == 2);
  const int64_t shared = job.k <= 8 ? fast_shared(job.k, s.policy.cols) : 0;
  if (!simple || !is_fast(job) || shared > kSharedMost) {
    const int64_t head = kThreads * 8 + 16, row = (s.policy.cols + kVec - 1) / kVec * kVec * 4;
    return head + row <= kSharedMost ? launch_any<true>(job, s, head + row, processors, stream)
                                     : launch_any<false>(job, s, head, processors, stream);
  }
  return by_experts(job.k, [&](auto k) {
    return launch_trimmed<decltype(k)::value>(job, s, shared, processors, stream);
  });
}

}  // namespace cuda
}  // namespace mf
