#include "search.h"

#include <algorithm>
#include <cstring>

#include "../common/numeric.h"
#include "bracket.h"

namespace mf {
namespace {

constexpr int64_t kListBytes = 4 << 20;  // of one worker's lists
constexpr int64_t kPiece = 16384;        // elements among which the last tie is looked for
constexpr int64_t kMostPieces = 4096;

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
      t.expert = k;
      t.top = top;
      t.count = count;
      t.cut = rule == MF_TIES_EXACT;
      t.state = Target::kScan;
      t.tie_cut = rule == MF_TIES_KEEP_ALL ? total_ : 0;
      if (count == 0) {
        t.state = Target::kDone;
        t.threshold = kInfBits;
        t.tie_cut = 0;
      }
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
  std::vector<bool> wanted((size_t)experts_, false);
  for (const Target& t : targets_)
    if (t.state == Target::kScan) wanted[(size_t)t.expert] = true;
  add_samples(runner, piece, wanted, samples_);
}

void Search::set_bracket(size_t i, uint32_t low, uint32_t high,
                         const std::vector<uint32_t>& sorted) {
  brackets_[i] = bracket_of(targets_[i].expert, low, high, sorted);
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
    p.start = piece.job.offset + start;
    p.length = n;
    p.worker = worker;
    p.list_start = list_start[i];
    p.list_end = ws.counts[i].listed;
    const Bracket& b = active_[i];
    for (int h = 0; h < kHeavy; ++h) {
      p.equal[h] = std::exchange(ws.counts[i].bins[kBins + h], 0);
      if (h < b.heavies) ws.counts[i].bins[(b.heavy[h] - b.low) >> b.shift] += p.equal[h];
    }
    targets_[scanning_[i]].pieces.push_back(p);
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
    if (std::all_of(samples_.begin(), samples_.end(), empty)) sample(runner, piece);  // for all
    sampled_ = true;
    runner.parallel((int64_t)targets_.size(), [&](int64_t i, ThreadScratch&) {
      const Target& t = targets_[(size_t)i];
      if (t.state == Target::kScan)
        brackets_[(size_t)i] = bracket_from(samples_[(size_t)t.expert], t.expert,
                                            (double)t.count / (double)total_, runner.kernels);
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

// Where the counts of a target stand in this pass.
size_t Search::slot_of(size_t target) const {
  return (size_t)(std::find(scanning_.begin(), scanning_.end(), target) - scanning_.begin());
}

// What one pass says about one target: the threshold, or a better bracket.
void Search::decide(size_t i, const Kernels& kernels) {
  Target& t = targets_[i];
  const Bracket b = brackets_[i];
  const size_t slot = slot_of(i);
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
    if (t.state == Target::kRescan) cut_ties(t);
  for (const size_t i : scanning_) decide(i, kernels);
  begin_pass();
  wants_ = scanning_.empty() ? to_rescan() : Ranges{{0, total_}};
  wanted_ = fed_ = 0;
  for (const auto& range : wants_) wanted_ += range.second - range.first;
}

void Search::result(mf_expert* experts) const {
  if (!finished()) throw Failure(MF_INVALID, "select: the data has not been fed completely.");
  for (int k = 0; k < experts_; ++k) {
    if (experts[k].trim != MF_TRIM_ABOVE) experts[k].threshold = 0;
    experts[k].tie_cut = experts[k].trim == MF_TRIM_ABOVE ? 0 : total_;
    experts[k].top_threshold = float_of(kInfBits);
    experts[k].top_tie_cut = 0;
  }
  if (total_ == 0) return;
  for (const Target& t : targets_) {
    mf_expert& e = experts[t.expert];
    (t.top ? e.top_threshold : e.threshold) = float_of(t.threshold);
    (t.top ? e.top_tie_cut : e.tie_cut) = t.tie_cut;
  }
}

}  // namespace mf
