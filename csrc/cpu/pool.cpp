#include "pool.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace mf {
namespace {

constexpr int kMostThreads = 1024;

// Denormals count: whatever the caller's thread flushes (torch.set_flush_denormal), the kernels do
// not.
class PlainFloats {
 public:
#if defined(__SSE2__)
  PlainFloats() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~PlainFloats() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  PlainFloats() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
  }
  ~PlainFloats() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_ = 0;
#endif
};

struct Group {
  int64_t count;
  const std::function<void(int64_t, int)>* body;
  int helpers;  // how many threads may join the caller
  std::atomic<int64_t> next{0};
  int joined = 0, active = 0;  // under the pool's mutex
  std::condition_variable left;
  std::mutex failure_mutex;
  std::exception_ptr failure;

  void work(int worker) {
    PlainFloats plain;
    for (;;) {
      const int64_t i = next.fetch_add(1);
      if (i >= count) return;
      try {
        (*body)(i, worker);
      } catch (...) {
        std::lock_guard<std::mutex> lock(failure_mutex);
        if (!failure) failure = std::current_exception();
        next.store(count);
      }
    }
  }
};

class Pool {
 public:
  void run(const std::shared_ptr<Group>& group) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (threads_ < std::min(group->helpers, kMostThreads)) {
        std::thread([this] { serve(); }).detach();
        ++threads_;
      }
      queue_.push_back(group);
    }
    if (group->helpers == 1) {
      wake_.notify_one();
    } else {
      wake_.notify_all();
    }
    group->work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    queue_.erase(std::remove(queue_.begin(), queue_.end(), group), queue_.end());
    group->left.wait(lock, [&] { return group->active == 0; });
  }

 private:
  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return !queue_.empty(); });
      const std::shared_ptr<Group> group = queue_.front();
      const int worker = ++group->joined;
      ++group->active;
      if (group->joined >= group->helpers) queue_.pop_front();
      lock.unlock();
      group->work(worker);
      lock.lock();
      if (--group->active == 0) group->left.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::shared_ptr<Group>> queue_;
  int threads_ = 0;
};

// Never destroyed: its threads may outlive static destructors. A forked child starts with a new
// one.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    the_pool.store(new Pool);
#if defined(__linux__)
    pthread_atfork(nullptr, nullptr, [] { the_pool.store(new Pool); });
#endif
  });
  return *the_pool.load();
}

#if defined(__linux__)
double read_number(const std::string& path,
                   int which) {  // the which-th word of the file, NaN if it is no number
  std::FILE* file = std::fopen(path.c_str(), "r");
  if (!file) return NAN;
  char words[2][32] = {"", ""};
  const int got = std::fscanf(file, "%31s %31s", words[0], words[1]);
  std::fclose(file);
  if (got <= which) return NAN;
  char* end = nullptr;
  const double value = std::strtod(words[which], &end);
  return end == words[which] ? NAN : value;
}

// CPUs that the cgroup's quota amounts to, over the process's cgroup and its ancestors (v2, v1); 0:
// no limit.
double cgroup_cpus() {
  double least = 0;
  const auto take = [&](double quota, double period) {
    if (quota > 0 && period > 0 && (least == 0 || quota / period < least)) least = quota / period;
  };
  std::FILE* file = std::fopen("/proc/self/cgroup", "r");
  if (!file) return 0;
  char line[4096];
  while (std::fgets(line, sizeof line, file)) {
    const std::string text(line, std::strcspn(line, "\n"));
    const size_t first = text.find(':'), second = text.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = text.substr(first + 1, second - first - 1);
    const bool v2 = controllers.empty();
    if (!v2 && ("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
    std::string path = text.substr(second + 1);
    for (;;) {
      const std::string dir =
          (v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu") + (path == "/" ? "" : path);
      if (v2) {
        take(read_number(dir + "/cpu.max", 0), read_number(dir + "/cpu.max", 1));
      } else {
        take(read_number(dir + "/cpu.cfs_quota_us", 0), read_number(dir + "/cpu.cfs_period_us", 0));
      }
      if (path.empty() || path == "/") break;
      path.resize(path.rfind('/') == std::string::npos ? 0 : path.rfind('/'));
    }
  }
  std::fclose(file);
  return least;
}
#endif

int machine_threads() {
  int n = std::max(1u, std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) n = std::max(1, CPU_COUNT(&set));
  const double quota = cgroup_cpus();
  if (quota > 0) n = std::min(n, std::max(1, (int)std::ceil(quota)));
#endif
  return n;
}

}  // namespace

int default_threads() {
  if (const char* text = std::getenv("MAGIC_FAST_NUM_THREADS")) {
    char* end = nullptr;
    const long wanted = std::strtol(text, &end, 10);
    if (end != text && *end == 0 && wanted > 0) return (int)std::min<long>(wanted, kMostThreads);
  }
  static const int n = machine_threads();
  return n;
}

void parallel_for(int64_t count, int threads, const std::function<void(int64_t, int)>& body) {
  if (count <= 0) return;
  const int helpers = (int)std::min<int64_t>(std::min(threads, kMostThreads), count) - 1;
  const auto group = std::make_shared<Group>();
  group->count = count;
  group->body = &body;
  group->helpers = helpers;
  if (helpers <= 0) {
    group->work(0);
  } else {
    pool().run(group);
  }
  if (group->failure) std::rethrow_exception(group->failure);
}

}  // namespace mf
