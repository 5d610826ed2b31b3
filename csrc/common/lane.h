// What the rules of an element compute on: lanes of float32. Here one lane, for CUDA and for plain
// code; ../cpu/loops/simd.h has the vectors of an instruction set, with the same members.
//
// Arithmetic and comparisons of values are the operators of C++, which both have; a number beside a
// vector stands for a vector of it.
#pragma once

#include "numeric.h"

namespace mf {

struct Lane {
  typedef float Value;
  typedef uint32_t Bits;
  typedef int32_t Integer;
  typedef bool Mask;

  MF_HD float of(float x) { return x; }
  MF_HD uint32_t bits(float x) { return bits_of(x); }
  MF_HD float from_bits(uint32_t u) { return float_of(u); }
  MF_HD bool everywhere() { return true; }
  MF_HD float choose(bool mask, float x, float y) { return mask ? x : y; }
  MF_HD float keep(bool mask, float x) { return mask ? x : 0.0f; }
  MF_HD int32_t less_one(int32_t x, bool mask) { return x - (mask ? 1 : 0); }  // x - 1 where masked
};

template <class L>
MF_HD typename L::Value magnitude(typename L::Value x) {
  return L::from_bits(L::bits(x) & kAbsMask);
}

template <class L>
MF_HD typename L::Value with_sign_of(typename L::Value size, typename L::Value x) {
  return L::from_bits(L::bits(size) | (L::bits(x) & ~kAbsMask));
}

}  // namespace mf
