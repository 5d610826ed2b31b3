// Stages of one tile: form the task vectors, draw the random words, trim and weight. All within L1.
#pragma once

#include "../common/philox.h"
#include "simd.h"
#include "work.h"

namespace mf {
namespace MF_ISA_NAMESPACE {
namespace {

MF_INLINE int64_t padded(int64_t n) { return (n + kTilePad - 1) & -(int64_t)kTilePad; }
// Bytes ahead of the element at hand. K + 1 streams, a tile of each in turn, are too many for the
// hardware's prefetchers: without this, most of the time goes into waiting for lines (AMD Zen 3,
// 2026).
constexpr int64_t kPrefetch = 1024;

MF_INLINE int imin(int64_t a, int64_t b) { return (int)(a < b ? a : b); }

// out[i] = source[i] - base[i] for i < n, zeros up to the padding. True where some out is not
// finite.
template <class T, bool HAS_BASE>
static bool load_as(const typename T::type* source, const float* base, int64_t n, float* out) {
  constexpr int kLine = 64 / (int)sizeof(typename T::type);  // elements per cache line
  vi top = splat_i(0);
  const int64_t full = n & -(int64_t)kLanes;
  int64_t i = 0;
  for (; i + kLine <= full; i += kLine) {
    __builtin_prefetch((const char*)(source + i) + kPrefetch);
    for (int j = 0; j < kLine; j += kLanes) {
      vf x = T::get(source + i + j);
      if (HAS_BASE) x -= load(base + i + j);
      top = max_i(top, abs_bits(x));
      store(out + i + j, x);
    }
  }
  for (; i < full; i += kLanes) {
    vf x = T::get(source + i);
    if (HAS_BASE) x -= load(base + i);
    top = max_i(top, abs_bits(x));
    store(out + i, x);
  }
  bool bad = any(top >= (int32_t)kInfBits);
  if (full < padded(n)) {
    for (int64_t i = full; i < padded(n); ++i) out[i] = 0;
    for (int64_t i = full; i < n; ++i) {
      out[i] = HAS_BASE ? T::one(source[i]) - base[i] : T::one(source[i]);
      bad |= (bits_of(out[i]) & kAbsMask) >= kInfBits;
    }
  }
  return bad;
}

static bool load_tile(const void* data, int dtype, const float* base, int64_t start, int n,
                      float* out) {
  if (dtype == MF_BF16) {
    const uint16_t* p = (const uint16_t*)data + start;
    return base ? load_as<Bf16, true>(p, base, n, out) : load_as<Bf16, false>(p, base, n, out);
  }
  if (dtype == MF_F16) {
    const uint16_t* p = (const uint16_t*)data + start;
    return base ? load_as<F16, true>(p, base, n, out) : load_as<F16, false>(p, base, n, out);
  }
  const float* p = (const float*)data + start;
  return base ? load_as<F32, true>(p, base, n, out) : load_as<F32, false>(p, base, n, out);
}

MF_INLINE float element(const void* data, int dtype, int64_t i) {
  if (dtype == MF_F32) return ((const float*)data)[i];
  const uint16_t h = ((const uint16_t*)data)[i];
  return dtype == MF_BF16 ? bf16_to_float(h) : f16_to_float(h);
}

// First NaN or infinity of [start, start + n) into *first, if it comes before what is there.
static void note_nonfinite(const void* data, int dtype, int64_t start, int n, int64_t* first) {
  for (int64_t i = start; i < start + n && i < *first; ++i)
    if ((bits_of(element(data, dtype, i)) & kAbsMask) >= kInfBits) *first = i;
}

// The base of the tile into s.base; null where there is none.
MF_INLINE const float* load_base(const Work& w, Scratch& s, int64_t start, int n) {
  if (!w.job->base) return nullptr;
  load_tile(w.job->base, w.job->base_dtype, nullptr, start, n, s.base);
  return s.base;
}

// Raw task vector of expert k; a non-finite one is traced to its source.
MF_INLINE void load_tau(const Work& w, Scratch& s, int k, const float* base, int64_t start, int n,
                        float* tau) {
  const mf_expert& e = w.experts[k];
  if (load_tile(e.data, e.dtype, base, start, n, tau)) {
    note_nonfinite(e.data, e.dtype, start, n, &s.nonfinite[k]);
    if (w.job->base) note_nonfinite(w.job->base, w.job->base_dtype, start, n, &s.base_nonfinite);
  }
}

// Words of elements [flat, flat + n), 0xffffffff (never kept) up to the padding.
static void draw_words(uint64_t flat, int n, uint64_t stream, uint64_t seed, uint32_t* buffer,
                       uint32_t* out) {
  constexpr int kWide = kLanes / 2;  // counters per vector, in 64-bit lanes
  vq order;  // lane -> counter, so that the two halves of the result come out in order
  for (int i = 0; i < kWide; ++i) order[i] = (uint64_t)(i / 2 + (i % 2) * (kWide / 2));
  const uint64_t first = flat / 4, last = (flat + (uint64_t)n + 3) / 4;
  uint32_t* p = buffer;
  for (uint64_t j = first; j < last; j += kWide) {
    const vq counter = order + j;
    vq c0 = counter & 0xffffffffull, c1 = counter >> 32;
    vq c2 = (vq){} + (stream & 0xffffffffull), c3 = (vq){} + (stream >> 32);
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; ++round) {  // only the low halves of the lanes count
      const vq p0 = multiply_wide(c0, kPhiloxM0), p1 = multiply_wide(c2, kPhiloxM1);
      c0 = (p1 >> 32) ^ c1 ^ (uint64_t)k0;
      c2 = (p0 >> 32) ^ c3 ^ (uint64_t)k1;
      c1 = p1;
      c3 = p0;
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
    const vq a = (c0 & 0xffffffffull) | (c1 << 32), b = (c2 & 0xffffffffull) | (c3 << 32);
    // lane i of (a, b) holds the four words of counter order[i]
    vq low, high;
    for (int i = 0; i < kWide / 2; ++i) {
      low[2 * i] = a[2 * i], low[2 * i + 1] = b[2 * i];
      high[2 * i] = a[2 * i + 1], high[2 * i + 1] = b[2 * i + 1];
    }
#if defined(MF_USE_AVX512)
    low = (vq)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b);
    high = (vq)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b);
#elif defined(MF_USE_AVX2)
    low = (vq)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
    high = (vq)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
#endif
    store_u(p, (vu)low), store_u(p + kLanes, (vu)high);
    p += 2 * kLanes;
  }
  const int skip = (int)(flat - 4 * first);
  for (int64_t i = skip + n; i < skip + padded(n); ++i) buffer[i] = 0xffffffffu;
  *out = (uint32_t)skip;
}

// ---- trim, rescale, weight ----
enum TrimKind { kKeepAll, kKeepBand, kKeepBandSplit, kKeepWords, kKeepBytes };
enum Sink { kStore, kStart, kAdd };  // values kept; first and next term of a linear sum

struct TrimTile {
  int32_t low, high;     // low < |tau| bits <= high stays ...
  int32_t cut, top_cut;  // ... and split: equal to a threshold, and the element before the cut
  const uint32_t* words;
  int32_t bound;  // random bound, sign flipped for a signed comparison
  const uint8_t* bytes;
  float factor, weight;
};

template <int KIND, int SINK, bool FACTOR, bool WEIGHT>
static int64_t trim_loop(const TrimTile& t, const float* tau, int n, float* out) {
  const vf factor = splat(t.factor), weight = splat(t.weight);
  const vi low = splat_i(t.low), high = splat_i(t.high), bound = splat_i(t.bound);
  vi kept = splat_i(0), index = lane_index();
  const int64_t end = padded(n);
  for (int64_t i = 0; i < end; i += kLanes) {
    vf x = load(tau + i);
    vi keep;
    if (KIND == kKeepBand) keep = (abs_bits(x) > low) & ~(abs_bits(x) > high);
    if (KIND == kKeepBandSplit) {
      keep =
          (abs_bits(x) > (low + (index < t.cut))) & ~(abs_bits(x) > (high + (index < t.top_cut)));
      index += kLanes;
    }
    if (KIND == kKeepWords) keep = (load_i(t.words + i) ^ INT32_MIN) < bound;
    if (KIND == kKeepBytes) keep = widen_bytes(t.bytes + i) != 0;
    if (KIND != kKeepAll) {
      kept -= keep;
      x = keep_if(keep, x);
    }
    if (FACTOR) x *= factor;
    if (WEIGHT) x *= weight;
    if (SINK == kStore) store(out + i, x);
    if (SINK == kStart) store(out + i, x + zero());
    if (SINK == kAdd) store(out + i, load(out + i) + x);
  }
  if (KIND == kKeepAll) return n;
  int64_t count = lane_sum(kept);
  if (KIND == kKeepBand && t.low < 0 && t.high >= 0) count -= end - n;  // the padding is zeros
  if (KIND == kKeepBandSplit)
    for (int64_t i = n; i < end; ++i)
      count -= (0 > t.low - (i < t.cut)) && !(0 > t.high - (i < t.top_cut));
  return count;
}

template <int KIND, int SINK>
static int64_t trim_scaled(const TrimTile& t, const float* tau, int n, float* out) {
  const bool factor = t.factor != 1, weight = t.weight != 1;
  if (factor && weight) return trim_loop<KIND, SINK, true, true>(t, tau, n, out);
  if (factor) return trim_loop<KIND, SINK, true, false>(t, tau, n, out);
  if (weight) return trim_loop<KIND, SINK, false, true>(t, tau, n, out);
  return trim_loop<KIND, SINK, false, false>(t, tau, n, out);
}

template <int SINK>
static int64_t trim_by_kind(int kind, const TrimTile& t, const float* tau, int n, float* out) {
  switch (kind) {
    case kKeepAll:
      return trim_scaled<kKeepAll, SINK>(t, tau, n, out);
    case kKeepBand:
      return trim_scaled<kKeepBand, SINK>(t, tau, n, out);
    case kKeepBandSplit:
      return trim_scaled<kKeepBandSplit, SINK>(t, tau, n, out);
    case kKeepWords:
      return trim_scaled<kKeepWords, SINK>(t, tau, n, out);
    default:
      return trim_scaled<kKeepBytes, SINK>(t, tau, n, out);
  }
}

// The kept, rescaled and weighted values of expert k for [start, start + n): n <= kTile. Returns
// how many stayed.
static int64_t trim_tile(const Work& w, Scratch& s, int k, int64_t start, int n, const float* tau,
                         float weight, int sink, float* out) {
  const mf_expert& e = w.experts[k];
  const int64_t flat = w.job->offset + start;
  TrimTile t = {-1, (int32_t)kAbsMask, 0, 0, nullptr, 0, nullptr, e.factor, weight};
  uint8_t bytes[kTile + kTilePad];
  int kind = kKeepAll;
  if (e.trim == MF_TRIM_BAND) {
    kind = kKeepBand;
    t.low = (int32_t)bits_of(e.threshold);
    t.high = (int32_t)bits_of(e.top_threshold);
    const int64_t cut = e.tie_cut - flat, top_cut = e.top_tie_cut - flat;
    if ((cut > 0 && cut < n) || (top_cut > 0 && top_cut < n)) {
      kind = kKeepBandSplit;
      t.cut = cut < 0 ? 0 : imin(cut, kTile + kTilePad);
      t.top_cut = top_cut < 0 ? 0 : imin(top_cut, kTile + kTilePad);
    } else {
      t.low -= cut > 0;
      t.high -= top_cut > 0;
    }
    if (e.top_count < 0) t.high = (int32_t)kAbsMask, t.top_cut = 0;
  } else if (e.trim == MF_TRIM_RANDOM) {
    kind = kKeepWords;
    uint32_t skip;
    draw_words((uint64_t)flat, n, e.stream, w.job->seed, s.words, &skip);
    t.words = s.words + skip;
    t.bound = (int32_t)(e.random_bound ^ 0x80000000u);
  } else if (e.trim == MF_TRIM_GIVEN || e.trim == MF_TRIM_RANKED) {
    kind = kKeepBytes;
    t.bytes = e.trim == MF_TRIM_GIVEN ? e.mask + start : w.masks[k] + (start - w.mask_start);
    if (n % kTilePad) {
      __builtin_memset(bytes, 0, sizeof bytes);
      __builtin_memcpy(bytes, t.bytes, (size_t)n);
      t.bytes = bytes;
    }
  }
  if (sink == kStore) return trim_by_kind<kStore>(kind, t, tau, n, out);
  if (sink == kStart) return trim_by_kind<kStart>(kind, t, tau, n, out);
  return trim_by_kind<kAdd>(kind, t, tau, n, out);
}

}  // namespace
}  // namespace MF_ISA_NAMESPACE
}  // namespace mf
