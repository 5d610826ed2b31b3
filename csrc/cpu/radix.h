// Ranks of magnitudes (31-bit patterns) by radix.
#pragma once

#include <cstdint>

namespace mf {

// order[i]: index of the i-th smallest of keys[n], equal ones by index. work: [3 n] words besides.
void sort_order(const uint32_t* keys, int64_t n, uint32_t* order, uint32_t* work);

}  // namespace mf
