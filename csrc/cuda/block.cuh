// Sums over the threads of a block, in a fixed order.
#pragma once

#include "platform.cuh"

namespace mf {
namespace cuda {

constexpr int kThreads = 128;  // of every kernel that walks elements
constexpr int kWarps = kThreads / 32;

// Whether any thread of the block says so. All threads must call it.
MF_DEVICE bool any_thread(bool x) {
#if defined(MF_EMULATE)
  __shared__ int said;
  sync();
  if (thread_index() == 0) said = 0;
  sync();
  if (x) said = 1;
  sync();
  return said != 0;
#else
  return __syncthreads_or(x);
#endif
}

// COUNT sums of the block's threads into `sums` (shared), float64 by a fixed tree. `lanes`: COUNT *
// kThreads floats of shared memory.
template <int COUNT>
MF_DEVICE void block_sums(const float* own, float* lanes, double* sums) {
  const int t = (int)thread_index(), warp = t / 32, lane = t % 32;
  MF_UNROLL for (int i = 0; i < COUNT; ++i) lanes[i * kThreads + t] = own[i];
  sync();
  for (int i = warp; i < COUNT; i += kWarps) {
    double x = 0;
    MF_UNROLL for (int w = 0; w < kWarps; ++w) x += lanes[i * kThreads + w * 32 + lane];
    MF_UNROLL for (int far = 16; far > 0; far /= 2) x += from_lane(x, far);
    if (lane == 0) sums[i] = x;
  }
  sync();
}

// One sum, to all threads. `room`: kThreads doubles of shared memory.
MF_DEVICE double block_sum(double x, double* room) {
  const int t = (int)thread_index();
  sync();
  room[t] = x;
  sync();
  for (int far = kThreads / 2; far > 0; far /= 2) {
    if (t < far) room[t] += room[t + far];
    sync();
  }
  return room[0];
}

MF_DEVICE double block_largest(double x, double* room) {
  const int t = (int)thread_index();
  sync();
  room[t] = x;
  sync();
  for (int far = kThreads / 2; far > 0; far /= 2) {
    if (t < far && room[t + far] > room[t]) room[t] = room[t + far];
    sync();
  }
  return room[0];
}

// Sum of x of this thread and those before it. `room`: kThreads words of shared memory.
MF_DEVICE int64_t running_sum(int64_t x, int64_t* room) {
  const int t = (int)thread_index();
  sync();
  room[t] = x;
  sync();
  for (int near = 1; near < kThreads; near *= 2) {
    const int64_t more = t >= near ? room[t - near] : 0;
    sync();
    room[t] += more;
    sync();
  }
  return room[t];
}

}  // namespace cuda
}  // namespace mf
