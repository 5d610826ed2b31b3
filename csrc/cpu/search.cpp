#include "search.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../common/numeric.h"

namespace mf {
namespace {

constexpr int64_t kSampleMost = 32768;   // magnitudes per expert
constexpr int kSampleRun = 16;           // taken side by side
constexpr int64_t kListBytes = 4 << 20;  // of one worker's lists
constexpr int64_t kPiece = 16384;        // elements among which the last tie is looked for
constexpr int64_t kMostPieces = 4096;

uint64_t mix(uint64_t x) {  // splitmix64: sample places must not share a period with the data
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

}  // namespace

Search::Search(const mf_job& job) : total_(job.total), experts_(job.num_experts) {
  piece_length_ = kPiece;
  while (total_ / piece_length_ > kMostPieces) piece_length_ *= 2;
  samples_.resize((size_t)experts_);
  for (int k = 0; k < experts_; ++k) {
    const mf_expert& e = job.experts[k];
    if (e.trim != MF_TRIM_BAND) continue;
    if (e.count < 0 || e.count > total_ || e.top_count > e.count)
      throw Failure(MF_INVALID, "select: counts must lie between 0 and the number of elements.");
    const auto add = [&](bool top, int64_t count, int rule) {
      Target t{};
      t.expert = k, t.top = top, t.count = count;
      t.cut = rule == MF_TIES_EXACT;
      t.state = Target::kScan;
      t.tie_cut = rule == MF_TIES_KEEP_ALL ? total_ : 0;
      if (count == 0) t.state = Target::kDone, t.threshold = kInfBits, t.tie_cut = 0;
      targets_.push_back(std::move(t));
    };
    add(false, e.count, e.top_count < 0 ? job.tie_rule : (int)MF_TIES_EXACT);
    if (e.top_count >= 0) add(true, e.top_count, MF_TIES_EXACT);
  }
  brackets_.resize(targets_.size());
  for (size_t i = 0; i < targets_.size(); ++i)
    if (targets_[i].state == Target::kScan) wants_ = {{0, total_}};
  if (total_ == 0) wants_.clear();
  wanted_ = total_;
}

void Search::sample(Runner& runner, Prepared& piece) {
  if (sampled_ || piece.job.numel == 0) return;
  runner.begin(piece.work);
  std::vector<bool> wanted((size_t)experts_, false);
  for (const Target& t : targets_)
    if (t.state == Target::kScan) wanted[(size_t)t.expert] = true;
  const int64_t n = piece.job.numel;
  const int64_t most =
      std::clamp((int64_t)(0.5 * std::pow((double)n, 2.0 / 3)), (int64_t)kSampleRun, kSampleMost);
  const int64_t runs = std::max<int64_t>(1, most / kSampleRun), stride = n / runs;
  runner.parallel(experts_, [&](int64_t k, ThreadScratch& t) {
    std::vector<uint32_t>& out = samples_[(size_t)k];
    if (!wanted[(size_t)k] || (int64_t)out.size() >= 2 * kSampleMost) return;
    const int64_t length = std::min<int64_t>(kSampleRun, n);
    for (int64_t r = 0; r < runs; ++r) {
      const int64_t room = std::max<int64_t>(1, stride - length + 1);
      const int64_t at =
          std::min(r * stride + (int64_t)(mix((uint64_t)r) % (uint64_t)room), n - length);
      out.resize(out.size() + (size_t)length);
      runner.kernels.magnitudes(piece.work, t.scratch(), (int)k, at, length,
                                &out[out.size() - (size_t)length]);
    }
  });
}

void Search::set_bracket(size_t i, uint32_t low, uint32_t high,
                         const std::vector<uint32_t>& sorted) {
  Bracket& b = brackets_[i];
  b.low = low, b.high = high, b.expert = targets_[i].expert;
  b.shift = 0;
  while (((uint64_t)(high - low) >> b.shift) >= kBins) ++b.shift;
  b.heavies = 0;
  std::memset(b.owner, kHeavy, sizeof b.owner);
  std::fill(b.heavy, b.heavy + kHeavy + 1, ~0u);  // no magnitude
  // values that the sample shows four times or more, the most frequent first, one per bin
  std::vector<std::pair<int64_t, uint32_t>> runs;
  for (size_t at = 0; at < sorted.size();) {
    size_t end = at;
    while (end < sorted.size() && sorted[end] == sorted[at]) ++end;
    if (end - at >= 4) runs.push_back({-(int64_t)(end - at), sorted[at]});
    at = end;
  }
  std::sort(runs.begin(), runs.end());
  for (const auto& run : runs) {
    uint8_t& owner = b.owner[(run.second - low) >> b.shift];
    if (owner != kHeavy || b.heavies == kHeavy) continue;
    owner = (uint8_t)b.heavies;
    b.heavy[b.heavies++] = run.second;
  }
}

void Search::bracket_from_sample(size_t i, const Kernels& kernels) {
  const Target& t = targets_[i];
  const std::vector<uint32_t>& sample = samples_[(size_t)t.expert];
  const double n = (double)sample.size(), q = (double)t.count / (double)total_;
  const double rank = q * n, margin = 4.5 * std::sqrt(n * q * (1 - q)) + 6;
  uint32_t low = 0, high = kAbsMask;
  std::vector<uint32_t> work(sample.size() + 64);
  int64_t above = 0;
  if (n > 0 && rank - margin >= 1)
    high = kernels.kth_largest(sample.data(), (int64_t)n, (int64_t)(rank - margin), work.data(),
                               &above);
  if (n > 0 && rank + margin <= n)
    low = kernels.kth_largest(sample.data(), (int64_t)n, (int64_t)(rank + margin), work.data(),
                              &above);
  std::vector<uint32_t> inside;
  for (const uint32_t x : sample)
    if (x >= low && x <= high) inside.push_back(x);
  std::sort(inside.begin(), inside.end());
  set_bracket(i, low, high, inside);
}

void Search::begin_pass() {
  scanning_.clear();
  active_.clear();
  for (size_t i = 0; i < targets_.size(); ++i)
    if (targets_[i].state == Target::kScan) {
      scanning_.push_back(i);
      active_.push_back(brackets_[i]);
      targets_[i].pieces.clear();
    }
  workers_.clear();
}

void Search::scan_piece(Runner& runner, Prepared& piece, int64_t start, int64_t n, ThreadScratch& t,
                        int worker) {
  Workspace& ws = *workers_[(size_t)worker];
  const size_t count = scanning_.size();
  std::vector<int64_t> list_start(count);
  for (size_t i = 0; i < count; ++i) list_start[i] = ws.counts[i].listed;
  runner.kernels.scan(piece.work, t.scratch(), start, n, active_.data(), (int)count,
                      ws.counts.data());
  std::lock_guard<std::mutex> lock(mutex_);
  for (size_t i = 0; i < count; ++i) {
    Piece p;
    p.start = piece.job.offset + start, p.length = n, p.worker = worker;
    p.list_start = list_start[i], p.list_end = ws.counts[i].listed;
    const Bracket& b = active_[i];
    for (int h = 0; h < kHeavy; ++h) {
      p.equal[h] = std::exchange(ws.counts[i].bins[kBins + h], 0);
      if (h < b.heavies) ws.counts[i].bins[(b.heavy[h] - b.low) >> b.shift] += p.equal[h];
    }
    targets_[scanning_[i]].pieces.push_back(p);
  }
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

void Search::feed(Runner& runner, Prepared& piece) {
  if (piece.job.numel == 0) return;
  if (piece.work.k != experts_)
    throw Failure(MF_INVALID, "select: another number of experts than at the start.");
  std::lock_guard<std::mutex> one_at_a_time(feeding_);
  if (finished()) return;
  if (!sampled_) {
    const auto empty = [](const std::vector<uint32_t>& s) { return s.empty(); };
    if (std::all_of(samples_.begin(), samples_.end(), empty))
      sample(runner, piece);  // it stands for all
    sampled_ = true;
    runner.parallel((int64_t)targets_.size(), [&](int64_t i, ThreadScratch&) {
      if (targets_[(size_t)i].state == Target::kScan)
        bracket_from_sample((size_t)i, runner.kernels);
    });
    samples_.clear();
    begin_pass();
  }
  runner.begin(piece.work);
  if (!scanning_.empty()) {
    while ((int)workers_.size() < runner.threads) {
      workers_.push_back(std::make_unique<Workspace>());
      Workspace& ws = *workers_.back();
      const int64_t capacity = std::min<int64_t>(
          total_, std::max<int64_t>(kTile, kListBytes / 4 / (int64_t)scanning_.size()));
      ws.lists.resize((size_t)capacity * scanning_.size());
      ws.counts.resize(scanning_.size());
      for (size_t i = 0; i < scanning_.size(); ++i) {
        std::memset(&ws.counts[i], 0, sizeof(BracketCounts));
        ws.counts[i].list = ws.lists.get() + i * (size_t)capacity;
        ws.counts[i].capacity = capacity;
      }
    }
    // stretches end where pieces of the whole end, so that a tie is looked for in one piece only
    const int64_t first = piece.job.offset / piece_length_;
    const int64_t last = (piece.job.offset + piece.job.numel + piece_length_ - 1) / piece_length_;
    runner.parallel(last - first, [&](int64_t i, ThreadScratch& t) {
      const int64_t start =
          std::max((first + i) * piece_length_, piece.job.offset) - piece.job.offset;
      const int64_t end =
          std::min((first + i + 1) * piece_length_ - piece.job.offset, piece.job.numel);
      scan_piece(runner, piece, start, end - start, t, runner.index_of(t));
    });
  }
  runner.parallel((int64_t)targets_.size(), [&](int64_t i, ThreadScratch& t) {
    if (targets_[(size_t)i].state == Target::kRescan)
      rescan(runner.kernels, piece, targets_[(size_t)i], t);
  });
  for (const auto& range : wants_)
    fed_ += std::max<int64_t>(0, std::min(range.second, piece.job.offset + piece.job.numel) -
                                     std::max(range.first, piece.job.offset));
  if (fed_ >= wanted_) end_pass(runner.kernels);
}

int64_t Search::listed_equals(const Piece& piece, size_t target, uint32_t value) const {
  const size_t slot =
      (size_t)(std::find(scanning_.begin(), scanning_.end(), target) - scanning_.begin());
  const uint32_t* list = workers_[(size_t)piece.worker]->counts[slot].list;
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
  for (const auto& ws : workers_)
    for (size_t s = 0; s < scanning_.size(); ++s)
      if (scanning_[s] == i && ws->counts[s].overflowed) listed = false;
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
      t.rescan_start = p.start, t.rescan_end = p.start + p.length;
      return;
    }
    t.needed -= here;
  }
  throw Failure(MF_INTERNAL,
                "select: a tie was counted and not found; the data changed between passes.");
}

// What one pass says about one target: the threshold, or a better bracket.
void Search::decide(size_t i, const Kernels& kernels) {
  Target& t = targets_[i];
  const Bracket b = brackets_[i];
  const size_t slot =
      (size_t)(std::find(scanning_.begin(), scanning_.end(), i) - scanning_.begin());
  int64_t above = 0, inside = 0, bins[kBins] = {};
  bool overflowed = false;
  for (const auto& ws : workers_) {
    const BracketCounts& c = ws->counts[slot];
    above += c.above;
    overflowed |= c.overflowed;
    for (int bin = 0; bin < kBins; ++bin) bins[bin] += c.bins[bin];
  }
  for (const int64_t x : bins) inside += x;
  if (t.count <= above) return set_bracket(i, b.high + 1, kAbsMask, {});
  if (t.count > above + inside) return set_bracket(i, 0, b.low - 1, {});
  int bin = kBins - 1;
  while (above + bins[bin] < t.count) above += bins[bin--];
  const uint32_t low = b.low + ((uint32_t)bin << b.shift);
  if (b.shift == 0) return locate(i, low, t.count - above);
  const uint32_t high = std::min<uint64_t>(b.high, (uint64_t)low + (1u << b.shift) - 1);
  if (overflowed) return set_bracket(i, low, high, {});
  // all magnitudes of the bin are at hand: the listed ones, and the heavy value with its count
  std::vector<uint32_t> listed;
  for (const auto& ws : workers_) {
    const BracketCounts& c = ws->counts[slot];
    for (int64_t x = 0; x < c.listed; ++x)
      if (c.list[x] >= low && c.list[x] <= high) listed.push_back(c.list[x]);
  }
  const int64_t heavies = bins[bin] - (int64_t)listed.size();
  const uint32_t heavy = b.owner[bin] == kHeavy ? 0 : b.heavy[b.owner[bin]];
  const int64_t rank = t.count - above;
  const int64_t over =
      std::count_if(listed.begin(), listed.end(), [&](uint32_t x) { return x > heavy; });
  if (heavies > 0 && rank > over && rank <= over + heavies) return locate(i, heavy, rank - over);
  const int64_t place = heavies == 0 || rank <= over ? rank : rank - heavies;
  std::vector<uint32_t> work(listed.size() + 64);
  int64_t larger = 0;
  const uint32_t value =
      kernels.kth_largest(listed.data(), (int64_t)listed.size(), place, work.data(), &larger);
  locate(i, value, place - larger);
}

void Search::end_pass(const Kernels& kernels) {
  for (Target& t : targets_)
    if (t.state == Target::kRescan) {
      std::sort(t.equals.begin(), t.equals.end());
      if ((int64_t)t.equals.size() < t.needed)
        throw Failure(MF_INTERNAL,
                      "select: a tie was counted and not found; the data changed between passes.");
      t.tie_cut = t.equals[(size_t)t.needed - 1] + 1;
      t.equals = {};
      t.state = Target::kDone;
    }
  for (const size_t i : scanning_) decide(i, kernels);
  begin_pass();
  wants_.clear();
  wanted_ = fed_ = 0;
  if (!scanning_.empty()) {
    wants_ = {{0, total_}};
  } else {
    for (const Target& t : targets_)
      if (t.state == Target::kRescan) wants_.push_back({t.rescan_start, t.rescan_end});
    std::sort(wants_.begin(), wants_.end());
    std::vector<std::pair<int64_t, int64_t>> merged;
    for (const auto& range : wants_) {
      if (!merged.empty() && range.first <= merged.back().second) {
        merged.back().second = std::max(merged.back().second, range.second);
      } else {
        merged.push_back(range);
      }
    }
    wants_ = merged;
  }
  for (const auto& range : wants_) wanted_ += range.second - range.first;
}

void Search::result(mf_expert* experts) const {
  if (!finished()) throw Failure(MF_INVALID, "select: the data has not been fed completely.");
  for (int k = 0; k < experts_; ++k) {
    if (experts[k].trim != MF_TRIM_ABOVE) experts[k].threshold = 0;
    experts[k].tie_cut = experts[k].trim == MF_TRIM_ABOVE ? 0 : total_;
    experts[k].top_threshold = float_of(kInfBits), experts[k].top_tie_cut = 0;
  }
  if (total_ == 0) return;
  for (const Target& t : targets_) {
    mf_expert& e = experts[t.expert];
    (t.top ? e.top_threshold : e.threshold) = float_of(t.threshold);
    (t.top ? e.top_tie_cut : e.tie_cut) = t.tie_cut;
  }
}

}  // namespace mf
