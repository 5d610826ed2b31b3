#include "radix.h"

#include <algorithm>
#include <cstring>

namespace mf {
namespace {

constexpr int kSmall = 48;  // below it an insertion sort is quicker than clearing bins

}  // namespace

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
