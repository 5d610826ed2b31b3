// Keep masks of ranked trims (DELLA): the keep probability of an element grows with the rank of
// |tau| in its row.
//
// An element stays where its random word lies below a bound that grows with its rank. A histogram
// of the row gives each element a range of ranks, and for most the bounds at both ends of that
// range say the same; only the others are ranked, within their bin. 42 bytes an element
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
constexpr int64_t kScan = 512;  // elements of a bin up to which one of them is ranked by counting

struct RowBuffers {
  Buffer<uint32_t> bits, words, grouped, places, open, ranks, order, work;
  Buffer<uint16_t> bins;
  int64_t room = 0;
  void grow(int64_t n) {
    if (n <= room) return;
    for (Buffer<uint32_t>* b : {&bits, &words, &grouped, &places, &open, &ranks, &order})
      b->resize((size_t)n);
    work.resize((size_t)(3 * n));
    bins.resize((size_t)n);
    room = n;
  }
};

// Words below it keep the element of a rank. Fits 32 bits, as density + epsilon is below 1.
struct Bounds {
  double low, span, last;
  Bounds(const mf_expert& e, int64_t cols)
      : low(e.density - e.epsilon), span(2 * e.epsilon), last((double)(cols - 1)) {}
  uint32_t operator()(int64_t rank) const {
    const double bound = (low + span * (double)rank / last) * kWords;
    return bound <= 0 ? 0 : (uint32_t)(int64_t)std::min(bound, kWords - 1);  // rounded down
  }
};

struct RankBin {
  uint32_t least, most;  // bounds at its first and last rank
};

// Magnitudes are patterns of 31 bits, so they may be compared as signed numbers.
int64_t count_up_to(const int32_t* x, int64_t n, int32_t bits) {
  int32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += x[i] <= bits;
  return count;
}

// Exact ranks of the elements whose words lie between the bounds at the ends of their bin: all are
// grouped by bin, in order, and ranked within theirs. A bin of one value, common in 16-bit
// checkpoints, is ranked as it stands; a large one of several is sorted.
void decide_by_rank(const Bounds& bound, const uint32_t* first, int64_t cols, int64_t opened,
                    RowBuffers& b, uint8_t* mask) {
  const uint16_t* bins = b.bins.get();
  uint32_t next[kRankBins];
  std::copy(first, first + kRankBins, next);
  for (int64_t i = 0; i < cols; ++i) {
    const uint32_t place = next[bins[i]]++;
    b.places[(size_t)i] = place, b.grouped[place] = b.bits[(size_t)i];
  }
  uint8_t sorted[kRankBins] = {};
  const int32_t* grouped = reinterpret_cast<const int32_t*>(b.grouped.get());
  for (int64_t j = 0; j < opened; ++j) {
    const uint32_t i = b.open[(size_t)j], bin = bins[i], place = b.places[i];
    const uint32_t start = first[bin], end = first[bin + 1];
    const int32_t bits = (int32_t)b.bits[i];
    int64_t rank = place;
    if (end - start <= kScan) {
      rank = start + count_up_to(grouped + start, place - start, bits) +
             count_up_to(grouped + place, end - place, bits - 1);
    } else {
      if (!sorted[bin]) {
        const bool one_value = std::all_of(grouped + start, grouped + end,
                                           [&](int32_t x) { return x == grouped[start]; });
        sorted[bin] = one_value ? 1 : 2;
        if (!one_value) {
          sort_order(b.grouped.get() + start, end - start, b.order.get(), b.work.get());
          for (uint32_t r = 0; r < end - start; ++r) b.ranks[start + b.order[r]] = start + r;
        }
      }
      if (sorted[bin] == 2) rank = b.ranks[place];
    }
    mask[i] = b.words[i] < bound(rank);
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
  const int32_t* bits = reinterpret_cast<const int32_t*>(b.bits.get());
  const uint32_t* words = b.words.get();
  uint16_t* bins = b.bins.get();
  int32_t top = 0;
  for (int64_t i = 0; i < cols; ++i) top = std::max(top, bits[i]);
  constexpr int32_t kSpan = (kRankBins - 1) << kBinShift;
  const int32_t least = std::max(top - kSpan, 0);  // all below share bin 0
  for (int64_t i = 0; i < cols; ++i)
    bins[i] = (uint16_t)((uint32_t)(std::max(bits[i], least) - least + ((1 << kBinShift) - 1)) >>
                         kBinShift);
  // two tables: neighbours of one value, common in 16-bit checkpoints, do not wait for each other
  uint32_t first[kRankBins + 1] = {}, others[kRankBins + 1] = {};
  int64_t i = 0;
  for (; i + 1 < cols; i += 2) ++first[bins[i] + 1], ++others[bins[i + 1] + 1];
  if (i < cols) ++first[bins[i] + 1];
  const Bounds bound(e, cols);
  RankBin table[kRankBins];
  for (int bin = 0; bin < kRankBins; ++bin) {
    const uint32_t here = first[bin + 1] + others[bin + 1];
    first[bin + 1] = first[bin] + here;
    if (here) table[bin] = {bound(first[bin]), bound((int64_t)first[bin] + here - 1)};
  }
  int64_t opened = 0;
  uint32_t* open = b.open.get();
  for (i = 0; i < cols; ++i) {
    const RankBin& bin = table[bins[i]];
    const uint8_t keep = words[i] < bin.least;
    mask[i] = keep;
    open[opened] = (uint32_t)i;  // no branch: half of them miss
    opened += (uint8_t)(words[i] < bin.most) ^ keep;
  }
  if (opened) decide_by_rank(bound, first, cols, opened, b, mask);
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
