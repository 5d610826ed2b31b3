// Keep masks of ranked trims (DELLA): the keep probability of an element grows with the rank of
// |tau| in its row.
//
// An element stays where its random word lies below a bound that grows with its rank. A histogram
// of the row gives each element a range of ranks, and for most the bounds at both ends of that
// range say the same; only the bins of the others are ranked. 34 bytes an element
// of one row are held per thread, and one byte an element and expert of a range of rows.
#include <algorithm>
#include <cmath>

#include "radix.h"
#include "runner.h"

namespace mf {
namespace {

constexpr int64_t kMaskBytes = 8 << 20;  // of all experts together, unless one row needs more

constexpr int kRankBins = 2048;
constexpr int kBinShift = 16;  // 128 bins to a power of two
constexpr double kWords = 4294967296.0;

struct RowBuffers {
  Buffer<uint32_t> bits, words, keys, members, order, work;
  Buffer<uint16_t> bins;
  int64_t room = 0;
  void grow(int64_t n) {
    if (n <= room) return;
    for (Buffer<uint32_t>* b : {&bits, &words, &keys, &members, &order}) b->resize((size_t)n);
    work.resize((size_t)(3 * n));
    bins.resize((size_t)n);
    room = n;
  }
};

// Words below it keep the element of a rank.
struct Bounds {
  double low, span, last;
  Bounds(const mf_expert& e, int64_t cols)
      : low(e.density - e.epsilon), span(2 * e.epsilon), last((double)(cols - 1)) {}
  uint64_t operator()(int64_t rank) const {
    const double bound = (low + span * (double)rank / last) * kWords;
    return bound <= 0 ? 0 : (uint64_t)std::min(bound, kWords);  // rounded down
  }
};

struct RankBin {
  uint64_t least, most;  // bounds at its first and last rank
};

// Exact ranks in the marked bins, where some words lie between the bounds of the bin's ends. A bin
// of one value, common in 16-bit checkpoints, is ranked by index as it stands.
void decide_by_rank(const Bounds& bound, const RankBin* table, const uint8_t* marked,
                    const int64_t* first, int64_t cols, RowBuffers& b, uint8_t* mask) {
  const uint16_t* bins = b.bins.get();
  uint32_t* members = b.members.get();
  int64_t n = 0;
  for (int64_t i = 0; i < cols; ++i) members[n] = (uint32_t)i, n += marked[bins[i]];
  uint32_t value[kRankBins];
  uint8_t mixed[kRankBins] = {};
  int64_t next[kRankBins];
  for (int64_t j = n - 1; j >= 0; --j) value[bins[members[j]]] = b.bits[members[j]];
  for (int64_t j = 0; j < n; ++j) {
    const uint32_t i = members[j];
    mixed[bins[i]] |= b.bits[i] != value[bins[i]];
    next[bins[i]] = first[bins[i]];
  }
  const auto decide = [&](uint32_t i, int64_t rank) {
    if (!mask[i] && b.words[i] < table[bins[i]].most) mask[i] = b.words[i] < bound(rank);
  };
  int64_t left = 0;
  for (int64_t j = 0; j < n; ++j) {
    const uint32_t i = members[j];
    if (mixed[bins[i]]) {
      members[left] = i, b.keys[left++] = b.bits[i];
    } else {
      decide(i, next[bins[i]]++);
    }
  }
  sort_order(b.keys.get(), left, b.order.get(), b.work.get());
  for (int64_t j = 0; j < left; ++j) {
    const uint32_t i = members[b.order[j]];
    decide(i, next[bins[i]]++);
  }
}

void mask_row(const Kernels& kernels, const Work& w, Scratch& s, int k, int64_t start, int64_t cols,
              RowBuffers& b, uint8_t* mask) {
  const mf_expert& e = w.experts[k];
  b.grow(cols);
  kernels.magnitudes(w, s, k, start, cols, b.bits.get());
  kernels.words((uint64_t)(w.job->offset + start), cols, e.stream, w.job->seed, b.words.get());
  if (cols == 1) {
    mask[0] = b.words[0] < std::floor(e.density * kWords);
    return;
  }
  const uint32_t* bits = b.bits.get();
  const uint32_t* words = b.words.get();
  uint16_t* bins = b.bins.get();
  const uint32_t top = *std::max_element(bits, bits + cols);
  constexpr uint32_t kSpan = (uint32_t)(kRankBins - 1) << kBinShift;
  const uint32_t least = top > kSpan ? top - kSpan : 0;  // all below share bin 0
  int64_t first[kRankBins + 1] = {};
  for (int64_t i = 0; i < cols; ++i) {
    const uint32_t above = std::max(bits[i], least) - least;
    bins[i] = (uint16_t)((above + ((1u << kBinShift) - 1)) >> kBinShift);
    ++first[bins[i] + 1];
  }
  const Bounds bound(e, cols);
  RankBin table[kRankBins];
  for (int bin = 0; bin < kRankBins; ++bin) {
    const int64_t here = first[bin + 1];
    first[bin + 1] += first[bin];
    if (here) table[bin] = {bound(first[bin]), bound(first[bin] + here - 1)};
  }
  uint8_t marked[kRankBins] = {};
  uint8_t undecided = 0;
  for (int64_t i = 0; i < cols; ++i) {
    const RankBin& bin = table[bins[i]];
    const uint8_t keep = words[i] < bin.least;
    const uint8_t open = (uint8_t)(words[i] < bin.most) ^ keep;  // no branch: half of them miss
    mask[i] = keep;
    marked[bins[i]] |= open, undecided |= open;
  }
  if (undecided) decide_by_rank(bound, table, marked, first, cols, b, mask);
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
