// Vectors of one instruction set. Included by one translation unit per set, inside its own
// anonymous namespace.
//
// Element-wise code takes kLanes elements at a time, whatever kLanes is. Row sums run on 16 virtual
// lanes: 16 / kLanes vectors side by side, added by one fixed tree, so their bits do not depend on
// the instruction set.
#pragma once

#include <stdint.h>

#include "../common/numeric.h"

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
typedef uint16_t vh __attribute__((vector_size(2 * kLanes)));
typedef uint8_t vb __attribute__((vector_size(kLanes)));
typedef uint64_t vq __attribute__((vector_size(4 * kLanes)));  // kLanes / 2 of them
typedef double vd __attribute__((vector_size(4 * kLanes)));    // kLanes / 2 of them
typedef float vf_loose __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint32_t vu_loose __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t vh_loose __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
typedef uint8_t vb_loose __attribute__((vector_size(kLanes), aligned(1), may_alias));

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
MF_INLINE vf keep_if(vi mask, vf x) { return mask ? x : (vf){}; }
MF_INLINE vi lane_index() {
  vi x;
  for (int i = 0; i < kLanes; ++i) x[i] = i;
  return x;
}

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

// gcc 12 takes __builtin_convertvector apart: these are one instruction each.
MF_INLINE vu widen(const uint16_t* p) {
#if defined(MF_USE_AVX512)
  return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(MF_USE_AVX2)
  return (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__SSE2__)
  return (vu)_mm_unpacklo_epi16(_mm_loadl_epi64((const __m128i*)p), _mm_setzero_si128());
#else
  return __builtin_convertvector((vh) * (const vh_loose*)p, vu);
#endif
}
MF_INLINE void narrow(uint16_t* p, vu x) {  // each below 2^16
#if defined(MF_USE_AVX512)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)x));
#elif defined(MF_USE_AVX2)
  const __m256i pairs = _mm256_packus_epi32((__m256i)x, (__m256i)x);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08)));
#else
  *(vh_loose*)p = __builtin_convertvector(x, vh);
#endif
}
MF_INLINE vi widen_bytes(const uint8_t* p) {
#if defined(MF_USE_AVX512)
  return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(MF_USE_AVX2)
  return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  return (vi) __builtin_convertvector((vb) * (const vb_loose*)p, vu);
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

// The 16 virtual lanes added: l and l + 8, then 4, 2, 1 apart.
MF_INLINE float lanes16_sum(const vf part[kParts]) {
  float lane[kSumLanes];
  for (int i = 0; i < kParts; ++i) store(lane + i * kLanes, part[i]);
  typedef float v8 __attribute__((vector_size(32)));
  typedef float v4 __attribute__((vector_size(16)));
  v8 lo, hi;
  __builtin_memcpy(&lo, lane, 32), __builtin_memcpy(&hi, lane + 8, 32);
  const v8 eight = lo + hi;
  v4 a, b;
  __builtin_memcpy(&a, &eight, 16), __builtin_memcpy(&b, (const char*)&eight + 16, 16);
  const v4 four = a + b;
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// ---- element formats: kLanes values to and from float32 ----
struct F32 {
  typedef float type;
  MF_INLINE vf get(const float* p) { return load(p); }
  MF_INLINE void put(float* p, vf x) { store(p, x); }
  MF_INLINE float one(float x) { return x; }
  static constexpr uint32_t kOverflow = kInfBits;
};

struct Bf16 {
  typedef uint16_t type;
  MF_INLINE vf get(const uint16_t* p) { return (vf)(widen(p) << 16); }
  MF_INLINE void put(uint16_t* p, vf x) {
    const vu u = (vu)x;
    const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const vi nan = abs_bits(x) > (int32_t)kInfBits;
    narrow(p, nan ? ((u >> 16) | 0x40u) : rounded);
  }
  MF_INLINE float one(uint16_t x) { return bf16_to_float(x); }
  static constexpr uint32_t kOverflow = kBf16OverflowBits;
};

struct F16 {
  typedef uint16_t type;
  MF_INLINE vf get(const uint16_t* p) {
#if defined(MF_USE_AVX512)
    return (vf)_mm512_cvtph_ps((__m256i) * (const vh_loose*)p);
#elif defined(MF_USE_AVX2)
    return (vf)_mm256_cvtph_ps((__m128i) * (const vh_loose*)p);
#else
    vf x;
    for (int i = 0; i < kLanes; ++i) x[i] = f16_to_float(p[i]);
    return x;
#endif
  }
  MF_INLINE void put(uint16_t* p, vf x) {
#if defined(MF_USE_AVX512)
    *(vh_loose*)p = (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(MF_USE_AVX2)
    *(vh_loose*)p = (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_f16(x[i]);
#endif
  }
  MF_INLINE float one(uint16_t x) { return f16_to_float(x); }
  static constexpr uint32_t kOverflow = kF16OverflowBits;
};

}  // namespace
}  // namespace MF_ISA_NAMESPACE
}  // namespace mf
