// The loops of one instruction set, and the table by which they are called.
#pragma once

#include "gram-inl.h"
#include "linear-inl.h"
#include "reduce-inl.h"
#include "search-inl.h"

namespace mf {
namespace MF_ISA_NAMESPACE {
namespace {

// ---- out = base + factor * delta ----
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

// ---- sums ----
// A norm that is not finite: which tensor, and where? (One that is too large for float32 is traced
// for nothing.)
static void trace_norms(const Work& w, Scratch& s, int64_t start, int n, const double* pairs) {
  for (int v = 0; v < w.m; ++v) {
    if (pairs[pair_index(v, v, w.m)] <= 1.7976931348623157e308) continue;
    if (v < w.k) trace_expert(w, s, v, start, n);
    if (v == w.k && w.job->merged) trace_merged(w, s, start, n);
  }
}

static void statistics(const Work& w, Scratch& s, int64_t start, int64_t n, float* delta,
                       double* pairs, double* powers) {
  const float* rows[kMaxVectors];
  for (int64_t done = 0; done < n; done += kTile) {
    const int len = imin(kTile, n - done);
    float* d = delta ? delta + done : s.delta;
    delta_tile(w, s, start + done, len, d);
    for (int k = 0; k < w.k; ++k) rows[k] = s.tau + k * kTile;
    rows[w.m - 1] = d;
    if (w.gram && w.wide) {
      gram_wide_tile(rows, w.m, padded(len), pairs);
    } else if (w.gram) {
      gram_tile(rows, w.m, padded(len), s.lanes, pairs);
    } else {
      norms_tile(rows, w.m, padded(len), pairs);
    }
    trace_norms(w, s, start + done, len, pairs);
    if (w.powers) powers_tile(rows, w.m, padded(len), w.job->calibration->p, powers);
  }
}

static void gram(const Work& w, Scratch& s, int64_t start, int64_t n, double* pairs) {
  const float* rows[kMaxVectors];
  for (int k = 0; k < w.k; ++k) rows[k] = s.tau + k * kTile;
  for (int64_t done = 0; done < n; done += kTile) {
    const int len = imin(kTile, n - done);
    const float* base = load_base(w, s, start + done, len);
    for (int k = 0; k < w.k; ++k) load_tau(w, s, k, base, start + done, len, s.tau + k * kTile);
    if (w.wide) {
      gram_wide_tile(rows, w.k, padded(len), pairs);
    } else {
      gram_tile(rows, w.k, padded(len), s.lanes, pairs);
    }
  }
}

static int64_t votes(const Work& w, Scratch& s, int64_t start, int64_t n) {
  int64_t sum = 0;
  for (int64_t done = 0; done < n; done += kTile) {
    const int len = imin(kTile, n - done);
    values_tile(w, s, start + done, len, s.delta);
    const ReduceTile t = reduce_tile_of(w, s, len);
    sum += w.job->vote == MF_VOTE_COUNT ? vote_loop<MF_VOTE_COUNT>(t) : vote_loop<MF_VOTE_MASS>(t);
  }
  return sum;
}

// Adds to sums: [0] |x|, [1] x^2, [2] the largest |x|. Float64 on 16 virtual lanes.
static void norm_sums(const float* x, int n, double sums[3]) {
  double absolute[kSumLanes] = {}, square[kSumLanes] = {};
  vi top = splat_i(0);
  for (int64_t i = 0; i < padded(n); i += kSumLanes)
    for (int l = 0; l < kSumLanes; ++l) {
      const double a = (double)float_of(bits_of(x[i + l]) & kAbsMask);
      absolute[l] += a;
      square[l] += a * a;
    }
  for (int64_t i = 0; i < padded(n); i += kLanes) top = max_i(top, abs_bits(load(x + i)));
  const double m = (double)float_of((uint32_t)largest(top));
  sums[0] += lanes16_sum(absolute);
  sums[1] += lanes16_sum(square);
  if (m > sums[2]) sums[2] = m;
}

static void norms(const Work& w, Scratch& s, int64_t start, int64_t n, double* before,
                  double* after, double* squares) {
  const int which = w.job->rescale == MF_RESCALE_L1 ? 0 : w.job->rescale == MF_RESCALE_L2 ? 1 : 2;
  Work both = w;  // before the trim and after
  both.keep_tau = true;
  for (int64_t done = 0; done < n; done += kTile) {
    const int len = imin(kTile, n - done);
    const float* base = load_base(w, s, start + done, len);
    for (int k = 0; k < w.k; ++k) {
      if (squares) {
        double whole[3] = {};
        load_tau(w, s, k, base, start + done, len, s.tau);
        norm_sums(s.tau, len, whole);
        squares[k] += whole[1];
      }
      if (w.job->rescale == MF_RESCALE_NONE || w.experts[k].trim == MF_TRIM_NONE) continue;
      expert_tile(both, s, k, start + done, len, base, 1.0f, kStore, s.tau, s.value);
      double raw[3] = {0, 0, before[k]}, trimmed[3] = {0, 0, after[k]};
      norm_sums(s.tau, len, raw);
      norm_sums(s.value, len, trimmed);
      before[k] = which == 2 ? raw[2] : before[k] + raw[which];
      after[k] = which == 2 ? trimmed[2] : after[k] + trimmed[which];
    }
  }
}

static void energies(const Work& w, Scratch& s, int64_t start, int64_t n, double* squares) {
  for (int64_t done = 0; done < n; done += kTile) {
    const int len = imin(kTile, n - done);
    values_tile(w, s, start + done, len, s.delta);
    for (int k = 0; k < w.k; ++k) {
      double sums[3] = {};
      norm_sums(s.value + k * kTile, len, sums);
      squares[k] += sums[1];
    }
  }
}

static void holders(const Work& w, Scratch& s, int64_t start, int64_t n, int64_t* alone,
                    int64_t* shared) {
  for (int64_t done = 0; done < n; done += kTile) {
    const int len = imin(kTile, n - done);
    values_tile(w, s, start + done, len, s.delta);
    holders_of_tile(w, s, len, alone, shared);
  }
}

static int64_t variances(const Work& w, Scratch& s, int64_t start, int64_t n, float* out) {
  int64_t positive = 0;
  for (int64_t done = 0; done < n; done += kTile) {
    const int len = imin(kTile, n - done);
    const float* base = load_base(w, s, start + done, len);
    for (int k = 0; k < w.k; ++k) load_tau(w, s, k, base, start + done, len, s.tau + k * kTile);
    positive += variances_of_tile(w, s, len);
    in_memory_order(s.delta, len, out + done);
  }
  return positive;
}

static void scores(const Work& w, Scratch& s, int64_t start, int64_t n, const uint32_t* prefix,
                   uint32_t* counts, uint32_t* top) {
  float found[kTile];
  for (int64_t done = 0; done < n; done += kTile) {
    const int len = imin(kTile, n - done);
    values_tile(w, s, start + done, len, s.delta);
    for (int k = 0; k < w.k; ++k) {
      scores_of_tile(w, s, k, len, found);
      uint32_t* own = counts + (int64_t)k * 65536;
      for (int i = 0; i < len; ++i) {
        const uint32_t bits = ordered_bits(found[i]);
        if (!prefix) {
          ++own[bits >> 16];
          if (bits > top[k]) top[k] = bits;
        } else if (bits >> 16 == prefix[k]) {
          ++own[bits & 65535];
        }
      }
    }
  }
}

static void row_norms(const Work& w, Scratch& s, int64_t start, int64_t n, double sums[3]) {
  for (int64_t done = 0; done < n; done += kTile) {
    const int len = imin(kTile, n - done);
    load_tau(w, s, 0, load_base(w, s, start + done, len), start + done, len, s.tau);
    norm_sums(s.tau, len, sums);
  }
}

static void words(uint64_t flat, int64_t n, uint64_t stream, uint64_t seed, uint32_t* out) {
  uint32_t buffer[2 * (kTile + 64)];
  for (int64_t done = 0; done < n; done += kTile) {
    const int len = imin(kTile, n - done);
    const uint32_t* drawn = draw_words(flat + (uint64_t)done, len, stream, seed, buffer);
    in_memory_order((const float*)(const void*)drawn, len, (float*)(void*)(out + done));
  }
}

constexpr Kernels kTable = {merge,      statistics, gram,        apply,     votes,
                            norms,      energies,   holders,     variances, scores,
                            magnitudes, scan,       kth_largest, row_norms, words};

}  // namespace

const Kernels* kernels() { return &kTable; }

}  // namespace MF_ISA_NAMESPACE
}  // namespace mf
