// The flat C surface of the CUDA kernels: plain structs, fixed-width integers, status codes. All
// pointers are device memory, all work goes to the stream that is named, nothing waits, nothing is
// allocated. The caller keeps everything alive until the stream has passed.
#ifndef MAGIC_FAST_CUDA_H_
#define MAGIC_FAST_CUDA_H_

#include "magic_fast.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { MF_GPU_MOST_EXPERTS = 64 };

// How an expert is trimmed.
typedef enum mf_gpu_kind {
  MF_GPU_ALL = 0,     // everything stays
  MF_GPU_ABOVE = 1,   // rank by (|tau| descending, flat index ascending) at or above a threshold
  MF_GPU_BAND = 2,    // ... and below another
  MF_GPU_RANDOM = 3,  // Philox word < bound
  MF_GPU_BYTES = 4    // mask[i] != 0
} mf_gpu_kind;

// What is done with the trimmed values. The words are those of magic_fast.h.
typedef struct mf_gpu_rule {
  int8_t vote, zero_vote, contributors, reduce;
  int8_t unweighted;  // bool: the vote is on values before their weights
  int8_t consensus;
  int8_t merged;   // bool: d = merged - base, the recipe is not run
  int8_t limited;  // bool: large entries of delta are shortened
  int8_t singled;  // bool: what one expert alone holds has a factor
  int8_t scored;   // bool: scores weigh each entry (PCB)
} mf_gpu_rule;

// What a search compares.
typedef enum mf_gpu_key {
  MF_KEY_MAGNITUDE = 0,  // |tau| of an expert
  MF_KEY_VARIANCE = 1,   // over all experts; one target, of owner 0
  MF_KEY_SCORE = 2       // of an expert's entry (score_key of ../common/scores.h)
} mf_gpu_key;

// One tensor. `integers` [6 K + 2]: K each of threshold bits, tie cuts, bits and cuts of the top
// threshold, Philox streams, random bounds; then seed and majority. `numbers` [6 K + 4]: K each of
// factors, weights, lambdas, factors of what is held alone, least and largest scores; then scale,
// the least number of tasks, the limit and the least sum of weights.
typedef struct mf_gpu_job {
  const void* base;  // [numel], or null
  const void* merged;
  void* out;
  const void* experts[MF_GPU_MOST_EXPERTS];        // [numel] each
  const uint8_t* masks[MF_GPU_MOST_EXPERTS];       // [numel] where the kind is MF_GPU_BYTES
  const uint8_t* task_masks[MF_GPU_MOST_EXPERTS];  // [numel] where consensus is given
  const int64_t* integers;
  const float* numbers;
  int64_t*
      report;      // [K + 3] first bad flat index: experts, merged, base, overflow; INT64_MAX: none
  int64_t* kept;   // [K] added to: entries that stayed
  int64_t offset;  // flat index of element 0 in the whole tensor
  int32_t k;
  int8_t base_dtype, merged_dtype, out_dtype, unused;
  uint8_t dtypes[MF_GPU_MOST_EXPERTS], kinds[MF_GPU_MOST_EXPERTS];
  mf_gpu_rule rule;
} mf_gpu_job;

// Many small tensors of one shape of job: of each the addresses and numbers come from a table.
typedef struct mf_gpu_table {
  const int64_t* rows;         // [jobs, K + 4]: base, out, K experts, elements, offset
  const int64_t* block_job;    // [blocks]: which tensor ...
  const int64_t* block_start;  // ... and its first element
  int64_t blocks;
  int32_t aligned;  // bool: all addresses are multiples of 16
} mf_gpu_table;

// WSC by rows. Policy as in magic_fast.h; the outputs are the caller's.
typedef struct mf_gpu_rows {
  mf_calibration policy;
  const uint8_t* included;  // [K] on the host: counts in the coefficient
  float* coefficient;       // [rows] raw xi
  uint8_t* repaired;        // [rows]
  double* norms2;           // [rows, K + 2]
  double* pairs;            // [rows, (K + 1)(K + 2)/2]: only the sums are taken, nothing is merged
  double* powers;           // [rows, K + 1] with `pairs`, where p is not 2
  double* work;             // [mf_cuda_rows_work()] or null where that is 0
  int32_t keeps;            // bool: rows of factor 1 keep the bits of `merged`
} mf_gpu_rows;

// One threshold to find.
typedef struct mf_gpu_targets {
  int32_t count;
  int32_t owner[2 * MF_GPU_MOST_EXPERTS];  // expert
  int8_t top[2 * MF_GPU_MOST_EXPERTS];     // bool: upper edge of a band
  int8_t ties[2 * MF_GPU_MOST_EXPERTS];    // mf_tie_rule
} mf_gpu_targets;

// What a select works with; sizes by mf_cuda_select_plan.
typedef struct mf_gpu_search {
  int32_t* sample;        // [K, sample]; [1, sample] of variances
  int64_t* state;         // [targets, 8], zeroed
  int32_t* heavy;         // [targets, 2]
  int32_t* bins;          // [targets, 2^log_bins], zeroed
  int64_t* coarse;        // [targets, 2^log_bins / 1024]
  int64_t* above;         // [segments, targets]
  int64_t* equals;        // [segments, targets, 2]
  const int64_t* places;  // [targets, 3]
  const int64_t* counts;  // [targets]
  int64_t numel, size, runs, run, segments, length;
  int32_t log_bins, scans, key;
} mf_gpu_search;

// Architectures and compiler this was built for, as "sm_80 sm_90 PTX, nvcc 13.0"; "emulated" on a
// host.
const char* mf_cuda_build(void);
// What went wrong in the last call of this thread, in words.
const char* mf_cuda_last_error(void);

// out = base + d, or base + factors[row] * d of [rows, cols]. Elements come from `table` where it
// is given.
mf_status mf_cuda_merge(const mf_gpu_job* job, int64_t rows, int64_t cols, const float* factors,
                        int32_t keeps, const mf_gpu_table* table, int32_t processors, void* stream);
// Rows merged and calibrated, or (pairs given) only summed.
mf_status mf_cuda_rows(const mf_gpu_job* job, const mf_gpu_rows* rows, int32_t processors,
                       void* stream);
// Doubles that `work` must have room for.
int64_t mf_cuda_rows_work(int32_t k, int32_t variant, int64_t rows, int32_t processors);

// Magnitudes of a sample into search.sample.
mf_status mf_cuda_sample(const mf_gpu_job* job, const mf_gpu_search* search, void* stream);
// From the sample, sorted, to thresholds and cuts in job.integers (written).
mf_status mf_cuda_select(const mf_gpu_job* job, const mf_gpu_search* search, const int32_t* sorted,
                         const mf_gpu_targets* targets, int64_t* integers, void* stream);

// Sums before and after the trim of blocks of 65536 elements: [blocks, K, 2]; power 1, 2 or 0
// (largest).
mf_status mf_cuda_norm_sums(const mf_gpu_job* job, int64_t numel, int32_t power, double* partial,
                            void* stream);
// Signs elected, zeros as 0, added to sum[0].
mf_status mf_cuda_vote_sum(const mf_gpu_job* job, int64_t numel, int64_t* sum, void* stream);
// Entries that each expert holds alone, and with others, after the trims: added to counts[K, 2].
mf_status mf_cuda_held(const mf_gpu_job* job, int64_t numel, int64_t* counts, void* stream);
// mask[i] = the variance of entry i ranks at or above the threshold and cut of expert 0.
mf_status mf_cuda_keep_varied(const mf_gpu_job* job, int64_t numel, uint8_t* mask, void* stream);
// |tau| bits of expert 0, [numel].
mf_status mf_cuda_magnitudes(const mf_gpu_job* job, int64_t numel, int32_t* bits, void* stream);
// mask[row, order[row, r]] = word < floor(p(r) 2^32), p from low to low + span over the ranks r.
mf_status mf_cuda_keep_ranked(const int64_t* order, uint8_t* mask, int64_t rows, int64_t cols,
                              int64_t offset, uint64_t stream_word, uint64_t seed, double low,
                              double span, double density, void* stream);

#ifdef __cplusplus
}
#endif
#endif  // MAGIC_FAST_CUDA_H_
