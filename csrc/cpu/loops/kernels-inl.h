// The loops of one instruction set, and the table by which they are called.
#pragma once

#include "search-inl.h"
#include "store-inl.h"
#include "sums-inl.h"

namespace mf {
namespace MF_ISA_NAMESPACE {
namespace {

static void words(uint64_t flat, int64_t n, uint64_t stream, uint64_t seed, uint32_t* out) {
  uint32_t buffer[2 * (kTile + 64)];
  for (int64_t done = 0; done < n; done += kTile) {
    const int len = imin(kTile, n - done);
    const uint32_t* drawn = draw_words(flat + (uint64_t)done, len, stream, seed, buffer);
    in_memory_order((const float*)(const void*)drawn, len, (float*)(void*)(out + done));
  }
}

constexpr Kernels kTable = {merge,      statistics, gram,        apply,     votes,
                            norms,      energies,   holders,     variances, scores,
                            magnitudes, scan,       kth_largest, row_norms, words};

}  // namespace

const Kernels* kernels() { return &kTable; }

}  // namespace MF_ISA_NAMESPACE
}  // namespace mf
