// CUDA on a host, for tests: the threads of a block are fibers that take turns at every barrier and
// exchange; blocks run one after the other. One host thread at a time.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

#define MF_KERNEL static void
#define MF_DEVICE static inline
#define MF_APART static
#define MF_DEVICE_METHOD
#define MF_BOUNDS(threads, blocks)
#define MF_GRID_CONSTANT
#define __shared__ static
#define MF_DYNAMIC_SHARED(name) unsigned char* name = mf::cuda::emulated().shared.data()
#define MF_UNROLL
#define MF_LAUNCH(kernel, blocks, threads, shared, stream, ...)                                 \
  ((void)(stream), mf::cuda::emulated().launch((unsigned)(blocks), (threads), (size_t)(shared), \
                                               [&] { kernel(__VA_ARGS__); }))

namespace mf {
namespace cuda {

struct alignas(16) Word4 {
  uint32_t w[4];
};

constexpr unsigned kWarp = 32;

class Emulator {
 public:
  unsigned thread = 0, block = 0, threads = 0, blocks = 0;
  std::vector<unsigned char> shared;
  std::vector<double> lanes;

  void launch(unsigned n_blocks, unsigned n_threads, size_t bytes, std::function<void()> body) {
    blocks = n_blocks, threads = n_threads, body_ = std::move(body);
    shared.assign(bytes + 16, 0xCD);  // whoever reads what nobody wrote sees it
    lanes.assign(n_threads, 0);
    while (fibers_.size() < n_threads) fibers_.push_back(std::make_unique<Fiber>());
    for (block = 0; block < blocks; ++block) run_block();
  }

  // Until all threads of the block (or of the warp) that still run are here.
  void wait(bool warp) {
    Fiber& own = *fibers_[thread];
    own.waits = warp ? kAtWarp : kAtBlock;
    const unsigned me = thread;
    swapcontext(&own.context, &home_);
    thread = me;
  }

 private:
  enum Waits { kRuns, kAtBlock, kAtWarp, kDone };
  struct Fiber {
    ucontext_t context;
    Waits waits;
    std::vector<char> stack = std::vector<char>(1 << 17);
  };

  static void enter(unsigned low, unsigned high) {
    Emulator* self = (Emulator*)(((uintptr_t)high << 32) | (uintptr_t)low);
    self->body_();
    self->fibers_[self->thread]->waits = kDone;
    swapcontext(&self->fibers_[self->thread]->context, &self->home_);
  }

  void run_block() {
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& f = *fibers_[t];
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.data();
      f.context.uc_stack.ss_size = f.stack.size();
      f.context.uc_link = nullptr;
      makecontext(&f.context, (void (*)())enter, 2, (unsigned)(uintptr_t)this,
                  (unsigned)((uintptr_t)this >> 32));
      f.waits = kRuns;
    }
    for (;;) {
      unsigned ran = 0, done = 0;
      for (unsigned t = 0; t < threads; ++t) {
        if (fibers_[t]->waits == kDone) ++done;
        if (fibers_[t]->waits != kRuns) continue;
        thread = t;
        swapcontext(&home_, &fibers_[t]->context);
        ++ran;
      }
      if (done == threads) return;
      release(ran);
    }
  }

  void release(unsigned ran) {
    unsigned released = 0;
    for (unsigned first = 0; first < threads; first += kWarp)
      released += release(first, first + kWarp < threads ? first + kWarp : threads, kAtWarp);
    if (!released) released = release(0, threads, kAtBlock);
    if (!released && !ran) __builtin_trap();  // they wait for one another: a deadlock on a GPU
  }

  unsigned release(unsigned first, unsigned last, Waits what) {
    unsigned n = 0;
    for (unsigned t = first; t < last; ++t) {
      if (fibers_[t]->waits == what) ++n;
      if (fibers_[t]->waits != what && fibers_[t]->waits != kDone) return 0;
    }
    for (unsigned t = first; t < last; ++t)
      if (fibers_[t]->waits == what) fibers_[t]->waits = kRuns;
    return n;
  }

  std::function<void()> body_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  ucontext_t home_;
};

inline Emulator& emulated() {
  static Emulator one;
  return one;
}

MF_DEVICE unsigned thread_index() { return emulated().thread; }
MF_DEVICE unsigned block_index() { return emulated().block; }
MF_DEVICE unsigned threads_of_block() { return emulated().threads; }
MF_DEVICE unsigned blocks_of_grid() { return emulated().blocks; }
MF_DEVICE void sync() { emulated().wait(false); }
MF_DEVICE double from_lane(double x, int distance) {
  Emulator& e = emulated();
  const unsigned me = e.thread;
  e.lanes[me] = x;
  e.wait(true);
  const double found = e.lanes[me ^ (unsigned)distance];
  e.wait(true);
  return found;
}
MF_DEVICE void add_to(int32_t* p, int32_t x) { *p += x; }
MF_DEVICE void add_to(int64_t* p, int64_t x) { *p += x; }
MF_DEVICE void least_of(int64_t* p, int64_t x) {
  if (x < *p) *p = x;
}
MF_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
MF_DEVICE double fused(double a, double b, double c) { return fma(a, b, c); }
MF_DEVICE Word4 load_kept(const void* p) {
  if ((uintptr_t)p % 16) __builtin_trap();  // the hardware would, too
  Word4 x;
  memcpy(&x, p, 16);
  return x;
}
MF_DEVICE Word4 load_streaming(const void* p) { return load_kept(p); }
MF_DEVICE void store_streaming(void* p, const Word4& x) {
  if ((uintptr_t)p % 16) __builtin_trap();
  memcpy(p, &x, 16);
}

}  // namespace cuda
}  // namespace mf
