// The C surface: arguments that would corrupt memory are refused, errors of launches become words.
#include <string>

#include "launch.h"
#include "platform.cuh"

namespace mf {
namespace cuda {

static thread_local std::string words_of_error;

mf_status refuse(const char* why) {
  words_of_error = why;
  return MF_INVALID;
}

mf_status last_status() {
#if !defined(MF_EMULATE)
  const cudaError_t e = cudaGetLastError();
  if (e != cudaSuccess) {
    words_of_error = std::string("CUDA: ") + cudaGetErrorString(e);
    return e == cudaErrorMemoryAllocation ? MF_NO_MEMORY : MF_INTERNAL;
  }
#endif
  return MF_OK;
}

static mf_status check(const mf_gpu_job* job) {
  if (job->k < 1 || job->k > MF_GPU_MOST_EXPERTS) return refuse("experts: expected 1 to 64");
  for (int k = 0; k < job->k; ++k) {
    if (job->dtypes[k] > MF_BF16) return refuse("dtype of an expert");
    if (job->kinds[k] == MF_GPU_BYTES && !job->masks[k]) return refuse("a mask is missing");
    if (job->kinds[k] != MF_GPU_ALL && !job->kept) return refuse("kept is missing");
  }
  if (!job->integers || !job->numbers || !job->report) return refuse("numbers are missing");
  if (job->rule.merged && !job->merged) return refuse("merged is missing");
  return MF_OK;
}

}  // namespace cuda
}  // namespace mf

using namespace mf::cuda;

extern "C" {

const char* mf_cuda_last_error(void) { return words_of_error.c_str(); }

const char* mf_cuda_build(void) {
#if defined(MF_EMULATE)
  return "emulated";
#else
#define MF_TEXT(x) #x
#define MF_TEXT_OF(x) MF_TEXT(x)
  return MF_CUDA_ARCHITECTURES
      ", nvcc " MF_TEXT_OF(__CUDACC_VER_MAJOR__) "." MF_TEXT_OF(__CUDACC_VER_MINOR__);
#endif
}

mf_status mf_cuda_merge(const mf_gpu_job* job, int64_t rows, int64_t cols, const float* factors,
                        int32_t keeps, const mf_gpu_table* table, int32_t processors,
                        void* stream) {
  const mf_status status = check(job);
  if (status != MF_OK) return status;
  return launch_merge(*job, rows, cols, factors, keeps != 0, table, processors, stream);
}

mf_status mf_cuda_rows(const mf_gpu_job* job, const mf_gpu_rows* rows, int32_t processors,
                       void* stream) {
  const mf_status status = check(job);
  if (status != MF_OK) return status;
  return launch_rows(*job, *rows, processors, stream);
}

int64_t mf_cuda_rows_work(int32_t k, int32_t variant, int64_t rows, int32_t processors) {
  return rows_work(k, variant, rows, processors);
}

mf_status mf_cuda_sample(const mf_gpu_job* job, const mf_gpu_search* search, void* stream) {
  const mf_status status = check(job);
  return status != MF_OK ? status : launch_sample(*job, *search, stream);
}

mf_status mf_cuda_select(const mf_gpu_job* job, const mf_gpu_search* search, const int32_t* sorted,
                         const mf_gpu_targets* targets, int64_t* integers, void* stream) {
  const mf_status status = check(job);
  if (status != MF_OK) return status;
  if (search->key < MF_KEY_MAGNITUDE || search->key > MF_KEY_SCORE) return refuse("key");
  if (targets->count < 1 || targets->count > 2 * MF_GPU_MOST_EXPERTS) return refuse("targets");
  return launch_select(*job, *search, sorted, *targets, integers, stream);
}

mf_status mf_cuda_norm_sums(const mf_gpu_job* job, int64_t numel, int32_t power, double* partial,
                            void* stream) {
  const mf_status status = check(job);
  return status != MF_OK ? status : launch_norm_sums(*job, numel, power, partial, stream);
}

mf_status mf_cuda_vote_sum(const mf_gpu_job* job, int64_t numel, int64_t* sum, void* stream) {
  const mf_status status = check(job);
  return status != MF_OK ? status : launch_vote_sum(*job, numel, sum, stream);
}

mf_status mf_cuda_held(const mf_gpu_job* job, int64_t numel, int64_t* counts, void* stream) {
  const mf_status status = check(job);
  return status != MF_OK ? status : launch_held(*job, numel, counts, stream);
}

mf_status mf_cuda_keep_varied(const mf_gpu_job* job, int64_t numel, uint8_t* mask, void* stream) {
  const mf_status status = check(job);
  return status != MF_OK ? status : launch_keep_varied(*job, numel, mask, stream);
}

mf_status mf_cuda_magnitudes(const mf_gpu_job* job, int64_t numel, int32_t* bits, void* stream) {
  const mf_status status = check(job);
  return status != MF_OK ? status : launch_magnitudes(*job, numel, bits, stream);
}

mf_status mf_cuda_keep_ranked(const int64_t* order, uint8_t* mask, int64_t rows, int64_t cols,
                              int64_t offset, uint64_t word, uint64_t seed, double low, double span,
                              double density, void* stream) {
  return launch_keep_ranked(order, mask, rows, cols, offset, word, seed, low, span, density,
                            stream);
}

}  // extern "C"
