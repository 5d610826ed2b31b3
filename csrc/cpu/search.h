// Exact k-th magnitudes and tie cuts of data that may be seen only piece by piece.
//
// A sample brackets each threshold. One pass counts what lies above the bracket, bins what lies
// inside, counts the few values the sample found often by themselves (in bf16 checkpoints 5 % of
// all elements can equal the threshold) and lists the rest. Mostly that decides; where the sample
// misled or the list was too short the bracket becomes the right bin and a further pass follows: at
// most four, whatever the input. The tie cut is found by the counts of equals per piece and a
// second look at one piece.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "runner.h"

namespace mf {

class Search {
 public:
  // Takes recipe fields, counts and tie rule; `total` elements will come.
  explicit Search(const mf_job& prototype);

  bool finished() const { return wants_.empty(); }
  // Flat ranges to feed before anything else happens.
  using Ranges = std::vector<std::pair<int64_t, int64_t>>;
  const Ranges& wants() const { return wants_; }

  // A sample from anywhere in the data, before the first feed.
  void sample(Runner& runner, Prepared& piece);
  // The part of `piece` that is wanted: every element of every wanted range exactly once, in any
  // order.
  void feed(Runner& runner, Prepared& piece);
  void result(mf_expert* experts) const;

 private:
  struct Piece {  // what one stretch of a pass held, of one target
    int64_t start, length;
    int64_t equal[kHeavy];
    int worker;
    int64_t list_start, list_end;
  };
  struct Target {
    int expert;
    bool top;       // the upper edge of a band
    bool cut;       // needs the exact tie cut
    int64_t count;  // how many lie at or above the threshold
    enum { kScan, kRescan, kDone } state;
    uint32_t threshold;
    int64_t tie_cut;
    int64_t needed;  // of those equal to the threshold
    int64_t rescan_start, rescan_end;
    std::vector<int64_t> equals;  // flat indices, of the rescan
    std::vector<Piece> pieces;
  };
  struct Workspace {  // of one worker
    std::vector<BracketCounts> counts;
    Buffer<uint32_t> lists;
  };

  void begin_pass();
  void end_pass(const Kernels& kernels);
  Ranges to_rescan() const;
  void set_bracket(size_t target, uint32_t low, uint32_t high,
                   const std::vector<uint32_t>& sorted_sample);
  void decide(size_t target, const Kernels& kernels);
  void locate(size_t target, uint32_t threshold, int64_t needed);
  size_t slot_of(size_t target) const;
  int64_t listed_equals(const Piece& piece, size_t target, uint32_t value) const;
  void scan_piece(Runner& runner, Prepared& piece, int64_t start, int64_t n, ThreadScratch& t,
                  int worker);
  void cut_ties(Target& target);
  void rescan(const Kernels& kernels, Prepared& piece, Target& target, ThreadScratch& t);

  int64_t total_;
  int experts_;
  int64_t piece_length_;
  bool sampled_ = false;
  std::vector<Target> targets_;
  std::vector<Bracket> brackets_;  // one per target
  std::vector<size_t> scanning_;   // targets of this pass, and their brackets side by side
  std::vector<Bracket> active_;
  std::vector<std::vector<uint32_t>> samples_;  // per expert
  std::vector<std::unique_ptr<Workspace>> workers_;
  Ranges wants_;
  int64_t wanted_ = 0, fed_ = 0;
  std::mutex mutex_;    // of the pieces
  std::mutex feeding_;  // feed is one caller's at a time
};

}  // namespace mf
