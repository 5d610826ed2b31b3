// Keep masks of ranked trims (DELLA): the keep probability of an element grows with the rank of
// |tau| in its row.
//
// Each row is sorted once per expert (three radix passes over 11-bit digits, about 8 ns an element
// here, AMD Zen 3, 2026); 16 bytes an element of one row are held per thread, and one byte an
// element and expert of a range of rows.
#include <algorithm>
#include <cmath>

#include "radix.h"
#include "runner.h"

namespace mf {
namespace {

constexpr int64_t kMaskBytes = 8 << 20;  // of all experts together, unless one row needs more

struct RowBuffers {
  Buffer<uint32_t> bits, order, words, work;
  int64_t room = 0;
  void grow(int64_t n) {
    if (n <= room) return;
    bits.resize((size_t)n), order.resize((size_t)n), words.resize((size_t)n),
        work.resize((size_t)(3 * n));
    room = n;
  }
};

void mask_row(const Kernels& kernels, const Work& w, Scratch& s, int k, int64_t start, int64_t cols,
              RowBuffers& b, uint8_t* mask) {
  const mf_expert& e = w.experts[k];
  b.grow(cols);
  kernels.magnitudes(w, s, k, start, cols, b.bits.get());
  kernels.words((uint64_t)(w.job->offset + start), cols, e.stream, w.job->seed, b.words.get());
  if (cols == 1) {
    mask[0] = b.words[0] < std::floor(e.density * 4294967296.0);
    return;
  }
  sort_order(b.bits.get(), cols, b.order.get(), b.work.get());
  const double low = e.density - e.epsilon, span = 2 * e.epsilon, last = (double)(cols - 1);
  for (int64_t rank = 0; rank < cols; ++rank) {
    const uint32_t i = b.order[(size_t)rank];
    const double p = low + span * (double)rank / last;
    mask[i] = (double)b.words[i] < std::floor(p * 4294967296.0);
  }
}

}  // namespace

void with_ranked_masks(Runner& runner, Prepared& p, int64_t start, int64_t n, int64_t unit,
                       const std::function<void(int64_t, int64_t)>& body) {
  if (!p.ranked) {
    p.work.mask_start = 0;
    body(start, n);
    return;
  }
  std::vector<int> experts;
  for (int k = 0; k < p.work.k; ++k)
    if (p.job.experts[k].trim == MF_TRIM_RANKED) experts.push_back(k);
  const int64_t cols = p.job.rank_cols,
                whole = unit;  // rows that stick out are ranked on both sides
  const int64_t fit =
      std::max(kMaskBytes / (int64_t)experts.size(), 2 * cols);  // mostly whole rows
  const int64_t range = std::max<int64_t>(1, fit / whole) * whole;
  Buffer<uint8_t> bytes((size_t)(std::min(range, n) + 2 * cols) * experts.size());
  std::vector<RowBuffers> buffers((size_t)runner.threads);
  const int64_t end = start + n;
  for (int64_t at = start; at < end;) {
    const int64_t len = std::min(range, end - at);
    const int64_t first_row = at / cols, rows = (at + len + cols - 1) / cols - first_row;
    for (size_t x = 0; x < experts.size(); ++x)
      p.masks[(size_t)experts[x]] = bytes.get() + (int64_t)x * rows * cols;
    p.work.mask_start = first_row * cols;
    const int64_t tasks = rows * (int64_t)experts.size();
    runner.parallel(tasks, [&](int64_t i, ThreadScratch& t) {
      const int k = experts[(size_t)(i % (int64_t)experts.size())];
      const int64_t row = first_row + i / (int64_t)experts.size();
      RowBuffers& b = buffers[(size_t)runner.index_of(t)];
      mask_row(runner.kernels, p.work, t.scratch(), k, row * cols, cols, b,
               const_cast<uint8_t*>(p.masks[(size_t)k]) + (row - first_row) * cols);
    });
    body(at, len);
    at += len;
  }
  for (const int k : experts) p.masks[(size_t)k] = nullptr;
}

}  // namespace mf
