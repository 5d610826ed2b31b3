// Inner products of all pairs of M vectors: the row statistics of WSC.
//
// Pairs are taken in register blocks of up to 3 x 4 vectors, so that a value is loaded once per
// block and not once per pair: with M = 9 that is 45 multiply-adds for 54 loads instead of 90. Each
// sum runs on 16 virtual lanes.
#pragma once

#include "../common/calibration.h"
#include "simd.h"
#include "work.h"

namespace mf {
namespace MF_ISA_NAMESPACE {
namespace {

// Sums of a[r] * b[c], all R x C of them, or r <= c only where the two blocks are the same.
template <int R, int C, bool SAME>
static void gram_block(const float* const* rows, int first_row, int first_col, int m, int64_t n,
                       double* pairs) {
  vf part[R][C][kParts];
  for (int h = 0; h < kParts; ++h) {
    vf sum[R][C];
    for (int r = 0; r < R; ++r)
      for (int c = SAME ? r : 0; c < C; ++c) sum[r][c] = zero();
    for (int64_t i = h * kLanes; i < n; i += kSumLanes) {
      vf x[R];
      for (int r = 0; r < R; ++r) x[r] = load(rows[first_row + r] + i);
      for (int c = 0; c < C; ++c) {
        const vf y = SAME && c < R ? x[c] : load(rows[first_col + c] + i);
        for (int r = 0; r < (SAME ? c + 1 : R); ++r) sum[r][c] = fma(x[r], y, sum[r][c]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = SAME ? r : 0; c < C; ++c) part[r][c][h] = sum[r][c];
  }
  for (int r = 0; r < R; ++r)
    for (int c = SAME ? r : 0; c < C; ++c)
      pairs[pair_index(first_row + r, first_col + c, m)] += (double)lanes16_sum(part[r][c]);
}

template <int R>
static void gram_rows(const float* const* rows, int row, int m, int64_t n, double* pairs) {
  gram_block<R, R, true>(rows, row, row, m, n, pairs);
  for (int col = row + R; col < m;) {
    const int left = m - col, width = left == 4 ? 4 : left >= 3 ? 3 : left;
    switch (width) {
      case 1:
        gram_block<R, 1, false>(rows, row, col, m, n, pairs);
        break;
      case 2:
        gram_block<R, 2, false>(rows, row, col, m, n, pairs);
        break;
      case 3:
        gram_block<R, 3, false>(rows, row, col, m, n, pairs);
        break;
      default:
        gram_block<R, 4, false>(rows, row, col, m, n, pairs);
        break;
    }
    col += width;
  }
}

// pairs [M (M + 1) / 2] += inner products over n elements (a multiple of 16).
static void gram_tile(const float* const* rows, int m, int64_t n, double* pairs) {
  for (int row = 0; row < m;) {
    const int left = m - row;
    if (left == 4) {
      gram_rows<4>(rows, row, m, n, pairs), row += 4;
    } else if (left >= 3) {
      gram_rows<3>(rows, row, m, n, pairs), row += 3;
    } else if (left == 2) {
      gram_rows<2>(rows, row, m, n, pairs), row += 2;
    } else {
      gram_rows<1>(rows, row, m, n, pairs), row += 1;
    }
  }
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
      for (int step = kSumLanes / 2; step > 0; step /= 2)
        for (int l = 0; l < step; ++l) lane[l] += lane[l + step];
      pairs[pair_index(r, c, m)] += lane[0];
    }
}

// Squared norms only: what `sphere` needs.
static void norms_tile(const float* const* rows, int m, int64_t n, double* pairs) {
  for (int r = 0; r < m; ++r) {
    vf part[kParts];
    for (int h = 0; h < kParts; ++h) {
      part[h] = zero();
      for (int64_t i = h * kLanes; i < n; i += kSumLanes) {
        const vf x = load(rows[r] + i);
        part[h] = fma(x, x, part[h]);
      }
    }
    pairs[pair_index(r, r, m)] += (double)lanes16_sum(part);
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
    for (int step = kSumLanes / 2; step > 0; step /= 2)
      for (int l = 0; l < step; ++l) lane[l] += lane[l + step];
    powers[r] += lane[0];
  }
}

}  // namespace
}  // namespace MF_ISA_NAMESPACE
}  // namespace mf
