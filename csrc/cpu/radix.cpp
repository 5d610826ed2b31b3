#include "radix.h"

#include <algorithm>
#include <cstring>

namespace mf {
namespace {

constexpr int kSmall = 48;  // below it an insertion sort is quicker than clearing 2048 bins

uint32_t kth_of_few(uint32_t* x, int64_t n, int64_t rank, int64_t* above) {
  for (int64_t i = 1; i < n; ++i) {
    const uint32_t v = x[i];
    int64_t j = i;
    for (; j > 0 && x[j - 1] < v; --j) x[j] = x[j - 1];
    x[j] = v;
  }
  const uint32_t value = x[rank - 1];
  int64_t first = rank - 1;
  while (first > 0 && x[first - 1] == value) --first;
  *above = first;
  return value;
}

// Histogram of one digit in two tables: equal neighbours, common in bf16, would wait for each other
// in one.
template <int BINS>
void count_digits(const uint32_t* x, int64_t n, int shift, uint32_t (&bins)[2][BINS]) {
  std::memset(bins, 0, sizeof bins);
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    ++bins[0][(x[i] >> shift) & (BINS - 1)];
    ++bins[1][(x[i + 1] >> shift) & (BINS - 1)];
    ++bins[0][(x[i + 2] >> shift) & (BINS - 1)];
    ++bins[1][(x[i + 3] >> shift) & (BINS - 1)];
  }
  for (; i < n; ++i) ++bins[0][(x[i] >> shift) & (BINS - 1)];
}

// Narrows x[n] to the elements whose digit holds the rank-th largest; updates rank and above. out
// may be x.
template <int BINS>
int64_t narrow(const uint32_t* x, int64_t n, int shift, int64_t* rank, int64_t* above,
               uint32_t* out) {
  static_assert(BINS >= 2, "a digit has values");
  uint32_t bins[2][BINS];
  count_digits<BINS>(x, n, shift, bins);
  int64_t passed = 0;
  int digit = BINS - 1;
  for (;; --digit) {
    const int64_t here = (int64_t)bins[0][digit] + bins[1][digit];
    if (passed + here >= *rank) break;
    passed += here;
  }
  *rank -= passed;
  *above += passed;
  int64_t m = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t v = x[i];
    out[m] = v;
    m += (int)((v >> shift) & (BINS - 1)) == digit;
  }
  return m;
}

}  // namespace

uint32_t kth_largest(const uint32_t* bits, int64_t n, int64_t rank, uint32_t* work,
                     int64_t* above) {
  *above = 0;
  int64_t inner = 0;
  if (n <= kSmall) {
    std::copy(bits, bits + n, work);
    const uint32_t value = kth_of_few(work, n, rank, &inner);
    *above = inner;
    return value;
  }
  int64_t m = narrow<2048>(bits, n, 20, &rank, above, work);
  if (m > kSmall) m = narrow<1024>(work, m, 10, &rank, above, work);
  if (m > kSmall) m = narrow<1024>(work, m, 0, &rank, above, work);
  if (m > kSmall) return work[0];  // all digits agree
  const uint32_t value = kth_of_few(work, m, rank, &inner);
  *above += inner;
  return value;
}

int64_t nth_equal(const uint32_t* bits, int64_t n, uint32_t value, int64_t nth) {
  constexpr int64_t kChunk = 1024;
  for (int64_t at = 0; at < n; at += kChunk) {
    const int64_t end = std::min(n, at + kChunk);
    uint32_t here = 0;
    for (int64_t i = at; i < end; ++i) here += bits[i] == value;
    if (here < nth) {
      nth -= here;
      continue;
    }
    for (int64_t i = at; i < end; ++i)
      if (bits[i] == value && --nth == 0) return i;
  }
  return -1;
}

void sort_order(const uint32_t* keys, int64_t n, uint32_t* order, uint32_t* work) {
  if (n <= kSmall) {
    for (int64_t i = 0; i < n; ++i) {
      int64_t j = i;
      for (; j > 0 && keys[order[j - 1]] > keys[i]; --j) order[j] = order[j - 1];
      order[j] = (uint32_t)i;
    }
    return;
  }
  uint32_t* key_a = work;
  uint32_t* key_b = work + n;
  uint32_t* order_b = work + 2 * n;
  static thread_local uint32_t bins[3][2048];
  std::memset(bins, 0, sizeof bins);
  for (int64_t i = 0; i < n; ++i) {
    ++bins[0][keys[i] & 2047];
    ++bins[1][(keys[i] >> 11) & 2047];
    ++bins[2][keys[i] >> 22 & 2047];
  }
  // three passes: keys -> (a, order) -> (b, order_b) -> (a, order)
  const uint32_t* from_key = keys;
  const uint32_t* from = nullptr;
  for (int digit = 0; digit < 3; ++digit) {
    uint32_t* to_key = digit == 1 ? key_b : key_a;
    uint32_t* to = digit == 1 ? order_b : order;
    uint32_t start = 0;
    for (uint32_t& b : bins[digit]) {
      const uint32_t here = b;
      b = start;
      start += here;
    }
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t key = from_key[i], place = bins[digit][(key >> 11 * digit) & 2047]++;
      to_key[place] = key;
      to[place] = from ? from[i] : (uint32_t)i;
    }
    from_key = to_key;
    from = to;
  }
}

}  // namespace mf
