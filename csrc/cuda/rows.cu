// Merges with WSC: a block takes a row, keeps d in shared memory while the sums become the
// coefficient, and writes the row. Base and experts come from memory once.
#include "../common/calibration.h"
#include "block.cuh"
#include "launch.h"
#include "store.cuh"

namespace mf {
namespace cuda {

struct RowShape {
  mf_calibration policy;
  uint64_t included;  // a bit an expert
  float* coefficient;
  uint8_t* repaired;
  double *norms2, *pairs, *powers, *work;
  int64_t work_of_block;
  int32_t keeps, aligned;
};

// Shared memory of the two kernels: sums first, then d.
MF_HD int pairs_of(int m) { return m * (m + 1) / 2; }

// From the sums of all M vectors to the factor of the row, by one thread: the sums of the experts
// that count are moved together, then the rules of csrc/common apply. `own` [pairs], `work` [K + 2
// K^2] as far as the variant needs it.
MF_APART float finish_row(const RowShape& s, int64_t row, int k, const double* pairs,
                          const double* powers, double* own, double* own_powers, double* work) {
  const int m = k + 1;
  double* norms = s.norms2 + row * (k + 2);
  int chosen = 0, n = 0;
  for (int i = 0; i < k; ++i) norms[i] = pairs[pair_index(i, i, m)];
  for (int i = 0; i < m; ++i) {
    if (i < k && !(s.included >> i & 1)) continue;
    own_powers[chosen++] = powers ? powers[i] : 0;
    for (int j = i; j < m; ++j)
      if (j == k || (s.included >> j & 1)) own[n++] = pairs[pair_index(i, j, m)];
  }
  bool repaired = false;
  const double raw = raw_coefficient(&s.policy, own, own_powers, chosen, work);
  const float factor = (float)acting_factor(&s.policy, raw, own, chosen, &repaired);
  const double merged = pairs[pair_index(k, k, m)];
  norms[k] = merged;
  norms[k + 1] = merged * (double)factor * (double)factor;
  s.coefficient[row] = (float)raw;
  s.repaired[row] = repaired;
  return factor;
}

MF_DEVICE Place vector_of(int64_t row, int64_t n, int64_t cols, int64_t offset, bool aligned) {
  Place p;
  const int64_t left = cols - n * kVec;
  p.at = row * cols + n * kVec;
  p.flat = p.at + offset;
  p.count = left < kVec ? (int)left : kVec;
  p.whole = aligned && p.count == kVec;
  return p;
}

MF_DEVICE void put_eight(float* to, const Eight& x) {
  Word4 a, b;
  MF_UNROLL for (int e = 0; e < 4; ++e) a.w[e] = bits_of(x.v[e]), b.w[e] = bits_of(x.v[e + 4]);
  ((Word4*)to)[0] = a;
  ((Word4*)to)[1] = b;
}

MF_DEVICE void get_eight(const float* from, Eight* x) {
  const Word4 a = ((const Word4*)from)[0], b = ((const Word4*)from)[1];
  MF_UNROLL for (int e = 0; e < 4; ++e) x->v[e] = float_of(a.w[e]), x->v[e + 4] = float_of(b.w[e]);
}

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

constexpr int kBlocksOfAny = 2;         // a multiprocessor
constexpr int kSharedMost = 160 << 10;  // bytes of a block: what sm_80 and sm_90 both have

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
