// The yardstick: K + 1 streams of 16-bit values read, one written, next to no arithmetic (one XOR per vector read).
// Each thread takes one contiguous share. Compiled for the machine it runs on by benchmarks/cpu/bench.py.
#include <pthread.h>
#include <stdint.h>
#include <stddef.h>

typedef uint16_t v16 __attribute__((vector_size(32), aligned(2), may_alias));

struct share {
  const uint16_t* const* in;
  int streams;
  uint16_t* out;
  size_t start, end;
};

#define LOOP(K)                                                        \
  for (size_t i = s->start; i + 32 <= s->end; i += 32) {               \
    v16 a = {0}, b = {0};                                              \
    for (int k = 0; k < (K); ++k) {                                    \
      __builtin_prefetch(s->in[k] + i + 1024);                         \
      a ^= *(const v16*)(s->in[k] + i);                                \
      b ^= *(const v16*)(s->in[k] + i + 16);                           \
    }                                                                  \
    *(v16*)(s->out + i) = a;                                           \
    *(v16*)(s->out + i + 16) = b;                                      \
  }

static void* work(void* p) {
  struct share* s = p;
  switch (s->streams) {
    case 4: LOOP(4) break;
    case 5: LOOP(5) break;
    case 9: LOOP(9) break;
    case 10: LOOP(10) break;
    default: LOOP(s->streams) break;
  }
  return 0;
}

void merge_shape(const uint16_t* const* in, int streams, uint16_t* out, size_t n, int threads) {
  pthread_t id[64];
  struct share shares[64];
  if (threads > 64) threads = 64;
  for (int t = 0; t < threads; ++t) {
    const size_t each = n / threads / 32 * 32;
    shares[t] = (struct share){in, streams, out, t * each, t + 1 == threads ? n : (t + 1) * each};
    if (t) pthread_create(&id[t], 0, work, &shares[t]);
  }
  work(&shares[0]);
  for (int t = 1; t < threads; ++t) pthread_join(id[t], 0);
}
