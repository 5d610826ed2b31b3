// A block is 16 consecutive elements, held in kParts vectors of kLanes. Within a block float32
// values are kept in the order in which 16-bit formats are cheapest to widen and to narrow, the
// even elements apart from the odd ones: part_lane says which element a lane holds. Row sums run on
// the 16 elements of the blocks as 16 virtual lanes, added by one fixed tree, so that their bits do
// not depend on the instruction set.
#pragma once

#include "simd.h"

namespace mf {
namespace MF_ISA_NAMESPACE {
namespace {

// The element of a block that lane `lane` of part `part` holds, and the place of an element.
constexpr int part_lane(int part, int lane) {
  return kParts == 1 ? lane : kParts == 2 ? 2 * lane + part : 8 * (part / 2) + 2 * lane + part % 2;
}
constexpr int slot_of(int element) {
  return kParts == 1   ? element
         : kParts == 2 ? (element % 2) * 8 + element / 2
                       : (element / 8) * 8 + (element % 2) * 4 + element % 8 / 2;
}
// Place of element i in a buffer of blocks.
MF_INLINE int64_t place(int64_t i) { return (i & -(int64_t)kSumLanes) + slot_of((int)(i & 15)); }
template <int PART>
MF_INLINE vi element_index() {
  vi x;
  for (int i = 0; i < kLanes; ++i) x[i] = part_lane(PART, i);
  return x;
}

// ---- blocks: 16 elements in memory order to and from parts ----
// Even (0) or odd (1) ones of 2 kLanes values; the other way round, into the lower or upper kLanes.
template <int ODD>
MF_INLINE vf pick(vf low, vf high) {
#if defined(MF_USE_AVX2) && !defined(MF_USE_AVX512)
  const __m256 x = _mm256_shuffle_ps((__m256)low, (__m256)high, ODD ? 0xdd : 0x88);
  return (vf)_mm256_permute4x64_pd((__m256d)x, 0xd8);
#elif defined(__SSE2__) && !defined(MF_USE_AVX512)
  return (vf)_mm_shuffle_ps((__m128)low, (__m128)high, ODD ? 0xdd : 0x88);
#elif defined(__ARM_NEON)
  return ODD ? (vf)vuzp2q_f32((float32x4_t)low, (float32x4_t)high)
             : (vf)vuzp1q_f32((float32x4_t)low, (float32x4_t)high);
#else
  vf x;
  for (int i = 0; i < kLanes / 2; ++i)
    x[i] = low[2 * i + ODD], x[i + kLanes / 2] = high[2 * i + ODD];
  return x;
#endif
}
MF_INLINE void interleave(vf even, vf odd, vf* low, vf* high) {
#if defined(MF_USE_AVX2) && !defined(MF_USE_AVX512)
  const __m256 a = _mm256_unpacklo_ps((__m256)even, (__m256)odd);
  const __m256 b = _mm256_unpackhi_ps((__m256)even, (__m256)odd);
  *low = (vf)_mm256_permute2f128_ps(a, b, 0x20), *high = (vf)_mm256_permute2f128_ps(a, b, 0x31);
#elif defined(__SSE2__) && !defined(MF_USE_AVX512)
  *low = (vf)_mm_unpacklo_ps((__m128)even, (__m128)odd);
  *high = (vf)_mm_unpackhi_ps((__m128)even, (__m128)odd);
#elif defined(__ARM_NEON)
  *low = (vf)vzip1q_f32((float32x4_t)even, (float32x4_t)odd);
  *high = (vf)vzip2q_f32((float32x4_t)even, (float32x4_t)odd);
#else
  for (int i = 0; i < kLanes; ++i) {
    (*(i < kLanes / 2 ? low : high))[2 * i % kLanes] = even[i];
    (*(i < kLanes / 2 ? low : high))[2 * i % kLanes + 1] = odd[i];
  }
#endif
}

// Part PART of 16 float32 (or other 32-bit) values in memory order.
template <int PART>
MF_INLINE vf part_of(const float* p) {
  if (kParts == 1) return load(p);
  const float* pair = p + (PART / 2) * 2 * kLanes;
  return pick<PART % 2>(load(pair), load(pair + kLanes));
}
MF_INLINE void put_parts(float* p, const vf* x) {
  if (kParts == 1) return store(p, x[0]);
  for (int h = 0; h + 1 < kParts; h += 2) {
    vf low, high;
    interleave(x[h], x[h + 1], &low, &high);
    store(p + h * kLanes, low), store(p + (h + 1) * kLanes, high);
  }
}

// Part PART of 16 16-bit values: in the upper half of each lane (with a zero lower half), or the
// lower one.
template <int PART, bool UPPER>
MF_INLINE vu part_of_halves(const uint16_t* p) {
#if defined(MF_USE_AVX512)
  const vu x = (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return UPPER ? x << 16 : x;
#else
  const vu pairs =
      *(const vu_of_halves*)(const void*)(p + (PART / 2) * 2 * kLanes);  // little endian
  if (UPPER) return PART % 2 ? pairs & 0xffff0000u : pairs << 16;
  return PART % 2 ? pairs >> 16 : pairs & 0xffffu;
#endif
}
// 16 16-bit values out of the upper halves of the lanes; the lower ones are dropped.
MF_INLINE void put_halves(uint16_t* p, const vu* x) {
#if defined(MF_USE_AVX512)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)(x[0] >> 16)));
#else
  for (int h = 0; h + 1 < kParts; h += 2)
    *(vu_of_halves*)(void*)(p + h * kLanes) = (x[h] >> 16) | (x[h + 1] & 0xffff0000u);
#endif
}

// Part PART of 16 bytes, widened.
template <int PART>
MF_INLINE vi part_of_bytes(const uint8_t* p) {
#if defined(MF_USE_AVX512)
  return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(MF_USE_AVX2)
  __m128i x = _mm_loadu_si128((const __m128i*)p);
  x = PART ? _mm_srli_epi16(x, 8) : _mm_and_si128(x, _mm_set1_epi16(255));
  return (vi)_mm256_cvtepu16_epi32(x);
#else
  vi x;
  for (int i = 0; i < kLanes; ++i) x[i] = p[part_lane(PART, i)];
  return x;
#endif
}

// ---- element formats ----
struct F32 {
  typedef float type;
  template <int PART>
  MF_INLINE vf part(const float* p) {
    return part_of<PART>(p);
  }
  MF_INLINE void put(float* p, const vf* x) { put_parts(p, x); }
  MF_INLINE float round(float x) { return x; }
  MF_INLINE float one(float x) { return x; }
  static constexpr uint32_t kOverflow = kInfBits;
};

// put: NaN is rounded like a number; round, of one value, keeps it NaN.
struct Bf16 {
  typedef uint16_t type;
  template <int PART>
  MF_INLINE vf part(const uint16_t* p) {
    return (vf)part_of_halves<PART, true>(p);
  }
  MF_INLINE void put(uint16_t* p, const vf* x) {
    vu rounded[kParts];
    for (int h = 0; h < kParts; ++h) {
      const vu u = (vu)x[h];
      rounded[h] = u + 0x7fffu + ((u >> 16) & 1u);
    }
    put_halves(p, rounded);
  }
  MF_INLINE uint16_t round(float x) { return float_to_bf16(x); }
  MF_INLINE float one(uint16_t x) { return bf16_to_float(x); }
  static constexpr uint32_t kOverflow = kBf16OverflowBits;
};

struct F16 {
  typedef uint16_t type;
  MF_INLINE vf widen(const uint16_t* p) {  // kLanes in memory order
#if defined(MF_USE_AVX512)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(MF_USE_AVX2)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    vf x;
    for (int i = 0; i < kLanes; ++i) x[i] = f16_to_float(p[i]);
    return x;
#endif
  }
  template <int PART>
  MF_INLINE vf part(const uint16_t* p) {
    if (kParts == 1) return widen(p);
    const uint16_t* pair = p + (PART / 2) * 2 * kLanes;
    return pick<PART % 2>(widen(pair), widen(pair + kLanes));
  }
  MF_INLINE void put(uint16_t* p, const vf* x) {
    float values[kSumLanes];
    put_parts(values, x);
    for (int i = 0; i < kSumLanes; i += kLanes) {
#if defined(MF_USE_AVX512)
      constexpr int kRound = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
      _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x[0], kRound));
#elif defined(MF_USE_AVX2)
      constexpr int kRound = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
      _mm_storeu_si128((__m128i*)(p + i), _mm256_cvtps_ph((__m256)load(values + i), kRound));
#else
      for (int l = i; l < i + kLanes; ++l) p[l] = float_to_f16(values[l]);
#endif
    }
  }
  MF_INLINE uint16_t round(float x) { return float_to_f16(x); }
  MF_INLINE float one(uint16_t x) { return f16_to_float(x); }
  static constexpr uint32_t kOverflow = kF16OverflowBits;
};

}  // namespace
}  // namespace MF_ISA_NAMESPACE
}  // namespace mf
