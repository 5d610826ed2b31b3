// Vectors of one instruction set. Included by one translation unit per set, inside its own
// anonymous namespace.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../../common/lane.h"

#if defined(MF_USE_AVX512) || defined(MF_USE_AVX2)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define MF_INLINE static inline __attribute__((always_inline, unused))

namespace mf {
namespace MF_ISA_NAMESPACE {
namespace {

#if defined(MF_USE_AVX512)
constexpr int kLanes = 16;
#elif defined(MF_USE_AVX2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kSumLanes = 16;
constexpr int kParts = kSumLanes / kLanes;

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vu __attribute__((vector_size(4 * kLanes)));
typedef uint64_t vq __attribute__((vector_size(4 * kLanes)));  // kLanes / 2 of them
typedef double vd __attribute__((vector_size(4 * kLanes)));    // kLanes / 2 of them
typedef float vf_loose __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint32_t vu_of_halves __attribute__((vector_size(4 * kLanes), aligned(2), may_alias));
typedef uint32_t vu_loose __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

MF_INLINE vf load(const float* p) { return *(const vf_loose*)p; }
MF_INLINE void store(float* p, vf x) { *(vf_loose*)p = x; }
MF_INLINE vi load_i(const uint32_t* p) { return (vi) * (const vu_loose*)p; }
MF_INLINE void store_u(uint32_t* p, vu x) { *(vu_loose*)p = x; }
MF_INLINE vf splat(float x) { return x - (vf){}; }  // x - 0 keeps every x, -0 too
MF_INLINE vi splat_i(int32_t x) { return x + (vi){}; }
MF_INLINE vf zero() { return (vf){}; }
MF_INLINE vi abs_bits(vf x) { return (vi)x & (int32_t)kAbsMask; }
MF_INLINE vf abs_of(vf x) { return (vf)abs_bits(x); }
MF_INLINE vf where(vi mask, vf x, vf y) { return mask ? x : y; }
MF_INLINE vf keep_if(vi mask, vf x) { return (vf)(mask & (vi)x); }

// What the rules of an element (../../common/rules.h) compute on.
struct Lanes {
  typedef vf Value;
  typedef vu Bits;
  typedef vi Integer;
  typedef vi Mask;

  MF_INLINE vf of(float x) { return splat(x); }
  MF_INLINE vu bits(vf x) { return (vu)x; }
  MF_INLINE vf from_bits(vu x) { return (vf)x; }
  MF_INLINE vi everywhere() { return splat_i(-1); }
  MF_INLINE vf choose(vi mask, vf x, vf y) { return where(mask, x, y); }
  MF_INLINE vf keep(vi mask, vf x) { return keep_if(mask, x); }
  MF_INLINE vi less_one(vi x, vi mask) { return x + mask; }
};

MF_INLINE vi max_i(vi x, vi y) {
#if defined(MF_USE_AVX512)
  return (vi)_mm512_max_epi32((__m512i)x, (__m512i)y);
#elif defined(MF_USE_AVX2)
  return (vi)_mm256_max_epi32((__m256i)x, (__m256i)y);
#elif defined(__ARM_NEON)
  return (vi)vmaxq_s32((int32x4_t)x, (int32x4_t)y);
#else
  return x > y ? x : y;
#endif
}

// x where both are numbers and x is the larger, else y.
MF_INLINE vf max_f(vf x, vf y) {
#if defined(MF_USE_AVX512)
  return (vf)_mm512_max_ps((__m512)x, (__m512)y);
#elif defined(MF_USE_AVX2)
  return (vf)_mm256_max_ps((__m256)x, (__m256)y);
#elif defined(__SSE2__)
  return (vf)_mm_max_ps((__m128)x, (__m128)y);
#else
  return x > y ? x : y;
#endif
}
MF_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }

MF_INLINE bool any(vi mask) {
#if defined(MF_USE_AVX512)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(MF_USE_AVX2)
  return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)mask) != 0;
#elif defined(__ARM_NEON)
  return vmaxvq_u32((uint32x4_t)mask) != 0;
#else
  return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}

MF_INLINE int32_t largest(vi x) {
  int32_t m = x[0];
  for (int i = 1; i < kLanes; ++i) m = x[i] > m ? x[i] : m;
  return m;
}
MF_INLINE int64_t lane_sum(vi x) {
  int64_t s = 0;
  for (int i = 0; i < kLanes; ++i) s += x[i];
  return s;
}

// One rounding, on every instruction set: row sums are defined with it.
MF_INLINE vf fma(vf x, vf y, vf z) {
#if defined(MF_USE_AVX512)
  return (vf)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
#elif defined(MF_USE_AVX2)
  return (vf)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
#elif defined(__ARM_NEON)
  return (vf)vfmaq_f32((float32x4_t)z, (float32x4_t)x, (float32x4_t)y);
#else
  for (int i = 0; i < kLanes; ++i) z[i] = __builtin_fmaf(x[i], y[i], z[i]);
  return z;
#endif
}

// Low 32 bits of each 64-bit lane times m: the full product.
MF_INLINE vq multiply_wide(vq x, uint32_t m) {
#if defined(MF_USE_AVX512)
  return (vq)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64((int64_t)m));
#elif defined(MF_USE_AVX2)
  return (vq)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x((int64_t)m));
#elif defined(__SSE2__)
  return (vq)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x((int64_t)m));
#elif defined(__ARM_NEON)
  return (vq)vmull_u32(vmovn_u64((uint64x2_t)x), vdup_n_u32(m));
#else
  return (x & 0xffffffffull) * (uint64_t)m;
#endif
}

}  // namespace
}  // namespace MF_ISA_NAMESPACE
}  // namespace mf
