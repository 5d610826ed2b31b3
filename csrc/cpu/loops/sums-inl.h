// What a job must know before it can write: row sums, votes, norms, counts of holders and scores.
#pragma once

#include "delta-inl.h"
#include "gram-inl.h"

namespace mf {
namespace MF_ISA_NAMESPACE {
namespace {

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

}  // namespace
}  // namespace MF_ISA_NAMESPACE
}  // namespace mf
