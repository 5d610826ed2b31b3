// Brackets of a search: what a sample says about where a threshold lies.
#pragma once

#include <cstdint>
#include <vector>

#include "runner.h"

namespace mf {

// Magnitudes of each wanted expert at mixed places of `piece`, added to its sample.
void add_samples(Runner& runner, Prepared& piece, const std::vector<bool>& wanted,
                 std::vector<std::vector<uint32_t>>& samples);

// [low, high] of an expert in bins; values that the sorted sample shows four times or more are
// counted by themselves, the most frequent first, one per bin.
Bracket bracket_of(int expert, uint32_t low, uint32_t high, const std::vector<uint32_t>& sorted);

// Where the magnitude that a share of all elements reaches lies, as far as the sample tells.
Bracket bracket_from(const std::vector<uint32_t>& sample, int expert, double share,
                     const Kernels& kernels);

}  // namespace mf
