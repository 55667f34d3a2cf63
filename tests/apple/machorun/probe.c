/* A library for macOS that asks each adapter of libsystem.c what Apple documents, with the values of macOS's headers:
 * zig compiles it for macOS, the loader runs it. probe() returns 0, or the number of the line that does not hold. */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysctl.h>
#include <time.h>
#include <unistd.h>

#define HOLDS(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) return __LINE__;                                                                             \
    } while (0)

/* Of these the linker makes fixups: a pointer into the image, in data that is constant and in data that is not, and a
 * table of them. */
static int numbers[4] = {1, 2, 3, 4};
int *third = &numbers[2];
static const char *const words[] = {"zero", "one", "two", "three"};

static volatile int initialised; /* volatile: clang runs what it can itself */
__attribute__((constructor)) static void initialise(void) { initialised = 7; }

/* What the compiler calls on its own. */
int __snprintf_chk(char *out, size_t bytes, int flag, size_t room, const char *format, ...);
void *__memcpy_chk(void *out, const void *in, size_t bytes, size_t room);
void *__memset_chk(void *out, int value, size_t bytes, size_t room);
void objc_msgSend(void);

/* The compiler must not know what the answers are. */
static volatile double half = 0.5;
static volatile int zero = 0;

static int pointers(void) {
    HOLDS(initialised == 7);
    HOLDS(*third == 3 && third == &numbers[2]);
    HOLDS(strcmp(words[zero + 3], "three") == 0 && strcmp(words[zero + 1], "one") == 0);
    return 0;
}

static int write_list(char *out, size_t bytes, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const int n = vsnprintf(out, bytes, format, arguments);
    va_end(arguments);
    return n;
}

static int text(void) {
    char out[128], *end;
    const char *expected = "a 1 -2 3.5 4294967296 x 6 7 0x8 9.25 10";
    snprintf(out, sizeof out, "%s %d %ld %g %llu %c %zu %u %#x %.2f %d", "a", 1, -2L, 3.5, 1ULL << 32, 'x',
             (size_t)6, 7u, 8u, 9.25, 10);
    HOLDS(strcmp(out, expected) == 0);
    memset(out, 0, sizeof out);
    HOLDS(write_list(out, sizeof out, "%s %d %ld %g %llu %c %zu %u %#x %.2f %d", "a", 1, -2L, 3.5, 1ULL << 32, 'x',
                     (size_t)6, 7u, 8u, 9.25, 10) == (int)strlen(expected));
    HOLDS(strcmp(out, expected) == 0);
    HOLDS(write_list(out, 4, "%s", "abcdef") == 6 && strcmp(out, "abc") == 0);
    const volatile size_t room = sizeof out, six = 6;
    HOLDS(__snprintf_chk(out, sizeof out, 0, room, "%d %.1f %s", 5, 0.5, "z") == 7 && strcmp(out, "5 0.5 z") == 0);
    __memset_chk(out, 'm', six, room);
    __memcpy_chk(out + 6, "copied", six + 1, room);
    HOLDS(strcmp(out, "mmmmmmcopied") == 0);
    HOLDS(strtod("2.5e3x", &end) == 2500.0 && *end == 'x');
    HOLDS(strtol("ff", NULL, 16) == 255);
    errno = 0;
    HOLDS(strtol("99999999999999999999", NULL, 10) == LONG_MAX && errno == ERANGE);
    char pattern[40];
    memset_pattern16(pattern, "0123456789abcdef", 40);
    HOLDS(memcmp(pattern, "0123456789abcdef0123456789abcdef01234567", 40) == 0);
    return 0;
}

static int numbers_and_time(void) {
    HOLDS(ilogbf((float)zero) == FP_ILOGB0 && ilogbf(NAN * (float)half) == FP_ILOGBNAN && ilogbf(8.5f) == 3);
    const struct __double2 found = __sincos_stret(half);
    HOLDS(fabs(found.__sinval - 0.479425538604203) < 1e-15 && fabs(found.__cosval - 0.8775825618903728) < 1e-15);
    struct timespec before, after, rest = {0, 2000000};
    HOLDS(clock_gettime(CLOCK_MONOTONIC, &before) == 0 && nanosleep(&rest, NULL) == 0);
    HOLDS(clock_gettime(CLOCK_MONOTONIC, &after) == 0);
    const long passed = (after.tv_sec - before.tv_sec) * 1000000000 + after.tv_nsec - before.tv_nsec;
    HOLDS(passed >= 2000000);
    HOLDS(clock_gettime(CLOCK_REALTIME, &after) == 0 && after.tv_sec > 1600000000 && before.tv_sec < after.tv_sec);
    HOLDS(sysconf(_SC_NPROCESSORS_ONLN) >= 1);
    char version[16];
    size_t bytes = sizeof version;
    HOLDS(sysctlbyname("kern.osproductversion", version, &bytes, NULL, 0) == 0);
    HOLDS(strcmp(version, "15.0") == 0 && bytes == 5);
    bytes = 2;
    HOLDS(sysctlbyname("kern.osproductversion", version, &bytes, NULL, 0) == -1 && errno == ENOMEM);
    return 0;
}

/* In the folder that PROBE_FOLDER names. */
static int files(void) {
    char folder[1024], file[1040];
    HOLDS(getenv("PROBE_FOLDER") != NULL);
    snprintf(folder, sizeof folder, "%s/made", getenv("PROBE_FOLDER"));
    snprintf(file, sizeof file, "%s/file", folder);
    errno = 0;
    HOLDS(open(file, O_RDONLY) == -1 && errno == ENOENT);
    HOLDS(mkdir(folder, 0700) == 0 && mkdir(folder, 0700) == -1 && errno == EEXIST);
    const int one = open(file, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600), two = open(file, O_RDWR | O_NOFOLLOW);
    HOLDS(one >= 0 && two >= 0 && open(file, O_CREAT | O_EXCL | O_RDWR, 0600) == -1 && errno == EEXIST);
    HOLDS(open(file, O_RDONLY | O_DIRECTORY) == -1 && errno == ENOTDIR);
    HOLDS(flock(one, LOCK_EX) == 0 && flock(two, LOCK_EX | LOCK_NB) == -1 && errno == EWOULDBLOCK);
    HOLDS(strcmp(strerror(errno), "Resource temporarily unavailable") == 0);
    HOLDS(strcmp(strerror(EDEADLK), "Resource deadlock avoided") == 0);
    HOLDS(strcmp(strerror(999), "Unknown error: 999") == 0);
    HOLDS(lseek(one, 0, SEEK_END) == 0 && lseek(one, 7, SEEK_CUR) == 7 && lseek(one, -1, SEEK_SET) == -1);
    HOLDS(errno == EINVAL && lseek(999, 0, SEEK_END) == -1 && errno == EBADF);
    HOLDS(flock(one, LOCK_UN) == 0 && flock(two, LOCK_EX | LOCK_NB) == 0);
    HOLDS(close(one) == 0 && close(two) == 0 && close(two) == -1 && errno == EBADF);
    char name[400];
    memset(name, 'n', sizeof name);
    name[sizeof name - 1] = '\0';
    HOLDS(mkdir(name, 0700) == -1 && errno == ENAMETOOLONG);
    return 0;
}

static int memory(void) {
    const size_t bytes = 1 << 20;
    char *reserved = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
    HOLDS(reserved != MAP_FAILED && mprotect(reserved, bytes, PROT_READ | PROT_WRITE) == 0);
    reserved[bytes - 1] = 5;
    HOLDS(mmap(reserved, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON | MAP_FIXED, -1, 0) == reserved);
    HOLDS(reserved[bytes - 1] == 0 && munmap(reserved, bytes) == 0);
    errno = 0;
    HOLDS(mmap(NULL, 0, PROT_READ, MAP_PRIVATE | MAP_ANON, -1, 0) == MAP_FAILED && errno == EINVAL);
    void *aligned = NULL;
    HOLDS(posix_memalign(&aligned, 0x4000, 100) == 0 && (uintptr_t)aligned % 0x4000 == 0);
    free(aligned);
    HOLDS(posix_memalign(&aligned, 3, 100) == EINVAL);
    /* clang takes for granted that the three succeed */
    void *(*volatile allocate)(size_t) = malloc, *(*volatile cleared)(size_t, size_t) = calloc;
    void *(*volatile longer)(void *, size_t) = realloc;
    errno = 0;
    HOLDS(allocate(SIZE_MAX / 2) == NULL && errno == ENOMEM);
    errno = 0;
    HOLDS(cleared(SIZE_MAX / 2, 4) == NULL && errno == ENOMEM);
    errno = 0;
    HOLDS(longer(NULL, SIZE_MAX / 2) == NULL && errno == ENOMEM);
    char *grown = longer(cleared(3, 5), 4000);
    HOLDS(grown != NULL && grown[0] == 0 && grown[14] == 0);
    grown = longer(grown, (size_t)zero);
    HOLDS(grown != NULL);
    free(grown);
    return 0;
}

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static struct {
    pthread_key_t key;
    unsigned long guard; /* a key of another size would spill */
} keys;
static int turns, runs, freed, blocked;

static void run_once(void) { runs++; }
static void free_value(void *value) { freed += *(int *)value; }

static void *work(void *argument) {
    sigset_t set;
    static int value = 3;
    pthread_once(&once, run_once);
    pthread_setspecific(keys.key, &value);
    pthread_sigmask(SIG_SETMASK, NULL, &set);
    pthread_mutex_lock(&mutex);
    blocked = sigismember(&set, SIGUSR1) && sigismember(&set, SIGBUS) && !sigismember(&set, SIGTERM);
    turns++;
    pthread_cond_broadcast(&condition);
    while (turns < 2) pthread_cond_wait(&condition, &mutex);
    pthread_mutex_unlock(&mutex);
    return argument;
}

static int threads(void) {
    struct timespec rest = {0, 1000000};
    sigset_t set, old;
    pthread_t thread;
    pthread_attr_t attributes;
    HOLDS(pthread_atfork(NULL, NULL, NULL) == 0);
    memset(&keys, 0xFF, sizeof keys); /* all of a key is written, and no more */
    keys.guard = 11;
    pthread_once(&once, run_once);
    HOLDS(pthread_key_create(&keys.key, free_value) == 0 && keys.guard == 11 && keys.key >> 32 == 0);
    HOLDS(pthread_getspecific(keys.key) == NULL);
    HOLDS(pthread_setspecific(keys.key, &turns) == 0 && pthread_getspecific(keys.key) == &turns);
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigaddset(&set, SIGBUS);
    HOLDS(pthread_sigmask(SIG_BLOCK, &set, &old) == 0 && !sigismember(&old, SIGUSR1));
    HOLDS(pthread_attr_init(&attributes) == 0);
    HOLDS(pthread_attr_setdetachstate(&attributes, 99) == EINVAL);
    HOLDS(pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED) == 0);
    HOLDS(pthread_create(&thread, &attributes, work, NULL) == 0 && pthread_attr_destroy(&attributes) == 0);
    HOLDS(pthread_sigmask(SIG_SETMASK, &old, NULL) == 0 && pthread_sigmask(SIG_SETMASK, NULL, &set) == 0);
    HOLDS(set == old && !pthread_equal(thread, pthread_self()));
    pthread_mutex_lock(&mutex);
    while (turns < 1) pthread_cond_wait(&condition, &mutex);
    turns++;
    pthread_cond_signal(&condition);
    pthread_mutex_unlock(&mutex);
    for (int i = 0; i < 1000 && __atomic_load_n(&freed, __ATOMIC_ACQUIRE) == 0; i++) nanosleep(&rest, NULL);
    HOLDS(__atomic_load_n(&freed, __ATOMIC_ACQUIRE) == 3 && runs == 1 && blocked);
    HOLDS(pthread_mutex_destroy(&mutex) == 0 && pthread_mutex_init(&mutex, NULL) == 0);
    HOLDS(pthread_mutex_lock(&mutex) == 0 && pthread_mutex_unlock(&mutex) == 0);
    HOLDS(pthread_cond_destroy(&condition) == 0 && pthread_cond_init(&condition, NULL) == 0);
    return 0;
}

static int libraries(void) {
    HOLDS(dlopen("/System/Library/PrivateFrameworks/AppleNeuralEngine.framework/AppleNeuralEngine", RTLD_NOW) == NULL);
    HOLDS(strcmp(dlerror(), "machorun opens no libraries") == 0 && dlerror() == NULL);
    return 0;
}

/* What must end the process, with a name. */
#define DIES(name, call)                                                                                               \
    int dies_of_##name(void);                                                                                          \
    int dies_of_##name(void) {                                                                                         \
        call;                                                                                                          \
        return 0;                                                                                                      \
    }

static char small[64];
DIES(sysconf, sysconf(_SC_PAGESIZE))
DIES(sysctlbyname, sysctlbyname("hw.memsize", NULL, &(size_t){0}, NULL, 0))
DIES(clock_gettime, clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &(struct timespec){0}))
DIES(open, open("/", O_RDONLY | O_SYMLINK))
DIES(mmap, mmap(NULL, 0x4000, PROT_READ, MAP_PRIVATE | MAP_ANON | MAP_JIT, -1, 0))
DIES(mprotect, mprotect(NULL, 0x4000, 0x10))
DIES(flock, flock(0, 0x10))
DIES(format, snprintf(small, sizeof small, "%Lf", 1.0L))
DIES(__snprintf_chk, __snprintf_chk(small, sizeof small, 0, sizeof small - 1, "%d", 1))
DIES(pthread_mutex_lock, pthread_mutex_lock((pthread_mutex_t *)(void *)small))
DIES(pthread_cond_signal, pthread_cond_signal((pthread_cond_t *)(void *)small))
DIES(pthread_once, pthread_once((pthread_once_t *)(void *)small, run_once))
DIES(dlsym, dlsym(RTLD_DEFAULT, "malloc"))
DIES(objc_msgSend, objc_msgSend())

/* Writing to code ends the process as well, but without a name. */
int writes_to_code(void);
int writes_to_code(void) {
    *(volatile char *)(uintptr_t)writes_to_code = 0;
    return 0;
}

int probe(void);
int probe(void) {
    int (*const parts[])(void) = {pointers, text, numbers_and_time, files, memory, threads, libraries};
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        const int line = parts[i]();
        if (line != 0) return line;
    }
    return 0;
}
