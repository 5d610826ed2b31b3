// Exact order statistics of magnitudes in memory: 31-bit patterns, 11 + 10 + 10 bits at a time.
// Linear, any input.
#pragma once

#include <cstdint>

namespace mf {

// The rank-th largest of bits[n] (rank from 1). *above: how many are strictly larger. work: [n].
uint32_t kth_largest(const uint32_t* bits, int64_t n, int64_t rank, uint32_t* work, int64_t* above);

// Index of the nth (from 1) element equal to `value`.
int64_t nth_equal(const uint32_t* bits, int64_t n, uint32_t value, int64_t nth);

// order[i]: index of the i-th smallest of keys[n], equal ones by index. work: [3 n] words besides.
void sort_order(const uint32_t* keys, int64_t n, uint32_t* order, uint32_t* work);

}  // namespace mf
