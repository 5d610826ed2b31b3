// Linear merges without row statistics, from the inputs' bytes to the output's: nothing but the sum
// is formed, all in registers.
#pragma once

#include "weighted-inl.h"

namespace mf {
namespace MF_ISA_NAMESPACE {
namespace {

constexpr int kLinearMost = 9;        // experts; or eight and a base that is one of them
constexpr int kLinearStretch = 4096;  // elements between looks at what was not finite
constexpr int kShortRow = 256;        // elements of a row of weights; shorter ones go tile by tile

enum LinearBase { kNoBase, kBase, kWeightedBase };  // none; as it is; and weighted among the rest

// out = base + scale * (sum_k weight_k * (expert_k - base)) / divisor of n elements, a multiple
// of 16. weights: [K + 1], the last of the base. True where some of it may overflow the output or
// is not finite.
template <class T, int K, int BASE, bool SCALED>
static bool linear_loop(const Work& w, const float* weights, int64_t start, int64_t n) {
  typedef typename T::type E;
  constexpr int kLine = 64 / (int)sizeof(E);
  const mf_job& job = *w.job;
  const E* base = BASE == kNoBase ? nullptr : (const E*)job.base + start;
  E* out = (E*)job.out + start;
  const E* expert[K];
  vf weight[K];
  for (int k = 0; k < K; ++k) {
    expert[k] = (const E*)w.experts[k].data + start;
    weight[k] = splat(weights[k]);
  }
  const vf base_weight = splat(weights[K]), divisor = splat(w.divisor), scale = splat(job.scale);
  vi top = splat_i(0);
  for (int64_t i = 0; i < n; i += kSumLanes) {
    if (i % kLine == 0) {
      if (BASE != kNoBase) __builtin_prefetch((const char*)(base + i) + kPrefetch);
      for (int k = 0; k < K; ++k) __builtin_prefetch((const char*)(expert[k] + i) + kPrefetch);
    }
    vf result[kParts];
    each_part([&](auto part) MF_LAMBDA {
      constexpr int H = decltype(part)::value;
      vf b = zero(), sum = zero();
      if (BASE != kNoBase) b = T::template part<H>(base + i);
      for (int k = 0; k < K; ++k) {
        vf x = T::template part<H>(expert[k] + i);
        if (BASE != kNoBase) x -= b;
        sum += x * weight[k];
      }
      if (BASE == kWeightedBase) sum += b * base_weight;
      if (SCALED) sum = sum / divisor * scale;
      result[H] = BASE == kNoBase ? sum : b + sum;
      top = max_i(top, abs_bits(result[H]));
    });
    T::put(out + i, result);
  }
  return any(top >= splat_i((int32_t)T::kOverflow));
}

template <class T, int K>
static bool linear_scaled(const Work& w, int64_t start, int64_t n) {
  if (w.job->weights) {
    const float* weights = row_weights(w, start);
    if (!w.job->base) return linear_loop<T, K, kNoBase, false>(w, weights, start, n);
    if (weights[K] == 0) return linear_loop<T, K, kBase, false>(w, weights, start, n);
    return linear_loop<T, K, kWeightedBase, false>(w, weights, start, n);
  }
  float weights[K + 1] = {};
  for (int k = 0; k < K; ++k) weights[k] = w.experts[k].weight;
  const bool scaled = w.divisor != 1 || w.job->scale != 1;
  if (w.job->base)
    return scaled ? linear_loop<T, K, kBase, true>(w, weights, start, n)
                  : linear_loop<T, K, kBase, false>(w, weights, start, n);
  return scaled ? linear_loop<T, K, kNoBase, true>(w, weights, start, n)
                : linear_loop<T, K, kNoBase, false>(w, weights, start, n);
}

template <class T>
static bool linear_of(const Work& w, int64_t start, int64_t n) {
  switch (w.k) {
    case 1:
      return linear_scaled<T, 1>(w, start, n);
    case 2:
      return linear_scaled<T, 2>(w, start, n);
    case 3:
      return linear_scaled<T, 3>(w, start, n);
    case 4:
      return linear_scaled<T, 4>(w, start, n);
    case 5:
      return linear_scaled<T, 5>(w, start, n);
    case 6:
      return linear_scaled<T, 6>(w, start, n);
    case 7:
      return linear_scaled<T, 7>(w, start, n);
    case 8:
      return linear_scaled<T, 8>(w, start, n);
    default:
      return linear_scaled<T, 9>(w, start, n);
  }
}

static bool linear_stretch(const Work& w, int64_t start, int64_t n) {
  if (w.job->out_dtype == MF_BF16) return linear_of<Bf16>(w, start, n);
  if (w.job->out_dtype == MF_F16) return linear_of<F16>(w, start, n);
  return linear_of<F32>(w, start, n);
}

// Whether `linear_stretch` does what the recipe says: a plain sum of a few experts, one dtype
// throughout, and no more than a few changes of the weights.
static bool is_plain_sum(const Work& w) {
  const mf_job& job = *w.job;
  bool plain = w.linear && !job.merged && w.k >= 1 && w.k <= kLinearMost &&
               job.consensus == MF_CONSENSUS_NONE && !job.limited;
  if (job.base) plain &= job.base_dtype == job.out_dtype;
  if (job.weights) plain &= job.weight_cols >= kShortRow;
  for (int k = 0; plain && k < w.k; ++k) {
    const mf_expert& e = w.experts[k];
    plain = e.trim == MF_TRIM_NONE && e.factor == 1 && e.dtype == job.out_dtype;
  }
  return plain;
}

}  // namespace
}  // namespace MF_ISA_NAMESPACE
}  // namespace mf
