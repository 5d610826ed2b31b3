// Threads: one pool for the process, shared by all callers; the caller always works too.
#pragma once

#include <cstdint>
#include <functional>

namespace mf {

// MAGIC_FAST_NUM_THREADS, else the least of: CPUs, affinity, cgroup quota.
int default_threads();

// body(index, worker) for every index in [0, count), worker in [0, threads). Rethrows the first
// exception.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t, int)>& body);

}  // namespace mf
