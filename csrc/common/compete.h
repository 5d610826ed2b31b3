// The balance of competing parameters (PCB) of one element. exp and tanh are the polynomials of
// ../cpu/loops/compete-inl.h, operation by operation: scores and their bounds have the same bits
// everywhere.
#pragma once

#include "numeric.h"

namespace mf {

// e^x for x <= 0, relative error below 2e-7; below -86 it is that of -86.
MF_HD float exp_of(float x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a number
  x = x < -86.0f ? -86.0f : x;
  const float shifted = x * 1.44269504f + shift;
  const float n = shifted - shift;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts
  float q = 1.392692677e-3f;
  q = q * r + 8.363774046e-3f;
  q = q * r + 4.166654870e-2f;
  q = q * r + 1.666657329e-1f;
  q = q * r + 0.5f;
  const float y = q * r * r + r + 1.0f;
  return float_of(bits_of(y) + ((bits_of(shifted) - bits_of(shift)) << 23));
}

MF_HD float with_sign_of(float size, float x) {
  return float_of(bits_of(size) | (bits_of(x) & ~kAbsMask));
}

// tanh x, relative error below 3e-7 from the smallest x on.
MF_HD float tanh_of(float x) {
  const float a = float_of(bits_of(x) & kAbsMask), z = x * x;
  float q = 2.292744815e-3f;
  q = q * z + -8.343945257e-3f;
  q = q * z + 2.176891826e-2f;
  q = q * z + -5.395925790e-2f;
  q = q * z + 1.333330423e-1f;
  q = q * z + -3.333333433e-1f;
  const float e = exp_of(-2.0f * a);
  const float far = with_sign_of((1.0f - e) / (1.0f + e), x);
  return a < 0.625f ? x + x * z * q : far;
}

// |tau| within the bounds of its expert; a NaN stays one.
MF_HD float held(float tau, float low, float high) {
  const float a = float_of(bits_of(tau) & kAbsMask), raised = a < low ? low : a;
  return raised > high ? high : raised;
}

// exp(K (minmax(held)^2 - 1)) tanh(tau total): the paper's score over e^K, which cancels later.
MF_HD float score_of(float tau, float total, float low, float high, float experts) {
  const float span = high - low;
  const float share = span > 0 ? (held(tau, low, high) - low) / span : 0.0f;
  return exp_of(experts * (share * share - 1.0f)) * tanh_of(tau * total);
}

// Bits that order as scores do, from 0 on: a score lies within [-1, 1], so the bits of its
// magnitude leave room for its sign.
MF_HD int32_t score_key(float score) {
  const int32_t bits = (int32_t)(bits_of(score) & kAbsMask);
  return bits_of(score) >> 31 ? 0x3fffffff - bits : 0x40000000 + bits;
}

}  // namespace mf
