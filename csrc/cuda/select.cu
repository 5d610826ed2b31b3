// Exact k-th magnitudes and tie cuts, without a sort and without asking the host.
//
// A target is one threshold: the count-th largest key of one expert (keys.cuh: |tau|, as a rule). A
// sorted sample brackets it.
// `scan` reads everything once: what lies above the bracket is counted, what lies inside goes into
// bins by integer atomics, and a few values that the sample shows in the bracket are counted by
// themselves, per segment: in 16-bit checkpoints one value can be 5 % of all elements, too many for
// one address. `locate` finds the bin; a bin of one value is the threshold, a wider one (or a
// bracket that missed) is the next bracket. As many scans are launched as the worst input needs;
// those with nothing left to do return at once. Counts have no order.
#include "search.cuh"

namespace mf {
namespace cuda {

MF_DEVICE int shift_for(int64_t low, int64_t high, int log_bins) {
  int shift = 0;
  while ((high - low) >> shift >= (int64_t)1 << log_bins) ++shift;
  return shift;
}

// Runs of `run` elements at mixed places, one every `stride` elements: the places must not share a
// period with the rows.
MF_KERNEL sample_keys(const MF_GRID_CONSTANT mf_gpu_job all,
                      const MF_GRID_CONSTANT mf_gpu_search s) {
  const Job job = job_of(all);
  const int64_t stride = s.numel / s.runs;
  const int64_t i = (int64_t)block_index() * kThreads + thread_index();
  if (i >= s.size) return;
  const int64_t run = i / s.run, room = stride - s.run + 1;
  int64_t start = run * stride + ((run * 40503) >> 3) % (room > 1 ? room : 1);
  if (start > s.numel - s.run) start = s.numel - s.run;
  const int owners = s.key == MF_KEY_VARIANCE ? 1 : job.k;
  for (int k = 0; k < owners; ++k)
    s.sample[k * s.size + i] = key_at(job, s.key, k, start + i % s.run);
}

// First bracket and heavy values of one target a thread.
MF_KERNEL open_brackets(const MF_GRID_CONSTANT mf_gpu_search s,
                        const MF_GRID_CONSTANT mf_gpu_targets targets, const int32_t* sorted) {
  const int t = (int)thread_index();
  if (t >= targets.count) return;
  const int32_t* sample = sorted + targets.owner[t] * s.size;
  const int64_t *place = s.places + 3 * t, last_of_all = s.size - 1;
  const int64_t first = place[0] < 0 ? 0 : place[0],
                last = place[2] > last_of_all ? last_of_all : place[2];
  const int64_t low = place[0] < 0 ? 0 : sample[first],
                high = place[2] >= s.size ? kMost : sample[last];
  int64_t* row = s.state + kWidth * t;
  row[kBracketLow] = low, row[kBracketHigh] = high;
  row[kShift] = shift_for(low, high, s.log_bins);
  // the value expected, and one of the bracket's quarters where it differs (-2 matches nothing)
  const int32_t a = sample[place[1]], b = sample[first + (last - first) / 4],
                c = sample[first + (last - first) * 3 / 4];
  const int32_t other = b != a ? b : c;
  s.heavy[kHeavies * t] = a;
  s.heavy[kHeavies * t + 1] = other != a ? other : -2;
}

struct Asked {
  int32_t low, high, first, second;
  int shift;
};

MF_DEVICE Asked asked_of(const mf_gpu_search& s, int t) {
  const int64_t* row = s.state + kWidth * t;
  return {(int32_t)row[kBracketLow], (int32_t)row[kBracketHigh], s.heavy[kHeavies * t],
          s.heavy[kHeavies * t + 1], (int)row[kShift]};
}

// A block takes a segment of `length` elements, all targets of it one vector after the other.
template <int KEY>
MF_KERNEL MF_BOUNDS(kThreads, KEY == MF_KEY_MAGNITUDE ? 8 : 5)
    scan(const MF_GRID_CONSTANT mf_gpu_job all, const MF_GRID_CONSTANT mf_gpu_search s,
         const MF_GRID_CONSTANT mf_gpu_targets targets, int aligned) {
  __shared__ Asked asked[2 * MF_GPU_MOST_EXPERTS];
  __shared__ int32_t over[2 * MF_GPU_MOST_EXPERTS], equal[2 * MF_GPU_MOST_EXPERTS][kHeavies];
  __shared__ int waiting;
  const Job job = job_of(all);
  const int me = (int)thread_index();
  if (me == 0) waiting = 0;
  sync();
  if (me < targets.count) {
    asked[me] = asked_of(s, me);
    over[me] = 0, equal[me][0] = 0, equal[me][1] = 0;
    if (!s.state[kWidth * me + kDone]) add_to(&waiting, 1);
  }
  sync();
  if (!waiting) return;
  const int64_t start = block_index() * s.length;
  const int64_t end = start + s.length < s.numel ? start + s.length : s.numel;
  for (int64_t at = start + me * kVec; at < end; at += kThreads * kVec) {
    const Place p = segment_place(s, at, aligned);
    Eight b, total;
    int32_t key[kVec];
    load_base(job, p, &b);
    if (KEY != MF_KEY_MAGNITUDE) total_of(job, p, b, &total);
    int loaded = -1;
    for (int t = 0; t < targets.count; ++t) {
      if (s.state[kWidth * t + kDone]) continue;
      const Asked q = asked[t];
      if (targets.owner[t] != loaded)
        load_keys<KEY>(job, loaded = targets.owner[t], p, b, total, key);
      int n_over = 0, n_first = 0, n_second = 0;
      int32_t* bins = s.bins + ((int64_t)t << s.log_bins);
      MF_UNROLL for (int e = 0; e < kVec; ++e) {
        if (e >= p.count) continue;
        const int32_t bits = key[e];
        // a heavy value may lie above the bracket of a later scan: it then counts as above too
        n_over += bits > q.high ? 1 : 0;
        if (bits == q.first) {
          ++n_first;
        } else if (bits == q.second) {
          ++n_second;
        } else if (bits >= q.low && bits <= q.high) {
          add_to(bins + ((bits - q.low) >> q.shift), 1);
        }
      }
      if (n_over) add_to(over + t, n_over);
      if (n_first) add_to(&equal[t][0], n_first);
      if (n_second) add_to(&equal[t][1], n_second);
    }
  }
  sync();
  if (me < targets.count && !s.state[kWidth * me + kDone]) {
    const int64_t to = (int64_t)block_index() * targets.count + me;
    s.above[to] = over[me];
    s.equals[to * kHeavies] = equal[me][0];
    s.equals[to * kHeavies + 1] = equal[me][1];
  }
}

// Sums of 1024 bins each; block (t, c) of targets x chunks.
MF_KERNEL fold_bins(const MF_GRID_CONSTANT mf_gpu_search s) {
  __shared__ double room[kThreads];
  const int64_t chunk = block_index();
  double own = 0;  // counts are below 2^53
  for (int i = (int)thread_index(); i < kFold; i += kThreads) own += s.bins[chunk * kFold + i];
  const double total = block_sum(own, room);
  if (thread_index() == 0) s.coarse[chunk] = (int64_t)total;
}

// Sum over the segments of column `column` of a table of `width` columns.
MF_DEVICE int64_t column_sum(const int64_t* table, int64_t width, int64_t column, int64_t segments,
                             int64_t* room) {
  int64_t own = 0;
  for (int64_t i = thread_index(); i < segments; i += kThreads) own += table[i * width + column];
  running_sum(own, room);
  return room[kThreads - 1];
}

// After a scan: the threshold of one target a block, or its next bracket; its bins are cleared.
MF_KERNEL locate(const MF_GRID_CONSTANT mf_gpu_search s, int targets) {
  __shared__ int64_t room[kThreads], found[2], heavy_count[kHeavies], heavy_bin[kHeavies];
  const int t = (int)block_index();
  int64_t* row = s.state + kWidth * t;
  if (row[kDone]) return;
  const int64_t low = row[kBracketLow], high = row[kBracketHigh], bins = (int64_t)1 << s.log_bins;
  const int shift = (int)row[kShift];
  const int32_t* mine = s.bins + t * bins;
  int64_t higher = column_sum(s.above, targets, t, s.segments, room);
  for (int h = 0; h < kHeavies; ++h) {
    const int64_t value = s.heavy[kHeavies * t + h];
    const int64_t n = column_sum(s.equals, targets * kHeavies, t * kHeavies + h, s.segments, room);
    sync();
    if (thread_index() == 0) {
      heavy_count[h] = n;
      heavy_bin[h] = value >= low && value <= high ? (value - low) >> shift : -1;
    }
    sync();
  }
  const int64_t wanted = s.counts[t] - higher;  // rank within the bracket, from 1
  int64_t bin = -1, in_bin = 0;
  if (wanted > 0) {
    const int64_t chunks = bins / kFold;
    int64_t before = 0, above = 0;
    const int64_t* coarse = s.coarse + t * chunks;
    const int64_t chunk = reach(chunks, wanted, &above, room, found, [&](int64_t i) {
      const int64_t c = chunks - 1 - i;
      int64_t n = coarse[c];
      for (int h = 0; h < kHeavies; ++h)
        if (heavy_bin[h] >= 0 && heavy_bin[h] / kFold == c) n += heavy_count[h];
      return n;
    });
    sync();
    if (chunk >= 0) {
      const int64_t top = (chunks - chunk) * kFold - 1;
      auto number = [&](int64_t i) {
        int64_t n = mine[top - i];
        for (int h = 0; h < kHeavies; ++h)
          if (heavy_bin[h] == top - i) n += heavy_count[h];
        return n;
      };
      const int64_t place = reach(kFold, wanted - above, &before, room, found, number);
      bin = top - place;
      in_bin = number(place);
      higher += above + before;
    }
  }
  sync();
  if (thread_index() == 0) {
    int64_t new_low, new_high;
    if (wanted <= 0) {  // the sample misled: it lies above
      new_low = high + 1, new_high = kMost;
    } else if (bin < 0) {  // ... or below
      new_low = 0, new_high = low - 1;
    } else {
      new_low = low + (bin << shift);
      new_high = new_low + ((int64_t)1 << shift) - 1;
      if (new_high > high) new_high = high;
    }
    row[kBracketLow] = new_low, row[kBracketHigh] = new_high;
    row[kShift] = shift_for(new_low, new_high, s.log_bins);
    if (bin >= 0 && new_low == new_high) {
      row[kThreshold] = new_low;
      row[kNeeded] = s.counts[t] - higher;
      row[kEqual] = in_bin;
      row[kHeavyOf] = -1;
      for (int h = 0; h < kHeavies; ++h)
        if (s.heavy[kHeavies * t + h] == new_low) row[kHeavyOf] = h;
      row[kDone] = 1;
    }
  }
}

// Bins of the targets that go on, to zero: the others are not read again.
MF_KERNEL clear_bins(const MF_GRID_CONSTANT mf_gpu_search s, int targets) {
  const int64_t bins = (int64_t)1 << s.log_bins, total = bins * targets;
  for (int64_t i = (int64_t)block_index() * kThreads + thread_index(); i < total;
       i += (int64_t)blocks_of_grid() * kThreads)
    if (!s.state[kWidth * (i >> s.log_bins) + kDone]) s.bins[i] = 0;
}

mf_status launch_sample(const mf_gpu_job& job, const mf_gpu_search& s, void* stream) {
  MF_LAUNCH(sample_keys, (s.size + kThreads - 1) / kThreads, kThreads, 0, stream, job, s);
  return last_status();
}

mf_status launch_select(const mf_gpu_job& job, const mf_gpu_search& s, const int32_t* sorted,
                        const mf_gpu_targets& targets, int64_t* integers, void* stream) {
  const int aligned = is_aligned(job, 1, s.numel), n = targets.count;
  MF_LAUNCH(open_brackets, 1, kThreads, 0, stream, s, targets, sorted);
  for (int i = 0; i < s.scans; ++i) {
    if (i) MF_LAUNCH(clear_bins, 1024, kThreads, 0, stream, s, n);
    if (s.key == MF_KEY_MAGNITUDE) {
      MF_LAUNCH((scan<MF_KEY_MAGNITUDE>), s.segments, kThreads, 0, stream, job, s, targets,
                aligned);
    } else if (s.key == MF_KEY_VARIANCE) {
      MF_LAUNCH((scan<MF_KEY_VARIANCE>), s.segments, kThreads, 0, stream, job, s, targets, aligned);
    } else {
      MF_LAUNCH((scan<MF_KEY_SCORE>), s.segments, kThreads, 0, stream, job, s, targets, aligned);
    }
    MF_LAUNCH(fold_bins, ((int64_t)n << s.log_bins) / kFold, kThreads, 0, stream, s);
    MF_LAUNCH(locate, n, kThreads, 0, stream, s, n);
  }
  return launch_cuts(job, s, targets, aligned, integers, stream);
}

}  // namespace cuda
}  // namespace mf
