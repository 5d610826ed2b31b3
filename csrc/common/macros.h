// MF_HD marks what C++ and CUDA share. It forces inlining: a plain `inline` function becomes one
// weak symbol for all instruction sets, the linker keeps one copy, perhaps the AVX-512 one, and an
// old CPU dies of SIGILL.
#pragma once

#if defined(__CUDACC__)
#define MF_HD static __host__ __device__ __forceinline__
#else
#define MF_HD static inline __attribute__((always_inline, unused))
#endif
