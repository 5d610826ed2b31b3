// What every function of the C surface does: exceptions stop here, options become threads and
// loops.
#pragma once

#include <cstdint>
#include <new>
#include <string>

#include "runner.h"

namespace mf {

// Elements times experts per thread below which a job is handed over whole.
constexpr int64_t kSmallJob = 1 << 16;

// What went wrong in the last call of this thread.
std::string& last_error();

template <class F>
mf_status guarded(F&& body) {
  try {
    last_error().clear();
    body();
    return MF_OK;
  } catch (const Failure& e) {
    last_error() = e.what();
    return e.status;
  } catch (const std::bad_alloc&) {
    last_error() = "out of memory.";
    return MF_NO_MEMORY;
  } catch (const std::exception& e) {
    last_error() = e.what();
    return MF_INTERNAL;
  }
}

int threads_of(const mf_options* options);
const Kernels& kernels_of(const mf_options* options);

}  // namespace mf
