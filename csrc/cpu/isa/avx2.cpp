// AVX2 + FMA + F16C, 8 lanes.
#define MF_ISA_NAMESPACE avx2
#define MF_USE_AVX2
#include "../loops/kernels-inl.h"
