// The rules of one element, in float32 and in expert order: what stays, who contributes, what comes
// of it. No product is contracted into a sum (-ffp-contract=off, --fmad=false).
#pragma once

#include "magic_fast.h"
#include "numeric.h"

namespace mf {

// Rank by (|tau| descending, flat index ascending) at or above (threshold, cut): equal ones before
// the cut stay. A NaN lies above every threshold.
MF_HD bool at_or_above(uint32_t bits, uint32_t threshold, int64_t cut, int64_t flat) {
  return bits > threshold || (bits == threshold && flat < cut);
}

MF_HD float sign_of_value(float v) { return (v > 0 ? 1.0f : 0.0f) - (v < 0 ? 1.0f : 0.0f); }

// What a vote of exactly zero elects: -1, 0 (nobody) or 1. An undecided majority keeps the
// negatives, but elects no maximum.
MF_HD float zero_elects(int zero_vote, int reduce, int64_t majority) {
  if (zero_vote == MF_ZERO_POSITIVE) return 1;
  if (zero_vote == MF_ZERO_NEGATIVE) return -1;
  if (zero_vote != MF_ZERO_MAJORITY) return 0;
  if (reduce == MF_MAX) return (float)majority;
  return majority > 0 ? 1 : -1;
}

MF_HD float elected_sign(float votes, float at_zero) {
  return votes > 0 ? 1 : votes < 0 ? -1 : at_zero;
}

// v against the elected sign (+-1, or 0: nobody). The product is exact.
MF_HD bool contributes(int contributors, float v, float elected) {
  if (contributors == MF_AGREEING) return v * elected > 0;
  if (contributors == MF_NONZERO) return v != 0;
  return true;
}

// `best`: the largest magnitude so far; of a mean, the factor of what the last contributor holds
// should it be the only one.
struct Reduced {
  float total, count, best;
};

MF_HD Reduced nothing_reduced() { return {0, 0, -1}; }

MF_HD void reduce_one(int reduce, int vote, bool in, float x, float weight, Reduced* r) {
  if (reduce == MF_MAX) {
    const float a = float_of(bits_of(x) & kAbsMask);
    // without a vote the later of two equal ones wins
    if (in && (vote == MF_VOTE_NONE ? a >= r->best : a > r->best)) r->best = a, r->total = x;
    return;
  }
  r->total += in ? x : 0.0f;
  if (reduce == MF_MEAN) r->count += in ? 1.0f : 0.0f;
  if (reduce == MF_WEIGHTED_MEAN) r->count += in ? weight : 0.0f;
}

MF_HD float divided(int reduce, int vote, float total, float count) {
  if (reduce == MF_MEAN) return total / (count < 1 ? 1.0f : count);
  if (reduce != MF_WEIGHTED_MEAN) return total;
  const bool unusable =
      vote == MF_VOTE_NONE ? float_of(bits_of(count) & kAbsMask) < 1e-8f : count == 0;
  return total / (unusable ? 1.0f : count);
}

// At least `least`, if that is above 0; a NaN stays one.
MF_HD float floored(float sum, float least) { return least > 0 && sum < least ? least : sum; }

// |tau| > lambda |delta - tau|: the task needs the coordinate.
MF_HD bool task_needs(float tau, float delta, float lambda) {
  const float bar = lambda * float_of(bits_of(delta - tau) & kAbsMask);
  return float_of(bits_of(tau) & kAbsMask) > bar;
}

// w * delta, w = min(1, limit / max(|delta|, 1e-6)); a NaN stays one.
MF_HD float limited(float delta, float limit) {
  const float distance = float_of(bits_of(delta) & kAbsMask);
  const float share = limit / (distance < 1e-6f ? 1e-6f : distance);
  return delta * (share > 1 ? 1.0f : share);
}

}  // namespace mf
