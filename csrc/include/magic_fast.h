// The flat C surface of the native core: plain structs, fixed-width integers, status codes. No
// Python, no torch.
//
// Memory is the caller's: every pointer stays valid until the call returns, inputs are only read,
// `out` overlaps no input. Nothing here keeps a pointer after it returned, except a search between
// its begin and end.
#ifndef MAGIC_FAST_H_
#define MAGIC_FAST_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum mf_status {
  MF_OK = 0,
  MF_INVALID = 1,      // an argument that would corrupt memory
  MF_NO_MEMORY = 2,    // an allocation failed
  MF_UNSUPPORTED = 3,  // an instruction set or a recipe that this build or machine lacks
  MF_INTERNAL = 4      // our fault
} mf_status;

typedef enum mf_dtype { MF_F32 = 0, MF_F16 = 1, MF_BF16 = 2 } mf_dtype;

typedef enum mf_trim {
  MF_TRIM_NONE = 0,
  MF_TRIM_BAND = 1,     // rank by (|tau| descending, flat index ascending): (top, threshold] stays
  MF_TRIM_RANDOM = 2,   // Philox word < random_bound
  MF_TRIM_RANKED = 3,   // Philox word < bound that grows with the rank in the row
  MF_TRIM_GIVEN = 4,    // mask[i] != 0
  MF_TRIM_ABOVE = 5,    // |tau| > threshold, which is given
  MF_TRIM_VARIANCE = 6  // of all experts: variance over them at or above (threshold, tie_cut)
} mf_trim;

typedef enum mf_tie_rule {
  MF_TIES_EXACT = 0,
  MF_TIES_KEEP_ALL = 1,
  MF_TIES_DROP_ALL = 2
} mf_tie_rule;
typedef enum mf_rescale {
  MF_RESCALE_NONE = 0,
  MF_RESCALE_L1 = 1,
  MF_RESCALE_L2 = 2,
  MF_RESCALE_LINF = 3
} mf_rescale;
typedef enum mf_vote { MF_VOTE_NONE = 0, MF_VOTE_MASS = 1, MF_VOTE_COUNT = 2 } mf_vote;
typedef enum mf_vote_on { MF_VOTE_WEIGHTED = 0, MF_VOTE_UNWEIGHTED = 1 } mf_vote_on;
typedef enum mf_zero_vote {
  MF_ZERO_POSITIVE = 0,
  MF_ZERO_NEGATIVE = 1,
  MF_ZERO_MAJORITY = 2,
  MF_ZERO_DROP = 3
} mf_zero_vote;
typedef enum mf_contributors { MF_AGREEING = 0, MF_NONZERO = 1, MF_ALL = 2 } mf_contributors;
typedef enum mf_reduce { MF_SUM = 0, MF_MEAN = 1, MF_WEIGHTED_MEAN = 2, MF_MAX = 3 } mf_reduce;
typedef enum mf_consensus {
  MF_CONSENSUS_NONE = 0,
  MF_CONSENSUS_LAMBDA = 1,
  MF_CONSENSUS_GIVEN = 2
} mf_consensus;
typedef enum mf_variant { MF_MANIFOLD = 0, MF_MANIFOLD_EXACT = 1, MF_SPHERE = 2 } mf_variant;
typedef enum mf_eps_mode { MF_EPS_ABSOLUTE = 0, MF_EPS_RELATIVE = 1, MF_EPS_NONE = 2 } mf_eps_mode;
typedef enum mf_direction { MF_FREE = 0, MF_GROW = 1, MF_SHRINK = 2 } mf_direction;

// One expert of one job. `in` is read, `out` is written, `in/out` is given when job.selected, else
// found.
typedef struct mf_expert {
  const void* data;          // in: [numel] of `dtype`
  const uint8_t* mask;       // in: [numel], MF_TRIM_GIVEN; null otherwise
  const uint8_t* task_mask;  // in: [numel], MF_CONSENSUS_GIVEN; null otherwise
  int64_t count;  // in: MF_TRIM_BAND: how many of the largest lie at or above the threshold
  int64_t
      top_count;    // in: MF_TRIM_BAND: how many of the very largest are dropped; -1: it is no band
  uint64_t stream;  // in: high half of the Philox counter of this expert
  double density, epsilon;     // in: MF_TRIM_RANKED
  uint32_t random_bound;       // in: MF_TRIM_RANDOM: floor(p * 2^32)
  float weight;                // in
  float lambda;                // in: MF_CONSENSUS_LAMBDA
  int32_t dtype;               // in: mf_dtype
  int32_t trim;                // in: mf_trim
  int32_t included;            // in: counts in the row statistics
  float threshold;             // in/out
  float top_threshold;         // in/out
  int64_t tie_cut;             // in/out
  int64_t top_tie_cut;         // in/out
  float factor;                // in/out: in where job.rescale is MF_RESCALE_NONE or job.selected
  float alone;                 // in: factor of what this expert alone holds
  float score_cut, score_top;  // in: job.competes: scores at or below the one count as nothing, at
                               // the other in full; magnitudes are held within [threshold,
                               // top_threshold]
  int64_t kept;                // out: entries that survived the trim
  int64_t first_nonfinite;     // out: flat index of the first NaN or infinity, -1: none
} mf_expert;

// WSC of one job: rows x cols is the row view of the contiguous arrays.
typedef struct mf_calibration {
  int64_t rows, cols;
  double p;                      // 1, 2, any integer, or infinity
  double clamp_low, clamp_high;  // read where has_clamp
  double strength, scale;
  int32_t variant;     // mf_variant
  int32_t eps_mode;    // mf_eps_mode
  int32_t direction;   // mf_direction
  int32_t guards;      // bool
  int32_t has_clamp;   // bool
  int32_t per_tensor;  // bool: the whole tensor is one row
} mf_calibration;

// One tensor. With `merged` null the recipe makes the merged task vector; else it is merged - base
// and the recipe fields are not read (WSC of a model merged elsewhere).
typedef struct mf_job {
  const void* base;    // [numel] of base_dtype, or null: the experts are task vectors
  const void* merged;  // [numel] of merged_dtype, or null
  void* out;           // [numel] of out_dtype, or null (select, row statistics)
  mf_expert* experts;  // [num_experts]
  const mf_calibration* calibration;  // or null
  float* coefficient;                 // [rows] raw xi, or null
  float* factor;      // [rows] what the row was multiplied by (1: left alone), or null
  uint8_t* repaired;  // [rows] 1 where the guards left the row alone, or null
  double* norms2;     // [num_experts + 2] squared norms of the task vectors, of d, of d after the
                      // factors, or null
  const float* weights;  // in: [numel / weight_cols, num_experts + 1] of the experts and, last, of
                         // the base, one row for weight_cols elements, instead of the experts' own;
                         // or null. Plain sums only: d = sum_k weight_k tau_k + weight_K base
  int64_t weight_cols;
  int64_t numel;
  int64_t offset;     // flat index of element 0 in the whole tensor
  int64_t total;      // elements of the whole tensor
  int64_t rank_cols;  // MF_TRIM_RANKED: elements per ranked row
  uint64_t seed;
  float scale;
  float least;  // the sum of weights that divides is at least this; 0: one of 0 does not divide
  float limit;  // largest magnitude that counts in full, where `limited`
  int32_t num_experts;
  int32_t base_dtype, merged_dtype, out_dtype;
  int32_t tie_rule, rescale, vote, vote_on, zero_vote, contributors, reduce, consensus;
  int32_t min_tasks;
  int32_t limited;           // bool
  int32_t alone;             // bool: experts[k].alone acts where one expert alone is not zero
  int32_t competes;          // bool: entries are weighted by their scores, nothing is trimmed
  int32_t selected;          // bool: the in/out fields are given
  int32_t majority;          // in/out: -1, 0, 1
  int64_t base_nonfinite;    // out, -1: none
  int64_t merged_nonfinite;  // out, -1: none
  int64_t overflow;          // out: first finite result that overflows out_dtype, -1: none
} mf_job;

typedef struct mf_options {
  int32_t threads;  // 0: MAGIC_FAST_NUM_THREADS, else what the machine, the affinity and the cgroup
                    // allow
  int32_t isa;  // -1: MAGIC_FAST_CPU_ISA, else the best the CPU and the OS support; else an mf_isa
} mf_options;

typedef enum mf_isa {
  MF_ISA_BASELINE = 0,
  MF_ISA_AVX2 = 1,
  MF_ISA_AVX512 = 2,
  MF_ISA_NEON = 3,
  MF_ISA_COUNT = 4
} mf_isa;

// What went wrong in the last call of this thread, in words.
const char* mf_last_error(void);

// Names of instruction sets: "baseline", "avx2", "avx512", "neon". Compiled into this build?
// Supported here?
const char* mf_isa_name(int32_t isa);
int32_t mf_isa_compiled(int32_t isa);
int32_t mf_isa_supported(int32_t isa);
// The one that runs, after MAGIC_FAST_CPU_ISA.
mf_status mf_isa_chosen(const mf_options* options, int32_t* isa);
int32_t mf_num_threads(const mf_options* options);

// Thresholds, tie cuts, factors and majority of `count` jobs into their in/out fields.
mf_status mf_cpu_select(mf_job* jobs, int64_t count, const mf_options* options);
// Selects where needed, then merges (or, with `merged`, calibrates) `count` jobs into their `out`.
mf_status mf_cpu_merge(mf_job* jobs, int64_t count, const mf_options* options);
// gram [rows, K, K], dots [rows, K], norm2 [rows] of the raw task vectors and merged - base.
mf_status mf_cpu_row_stats(const mf_job* job, double* gram, double* dots, double* norm2,
                           const mf_options* options);
// gram [numel / cols, K, K]: inner products of the task vectors of every `cols` elements are added
// to what is there, in float32 within 512 elements (wide: in float64) and in float64 beyond. Of one
// row that comes in pieces, all but the last a multiple of 65536 elements, in order.
mf_status mf_cpu_gram(mf_job* job, int64_t cols, int32_t wide, double* gram,
                      const mf_options* options);
// out = base + coefficient[row] * (merged - base).
mf_status mf_cpu_scale(mf_job* job, const float* coefficient, const mf_options* options);
// l1, l2, linf [rows] each, of x - base (x where base is null).
mf_status mf_cpu_row_norms(const mf_job* job, double* l1, double* l2, double* linf,
                           const mf_options* options);

// Random words (Philox 4x32-10) of elements [flat, flat + n): what random and ranked trims compare
// with.
mf_status mf_cpu_random_words(uint64_t flat, int64_t n, uint64_t stream, uint64_t seed,
                              uint32_t* words, const mf_options* options);

// For a selection of pieces, with job.selected: norm sums (job.rescale) before and after the trim
// of every fixed 65536-element block of the piece, [blocks, num_experts] each (largest magnitudes
// for MF_RESCALE_LINF), and, where `squares` is not null, sums of squares of the whole task vectors
mf_status mf_cpu_norm_sums(mf_job* piece, double* before, double* after, double* squares,
                           const mf_options* options);
// ... sums of squares of the values that are voted on, [blocks, num_experts] ...
mf_status mf_cpu_energies(mf_job* piece, double* squares, const mf_options* options);
// ... how many entries each expert holds alone and together with others, [num_experts] each ...
mf_status mf_cpu_holders(mf_job* piece, int64_t* alone, int64_t* shared, const mf_options* options);
// ... and the sum of the elected signs, zeros as 0.
mf_status mf_cpu_vote_sum(mf_job* piece, int64_t* sum, const mf_options* options);

// With job.competes: digits of the scores of a piece, [num_experts, 65536] added. `prefix` null:
// the upper halves of the bit patterns (in an order that unsigned numbers have too); else the lower
// halves of those whose upper half is prefix[k]. top [num_experts]: largest bit pattern, kept.
mf_status mf_cpu_score_counts(mf_job* piece, const uint32_t* prefix, int64_t* counts, uint32_t* top,
                              const mf_options* options);

// (threshold, tie cut) of the floor(fraction * #(variance != 0)) largest variances over the experts
// of a whole tensor. Takes 4 bytes an element.
mf_status mf_cpu_select_variance(mf_job* job, double fraction, float* threshold, int64_t* tie_cut,
                                 const mf_options* options);

// A selection over data that arrives in pieces: begin, then feed whatever `wants` lists until it
// lists nothing.
typedef struct mf_search mf_search;
// `prototype`: recipe fields, num_experts, counts and tie rule; data pointers are not read. total:
// all elements.
mf_status mf_search_begin(const mf_job* prototype, mf_search** search);
// A sample of the data from anywhere, before the first pass: makes one pass enough as a rule.
// Optional.
mf_status mf_search_sample(mf_search* search, const mf_job* piece);
// Ranges [start, stop) of flat indices to feed now, in any order and any cut; count 0: finished.
mf_status mf_search_wants(mf_search* search, const int64_t** ranges, int64_t* count);
// One piece: base, experts[k].data and dtype, numel, offset. Pieces of a range must not overlap.
mf_status mf_search_feed(mf_search* search, const mf_job* piece, const mf_options* options);
// After the last range: threshold, tie_cut, top_* of every expert.
mf_status mf_search_result(mf_search* search, mf_expert* experts);
void mf_search_end(mf_search* search);

#ifdef __cplusplus
}
#endif
#endif  // MAGIC_FAST_H_
