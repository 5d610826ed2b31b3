// The least a merge of checkpoints does with the disk: read all inputs with two threads, then write
// and fsync as many bytes as the output has. Usage: raw OUT BYTES INPUT...
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { THREADS = 2, BLOCK = 4 << 20 };

typedef struct {
  int count;
  int* files;
  off_t* ends;  // end of each file in the concatenation of all, in blocks
} inputs;

static inputs all;
static atomic_llong next_block;
static atomic_int failed;

static void* block_of_memory(void) {
  void* p = mmap(NULL, BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) {
    perror("mmap");
    exit(1);
  }
  madvise(p, BLOCK, MADV_HUGEPAGE);
  memset(p, 7, BLOCK);
  return p;
}

static void* reader(void* unused) {
  (void)unused;
  char* buffer = block_of_memory();
  for (int file = 0;;) {
    const long long block = atomic_fetch_add(&next_block, 1);
    while (file < all.count && block >= all.ends[file]) ++file;
    if (file == all.count) return NULL;
    const off_t first = file ? all.ends[file - 1] : 0;
    const struct iovec part = {buffer, BLOCK};
    if (preadv(all.files[file], &part, 1, (block - first) * BLOCK) < 0) {
      perror("preadv");
      atomic_store(&failed, 1);
      return NULL;
    }
  }
}

static int open_inputs(int count, char** paths) {
  all.count = count;
  all.files = calloc(count, sizeof *all.files);
  all.ends = calloc(count, sizeof *all.ends);
  off_t blocks = 0;
  for (int i = 0; i < count; ++i) {
    struct stat status;
    all.files[i] = open(paths[i], O_RDONLY | O_CLOEXEC);
    if (all.files[i] < 0 || fstat(all.files[i], &status) != 0) {
      perror(paths[i]);
      return 1;
    }
    blocks += (status.st_size + BLOCK - 1) / BLOCK;
    all.ends[i] = blocks;
  }
  return 0;
}

static int write_output(const char* path, long long bytes) {
  char* buffer = block_of_memory();
  const int file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (file < 0) {
    perror(path);
    return 1;
  }
  while (bytes > 0) {
    const ssize_t count = write(file, buffer, bytes < BLOCK ? bytes : BLOCK);
    if (count <= 0) {
      perror(path);
      return 1;
    }
    bytes -= count;
  }
  if (fsync(file) != 0) {
    perror(path);
    return 1;
  }
  return close(file);
}

int main(int argc, char** argv) {
  if (argc < 4) {
    fprintf(stderr, "usage: raw OUT BYTES INPUT...\n");
    return 2;
  }
  if (open_inputs(argc - 3, argv + 3)) return 1;
  pthread_t threads[THREADS];
  for (int i = 0; i < THREADS; ++i) pthread_create(&threads[i], NULL, reader, NULL);
  for (int i = 0; i < THREADS; ++i) pthread_join(threads[i], NULL);
  if (atomic_load(&failed)) return 1;
  return write_output(argv[1], atoll(argv[2]));
}
