// The rules of one element, in float32 and in expert order: what stays, who contributes, what comes
// of it. L: one lane, or a vector of them (lane.h). What the recipe says is the same in all lanes.
// No product is contracted into a sum (-ffp-contract=off, --fmad=false).
#pragma once

#include "lane.h"
#include "magic_fast.h"

namespace mf {

// Rank by (|tau| descending, flat index ascending) at or above (threshold, cut): equal ones before
// the cut stay. A NaN lies above every threshold.
template <class L = Lane>
MF_HD typename L::Mask at_or_above(typename L::Integer bits, typename L::Integer threshold,
                                   typename L::Mask before_cut) {
  return bits > L::less_one(threshold, before_cut);
}

template <class L = Lane>
MF_HD typename L::Value sign_of_value(typename L::Value v) {
  return L::keep(v > 0, L::of(1)) - L::keep(v < 0, L::of(1));
}

// What a vote of exactly zero elects: -1, 0 (nobody) or 1. An undecided majority keeps the
// negatives, but elects no maximum.
MF_HD float zero_elects(int zero_vote, int reduce, int64_t majority) {
  if (zero_vote == MF_ZERO_POSITIVE) return 1;
  if (zero_vote == MF_ZERO_NEGATIVE) return -1;
  if (zero_vote != MF_ZERO_MAJORITY) return 0;
  if (reduce == MF_MAX) return (float)majority;
  return majority > 0 ? 1 : -1;
}

template <class L = Lane>
MF_HD typename L::Value elected_sign(typename L::Value votes, typename L::Value at_zero) {
  return L::choose(votes > 0, L::of(1), L::choose(votes < 0, L::of(-1), at_zero));
}

// v against the elected sign (+-1, or 0: nobody). The product is exact.
template <class L = Lane>
MF_HD typename L::Mask contributes(int contributors, typename L::Value v,
                                   typename L::Value elected) {
  if (contributors == MF_AGREEING) return v * elected > 0;
  if (contributors == MF_NONZERO) return v != 0;
  return L::everywhere();
}

// `best`: the largest magnitude so far; of a mean, the factor of what the last contributor holds
// should it be the only one.
template <class L = Lane>
struct Reduced {
  typename L::Value total, count, best;
};

template <class L = Lane>
MF_HD void begin(Reduced<L>* r) {
  r->total = r->count = L::of(0);
  r->best = L::of(-1);
}

template <class L = Lane>
MF_HD void reduce_one(int reduce, int vote, typename L::Mask in, typename L::Value x,
                      typename L::Value weight, Reduced<L>* r) {
  if (reduce == MF_MAX) {
    const typename L::Value a = magnitude<L>(x);
    // without a vote the later of two equal ones wins
    const typename L::Mask wins = in & (vote == MF_VOTE_NONE ? a >= r->best : a > r->best);
    r->best = L::choose(wins, a, r->best);
    r->total = L::choose(wins, x, r->total);
    return;
  }
  r->total += L::keep(in, x);
  if (reduce == MF_MEAN) r->count += L::keep(in, L::of(1));
  if (reduce == MF_WEIGHTED_MEAN) r->count += L::keep(in, weight);
}

// What a mean divides by, `count` experts or their weights' sum: at least `least`, if that is above
// 0; a NaN stays one.
template <class L = Lane>
MF_HD typename L::Value divisor_of(int reduce, int vote, typename L::Value count, float least) {
  if (reduce == MF_MEAN) return L::choose(count < 1, L::of(1), count);
  if (least > 0) count = L::choose(count < least, L::of(least), count);
  const typename L::Mask unusable = vote == MF_VOTE_NONE ? magnitude<L>(count) < 1e-8f : count == 0;
  return L::choose(unusable, L::of(1), count);
}

template <class L = Lane>
MF_HD typename L::Value divided(int reduce, int vote, typename L::Value total,
                                typename L::Value count, float least) {
  if (reduce == MF_MEAN) return total / divisor_of<L>(MF_MEAN, vote, count, least);
  if (reduce != MF_WEIGHTED_MEAN) return total;
  return total / divisor_of<L>(MF_WEIGHTED_MEAN, vote, count, least);
}

// |tau| > lambda |delta - tau|: the task needs the coordinate.
template <class L = Lane>
MF_HD typename L::Mask task_needs(typename L::Value tau, typename L::Value delta,
                                  typename L::Value lambda) {
  return magnitude<L>(tau) > lambda * magnitude<L>(delta - tau);
}

// w * delta, w = min(1, limit / max(|delta|, 1e-6)); a NaN stays one.
template <class L = Lane>
MF_HD typename L::Value limited(typename L::Value delta, typename L::Value limit) {
  const typename L::Value distance = magnitude<L>(delta);
  const typename L::Value share = limit / L::choose(distance < 1e-6f, L::of(1e-6f), distance);
  return delta * L::choose(share > 1, L::of(1), share);
}

}  // namespace mf
