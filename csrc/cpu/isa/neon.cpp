// NEON of AArch64, 4 lanes.
#define MF_ISA_NAMESPACE neon
#include "../kernels-inl.h"
