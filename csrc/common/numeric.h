// Bits of the number formats. Rounding is to nearest even by integer operations, so that it is the
// same everywhere.
#pragma once

#include <stdint.h>

#include "macros.h"

namespace mf {

constexpr uint32_t kAbsMask = 0x7fffffffu;
constexpr uint32_t kInfBits = 0x7f800000u;
constexpr uint32_t kBf16OverflowBits =
    0x7f7f8000u;                                    // least |x| that rounds to infinity in bfloat16
constexpr uint32_t kF16OverflowBits = 0x477ff000u;  // 65520, the same for float16

MF_HD uint32_t bits_of(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}
MF_HD float float_of(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}

MF_HD float bf16_to_float(uint16_t h) { return float_of((uint32_t)h << 16); }

MF_HD uint16_t float_to_bf16(float x) {
  const uint32_t u = bits_of(x);
  if ((u & kAbsMask) > kInfBits) return (uint16_t)((u >> 16) | 0x40);  // NaN stays NaN, quiet
  return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

MF_HD float f16_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 31u,
                 fraction = h & 0x3ffu;
  if (exponent == 31u) {  // infinity, or NaN made quiet as the hardware conversions do
    return float_of(sign | kInfBits | (fraction << 13) | (fraction ? 0x400000u : 0u));
  }
  if (exponent) return float_of(sign | ((exponent + 112u) << 23) | (fraction << 13));
  const float tiny = (float)fraction * 5.9604644775390625e-8f;  // fraction * 2^-24, exact
  return float_of(sign | bits_of(tiny));
}

MF_HD uint16_t float_to_f16(float x) {
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, a = u & kAbsMask;
  if (a > kInfBits) return (uint16_t)(sign | 0x7e00u | ((a >> 13) & 0x3ffu));
  if (a >= kF16OverflowBits) return (uint16_t)(sign | 0x7c00u);
  if (a >= 0x38800000u) {  // normal: rebias, round to nearest even at bit 13
    const uint32_t r = a - 0x38000000u;
    return (uint16_t)(sign | ((r + 0xfffu + ((r >> 13) & 1u)) >> 13));
  }
  if (a < 0x33000000u) return (uint16_t)sign;  // below half of the least denormal
  const uint32_t shift = 126u - (a >> 23), m = (a & 0x7fffffu) | 0x800000u;  // 14 .. 24
  const uint32_t half = 1u << (shift - 1), rest = m & ((half << 1) - 1u), q = m >> shift;
  return (uint16_t)(sign | (q + ((rest > half || (rest == half && (q & 1u))) ? 1u : 0u)));
}

}  // namespace mf
