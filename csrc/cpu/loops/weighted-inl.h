// Sums whose weights change from row to row: the combinations of vectors whose coefficients follow
// from their inner products.
#pragma once

#include "tile-inl.h"

namespace mf {
namespace MF_ISA_NAMESPACE {
namespace {

// The weights of the row that element `at` lies in: K, and the base's.
MF_INLINE const float* row_weights(const Work& w, int64_t at) {
  return w.job->weights + at / w.job->weight_cols * (w.k + 1);
}
// Elements of that row from `at` on.
MF_INLINE int64_t left_of_row(const Work& w, int64_t at) {
  return w.job->weight_cols - at % w.job->weight_cols;
}

// Weight k of each of n elements, in block order; zeros behind them.
static void spread_weights(const Work& w, int k, int64_t start, int n, float* out) {
  for (int64_t i = 0; i < padded(n); i += kLanes) store(out + i, zero());
  for (int64_t i = 0; i < n;) {
    const float weight = row_weights(w, start + i)[k];
    const int64_t left = left_of_row(w, start + i), end = left < n - i ? i + left : n;
    while (i < end) {
      if (i % kSumLanes || end - i < kSumLanes) {
        out[place(i++)] = weight;
      } else {
        for (int h = 0; h < kParts; ++h) store(out + i + h * kLanes, splat(weight));
        i += kSumLanes;
      }
    }
  }
}

// delta (+)= weight * x, rounded twice as a plain sum is.
template <bool FIRST, bool SPREAD>
static void add_weighted(const float* x, float weight, const float* weights, int64_t n,
                         float* delta) {
  const vf one = splat(weight);
  for (int64_t i = 0; i < padded(n); i += kLanes) {
    const vf sum = FIRST ? zero() : load(delta + i);
    store(delta + i, sum + load(x + i) * (SPREAD ? load(weights + i) : one));
  }
}

// delta = sum_k weight_k * tau_k + weight_K * base of [start, start + n), n <= kTile; raw task
// vectors into s.tau. The reader of delta finds what is not finite.
static void weighted_tile(const Work& w, Scratch& s, int64_t start, int n, float* delta) {
  float spread[kTile + kTilePad];
  const bool same = left_of_row(w, start) >= n;
  const float* base = load_base(w, s, start, n);
  const float* row = row_weights(w, start);
  const auto add = [&](int k, const float* x) {
    if (!same) spread_weights(w, k, start, n, spread);
    if (k == 0) {
      same ? add_weighted<true, false>(x, row[k], nullptr, n, delta)
           : add_weighted<true, true>(x, 0, spread, n, delta);
    } else {
      same ? add_weighted<false, false>(x, row[k], nullptr, n, delta)
           : add_weighted<false, true>(x, 0, spread, n, delta);
    }
  };
  for (int k = 0; k < w.k; ++k) {
    const mf_expert& e = w.experts[k];
    float* tau = s.tau + (w.keep_tau ? k * kTile : 0);
    load_tile<false>(e.data, e.dtype, base, start, n, tau);
    add(k, tau);
    s.kept[k] += n;
  }
  if (base && !(same && row[w.k] == 0)) add(w.k, base);
}

}  // namespace
}  // namespace MF_ISA_NAMESPACE
}  // namespace mf
