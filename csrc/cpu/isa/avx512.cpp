// AVX-512 F, BW, DQ, VL, 16 lanes.
#define MF_ISA_NAMESPACE avx512
#define MF_USE_AVX2
#define MF_USE_AVX512
#include "../loops/kernels-inl.h"
