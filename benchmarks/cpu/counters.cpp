// Cycles and instructions of the native loops per 8 elements and expert, on one thread and on data
// that stays in the caches: what the arithmetic costs, whatever else the machine does at the same
// time.
//
//   make bench-counters        builds it with the instruction set's own flags and runs it
//   counters [rows] [rounds]   rows of 4096 columns; 4 rows of 9 tensors fit an L2 cache of 512 KiB
//
// Needs the CPU's counters (Linux, perf_event_open); without them the two columns are 0. Under
// valgrind's callgrind every call is dumped under the name of its row: instructions.py reads those.
#include <linux/perf_event.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "magic_fast.h"

#if __has_include(<valgrind/callgrind.h>)
#include <valgrind/callgrind.h>
#else
#define CALLGRIND_TOGGLE_COLLECT
#define CALLGRIND_DUMP_STATS_AT(name) (void)(name)
#endif

namespace {

constexpr int64_t kCols = 4096;

class Counters {  // cycles and instructions of this thread, outside the kernel
 public:
  Counters() : group_(open(PERF_COUNT_HW_CPU_CYCLES, -1)) {
    if (group_ >= 0) open(PERF_COUNT_HW_INSTRUCTIONS, group_);
  }
  struct Values {
    uint64_t count = 0, cycles = 0, instructions = 0;
  };
  Values read() const {
    Values v;
    if (group_ >= 0 && ::read(group_, &v, sizeof v) != sizeof v) v = {};
    return v;
  }

 private:
  static int open(uint64_t what, int group) {
    perf_event_attr a;
    std::memset(&a, 0, sizeof a);
    a.size = sizeof a, a.type = PERF_TYPE_HARDWARE, a.config = what;
    a.exclude_kernel = a.exclude_hv = 1, a.read_format = PERF_FORMAT_GROUP;
    return (int)syscall(SYS_perf_event_open, &a, 0, -1, group, 0);
  }
  int group_;
};

uint16_t to_bf16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
float to_float(uint16_t h) {
  const uint32_t u = (uint32_t)h << 16;
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

enum Method {
  kTaskArithmetic,
  kTies,
  kTiesSelect,
  kTiesMerge,
  kDareTies,
  kDella,
  kWscAlone,
  kCounts,
  kLargest,
  kBand,
  kVariance,
  kConsensus,
  kLimited,
  kAlone,
  kScores
};
struct Row {
  const char* name;
  Method method;
  bool wsc;
};
constexpr Row kRows[] = {{"task arithmetic", kTaskArithmetic, false},
                         {"task arithmetic + WSC", kTaskArithmetic, true},
                         {"TIES: select", kTiesSelect, false},
                         {"TIES: merge", kTiesMerge, false},
                         {"TIES: merge + WSC", kTiesMerge, true},
                         {"DARE-TIES", kDareTies, false},
                         {"DARE-TIES + WSC", kDareTies, true},
                         {"DELLA", kDella, false},
                         {"WSC alone", kWscAlone, true},
                         {"vote of counts, weighted mean", kCounts, false},
                         {"vote of masses, largest", kLargest, false},
                         {"band, linear", kBand, false},
                         {"variance, agreeing mean (SCE)", kVariance, false},
                         {"consensus", kConsensus, false},
                         {"limited (NearSwap)", kLimited, false},
                         {"nonzero mean, alone (RAM+)", kAlone, false},
                         {"scores (PCB)", kScores, false}};

struct Tensors {
  int64_t n;
  std::vector<uint16_t> base, merged, out;
  std::vector<std::vector<uint16_t>> experts;

  Tensors(int64_t rows, int k) : n(rows * kCols), base(n), merged(n), out(n) {
    std::mt19937 words(1);
    std::normal_distribution<float> normal;
    for (uint16_t& x : base) x = to_bf16(0.02f * normal(words));
    const auto moved = [&](uint16_t x) { return to_bf16(to_float(x) + 0.0015f * normal(words)); };
    std::transform(base.begin(), base.end(), merged.begin(), moved);
    experts.assign((size_t)k, std::vector<uint16_t>(n));
    for (auto& e : experts) std::transform(base.begin(), base.end(), e.begin(), moved);
  }
};

mf_job job_of(Tensors& t, Method method, std::vector<mf_expert>& experts) {
  mf_job job;
  std::memset(&job, 0, sizeof job);
  const bool ties = method == kTies || method == kTiesSelect || method == kTiesMerge;
  for (size_t k = 0; k < t.experts.size(); ++k) {
    mf_expert& e = experts[k];
    std::memset(&e, 0, sizeof e);
    e.data = t.experts[k].data(), e.dtype = MF_BF16;
    e.weight = method == kTaskArithmetic ? 0.3f : 1;
    e.factor = method == kDareTies ? 2 : 1;
    e.lambda = 1, e.included = 1, e.top_count = -1, e.stream = 77777 * k + 5;
    if (ties) e.trim = MF_TRIM_BAND, e.count = t.n / 5;
    if (method == kDareTies) e.trim = MF_TRIM_RANDOM, e.random_bound = 0x80000000u;
    if (method == kDella) e.trim = MF_TRIM_RANKED, e.density = 0.5, e.epsilon = 0.15;
  }
  job.base = t.base.data(), job.base_dtype = MF_BF16;
  job.out = t.out.data(), job.out_dtype = MF_BF16;
  job.experts = experts.data(), job.num_experts = (int32_t)experts.size();
  job.numel = job.total = t.n, job.rank_cols = kCols, job.scale = 1, job.seed = 42;
  job.contributors = MF_ALL;
  if (ties || method == kDareTies || method == kDella)
    job.vote = MF_VOTE_MASS, job.contributors = MF_AGREEING;
  if (ties || method == kDella) job.reduce = MF_WEIGHTED_MEAN;
  for (mf_expert& e : experts) {
    e.alone = 1.1f;
    if (method == kBand)
      e.trim = MF_TRIM_BAND, e.threshold = 0.001f, e.top_count = t.n / 20, e.top_threshold = 0.003f;
    if (method == kVariance) e.trim = MF_TRIM_VARIANCE, e.threshold = 1e-6f;
    if (method == kAlone) e.trim = MF_TRIM_ABOVE, e.threshold = 0.001f;
    if (method == kScores)
      e.threshold = 1e-5f, e.top_threshold = 0.004f, e.score_cut = -0.01f, e.score_top = 0.01f;
  }
  job.selected = method == kBand || method == kVariance || method == kAlone || method == kScores;
  if (method == kCounts || method == kLargest || method == kVariance) {
    job.vote = method == kCounts ? MF_VOTE_COUNT : MF_VOTE_MASS;
    job.contributors = MF_AGREEING;
    job.reduce = method == kLargest ? MF_MAX : MF_WEIGHTED_MEAN;
    job.vote_on = method == kVariance ? MF_VOTE_UNWEIGHTED : MF_VOTE_WEIGHTED;
    job.least = method == kVariance ? 1e-6f : 0;
  }
  if (method == kConsensus) job.consensus = MF_CONSENSUS_LAMBDA, job.min_tasks = 1;
  if (method == kLimited) job.limited = 1, job.limit = 0.001f;
  if (method == kAlone) job.contributors = MF_NONZERO, job.reduce = MF_MEAN, job.alone = 1;
  if (method == kScores) job.competes = 1;
  if (method == kWscAlone) job.merged = t.merged.data(), job.merged_dtype = MF_BF16;
  return job;
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t rows = argc > 1 ? std::atoll(argv[1]) : 4;
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 60;
  const mf_options options = {1, -1};
  int32_t isa = 0;
  if (mf_isa_chosen(&options, &isa) != MF_OK) return std::printf("%s\n", mf_last_error()), 1;
  const Counters counters;
  std::printf("%s, one thread, bf16, %lld x %lld; least of %d runs\n\n", mf_isa_name(isa),
              (long long)rows, (long long)kCols, rounds);
  std::printf("| work | K | cycles | instructions | ns |\n|---|--:|--:|--:|--:|\n");
  for (const int k : {3, 8}) {
    Tensors t(rows, k);
    mf_calibration wsc;
    std::memset(&wsc, 0, sizeof wsc);
    wsc.rows = rows, wsc.cols = kCols, wsc.p = 2, wsc.strength = wsc.scale = 1, wsc.guards = 1;
    for (const Row& row : kRows) {
      double cycles = 1e30, instructions = 1e30, seconds = 1e30;
      std::vector<mf_expert> selected((size_t)k);
      mf_job first = job_of(t, kTies, selected);
      if (row.method == kTiesMerge) mf_cpu_select(&first, 1, &options);
      for (int round = 0; round < rounds; ++round) {
        std::vector<mf_expert> experts((size_t)k);
        mf_job job = job_of(t, row.method, experts);
        if (row.method == kTiesMerge) experts = selected, job.selected = 1;
        if (row.wsc) job.calibration = &wsc;
        const auto begin = std::chrono::steady_clock::now();
        CALLGRIND_TOGGLE_COLLECT;
        const Counters::Values before = counters.read();
        const mf_status status = row.method == kTiesSelect ? mf_cpu_select(&job, 1, &options)
                                                           : mf_cpu_merge(&job, 1, &options);
        const Counters::Values after = counters.read();
        CALLGRIND_TOGGLE_COLLECT;
        char name[80];
        std::snprintf(name, sizeof name, "%s, K = %d", row.name, k);
        CALLGRIND_DUMP_STATS_AT(name);
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
        if (status != MF_OK) return std::printf("%s\n", mf_last_error()), 1;
        cycles = std::min(cycles, (double)(after.cycles - before.cycles));
        instructions = std::min(instructions, (double)(after.instructions - before.instructions));
        seconds = std::min(seconds, took.count());
      }
      const double each = (double)(t.n * k);
      std::printf("| %s | %d | %.1f | %.1f | %.2f |\n", row.name, k, 8 * cycles / each,
                  8 * instructions / each, 8e9 * seconds / each);
    }
  }
}
