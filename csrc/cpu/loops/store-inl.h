// out = base + factor * delta: a tile rounded to the output's dtype, and the two loops that write
// one.
#pragma once

#include "delta-inl.h"
#include "linear-inl.h"

namespace mf {
namespace MF_ISA_NAMESPACE {
namespace {

// True where some result may overflow the output (or is not finite).
template <class T, bool HAS_BASE>
static bool store_as(const float* base, const float* delta, int64_t n, float factor,
                     typename T::type* out) {
  const vf f = splat(factor);
  const int64_t full = n & -(int64_t)kSumLanes;
  vi top = splat_i(0);
  for (int64_t i = 0; i < n; i += kSumLanes) {  // base and delta are padded with zeros
    vf x[kParts];
    for (int h = 0; h < kParts; ++h) {
      x[h] = f * load(delta + i + h * kLanes);
      if (HAS_BASE) x[h] = load(base + i + h * kLanes) + x[h];
      top = max_i(top, abs_bits(x[h]));
    }
    if (i < full) {
      T::put(out + i, x);
    } else {
      typename T::type rest[kSumLanes];
      T::put(rest, x);
      __builtin_memcpy(out + full, rest, (size_t)(n - full) * sizeof(typename T::type));
    }
  }
  if (!any(top >= splat_i((int32_t)T::kOverflow))) return false;
  for (int64_t i = 0; i < n; ++i) {  // NaN, which the vectors may round to a number
    const float x = factor * delta[place(i)];
    out[i] = T::round(HAS_BASE ? base[place(i)] + x : x);
  }
  return true;
}

template <class T>
static bool store_tile(const float* base, const float* delta, int64_t start, int n, float factor,
                       void* out) {
  typename T::type* p = (typename T::type*)out + start;
  return base ? store_as<T, true>(base, delta, n, factor, p)
              : store_as<T, false>(base, delta, n, factor, p);
}

// First result that was finite and no longer is, where it comes before what is there.
static void note_overflow(Scratch& s, const float* base, const float* delta, int64_t start, int n,
                          float factor, uint32_t limit) {
  for (int i = 0; i < n && start + i < s.overflow; ++i) {
    const int64_t at = place(i);
    const float scaled = factor * delta[at];
    const uint32_t a = bits_of(base ? base[at] + scaled : scaled) & kAbsMask;
    if (a >= limit && a < kInfBits) s.overflow = start + i;
  }
}

// True where some result may overflow the output (or is not finite).
static bool write_tile(const Work& w, Scratch& s, const float* base, const float* delta,
                       int64_t start, int n, float factor) {
  const mf_job& job = *w.job;
  if (job.out_dtype == MF_F32)  // a finite float32 stays finite
    return store_tile<F32>(base, delta, start, n, factor, job.out);
  const bool bf16 = job.out_dtype == MF_BF16;
  const bool large = bf16 ? store_tile<Bf16>(base, delta, start, n, factor, job.out)
                          : store_tile<F16>(base, delta, start, n, factor, job.out);
  if (large)
    note_overflow(s, base, delta, start, n, factor, bf16 ? Bf16::kOverflow : F16::kOverflow);
  return large;
}

// A calibrated row that nothing acts on keeps the bits it came with.
static void copy_merged(const Work& w, Scratch& s, int64_t start, int64_t n) {
  for (int64_t done = 0; done < n; done += kTile) {
    const int len = imin(kTile, n - done);
    load_tile<false>(w.job->merged, w.job->merged_dtype, nullptr, start + done, len, s.base);
    write_tile(w, s, nullptr, s.base, start + done, len, 1);
  }
}
MF_INLINE bool keeps_merged(const Work& w, float factor) {
  return w.job->merged && w.job->calibration && factor == 1;
}

static void merge_tiles(const Work& w, Scratch& s, int64_t start, int64_t n, float factor) {
  for (int64_t done = 0; done < n; done += kTile) {
    const int len = imin(kTile, n - done);
    delta_tile(w, s, start + done, len, s.delta);
    const float* base = w.job->base ? s.base : nullptr;
    const bool large = write_tile(w, s, base, s.delta, start + done, len, factor);
    if (large && w.linear && !w.job->merged) trace_experts(w, s, start + done, len);
  }
}

static void merge(const Work& w, Scratch& s, int64_t start, int64_t n, float factor) {
  if (keeps_merged(w, factor)) return copy_merged(w, s, start, n);
  if (factor != 1 || !is_plain_sum(w)) return merge_tiles(w, s, start, n, factor);
  int64_t len;
  for (int64_t done = 0; done < n; done += len) {
    len = imin(kLinearStretch, n - done);
    if (w.job->weights) len = imin(len, left_of_row(w, start + done));
    const int64_t blocks = len & -(int64_t)kSumLanes;
    const bool large = linear_stretch(w, start + done, blocks);
    if (large) {
      merge_tiles(w, s, start + done, len, 1);  // which looks closer
      continue;
    }
    for (int k = 0; k < w.k; ++k) s.kept[k] += blocks;
    if (blocks < len) merge_tiles(w, s, start + done + blocks, len - blocks, 1);
  }
}

static void apply(const Work& w, Scratch& s, int64_t start, int64_t n, const float* delta,
                  float factor) {
  if (keeps_merged(w, factor)) return copy_merged(w, s, start, n);
  for (int64_t done = 0; done < n; done += kTile) {
    const int len = imin(kTile, n - done);
    const int64_t at = start + done;
    write_tile(w, s, load_base(w, s, at, len), delta + done, at, len, factor);
  }
}

}  // namespace
}  // namespace MF_ISA_NAMESPACE
}  // namespace mf
