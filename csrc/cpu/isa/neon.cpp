// NEON of AArch64, 4 lanes.
#define MF_ISA_NAMESPACE neon
#include "../loops/kernels-inl.h"
