// Inner products of the vectors of a tensor, or of each of its rows.
#include <algorithm>

#include "../common/calibration.h"
#include "runner.h"

namespace mf {

void gram_job(Runner& runner, Prepared& p, int64_t cols, bool wide, double* gram) {
  if (p.job.numel == 0) return;
  if (cols <= 0 || p.job.numel % cols)
    throw Failure(MF_INVALID, "gram: cols must divide the tensor.");
  Work work = p.work;  // one vector an expert, and no merged one
  const int k = work.k, pairs = k * (k + 1) / 2;
  work.m = k, work.gram = true, work.wide = wide, work.powers = false, work.keep_tau = true;
  runner.begin(work);
  const int64_t rows = p.job.numel / cols;
  const auto body = [&](int64_t at, int64_t n, ThreadScratch& t, double* sums) {
    runner.kernels.gram(work, t.scratch(), at, n, sums);
  };
  const auto place = [&](int64_t row, int i, int j) { return (row * k + i) * k + j; };
  const auto read = [&](int64_t row, double* sums) {
    for (int i = 0; i < k; ++i)
      for (int j = i; j < k; ++j) sums[pair_index(i, j, k)] = gram[place(row, i, j)];
  };
  const auto write = [&](int64_t row, const double* sums) {
    for (int i = 0; i < k; ++i)
      for (int j = 0; j < k; ++j) gram[place(row, i, j)] = pair_at(sums, i, j, k);
  };
  // the same sums either way: blocks of a row, added in order
  if (cols > kBlock || rows < runner.threads * 2) {
    std::vector<double> sums((size_t)pairs);
    for (int64_t r = 0; r < rows; ++r) {
      read(r, sums.data());
      runner.ordered_sum(r * cols, cols, pairs, pairs, sums.data(), body);
      write(r, sums.data());
    }
  } else {
    const int64_t step = std::max<int64_t>(1, kBlock / 2 / cols);
    runner.parallel((rows + step - 1) / step, [&](int64_t i, ThreadScratch& t) {
      double *sums = t.doubles(2 * (size_t)pairs), *row = sums + pairs;
      for (int64_t r = i * step; r < std::min(rows, (i + 1) * step); ++r) {
        read(r, sums);
        std::fill(row, row + pairs, 0.0);
        body(r * cols, cols, t, row);
        for (int j = 0; j < pairs; ++j) sums[j] += row[j];
        write(r, sums);
      }
    });
  }
}

}  // namespace mf
