// The balance of competing parameters (PCB): an entry of an expert counts by how large it is among
// the expert's own, and by how far it points where all together do.
#pragma once

#include "tile-inl.h"

namespace mf {
namespace MF_ISA_NAMESPACE {
namespace {

// e^x for x <= 0, relative error below 2e-7; below -86 it is that of -86. No fused multiply-add, so
// the same bits on every instruction set. Polynomials: interpolation at Chebyshev points.
MF_INLINE vf exp_of(vf x) {
  const vf shift = splat(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded to a number
  const vf least = splat(-86.0f);
  x = where(x < least, least, x);
  const vf shifted = x * splat(1.44269504f) + shift;
  const vf n = shifted - shift;
  const vf r = (x - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);  // ln 2 in two parts
  vf q = splat(1.392692677e-3f);
  q = q * r + splat(8.363774046e-3f);
  q = q * r + splat(4.166654870e-2f);
  q = q * r + splat(1.666657329e-1f);
  q = q * r + splat(0.5f);
  const vf y = q * r * r + r + splat(1.0f);
  return (vf)((vu)y + (((vu)shifted - (vu)shift) << 23));
}

// tanh x, relative error below 3e-7 from the smallest x on.
MF_INLINE vf tanh_of(vf x) {
  const vf one = splat(1.0f), a = abs_of(x), z = x * x;
  vf q = splat(2.292744815e-3f);
  q = q * z + splat(-8.343945257e-3f);
  q = q * z + splat(2.176891826e-2f);
  q = q * z + splat(-5.395925790e-2f);
  q = q * z + splat(1.333330423e-1f);
  q = q * z + splat(-3.333333433e-1f);
  const vf e = exp_of(splat(-2.0f) * a);
  const vf far = (vf)((vi)((one - e) / (one + e)) | ((vi)x & INT32_MIN));
  return where(a < splat(0.625f), x + x * z * q, far);
}

// |t| within the bounds of expert e.
MF_INLINE vf held(const mf_expert& e, vf t) {
  const vf a = abs_of(t), low = splat(e.threshold), high = splat(e.top_threshold);
  const vf raised = where(a < low, low, a);
  return where(raised > high, high, raised);
}

// exp(K (minmax(held)^2 - 1)) tanh(t total): the paper's score over e^K, which cancels later.
MF_INLINE vf score_of(const mf_expert& e, vf count, vf t, vf total) {
  const float span = e.top_threshold - e.threshold;
  const vf share = span > 0 ? (held(e, t) - splat(e.threshold)) / splat(span) : zero();
  return exp_of(count * (share * share - splat(1.0f))) * tanh_of(t * total);
}

MF_INLINE vf total_of(const float* value, int k, int64_t i) {
  vf total = zero();
  for (int e = 0; e < k; ++e) total += load(value + e * kTile + i);
  return total;
}

// sum_k s_k sign(t_k) held_k / max(sum_k s_k, 1e-12), s_k the score's place between cut and top.
static void compete_tile(const Work& w, const Scratch& s, int n, float* delta) {
  const vf count = splat((float)w.k), least = splat(1e-12f);
  for (int64_t i = 0; i < padded(n); i += kLanes) {
    const vf total = total_of(s.value, w.k, i);
    vf sum = zero(), shares = zero();
    for (int k = 0; k < w.k; ++k) {
      const mf_expert& e = w.experts[k];
      if (!(e.score_top > e.score_cut)) continue;
      const vf t = load(s.value + k * kTile + i);
      const vf cut = splat(e.score_cut), top = splat(e.score_top);
      vf score = score_of(e, count, t, total);
      score = where(score < cut, cut, score);
      score = where(score > top, top, score);
      const vf share = (score - cut) / splat(e.score_top - e.score_cut);
      sum += share * keep_if(t != zero(), (vf)((vi)held(e, t) | ((vi)t & INT32_MIN)));
      shares += share;
    }
    const vf found = sum / where(shares < least, least, shares);
    store(delta + i, where(total == total, found, total));  // NaN passes
  }
}

// Scores of one expert, in memory order.
static void scores_of_tile(const Work& w, Scratch& s, int k, int n, float* out) {
  const vf count = splat((float)w.k);
  for (int64_t i = 0; i < padded(n); i += kLanes)
    store(s.delta + i,
          score_of(w.experts[k], count, load(s.value + k * kTile + i), total_of(s.value, w.k, i)));
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
