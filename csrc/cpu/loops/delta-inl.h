// The merged task vector of one tile: values of the experts, reduction, consensus, limit, scale.
#pragma once

#include "compare-inl.h"
#include "compete-inl.h"
#include "reduce-inl.h"
#include "weighted-inl.h"

namespace mf {
namespace MF_ISA_NAMESPACE {
namespace {

// Keeps delta where at least min_tasks experts need the coordinate.
static void consensus_tile(const Work& w, int64_t start, int n, const float* tau, float* delta) {
  const bool given = w.job->consensus == MF_CONSENSUS_GIVEN;
  float needed[kTile];
  for (int64_t i = 0; i < padded(n); i += kLanes) store(needed + i, zero());
  for (int k = 0; k < w.k; ++k) {
    const vf one = splat(1.0f);
    if (given) {
      each_block(w.experts[k].task_mask + start, n, [&](const uint8_t* p, int64_t i) MF_LAMBDA {
        each_part([&](auto part) MF_LAMBDA {
          constexpr int H = decltype(part)::value;
          float* out = needed + i + H * kLanes;
          store(out, load(out) + keep_if(part_of_bytes<H>(p) != 0, one));
        });
      });
      continue;
    }
    const vf lambda = splat(w.experts[k].lambda);
    for (int64_t i = 0; i < padded(n); i += kLanes) {
      const vf t = load(tau + k * kTile + i);
      const vi needs = task_needs<Lanes>(t, load(delta + i), lambda);
      store(needed + i, load(needed + i) + keep_if(needs, one));
    }
  }
  const vf least = splat((float)w.job->min_tasks);
  for (int64_t i = 0; i < padded(n); i += kLanes)
    store(delta + i, keep_if(load(needed + i) >= least, load(delta + i)));
}

static void limit_tile(int n, float limit, float* delta) {
  const vf most = splat(limit);
  for (int64_t i = 0; i < padded(n); i += kLanes)
    store(delta + i, limited<Lanes>(load(delta + i), most));
}

MF_INLINE void scale_tile(int n, float divisor, float scale, float* delta) {
  const vf d = splat(divisor), f = splat(scale);
  if (divisor == 1 && scale == 1) return;
  for (int64_t i = 0; i < padded(n); i += kLanes) {
    vf x = load(delta + i);
    if (divisor != 1) x /= d;
    if (scale != 1) x *= f;
    store(delta + i, x);
  }
}

// The trimmed values of all experts into s.value (or their linear sum into delta), raw task vectors
// into s.tau.
static void values_tile(const Work& w, Scratch& s, int64_t start, int n, float* delta) {
  const float* base = load_base(w, s, start, n);
  const bool unweighted = w.job->vote_on == MF_VOTE_UNWEIGHTED && !w.linear;
  for (int k = 0; k < w.k; ++k) {
    float* tau = w.keep_tau ? s.tau + k * kTile : s.tau;
    float* out = w.linear ? delta : s.value + k * kTile;
    const int sink = !w.linear ? kStore : k == 0 ? kStart : kAdd;
    s.kept[k] += expert_tile(w, s, k, start, n, base, unweighted ? 1.0f : w.experts[k].weight, sink,
                             tau, out);
  }
  if (!w.variance) return;
  const int64_t kept = variance_tile(w, s, start, n);
  for (int k = 0; k < w.k; ++k) s.kept[k] += kept - n;
}

static void trace_merged(const Work& w, Scratch& s, int64_t start, int n) {
  const mf_job& job = *w.job;
  note_nonfinite(job.merged, job.merged_dtype, start, n, &s.merged_nonfinite);
  if (job.base) note_nonfinite(job.base, job.base_dtype, start, n, &s.base_nonfinite);
}

static bool not_finite(const float* x, int n) {
  vi top = splat_i(0);
  for (int i = 0; i < padded(n); i += kLanes) top = max_i(top, abs_bits(load(x + i)));
  return any(top >= (int32_t)kInfBits);
}

// d = scale * delta of [start, start + n), n <= kTile; raw task vectors into s.tau.
static void delta_tile(const Work& w, Scratch& s, int64_t start, int n, float* delta) {
  const mf_job& job = *w.job;
  if (job.merged) {
    const float* base = load_base(w, s, start, n);
    if (w.m) {
      load_tile<false>(job.merged, job.merged_dtype, base, start, n, delta);
    } else if (load_tile<true>(job.merged, job.merged_dtype, base, start, n, delta)) {
      trace_merged(w, s, start, n);
    }
    if (w.keep_tau)
      for (int k = 0; k < w.k; ++k) load_tau(w, s, k, base, start, n, s.tau + k * kTile);
    return;
  }
  if (job.weights) return weighted_tile(w, s, start, n, delta);
  values_tile(w, s, start, n, delta);
  if (job.competes) {
    compete_tile(w, s, n, delta);
  } else if (!w.linear && reduce_tile(w, s, n, delta)) {
    trace_experts(w, s, start, n);
  }
  if (job.alone) alone_tile(w, s, n, delta);
  const bool consensus = job.consensus != MF_CONSENSUS_NONE, limited = job.limited != 0;
  if (consensus || limited) {
    if (w.linear && not_finite(delta, n)) trace_experts(w, s, start, n);
    scale_tile(n, w.divisor, 1, delta);
  }
  if (consensus) consensus_tile(w, start, n, s.tau, delta);
  if (limited) limit_tile(n, job.limit, delta);
  scale_tile(n, consensus || limited ? 1 : w.divisor, job.scale, delta);
}

}  // namespace
}  // namespace MF_ISA_NAMESPACE
}  // namespace mf
