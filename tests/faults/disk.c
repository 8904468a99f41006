/* A disk that fails: loaded before libc (LD_PRELOAD), it counts what is done to files under one folder, and at the n-th time
   kills the process, or has no space left from then on, or sets the clock back; or it cannot be written at all. Python's
   and Rust's writes, renames and syncs come through here, and what they ask of the clock. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum Mode { OFF, COUNT, KILL, FULL, BACK, READ_ONLY };

static const time_t kBack = 10L * 365 * 24 * 3600; /* seconds by which the clock goes back */

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
  return mode == READ_ONLY || (mode == FULL && writes && number >= last);
}

/* Seconds that the clock is behind. A clock that only runs (CLOCK_MONOTONIC) is never set. */
static time_t behind(void) { return mode == BACK && seen != NULL && *seen >= last ? kBack : 0; }

#define EVENT(condition, writes)                       \
  if (mode != OFF && (condition) && fails(writes)) {   \
    errno = mode == READ_ONLY ? EROFS : ENOSPC;        \
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

/* What opens a file to write it is no event of its own: the writes are. */
#define OPEN(name)                                                                             \
  int name(const char *path, int flags, ...) {                                                 \
    REAL(name);                                                                                \
    va_list rest;                                                                              \
    va_start(rest, flags);                                                                     \
    const mode_t bits = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;            \
    va_end(rest);                                                                              \
    if (mode == READ_ONLY && flags & (O_WRONLY | O_RDWR | O_CREAT) && inside(path)) {          \
      errno = EROFS;                                                                           \
      return -1;                                                                               \
    }                                                                                          \
    return real(path, flags, bits);                                                            \
  }
OPEN(open)
OPEN(open64)

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

int clock_gettime(clockid_t clock, struct timespec *now) {
  REAL(clock_gettime);
  const int failed = real(clock, now);
  if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec -= behind();
  return failed;
}

time_t time(time_t *out) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (out != NULL) *out = now.tv_sec;
  return now.tv_sec;
}

int gettimeofday(struct timeval *now, void *zone) {
  REAL(gettimeofday);
  const int failed = real(now, zone);
  if (!failed) now->tv_sec -= behind();
  return failed;
}
