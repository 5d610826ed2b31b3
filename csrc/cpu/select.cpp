// What has to be known about a whole tensor before it can be merged: thresholds, factors, the
// majority sign.
#include <algorithm>
#include <cmath>

#include "../common/numeric.h"
#include "runner.h"
#include "search.h"

namespace mf {
namespace {

constexpr int64_t kInCache =
    kBlock;  // elements; up to here the magnitudes of an expert are kept in memory
constexpr double kTinyNorm = 1e-7;  // below it a norm is not restored

// Index of the nth (from 1) element equal to `value`.
int64_t nth_equal(const uint32_t* bits, int64_t n, uint32_t value, int64_t nth) {
  constexpr int64_t kChunk = 128;
  for (int64_t at = 0; at < n; at += kChunk) {
    const int64_t end = std::min(n, at + kChunk);
    uint32_t here = 0;
    for (int64_t i = at; i < end; ++i) here += bits[i] == value;
    if (here < nth) {
      nth -= here;
      continue;
    }
    for (int64_t i = at; i < end; ++i)
      if (bits[i] == value && --nth == 0) return i;
  }
  return -1;
}

// (threshold, tie cut) that keep the `count` largest of bits[n].
void cut_at(const Kernels& kernels, const uint32_t* bits, int64_t n, int64_t count, int tie_rule,
            uint32_t* work, float* threshold, int64_t* tie_cut) {
  *threshold = float_of(kInfBits), *tie_cut = 0;
  if (count <= 0) return;
  if (count > n)
    throw Failure(MF_INVALID, "select: counts must lie between 0 and the number of elements.");
  int64_t above = 0;
  const uint32_t value = kernels.kth_largest(bits, n, count, work, &above);
  *threshold = float_of(value);
  if (tie_rule == MF_TIES_KEEP_ALL) *tie_cut = n;
  if (tie_rule == MF_TIES_EXACT) *tie_cut = nth_equal(bits, n, value, count - above) + 1;
}

void select_in_cache(Runner& runner, Prepared& p) {
  const int64_t n = p.job.numel;
  runner.parallel(p.work.k, [&](int64_t k, ThreadScratch& t) {
    mf_expert& e = p.job.experts[k];
    if (e.trim != MF_TRIM_BAND) return;
    uint32_t* bits = reinterpret_cast<uint32_t*>(t.row(2 * n + 64));
    uint32_t* work = bits + n;
    runner.kernels.magnitudes(p.work, t.scratch(), (int)k, 0, n, bits);
    const bool band = e.top_count >= 0;
    const int rule = band ? (int)MF_TIES_EXACT : p.job.tie_rule;
    cut_at(runner.kernels, bits, n, e.count, rule, work, &e.threshold, &e.tie_cut);
    if (band)
      cut_at(runner.kernels, bits, n, e.top_count, MF_TIES_EXACT, work, &e.top_threshold,
             &e.top_tie_cut);
  });
}

void select_thresholds(Runner& runner, Prepared& p) {
  bool any = false;
  for (int k = 0; k < p.work.k; ++k) {
    mf_expert& e = p.job.experts[k];
    if (e.trim != MF_TRIM_ABOVE) e.threshold = 0;
    e.tie_cut = e.trim == MF_TRIM_ABOVE ? 0 : p.job.total;
    e.top_threshold = float_of(kInfBits), e.top_tie_cut = 0;
    any |= e.trim == MF_TRIM_BAND;
  }
  if (!any || p.job.numel == 0) return;
  if (p.job.numel != p.job.total)
    throw Failure(MF_INVALID, "select: expected the whole tensor, got a part of it.");
  if (p.job.numel <= kInCache) return select_in_cache(runner, p);
  Search search(p.job);
  search.sample(runner, p);
  mf_job part = p.job;
  while (!search.finished()) {
    const auto ranges = search.wants();
    for (const auto& range : ranges) {
      if (range.second - range.first == p.job.numel) {
        search.feed(runner, p);
        continue;
      }
      std::vector<mf_expert> experts(p.job.experts, p.job.experts + p.work.k);
      const auto shift = [&](const void* data, int dtype) {
        return data ? static_cast<const char*>(data) + range.first * (dtype == MF_F32 ? 4 : 2)
                    : nullptr;
      };
      for (mf_expert& e : experts) e.data = shift(e.data, e.dtype);
      part.base = shift(p.job.base, p.job.base_dtype);
      part.experts = experts.data();
      part.offset = range.first, part.numel = range.second - range.first;
      part.calibration = nullptr;
      Prepared piece(part);
      search.feed(runner, piece);
    }
  }
  search.result(p.job.experts);
}

// factor = norm before / norm after the trim, of the whole tensor.
void select_factors(Runner& runner, Prepared& p) {
  const int k = p.work.k;
  const int64_t blocks = (p.job.numel + kBlock - 1) / kBlock;
  const bool maxima = p.job.rescale == MF_RESCALE_LINF;
  std::vector<double> before((size_t)(blocks * k)), after((size_t)(blocks * k));
  for (int i = 0; i < k; ++i) p.job.experts[i].factor = 1;
  norm_sums(runner, p, before.data(), after.data(), nullptr);
  for (int i = 0; i < k; ++i) {
    double x = 0, y = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const double u = before[(size_t)(b * k + i)], v = after[(size_t)(b * k + i)];
      x = maxima ? std::max(x, u) : x + u;
      y = maxima ? std::max(y, v) : y + v;
    }
    if (p.job.rescale == MF_RESCALE_L2) x = std::sqrt(x), y = std::sqrt(y);
    if (p.job.experts[i].trim != MF_TRIM_NONE && x >= kTinyNorm && y >= kTinyNorm)
      p.job.experts[i].factor = (float)(x / y);
  }
}

}  // namespace

void norm_sums(Runner& runner, Prepared& p, double* before, double* after, double* squares) {
  const int k = p.work.k;
  const int64_t all = (p.job.numel + kBlock - 1) / kBlock;
  std::fill(before, before + all * k, 0.0);
  std::fill(after, after + all * k, 0.0);
  if (squares) std::fill(squares, squares + all * k, 0.0);
  runner.begin(p.work);
  with_ranked_masks(runner, p, 0, p.job.numel, kBlock, [&](int64_t start, int64_t n) {
    const int64_t first = start / kBlock, blocks = (n + kBlock - 1) / kBlock;
    runner.parallel(blocks, [&](int64_t i, ThreadScratch& t) {
      const int64_t at = start + i * kBlock;
      runner.kernels.norms(p.work, t.scratch(), at, std::min(kBlock, start + n - at),
                           before + (first + i) * k, after + (first + i) * k,
                           squares ? squares + (first + i) * k : nullptr);
    });
  });
}

int64_t vote_sum(Runner& runner, Prepared& p) {
  Work voting = p.work;  // values, whatever the reduction; no statistics
  voting.linear = false;
  voting.m = 0, voting.keep_tau = p.work.variance;
  int64_t sum = 0;
  runner.begin(voting);
  with_ranked_masks(runner, p, 0, p.job.numel, 1, [&](int64_t start, int64_t n) {
    voting.mask_start = p.work.mask_start;
    const int64_t blocks = (n + kBlock - 1) / kBlock;
    std::vector<int64_t> partial((size_t)blocks, 0);
    runner.parallel(blocks, [&](int64_t i, ThreadScratch& t) {
      partial[(size_t)i] = runner.kernels.votes(voting, t.scratch(), start + i * kBlock,
                                                std::min(kBlock, n - i * kBlock));
    });
    for (const int64_t x : partial) sum += x;
  });
  return sum;
}

void select_job(Runner& runner, Prepared& p) {
  if (p.job.selected || p.job.merged) return;
  runner.begin(p.work);
  select_thresholds(runner, p);
  const bool whole = p.job.numel == p.job.total;
  bool trimmed = false;
  for (int k = 0; k < p.work.k; ++k) trimmed |= p.job.experts[k].trim != MF_TRIM_NONE;
  const bool majority = p.job.vote != MF_VOTE_NONE && p.job.zero_vote == MF_ZERO_MAJORITY;
  const bool factors = p.job.rescale != MF_RESCALE_NONE && trimmed;
  if ((majority || factors) && !whole)
    throw Failure(MF_INVALID, "select: expected the whole tensor, got a part of it.");
  if (factors) select_factors(runner, p);
  p.job.majority = 0;
  if (majority) {
    const int64_t sum = vote_sum(runner, p);
    p.job.majority = (sum > 0) - (sum < 0);
  }
}

}  // namespace mf
