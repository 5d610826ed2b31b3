// The balance of competing parameters (PCB): an entry of an expert counts by how large it is among
// the expert's own, and by how far it points where all together do.
#pragma once

#include "../../common/scores.h"
#include "tile-inl.h"

namespace mf {
namespace MF_ISA_NAMESPACE {
namespace {

MF_INLINE vf score_at(const mf_expert& e, vf experts, vf tau, vf total) {
  return score_of<Lanes>(tau, total, e.threshold, e.top_threshold, experts);
}

MF_INLINE vf total_of(const float* value, int k, int64_t i) {
  vf total = zero();
  for (int e = 0; e < k; ++e) total += load(value + e * kTile + i);
  return total;
}

static void compete_tile(const Work& w, const Scratch& s, int n, float* delta) {
  const vf experts = splat((float)w.k);
  for (int64_t i = 0; i < padded(n); i += kLanes) {
    const vf total = total_of(s.value, w.k, i);
    vf sum = zero(), shares = zero();
    for (int k = 0; k < w.k; ++k) {
      const mf_expert& e = w.experts[k];
      if (!(e.score_top > e.score_cut)) continue;
      const vf t = load(s.value + k * kTile + i);
      weigh_score<Lanes>(score_at(e, experts, t, total), e.score_cut, e.score_top, t, e.threshold,
                         e.top_threshold, &sum, &shares);
    }
    store(delta + i, balanced<Lanes>(sum, shares, total));
  }
}

// Scores of one expert, in memory order.
static void scores_of_tile(const Work& w, Scratch& s, int k, int n, float* out) {
  const vf experts = splat((float)w.k);
  for (int64_t i = 0; i < padded(n); i += kLanes)
    store(s.delta + i, score_at(w.experts[k], experts, load(s.value + k * kTile + i),
                                total_of(s.value, w.k, i)));
  in_memory_order(s.delta, n, out);
}

// Bits of a float32 in an order that unsigned numbers have too.
MF_INLINE uint32_t ordered_bits(float x) {
  const uint32_t u = bits_of(x);
  return u >> 31 ? ~u : u | 0x80000000u;
}

}  // namespace
}  // namespace MF_ISA_NAMESPACE
}  // namespace mf
