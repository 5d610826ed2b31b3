// What a merge must know of a whole tensor besides thresholds: norms before and after the trim,
// votes, ranks, what the experts of an entry hold together.
#include <math.h>

#include "block.cuh"
#include "launch.h"
#include "store.cuh"

namespace mf {
namespace cuda {

constexpr int64_t kSumBlock = 65536;  // elements of one float64 partial sum

MF_DEVICE Place plain_place(int64_t at, int64_t numel, int64_t offset, bool aligned) {
  Place p;
  const int64_t left = numel - at;
  p.at = at, p.flat = at + offset;
  p.count = left < kVec ? (int)left : kVec;
  p.whole = aligned && p.count == kVec;
  return p;
}

// partial[block, k, 2]: sum |tau|^power before and after the trim (power 0: the largest).
MF_KERNEL norm_sums(const MF_GRID_CONSTANT mf_gpu_job all, int64_t numel, int power,
                    double* partial, int aligned) {
  __shared__ double room[kThreads];
  const Job job = job_of(all);
  const int64_t start = block_index() * kSumBlock;
  const int64_t end = start + kSumBlock < numel ? start + kSumBlock : numel;
  for (int k = 0; k < job.k; ++k) {
    if (job.kind(k) == MF_GPU_ALL) continue;
    double before = 0, after = 0;
    for (int64_t at = start + thread_index() * kVec; at < end; at += kThreads * kVec) {
      const Place p = plain_place(at, numel, job.offset, aligned);
      Eight b, tau;
      load_base(job, p, &b);
      load_tau(job, k, p, b, &tau);
      const Keep keep = keep_of(job, k, p, tau);
      MF_UNROLL for (int e = 0; e < kVec; ++e) {
        if (e >= p.count) continue;
        const double x = fabs((double)tau.v[e]), y = stays(keep, tau.v[e], e) ? x : 0.0;
        if (power == 0) {
          before = x > before || x != x ? x : before;
          after = y > after || y != y ? y : after;
        } else {
          before += power == 2 ? x * x : x;
          after += power == 2 ? y * y : y;
        }
      }
    }
    const double x = power ? block_sum(before, room) : block_largest(before, room);
    const double y = power ? block_sum(after, room) : block_largest(after, room);
    if (thread_index() == 0) {
      double* to = partial + ((int64_t)block_index() * job.k + k) * 2;
      to[0] = x, to[1] = y;
    }
  }
}

MF_KERNEL vote_sum(const MF_GRID_CONSTANT mf_gpu_job all, int64_t numel, int64_t* sum,
                   int aligned) {
  __shared__ double room[kThreads];
  const Job job = job_of(all);
  int64_t own = 0;
  for (int64_t at = ((int64_t)block_index() * kThreads + thread_index()) * kVec; at < numel;
       at += (int64_t)blocks_of_grid() * kThreads * kVec) {
    const Place p = plain_place(at, numel, job.offset, aligned);
    Eight b, s;
    load_base(job, p, &b);
    tally(job, p, b, &s, [](int, const Eight&, const Keep&) {});
    MF_UNROLL for (int e = 0; e < kVec; ++e) if (e < p.count) own += s.v[e] > 0   ? 1
                                                                     : s.v[e] < 0 ? -1
                                                                                  : 0;
  }
  const double total = block_sum((double)own, room);  // whole numbers: exact
  if (thread_index() == 0 && total != 0) add_to(sum, (int64_t)total);
}

// counts[k, 2]: entries that expert k holds alone, and with others.
MF_KERNEL held_counts(const MF_GRID_CONSTANT mf_gpu_job all, int64_t numel, int64_t* counts,
                      int aligned) {
  __shared__ int32_t here[2 * MF_GPU_MOST_EXPERTS];
  const Job job = job_of(all);
  const int me = (int)thread_index();
  if (me < 2 * job.k) here[me] = 0;
  sync();
  for (int64_t at = ((int64_t)block_index() * kThreads + me) * kVec; at < numel;
       at += (int64_t)blocks_of_grid() * kThreads * kVec) {
    const Place p = plain_place(at, numel, job.offset, aligned);
    Eight b;
    load_base(job, p, &b);
    int holders[kVec];
    MF_UNROLL for (int e = 0; e < kVec; ++e) holders[e] = 0;
    for (int pass = 0; pass < 2; ++pass) {
      for (int k = 0; k < job.k; ++k) {
        Eight tau;
        load_tau(job, k, p, b, &tau);
        const Keep keep = keep_of(job, k, p, tau);
        int alone = 0, shared = 0;
        MF_UNROLL for (int e = 0; e < kVec; ++e) {
          const bool holds =
              e < p.count && value_of(job, k, tau.v[e], stays(keep, tau.v[e], e)) != 0;
          if (pass == 0) {
            holders[e] += holds ? 1 : 0;
          } else {
            alone += holds && holders[e] == 1 ? 1 : 0;
            shared += holds && holders[e] > 1 ? 1 : 0;
          }
        }
        if (alone) add_to(here + 2 * k, alone);
        if (shared) add_to(here + 2 * k + 1, shared);
      }
    }
  }
  sync();
  if (me < 2 * job.k && here[me]) add_to(counts + me, (int64_t)here[me]);
}

MF_KERNEL keep_varied(const MF_GRID_CONSTANT mf_gpu_job all, int64_t numel, uint8_t* mask,
                      int aligned) {
  const Job job = job_of(all);
  const int32_t threshold = (int32_t)integer(job, kLow, 0);
  const int64_t cut = integer(job, kCut, 0);
  for (int64_t at = ((int64_t)block_index() * kThreads + thread_index()) * kVec; at < numel;
       at += (int64_t)blocks_of_grid() * kThreads * kVec) {
    const Place p = plain_place(at, numel, job.offset, aligned);
    Eight b, total, x;
    load_base(job, p, &b);
    total_of(job, p, b, &total);
    variance_of(job, p, b, total, &x);
    MF_UNROLL for (int e = 0; e < kVec; ++e) if (e < p.count) mask[at + e] =
        at_or_above((int32_t)(bits_of(x.v[e]) & kAbsMask), threshold, p.flat + e < cut);
  }
}

MF_KERNEL magnitudes(const MF_GRID_CONSTANT mf_gpu_job all, int64_t numel, int32_t* bits,
                     int aligned) {
  const Job job = job_of(all);
  for (int64_t at = ((int64_t)block_index() * kThreads + thread_index()) * kVec; at < numel;
       at += (int64_t)blocks_of_grid() * kThreads * kVec) {
    const Place p = plain_place(at, numel, job.offset, aligned);
    Eight b, tau;
    load_base(job, p, &b);
    load_tau(job, 0, p, b, &tau);
    MF_UNROLL for (int e = 0; e < kVec; ++e) if (e < p.count) bits[at + e] =
        (int32_t)(bits_of(tau.v[e]) & kAbsMask);
  }
}

MF_KERNEL keep_ranked(const int64_t* order, uint8_t* mask, int64_t rows, int64_t cols,
                      int64_t offset, uint64_t word, uint64_t seed, double low, double span,
                      double density) {
  for (int64_t i = (int64_t)block_index() * kThreads + thread_index(); i < rows * cols;
       i += (int64_t)blocks_of_grid() * kThreads) {
    const int64_t row = i / cols, rank = i - row * cols, flat = row * cols + order[i];
    const double p = cols == 1 ? density : low + span * (double)rank / (double)(cols - 1);
    uint32_t words[4];
    philox((uint64_t)(flat + offset) >> 2, word, seed, words);
    const int at = (int)((flat + offset) & 3);
    const uint32_t mine = at == 0 ? words[0] : at == 1 ? words[1] : at == 2 ? words[2] : words[3];
    mask[flat] = (double)mine < floor(p * 4294967296.0);
  }
}

mf_status launch_norm_sums(const mf_gpu_job& job, int64_t numel, int power, double* partial,
                           void* stream) {
  MF_LAUNCH(norm_sums, (numel + kSumBlock - 1) / kSumBlock, kThreads, 0, stream, job, numel, power,
            partial, (int)is_aligned(job, 1, numel));
  return last_status();
}

static int64_t vectors_grid(int64_t numel) {
  return grid_of((numel + kVec - 1) / kVec, kThreads, 1, kManyBlocks);
}

mf_status launch_vote_sum(const mf_gpu_job& job, int64_t numel, int64_t* sum, void* stream) {
  MF_LAUNCH(vote_sum, vectors_grid(numel), kThreads, 0, stream, job, numel, sum,
            (int)is_aligned(job, 1, numel));
  return last_status();
}

mf_status launch_held(const mf_gpu_job& job, int64_t numel, int64_t* counts, void* stream) {
  MF_LAUNCH(held_counts, vectors_grid(numel), kThreads, 0, stream, job, numel, counts,
            (int)is_aligned(job, 1, numel));
  return last_status();
}

mf_status launch_keep_varied(const mf_gpu_job& job, int64_t numel, uint8_t* mask, void* stream) {
  MF_LAUNCH(keep_varied, vectors_grid(numel), kThreads, 0, stream, job, numel, mask,
            (int)is_aligned(job, 1, numel));
  return last_status();
}

mf_status launch_magnitudes(const mf_gpu_job& job, int64_t numel, int32_t* bits, void* stream) {
  MF_LAUNCH(magnitudes, vectors_grid(numel), kThreads, 0, stream, job, numel, bits,
            (int)is_aligned(job, 1, numel));
  return last_status();
}

mf_status launch_keep_ranked(const int64_t* order, uint8_t* mask, int64_t rows, int64_t cols,
                             int64_t offset, uint64_t word, uint64_t seed, double low, double span,
                             double density, void* stream) {
  MF_LAUNCH(keep_ranked, vectors_grid(rows * cols), kThreads, 0, stream, order, mask, rows, cols,
            offset, word, seed, low, span, density);
  return last_status();
}

}  // namespace cuda
}  // namespace mf
