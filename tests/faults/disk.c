/* A disk that fails: loaded before libc (LD_PRELOAD), it counts what is done to files under one folder, and at the n-th time
   kills the process, or has no space left from then on. Python's and Rust's writes, renames and syncs come through here. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum Mode { OFF, COUNT, KILL, FULL };

static enum Mode mode = OFF;
static long last = 0;
static char folder[PATH_MAX];
static volatile long *seen = NULL; /* shared with the parent: what a killed child has counted is still there */

__attribute__((constructor)) static void begin(void) {
  seen = mmap(NULL, sizeof *seen, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

void faults_arm(const char *path, long nth, int chosen) {
  snprintf(folder, sizeof folder, "%s", path);
  last = nth;
  *seen = 0;
  mode = (enum Mode)chosen;
}

long faults_seen(void) { return *seen; }

static int inside(const char *path) { return strncmp(path, folder, strlen(folder)) == 0; }

static int is_inside(int file) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size < 0) return 0;
  path[size] = 0;
  return inside(path);
}

/* Whether this event fails; `writes` is 0 for what needs no space. */
static int fails(int writes) {
  long number = __sync_add_and_fetch(seen, 1);
  if (mode == KILL && number == last) kill(getpid(), SIGKILL);
  return mode == FULL && writes && number >= last;
}

#define EVENT(condition, writes)                       \
  if (mode != OFF && (condition) && fails(writes)) {   \
    errno = ENOSPC;                                    \
    return -1;                                         \
  }
#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

ssize_t write(int file, const void *data, size_t size) {
  REAL(write);
  EVENT(is_inside(file), 1)
  return real(file, data, size);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
  REAL(writev);
  EVENT(is_inside(file), 1)
  return real(file, parts, count);
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t offset) {
  REAL(pwrite64);
  EVENT(is_inside(file), 1)
  return real(file, data, size, offset);
}

int ftruncate64(int file, off64_t size) {
  REAL(ftruncate64);
  EVENT(is_inside(file), 1)
  return real(file, size);
}

int fsync(int file) {
  REAL(fsync);
  EVENT(is_inside(file), 0)
  return real(file);
}

int rename(const char *from, const char *to) {
  REAL(rename);
  EVENT(inside(to), 0)
  return real(from, to);
}

int unlink(const char *path) {
  REAL(unlink);
  EVENT(inside(path), 0)
  return real(path);
}

int mkdir(const char *path, mode_t bits) {
  REAL(mkdir);
  EVENT(inside(path), 1)
  return real(path, bits);
}
