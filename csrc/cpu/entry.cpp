// The C surface of the CPU for whole jobs: checks, dispatch, threads.
#include "entry.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace mf {

std::string& last_error() {
  thread_local std::string words;
  return words;
}

int threads_of(const mf_options* o) { return o && o->threads > 0 ? o->threads : default_threads(); }
const Kernels& kernels_of(const mf_options* o) { return kernels_of(choose_isa(o ? o->isa : -1)); }

}  // namespace mf

namespace {

using mf::guarded;
using mf::kernels_of;
using mf::kSmallJob;
using mf::threads_of;

void clear(mf_job& job) {
  job.base_nonfinite = job.merged_nonfinite = job.overflow = -1;
  for (int k = 0; k < job.num_experts; ++k) {
    job.experts[k].kept = 0;
    job.experts[k].first_nonfinite = -1;
  }
}

// Small jobs go to threads whole, the others one after another over all threads.
template <class F>
void run_batch(mf_job* jobs, int64_t count, const mf_options* options, F&& body) {
  const mf::Kernels& kernels = kernels_of(options);
  const int threads = threads_of(options);
  std::vector<int64_t> small, large;
  for (int64_t i = 0; i < count; ++i) {
    clear(jobs[i]);
    const int64_t work = jobs[i].numel * (jobs[i].num_experts + 1);
    (work <= kSmallJob * 8 && (count > 1 || work <= kSmallJob) ? small : large).push_back(i);
  }
  if (!small.empty()) {
    constexpr int64_t kBatch = 4;  // jobs per turn
    const int n = (int)std::min<int64_t>(threads, ((int64_t)small.size() + kBatch - 1) / kBatch);
    std::vector<mf::ThreadScratch> scratch((size_t)n);
    mf::parallel_for(
        ((int64_t)small.size() + kBatch - 1) / kBatch, n, [&](int64_t turn, int worker) {
          mf::Runner runner(kernels, &scratch[(size_t)worker]);
          const int64_t end = std::min<int64_t>((turn + 1) * kBatch, (int64_t)small.size());
          for (int64_t i = turn * kBatch; i < end; ++i) {
            mf::Prepared p(jobs[small[(size_t)i]]);
            body(runner, p);
          }
        });
  }
  if (!large.empty()) {
    mf::Runner runner(kernels, threads);
    for (const int64_t i : large) {
      mf::Prepared p(jobs[i]);
      body(runner, p);
    }
  }
}

}  // namespace

extern "C" {

const char* mf_last_error(void) { return mf::last_error().c_str(); }
const char* mf_isa_name(int32_t isa) { return mf::isa_name(isa); }
int32_t mf_isa_compiled(int32_t isa) { return mf::isa_compiled(isa); }
int32_t mf_isa_supported(int32_t isa) { return mf::isa_supported(isa); }
int32_t mf_num_threads(const mf_options* options) { return threads_of(options); }

mf_status mf_isa_chosen(const mf_options* options, int32_t* isa) {
  return guarded([&] { *isa = mf::choose_isa(options ? options->isa : -1); });
}

mf_status mf_cpu_select(mf_job* jobs, int64_t count, const mf_options* options) {
  return guarded([&] {
    run_batch(jobs, count, options,
              [](mf::Runner& runner, mf::Prepared& p) { mf::select_job(runner, p); });
  });
}

mf_status mf_cpu_merge(mf_job* jobs, int64_t count, const mf_options* options) {
  return guarded([&] {
    for (int64_t i = 0; i < count; ++i)
      if (!jobs[i].out && jobs[i].numel)
        throw mf::Failure(MF_INVALID, "merge: an output is missing.");
    run_batch(jobs, count, options, [](mf::Runner& runner, mf::Prepared& p) {
      mf::select_job(runner, p);
      mf::merge_job(runner, p);
    });
  });
}

mf_status mf_cpu_row_stats(const mf_job* job, double* gram, double* dots, double* norm2,
                           const mf_options* options) {
  return guarded([&] {
    mf_job copy = *job;
    if (!copy.calibration || !copy.merged)
      throw mf::Failure(MF_INVALID, "row_stats: rows or the merged tensor missing.");
    mf_calibration rows = *copy.calibration;
    rows.variant = MF_MANIFOLD;  // all inner products, no powers
    copy.calibration = &rows;
    std::vector<mf_expert> experts(job->experts, job->experts + job->num_experts);
    for (mf_expert& e : experts) e.included = 1;
    copy.experts = experts.data();
    mf::Runner runner(kernels_of(options), threads_of(options));
    mf::Prepared p(copy);
    mf::row_stats_job(runner, p, gram, dots, norm2);
  });
}

mf_status mf_cpu_gram(mf_job* job, int64_t cols, int32_t wide, double* gram,
                      const mf_options* options) {
  return guarded([&] {
    clear(*job);
    job->calibration = nullptr;
    const bool small = job->numel * job->num_experts <= kSmallJob;
    mf::Runner runner(kernels_of(options), small ? 1 : threads_of(options));
    mf::Prepared p(*job);
    mf::gram_job(runner, p, cols, wide != 0, gram);
  });
}

mf_status mf_cpu_scale(mf_job* job, const float* coefficient, const mf_options* options) {
  return guarded([&] {
    if (!job->calibration || !job->merged || !job->out)
      throw mf::Failure(MF_INVALID, "scale: rows, the merged tensor or the output missing.");
    clear(*job);
    const int64_t rows = job->calibration->rows, cols = job->calibration->cols;
    if (rows * cols != job->numel)
      throw mf::Failure(MF_INVALID, "scale: rows times cols must be the elements.");
    mf_job copy = *job;
    copy.calibration = nullptr;
    copy.num_experts = 0;
    mf::Runner runner(kernels_of(options), threads_of(options));
    mf::Prepared p(copy);
    runner.begin(p.work);
    constexpr int64_t kStep = mf::kBlock / 2;
    runner.parallel((copy.numel + kStep - 1) / kStep, [&](int64_t i, mf::ThreadScratch& t) {
      const int64_t end = std::min((i + 1) * kStep, copy.numel);
      for (int64_t at = i * kStep; at < end;) {
        const int64_t row = at / cols, stop = std::min(end, (row + 1) * cols);
        runner.kernels.merge(p.work, t.scratch(), at, stop - at, coefficient[row]);
        at = stop;
      }
    });
    runner.finish(p, false);
    job->base_nonfinite = copy.base_nonfinite;
    job->merged_nonfinite = copy.merged_nonfinite;
    job->overflow = copy.overflow;
  });
}

mf_status mf_cpu_row_norms(const mf_job* job, double* l1, double* l2, double* linf,
                           const mf_options* options) {
  return guarded([&] {
    mf_job copy = *job;
    if (!copy.calibration || copy.num_experts != 1)
      throw mf::Failure(MF_INVALID, "row_norms: expected rows and one tensor.");
    const int64_t rows = copy.calibration->rows, cols = copy.calibration->cols;
    copy.calibration = nullptr;
    if (rows * cols != copy.numel)
      throw mf::Failure(MF_INVALID, "row_norms: rows times cols must be the elements.");
    mf::Runner runner(kernels_of(options), threads_of(options));
    mf::Prepared p(copy);
    runner.begin(p.work);
    const auto body = [&](int64_t at, int64_t n, mf::ThreadScratch& t, double* sums) {
      runner.kernels.row_norms(p.work, t.scratch(), at, n, sums);
    };
    const auto write = [&](int64_t r, const double* sums) {
      l1[r] = sums[0];
      l2[r] = std::sqrt(sums[1]);
      linf[r] = sums[2];
    };
    if (rows < runner.threads * 2 || cols > mf::kBlock) {
      for (int64_t r = 0; r < rows; ++r) {
        double sums[3] = {};
        runner.ordered_sum(r * cols, cols, 3, 2, sums, body);
        write(r, sums);
      }
      return;
    }
    const int64_t step = std::max<int64_t>(1, mf::kBlock / std::max<int64_t>(1, cols));
    runner.parallel((rows + step - 1) / step, [&](int64_t i, mf::ThreadScratch& t) {
      for (int64_t r = i * step; r < std::min(rows, (i + 1) * step); ++r) {
        double sums[3] = {};
        body(r * cols, cols, t, sums);
        write(r, sums);
      }
    });
  });
}

mf_status mf_cpu_random_words(uint64_t flat, int64_t n, uint64_t stream, uint64_t seed,
                              uint32_t* words, const mf_options* options) {
  return guarded([&] { kernels_of(options).words(flat, n, stream, seed, words); });
}

}  // extern "C"
