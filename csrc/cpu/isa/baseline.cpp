// What every CPU of the architecture runs: SSE2 on x86-64, plain C++ elsewhere.
#define MF_ISA_NAMESPACE baseline
#include "../loops/kernels-inl.h"
