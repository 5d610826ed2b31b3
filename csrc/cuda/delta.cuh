// From the bytes of K experts to d = scale * delta of eight neighbouring elements.
#pragma once

#include "keys.cuh"

namespace mf {
namespace cuda {

// What a thread has seen of its elements.
template <int K>
struct Seen {
  int kept[K > 0 ? K : 1];
  uint32_t top;  // largest |tau| or |d| bits: infinity or more where something is not finite

  MF_DEVICE_METHOD void begin() {
    MF_UNROLL for (int k = 0; k < (K > 0 ? K : 1); ++k) kept[k] = 0;
    top = 0;
  }
  MF_DEVICE_METHOD void note(float x) {
    const uint32_t bits = bits_of(x) & kAbsMask;
    top = bits > top ? bits : top;
  }
};

// Recipes that K registers per element carry: sums, and those that agree with a vote of masses on
// weighted values. Everything else, and more experts, goes through `any_delta`.
template <int K>
struct Loaded {
  Eight base, expert[K], merged;
};

// The dtype of all K experts, or -1.
template <int K>
MF_DEVICE int common_dtype(const Job& job) {
  int dtype = job.dtype(0);
  MF_UNROLL for (int k = 1; k < K; ++k) dtype = job.dtype(k) == dtype ? dtype : -1;
  return dtype;
}

template <int K>
MF_DEVICE void widen_all(const Raw (&raw)[K], int dtype, Loaded<K>* x) {
  MF_UNROLL for (int k = 0; k < K; ++k) widen(raw[k], dtype, &x->expert[k]);
}

// What is the same for all elements and experts (whole vectors, one dtype) is asked once, not once
// for each: a branch costs two warps a scheduler more than the arithmetic behind it.
template <int K>
MF_DEVICE void load_all(const Job& job, const Place& p, Loaded<K>* x) {
  Raw raw[K], base, merged;
  const mf_gpu_job& all = *job.all;
  if (p.whole) {
    MF_UNROLL for (int k = 0; k < K; ++k) load_whole<true>(job.expert(k), job.dtype(k), p, &raw[k]);
    if (job.base) load_whole<false>(job.base, all.base_dtype, p, &base);
    if (all.rule.merged) load_whole<true>(all.merged, all.merged_dtype, p, &merged);
  } else {
    MF_UNROLL for (int k = 0; k < K; ++k) load_parts(job.expert(k), job.dtype(k), p, &raw[k]);
    if (job.base) load_parts(job.base, all.base_dtype, p, &base);
    if (all.rule.merged) load_parts(all.merged, all.merged_dtype, p, &merged);
  }
  const int dtype = common_dtype<K>(job);
  if (dtype == MF_BF16) {
    widen_all<K>(raw, MF_BF16, x);
  } else if (dtype == MF_F16) {
    widen_all<K>(raw, MF_F16, x);
  } else if (dtype == MF_F32) {
    widen_all<K>(raw, MF_F32, x);
  } else {
    MF_UNROLL for (int k = 0; k < K; ++k) widen(raw[k], job.dtype(k), &x->expert[k]);
  }
  if (all.rule.merged) widen(merged, all.merged_dtype, &x->merged);
  if (job.base) {
    widen(base, all.base_dtype, &x->base);
  } else {
    MF_UNROLL for (int e = 0; e < kVec; ++e) x->base.v[e] = 0;
  }
}

// d of the elements of `x`; sink(e, tau, d) sees K raw task vectors and d of each. The experts
// become their task vectors. NOTES: what is not finite is looked for in d, and in the task vectors
// where a trim may drop it (a caller that takes their norms sees it there). Without a trim there is
// nothing to restore: the factors are 1.
template <int K, bool TRIM, bool NOTES, class Sink>
MF_DEVICE void fast_delta(const Job& job, const Place& p, Loaded<K>* x, Eight* d, Seen<K>* seen,
                          Sink sink) {
  const mf_gpu_rule& rule = job.all->rule;
  Keep keep[K];
  float factor[K], weight[K];
  if (job.base) {
    MF_UNROLL for (int k = 0; k < K; ++k) MF_UNROLL for (int e = 0; e < kVec; ++e) x->expert[k]
        .v[e] -= x->base.v[e];
  }
  MF_UNROLL for (int k = 0; k < K; ++k) {
    if (TRIM) keep[k] = keep_of(job, k, p, x->expert[k]);
    factor[k] = TRIM ? number(job, kFactor, k) : 1.0f, weight[k] = number(job, kWeight, k);
  }
  if (NOTES && TRIM) {
    MF_UNROLL for (int k = 0; k < K; ++k) MF_UNROLL for (int e = 0; e < kVec; ++e)
        seen->note(x->expert[k].v[e]);
  }
  if (rule.merged) {
    MF_UNROLL for (int e = 0; e < kVec; ++e) d->v[e] = x->merged.v[e];
    if (job.base) {
      MF_UNROLL for (int e = 0; e < kVec; ++e) d->v[e] -= x->base.v[e];
    }
  } else {
    const bool votes = rule.vote != MF_VOTE_NONE, divides = rule.reduce != MF_SUM;
    const float at_zero = zero_elects(rule.zero_vote, rule.reduce, majority_of(job));
    const float scale = scale_of(job);
    float divisor = 0;
    MF_UNROLL for (int k = 0; k < K; ++k) divisor += rule.reduce == MF_MEAN ? 1.0f : weight[k];
    MF_UNROLL for (int e = 0; e < kVec; ++e) {
      float v[K], total = 0;
      MF_UNROLL for (int k = 0; k < K; ++k) {
        float y = x->expert[k].v[e];
        if (TRIM) {
          const bool in = stays(keep[k], y, e);
          seen->kept[k] += in && e < p.count ? 1 : 0;
          y = (in ? y : 0.0f) * factor[k];
        }
        v[k] = y * weight[k];
        total += v[k];
      }
      if (votes) {
        const float elected = elected_sign(total, at_zero);
        float count = 0;
        total = 0;
        MF_UNROLL for (int k = 0; k < K; ++k) {
          const bool in = contributes(MF_AGREEING, v[k], elected);
          total += in ? v[k] : 0.0f;
          count += in ? (rule.reduce == MF_MEAN ? 1.0f : weight[k]) : 0.0f;
        }
        total = divided(rule.reduce, MF_VOTE_MASS, total, count, 0);
      } else if (divides) {
        total = divided(rule.reduce, MF_VOTE_NONE, total, divisor, 0);
      }
      d->v[e] = total * scale;
    }
  }
  MF_UNROLL for (int e = 0; e < kVec; ++e) {
    float tau[K];
    MF_UNROLL for (int k = 0; k < K; ++k) tau[k] = x->expert[k].v[e];
    if (NOTES) seen->note(d->v[e]);
    sink(e, tau, d->v[e]);
  }
}

// Whether `fast_delta` runs the recipe.
MF_HD bool is_fast(const mf_gpu_job& job) {
  const mf_gpu_rule& r = job.rule;
  if (job.k > 8) return false;
  if (r.merged) return true;
  if (r.scored) return false;
  if (r.consensus != MF_CONSENSUS_NONE || r.limited || r.reduce == MF_MAX || r.unweighted)
    return false;
  if (r.vote == MF_VOTE_NONE) return r.contributors == MF_ALL;
  return r.vote == MF_VOTE_MASS && r.contributors == MF_AGREEING;
}

// The weighted value of an entry. Where the vote is on unweighted ones, before its weight.
MF_DEVICE float value_of(const Job& job, int k, float tau, bool in) {
  const float y = (in ? tau : 0.0f) * number(job, kFactor, k);
  return job.all->rule.unweighted ? y : y * number(job, kWeight, k);
}

// Sum_k v_k, or of their signs, of eight elements; `each(k, tau, keep)` sees every expert.
template <class Each>
MF_DEVICE void tally(const Job& job, const Place& p, const Eight& b, Eight* s, Each each) {
  MF_UNROLL for (int e = 0; e < kVec; ++e) s->v[e] = 0;
  for (int k = 0; k < job.k; ++k) {
    Eight tau;
    load_tau(job, k, p, b, &tau);
    const Keep keep = keep_of(job, k, p, tau);
    each(k, tau, keep);
    MF_UNROLL for (int e = 0; e < kVec; ++e) {
      const float v = value_of(job, k, tau.v[e], stays(keep, tau.v[e], e));
      s->v[e] += job.all->rule.vote == MF_VOTE_COUNT ? sign_of_value(v) : v;
    }
  }
}

MF_DEVICE void compete(const Job& job, const Place& p, const Eight& b, Eight* d, Seen<0>* seen) {
  Eight total, shares;
  total_of(job, p, b, &total);
  MF_UNROLL for (int e = 0; e < kVec; ++e) d->v[e] = shares.v[e] = 0;
  for (int k = 0; k < job.k; ++k) {
    Eight tau;
    load_tau(job, k, p, b, &tau);
    const float cut = number(job, kScoreCut, k), top = number(job, kScoreTop, k);
    const float low = bound_of(job, kLow, k), high = bound_of(job, kHigh, k);
    MF_UNROLL for (int e = 0; e < kVec; ++e) {
      const float x = tau.v[e];
      seen->note(x);
      if (!(top > cut)) continue;
      const float score = score_at(job, k, x, total.v[e]);
      weigh_score(score, cut, top, x, low, high, &d->v[e], &shares.v[e]);
    }
  }
  MF_UNROLL for (int e = 0; e < kVec; ++e) d->v[e] = balanced(d->v[e], shares.v[e], total.v[e]);
}

// Vote, contributors, reduction. `stayed`: see any_delta.
MF_DEVICE void reduce_any(const Job& job, const Place& p, const Eight& b, Eight* d, Seen<0>* seen,
                          int32_t* stayed) {
  const mf_gpu_rule rule = job.all->rule;
  Eight elected;
  tally(job, p, b, &elected, [&](int k, const Eight& tau, const Keep& keep) {
    int n = 0;
    MF_UNROLL for (int e = 0; e < kVec; ++e) {
      seen->note(tau.v[e]);
      n += e < p.count && stays(keep, tau.v[e], e) ? 1 : 0;
    }
    if (stayed && n && job.kind(k) != MF_GPU_ALL) add_to(stayed + k, n);
  });
  const float at_zero = zero_elects(rule.zero_vote, rule.reduce, majority_of(job));
  MF_UNROLL for (int e = 0; e < kVec; ++e) elected.v[e] = elected_sign(elected.v[e], at_zero);
  Reduced<> r[kVec];
  MF_UNROLL for (int e = 0; e < kVec; ++e) begin(&r[e]);
  for (int k = 0; k < job.k; ++k) {
    Eight tau;
    load_tau(job, k, p, b, &tau);
    const Keep keep = keep_of(job, k, p, tau);
    const float weight = number(job, kWeight, k), alone = number(job, kAlone, k);
    MF_UNROLL for (int e = 0; e < kVec; ++e) {
      const float v = value_of(job, k, tau.v[e], stays(keep, tau.v[e], e));
      const bool in = contributes(rule.contributors, v, elected.v[e]);
      reduce_one(rule.reduce, rule.vote, in, rule.unweighted ? v * weight : v, weight, &r[e]);
      if (in && rule.singled) r[e].best = alone;
    }
  }
  const float least = least_sum_of(job);
  MF_UNROLL for (int e = 0; e < kVec; ++e) {
    d->v[e] = divided(rule.reduce, rule.vote, r[e].total, r[e].count, least);
    if (rule.singled && r[e].count == 1) d->v[e] *= r[e].best;
  }
}

// Any recipe, any K: the experts are read once for the vote and again (from the caches) for what
// follows. `stayed`: shared memory [K] that counts what the trims left, or null.
MF_DEVICE void any_delta(const Job& job, const Place& p, const Eight& b, Eight* d, uint32_t* top,
                         int32_t* stayed) {
  Seen<0> seen;
  seen.begin();
  if (job.all->rule.merged) {
    load_eight<true>(job.all->merged, job.all->merged_dtype, p, d);
    MF_UNROLL for (int e = 0; e < kVec; ++e) {
      d->v[e] = less_base(job, d->v[e], b.v[e]);
      seen.note(d->v[e]);
    }
    for (int k = 0; k < job.k; ++k) {
      Eight tau;
      load_tau(job, k, p, b, &tau);
      MF_UNROLL for (int e = 0; e < kVec; ++e) seen.note(tau.v[e]);
    }
    *top = seen.top > *top ? seen.top : *top;
    return;
  }
  const mf_gpu_rule rule = job.all->rule;
  if (rule.scored) {
    compete(job, p, b, d, &seen);
  } else {
    reduce_any(job, p, b, d, &seen, stayed);
  }
  if (rule.consensus != MF_CONSENSUS_NONE) {
    Eight needed;
    MF_UNROLL for (int e = 0; e < kVec; ++e) needed.v[e] = 0;
    for (int k = 0; k < job.k; ++k) {
      if (rule.consensus == MF_CONSENSUS_GIVEN) {
        const uint32_t byte = mask_byte(job.all->task_masks[k], p);
        MF_UNROLL for (int e = 0; e < kVec; ++e) needed.v[e] += (float)(byte >> e & 1u);
        continue;
      }
      Eight tau;
      load_tau(job, k, p, b, &tau);
      const float lambda = number(job, kLambda, k);
      MF_UNROLL for (int e = 0; e < kVec; ++e) needed.v[e] +=
          task_needs(tau.v[e], d->v[e], lambda) ? 1.0f : 0.0f;
    }
    MF_UNROLL for (int e = 0; e < kVec; ++e) d->v[e] =
        needed.v[e] >= min_tasks_of(job) ? d->v[e] : 0.0f;
  }
  if (rule.limited) {
    const float limit = limit_of(job);
    MF_UNROLL for (int e = 0; e < kVec; ++e) d->v[e] = limited(d->v[e], limit);
  }
  MF_UNROLL for (int e = 0; e < kVec; ++e) {
    d->v[e] *= scale_of(job);
    seen.note(d->v[e]);
  }
  *top = seen.top > *top ? seen.top : *top;
}

}  // namespace cuda
}  // namespace mf
