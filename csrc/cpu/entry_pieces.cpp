// The C surface for data that comes in pieces: a search, and what a selection adds up of them.
#include <vector>

#include "entry.h"
#include "search.h"

using mf::guarded;
using mf::kernels_of;
using mf::threads_of;

struct mf_search {
  explicit mf_search(const mf_job& prototype) : search(prototype) {}
  mf::Search search;
  std::vector<int64_t> ranges;
};

namespace {

// body(runner, prepared job).
template <class F>
mf_status over(mf_job& job, const mf_options* options, int threads, F&& body) {
  return guarded([&] {
    mf::Runner runner(kernels_of(options), threads);
    mf::Prepared p(job);
    body(runner, p);
  });
}

}  // namespace

extern "C" {

mf_status mf_cpu_norm_sums(mf_job* piece, double* before, double* after, double* squares,
                           const mf_options* options) {
  return over(*piece, options, threads_of(options), [&](mf::Runner& runner, mf::Prepared& p) {
    mf::norm_sums(runner, p, before, after, squares);
  });
}

mf_status mf_cpu_energies(mf_job* piece, double* squares, const mf_options* options) {
  return over(*piece, options, threads_of(options),
              [&](mf::Runner& runner, mf::Prepared& p) { mf::energies(runner, p, squares); });
}

mf_status mf_cpu_holders(mf_job* piece, int64_t* alone, int64_t* shared,
                         const mf_options* options) {
  return over(*piece, options, threads_of(options),
              [&](mf::Runner& runner, mf::Prepared& p) { mf::holders(runner, p, alone, shared); });
}

mf_status mf_cpu_score_counts(mf_job* piece, const uint32_t* prefix, int64_t* counts, uint32_t* top,
                              const mf_options* options) {
  const bool small = piece->numel * piece->num_experts <= mf::kSmallJob;
  return over(*piece, options, small ? 1 : threads_of(options),
              [&](mf::Runner& runner, mf::Prepared& p) {
                mf::score_counts(runner, p, prefix, counts, top);
              });
}

mf_status mf_cpu_select_variance(mf_job* job, double fraction, float* threshold, int64_t* tie_cut,
                                 const mf_options* options) {
  return over(*job, options, threads_of(options), [&](mf::Runner& runner, mf::Prepared& p) {
    mf::select_variance(runner, p, fraction, threshold, tie_cut);
  });
}

mf_status mf_cpu_vote_sum(mf_job* piece, int64_t* sum, const mf_options* options) {
  return over(*piece, options, threads_of(options),
              [&](mf::Runner& runner, mf::Prepared& p) { *sum = mf::vote_sum(runner, p); });
}

mf_status mf_search_begin(const mf_job* prototype, mf_search** search) {
  return guarded([&] { *search = new mf_search(*prototype); });
}

mf_status mf_search_sample(mf_search* search, const mf_job* piece) {
  mf_job copy = *piece;
  return over(copy, nullptr, 1,
              [&](mf::Runner& runner, mf::Prepared& p) { search->search.sample(runner, p); });
}

mf_status mf_search_wants(mf_search* search, const int64_t** ranges, int64_t* count) {
  return guarded([&] {
    search->ranges.clear();
    for (const auto& range : search->search.wants()) {
      search->ranges.push_back(range.first);
      search->ranges.push_back(range.second);
    }
    *ranges = search->ranges.data();
    *count = (int64_t)search->search.wants().size();
  });
}

mf_status mf_search_feed(mf_search* search, const mf_job* piece, const mf_options* options) {
  mf_job copy = *piece;
  return over(copy, options, threads_of(options),
              [&](mf::Runner& runner, mf::Prepared& p) { search->search.feed(runner, p); });
}

mf_status mf_search_result(mf_search* search, mf_expert* experts) {
  return guarded([&] { search->search.result(experts); });
}

void mf_search_end(mf_search* search) { delete search; }

}  // extern "C"
