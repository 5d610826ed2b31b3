// The balance of competing parameters (PCB) of one element: an entry of an expert counts by how
// large it is among the expert's own, and by how far it points where all together do. L: one lane,
// or a vector of them (lane.h).
//
// exp and tanh use no fused multiply-add, so that scores and their bounds have the same bits
// everywhere. Polynomials: interpolation at Chebyshev points.
#pragma once

#include "lane.h"

namespace mf {

// e^x for x <= 0, relative error below 2e-7; below -86 it is that of -86.
template <class L = Lane>
MF_HD typename L::Value exp_of(typename L::Value x) {
  typedef typename L::Value V;
  const V shift = L::of(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded to a number
  x = L::choose(x < -86.0f, L::of(-86.0f), x);
  const V shifted = x * 1.44269504f + shift;
  const V n = shifted - shift;
  const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts
  V q = L::of(1.392692677e-3f);
  q = q * r + 8.363774046e-3f;
  q = q * r + 4.166654870e-2f;
  q = q * r + 1.666657329e-1f;
  q = q * r + 0.5f;
  const V y = q * r * r + r + 1.0f;
  return L::from_bits(L::bits(y) + ((L::bits(shifted) - L::bits(shift)) << 23));
}

// tanh x, relative error below 3e-7 from the smallest x on.
template <class L = Lane>
MF_HD typename L::Value tanh_of(typename L::Value x) {
  typedef typename L::Value V;
  const V a = magnitude<L>(x), z = x * x;
  V q = L::of(2.292744815e-3f);
  q = q * z + -8.343945257e-3f;
  q = q * z + 2.176891826e-2f;
  q = q * z + -5.395925790e-2f;
  q = q * z + 1.333330423e-1f;
  q = q * z + -3.333333433e-1f;
  const V e = exp_of<L>(-2.0f * a);
  const V far = with_sign_of<L>((1.0f - e) / (1.0f + e), x);
  return L::choose(a < 0.625f, x + x * z * q, far);
}

// |tau| within the bounds of its expert; a NaN stays one.
template <class L = Lane>
MF_HD typename L::Value bounded(typename L::Value tau, float low, float high) {
  const typename L::Value a = magnitude<L>(tau), raised = L::choose(a < low, L::of(low), a);
  return L::choose(raised > high, L::of(high), raised);
}

// exp(K (minmax(bounded)^2 - 1)) tanh(tau total): the paper's score over e^K, which cancels later.
template <class L = Lane>
MF_HD typename L::Value score_of(typename L::Value tau, typename L::Value total, float low,
                                 float high, typename L::Value experts) {
  typedef typename L::Value V;
  const float span = high - low;
  const V share = span > 0 ? (bounded<L>(tau, low, high) - low) / span : L::of(0);
  return exp_of<L>(experts * (share * share - 1.0f)) * tanh_of<L>(tau * total);
}

// What an expert adds to the balance: its bounded entry, by where its score lies between cut < top.
template <class L = Lane>
MF_HD void weigh_score(typename L::Value score, float cut, float top, typename L::Value tau,
                       float low, float high, typename L::Value* sum, typename L::Value* shares) {
  typedef typename L::Value V;
  score = L::choose(score < cut, L::of(cut), score);
  score = L::choose(score > top, L::of(top), score);
  const V share = (score - cut) / (top - cut);
  *sum += share * L::keep(tau != 0, with_sign_of<L>(bounded<L>(tau, low, high), tau));
  *shares += share;
}

// What comes of the sums over the experts; a NaN in the total passes.
template <class L = Lane>
MF_HD typename L::Value balanced(typename L::Value sum, typename L::Value shares,
                                 typename L::Value total) {
  return L::choose(total == total, sum / L::choose(shares < 1e-12f, L::of(1e-12f), shares), total);
}

// Bits that order as scores do, from 0 on: a score lies within [-1, 1], so the bits of its
// magnitude leave room for its sign.
MF_HD int32_t score_key(float score) {
  const int32_t bits = (int32_t)(bits_of(score) & kAbsMask);
  return bits_of(score) >> 31 ? 0x3fffffff - bits : 0x40000000 + bits;
}

}  // namespace mf
