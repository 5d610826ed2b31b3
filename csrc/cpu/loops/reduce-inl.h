// From the values of K experts to one value each element: vote, contributors, reduction.
#pragma once

#include "tile-inl.h"

namespace mf {
namespace MF_ISA_NAMESPACE {
namespace {

struct ReduceTile {
  const float* value;  // [K][kTile]
  int k, n;
  const mf_expert* experts;         // weights
  bool ones;                        // all weights are 1
  const vf* weight;                 // [K] where K <= 8
  float least;                      // of a sum of weights that divides
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

// The signs elected from the sums of a vote, and where nobody is elected.
struct Elected {
  vi somebody;
  vf flip;  // the sign bit where the elected sign is minus
};
MF_INLINE Elected elect(const ReduceTile& t, vf s) {
  vi positive = s > zero(), negative = s < zero();
  const vi undecided = ~(positive | negative);
  positive |= undecided & t.zero_positive;
  negative |= undecided & t.zero_negative;
  return {positive | negative, (vf)(negative & INT32_MIN)};
}

MF_INLINE vf divided(const ReduceTile& t, int vote, int reduce, vf sum, vf count) {
  const vf one = splat(1.0f);
  if (reduce == MF_WEIGHTED_MEAN && t.least > 0) {
    const vf least = splat(t.least);
    return sum / where(count < least, least, count);
  }
  if (reduce == MF_MEAN) return sum / where(count < one, one, count);
  const vi unusable = vote == MF_VOTE_NONE ? abs_of(count) < splat(1e-8f) : count == zero();
  return sum / where(unusable, one, count);
}

// TIES: those that agree with the vote of masses, K <= 8 in registers. True where a vote is not
// finite: then the comparisons of bits are not those of numbers. COUNTED: the divisor is a number
// of experts.
template <int REDUCE, bool COUNTED, int K>
static bool agreeing_loop(const ReduceTile& t, float* delta) {
  vi top = splat_i(0);
  const int64_t end = padded(t.n);
  const float* const values = t.value;
  const vi zero_positive = t.zero_positive, zero_negative = t.zero_negative;
  for (int64_t i = 0; i < end; i += kLanes) {
    vf v[K], vote = zero();
    for (int k = 0; k < K; ++k) v[k] = load(values + k * kTile + i), vote += v[k];
    top = max_i(top, abs_bits(vote));
    const vi undecided = vote == zero();
    const vi positive = (vote > zero()) | (undecided & zero_positive);
    const vi negative = (vote < zero()) | (undecided & zero_negative);
    const vi flip = negative & INT32_MIN;
    vf sum = zero(), weights = zero();
    vi count = splat_i(0);
    for (int k = 0; k < K; ++k) {
      const vi agrees = ((vi)v[k] ^ flip) > 0;
      sum += keep_if(agrees, v[k]);
      if (REDUCE == MF_SUM) continue;
      if (COUNTED) {
        count -= agrees;
      } else {
        weights += keep_if(agrees, t.weight[k]);
      }
    }
    if (REDUCE != MF_SUM)
      sum = divided(t, MF_VOTE_MASS, REDUCE, sum, COUNTED ? to_float(count) : weights);
    store(delta + i, keep_if(positive | negative, sum));
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

// Every other choice. True where a vote of masses is not finite.
template <int VOTE, int CONTRIBUTORS, int REDUCE, bool UNWEIGHTED>
static bool reduce_loop(const ReduceTile& t, float* delta) {
  const vf one = splat(1.0f);
  vi top = splat_i(0);
  for (int64_t i = 0; i < padded(t.n); i += kLanes) {
    Elected e = {splat_i(-1), zero()};  // where nobody is elected the result is 0
    if (VOTE != MF_VOTE_NONE) {
      const vf s = tally<VOTE>(t, i);
      if (VOTE == MF_VOTE_MASS) top = max_i(top, abs_bits(s));
      e = elect(t, s);
    }
    vf sum = zero(), count = zero(), best = splat(-1.0f);
    for (int k = 0; k < t.k; ++k) {
      const vf v = load(t.value + k * kTile + i);
      const vf x = UNWEIGHTED ? v * splat(t.experts[k].weight) : v;
      vi in = splat_i(-1);
      if (CONTRIBUTORS == MF_AGREEING) in = (vf)((vi)v ^ (vi)e.flip) > zero();
      if (CONTRIBUTORS == MF_NONZERO) in = v != zero();
      if (REDUCE == MF_MAX) {
        const vf a = abs_of(x);
        const vi wins = in & (VOTE == MF_VOTE_NONE ? a >= best : a > best);
        best = where(wins, a, best);
        sum = where(wins, x, sum);
      } else {
        sum += CONTRIBUTORS == MF_ALL ? x : keep_if(in, x);
      }
      const vf weight = REDUCE == MF_MEAN ? one : splat(t.experts[k].weight);
      if (REDUCE == MF_MEAN || REDUCE == MF_WEIGHTED_MEAN)
        count += CONTRIBUTORS == MF_ALL ? weight : keep_if(in, weight);
    }
    if (REDUCE == MF_MEAN || REDUCE == MF_WEIGHTED_MEAN) sum = divided(t, VOTE, REDUCE, sum, count);
    if (CONTRIBUTORS == MF_AGREEING) sum = keep_if(e.somebody, sum);
    store(delta + i, sum);
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
  ReduceTile t = {s.value, w.k, n, w.experts, true, nullptr, w.job->least, splat_i(0), splat_i(0)};
  for (int k = 0; k < w.k; ++k) t.ones &= w.experts[k].weight == 1;
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
    if (!agreeing_tile(t, job.reduce, delta)) return false;
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
