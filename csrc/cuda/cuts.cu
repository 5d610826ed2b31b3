// The end of a search: which of the entries equal to a threshold is the last that stays.
#include "search.cuh"

namespace mf {
namespace cuda {

// Whether the cut of a target needs counts that the scans do not have.
MF_DEVICE bool uncounted(const mf_gpu_search& s, const mf_gpu_targets& targets, int t) {
  const int64_t* row = s.state + kWidth * t;
  return targets.ties[t] == MF_TIES_EXACT && row[kHeavyOf] < 0 && row[kNeeded] < row[kEqual];
}

// Entries equal to the threshold, per segment, where they were not counted yet.
template <int KEY>
MF_KERNEL count_equals(const MF_GRID_CONSTANT mf_gpu_job all,
                       const MF_GRID_CONSTANT mf_gpu_search s,
                       const MF_GRID_CONSTANT mf_gpu_targets targets, int aligned) {
  __shared__ int32_t same;
  const Job job = job_of(all);
  for (int t = 0; t < targets.count; ++t) {
    if (!uncounted(s, targets, t)) continue;
    sync();
    if (thread_index() == 0) same = 0;
    sync();
    const int32_t threshold = (int32_t)s.state[kWidth * t + kThreshold];
    const int64_t start = block_index() * s.length;
    const int64_t end = start + s.length < s.numel ? start + s.length : s.numel;
    int own = 0;
    for (int64_t at = start + thread_index() * kVec; at < end; at += kThreads * kVec) {
      const Place p = segment_place(s, at, aligned);
      Eight b, total;
      int32_t key[kVec];
      load_base(job, p, &b);
      if (KEY != MF_KEY_MAGNITUDE) total_of(job, p, b, &total);
      load_keys<KEY>(job, targets.owner[t], p, b, total, key);
      MF_UNROLL for (int e = 0; e < kVec; ++e) own += e < p.count && key[e] == threshold ? 1 : 0;
    }
    if (own) add_to(&same, own);
    sync();
    if (thread_index() == 0)
      s.equals[((int64_t)block_index() * targets.count + t) * kHeavies] = same;
  }
}

// (threshold bits, tie cut) of one target a block into `integers`.
MF_KERNEL find_cuts(const MF_GRID_CONSTANT mf_gpu_job all, const MF_GRID_CONSTANT mf_gpu_search s,
                    const MF_GRID_CONSTANT mf_gpu_targets targets, int64_t* integers) {
  __shared__ int64_t room[kThreads], found[2];
  const Job job = job_of(all);
  const int t = (int)block_index(), owner = targets.owner[t];
  const int64_t* row = s.state + kWidth * t;
  const int64_t threshold = row[kThreshold], needed = row[kNeeded];
  int64_t cut = s.numel;  // all that are equal stay
  if (targets.ties[t] == MF_TIES_DROP_ALL) cut = 0;
  if (targets.ties[t] == MF_TIES_EXACT && needed < row[kEqual]) {
    const int64_t column = t * kHeavies + (row[kHeavyOf] < 0 ? 0 : row[kHeavyOf]);
    int64_t before = 0, more = 0;
    const int64_t segment = reach(s.segments, needed, &before, room, found, [&](int64_t i) {
      return s.equals[i * targets.count * kHeavies + column];
    });
    sync();
    const int64_t start = segment * s.length;
    const int64_t length = s.length < s.numel - start ? s.length : s.numel - start;
    const int64_t place = reach(length, needed - before, &more, room, found, [&](int64_t i) {
      return (int64_t)(key_at(job, s.key, owner, start + i) == (int32_t)threshold ? 1 : 0);
    });
    cut = start + place + 1;
  }
  if (thread_index() == 0) {
    int64_t* to = integers + (targets.top[t] ? kHigh : kLow) * job.k + owner;
    to[0] = threshold;
    to[job.k] = cut;
  }
}

mf_status launch_cuts(const mf_gpu_job& job, const mf_gpu_search& s, const mf_gpu_targets& targets,
                      int aligned, int64_t* integers, void* stream) {
  if (s.key == MF_KEY_MAGNITUDE) {
    MF_LAUNCH((count_equals<MF_KEY_MAGNITUDE>), s.segments, kThreads, 0, stream, job, s, targets,
              aligned);
  } else if (s.key == MF_KEY_VARIANCE) {  // nothing is cut among equal scores
    MF_LAUNCH((count_equals<MF_KEY_VARIANCE>), s.segments, kThreads, 0, stream, job, s, targets,
              aligned);
  }
  MF_LAUNCH(find_cuts, targets.count, kThreads, 0, stream, job, s, targets, integers);
  return last_status();
}

}  // namespace cuda
}  // namespace mf
