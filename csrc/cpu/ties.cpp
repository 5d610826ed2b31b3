// The last step of a search: which of the elements equal to a threshold is the last that stays. The
// equals were counted piece by piece; one piece is looked at again.
#include <algorithm>

#include "search.h"

namespace mf {
namespace {

[[noreturn]] void lost_tie() {
  throw Failure(MF_INTERNAL,
                "select: a tie was counted and not found; the data changed between passes.");
}

}  // namespace

int64_t Search::listed_equals(const Piece& piece, size_t target, uint32_t value) const {
  const uint32_t* list = workers_[(size_t)piece.worker]->counts[slot_of(target)].list;
  return std::count(list + piece.list_start, list + piece.list_end, value);
}

// The threshold is known; `needed` of the elements equal to it stay. Which piece holds the last of
// them?
void Search::locate(size_t i, uint32_t threshold, int64_t needed) {
  Target& t = targets_[i];
  t.threshold = threshold;
  t.needed = needed;
  if (!t.cut) {
    t.state = Target::kDone;
    return;
  }
  const Bracket& b = brackets_[i];
  int heavy = -1;
  for (int h = 0; h < b.heavies; ++h)
    if (b.heavy[h] == threshold) heavy = h;
  bool listed = true;
  for (const auto& ws : workers_) listed &= !ws->counts[slot_of(i)].overflowed;
  if (heavy < 0 && !listed) {  // equals were not counted by piece: one more pass that does
    set_bracket(i, threshold, threshold, std::vector<uint32_t>(4, threshold));
    return;
  }
  std::sort(t.pieces.begin(), t.pieces.end(),
            [](const Piece& x, const Piece& y) { return x.start < y.start; });
  for (const Piece& p : t.pieces) {
    const int64_t here = heavy >= 0 ? p.equal[heavy] : listed_equals(p, i, threshold);
    if (here >= t.needed) {
      t.state = Target::kRescan;
      t.rescan_start = p.start;
      t.rescan_end = p.start + p.length;
      return;
    }
    t.needed -= here;
  }
  lost_tie();
}

void Search::rescan(const Kernels& kernels, Prepared& piece, Target& target, ThreadScratch& t) {
  const int64_t first = std::max(target.rescan_start, piece.job.offset);
  const int64_t end = std::min(target.rescan_end, piece.job.offset + piece.job.numel);
  constexpr int64_t kStep = 1024;
  uint32_t bits[kStep];
  for (int64_t at = first; at < end; at += kStep) {
    const int64_t n = std::min(kStep, end - at);
    kernels.magnitudes(piece.work, t.scratch(), target.expert, at - piece.job.offset, n, bits);
    for (int64_t i = 0; i < n; ++i)
      if (bits[i] == target.threshold) target.equals.push_back(at + i);
  }
}

// The piece has been looked at again.
void Search::cut_ties(Target& t) {
  std::sort(t.equals.begin(), t.equals.end());
  if ((int64_t)t.equals.size() < t.needed) lost_tie();
  t.tie_cut = t.equals[(size_t)t.needed - 1] + 1;
  t.equals = {};
  t.state = Target::kDone;
}

// The pieces that are looked at again, without overlaps.
Search::Ranges Search::to_rescan() const {
  Ranges ranges, merged;
  for (const Target& t : targets_)
    if (t.state == Target::kRescan) ranges.push_back({t.rescan_start, t.rescan_end});
  std::sort(ranges.begin(), ranges.end());
  for (const auto& range : ranges) {
    if (!merged.empty() && range.first <= merged.back().second) {
      merged.back().second = std::max(merged.back().second, range.second);
    } else {
      merged.push_back(range);
    }
  }
  return merged;
}

}  // namespace mf
