// What the orchestration (compiled once) hands to the loops (compiled once per instruction set).
// Plain data.
#pragma once

#include <stdint.h>

#include "magic_fast.h"

namespace mf {

constexpr int kTile = 512;  // elements per pass over the stages; all of a tile's buffers stay in
                            // L1. Row sums are taken in float32 over a tile, in float64 beyond it
constexpr int64_t kBlock =
    65536;                    // sums over more than this are float64 partials, added in index order
constexpr int kTilePad = 16;  // buffers are zero up to the next multiple of the 16 virtual lanes
constexpr int kBins = 1024;   // of a search bracket
constexpr int kMaxVectors = 1025;   // experts and d in the row statistics of one job
constexpr int kHeavy = 8;           // values of a search bracket that are counted instead of listed
constexpr int kMostCompeting = 64;  // experts whose scores are counted at once
constexpr int64_t kNone = INT64_MAX;  // no bad index so far

// One job, prepared: what can be known before the first element.
struct Work {
  const mf_job* job;
  const mf_expert* experts;
  const uint8_t* const* masks;  // [K] keep bytes of the ranked trims for a range, or null entries
  int64_t mask_start;           // element of the job that masks[k][0] belongs to
  int k;
  int m;              // vectors of the row statistics: all experts and d; 0: none
  int included;       // how many of the experts the coefficient is made of
  bool keep_tau;      // raw task vectors of all experts stay in the scratch (statistics, consensus)
  bool linear;        // no vote, all contribute: sums as they come, no values kept
  bool traced;        // what is not finite shows in the linear sum, or in the vote's
  bool variance;      // a trim looks at all experts at once
  bool gram, powers;  // which sums the calibration needs besides the squared norms
  bool wide;          // inner products in float64
  float divisor;      // of a linear mean, 1 otherwise
  // Raw task vectors are looked at after the trims.
  bool compares() const {
    return variance || (!job->merged && job->consensus == MF_CONSENSUS_LAMBDA);
  }
};

// One thread's buffers. Every pointer is 64-byte aligned and padded to kTilePad.
struct Scratch {
  float* base;      // [kTile]
  float* tau;       // [K][kTile] raw task vectors
  float* value;     // [K][kTile] trimmed, rescaled, weighted
  float* delta;     // [kTile]
  uint32_t* words;  // [2 (kTile + 64)] random words
  uint32_t* bits;   // [kTile + 64] compacted magnitudes of a search
  float* lanes;     // [pairs of M vectors, rounded up to 8][16] sums of a tile, lane by lane
  // what this thread found
  int64_t* kept;       // [K]
  int64_t* nonfinite;  // [K]
  int64_t base_nonfinite, merged_nonfinite, overflow;
};

// One bracket of one search during one pass: magnitudes (bit patterns) in [low, high] are binned.
struct Bracket {
  uint32_t low, high;
  int shift;  // bin = (bits - low) >> shift
  int expert;
  int heavies;
  uint32_t heavy[kHeavy + 1];  // values counted by themselves, the last one is none
  uint8_t owner[kBins];        // bin -> index into heavy
};

// What one thread counted for one bracket.
struct BracketCounts {
  int64_t above;                 // magnitudes > high
  int64_t bins[kBins + kHeavy];  // the heavy values of the piece at hand behind the others
  uint32_t* list;                // magnitudes in the bracket that are no heavy value
  int64_t listed, capacity;
  bool overflowed;  // the list is incomplete
};

// The loops. [start, start + n) are elements of the job's arrays.
struct Kernels {
  // out = base + factor * delta, tile by tile.
  void (*merge)(const Work&, Scratch&, int64_t start, int64_t n, float factor);
  // delta into `delta` (null: the scratch) and the row sums added to pairs and powers.
  void (*statistics)(const Work&, Scratch&, int64_t start, int64_t n, float* delta, double* pairs,
                     double* powers);
  // Inner products of the task vectors, added to pairs. Of a Work with one vector an expert.
  void (*gram)(const Work&, Scratch&, int64_t start, int64_t n, double* pairs);
  // out = base + factor * delta from a delta kept by `statistics`; factor 1 copies `merged` where
  // there is one.
  void (*apply)(const Work&, Scratch&, int64_t start, int64_t n, const float* delta, float factor);
  // Sum of the elected signs, zeros as 0.
  int64_t (*votes)(const Work&, Scratch&, int64_t start, int64_t n);
  // Norm sums of every expert (l1, sum of squares or largest, by job.rescale) before and after the
  // trim; sums of squares of whole task vectors into squares, unless null.
  void (*norms)(const Work&, Scratch&, int64_t start, int64_t n, double* before, double* after,
                double* squares);
  // Sums of squares of the values of every expert, added.
  void (*energies)(const Work&, Scratch&, int64_t start, int64_t n, double* squares);
  // Entries that each expert holds alone, and together with others, added: [K] each.
  void (*holders)(const Work&, Scratch&, int64_t start, int64_t n, int64_t* alone, int64_t* shared);
  // Variances over the experts; how many are not zero.
  int64_t (*variances)(const Work&, Scratch&, int64_t start, int64_t n, float* out);
  // Upper halves of the ordered bit patterns of all scores, or lower halves of those with a prefix,
  // counted: [K][65536]; the largest pattern of each expert, kept.
  void (*scores)(const Work&, Scratch&, int64_t start, int64_t n, const uint32_t* prefix,
                 uint32_t* counts, uint32_t* top);
  // |tau| bit patterns of one expert.
  void (*magnitudes)(const Work&, Scratch&, int expert, int64_t start, int64_t n, uint32_t* bits);
  // One pass of `count` searches, sorted by expert.
  void (*scan)(const Work&, Scratch&, int64_t start, int64_t n, const Bracket* brackets, int count,
               BracketCounts* counts);
  // The rank-th largest (1: the largest) of bits[n], n > 0, and how many are larger. work: [n +
  // 64].
  uint32_t (*kth_largest)(const uint32_t* bits, int64_t n, int64_t rank, uint32_t* work,
                          int64_t* above);
  // l1, sum of squares, largest magnitude of [start, start + n) of expert 0, added (largest: kept).
  void (*row_norms)(const Work&, Scratch&, int64_t start, int64_t n, double sums[3]);
  // Random words of elements [flat, flat + n).
  void (*words)(uint64_t flat, int64_t n, uint64_t stream, uint64_t seed, uint32_t* out);
};

namespace baseline {
const Kernels* kernels();
}
namespace avx2 {
const Kernels* kernels();
}
namespace avx512 {
const Kernels* kernels();
}
namespace neon {
const Kernels* kernels();
}

}  // namespace mf
