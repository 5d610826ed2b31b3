// A row with WSC: what both of its kernels share.
#pragma once

#include "../common/calibration.h"
#include "block.cuh"
#include "launch.h"
#include "store.cuh"

namespace mf {
namespace cuda {

struct RowShape {
  mf_calibration policy;
  uint64_t included;  // a bit an expert
  float* coefficient;
  uint8_t* repaired;
  double *norms2, *pairs, *powers, *work;
  int64_t work_of_block;
  int32_t keeps, aligned;
};

// Shared memory of the two kernels: sums first, then d.
MF_HD int pairs_of(int m) { return m * (m + 1) / 2; }

// From the sums of all M vectors to the factor of the row, by one thread: the sums of the experts
// that count are moved together, then the rules of csrc/common apply. `own` [pairs], `work` [K + 2
// K^2] as far as the variant needs it.
MF_APART float finish_row(const RowShape& s, int64_t row, int k, const double* pairs,
                          const double* powers, double* own, double* own_powers, double* work) {
  const int m = k + 1;
  double* norms = s.norms2 + row * (k + 2);
  int chosen = 0, n = 0;
  for (int i = 0; i < k; ++i) norms[i] = pairs[pair_index(i, i, m)];
  for (int i = 0; i < m; ++i) {
    if (i < k && !(s.included >> i & 1)) continue;
    own_powers[chosen++] = powers ? powers[i] : 0;
    for (int j = i; j < m; ++j)
      if (j == k || (s.included >> j & 1)) own[n++] = pairs[pair_index(i, j, m)];
  }
  bool repaired = false;
  const double raw = raw_coefficient(&s.policy, own, own_powers, chosen, work);
  const float factor = (float)acting_factor(&s.policy, raw, own, chosen, &repaired);
  const double merged = pairs[pair_index(k, k, m)];
  norms[k] = merged;
  norms[k + 1] = merged * (double)factor * (double)factor;
  s.coefficient[row] = (float)raw;
  s.repaired[row] = repaired;
  return factor;
}

MF_DEVICE Place vector_of(int64_t row, int64_t n, int64_t cols, int64_t offset, bool aligned) {
  Place p;
  const int64_t left = cols - n * kVec;
  p.at = row * cols + n * kVec;
  p.flat = p.at + offset;
  p.count = left < kVec ? (int)left : kVec;
  p.whole = aligned && p.count == kVec;
  return p;
}

MF_DEVICE void put_eight(float* to, const Eight& x) {
  Word4 a, b;
  MF_UNROLL for (int e = 0; e < 4; ++e) a.w[e] = bits_of(x.v[e]), b.w[e] = bits_of(x.v[e + 4]);
  ((Word4*)to)[0] = a;
  ((Word4*)to)[1] = b;
}

MF_DEVICE void get_eight(const float* from, Eight* x) {
  const Word4 a = ((const Word4*)from)[0], b = ((const Word4*)from)[1];
  MF_UNROLL for (int e = 0; e < 4; ++e) x->v[e] = float_of(a.w[e]), x->v[e + 4] = float_of(b.w[e]);
}

constexpr int kSharedMost = 160 << 10;  // bytes of a block: what sm_80 and sm_90 both have

}  // namespace cuda
}  // namespace mf
