// Exact order statistics of magnitudes (31-bit patterns) in memory: bisection by counting, which is
// all vectors and no branches that depend on the data, on fewer and fewer elements.
#pragma once

#include "simd.h"

namespace mf {
namespace MF_ISA_NAMESPACE {
namespace {

#if defined(MF_USE_AVX2) && !defined(MF_USE_AVX512)
struct CompressTable {
  alignas(32) uint32_t lanes[256][8];
  constexpr CompressTable() : lanes() {
    for (int mask = 0; mask < 256; ++mask) {
      int next = 0;
      for (int i = 0; i < 8; ++i)
        if (mask >> i & 1) lanes[mask][next++] = (uint32_t)i;
    }
  }
};
constexpr CompressTable kCompress;
#endif

// Writes the lanes of `a` that are inside one after another; returns the place behind them. Up to
// kLanes are written.
MF_INLINE uint32_t* append(uint32_t* p, vi inside, vi a) {
#if defined(MF_USE_AVX512)
  const __mmask16 mask = _mm512_movepi32_mask((__m512i)inside);
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(mask, (__m512i)a));
  return p + __builtin_popcount(mask);
#elif defined(MF_USE_AVX2)
  const int mask = _mm256_movemask_ps((__m256)inside);
  const __m256i order = _mm256_load_si256((const __m256i*)kCompress.lanes[mask]);
  _mm256_storeu_si256((__m256i*)p, _mm256_permutevar8x32_epi32((__m256i)a, order));
  return p + __builtin_popcount((unsigned)mask);
#else
  for (int l = 0; l < kLanes; ++l) {
    *p = (uint32_t)a[l];
    p -= inside[l];
  }
  return p;
#endif
}

static int64_t count_over(const uint32_t* x, int64_t n, uint32_t limit) {
  constexpr int64_t kMost = (int64_t)1 << 30;  // counts of one lane stay below 2^31
  const vi top = splat_i((int32_t)limit);
  int64_t over = 0, i = 0;
  while (i + kLanes <= n) {
    const int64_t end = n - i > kMost ? i + kMost : n;
    vi a = splat_i(0), b = splat_i(0);
    for (; i + 2 * kLanes <= end; i += 2 * kLanes)
      a -= load_i(x + i) > top, b -= load_i(x + i + kLanes) > top;
    for (; i + kLanes <= end; i += kLanes) a -= load_i(x + i) > top;
    over += lane_sum(a) + lane_sum(b);
  }
  for (; i < n; ++i) over += x[i] > limit;
  return over;
}

// Those of x[n] in [low, high] into out [n + 64], which may be x. Returns how many.
static int64_t between(const uint32_t* x, int64_t n, uint32_t low, uint32_t high, uint32_t* out) {
  const vi under = splat_i((int32_t)low - 1), top = splat_i((int32_t)high);
  uint32_t* p = out;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const vi a = load_i(x + i);
    p = append(p, (a > under) ^ (a > top), a);
  }
  for (; i < n; ++i) {
    const uint32_t a = x[i];
    *p = a;
    p += a >= low && a <= high;
  }
  return p - out;
}

// The rank-th largest (1: the largest) of bits[n], n > 0, and how many are larger. work: [n + 64].
// At most 31 passes whatever the values; as a rule half a dozen, then little is left.
static uint32_t kth_largest(const uint32_t* bits, int64_t n, int64_t rank, uint32_t* work,
                            int64_t* above) {
  constexpr uint32_t kStep = 1u << 22;  // half a power of two
  const uint32_t* x = bits;
  uint32_t low = 0, high = 0;
  vi most = splat_i(0);
  int64_t at = 0;
  for (; at + kLanes <= n; at += kLanes) most = max_i(most, load_i(x + at));
  high = (uint32_t)largest(most);
  for (; at < n; ++at) high = x[at] > high ? x[at] : high;
  int64_t gone = 0, over_high = 0, at_least_low = n;  // gone: larger ones no longer in x
  uint32_t step = kStep;
  bool found_low = false;
  while (low != high) {
    const int64_t inside = at_least_low - over_high;
    if (found_low && n > 64 && inside * 4 <= n) {
      n = between(x, n, low, high, work);
      x = work;
      gone = over_high;
    }
    uint32_t middle = low + (high - low) / 2;
    if (!found_low && high - low > step) middle = high - step, step *= 2;
    const int64_t over = gone + count_over(x, n, middle);
    if (over >= rank) {
      low = middle + 1, at_least_low = over, found_low = true;
    } else {
      high = middle, over_high = over;
    }
  }
  *above = over_high;
  return low;
}

}  // namespace
}  // namespace MF_ISA_NAMESPACE
}  // namespace mf
