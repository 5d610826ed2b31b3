// From the values of K experts to the merged task vector of one tile: vote, contributors,
// reduction, consensus.
#pragma once

#include "tile-inl.h"

namespace mf {
namespace MF_ISA_NAMESPACE {
namespace {

struct ReduceTile {
  const float* value;  // [K][kTile]
  int k, n;
  const mf_expert* experts;         // weights
  vi zero_positive, zero_negative;  // what a vote of exactly zero counts as
};

MF_INLINE vf sign_of(vf x) {
  const vf one = splat(1.0f);
  return keep_if(x > zero(), one) - keep_if(x < zero(), one);
}

template <int VOTE>
MF_INLINE vf tally(const ReduceTile& t, int64_t i) {
  vf sum = zero();
  for (int k = 0; k < t.k; ++k) {
    const vf v = load(t.value + k * kTile + i);
    sum += VOTE == MF_VOTE_MASS ? v : sign_of(v);
  }
  return sum;
}

// Signs elected over the tile, zero votes as 0, summed. The padding is zeros.
template <int VOTE>
static int64_t vote_loop(const ReduceTile& t) {
  vi sum = splat_i(0);
  for (int64_t i = 0; i < padded(t.n); i += kLanes) {
    const vf s = tally<VOTE>(t, i);
    sum += (s < zero()) - (s > zero());
  }
  return lane_sum(sum);
}

template <int VOTE, int CONTRIBUTORS, int REDUCE, bool UNWEIGHTED>
static void reduce_loop(const ReduceTile& t, float* delta) {
  const vf one = splat(1.0f);
  for (int64_t i = 0; i < padded(t.n); i += kLanes) {
    vi elected = splat_i(-1);  // where nobody is elected the result is 0
    vf flip = zero();          // the sign bit where the elected sign is minus
    if (VOTE != MF_VOTE_NONE) {
      const vf s = tally<VOTE>(t, i);
      vi positive = s > zero(), negative = s < zero();
      const vi undecided = ~(positive | negative);
      positive |= undecided & t.zero_positive;
      negative |= undecided & t.zero_negative;
      elected = positive | negative;
      flip = (vf)(negative & INT32_MIN);
    }
    vf sum = zero(), count = zero(), best = splat(-1.0f);
    for (int k = 0; k < t.k; ++k) {
      const vf v = load(t.value + k * kTile + i);
      const vf x = UNWEIGHTED ? v * splat(t.experts[k].weight) : v;
      vi in = splat_i(-1);
      if (CONTRIBUTORS == MF_AGREEING) in = (vf)((vi)v ^ (vi)flip) > zero();
      if (CONTRIBUTORS == MF_NONZERO) in = v != zero();
      if (REDUCE == MF_MAX) {
        const vf a = abs_of(x);
        const vi wins = in & (VOTE == MF_VOTE_NONE ? a >= best : a > best);
        best = where(wins, a, best);
        sum = where(wins, x, sum);
      } else {
        sum += CONTRIBUTORS == MF_ALL ? x : keep_if(in, x);
      }
      if (REDUCE == MF_MEAN) count += CONTRIBUTORS == MF_ALL ? one : keep_if(in, one);
      if (REDUCE == MF_WEIGHTED_MEAN) {
        const vf weight = splat(t.experts[k].weight);
        count += CONTRIBUTORS == MF_ALL ? weight : keep_if(in, weight);
      }
    }
    if (REDUCE == MF_MEAN) sum /= where(count < one, one, count);
    if (REDUCE == MF_WEIGHTED_MEAN) {
      const vi unusable = VOTE == MF_VOTE_NONE ? abs_of(count) < splat(1e-8f) : count == zero();
      sum /= where(unusable, one, count);
    }
    if (CONTRIBUTORS == MF_AGREEING) sum = keep_if(elected, sum);
    store(delta + i, sum);
  }
}

template <int VOTE, int CONTRIBUTORS, int REDUCE>
static void reduce_weighted(const ReduceTile& t, bool unweighted, float* delta) {
  if (unweighted) return reduce_loop<VOTE, CONTRIBUTORS, REDUCE, true>(t, delta);
  return reduce_loop<VOTE, CONTRIBUTORS, REDUCE, false>(t, delta);
}

template <int VOTE, int CONTRIBUTORS>
static void reduce_by_rule(const ReduceTile& t, int reduce, bool unweighted, float* delta) {
  switch (reduce) {
    case MF_SUM:
      return reduce_weighted<VOTE, CONTRIBUTORS, MF_SUM>(t, unweighted, delta);
    case MF_MEAN:
      return reduce_weighted<VOTE, CONTRIBUTORS, MF_MEAN>(t, unweighted, delta);
    case MF_WEIGHTED_MEAN:
      return reduce_weighted<VOTE, CONTRIBUTORS, MF_WEIGHTED_MEAN>(t, unweighted, delta);
    default:
      return reduce_weighted<VOTE, CONTRIBUTORS, MF_MAX>(t, unweighted, delta);
  }
}

template <int VOTE>
static void reduce_by_contributors(const ReduceTile& t, const mf_job& job, bool unweighted,
                                   float* delta) {
  switch (job.contributors) {
    case MF_AGREEING:
      return reduce_by_rule<VOTE, MF_AGREEING>(t, job.reduce, unweighted, delta);
    case MF_NONZERO:
      return reduce_by_rule<VOTE, MF_NONZERO>(t, job.reduce, unweighted, delta);
    default:
      return reduce_by_rule<VOTE, MF_ALL>(t, job.reduce, unweighted, delta);
  }
}

MF_INLINE ReduceTile reduce_tile_of(const Work& w, const Scratch& s, int n) {
  ReduceTile t = {s.value, w.k, n, w.experts, splat_i(0), splat_i(0)};
  const mf_job& job = *w.job;
  bool positive = job.zero_vote == MF_ZERO_POSITIVE, negative = job.zero_vote == MF_ZERO_NEGATIVE;
  if (job.zero_vote == MF_ZERO_MAJORITY) {
    positive =
        job.majority > 0;  // an undecided majority keeps the negatives, but elects no maximum
    negative = job.majority < 0 || (job.majority == 0 && job.reduce != MF_MAX);
  }
  if (positive) t.zero_positive = splat_i(-1);
  if (negative) t.zero_negative = splat_i(-1);
  return t;
}

static void reduce_tile(const Work& w, const Scratch& s, int n, float* delta) {
  const ReduceTile t = reduce_tile_of(w, s, n);
  const bool unweighted = w.job->vote_on == MF_VOTE_UNWEIGHTED;
  switch (w.job->vote) {
    case MF_VOTE_MASS:
      return reduce_by_contributors<MF_VOTE_MASS>(t, *w.job, unweighted, delta);
    case MF_VOTE_COUNT:
      return reduce_by_contributors<MF_VOTE_COUNT>(t, *w.job, unweighted, delta);
    default:
      return reduce_by_contributors<MF_VOTE_NONE>(t, *w.job, unweighted, delta);
  }
}

// Keeps delta where at least min_tasks experts need the coordinate: |tau_k| > lambda_k * |delta -
// tau_k|.
static void consensus_tile(const Work& w, int64_t start, int n, const float* tau, int stride,
                           float* delta) {
  const bool given = w.job->consensus == MF_CONSENSUS_GIVEN;
  float needed[kTile];
  for (int64_t i = 0; i < padded(n); i += kLanes) store(needed + i, zero());
  for (int k = 0; k < w.k; ++k) {
    if (given) {
      const uint8_t* mask = w.experts[k].task_mask + start;
      for (int i = 0; i < n; ++i) needed[i] += mask[i] != 0 ? 1.0f : 0.0f;
      continue;
    }
    const vf lambda = splat(w.experts[k].lambda), one = splat(1.0f);
    for (int64_t i = 0; i < padded(n); i += kLanes) {
      const vf t = load(tau + (int64_t)k * stride + i);
      const vi needs = abs_of(t) > lambda * abs_of(load(delta + i) - t);
      store(needed + i, load(needed + i) + keep_if(needs, one));
    }
  }
  const vf least = splat((float)w.job->min_tasks);
  for (int64_t i = 0; i < padded(n); i += kLanes)
    store(delta + i, keep_if(load(needed + i) >= least, load(delta + i)));
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
// into tau.
static void values_tile(const Work& w, Scratch& s, int64_t start, int n, float* tau, int stride,
                        float* delta) {
  const float* base = load_base(w, s, start, n);
  const bool unweighted = w.job->vote_on == MF_VOTE_UNWEIGHTED && !w.linear;
  for (int k = 0; k < w.k; ++k) {
    float* t = w.keep_tau ? tau + (int64_t)k * stride : tau;
    load_tau(w, s, k, base, start, n, t);
    const int sink = !w.linear ? kStore : k == 0 ? kStart : kAdd;
    s.kept[k] += trim_tile(w, s, k, start, n, t, unweighted ? 1.0f : w.experts[k].weight, sink,
                           w.linear ? delta : s.value + k * kTile);
  }
}

// d = scale * delta of [start, start + n), n <= kTile; raw task vectors into tau (rows of
// `stride`).
static void delta_tile(const Work& w, Scratch& s, int64_t start, int n, float* tau, int stride,
                       float* delta) {
  const mf_job& job = *w.job;
  if (job.merged) {
    const float* base = load_base(w, s, start, n);
    if (load_tile(job.merged, job.merged_dtype, base, start, n, delta)) {
      note_nonfinite(job.merged, job.merged_dtype, start, n, &s.merged_nonfinite);
      if (job.base) note_nonfinite(job.base, job.base_dtype, start, n, &s.base_nonfinite);
    }
    if (w.keep_tau)
      for (int k = 0; k < w.k; ++k) load_tau(w, s, k, base, start, n, tau + (int64_t)k * stride);
    return;
  }
  values_tile(w, s, start, n, tau, stride, delta);
  if (!w.linear) reduce_tile(w, s, n, delta);
  const bool consensus = job.consensus != MF_CONSENSUS_NONE;
  if (consensus) {
    scale_tile(n, w.divisor, 1, delta);
    consensus_tile(w, start, n, tau, stride, delta);
  }
  scale_tile(n, consensus ? 1 : w.divisor, job.scale, delta);
}

}  // namespace
}  // namespace MF_ISA_NAMESPACE
}  // namespace mf
