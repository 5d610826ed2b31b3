// Which instruction set runs: what the CPU and the operating system support, after
// MAGIC_FAST_CPU_ISA.
#pragma once

#include <stdexcept>
#include <string>

#include "work.h"

namespace mf {

// A failure with the status it becomes at the C surface.
struct Failure : std::runtime_error {
  Failure(mf_status s, const std::string& message) : std::runtime_error(message), status(s) {}
  mf_status status;
};

const char* isa_name(int isa);  // null: no such number
bool isa_compiled(int isa);
bool isa_supported(int isa);
// wanted -1: MAGIC_FAST_CPU_ISA, else the best. Throws Failure where it cannot run here.
int choose_isa(int wanted);
const Kernels& kernels_of(int isa);

}  // namespace mf
