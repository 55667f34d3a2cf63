/* Functions of Apple's libSystem for an arm64 Mach-O image in a Linux process: those whose arguments, results or types
 * differ between the two systems. What is the same is bound directly (bindings.c). Each takes and gives macOS's values,
 * by the headers of macOS as zig ships them; a value with no counterpart here ends the process with its name. */
#include "machorun.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

_Noreturn void machorun_die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("machorun: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    abort();
}

/* ---- errors: 1 to 34 are the same on both, but for 11 ------------------------------------------------------------ */

struct number {
    int macos, here;
};

static const struct number errors[] = {
    {11, EDEADLK},   {35, EAGAIN}, {45, ENOTSUP}, {60, ETIMEDOUT}, {62, ELOOP},     {63, ENAMETOOLONG}, {66, ENOTEMPTY},
    {69, EDQUOT},    {70, ESTALE}, {77, ENOLCK},  {78, ENOSYS},    {84, EOVERFLOW}, {89, ECANCELED}};

static int error_to_macos(int error) {
    for (int i = 0; i < LENGTH(errors); i++)
        if (errors[i].here == error) return errors[i].macos;
    if (error < 0 || error > ERANGE) machorun_die("errno %d (%s) has no number on macOS", error, strerror(error));
    return error;
}

static int error_to_linux(int error) {
    for (int i = 0; i < LENGTH(errors); i++)
        if (errors[i].macos == error) return errors[i].here;
    return error >= 0 && error <= ERANGE ? error : -1;
}

/* The image's errno, one a thread, is not glibc's: numbers differ, and mathematical functions of macOS set none. */
static __thread int macos_errno;

static int *macos_error(void) { return &macos_errno; }

/* The value of a call that may set errno. */
#define WITH_ERRNO(call)                                                                                               \
    ({                                                                                                                 \
        const int before = errno;                                                                                      \
        errno = 0;                                                                                                     \
        __auto_type result = (call);                                                                                   \
        if (errno != 0) macos_errno = error_to_macos(errno);                                                           \
        errno = before;                                                                                                \
        result;                                                                                                        \
    })

static char *macos_strerror(int error) {
    static __thread char unknown[32];
    if (error_to_linux(error) >= 0) return strerror(error_to_linux(error));
    snprintf(unknown, sizeof unknown, "Unknown error: %d", error);
    return unknown;
}

/* ---- memory, numbers, text --------------------------------------------------------------------------------------- */

static void *macos_malloc(size_t bytes) { return WITH_ERRNO(malloc(bytes)); }
static void *macos_calloc(size_t n, size_t bytes) { return WITH_ERRNO(calloc(n, bytes)); }
/* To 0 bytes: an object of the least size there, here nothing is left. */
static void *macos_realloc(void *old, size_t bytes) { return WITH_ERRNO(realloc(old, bytes > 0 ? bytes : 1)); }

static void macos_memset_pattern16(void *out, const void *pattern, size_t bytes) {
    for (size_t at = 0; at < bytes; at += 16) memcpy((char *)out + at, pattern, bytes - at < 16 ? bytes - at : 16);
}

static double macos_strtod(const char *text, char **end) { return WITH_ERRNO(strtod(text, end)); }
static long macos_strtol(const char *text, char **end, int base) { return WITH_ERRNO(strtol(text, end, base)); }

/* What there is of 0 and of NaN: on macOS both are the least int. */
static int macos_ilogbf(float x) { return x == 0.0f || isnan(x) ? INT_MIN : ilogbf(x); }

/* Two doubles come back in d0 and d1, like a struct of two on Linux. */
struct sine_cosine {
    double sine, cosine;
};
static struct sine_cosine macos_sincos(double x) { return (struct sine_cosine){sin(x), cos(x)}; }

/* Entered through variadic.S as well. A va_list of macOS is the address of the arguments; one of Linux has it as that
 * of the part in memory, with no registers left. (Arm, "Procedure Call Standard for the Arm 64-bit Architecture", the
 * va_list type) */
int macos_vsnprintf(char *out, size_t bytes, const char *format, const void *arguments) {
    const struct {
        const void *stack, *general_end, *vector_end;
        int general_left, vector_left;
    } list = {arguments, NULL, NULL, 0, 0};
    va_list as_linux;
    _Static_assert(sizeof list == sizeof as_linux, "the va_list of another architecture");
    memcpy(&as_linux, &list, sizeof list);
    for (const char *at = strchr(format, '%'); at != NULL; at = strchr(at, '%')) {
        at += 1 + strspn(at + 1, "-+ #0123456789.*hljzt");
        if (*at == '\0' || strchr("diuoxXcsfFeEgGaA%", *at) == NULL) /* %Lf is another type, %p another text... */
            machorun_die("format \"%s\": %%%c differs on macOS", format, *at);
        at++;
    }
    return WITH_ERRNO(vsnprintf(out, bytes, format, as_linux));
}

int macos_vsnprintf_chk(char *out, size_t bytes, int flag, size_t room, const char *format, const void *arguments) {
    (void)flag;
    if (bytes > room) machorun_die("__snprintf_chk: %zu bytes into %zu", bytes, room);
    return macos_vsnprintf(out, bytes, format, arguments);
}

/* ---- files and the system ---------------------------------------------------------------------------------------- */

static int translate(const char *what, int flags, const struct number *known, int n) {
    int translated = 0, left = flags;
    for (int i = 0; i < n; i++) {
        if ((flags & known[i].macos) == 0) continue;
        translated |= known[i].here;
        left &= ~known[i].macos;
    }
    if (left != 0) machorun_die("%s: flags %#x are not known", what, (unsigned)left);
    return translated;
}

/* Entered through variadic.S. */
int macos_open(const char *path, int flags, const void *arguments) {
    static const struct number known[] = {
        {0x1, O_WRONLY},  {0x2, O_RDWR},    {0x4, O_NONBLOCK}, {0x8, O_APPEND},         {0x100, O_NOFOLLOW},
        {0x200, O_CREAT}, {0x400, O_TRUNC}, {0x800, O_EXCL},   {0x100000, O_DIRECTORY}, {0x1000000, O_CLOEXEC}};
    const int translated = translate("open", flags, known, LENGTH(known));
    int mode = 0;
    if ((translated & O_CREAT) != 0) memcpy(&mode, arguments, sizeof mode);
    return WITH_ERRNO(open(path, translated, (mode_t)mode));
}

static int64_t macos_lseek(int file, int64_t offset, int whence) {
    if (whence < 0 || whence > 2) machorun_die("lseek: whence %d is not known", whence); /* three are the same */
    return WITH_ERRNO(lseek(file, offset, whence));
}

static int macos_close(int file) { return WITH_ERRNO(close(file)); }
static int macos_mkdir(const char *path, unsigned mode) { return WITH_ERRNO(mkdir(path, (mode_t)(mode & 0xFFFF))); }

static int macos_flock(int file, int operation) {
    if ((operation & ~0xF) != 0) machorun_die("flock: operation %#x is not known", (unsigned)operation);
    return WITH_ERRNO(flock(file, operation)); /* the four bits are the same */
}

/* Read, write and execute are the same bits; nothing else is. */
static int check_protection(const char *function, int protection) {
    if ((protection & ~7) != 0) machorun_die("%s: protection %#x is not known", function, (unsigned)protection);
    return protection;
}

static void *macos_mmap(void *address, size_t bytes, int protection, int flags, int file, long offset) {
    static const struct number known[] = {
        {0x1, MAP_SHARED}, {0x2, MAP_PRIVATE}, {0x10, MAP_FIXED}, {0x40, MAP_NORESERVE}, {0x1000, MAP_ANONYMOUS}};
    const int translated = translate("mmap", flags, known, LENGTH(known));
    return WITH_ERRNO(mmap(address, bytes, check_protection("mmap", protection), translated, file, offset));
}

static int macos_munmap(void *address, size_t bytes) { return WITH_ERRNO(munmap(address, bytes)); }
static int macos_mprotect(void *address, size_t bytes, int protection) {
    return WITH_ERRNO(mprotect(address, bytes, check_protection("mprotect", protection)));
}

static int macos_clock_gettime(int clock, struct timespec *time) {
    const clockid_t known[] = {[0] = CLOCK_REALTIME + 1, [4] = CLOCK_MONOTONIC_RAW + 1, [6] = CLOCK_MONOTONIC + 1};
    if (clock < 0 || clock >= LENGTH(known) || known[clock] == 0) machorun_die("clock_gettime: clock %d", clock);
    return WITH_ERRNO(clock_gettime(known[clock] - 1, time));
}

static int macos_nanosleep(const struct timespec *time, struct timespec *left) {
    return WITH_ERRNO(nanosleep(time, left));
}

static long macos_sysconf(int what) {
    enum { PROCESSORS_ONLINE = 58 };
    if (what != PROCESSORS_ONLINE) machorun_die("sysconf(%d) is not known", what);
    return WITH_ERRNO(sysconf(_SC_NPROCESSORS_ONLN));
}

/* The machine that the image finds itself on: new enough for everything, and without a Neural Engine (macos_dlopen). */
static int macos_sysctlbyname(const char *name, void *out, size_t *bytes, void *in, size_t in_bytes) {
    static const struct {
        const char *name, *value;
    } known[] = {{"kern.osproductversion", "15.0"}, {"machdep.cpu.brand_string", "Apple, by machorun"}};
    if (in != NULL || in_bytes != 0 || bytes == NULL) machorun_die("sysctlbyname(\"%s\"): not a query", name);
    for (int i = 0; i < LENGTH(known); i++) {
        if (strcmp(known[i].name, name) != 0) continue;
        const size_t needed = strlen(known[i].value) + 1, room = *bytes;
        *bytes = needed;
        if (out == NULL) return 0;
        if (room < needed) {
            *bytes = room;
            memcpy(out, known[i].value, room);
            macos_errno = ENOMEM;
            return -1;
        }
        memcpy(out, known[i].value, needed);
        return 0;
    }
    machorun_die("sysctlbyname(\"%s\") is not known", name);
}

/* No library is opened: Apple's are not here, and one of Linux has another ABI. */
static char no_libraries[] = "machorun opens no libraries";
static __thread char *library_error;

static void *macos_dlopen(const char *path, int mode) {
    (void)path;
    (void)mode;
    library_error = no_libraries;
    return NULL;
}

static char *macos_dlerror(void) {
    char *error = library_error;
    library_error = NULL;
    return error;
}

static void *macos_dlsym(void *library, const char *symbol) { machorun_die("dlsym(%p, \"%s\")", library, symbol); }

/* ---- threads ----------------------------------------------------------------------------------------------------- */

/* Objects of pthreads begin with a signature, which the initialisers set; the rest is ours. Apple's are at least as
 * large as Linux's, but for the condition, which is on the heap. (macOS, <pthread/pthread_impl.h>) */
enum { MUTEX = 0x32AAABA7, CONDITION = 0x3CB0B1BB, ONCE = 0x30B1BCBA, ATTRIBUTES = 0x54484441 };

struct macos_mutex {
    long signature;
    pthread_mutex_t mutex; /* all zeros in one that is initialised statically, on both systems */
};
struct macos_condition {
    long signature;
    pthread_cond_t *condition; /* NULL in one that is initialised statically */
};
struct macos_once {
    long signature;
    pthread_once_t once; /* 0 before */
};
struct macos_attributes {
    long signature;
    int detached;
};
_Static_assert(sizeof(struct macos_mutex) <= 64 && sizeof(struct macos_condition) <= 48, "larger than Apple's");
_Static_assert(sizeof(struct macos_once) <= 16 && sizeof(struct macos_attributes) <= 64, "larger than Apple's");

static void check_signature(const char *function, long found, long expected) {
    if (found != expected) machorun_die("%s: signature %#lx, expected %#lx", function, found, expected);
}

static int macos_pthread_mutex_init(struct macos_mutex *mutex, const void *attributes) {
    if (attributes != NULL) machorun_die("pthread_mutex_init: attributes are not known");
    mutex->signature = MUTEX;
    return error_to_macos(pthread_mutex_init(&mutex->mutex, NULL));
}

static int macos_pthread_mutex_destroy(struct macos_mutex *mutex) {
    check_signature("pthread_mutex_destroy", mutex->signature, MUTEX);
    mutex->signature = 0;
    return error_to_macos(pthread_mutex_destroy(&mutex->mutex));
}

static int macos_pthread_mutex_lock(struct macos_mutex *mutex) {
    check_signature("pthread_mutex_lock", mutex->signature, MUTEX);
    return error_to_macos(pthread_mutex_lock(&mutex->mutex));
}

static int macos_pthread_mutex_unlock(struct macos_mutex *mutex) {
    check_signature("pthread_mutex_unlock", mutex->signature, MUTEX);
    return error_to_macos(pthread_mutex_unlock(&mutex->mutex));
}

static pthread_cond_t *new_condition(void) {
    pthread_cond_t *condition = malloc(sizeof *condition);
    if (condition == NULL || pthread_cond_init(condition, NULL) != 0) machorun_die("no memory for a condition");
    return condition;
}

static pthread_cond_t *condition_of(const char *function, struct macos_condition *shell) {
    check_signature(function, shell->signature, CONDITION);
    pthread_cond_t *found = __atomic_load_n(&shell->condition, __ATOMIC_ACQUIRE);
    if (found != NULL) return found;
    pthread_cond_t *mine = new_condition();
    if (__atomic_compare_exchange_n(&shell->condition, &found, mine, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
        return mine;
    free(mine); /* another thread came first */
    return found;
}

static int macos_pthread_cond_init(struct macos_condition *shell, const void *attributes) {
    if (attributes != NULL) machorun_die("pthread_cond_init: attributes are not known");
    *shell = (struct macos_condition){CONDITION, new_condition()};
    return 0;
}

static int macos_pthread_cond_destroy(struct macos_condition *shell) {
    pthread_cond_t *condition = condition_of("pthread_cond_destroy", shell);
    const int error = pthread_cond_destroy(condition);
    shell->signature = 0;
    free(condition);
    return error_to_macos(error);
}

static int macos_pthread_cond_wait(struct macos_condition *shell, struct macos_mutex *mutex) {
    check_signature("pthread_cond_wait", mutex->signature, MUTEX);
    return error_to_macos(pthread_cond_wait(condition_of("pthread_cond_wait", shell), &mutex->mutex));
}

static int macos_pthread_cond_signal(struct macos_condition *shell) {
    return error_to_macos(pthread_cond_signal(condition_of("pthread_cond_signal", shell)));
}

static int macos_pthread_cond_broadcast(struct macos_condition *shell) {
    return error_to_macos(pthread_cond_broadcast(condition_of("pthread_cond_broadcast", shell)));
}

static int macos_pthread_once(struct macos_once *once, void (*run)(void)) {
    check_signature("pthread_once", once->signature, ONCE);
    return error_to_macos(pthread_once(&once->once, run));
}

static int macos_pthread_attr_init(struct macos_attributes *attributes) {
    *attributes = (struct macos_attributes){ATTRIBUTES, 0};
    return 0;
}

static int macos_pthread_attr_destroy(struct macos_attributes *attributes) {
    check_signature("pthread_attr_destroy", attributes->signature, ATTRIBUTES);
    attributes->signature = 0;
    return 0;
}

static int macos_pthread_attr_setdetachstate(struct macos_attributes *attributes, int state) {
    enum { JOINABLE = 1, DETACHED = 2 };
    check_signature("pthread_attr_setdetachstate", attributes->signature, ATTRIBUTES);
    if (state != JOINABLE && state != DETACHED) return EINVAL;
    attributes->detached = state == DETACHED;
    return 0;
}

static int macos_pthread_create(pthread_t *thread, const struct macos_attributes *shell, void *(*run)(void *),
                                void *argument) {
    pthread_attr_t attributes;
    if (shell != NULL) check_signature("pthread_create", shell->signature, ATTRIBUTES);
    int error = pthread_attr_init(&attributes);
    if (error == 0 && shell != NULL && shell->detached)
        error = pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    if (error == 0) error = pthread_create(thread, &attributes, run, argument);
    pthread_attr_destroy(&attributes);
    return error_to_macos(error);
}

static int macos_pthread_atfork(void (*prepare)(void), void (*parent)(void), void (*child)(void)) {
    return error_to_macos(pthread_atfork(prepare, parent, child));
}

/* A key has 8 bytes there, 4 here. */
static int macos_pthread_key_create(unsigned long *key, void (*destroy)(void *)) {
    pthread_key_t created;
    const int error = pthread_key_create(&created, destroy);
    if (error == 0) *key = created;
    return error_to_macos(error);
}

static void *macos_pthread_getspecific(unsigned long key) { return pthread_getspecific((pthread_key_t)key); }

static int macos_pthread_setspecific(unsigned long key, const void *value) {
    return error_to_macos(pthread_setspecific((pthread_key_t)key, value));
}

/* Signals 1 to 31 of macOS, bit by bit; EMT and INFO are not on Linux. */
static const int signals[32] = {
    [1] = SIGHUP,   [2] = SIGINT,   [3] = SIGQUIT,  [4] = SIGILL,   [5] = SIGTRAP,    [6] = SIGABRT,  [8] = SIGFPE,
    [9] = SIGKILL,  [10] = SIGBUS,  [11] = SIGSEGV, [12] = SIGSYS,  [13] = SIGPIPE,   [14] = SIGALRM, [15] = SIGTERM,
    [16] = SIGURG,  [17] = SIGSTOP, [18] = SIGTSTP, [19] = SIGCONT, [20] = SIGCHLD,   [21] = SIGTTIN, [22] = SIGTTOU,
    [23] = SIGIO,   [24] = SIGXCPU, [25] = SIGXFSZ, [26] = SIGVTALRM, [27] = SIGPROF, [28] = SIGWINCH,
    [30] = SIGUSR1, [31] = SIGUSR2};

static int macos_pthread_sigmask(int how, const uint32_t *set, uint32_t *old) {
    static const int known[] = {0, SIG_BLOCK, SIG_UNBLOCK, SIG_SETMASK}; /* 1, 2, 3 there */
    sigset_t translated, before;
    if (set != NULL && (how < 1 || how > 3)) return EINVAL;
    sigemptyset(&translated);
    for (int i = 1; i < 32; i++)
        if (set != NULL && (*set >> (i - 1) & 1) != 0 && signals[i] != 0) sigaddset(&translated, signals[i]);
    const int error = pthread_sigmask(set != NULL ? known[how] : 0, set != NULL ? &translated : NULL, &before);
    if (old != NULL) *old = 0;
    for (int i = 1; i < 32 && old != NULL; i++)
        if (signals[i] != 0 && sigismember(&before, signals[i]) == 1) *old |= (uint32_t)1 << (i - 1);
    return error_to_macos(error);
}

/* ---- what each import is ----------------------------------------------------------------------------------------- */

extern char __memcpy_chk[], __memset_chk[]; /* in glibc, but not in its headers */

#define LIBSYSTEM(symbol, target) {"libSystem.B.dylib", symbol, (void *)(target), BINDING_ADAPTED}
#define THE_SAME(name) {"libSystem.B.dylib", "_" #name, (void *)(name), BINDING_SAME}
#define ADAPTED(name) LIBSYSTEM("_" #name, macos_##name)

const struct binding machorun_libsystem[] = {
    /* Mathematical functions: the last bits of the results differ from Apple's, as between any two libraries. */
    THE_SAME(atanf), THE_SAME(cos), THE_SAME(cosf), THE_SAME(erf), THE_SAME(exp), THE_SAME(exp2), THE_SAME(expf),
    THE_SAME(frexpf), THE_SAME(ldexp), THE_SAME(ldexpf), THE_SAME(log), THE_SAME(log2), THE_SAME(logf), THE_SAME(pow),
    THE_SAME(sin), THE_SAME(sinf), THE_SAME(tanh), ADAPTED(ilogbf), LIBSYSTEM("___sincos_stret", macos_sincos),
    /* Memory and text: C's own, without a locale, a type or a constant of the system's in their interface.
     * posix_memalign answers with one of two errors, which are the same. qsort may leave equal elements in another
     * order. */
    THE_SAME(bzero), THE_SAME(free), THE_SAME(memchr), THE_SAME(memcmp), THE_SAME(memcpy), THE_SAME(posix_memalign),
    THE_SAME(qsort), THE_SAME(strchr), THE_SAME(strcmp), THE_SAME(strcpy), THE_SAME(strcspn), THE_SAME(strlen),
    THE_SAME(strncmp), THE_SAME(strncpy), THE_SAME(strspn), THE_SAME(strstr), THE_SAME(getenv),
    THE_SAME(__memcpy_chk), THE_SAME(__memset_chk),
    ADAPTED(malloc), ADAPTED(calloc), ADAPTED(realloc), ADAPTED(memset_pattern16), ADAPTED(strtod), ADAPTED(strtol),
    ADAPTED(vsnprintf), LIBSYSTEM("_snprintf", variadic_snprintf), LIBSYSTEM("___snprintf_chk", variadic_snprintf_chk),
    LIBSYSTEM("___error", macos_error), ADAPTED(strerror),
    /* Files and the system. */
    THE_SAME(getpid),
    LIBSYSTEM("_open", variadic_open), ADAPTED(close), ADAPTED(lseek), ADAPTED(mkdir), ADAPTED(flock), ADAPTED(mmap), ADAPTED(munmap),
    ADAPTED(mprotect), ADAPTED(clock_gettime), ADAPTED(nanosleep), ADAPTED(sysconf), ADAPTED(sysctlbyname),
    ADAPTED(dlopen), ADAPTED(dlerror), ADAPTED(dlsym),
    /* Threads. A pthread_t is 8 bytes on both. */
    THE_SAME(pthread_self), THE_SAME(pthread_equal), ADAPTED(pthread_create), ADAPTED(pthread_atfork),
    ADAPTED(pthread_attr_init), ADAPTED(pthread_attr_destroy), ADAPTED(pthread_attr_setdetachstate),
    ADAPTED(pthread_mutex_init), ADAPTED(pthread_mutex_destroy), ADAPTED(pthread_mutex_lock),
    ADAPTED(pthread_mutex_unlock), ADAPTED(pthread_cond_init), ADAPTED(pthread_cond_destroy),
    ADAPTED(pthread_cond_wait), ADAPTED(pthread_cond_signal), ADAPTED(pthread_cond_broadcast), ADAPTED(pthread_once),
    ADAPTED(pthread_key_create), ADAPTED(pthread_getspecific), ADAPTED(pthread_setspecific), ADAPTED(pthread_sigmask),
    {NULL, NULL, NULL, BINDING_SAME},
};
