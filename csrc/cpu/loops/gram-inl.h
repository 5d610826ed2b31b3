// Inner products of all pairs of M vectors: the row statistics of WSC.
//
// Pairs are taken in register blocks of up to 3 x 4 vectors (AVX-512, which has 32 registers: 5 x
// 4), so that a value is loaded once per block and not once per pair: with M = 9 that is 45
// multiply-adds for 27 loads (18) instead of 90. Each sum runs on 16 virtual lanes.
#pragma once

#include "../../common/calibration.h"
#include "../work.h"
#include "lanesum-inl.h"

namespace mf {
namespace MF_ISA_NAMESPACE {
namespace {

// Lane sums of all pairs of R vectors to their places in lanes [pairs][16]. Few vectors take two
// parts at a time: a multiply-add waits four cycles for the one before it, so eight or more must be
// under way.
template <int R>
static void gram_same(const float* const* rows, int row, int m, int64_t n, float* lanes) {
  constexpr int kPairs = R * (R + 1) / 2;
  constexpr int kSide = kParts > 1 && R < 4 ? 2 : 1;
  for (int h = 0; h < kParts; h += kSide) {
    vf sum[kSide][kPairs];
    for (int s = 0; s < kSide; ++s)
      for (int j = 0; j < kPairs; ++j) sum[s][j] = zero();
    for (int64_t i = h * kLanes; i < n; i += kSumLanes)
      for (int s = 0; s < kSide; ++s) {
        vf x[R];
        for (int r = 0, j = 0; r < R; ++r) {
          x[r] = load(rows[row + r] + i + s * kLanes);
          for (int c = 0; c <= r; ++c, ++j) sum[s][j] = fma(x[c], x[r], sum[s][j]);
        }
      }
    for (int s = 0; s < kSide; ++s)
      for (int r = 0, j = 0; r < R; ++r)
        for (int c = 0; c <= r; ++c, ++j)
          store(lanes + pair_index(row + c, row + r, m) * kSumLanes + (h + s) * kLanes, sum[s][j]);
  }
}

// The same of all R x C pairs of a vector of one group and one of another.
template <int R, int C>
static void gram_cross(const float* const* rows, int row, int col, int m, int64_t n, float* lanes) {
  for (int h = 0; h < kParts; ++h) {
    vf sum[R][C];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) sum[r][c] = zero();
    for (int64_t i = h * kLanes; i < n; i += kSumLanes) {
      vf x[R];
      for (int r = 0; r < R; ++r) x[r] = load(rows[row + r] + i);
      for (int c = 0; c < C; ++c) {
        const vf y = load(rows[col + c] + i);
        for (int r = 0; r < R; ++r) sum[r][c] = fma(x[r], y, sum[r][c]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c)
        store(lanes + pair_index(row + r, col + c, m) * kSumLanes + h * kLanes, sum[r][c]);
  }
}

template <int R>
static void gram_rows(const float* const* rows, int row, int m, int64_t n, float* lanes) {
  gram_same<R>(rows, row, m, n, lanes);
  for (int col = row + R; col < m;) {
    const int left = m - col, width = left == 4 ? 4 : left >= 3 ? 3 : left;
    switch (width) {
      case 1:
        gram_cross<R, 1>(rows, row, col, m, n, lanes);
        break;
      case 2:
        gram_cross<R, 2>(rows, row, col, m, n, lanes);
        break;
      case 3:
        gram_cross<R, 3>(rows, row, col, m, n, lanes);
        break;
      default:
        gram_cross<R, 4>(rows, row, col, m, n, lanes);
        break;
    }
    col += width;
  }
}

// How many of `left` vectors the next group takes: sums and values must fit the registers.
static int gram_group(int left) {
  if (kLanes < 16) return left <= 4 ? left : 3;
  return left <= 6 ? left : left <= 8 ? 4 : 5;
}

// pairs [M (M + 1) / 2] += inner products over n elements (a multiple of 16). lanes: room for the
// pairs of M vectors, 16 of each.
static void gram_tile(const float* const* rows, int m, int64_t n, float* lanes, double* pairs) {
  for (int row = 0; row < m;) {
    const int group = gram_group(m - row);
    switch (group) {
      case 1:
        gram_rows<1>(rows, row, m, n, lanes);
        break;
      case 2:
        gram_rows<2>(rows, row, m, n, lanes);
        break;
      case 3:
        gram_rows<3>(rows, row, m, n, lanes);
        break;
      case 4:
        gram_rows<4>(rows, row, m, n, lanes);
        break;
      case 5:
        if constexpr (kLanes == 16) gram_rows<5>(rows, row, m, n, lanes);
        break;
      default:  // the last group: no others to cross
        if constexpr (kLanes == 16) gram_same<6>(rows, row, m, n, lanes);
        break;
    }
    row += group;
  }
  add_lane_sums(lanes, m * (m + 1) / 2, pairs);
}

// The same in float64: products of float32 are exact there. For `manifold_exact`, whose inverse of
// a matrix of condition 1e6 would turn float32's rounding into whole percents.
static void gram_wide_tile(const float* const* rows, int m, int64_t n, double* pairs) {
  for (int r = 0; r < m; ++r)
    for (int c = r; c < m; ++c) {
      double lane[kSumLanes] = {};
      for (int64_t i = 0; i < n; i += kSumLanes)
        for (int l = 0; l < kSumLanes; ++l)
          lane[l] += (double)rows[r][i + l] * (double)rows[c][i + l];
      pairs[pair_index(r, c, m)] += lanes16_sum(lane);
    }
}

// Squared norms only: what `sphere` needs.
static void norms_tile(const float* const* rows, int m, int64_t n, double* pairs) {
  for (int r = 0; r < m; ++r) {
    float lanes[kSumLanes];
    for (int h = 0; h < kParts; ++h) {
      vf sum = zero();
      for (int64_t i = h * kLanes; i < n; i += kSumLanes) {
        const vf x = load(rows[r] + i);
        sum = fma(x, x, sum);
      }
      store(lanes + h * kLanes, sum);
    }
    pairs[pair_index(r, r, m)] += (double)lanes16_sum(lanes);
  }
}

// Sums of |x|^p (p = 1 or another integer), or the largest |x| (p = inf).
static void powers_tile(const float* const* rows, int m, int64_t n, double p, double* powers) {
  for (int r = 0; r < m; ++r) {
    if (p > 1e9) {
      vi top = splat_i(0);
      for (int64_t i = 0; i < n; i += kLanes) top = max_i(top, abs_bits(load(rows[r] + i)));
      const double x = (double)float_of((uint32_t)largest(top));
      if (x > powers[r]) powers[r] = x;
      continue;
    }
    double lane[kSumLanes] = {};
    for (int64_t i = 0; i < n; i += kSumLanes)
      for (int l = 0; l < kSumLanes; ++l) {
        const double x = (double)float_of(bits_of(rows[r][i + l]) & kAbsMask);
        double y = x;
        for (int e = 1; e < (int)p; ++e) y *= x;
        lane[l] += y;
      }
    powers[r] += lanes16_sum(lane);
  }
}

}  // namespace
}  // namespace MF_ISA_NAMESPACE
}  // namespace mf
