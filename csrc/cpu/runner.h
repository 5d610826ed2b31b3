// One call's worth of threads and their buffers, and a job prepared for the loops.
#pragma once

#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <vector>

#include "dispatch.h"
#include "pool.h"
#include "work.h"

namespace mf {

// 64-byte aligned, not initialised, freed with its owner.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t n) { resize(n); }
  void resize(size_t n) {
    const size_t bytes = (n * sizeof(T) + 127) / 64 * 64;
    void* p = std::aligned_alloc(64, bytes);
    if (!p) throw std::bad_alloc();
    data_.reset(static_cast<T*>(p));
  }
  T* get() const { return data_.get(); }
  T& operator[](size_t i) const { return data_.get()[i]; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

// One thread's scratch, grown to the largest job it meets.
class ThreadScratch {
 public:
  // Ready for a job; what it found is cleared.
  Scratch& prepare(const Work& work);
  Scratch& scratch() { return scratch_; }
  // float32 [n] rounded up, for a row of deltas.
  float* row(int64_t n);
  // float64 [n].
  double* doubles(size_t n);

 private:
  Scratch scratch_{};
  Buffer<float> floats_, row_;
  Buffer<double> doubles_;
  Buffer<int64_t> counts_;
  size_t float_room_ = 0, row_room_ = 0, double_room_ = 0, count_room_ = 0;
};

// A job with everything known before the first element.
class Prepared {
 public:
  explicit Prepared(mf_job& job);
  Prepared(const Prepared&) = delete;
  Prepared& operator=(const Prepared&) = delete;

  mf_job& job;
  Work work{};
  bool ranked = false;                // some expert's trim needs ranks
  std::vector<const uint8_t*> masks;  // [K], work.masks points here
  int pair_count() const { return work.m * (work.m + 1) / 2; }
};

// Runs bodies on this call's threads. A batch of small jobs gives each thread a runner of its own,
// of one thread.
class Runner {
 public:
  Runner(const Kernels& kernels, int threads);
  Runner(const Kernels& kernels, ThreadScratch* borrowed);

  const Kernels& kernels;
  const int threads;

  // 0 .. threads - 1, by the scratch that a body was given.
  int index_of(const ThreadScratch& scratch) const;
  // body(index, scratch of the thread) for all indices.
  void parallel(int64_t count, const std::function<void(int64_t, ThreadScratch&)>& body);
  // Clears what the threads found, for a new job.
  void begin(const Work& work);
  // Adds up what the threads found into the job's output fields.
  void finish(Prepared& p, bool count_kept);

  // sum[width] of body(block start, length, partial[width]) over fixed blocks of [start, start +
  // n), partials combined in index order whatever the threads do: the first `added` are added, the
  // rest are maxima.
  using BlockBody = std::function<void(int64_t start, int64_t n, ThreadScratch&, double* partial)>;
  void ordered_sum(int64_t start, int64_t n, int width, int added, double* sum,
                   const BlockBody& body);

 private:
  std::vector<std::unique_ptr<ThreadScratch>> own_;
  std::vector<ThreadScratch*> scratch_;
};

// Ranked trims need their keep masks before the loops: calls body(start, n) for ranges that are
// whole multiples of `unit` (but for the last), with work.masks filled; once, for everything, where
// nothing is ranked.
void with_ranked_masks(Runner& runner, Prepared& p, int64_t start, int64_t n, int64_t unit,
                       const std::function<void(int64_t, int64_t)>& body);

// Thresholds, then factors, then the majority: whatever the recipe needs and job.selected does not
// give.
void select_job(Runner& runner, Prepared& p);
// Norm sums of every expert before and after its trim, per fixed block [blocks, K]; the sum of the
// elected signs.
void norm_sums(Runner& runner, Prepared& p, double* before, double* after, double* squares);
int64_t vote_sum(Runner& runner, Prepared& p);
// Sums of squares of the values of every expert, per fixed block [blocks, K]; entries held alone
// and with others [K]; bounds of a trim by variance of a whole tensor.
void energies(Runner& runner, Prepared& p, double* squares);
void holders(Runner& runner, Prepared& p, int64_t* alone, int64_t* shared);
void score_counts(Runner& runner, Prepared& p, const uint32_t* prefix, int64_t* counts,
                  uint32_t* top);
void select_variance(Runner& runner, Prepared& p, double fraction, float* threshold,
                     int64_t* tie_cut);
// Merges (or calibrates) one job whose selection is known.
void merge_job(Runner& runner, Prepared& p);
// Adds the inner products of the task vectors of every `cols` elements to gram [rows, K, K].
void gram_job(Runner& runner, Prepared& p, int64_t cols, bool wide, double* gram);
// Row sums of [rows, cols] into pairs [rows, M(M+1)/2].
void row_stats_job(Runner& runner, Prepared& p, double* gram, double* dots, double* norm2);

}  // namespace mf
