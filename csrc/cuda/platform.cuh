// What the kernels take from CUDA, and from the emulation of it where they are compiled for a host
// (tests): there blocks run one after the other and the threads of a block take turns.
#pragma once

#include <stdint.h>

#if defined(MF_EMULATE)
#include "emulate.h"
#else
#include <cuda_runtime.h>

#define MF_KERNEL __global__ void
#define MF_DEVICE static __device__ __forceinline__
#define MF_APART static __device__ __noinline__
#define MF_DEVICE_METHOD __device__ __forceinline__
#define MF_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define MF_GRID_CONSTANT __grid_constant__
#define MF_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define MF_LAUNCH(kernel, blocks, threads, shared, stream, ...) \
  kernel<<<(unsigned)(blocks), (threads), (shared), (cudaStream_t)(stream)>>>(__VA_ARGS__)
#define MF_UNROLL _Pragma("unroll")

namespace mf {
namespace cuda {

struct alignas(16) Word4 {
  uint32_t w[4];
};

MF_DEVICE unsigned thread_index() { return threadIdx.x; }
MF_DEVICE unsigned block_index() { return blockIdx.x; }
MF_DEVICE unsigned threads_of_block() { return blockDim.x; }
MF_DEVICE unsigned blocks_of_grid() { return gridDim.x; }
MF_DEVICE void sync() { __syncthreads(); }
MF_DEVICE double from_lane(double x, int distance) {
  return __shfl_xor_sync(0xffffffffu, x, distance);
}
MF_DEVICE void add_to(int32_t* p, int32_t x) { atomicAdd(p, x); }
MF_DEVICE void add_to(int64_t* p, int64_t x) {
  atomicAdd((unsigned long long*)p, (unsigned long long)x);
}
MF_DEVICE void least_of(int64_t* p, int64_t x) { atomicMin((long long*)p, (long long)x); }
MF_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
MF_DEVICE double fused(double a, double b, double c) { return __fma_rn(a, b, c); }
// Read once: leaves the caches to what is read again.
MF_DEVICE Word4 load_streaming(const void* p) {
  const uint4 v = __ldcs((const uint4*)p);
  return {{v.x, v.y, v.z, v.w}};
}
MF_DEVICE Word4 load_kept(const void* p) {
  const uint4 v = __ldg((const uint4*)p);
  return {{v.x, v.y, v.z, v.w}};
}
MF_DEVICE void store_streaming(void* p, const Word4& x) {
  __stcs((uint4*)p, make_uint4(x.w[0], x.w[1], x.w[2], x.w[3]));
}

}  // namespace cuda
}  // namespace mf
#endif
