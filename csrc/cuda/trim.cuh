// Which of eight neighbouring entries of an expert stay. Thresholds become two comparisons and a
// byte, coins and masks the byte alone: one test serves every trim.
#pragma once

#include "load.cuh"

namespace mf {
namespace cuda {

// An entry stays where low < |tau| bits <= high and its bit of `byte` is set.
struct Keep {
  int32_t low, high;
  uint32_t byte;
};

enum Row { kLow, kCut, kHigh, kTopCut, kStream, kBound, kSeed };  // of job.integers
// ... and of job.numbers
enum NumberRow { kFactor, kWeight, kLambda, kAlone, kScoreCut, kScoreTop, kScale };

MF_DEVICE int64_t integer(const Job& job, int row, int k) { return job.integers[row * job.k + k]; }
MF_DEVICE float number(const Job& job, int row, int k) { return job.numbers[row * job.k + k]; }
MF_DEVICE uint64_t seed_of(const Job& job) { return (uint64_t)integer(job, kSeed, 0); }
MF_DEVICE int64_t majority_of(const Job& job) { return integer(job, kSeed, 1); }
MF_DEVICE float scale_of(const Job& job) { return number(job, kScale, 0); }
MF_DEVICE float min_tasks_of(const Job& job) { return number(job, kScale, 1); }
MF_DEVICE float limit_of(const Job& job) { return number(job, kScale, 2); }
MF_DEVICE float least_sum_of(const Job& job) { return number(job, kScale, 3); }

MF_DEVICE uint32_t random_byte(const Job& job, int k, int64_t flat) {
  const uint64_t stream = (uint64_t)integer(job, kStream, k),
                 bound = (uint64_t)integer(job, kBound, k);
  uint32_t byte = 0;
  const int64_t first = flat >> 2;
  for (int c = 0; c < 3; ++c) {
    const int shift = (int)((first + c) * 4 - flat);  // -3 .. 8
    if (shift >= kVec) break;
    uint32_t words[4];
    philox((uint64_t)(first + c), stream, seed_of(job), words);
    uint32_t four = 0;
    MF_UNROLL for (int w = 0; w < 4; ++w) four |= (words[w] < bound ? 1u : 0u) << w;
    byte |= shift < 0 ? four >> -shift : four << shift;
  }
  return byte & 0xffu;
}

MF_DEVICE uint32_t mask_byte(const uint8_t* mask, const Place& p) {
  uint32_t byte = 0;
  MF_UNROLL for (int e = 0; e < kVec; ++e) if (e < p.count) byte |= (mask[p.at + e] ? 1u : 0u) << e;
  return byte;
}

// A threshold of which only the entries before `cut` stay, for the eight from `flat` on: where the
// cut lies among them, equal ones are looked at one by one.
MF_DEVICE uint32_t equal_byte(const Eight& tau, uint32_t threshold, int before) {
  uint32_t byte = 0;
  MF_UNROLL for (int e = 0; e < kVec; ++e) if ((bits_of(tau.v[e]) & kAbsMask) == threshold &&
                                               e >= before) byte |= 1u << e;
  return byte;
}

MF_DEVICE int before_cut(int64_t cut, int64_t flat) {
  const int64_t n = cut - flat;
  return n < 0 ? 0 : n > kVec ? kVec : (int)n;
}

MF_DEVICE Keep keep_of(const Job& job, int k, const Place& p, const Eight& tau) {
  Keep keep = {-1, INT32_MAX, 0xffu};
  const int kind = job.kind(k);
  if (kind == MF_GPU_ABOVE || kind == MF_GPU_BAND) {
    // low - 1: equal ones stay, but for those from the cut on
    const int32_t low = (int32_t)integer(job, kLow, k);
    const int before = before_cut(integer(job, kCut, k), p.flat);
    keep.low = low - (before > 0 ? 1 : 0);
    if (before > 0 && before < kVec) keep.byte &= ~equal_byte(tau, (uint32_t)low, before);
    if (kind == MF_GPU_BAND) {
      const int32_t high = (int32_t)integer(job, kHigh, k);
      const int top = before_cut(integer(job, kTopCut, k), p.flat);
      // the top: bits > high, or equal and before the cut, goes
      keep.high = high - (top == kVec ? 1 : 0);
      if (top > 0 && top < kVec) {
        const uint32_t equal = equal_byte(tau, (uint32_t)high, 0);
        keep.byte &= ~(equal & ((1u << top) - 1u));
      }
    }
  } else if (kind == MF_GPU_RANDOM) {
    keep.byte = random_byte(job, k, p.flat);
  } else if (kind == MF_GPU_BYTES) {
    keep.byte = mask_byte(job.all->masks[k], p);
  }
  return keep;
}

MF_DEVICE bool stays(const Keep& keep, float tau, int e) {
  const int32_t bits = (int32_t)(bits_of(tau) & kAbsMask);
  return bits > keep.low && bits <= keep.high && (keep.byte >> e & 1u);
}

}  // namespace cuda
}  // namespace mf
