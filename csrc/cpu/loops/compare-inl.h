// What compares the experts of an element with each other before anything is added: their variance,
// and who holds the element alone.
#pragma once

#include "tile-inl.h"

namespace mf {
namespace MF_ISA_NAMESPACE {
namespace {

// Biased variance over the experts, summed in their order. tau: [K][kTile].
MF_INLINE vf variance_at(const float* tau, int k, vf count, int64_t i) {
  vf mean = zero(), sum = zero();
  for (int e = 0; e < k; ++e) mean += load(tau + e * kTile + i);
  mean /= count;
  for (int e = 0; e < k; ++e) {
    const vf d = load(tau + e * kTile + i) - mean;
    sum += d * d;
  }
  return sum / count;
}

// Sets the values of all experts to 0 where the variance of the raw task vectors lies below
// (threshold, tie cut). Returns how many stay.
static int64_t variance_tile(const Work& w, Scratch& s, int64_t start, int n) {
  const mf_expert& e = w.experts[0];
  const int64_t cut = e.tie_cut - (w.job->offset + start);
  const int32_t before = cut < 0 ? 0 : imin(cut, kTile + kTilePad);
  const vi low = splat_i((int32_t)bits_of(e.threshold));
  const vf count = splat((float)w.k);
  vi kept = splat_i(0);
  for (int64_t i = 0; i < padded(n); i += kSumLanes)
    each_part([&](auto part) MF_LAMBDA {
      constexpr int H = decltype(part)::value;
      const int64_t at = i + H * kLanes;
      const vi index = element_index<H>() + (int32_t)i;
      const vi keep =
          at_or_above<Lanes>(abs_bits(variance_at(s.tau, w.k, count, at)), low, index < before);
      kept -= keep;
      for (int k = 0; k < w.k; ++k) {
        float* v = s.value + k * kTile + at;
        store(v, keep_if(keep, load(v)));
      }
    });
  return lane_sum(kept);  // the padding has no variance, a threshold is above 0
}

static int64_t variances_of_tile(const Work& w, Scratch& s, int n) {
  const vf count = splat((float)w.k);
  vi positive = splat_i(0);
  for (int64_t i = 0; i < padded(n); i += kLanes) {
    const vf x = variance_at(s.tau, w.k, count, i);
    positive -= x != zero();
    store(s.delta + i, x);
  }
  return lane_sum(positive);
}

MF_INLINE vf holders_at(const float* value, int k, int64_t i) {
  vf count = zero();
  for (int e = 0; e < k; ++e) count += keep_if(load(value + e * kTile + i) != zero(), splat(1.0f));
  return count;
}

// delta times the factor of the one expert that is not zero, where there is one.
static void alone_tile(const Work& w, const Scratch& s, int n, float* delta) {
  const vf one = splat(1.0f);
  for (int64_t i = 0; i < padded(n); i += kLanes) {
    vf count = zero(), factor = zero();
    for (int k = 0; k < w.k; ++k) {
      const vi holds = load(s.value + k * kTile + i) != zero();
      count += keep_if(holds, one);
      factor += keep_if(holds, splat(w.experts[k].alone));
    }
    const vf d = load(delta + i);
    store(delta + i, where(count == one, d * factor, d));
  }
}

static void holders_of_tile(const Work& w, Scratch& s, int n, int64_t* alone, int64_t* shared) {
  const vf one = splat(1.0f);
  for (int64_t i = 0; i < padded(n); i += kLanes) store(s.delta + i, holders_at(s.value, w.k, i));
  for (int k = 0; k < w.k; ++k) {
    vi unique = splat_i(0), others = splat_i(0);
    for (int64_t i = 0; i < padded(n); i += kLanes) {
      const vi holds = load(s.value + k * kTile + i) != zero();
      const vf count = load(s.delta + i);
      unique -= holds & (count == one);
      others -= holds & (count > one);
    }
    alone[k] += lane_sum(unique);
    shared[k] += lane_sum(others);
  }
}

}  // namespace
}  // namespace MF_ISA_NAMESPACE
}  // namespace mf
