// What the kernels of a search share: the state of a target, segments, sums over them.
#pragma once

#include "block.cuh"
#include "keys.cuh"
#include "launch.h"

namespace mf {
namespace cuda {

enum State { kDone, kBracketLow, kBracketHigh, kShift, kThreshold, kNeeded, kEqual, kHeavyOf };
constexpr int kWidth = 8, kHeavies = 2, kFold = 1024;
constexpr int64_t kMost = 0x7fffffff;

MF_DEVICE Place segment_place(const mf_gpu_search& s, int64_t at, bool aligned) {
  Place p;
  const int64_t left = s.numel - at;
  p.at = p.flat = at;
  p.count = left < kVec ? (int)left : kVec;
  p.whole = aligned && p.count == kVec;
  return p;
}

// From the highest of `count` numbers down to the one with which the sum reaches `wanted`: its
// index (-1: none), and the sum before it. number(i): the i-th from the top.
template <class Number>
MF_DEVICE int64_t reach(int64_t count, int64_t wanted, int64_t* before, int64_t* room,
                        int64_t* found, Number number) {
  int64_t passed = 0;
  for (int64_t start = 0; start < count; start += kThreads) {
    if (thread_index() == 0) found[0] = -1;
    const int64_t i = start + thread_index();
    const int64_t own = i < count ? number(i) : 0;
    const int64_t running = passed + running_sum(own, room);
    if (i < count && running >= wanted && running - own < wanted)
      found[0] = i, found[1] = running - own;
    const int64_t sum = room[kThreads - 1];
    sync();
    if (found[0] >= 0) {
      *before = found[1];
      return found[0];
    }
    passed += sum;
    sync();
  }
  *before = passed;
  return -1;
}

// Tie cuts of targets whose thresholds are known, into `integers`.
mf_status launch_cuts(const mf_gpu_job& job, const mf_gpu_search& s, const mf_gpu_targets& targets,
                      int aligned, int64_t* integers, void* stream);

}  // namespace cuda
}  // namespace mf
