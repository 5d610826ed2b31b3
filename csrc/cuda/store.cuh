// The end of eight elements: base + factor * d rounded once; and what is not finite, traced.
#pragma once

#include "delta.cuh"

namespace mf {
namespace cuda {

// Stores and returns whether a finite result overflows the output dtype. KEEPS: a factor of 1 keeps
// the bits of `merged`.
MF_DEVICE bool write_result(const Job& job, const Place& p, const Eight& b, const Eight& d,
                            float factor, bool keeps) {
  Eight r;
  if (keeps && factor == 1) {
    load_eight<false>(job.all->merged, job.all->merged_dtype, p, &r);
  } else {
    MF_UNROLL for (int e = 0; e < kVec; ++e) {
      r.v[e] = d.v[e] * factor;
      if (job.base) r.v[e] = b.v[e] + r.v[e];
    }
  }
  store_eight(job.out, job.all->out_dtype, p, r);
  uint32_t over = 0;
  MF_UNROLL for (int e = 0; e < kVec; ++e) {
    const uint32_t bits = bits_of(r.v[e]) & kAbsMask;
    if (e < p.count && bits >= overflow_bits(job.all->out_dtype) && bits < kInfBits) over = 1;
  }
  if (over) {  // rare: which one is the first
    MF_UNROLL for (int e = kVec - 1; e >= 0; --e) {
      const uint32_t bits = bits_of(r.v[e]) & kAbsMask;
      if (e < p.count && bits >= overflow_bits(job.all->out_dtype) && bits < kInfBits)
        least_of(job.report + job.k + 2, p.flat + e);
    }
  }
  return over != 0;
}

MF_DEVICE void note_source(const void* data, int dtype, const Place& p, int64_t* first) {
  for (int e = 0; e < p.count; ++e) {
    if (finite_bits(bits_of(element_of(data, dtype, p.at + e)))) continue;
    least_of(first, p.flat + e);
    return;
  }
}

// First NaN or infinity of every input among these elements. Called only where there is one.
MF_DEVICE void note_inputs(const Job& job, const Place& p) {
  for (int k = 0; k < job.k; ++k) note_source(job.expert(k), job.dtype(k), p, job.report + k);
  if (job.all->rule.merged)
    note_source(job.all->merged, job.all->merged_dtype, p, job.report + job.k);
  if (job.base) note_source(job.base, job.all->base_dtype, p, job.report + job.k + 1);
}

// Counts of a block in shared memory, on their way to job.kept: integers, so that their order does
// not show.
MF_DEVICE void begin_counts(int32_t* stayed) {
  if (thread_index() < MF_GPU_MOST_EXPERTS) stayed[thread_index()] = 0;
  sync();
}

template <int K>
MF_DEVICE void count(const Seen<K>& seen, int32_t* stayed) {
  MF_UNROLL for (int k = 0; k < K; ++k) if (seen.kept[k]) add_to(stayed + k, seen.kept[k]);
}

MF_DEVICE void end_counts(const Job& job, int32_t* stayed) {
  sync();
  const int k = (int)thread_index();
  if (k < job.k && stayed[k]) add_to(job.kept + k, (int64_t)stayed[k]);
  sync();
}

}  // namespace cuda
}  // namespace mf
