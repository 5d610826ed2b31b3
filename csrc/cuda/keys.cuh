// What a search compares, as bits that order as it does: |tau| of an expert, the variance over all
// of them, or the score of an expert's entry.
#pragma once

#include "../common/scores.h"
#include "trim.cuh"

namespace mf {
namespace cuda {

MF_DEVICE float bound_of(const Job& job, int row, int k) {
  return float_of((uint32_t)integer(job, row, k));
}

// A call, for all eight elements of a thread at once take more registers than there are.
MF_APART float score_apart(float tau, float total, float low, float high, float experts) {
  return score_of(tau, total, low, high, experts);
}

MF_DEVICE float score_at(const Job& job, int k, float tau, float total) {
  return score_apart(tau, total, bound_of(job, kLow, k), bound_of(job, kHigh, k), (float)job.k);
}

// Sum of the task vectors, in their order.
MF_DEVICE void total_of(const Job& job, const Place& p, const Eight& b, Eight* total) {
  MF_UNROLL for (int e = 0; e < kVec; ++e) total->v[e] = 0;
  for (int k = 0; k < job.k; ++k) {
    Eight tau;
    load_tau(job, k, p, b, &tau);
    MF_UNROLL for (int e = 0; e < kVec; ++e) total->v[e] += tau.v[e];
  }
}

// Biased variance over the experts, from their sum.
MF_DEVICE void variance_of(const Job& job, const Place& p, const Eight& b, const Eight& total,
                           Eight* x) {
  Eight mean;
  MF_UNROLL for (int e = 0; e < kVec; ++e) mean.v[e] = total.v[e] / (float)job.k, x->v[e] = 0;
  for (int k = 0; k < job.k; ++k) {
    Eight tau;
    load_tau(job, k, p, b, &tau);
    MF_UNROLL for (int e = 0; e < kVec; ++e) {
      const float apart = tau.v[e] - mean.v[e];
      x->v[e] += apart * apart;
    }
  }
  MF_UNROLL for (int e = 0; e < kVec; ++e) x->v[e] /= (float)job.k;
}

// Keys of eight elements. `total`: what KEY is not a magnitude needs.
template <int KEY>
MF_DEVICE void load_keys(const Job& job, int owner, const Place& p, const Eight& b,
                         const Eight& total, int32_t* key) {
  Eight x;
  if (KEY == MF_KEY_VARIANCE) {
    variance_of(job, p, b, total, &x);
  } else {
    load_tau(job, owner, p, b, &x);
  }
  MF_UNROLL for (int e = 0; e < kVec; ++e) key[e] =
      KEY == MF_KEY_SCORE ? score_key(score_at(job, owner, x.v[e], total.v[e]))
                          : (int32_t)(bits_of(x.v[e]) & kAbsMask);
}

MF_DEVICE float tau_at(const Job& job, int k, int64_t i) {
  const float x = element_of(job.expert(k), job.dtype(k), i);
  return less_base(job, x, job.base ? element_of(job.base, job.all->base_dtype, i) : 0.0f);
}

// The key of one element.
MF_DEVICE int32_t key_at(const Job& job, int key, int owner, int64_t i) {
  const float tau = tau_at(job, owner, i);
  if (key == MF_KEY_MAGNITUDE) return (int32_t)(bits_of(tau) & kAbsMask);
  float total = 0, spread = 0;
  for (int k = 0; k < job.k; ++k) total += tau_at(job, k, i);
  if (key == MF_KEY_SCORE) return score_key(score_at(job, owner, tau, total));
  for (int k = 0; k < job.k; ++k) {
    const float apart = tau_at(job, k, i) - total / (float)job.k;
    spread += apart * apart;
  }
  return (int32_t)(bits_of(spread / (float)job.k) & kAbsMask);
}

}  // namespace cuda
}  // namespace mf
