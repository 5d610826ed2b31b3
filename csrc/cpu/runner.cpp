#include "runner.h"

#include <algorithm>
#include <string>

#include "../common/rules.h"

namespace mf {

Scratch& ThreadScratch::prepare(const Work& work) {
  const size_t k = (size_t)std::max(work.k, 1), tile = (size_t)kTile, pad = 64;
  const size_t words = kTile + 64, m = work.gram && !work.wide ? (size_t)work.m : 0;
  const size_t lanes = (m * (m + 1) / 2 + 7) / 8 * 8 * 16;
  const size_t floats = (tile + pad) + k * tile + pad + (work.linear ? 1 : k) * tile +
                        (tile + pad) + 3 * words + lanes;
  if (floats > float_room_) floats_.resize(float_room_ = floats);
  if (2 * k > count_room_) counts_.resize(count_room_ = 2 * k);
  float* p = floats_.get();
  scratch_.base = p, p += tile + pad;
  scratch_.tau = p, p += k * tile + pad;
  scratch_.value = p, p += (work.linear ? 1 : k) * tile;
  scratch_.delta = p, p += tile + pad;
  scratch_.words = reinterpret_cast<uint32_t*>(p), p += 2 * words;
  scratch_.bits = reinterpret_cast<uint32_t*>(p), p += words;
  scratch_.lanes = p;
  scratch_.kept = counts_.get();
  scratch_.nonfinite = counts_.get() + k;
  std::fill(scratch_.kept, scratch_.kept + k, 0);
  std::fill(scratch_.nonfinite, scratch_.nonfinite + k, kNone);
  scratch_.base_nonfinite = scratch_.merged_nonfinite = scratch_.overflow = kNone;
  return scratch_;
}

float* ThreadScratch::row(int64_t n) {
  const size_t needed = (size_t)n + kTilePad;
  if (needed > row_room_) row_.resize(row_room_ = needed);
  return row_.get();
}

double* ThreadScratch::doubles(size_t n) {
  if (n > double_room_) doubles_.resize(double_room_ = n);
  return doubles_.get();
}

namespace {

void require(bool condition, const char* message) {
  if (!condition) throw Failure(MF_INVALID, message);
}

void check(const mf_job& job) {
  const auto dtype = [](int d) { return d >= MF_F32 && d <= MF_BF16; };
  require(job.numel >= 0 && job.offset >= 0, "job: numel and offset must not be negative.");
  require(job.num_experts >= 0 && job.num_experts < kMaxVectors,
          "job: expected at most 1024 experts.");
  require(job.num_experts == 0 || job.experts, "job: experts missing.");
  require(!job.base || dtype(job.base_dtype), "job: unknown dtype of the base.");
  require(!job.merged || dtype(job.merged_dtype), "job: unknown dtype of the merged tensor.");
  require(!job.out || dtype(job.out_dtype), "job: unknown dtype of the output.");
  for (int k = 0; k < job.num_experts; ++k) {
    const mf_expert& e = job.experts[k];
    require(dtype(e.dtype), "job: unknown dtype of an expert.");
    require(e.data || job.numel == 0, "job: an expert's data is missing.");
    require(e.trim != MF_TRIM_GIVEN || e.mask || job.numel == 0, "job: a keep mask is missing.");
    require(job.consensus != MF_CONSENSUS_GIVEN || e.task_mask || job.numel == 0,
            "job: a task mask is missing.");
    require(e.trim != MF_TRIM_RANKED || (job.rank_cols > 0 && job.numel % job.rank_cols == 0) ||
                job.numel == 0,
            "job: rank_cols must divide the tensor.");
  }
  require(!job.competes || job.num_experts <= kMostCompeting,
          "job: expected at most 64 experts that compete.");
  if (job.weights) {
    require(job.weight_cols > 0 && job.numel % job.weight_cols == 0,
            "job: weight_cols must divide the tensor.");
    bool plain = !job.merged && job.vote == MF_VOTE_NONE && job.contributors == MF_ALL &&
                 job.reduce == MF_SUM && job.consensus == MF_CONSENSUS_NONE && job.scale == 1 &&
                 !job.competes;
    for (int k = 0; k < job.num_experts; ++k)
      plain &= job.experts[k].trim == MF_TRIM_NONE && job.experts[k].factor == 1;
    require(plain, "job: weights of rows are those of a plain sum.");
  }
  if (const mf_calibration* c = job.calibration)
    require(c->rows >= 0 && c->cols >= 0 && (double)c->rows * (double)c->cols < 9e18 &&
                c->rows * c->cols == job.numel,
            "job: rows times cols of the calibration must be the number of elements.");
}

// What a mean without a vote divides by, as the recipe defines it: float32, in expert order.
float linear_divisor(const mf_job& job) {
  if (job.reduce != MF_MEAN && job.reduce != MF_WEIGHTED_MEAN) return 1;
  float total = 0;
  for (int k = 0; k < job.num_experts; ++k)
    total += job.reduce == MF_MEAN ? 1 : job.experts[k].weight;
  return divisor_of(job.reduce, MF_VOTE_NONE, total, 0);
}

}  // namespace

Prepared::Prepared(mf_job& j) : job(j) {
  check(job);
  work.job = &job;
  work.experts = job.experts;
  work.k = job.num_experts;
  const bool whole_sum = job.contributors == MF_ALL && job.vote == MF_VOTE_NONE &&
                         job.reduce != MF_MAX && !job.competes;
  work.linear = job.merged || whole_sum;
  work.traced = work.linear || job.vote == MF_VOTE_MASS;
  work.divisor = work.linear && !job.merged ? linear_divisor(job) : 1;
  if (const mf_calibration* c = job.calibration) {
    for (int k = 0; k < work.k; ++k) work.included += job.experts[k].included != 0;
    require(work.included > 0, "job: calibration without an included expert.");
    work.m = work.k + 1;
    work.gram = c->variant != MF_SPHERE;
    work.wide = c->variant == MF_MANIFOLD_EXACT;
    work.powers = c->variant != MF_MANIFOLD && c->p != 2;
  }
  for (int k = 0; k < work.k; ++k)
    work.variance |= !job.merged && job.experts[k].trim == MF_TRIM_VARIANCE;
  for (int k = 0; k < work.k; ++k)
    require(!work.variance || job.experts[k].trim == MF_TRIM_VARIANCE,
            "job: a trim by variance is one of all experts.");
  work.keep_tau = work.m > 0 || work.compares();
  masks.assign((size_t)std::max(work.k, 1), nullptr);
  for (int k = 0; k < work.k; ++k) {
    if (job.experts[k].trim == MF_TRIM_RANKED && !job.merged) ranked = true;
  }
  work.masks = masks.data();
}

Runner::Runner(const Kernels& table, int n) : kernels(table), threads(n) {
  for (int i = 0; i < n; ++i) {
    own_.push_back(std::make_unique<ThreadScratch>());
    scratch_.push_back(own_.back().get());
  }
}

Runner::Runner(const Kernels& table, ThreadScratch* borrowed)
    : kernels(table), threads(1), scratch_{borrowed} {}

void Runner::parallel(int64_t count, const std::function<void(int64_t, ThreadScratch&)>& body) {
  if (threads == 1 || count == 1) {
    for (int64_t i = 0; i < count; ++i) body(i, *scratch_[0]);
    return;
  }
  parallel_for(count, threads, [&](int64_t i, int worker) { body(i, *scratch_[(size_t)worker]); });
}

int Runner::index_of(const ThreadScratch& scratch) const {
  return (int)(std::find(scratch_.begin(), scratch_.end(), &scratch) - scratch_.begin());
}

void Runner::begin(const Work& work) {
  for (ThreadScratch* s : scratch_) s->prepare(work);
}

void Runner::finish(Prepared& p, bool count_kept) {
  const int64_t offset = p.job.offset;
  const auto first = [&](int64_t& field, int64_t found) {
    if (found != kNone && (field < 0 || found + offset < field)) field = found + offset;
  };
  for (ThreadScratch* t : scratch_) {
    const Scratch& s = t->scratch();
    for (int k = 0; k < p.work.k; ++k) {
      if (count_kept) p.job.experts[k].kept += s.kept[k];
      first(p.job.experts[k].first_nonfinite, s.nonfinite[k]);
    }
    first(p.job.base_nonfinite, s.base_nonfinite);
    first(p.job.merged_nonfinite, s.merged_nonfinite);
    first(p.job.overflow, s.overflow);
  }
}

void Runner::ordered_sum(int64_t start, int64_t n, int width, int added, double* sum,
                         const BlockBody& body) {
  constexpr int64_t kWave = 256;  // blocks whose partials wait to be added: bounds the memory
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  std::vector<double> partial((size_t)(std::min(blocks, kWave) * width));
  for (int64_t first = 0; first < blocks; first += kWave) {
    const int64_t count = std::min(kWave, blocks - first);
    std::fill(partial.begin(), partial.end(), 0.0);
    parallel(count, [&](int64_t i, ThreadScratch& s) {
      const int64_t at = (first + i) * kBlock;
      body(start + at, std::min(kBlock, n - at), s, &partial[(size_t)(i * width)]);
    });
    for (int64_t i = 0; i < count; ++i)
      for (int j = 0; j < width; ++j) {
        const double x = partial[(size_t)(i * width + j)];
        sum[j] = j < added ? sum[j] + x : std::max(sum[j], x);
      }
  }
}

}  // namespace mf
