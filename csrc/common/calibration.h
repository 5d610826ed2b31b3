// WSC: from the sums of a row to the coefficient xi and to what multiplies the row. All in float64.
//
// A row has M = K + 1 vectors: the K included raw task vectors, then the merged one d. `pairs`
// holds their inner products, upper triangle row by row; `powers` their p-norm sums (p = inf:
// largest magnitudes) where p is not 2.
#pragma once

#include <math.h>

#include "macros.h"
#include "magic_fast.h"

namespace mf {

constexpr double kCalibrationEps = 1e-8;
constexpr double kWellConditioned = 1e6;

MF_HD int pair_index(int i, int j, int m) { return i * m - i * (i - 1) / 2 + (j - i); }  // i <= j
MF_HD double pair_at(const double* pairs, int i, int j, int m) {
  return i <= j ? pairs[pair_index(i, j, m)] : pairs[pair_index(j, i, m)];
}

// mean_k |tau_k|_p / |d|_p
MF_HD double sphere_coefficient(const double* pairs, const double* powers, int m, double p) {
  double sum = 0, merged = 0;
  for (int k = 0; k < m; ++k) {
    double norm = p == 2 ? sqrt(pairs[pair_index(k, k, m)]) : powers[k];
    if (p != 2 && p != 1 && !isinf(p)) norm = pow(norm, 1 / p);
    if (k + 1 < m) {
      sum += norm;
    } else {
      merged = norm;
    }
  }
  return sum / (m - 1) / merged;
}

// [ sum_k a_k^2 + |d - sum a_k tau_k|^2 / (mean |tau|)^2 ]^(-1/2), with the epsilons of the mode.
MF_HD double manifold_coefficient(const double* pairs, const double* a, int m, int eps_mode) {
  const int n = m - 1;
  double mean = 0, cross = 0, inside = 0, ellipsoid = 0;
  for (int k = 0; k < n; ++k) mean += sqrt(pairs[pair_index(k, k, m)]);
  mean /= n;
  for (int k = 0; k < n; ++k) {
    const double norm = sqrt(pairs[pair_index(k, k, m)]);
    double term = a[k];
    if (eps_mode == MF_EPS_ABSOLUTE) term = a[k] * norm / (norm + kCalibrationEps);
    if (eps_mode == MF_EPS_NONE) term = a[k] * norm / norm;
    ellipsoid += term * term;
    cross += a[k] * pairs[pair_index(k, n, m)];
    double row = 0;
    for (int j = 0; j < n; ++j) row += a[j] * pair_at(pairs, j, k, m);
    inside += a[k] * row;
  }
  double orthogonal = pairs[pair_index(n, n, m)] - 2 * cross + inside;
  if (orthogonal < 0) orthogonal = 0;
  double eps = 0;
  if (eps_mode == MF_EPS_ABSOLUTE) eps = kCalibrationEps;
  if (eps_mode == MF_EPS_RELATIVE) eps = kCalibrationEps * mean * mean;
  return 1 / sqrt(ellipsoid + orthogonal / (mean * mean + eps) + kCalibrationEps);
}

// a_k = <tau_k, d> / (|tau_k|^2 + eps), as if the experts were orthogonal.
MF_HD void orthogonal_projection(const double* pairs, int m, int eps_mode, double* a) {
  const int n = m - 1;
  double mean = 0;
  for (int k = 0; k < n; ++k) mean += sqrt(pairs[pair_index(k, k, m)]);
  mean /= n;
  double eps = 0;
  if (eps_mode == MF_EPS_ABSOLUTE) eps = kCalibrationEps;
  if (eps_mode == MF_EPS_RELATIVE) eps = kCalibrationEps * mean * mean;
  for (int k = 0; k < n; ++k)
    a[k] = pairs[pair_index(k, n, m)] / (pairs[pair_index(k, k, m)] + eps);
}

// a = G^-1 b by the eigenvectors of G (cyclic Jacobi). False where cond(G) > 1e6: G is too close to
// singular. work: 2 n^2 doubles.
MF_HD bool exact_projection(const double* pairs, int m, double* a, double* work) {
  const int n = m - 1;
  double* g = work;
  double* v = work + n * n;
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) {
      g[i * n + j] = pair_at(pairs, i, j, m);
      if (!isfinite(g[i * n + j])) return false;
      v[i * n + j] = i == j;
    }
  for (int sweep = 0; sweep < 60; ++sweep) {
    double off = 0, diagonal = 0;
    for (int i = 0; i < n; ++i) {
      diagonal += g[i * n + i] * g[i * n + i];
      for (int j = i + 1; j < n; ++j) off += g[i * n + j] * g[i * n + j];
    }
    if (!(off > 1e-30 * diagonal)) break;
    for (int p = 0; p < n; ++p)
      for (int q = p + 1; q < n; ++q) {
        const double apq = g[p * n + q];
        if (apq == 0) continue;
        const double theta = (g[q * n + q] - g[p * n + p]) / (2 * apq);
        const double t = (theta < 0 ? -1 : 1) / (fabs(theta) + sqrt(theta * theta + 1));
        const double c = 1 / sqrt(t * t + 1), s = t * c;
        for (int i = 0; i < n; ++i) {
          const double x = g[i * n + p], y = g[i * n + q];
          g[i * n + p] = c * x - s * y, g[i * n + q] = s * x + c * y;
        }
        for (int i = 0; i < n; ++i) {
          const double x = g[p * n + i], y = g[q * n + i];
          g[p * n + i] = c * x - s * y, g[q * n + i] = s * x + c * y;
        }
        for (int i = 0; i < n; ++i) {
          const double x = v[i * n + p], y = v[i * n + q];
          v[i * n + p] = c * x - s * y, v[i * n + q] = s * x + c * y;
        }
      }
  }
  double least = g[0], largest = g[0];
  for (int i = 1; i < n; ++i) {
    if (g[i * n + i] < least) least = g[i * n + i];
    if (g[i * n + i] > largest) largest = g[i * n + i];
  }
  if (!(least > 0) || !(largest <= kWellConditioned * least)) return false;
  for (int k = 0; k < n; ++k) a[k] = 0;
  for (int e = 0; e < n; ++e) {
    double dot = 0;
    for (int k = 0; k < n; ++k) dot += v[k * n + e] * pairs[pair_index(k, n, m)];
    dot /= g[e * n + e];
    for (int k = 0; k < n; ++k) a[k] += v[k * n + e] * dot;
  }
  return true;
}

// Raw xi. work: n + 2 n^2 doubles with n = m - 1.
MF_HD double raw_coefficient(const mf_calibration* c, const double* pairs, const double* powers,
                             int m, double* work) {
  if (c->variant == MF_SPHERE) return sphere_coefficient(pairs, powers, m, c->p);
  double* a = work;
  if (c->variant == MF_MANIFOLD_EXACT) {
    if (!exact_projection(pairs, m, a, work + (m - 1)))
      return sphere_coefficient(pairs, powers, m, c->p);
  } else {
    orthogonal_projection(pairs, m, c->eps_mode, a);
  }
  return manifold_coefficient(pairs, a, m, c->eps_mode);
}

// What multiplies the row of d. Order: raw -> repair -> side -> strength -> clamp; 1 where xi does
// not act. *repaired: the guards left the row alone.
MF_HD double acting_factor(const mf_calibration* c, double raw, const double* pairs, int m,
                           bool* repaired) {
  double xi = raw;
  *repaired = false;
  if (c->guards) {
    double experts = 0;
    for (int k = 0; k + 1 < m; ++k) experts += pairs[pair_index(k, k, m)];
    const double merged = pairs[pair_index(m - 1, m - 1, m)];
    *repaired = !isfinite(raw) || !(experts > 0) || !(merged > 0) || !isfinite(merged);
    if (*repaired) return 1;
  } else if (c->direction != MF_FREE && isnan(raw)) {
    xi = 1;
  }
  if (c->direction == MF_GROW && !(xi > 1)) return 1;
  if (c->direction == MF_SHRINK && !(xi < 1)) return 1;
  if (c->strength != 1) xi = pow(xi, c->strength);
  if (c->has_clamp) {
    if (xi < c->clamp_low) xi = c->clamp_low;
    if (xi > c->clamp_high) xi = c->clamp_high;
  }
  return c->scale * xi;
}

}  // namespace mf
