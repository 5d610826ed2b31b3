// One pass of a search: how many magnitudes lie above a bracket, and which lie inside it.
#pragma once

#include "tile-inl.h"

namespace mf {
namespace MF_ISA_NAMESPACE {
namespace {

#if defined(MF_USE_AVX2) && !defined(MF_USE_AVX512)
struct CompressTable {
  uint32_t lanes[256][8];
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

// Writes the magnitudes of [low, high] one after another, adds those above high. Returns how many
// were written.
static int compress_tile(const float* tau, int n, uint32_t low, uint32_t high, uint32_t* out,
                         int64_t* above) {
  const vi under = splat_i((int32_t)low - 1), top = splat_i((int32_t)high);
  vi count = splat_i(0);
  uint32_t* p = out;
  const int64_t full = n & -kLanes;
  for (int64_t i = 0; i < full; i += kLanes) {
    const vi a = abs_bits(load(tau + i));
    const vi over = a > top;
    count -= over;
    const vi inside = (a > under) & ~over;
#if defined(MF_USE_AVX512)
    const __mmask16 mask = _mm512_movepi32_mask((__m512i)inside);
    _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(mask, (__m512i)a));
    p += __builtin_popcount(mask);
#elif defined(MF_USE_AVX2)
    const int mask = _mm256_movemask_ps((__m256)inside);
    const __m256i order = _mm256_loadu_si256((const __m256i*)kCompress.lanes[mask]);
    _mm256_storeu_si256((__m256i*)p, _mm256_permutevar8x32_epi32((__m256i)a, order));
    p += __builtin_popcount((unsigned)mask);
#else
    for (int l = 0; l < kLanes; ++l) {
      *p = (uint32_t)a[l];
      p -= inside[l];
    }
#endif
  }
  *above += lane_sum(count);
  for (int64_t i = full; i < n; ++i) {
    const uint32_t a = bits_of(tau[i]) & kAbsMask;
    *above += a > high;
    *p = a;
    p += a >= low && a <= high;
  }
  return (int)(p - out);
}

static void sort_into_bins(const Bracket& b, const uint32_t* bits, int n, BracketCounts& c) {
  uint32_t* list = c.list + c.listed;
  int64_t room = c.capacity - c.listed;
  if (room < n) {
    c.overflowed = true;
    room = 0;
  }
  for (int i = 0; i < n; ++i) {
    const uint32_t a = bits[i], bin = (a - b.low) >> b.shift;
    ++c.bins[bin];
    const uint8_t owner = b.owner[bin];
    if (owner != 255 && b.heavy[owner] == a) {
      ++c.equal[owner];
    } else if (room) {
      *list++ = a;
    }
  }
  if (room) c.listed = list - c.list;
}

static void scan(const Work& w, Scratch& s, int64_t start, int64_t n, const Bracket* brackets,
                 int count, BracketCounts* counts) {
  for (int64_t done = 0; done < n; done += kTile) {
    const int64_t at = start + done;
    const int len = imin(kTile, n - done);
    const float* base = load_base(w, s, at, len);
    int loaded = -1;
    for (int b = 0; b < count; ++b) {
      const Bracket& bracket = brackets[b];
      if (bracket.expert != loaded) {
        const mf_expert& e = w.experts[bracket.expert];
        load_tile(e.data, e.dtype, base, at, len, s.tau);
        loaded = bracket.expert;
      }
      const int inside =
          compress_tile(s.tau, len, bracket.low, bracket.high, s.bits, &counts[b].above);
      sort_into_bins(bracket, s.bits, inside, counts[b]);
    }
  }
}

static void magnitudes(const Work& w, Scratch& s, int expert, int64_t start, int64_t n,
                       uint32_t* bits) {
  const mf_expert& e = w.experts[expert];
  for (int64_t done = 0; done < n; done += kTile) {
    const int len = imin(kTile, n - done);
    const float* base = load_base(w, s, start + done, len);
    load_tile(e.data, e.dtype, base, start + done, len, s.tau);
    int i = 0;
    for (; i + kLanes <= len; i += kLanes) store_u(bits + done + i, (vu)abs_bits(load(s.tau + i)));
    for (; i < len; ++i) bits[done + i] = bits_of(s.tau[i]) & kAbsMask;
  }
}

}  // namespace
}  // namespace MF_ISA_NAMESPACE
}  // namespace mf
