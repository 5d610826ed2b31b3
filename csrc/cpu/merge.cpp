// Merging one job: rows where a coefficient is needed, blocks where none is.
#include <algorithm>
#include <cmath>

#include "../common/calibration.h"
#include "runner.h"

namespace mf {
namespace {

constexpr int64_t kLongRow =
    1 << 20;  // elements; a longer row is read twice instead of kept (4 MiB a thread)

// Sums of [start, start + n) of one row: fixed blocks, added in order, by one thread.
void row_sums(const Kernels& kernels, const Work& w, ThreadScratch& t, int64_t start, int64_t n,
              float* delta, double* sums) {
  const int pairs = w.m * (w.m + 1) / 2, width = pairs + w.m;
  const bool maxima = w.powers && std::isinf(w.job->calibration->p);
  std::fill(sums, sums + width, 0.0);
  if (n <= kBlock) return kernels.statistics(w, t.scratch(), start, n, delta, sums, sums + pairs);
  double* partial = sums + width;
  for (int64_t at = 0; at < n; at += kBlock) {
    std::fill(partial, partial + width, 0.0);
    kernels.statistics(w, t.scratch(), start + at, std::min(kBlock, n - at),
                       delta ? delta + at : nullptr, partial, partial + pairs);
    for (int j = 0; j < width; ++j)
      sums[j] = maxima && j >= pairs ? std::max(sums[j], partial[j]) : sums[j] + partial[j];
  }
}

size_t row_doubles(const Work& w) {  // sums, partial or chosen sums, the work of raw_coefficient
  const size_t m = (size_t)w.m, width = m * (m + 1) / 2 + m;
  return 2 * width + m + 2 * m * m;
}

// Only what belongs to the included experts and d.
void choose_included(const Work& w, const double* sums, double* chosen) {
  const int m = w.m, few = w.included + 1;
  const auto in = [&](int v) { return v == w.k || w.experts[v].included; };
  double* powers = chosen + few * (few + 1) / 2;
  for (int i = 0; i < m; ++i) {
    if (!in(i)) continue;
    for (int j = i; j < m; ++j)
      if (in(j)) *chosen++ = sums[pair_index(i, j, m)];
    *powers++ = sums[m * (m + 1) / 2 + i];
  }
}

// The factor of a row from its sums, and its share of the squared norms of the tensor. work:
// row_doubles less the sums.
float finish_row(const Work& w, const double* sums, double* work, int64_t row, double* norms2) {
  const mf_calibration* c = w.job->calibration;
  const int pairs = w.m * (w.m + 1) / 2, few = w.included + 1;
  const double* chosen = sums;
  if (w.included < w.k) {
    choose_included(w, sums, work);
    chosen = work;
    work += pairs + w.m;
  }
  const double raw = raw_coefficient(c, chosen, chosen + few * (few + 1) / 2, few, work);
  bool repaired;
  const float factor = (float)acting_factor(c, raw, chosen, few, &repaired);
  if (w.job->coefficient) w.job->coefficient[row] = (float)raw;
  if (w.job->factor) w.job->factor[row] = factor;
  if (w.job->repaired) w.job->repaired[row] = repaired;
  for (int v = 0; v < w.m; ++v) norms2[v] += sums[pair_index(v, v, w.m)];
  norms2[w.m] += sums[pairs - 1] * (double)factor * (double)factor;
  return factor;
}

void add_norms(const Work& w, const double* norms2) {
  if (!w.job->norms2) return;
  for (int v = 0; v <= w.m; ++v) w.job->norms2[v] += norms2[v];
}

void merge_rows(Runner& runner, Prepared& p, int64_t start, int64_t n) {
  const int64_t cols = p.job.calibration->cols;
  const int64_t first_row = start / cols, rows = n / cols;
  const int64_t step = std::max<int64_t>(1, kBlock / 2 / cols), tasks = (rows + step - 1) / step;
  const int64_t width = p.work.m + 1;
  constexpr int64_t kWave = 4096;  // tasks whose norms wait to be added in order
  for (int64_t first = 0; first < tasks; first += kWave) {
    const int64_t count = std::min(kWave, tasks - first);
    std::vector<double> norms2((size_t)(count * width), 0.0);
    runner.parallel(count, [&](int64_t i, ThreadScratch& t) {
      float* delta = t.row(cols);
      double* sums = t.doubles(row_doubles(p.work));
      double* work = sums + p.pair_count() + p.work.m;
      const int64_t from = first_row + (first + i) * step,
                    end = std::min(first_row + rows, from + step);
      for (int64_t r = from; r < end; ++r) {
        row_sums(runner.kernels, p.work, t, r * cols, cols, delta, sums);
        const float factor = finish_row(p.work, sums, work, r, &norms2[(size_t)(i * width)]);
        runner.kernels.apply(p.work, t.scratch(), r * cols, cols, delta, factor);
      }
    });
    for (int64_t i = 0; i < count; ++i) add_norms(p.work, &norms2[(size_t)(i * width)]);
  }
}

void merge_flat(Runner& runner, const Work& w, int64_t start, int64_t n, float factor) {
  const int64_t step = kBlock / 2;
  runner.parallel((n + step - 1) / step, [&](int64_t i, ThreadScratch& t) {
    runner.kernels.merge(w, t.scratch(), start + i * step, std::min(step, n - i * step), factor);
  });
}

// A row that is too long to keep, or the whole tensor as one row: one read for the sums, one to
// merge.
void merge_twice(Runner& runner, Prepared& p, int64_t start, int64_t n, int64_t row) {
  const int pairs = p.pair_count(), width = pairs + p.work.m;
  const int added = p.work.powers && std::isinf(p.job.calibration->p) ? pairs : width;
  std::vector<double> sums((size_t)width, 0.0), work(row_doubles(p.work));
  with_ranked_masks(runner, p, start, n, 1, [&](int64_t from, int64_t len) {
    runner.ordered_sum(from, len, width, added, sums.data(),
                       [&](int64_t at, int64_t size, ThreadScratch& t, double* partial) {
                         runner.kernels.statistics(p.work, t.scratch(), at, size, nullptr, partial,
                                                   partial + pairs);
                       });
  });
  std::vector<double> norms2((size_t)p.work.m + 1, 0.0);
  const float factor = finish_row(p.work, sums.data(), work.data(), row, norms2.data());
  add_norms(p.work, norms2.data());
  runner.finish(p, true);
  runner.begin(p.work);
  Work merging = p.work;  // no statistics this time
  merging.m = 0;
  merging.keep_tau = merging.compares();
  with_ranked_masks(runner, p, start, n, 1, [&](int64_t from, int64_t len) {
    merging.mask_start = p.work.mask_start;
    merge_flat(runner, merging, from, len, factor);
  });
  runner.finish(p, false);
  runner.begin(p.work);
}

}  // namespace

void merge_job(Runner& runner, Prepared& p) {
  const mf_calibration* c = p.job.calibration;
  for (int k = 0; k < p.work.k; ++k) p.job.experts[k].kept = 0;
  if (p.job.norms2) std::fill(p.job.norms2, p.job.norms2 + p.work.k + 2, 0.0);
  if (p.job.numel == 0) return;
  runner.begin(p.work);
  if (c && c->per_tensor) {
    merge_twice(runner, p, 0, p.job.numel, 0);
    for (int64_t r = 1; r < c->rows; ++r) {
      if (p.job.coefficient) p.job.coefficient[r] = p.job.coefficient[0];
      if (p.job.factor) p.job.factor[r] = p.job.factor[0];
      if (p.job.repaired) p.job.repaired[r] = p.job.repaired[0];
    }
  } else if (c && c->cols > kLongRow) {
    for (int64_t r = 0; r < c->rows; ++r) merge_twice(runner, p, r * c->cols, c->cols, r);
  } else {
    with_ranked_masks(runner, p, 0, p.job.numel, c ? c->cols : 1, [&](int64_t start, int64_t n) {
      if (c) {
        merge_rows(runner, p, start, n);
      } else {
        merge_flat(runner, p.work, start, n, 1);
      }
    });
    runner.finish(p, true);
  }
}

void row_stats_job(Runner& runner, Prepared& p, double* gram, double* dots, double* norm2) {
  const int64_t cols = p.job.calibration->cols, rows = p.job.calibration->rows;
  const int m = p.work.m, k = m - 1, pairs = p.pair_count();
  runner.begin(p.work);
  const auto write = [&](int64_t r, const double* sums) {
    for (int i = 0; i < k; ++i) {
      for (int j = 0; j < k; ++j) gram[(r * k + i) * k + j] = pair_at(sums, i, j, m);
      dots[r * k + i] = sums[pair_index(i, k, m)];
    }
    norm2[r] = sums[pair_index(k, k, m)];
  };
  if (cols > kLongRow) {
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<double> sums((size_t)pairs, 0.0);
      runner.ordered_sum(r * cols, cols, pairs, pairs, sums.data(),
                         [&](int64_t at, int64_t size, ThreadScratch& t, double* partial) {
                           runner.kernels.statistics(p.work, t.scratch(), at, size, nullptr,
                                                     partial, nullptr);
                         });
      write(r, sums.data());
    }
    return;
  }
  const int64_t step = std::max<int64_t>(1, kBlock / 2 / std::max<int64_t>(1, cols));
  runner.parallel((rows + step - 1) / step, [&](int64_t i, ThreadScratch& t) {
    double* sums = t.doubles(row_doubles(p.work));
    for (int64_t r = i * step; r < std::min(rows, (i + 1) * step); ++r) {
      row_sums(runner.kernels, p.work, t, r * cols, cols, nullptr, sums);
      write(r, sums);
    }
  });
}

}  // namespace mf
