// What has to be known of the experts together: energies, who holds what alone, the bounds of a
// trim by variance.
#include <algorithm>

#include "runner.h"

namespace mf {
namespace {

// Values whatever the reduction; no statistics.
Work values_of(const Prepared& p) {
  Work w = p.work;
  w.linear = false;
  w.m = 0, w.keep_tau = w.variance;
  return w;
}

}  // namespace

void energies(Runner& runner, Prepared& p, double* squares) {
  Work w = values_of(p);
  const int64_t all = (p.job.numel + kBlock - 1) / kBlock;
  std::fill(squares, squares + all * w.k, 0.0);
  runner.begin(w);
  with_ranked_masks(runner, p, 0, p.job.numel, kBlock, [&](int64_t start, int64_t n) {
    w.mask_start = p.work.mask_start;
    runner.parallel((n + kBlock - 1) / kBlock, [&](int64_t i, ThreadScratch& t) {
      const int64_t at = start + i * kBlock;
      runner.kernels.energies(w, t.scratch(), at, std::min(kBlock, start + n - at),
                              squares + (start / kBlock + i) * w.k);
    });
  });
}

void holders(Runner& runner, Prepared& p, int64_t* alone, int64_t* shared) {
  Work w = values_of(p);
  std::fill(alone, alone + w.k, 0);
  std::fill(shared, shared + w.k, 0);
  runner.begin(w);
  with_ranked_masks(runner, p, 0, p.job.numel, 1, [&](int64_t start, int64_t n) {
    w.mask_start = p.work.mask_start;
    const size_t k = (size_t)w.k;
    std::vector<int64_t> counts(2 * k * (size_t)runner.threads, 0);
    runner.parallel((n + kBlock - 1) / kBlock, [&](int64_t i, ThreadScratch& t) {
      int64_t* own = &counts[2 * k * (size_t)runner.index_of(t)];
      runner.kernels.holders(w, t.scratch(), start + i * kBlock, std::min(kBlock, n - i * kBlock),
                             own, own + k);
    });
    for (size_t i = 0; i < counts.size(); ++i) (i / k % 2 ? shared : alone)[i % k] += counts[i];
  });
}

void score_counts(Runner& runner, Prepared& p, const uint32_t* prefix, int64_t* counts,
                  uint32_t* top) {
  constexpr int64_t kMost = (int64_t)1 << 30;  // elements whose counts surely fit
  Work w = values_of(p);
  const size_t k = (size_t)w.k, room = k * 65536;
  for (int64_t start = 0; start < p.job.numel; start += kMost) {
    const int64_t n = std::min(kMost, p.job.numel - start);
    std::vector<uint32_t> own(room * (size_t)runner.threads, 0),
        largest(k * (size_t)runner.threads, 0);
    runner.begin(w);
    runner.parallel((n + kBlock - 1) / kBlock, [&](int64_t i, ThreadScratch& t) {
      const size_t index = (size_t)runner.index_of(t);
      runner.kernels.scores(w, t.scratch(), start + i * kBlock, std::min(kBlock, n - i * kBlock),
                            prefix, &own[index * room], &largest[index * k]);
    });
    for (size_t i = 0; i < own.size(); ++i) counts[i % room] += own[i];
    for (size_t i = 0; i < largest.size(); ++i) top[i % k] = std::max(top[i % k], largest[i]);
  }
}

void select_variance(Runner& runner, Prepared& p, double fraction, float* threshold,
                     int64_t* tie_cut) {
  const int64_t n = p.job.numel;
  if (n != p.job.total)
    throw Failure(MF_INVALID, "select: expected the whole tensor, got a part of it.");
  Buffer<float> found((size_t)std::max<int64_t>(n, 1));
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  std::vector<int64_t> positive((size_t)blocks, 0);
  runner.begin(p.work);
  runner.parallel(blocks, [&](int64_t i, ThreadScratch& t) {
    const int64_t at = i * kBlock;
    positive[(size_t)i] = runner.kernels.variances(p.work, t.scratch(), at,
                                                   std::min(kBlock, n - at), found.get() + at);
  });
  int64_t differ = 0;
  for (const int64_t x : positive) differ += x;
  mf_expert of_all{};  // the variances as one task vector
  of_all.data = found.get(), of_all.dtype = MF_F32, of_all.trim = MF_TRIM_BAND;
  of_all.count = (int64_t)((double)differ * fraction), of_all.top_count = -1;
  mf_job job{};
  job.experts = &of_all, job.num_experts = 1;
  job.numel = job.total = n;
  job.tie_rule = MF_TIES_EXACT;
  Prepared search(job);
  select_job(runner, search);
  *threshold = of_all.threshold, *tie_cut = of_all.tie_cut;
}

}  // namespace mf
