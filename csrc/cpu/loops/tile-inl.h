// One expert's share of a tile: form the task vector, trim, rescale, weight. All within L1.
#pragma once

#include "../../common/rules.h"
#include "random-inl.h"

namespace mf {
namespace MF_ISA_NAMESPACE {
namespace {

enum TrimKind { kKeepAll, kKeepAbove, kKeepBand, kKeepBandSplit, kKeepWords, kKeepBytes };
enum Sink { kStore, kStart, kAdd };    // values for the vote; first and next term of a linear sum
enum Scaled { kAsIs, kOnce, kTwice };  // by neither, one, or both of factor and weight

struct TrimTile {
  int32_t low, high;      // low < |tau| bits <= high stays ...
  int32_t cut, top_cut;   // ... and split: equal to a threshold, and the element before the cut
  const uint32_t* words;  // in block order
  int32_t bound;          // random bound, sign flipped for a signed comparison
  const uint8_t* bytes;   // in memory order
  float factor, weight;
};

// Where the task vector comes from: an expert and the base, or a tile that holds it already.
template <class T>
struct Against {
  typedef typename T::type type;
  static constexpr bool kRaw = true;
  template <int PART>
  MF_INLINE vf part(const type* p, const float* base) {
    return T::template part<PART>(p) - load(base + PART * kLanes);
  }
};
struct Ready {
  typedef float type;
  static constexpr bool kRaw = false;
  template <int PART>
  MF_INLINE vf part(const float* p, const float*) {
    return load(p + PART * kLanes);
  }
};

// out = weight * (factor * trim(task vector)), or added to it; the task vector into tau (TAU).
// Returns how many stayed. *bad: some of a raw task vector is not finite; for kinds that let
// everything large through the reader of `out` finds that.
template <class S, int KIND, int SINK, bool TAU, int SCALED>
static int64_t expert_loop(const TrimTile& t, const typename S::type* source, const float* base,
                           int n, float* tau, float* out, bool* bad) {
  constexpr bool kChecks = S::kRaw && KIND == kKeepWords;
  const vf factor = splat(SCALED == kOnce && t.factor == 1 ? t.weight : t.factor);
  const vf weight = splat(t.weight);
  const vi low = splat_i(t.low), high = splat_i(t.high), bound = splat_i(t.bound);
  vi kept = splat_i(0), top = splat_i(0);
  each_block(source, S::kRaw ? n : padded(n), [&](const typename S::type* p, int64_t i) MF_LAMBDA {
    each_part([&](auto part) MF_LAMBDA {
      constexpr int H = decltype(part)::value;
      const int64_t at = i + H * kLanes;
      vf x = S::template part<H>(p, base + i);
      const vi a = abs_bits(x);
      if (kChecks) top = max_i(top, a);
      if (TAU) store(tau + at, x);
      vi keep;
      if (KIND == kKeepAbove) keep = a > low;
      if (KIND == kKeepBand) keep = (a > low) & ~(a > high);
      if (KIND == kKeepBandSplit) {
        const vi index = element_index<H>() + (int32_t)i;
        keep = at_or_above<Lanes>(a, low, index < t.cut) &
               ~at_or_above<Lanes>(a, high, index < t.top_cut);
      }
      if (KIND == kKeepWords) keep = (load_i(t.words + at) ^ INT32_MIN) < bound;
      if (KIND == kKeepBytes) keep = part_of_bytes<H>(t.bytes + i) != 0;
      if (KIND != kKeepAll) {
        kept -= keep;
        x = keep_if(keep, x);
      }
      if (SCALED != kAsIs) x *= factor;
      if (SCALED == kTwice) x *= weight;
      if (SINK == kStart) x += zero();
      if (SINK == kAdd) x += load(out + at);
      store(out + at, x);
    });
  });
  *bad = kChecks && any(top >= (int32_t)kInfBits);
  if (KIND == kKeepAll) return n;
  int64_t count = lane_sum(kept);
  const int64_t zeros = padded(n) - n;  // the padding
  if ((KIND == kKeepAbove || KIND == kKeepBand) && t.low < 0 && t.high >= 0) count -= zeros;
  if (KIND == kKeepBandSplit)
    for (int64_t i = n; i < n + zeros; ++i)
      count -= at_or_above(0, t.low, i < t.cut) && !at_or_above(0, t.high, i < t.top_cut);
  return count;
}

template <class S, int KIND, int SINK, bool TAU>
static int64_t expert_scaled(const TrimTile& t, const typename S::type* source, const float* base,
                             int n, float* tau, float* out, bool* bad) {
  if (t.factor != 1 && t.weight != 1)
    return expert_loop<S, KIND, SINK, TAU, kTwice>(t, source, base, n, tau, out, bad);
  if (t.factor != 1 || t.weight != 1)
    return expert_loop<S, KIND, SINK, TAU, kOnce>(t, source, base, n, tau, out, bad);
  return expert_loop<S, KIND, SINK, TAU, kAsIs>(t, source, base, n, tau, out, bad);
}

// What most merges do, in one loop from the expert's bytes on.
template <class T, int SINK, bool TAU>
static int64_t expert_raw(int kind, const TrimTile& t, const void* data, int64_t start,
                          const float* base, int n, float* tau, float* out, bool* bad) {
  typedef Against<T> S;
  const typename T::type* p = (const typename T::type*)data + start;
  switch (kind) {
    case kKeepAll:
      return expert_scaled<S, kKeepAll, SINK, TAU>(t, p, base, n, tau, out, bad);
    case kKeepAbove:
      return expert_scaled<S, kKeepAbove, SINK, TAU>(t, p, base, n, tau, out, bad);
    default:
      return expert_scaled<S, kKeepWords, SINK, TAU>(t, p, base, n, tau, out, bad);
  }
}

template <class T, int SINK>
static int64_t expert_keeping(bool keep, int kind, const TrimTile& t, const void* data,
                              int64_t start, const float* base, int n, float* tau, float* out,
                              bool* bad) {
  if (keep) return expert_raw<T, SINK, true>(kind, t, data, start, base, n, tau, out, bad);
  return expert_raw<T, SINK, false>(kind, t, data, start, base, n, tau, out, bad);
}

template <int SINK>
static int64_t expert_of_dtype(bool keep, int kind, const TrimTile& t, const mf_expert& e,
                               int64_t start, const float* base, int n, float* tau, float* out,
                               bool* bad) {
  if (e.dtype == MF_BF16)
    return expert_keeping<Bf16, SINK>(keep, kind, t, e.data, start, base, n, tau, out, bad);
  if (e.dtype == MF_F16)
    return expert_keeping<F16, SINK>(keep, kind, t, e.data, start, base, n, tau, out, bad);
  return expert_keeping<F32, SINK>(keep, kind, t, e.data, start, base, n, tau, out, bad);
}

// The same from a task vector that was formed before.
template <int SINK>
static int64_t expert_ready(int kind, const TrimTile& t, const float* tau, int n, float* out) {
  bool bad;
  switch (kind) {
    case kKeepAll:
      return expert_scaled<Ready, kKeepAll, SINK, false>(t, tau, nullptr, n, nullptr, out, &bad);
    case kKeepAbove:
      return expert_scaled<Ready, kKeepAbove, SINK, false>(t, tau, nullptr, n, nullptr, out, &bad);
    case kKeepBand:
      return expert_scaled<Ready, kKeepBand, SINK, false>(t, tau, nullptr, n, nullptr, out, &bad);
    case kKeepBandSplit:
      return expert_scaled<Ready, kKeepBandSplit, SINK, false>(t, tau, nullptr, n, nullptr, out,
                                                               &bad);
    case kKeepWords:
      return expert_scaled<Ready, kKeepWords, SINK, false>(t, tau, nullptr, n, nullptr, out, &bad);
    default:
      return expert_scaled<Ready, kKeepBytes, SINK, false>(t, tau, nullptr, n, nullptr, out, &bad);
  }
}

// How expert k is trimmed in [start, start + n). bytes: room for a tile's keep mask.
static int trim_kind(const Work& w, Scratch& s, int k, int64_t start, int n, TrimTile* t,
                     uint8_t* bytes) {
  const mf_expert& e = w.experts[k];
  const int64_t flat = w.job->offset + start;
  if (e.trim == MF_TRIM_BAND) {
    t->low = (int32_t)bits_of(e.threshold);
    if (e.top_count >= 0) t->high = (int32_t)bits_of(e.top_threshold);
    const int64_t cut = e.tie_cut - flat;
    const int64_t top_cut = e.top_count < 0 ? 0 : e.top_tie_cut - flat;
    if ((cut > 0 && cut < n) || (top_cut > 0 && top_cut < n)) {
      t->cut = cut < 0 ? 0 : imin(cut, kTile + kTilePad);
      t->top_cut = top_cut < 0 ? 0 : imin(top_cut, kTile + kTilePad);
      return kKeepBandSplit;
    }
    t->low -= cut > 0;
    t->high -= top_cut > 0;
    return e.top_count < 0 ? kKeepAbove : kKeepBand;
  }
  if (e.trim == MF_TRIM_ABOVE) {
    t->low = (int32_t)bits_of(e.threshold);
    return kKeepAbove;
  }
  if (e.trim == MF_TRIM_RANDOM) {
    t->words = draw_words((uint64_t)flat, n, e.stream, w.job->seed, s.words);
    t->bound = (int32_t)(e.random_bound ^ 0x80000000u);
    return kKeepWords;
  }
  if (e.trim != MF_TRIM_GIVEN && e.trim != MF_TRIM_RANKED) return kKeepAll;
  t->bytes = e.trim == MF_TRIM_GIVEN ? e.mask + start : w.masks[k] + (start - w.mask_start);
  if (n % kTilePad) {
    __builtin_memset(bytes, 0, kTile + kTilePad);
    __builtin_memcpy(bytes, t->bytes, (size_t)n);
    t->bytes = bytes;
  }
  return kKeepBytes;
}

// The kept, rescaled and weighted values of expert k for [start, start + n), n <= kTile, stored or
// added to `out`; one that is not finite is traced, or left to the reader of `out` where w.traced.
// tau: room for the raw task vector, which stays there where w.keep_tau. Returns how many stayed.
static int64_t expert_tile(const Work& w, Scratch& s, int k, int64_t start, int n,
                           const float* base, float weight, int sink, float* tau, float* out) {
  const mf_expert& e = w.experts[k];
  TrimTile t = {-1, (int32_t)kAbsMask, 0, 0, nullptr, 0, nullptr, e.factor, weight};
  uint8_t bytes[kTile + kTilePad];
  const int kind = trim_kind(w, s, k, start, n, &t, bytes);
  const bool seen =
      kind == kKeepWords ||
      (w.traced && (kind == kKeepAll || (kind == kKeepAbove && t.low < (int32_t)kInfBits - 1)));
  if (!base || !seen) {
    load_tau(w, s, k, base, start, n, tau);
    if (sink == kStore) return expert_ready<kStore>(kind, t, tau, n, out);
    return sink == kStart ? expert_ready<kStart>(kind, t, tau, n, out)
                          : expert_ready<kAdd>(kind, t, tau, n, out);
  }
  bool bad;
  const int64_t kept =
      sink == kStore
          ? expert_of_dtype<kStore>(w.keep_tau, kind, t, e, start, base, n, tau, out, &bad)
      : sink == kStart
          ? expert_of_dtype<kStart>(w.keep_tau, kind, t, e, start, base, n, tau, out, &bad)
          : expert_of_dtype<kAdd>(w.keep_tau, kind, t, e, start, base, n, tau, out, &bad);
  if (bad) trace_expert(w, s, k, start, n);
  return kept;
}

}  // namespace
}  // namespace MF_ISA_NAMESPACE
}  // namespace mf
