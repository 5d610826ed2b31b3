// Planning on the host, plain C++: grids, alignment, which kernel. And what the entry calls.
#pragma once

#include "magic_fast_cuda.h"

namespace mf {
namespace cuda {

// Blocks of a grid that walks over `work` items: at most `per_processor` for each multiprocessor,
// so that the grid stays on the device to the end.
inline int64_t grid_of(int64_t work, int threads, int processors, int per_processor) {
  const int64_t wanted = (work + threads - 1) / threads;
  const int64_t most = (int64_t)(processors > 0 ? processors : 1) * per_processor;
  return wanted < 1 ? 1 : wanted < most ? wanted : most;
}

// Blocks of kernels that walk over vectors without a plan for the device: 16 on each of 132
// multiprocessors; fewer of them take turns.
constexpr int kManyBlocks = 16 * 132;

template <int N>
struct Count {
  static constexpr int value = N;
};

// body(Count<k>()) for k = 1 ... 8.
template <class Body>
auto by_experts(int k, Body body) {
  switch (k) {
    case 1:
      return body(Count<1>());
    case 2:
      return body(Count<2>());
    case 3:
      return body(Count<3>());
    case 4:
      return body(Count<4>());
    case 5:
      return body(Count<5>());
    case 6:
      return body(Count<6>());
    case 7:
      return body(Count<7>());
    default:
      return body(Count<8>());
  }
}

inline bool pointer_aligned(const void* p) { return ((uintptr_t)p & 15u) == 0; }

// Whether vectors of eight of every row are aligned accesses in every array.
inline bool is_aligned(const mf_gpu_job& job, int64_t rows, int64_t cols) {
  if (rows > 1 && cols % 8) return false;
  if (!pointer_aligned(job.base) || !pointer_aligned(job.out)) return false;
  if (job.rule.merged && !pointer_aligned(job.merged)) return false;
  for (int k = 0; k < job.k; ++k)
    if (!pointer_aligned(job.experts[k])) return false;
  return true;
}

inline bool has_trims(const mf_gpu_job& job) {
  for (int k = 0; k < job.k; ++k)
    if (job.kinds[k] != MF_GPU_ALL) return true;
  return false;
}

// What went wrong with the last launch, as a status; the words are kept for mf_last_error.
mf_status last_status();
mf_status refuse(const char* why);

mf_status launch_merge(const mf_gpu_job& job, int64_t rows, int64_t cols, const float* factors,
                       bool keeps, const mf_gpu_table* table, int processors, void* stream);
mf_status launch_rows(const mf_gpu_job& job, const mf_gpu_rows& rows, int processors, void* stream);
int64_t rows_work(int k, int variant, int64_t rows, int processors);
mf_status launch_sample(const mf_gpu_job& job, const mf_gpu_search& search, void* stream);
mf_status launch_select(const mf_gpu_job& job, const mf_gpu_search& search, const int32_t* sorted,
                        const mf_gpu_targets& targets, int64_t* integers, void* stream);
mf_status launch_norm_sums(const mf_gpu_job& job, int64_t numel, int power, double* partial,
                           void* stream);
mf_status launch_vote_sum(const mf_gpu_job& job, int64_t numel, int64_t* sum, void* stream);
mf_status launch_held(const mf_gpu_job& job, int64_t numel, int64_t* counts, void* stream);
mf_status launch_keep_varied(const mf_gpu_job& job, int64_t numel, uint8_t* mask, void* stream);
mf_status launch_magnitudes(const mf_gpu_job& job, int64_t numel, int32_t* bits, void* stream);
mf_status launch_keep_ranked(const int64_t* order, uint8_t* mask, int64_t rows, int64_t cols,
                             int64_t offset, uint64_t word, uint64_t seed, double low, double span,
                             double density, void* stream);

}  // namespace cuda
}  // namespace mf
