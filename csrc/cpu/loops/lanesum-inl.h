// Sums over the 16 virtual lanes of a block, one by one or eight at a time: always the same tree.
#pragma once

#include "block-inl.h"

namespace mf {
namespace MF_ISA_NAMESPACE {
namespace {

// The fixed tree: lanes l and l + 8, then 4, 2, 1 apart.
template <class V>
MF_INLINE V lanes16_sum(const V* slots) {
  V lane[kSumLanes];
  for (int part = 0; part < kParts; ++part)
    for (int i = 0; i < kLanes; ++i) lane[part_lane(part, i)] = slots[part * kLanes + i];
  for (int step = kSumLanes / 2; step > 0; step /= 2)
    for (int l = 0; l < step; ++l) lane[l] += lane[l + step];
  return lane[0];
}

#if defined(MF_USE_AVX2)
// Eight sums at once, by the same tree. slots: [8][16].
MF_INLINE __m256 lanes16_sum8(const float* slots) {
  __m256 quads[2][2];  // [even, odd lanes or none][pairs of four sums]
  const int halves = kParts == 2 ? 2 : 1;
  for (int h = 0; h < halves; ++h)
    for (int q = 0; q < 2; ++q) {
      __m256 ab[2];  // lanes 8 and 4 apart are added: two sums, four values each
      for (int j = 0; j < 2; ++j) {
        __m256 a = _mm256_loadu_ps(slots + (4 * q + 2 * j) * kSumLanes + h * 8);
        __m256 b = _mm256_loadu_ps(slots + (4 * q + 2 * j + 1) * kSumLanes + h * 8);
        if (kParts == 1) {
          a = _mm256_add_ps(a, _mm256_loadu_ps(slots + (4 * q + 2 * j) * kSumLanes + 8));
          b = _mm256_add_ps(b, _mm256_loadu_ps(slots + (4 * q + 2 * j + 1) * kSumLanes + 8));
        }
        ab[j] =
            _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
      }
      quads[h][q] = _mm256_add_ps(_mm256_shuffle_ps(ab[0], ab[1], 0x44),
                                  _mm256_shuffle_ps(ab[0], ab[1], 0xee));
    }
  // now [a02 a13 c02 c13 | b02 b13 d02 d13] and the same of e .. h
  __m256 sum = _mm256_hadd_ps(quads[0][0], quads[0][1]);
  if (kParts == 2) sum = _mm256_add_ps(sum, _mm256_hadd_ps(quads[1][0], quads[1][1]));
  // [a c e g | b d f h] -> a .. h
  return _mm256_permutevar8x32_ps(sum, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
#endif

// out[i] += the sum of slots[i][16], i < count; slots is padded to a multiple of eight.
MF_INLINE void add_lane_sums(const float* slots, int count, double* out) {
  int i = 0;
#if defined(MF_USE_AVX2)
  for (; i + 8 <= count; i += 8) {
    const __m256 x = lanes16_sum8(slots + i * kSumLanes);
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
    const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
    _mm256_storeu_pd(out + i, _mm256_add_pd(_mm256_loadu_pd(out + i), low));
    _mm256_storeu_pd(out + i + 4, _mm256_add_pd(_mm256_loadu_pd(out + i + 4), high));
  }
  if (i < count) {
    float rest[8];
    _mm256_storeu_ps(rest, lanes16_sum8(slots + i * kSumLanes));
    for (; i < count; ++i) out[i] += (double)rest[i & 7];
  }
#endif
  for (; i < count; ++i) out[i] += (double)lanes16_sum(slots + i * kSumLanes);
}

}  // namespace
}  // namespace MF_ISA_NAMESPACE
}  // namespace mf
