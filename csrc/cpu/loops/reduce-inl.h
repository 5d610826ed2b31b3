// From the values of K experts to one value each element: vote, contributors, reduction.
#pragma once

#include "../../common/rules.h"
#include "tile-inl.h"

namespace mf {
namespace MF_ISA_NAMESPACE {
namespace {

struct ReduceTile {
  const float* value;  // [K][kTile]
  int k, n;
  const mf_expert* experts;  // weights
  bool ones;                 // all weights are 1
  const vf* weight;          // [K] where K <= 8
  float least;               // of a sum of weights that divides
  vf at_zero;                // what a vote of exactly zero elects
};

template <int VOTE>
MF_INLINE vf tally(const ReduceTile& t, int64_t i) {
  vf sum = zero();
  for (int k = 0; k < t.k; ++k) {
    const vf v = load(t.value + k * kTile + i);
    sum += VOTE == MF_VOTE_MASS ? v : sign_of_value<Lanes>(v);
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

// TIES: those that agree with the vote of masses, K <= 8 in registers. True where a vote is not
// finite. COUNTED: the divisor is a number of experts.
template <int REDUCE, bool COUNTED, int K>
static bool agreeing_loop(const ReduceTile& t, float* delta) {
  vi top = splat_i(0);
  const int64_t end = padded(t.n);
  const float* const values = t.value;
  const vf at_zero = t.at_zero;
  for (int64_t i = 0; i < end; i += kLanes) {
    vf v[K], vote = zero();
    for (int k = 0; k < K; ++k) v[k] = load(values + k * kTile + i), vote += v[k];
    top = max_i(top, abs_bits(vote));
    const vf elected = elected_sign<Lanes>(vote, at_zero);
    vf sum = zero(), weights = zero();
    vi count = splat_i(0);
    for (int k = 0; k < K; ++k) {
      const vi agrees = contributes<Lanes>(MF_AGREEING, v[k], elected);
      sum += keep_if(agrees, v[k]);
      if (REDUCE == MF_SUM) continue;
      if (COUNTED) {
        count -= agrees;
      } else {
        weights += keep_if(agrees, t.weight[k]);
      }
    }
    store(delta + i,
          divided<Lanes>(REDUCE, MF_VOTE_MASS, sum, COUNTED ? to_float(count) : weights, t.least));
  }
  return any(top >= (int32_t)kInfBits);
}

template <int REDUCE, bool COUNTED>
static bool agreeing(const ReduceTile& t, float* delta) {
  switch (t.k) {
    case 1:
      return agreeing_loop<REDUCE, COUNTED, 1>(t, delta);
    case 2:
      return agreeing_loop<REDUCE, COUNTED, 2>(t, delta);
    case 3:
      return agreeing_loop<REDUCE, COUNTED, 3>(t, delta);
    case 4:
      return agreeing_loop<REDUCE, COUNTED, 4>(t, delta);
    case 5:
      return agreeing_loop<REDUCE, COUNTED, 5>(t, delta);
    case 6:
      return agreeing_loop<REDUCE, COUNTED, 6>(t, delta);
    case 7:
      return agreeing_loop<REDUCE, COUNTED, 7>(t, delta);
    default:
      return agreeing_loop<REDUCE, COUNTED, 8>(t, delta);
  }
}

static bool agreeing_tile(const ReduceTile& t, int reduce, float* delta) {
  if (reduce == MF_SUM) return agreeing<MF_SUM, true>(t, delta);
  if (reduce == MF_MEAN) return agreeing<MF_MEAN, true>(t, delta);
  return t.ones ? agreeing<MF_WEIGHTED_MEAN, true>(t, delta)
                : agreeing<MF_WEIGHTED_MEAN, false>(t, delta);
}

// Every other choice. True where a vote of masses is not finite. `t` is a copy: to the compiler a
// store to delta may change what a reference names, and it would load that again for each vector.
template <int VOTE, int CONTRIBUTORS, int REDUCE, bool UNWEIGHTED>
static bool reduce_loop(const ReduceTile t, float* delta) {
  vi top = splat_i(0);
  for (int64_t i = 0; i < padded(t.n); i += kLanes) {
    vf elected = zero();
    if (VOTE != MF_VOTE_NONE) {
      const vf s = tally<VOTE>(t, i);
      if (VOTE == MF_VOTE_MASS) top = max_i(top, abs_bits(s));
      elected = elected_sign<Lanes>(s, t.at_zero);
    }
    Reduced<Lanes> r;
    begin(&r);
    for (int k = 0; k < t.k; ++k) {
      const vf v = load(t.value + k * kTile + i);
      const vf x = UNWEIGHTED ? v * splat(t.experts[k].weight) : v;
      const vi in = contributes<Lanes>(CONTRIBUTORS, v, elected);
      reduce_one<Lanes>(REDUCE, VOTE, in, x, splat(t.experts[k].weight), &r);
    }
    store(delta + i, divided<Lanes>(REDUCE, VOTE, r.total, r.count, t.least));
  }
  return any(top >= (int32_t)kInfBits);
}

template <int VOTE, int CONTRIBUTORS, int REDUCE>
static bool reduce_weighted(const ReduceTile& t, bool unweighted, float* delta) {
  if (unweighted) return reduce_loop<VOTE, CONTRIBUTORS, REDUCE, true>(t, delta);
  return reduce_loop<VOTE, CONTRIBUTORS, REDUCE, false>(t, delta);
}

template <int VOTE, int CONTRIBUTORS>
static bool reduce_by_rule(const ReduceTile& t, int reduce, bool unweighted, float* delta) {
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
static bool reduce_by_contributors(const ReduceTile& t, const mf_job& job, bool unweighted,
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
  const mf_job& job = *w.job;
  ReduceTile t = {
      s.value, w.k,     n,         w.experts,
      true,    nullptr, job.least, splat(zero_elects(job.zero_vote, job.reduce, job.majority))};
  for (int k = 0; k < w.k; ++k) t.ones &= w.experts[k].weight == 1;
  return t;
}

// True where a vote of masses is not finite.
static bool reduce_tile(const Work& w, const Scratch& s, int n, float* delta) {
  const mf_job& job = *w.job;
  ReduceTile t = reduce_tile_of(w, s, n);
  const bool unweighted = job.vote_on == MF_VOTE_UNWEIGHTED;
  constexpr int kInRegisters = 8;
  if (job.vote == MF_VOTE_MASS && job.contributors == MF_AGREEING && job.reduce != MF_MAX &&
      !unweighted && w.k <= kInRegisters) {
    vf weight[kInRegisters];
    for (int k = 0; k < w.k; ++k) weight[k] = splat(w.experts[k].weight);
    t.weight = weight;
    return agreeing_tile(t, job.reduce, delta);
  }
  switch (job.vote) {
    case MF_VOTE_MASS:
      return reduce_by_contributors<MF_VOTE_MASS>(t, job, unweighted, delta);
    case MF_VOTE_COUNT:
      return reduce_by_contributors<MF_VOTE_COUNT>(t, job, unweighted, delta);
    default:
      return reduce_by_contributors<MF_VOTE_NONE>(t, job, unweighted, delta);
  }
}

}  // namespace
}  // namespace MF_ISA_NAMESPACE
}  // namespace mf
