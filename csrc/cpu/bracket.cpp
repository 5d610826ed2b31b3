#include "bracket.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "../common/numeric.h"

namespace mf {
namespace {

constexpr int64_t kSampleMost = 32768;  // magnitudes per expert
constexpr int kSampleRun = 16;          // taken side by side

uint64_t mix(uint64_t x) {  // splitmix64: sample places must not share a period with the data
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

}  // namespace

void add_samples(Runner& runner, Prepared& piece, const std::vector<bool>& wanted,
                 std::vector<std::vector<uint32_t>>& samples) {
  runner.begin(piece.work);
  const int64_t n = piece.job.numel;
  const int64_t most =
      std::clamp((int64_t)(0.5 * std::pow((double)n, 2.0 / 3)), (int64_t)kSampleRun, kSampleMost);
  const int64_t runs = std::max<int64_t>(1, most / kSampleRun), stride = n / runs;
  runner.parallel((int64_t)samples.size(), [&](int64_t k, ThreadScratch& t) {
    std::vector<uint32_t>& out = samples[(size_t)k];
    if (!wanted[(size_t)k] || (int64_t)out.size() >= 2 * kSampleMost) return;
    const int64_t length = std::min<int64_t>(kSampleRun, n);
    for (int64_t r = 0; r < runs; ++r) {
      const int64_t room = std::max<int64_t>(1, stride - length + 1);
      const int64_t at =
          std::min(r * stride + (int64_t)(mix((uint64_t)r) % (uint64_t)room), n - length);
      out.resize(out.size() + (size_t)length);
      runner.kernels.magnitudes(piece.work, t.scratch(), (int)k, at, length,
                                &out[out.size() - (size_t)length]);
    }
  });
}

Bracket bracket_of(int expert, uint32_t low, uint32_t high, const std::vector<uint32_t>& sorted) {
  Bracket b{};
  b.low = low;
  b.high = high;
  b.expert = expert;
  while (((uint64_t)(high - low) >> b.shift) >= kBins) ++b.shift;
  std::memset(b.owner, kHeavy, sizeof b.owner);
  std::fill(b.heavy, b.heavy + kHeavy + 1, ~0u);  // no magnitude
  std::vector<std::pair<int64_t, uint32_t>> runs;
  for (size_t at = 0; at < sorted.size();) {
    size_t end = at;
    while (end < sorted.size() && sorted[end] == sorted[at]) ++end;
    if (end - at >= 4) runs.push_back({-(int64_t)(end - at), sorted[at]});
    at = end;
  }
  std::sort(runs.begin(), runs.end());
  for (const auto& run : runs) {
    uint8_t& owner = b.owner[(run.second - low) >> b.shift];
    if (owner != kHeavy || b.heavies == kHeavy) continue;
    owner = (uint8_t)b.heavies;
    b.heavy[b.heavies++] = run.second;
  }
  return b;
}

Bracket bracket_from(const std::vector<uint32_t>& sample, int expert, double share,
                     const Kernels& kernels) {
  const double n = (double)sample.size();
  const double rank = share * n, margin = 4.5 * std::sqrt(n * share * (1 - share)) + 6;
  std::vector<uint32_t> work(sample.size() + 64);
  const auto ranked = [&](double place) {
    int64_t above = 0;
    return kernels.kth_largest(sample.data(), (int64_t)n, (int64_t)place, work.data(), &above);
  };
  const uint32_t high = n > 0 && rank - margin >= 1 ? ranked(rank - margin) : kAbsMask;
  const uint32_t low = n > 0 && rank + margin <= n ? ranked(rank + margin) : 0;
  std::vector<uint32_t> inside;
  for (const uint32_t x : sample)
    if (x >= low && x <= high) inside.push_back(x);
  std::sort(inside.begin(), inside.end());
  return bracket_of(expert, low, high, inside);
}

}  // namespace mf
