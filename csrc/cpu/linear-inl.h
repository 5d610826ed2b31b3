// Linear merges without row statistics, from the inputs' bytes to the output's: nothing but the sum
// is formed, all in registers.
#pragma once

#include "load-inl.h"

namespace mf {
namespace MF_ISA_NAMESPACE {
namespace {

constexpr int kLinearMost = 8;        // experts
constexpr int kLinearStretch = 4096;  // elements between looks at what was not finite

// out = base + scale * (sum_k weight_k * (expert_k - base)) / divisor of n elements, a multiple
// of 16. True where some of it may overflow the output or is not finite.
template <class T, int K, bool SCALED>
static bool linear_loop(const Work& w, int64_t start, int64_t n) {
  typedef typename T::type E;
  constexpr int kLine = 64 / (int)sizeof(E);
  const mf_job& job = *w.job;
  const E* base = (const E*)job.base + start;
  E* out = (E*)job.out + start;
  const E* expert[K];
  vf weight[K];
  for (int k = 0; k < K; ++k) {
    expert[k] = (const E*)w.experts[k].data + start;
    weight[k] = splat(w.experts[k].weight);
  }
  const vf divisor = splat(w.divisor), scale = splat(job.scale);
  vi top = splat_i(0);
  for (int64_t i = 0; i < n; i += kSumLanes) {
    if (i % kLine == 0) {
      __builtin_prefetch((const char*)(base + i) + kPrefetch);
      for (int k = 0; k < K; ++k) __builtin_prefetch((const char*)(expert[k] + i) + kPrefetch);
    }
    vf result[kParts];
    each_part([&](auto part) MF_LAMBDA {
      constexpr int H = decltype(part)::value;
      const vf b = T::template part<H>(base + i);
      vf sum = zero();
      for (int k = 0; k < K; ++k) sum += (T::template part<H>(expert[k] + i) - b) * weight[k];
      if (SCALED) sum = sum / divisor * scale;
      result[H] = b + sum;
      top = max_i(top, abs_bits(result[H]));
    });
    T::put(out + i, result);
  }
  return any(top >= splat_i((int32_t)T::kOverflow));
}

template <class T, int K>
static bool linear_scaled(const Work& w, int64_t start, int64_t n) {
  if (w.divisor != 1 || w.job->scale != 1) return linear_loop<T, K, true>(w, start, n);
  return linear_loop<T, K, false>(w, start, n);
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
    default:
      return linear_scaled<T, 8>(w, start, n);
  }
}

static bool linear_stretch(const Work& w, int64_t start, int64_t n) {
  if (w.job->out_dtype == MF_BF16) return linear_of<Bf16>(w, start, n);
  if (w.job->out_dtype == MF_F16) return linear_of<F16>(w, start, n);
  return linear_of<F32>(w, start, n);
}

// Whether `linear_stretch` does what the recipe says: a plain sum of a few experts, one dtype
// throughout.
static bool is_plain_sum(const Work& w) {
  const mf_job& job = *w.job;
  bool plain = w.linear && !job.merged && job.base && w.k >= 1 && w.k <= kLinearMost &&
               job.consensus == MF_CONSENSUS_NONE && job.base_dtype == job.out_dtype;
  for (int k = 0; plain && k < w.k; ++k) {
    const mf_expert& e = w.experts[k];
    plain = e.trim == MF_TRIM_NONE && e.factor == 1 && e.dtype == job.base_dtype;
  }
  return plain;
}

}  // namespace
}  // namespace MF_ISA_NAMESPACE
}  // namespace mf
