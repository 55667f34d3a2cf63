/* The Objective-C device without Python, for leak checkers and mutants: everything a caller can do with it, and every
 * failure of the framework. Needs ANELLM_ANE_DEVICE and ANELLM_ANE_FRAMEWORK, ANELLM_ANE_BACKOFF=0.05, and TMP naming
 * an empty folder. Prints what is wrong and exits with 1, or prints "ok". */
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "fake_ane.h"

#define HEADER                                                                                                         \
    "program(1.3)\n"                                                                                                   \
    "[buildInfo = dict<string, string>({{\"coremlc-component-MIL\", \"3510.2.1\"}, "                                   \
    "{\"coremlc-version\", \"3505.4.1\"}, "                                                                            \
    "{\"coremltools-component-milinternal\", \"\"}, {\"coremltools-version\", \"9.0\"}})]\n{\n"
static const char text[] = HEADER
    "    func main<ios18>(tensor<fp16, [1, 2, 1, 32]> b, tensor<fp16, [1, 2, 1, 32]> a) {\n"
    "        tensor<fp16, [1, 2, 1, 32]> w = const()[name = string(\"w\"), val = tensor<fp16, [1, 2, 1, 32]>(BLOBFILE("
    "path = string(\"@model_path/weights/w.bin\"), offset = uint64(64)))];\n"
    "        tensor<fp16, [1, 2, 1, 32]> z = mul(x = a, y = w)[name = string(\"z\")];\n"
    "        tensor<fp16, [1, 2, 1, 32]> y = sub(x = a, y = b)[name = string(\"y\")];\n"
    "    } -> (z, y);\n}\n";
enum { VALUES = 64, N_STEPS = 9 };

static struct {
    unsigned char header[64], record[64];
    uint16_t values[VALUES];
} blob;

static const anellm_ane_profile profile = {
    .name = "m4", .architecture = "h16g", .max_rank = 5, .max_width = 65536, .max_height = 65536, .max_channels = 65536,
    .max_batch = 65536, .max_loaded = 128, .min_surface_bytes = 49152, .equal_surfaces = 1, .row_multiple = 16,
    .sigmoid_low = -8.0, .sigmoid_high = 8.0,
};

static struct {
    void (*fail)(const char *, int, int, int);
    int (*count)(const char *), (*live)(void);
    void (*keep)(int), (*unload_cleans)(int), (*expect_qos)(int), (*slow_down)(int, int), (*close)(void);
    void (*shim_fail)(const char *, int);
    double (*last_gap)(void);
} fake;

static void find_fake(void) {
    void *library = dlopen(getenv("ANELLM_ANE_FRAMEWORK"), RTLD_NOW | RTLD_GLOBAL);
    CHECK(library != NULL, "%s", dlerror());
    find(&fake.fail, library, "fake_ane_fail");
    find(&fake.count, library, "fake_ane_count");
    find(&fake.live, library, "fake_ane_live");
    find(&fake.expect_qos, library, "fake_ane_expect_qos");
    find(&fake.keep, library, "fake_ane_keep");
    find(&fake.unload_cleans, library, "fake_ane_unload_cleans");
    find(&fake.slow_down, library, "fake_ane_slow_down");
    find(&fake.close, library, "fake_ane_close");
    find(&fake.last_gap, library, "fake_ane_last_gap");
    find(&fake.shim_fail, library, "shim_fail");
}

/* Folders of programs: TMP holds a folder of GNUstep's, which holds them. */
static int count_folders(void) {
    int n = 0;
    DIR *top = opendir(getenv("TMP"));
    CHECK(top != NULL, "TMP");
    for (struct dirent *entry; (entry = readdir(top)) != NULL;) {
        char path[4096];
        if (entry->d_name[0] == '.') continue;
        snprintf(path, sizeof path, "%s/%s", getenv("TMP"), entry->d_name);
        DIR *inner = opendir(path);
        CHECK(inner != NULL, "%s", path);
        for (struct dirent *e; (e = readdir(inner)) != NULL;) n += e->d_name[0] != '.';
        closedir(inner);
    }
    closedir(top);
    return n;
}

static int count_descriptors(void) {
    int n = 0;
    DIR *folder = opendir("/proc/self/fd");
    CHECK(folder != NULL, "/proc/self/fd");
    while (readdir(folder) != NULL) n++;
    closedir(folder);
    return n;
}

static void check_nothing_left(const char *where) {
    static int descriptors = 0; /* behind the first program; every further one is checked */
    if (descriptors == 0) descriptors = count_descriptors();
    CHECK(count_descriptors() == descriptors, "%s leaves %d files open", where, count_descriptors() - descriptors);
    CHECK(fake.live() == 0, "%s leaves %d objects", where, fake.live());
    CHECK(count_folders() == 0, "%s leaves %d folders", where, count_folders());
}

static anellm_ane *open_device(int64_t max_compiles) {
    anellm_ane_profile p = profile;
    anellm_ane *device = NULL;
    p.max_compiles = max_compiles;
    OK(anellm_ane_open(&device, getenv("ANELLM_ANE_DEVICE"), &p, NULL));
    return device;
}

static uint16_t half(int n) { /* of a small whole number */
    int exponent = 0;
    if (n == 0) return 0;
    const int size = n < 0 ? -n : n;
    while (size >> (exponent + 1)) exponent++;
    return (uint16_t)((n < 0 ? 0x8000 : 0) | ((exponent + 15) << 10) | ((size << (10 - exponent)) & 0x3ff));
}

static void make_blob(int factor) {
    const uint32_t sentinel = 0xdeadbeef, one = 1, version = 2;
    const uint64_t bytes = sizeof blob.values, offset = 128;
    memset(&blob, 0, sizeof blob);
    memcpy(blob.header, &one, 4);
    memcpy(blob.header + 4, &version, 4);
    memcpy(blob.record, &sentinel, 4);
    memcpy(blob.record + 4, &one, 4);
    memcpy(blob.record + 8, &bytes, 8);
    memcpy(blob.record + 16, &offset, 8);
    for (int i = 0; i < VALUES; i++) blob.values[i] = half(factor);
}

static int compile(anellm_ane *device, anellm_ane_program **program) {
    const anellm_ane_file file = {"@model_path/weights/w.bin", &blob, sizeof blob};
    return anellm_ane_compile(device, program, text, (int64_t)strlen(text), &file, 1);
}

struct run {
    anellm_ane_program *program;
    anellm_ane_surface *surfaces[4]; /* a, b, y, z */
    anellm_ane_request *request;
};

/* All of a program, as far as it goes; what is there must be freed. */
static int make_run(struct run *run, anellm_ane *device) {
    memset(run, 0, sizeof *run);
    int32_t symbols[4] = {0};
    int status = compile(device, &run->program);
    if (status == ANELLM_OK) status = anellm_ane_load(run->program);
    for (int i = 0; i < 4 && status == ANELLM_OK; i++) {
        static const char *const names[] = {"a", "b", "y", "z"};
        anellm_ane_port port;
        OK(anellm_ane_get_port(run->program, 0, i / 2, i % 2, &port));
        CHECK(strcmp(port.name, names[i]) == 0, "port %d is %s", i, port.name);
        CHECK(port.bytes == VALUES * 2 && port.rank == 4 && port.shape[1] == 2, "%d", i);
        CHECK(strcmp(port.dtype, "fp16") == 0, "%s", port.dtype);
        CHECK(port.declared_position == 1 - i % 2, "%d", i);
        symbols[i] = port.symbol;
        status = anellm_ane_surface_create(device, &run->surfaces[i], 49153);
    }
    if (status == ANELLM_OK)
        status = anellm_ane_request_create(run->program, &run->request, 0, run->surfaces, symbols, 2, run->surfaces + 2,
                                           symbols + 2, 2);
    return status;
}

static void free_run(struct run *run) {
    anellm_ane_request_free(run->request);
    for (int i = 0; i < 4; i++) anellm_ane_surface_free(run->surfaces[i]);
    anellm_ane_program_free(run->program);
}

static void evaluate_and_check(const struct run *run, int factor) {
    for (int s = 0; s < 2; s++) {
        OK(anellm_ane_surface_lock(run->surfaces[s], 0));
        uint16_t *at = anellm_ane_surface_base(run->surfaces[s]);
        for (int i = 0; i < VALUES; i++) at[i] = half(s == 0 ? i : 3);
        OK(anellm_ane_surface_unlock(run->surfaces[s]));
    }
    OK(anellm_ane_evaluate(run->program, run->request));
    for (int s = 2; s < 4; s++) {
        OK(anellm_ane_surface_lock(run->surfaces[s], 1));
        const uint16_t *at = anellm_ane_surface_base(run->surfaces[s]);
        for (int i = 0; i < VALUES; i++)
            CHECK(at[i] == half(s == 2 ? i - 3 : factor * i), "output %d, value %d: %04x", s, i, at[i]);
        OK(anellm_ane_surface_unlock(run->surfaces[s]));
    }
}

/* The kernels are not linked: these programs have no products. */
const char *anellm_cpu_variant(void) { return "portable"; }

int anellm_matmul(float *C, int64_t ld_c, const float *A, int64_t ld_a, int trans_a, const float *B, int64_t ld_b,
                  int trans_b, int64_t M, int64_t N, int64_t K, int accumulate) {
    (void)C, (void)ld_c, (void)A, (void)ld_a, (void)trans_a, (void)B, (void)ld_b, (void)trans_b;
    (void)M, (void)N, (void)K, (void)accumulate;
    return ANELLM_UNSUPPORTED;
}

/* ---- scenarios --------------------------------------------------------------------------------------------------- */

static void test_a_program(void) {
    struct run run;
    anellm_ane *device = open_device(0);
    anellm_ane_counters c;
    OK(make_run(&run, device));
    CHECK(count_folders() == 1, "%d folders", count_folders());
    evaluate_and_check(&run, 2);
    evaluate_and_check(&run, 2);
    OK(anellm_ane_load(run.program)); /* is loaded: nothing to do */
    OK(anellm_ane_unload(run.program));
    OK(anellm_ane_unload(run.program));
    CHECK(anellm_ane_evaluate(run.program, run.request) == ANELLM_EVAL, "it is not loaded");
    CHECK(strstr(anellm_last_error(), "Q59") != NULL, "text");
    OK(anellm_ane_load(run.program));
    make_blob(5);
    const anellm_ane_file file = {"@model_path/weights/w.bin", &blob, sizeof blob};
    OK(anellm_ane_reload(run.program, &file, 1));
    make_blob(2);
    evaluate_and_check(&run, 2); /* the old weights (Q17) */
    OK(anellm_ane_get_counters(device, &c));
    CHECK(c.compiles == 1 && c.loaded == 1 && c.loads == 3 && c.evaluations == 4 && c.evaluation_failures == 1 &&
              c.compile_failures == 0, "counters");
    free_run(&run);
    OK(anellm_ane_get_counters(device, &c));
    CHECK(c.loaded == 0, "%lld loaded", (long long)c.loaded);
    anellm_ane_close(device);
    check_nothing_left("a program");
}

static void test_any_order(void) {
    struct run run, twin;
    anellm_ane *device = open_device(0);
    OK(make_run(&run, device));
    OK(make_run(&twin, device));
    CHECK(count_folders() == 1, "one text, one folder: %d", count_folders());
    evaluate_and_check(&run, 2);
    free_run(&run);
    CHECK(count_folders() == 1, "the twin's folder: %d", count_folders());
    evaluate_and_check(&twin, 2);
    const int unloads = fake.count("unload");
    anellm_ane_close(device);
    anellm_ane_program_free(twin.program);
    CHECK(fake.count("unload") == unloads + 1, "slots are few: a program's is given back though requests are left");
    for (int i = 0; i < 4; i++) anellm_ane_surface_free(twin.surfaces[i]);
    CHECK(fake.live() > 0, "the request keeps them");
    anellm_ane_request_free(twin.request);
    check_nothing_left("any order");
}

static void test_locks(void) {
    anellm_ane *device = open_device(0);
    struct run run;
    OK(make_run(&run, device));
    anellm_ane_surface *surface = run.surfaces[0];
    CHECK(anellm_ane_surface_bytes(surface) == 4 * 16384, "%lld", (long long)anellm_ane_surface_bytes(surface));
    CHECK(anellm_ane_surface_base(surface) == NULL, "not locked");
    CHECK(anellm_ane_surface_unlock(surface) == ANELLM_INVALID, "not locked");
    OK(anellm_ane_surface_lock(surface, 1));
    const unsigned char *base = anellm_ane_surface_base(surface);
    for (int64_t i = 0; i < anellm_ane_surface_bytes(surface); i++) CHECK(base[i] == 0, "byte %lld", (long long)i);
    CHECK(anellm_ane_surface_lock(surface, 0) == ANELLM_BUSY, "locked for reading");
    OK(anellm_ane_surface_lock(surface, 1));
    OK(anellm_ane_surface_unlock(surface));
    CHECK(anellm_ane_evaluate(run.program, run.request) == ANELLM_EVAL, "a surface is locked");
    OK(anellm_ane_surface_unlock(surface));
    CHECK(anellm_ane_surface_base(surface) == NULL, "not locked");
    evaluate_and_check(&run, 2);
    fake.shim_fail("lock", 1);
    CHECK(anellm_ane_surface_lock(surface, 0) == ANELLM_INTERNAL, "lock fails");
    fake.shim_fail("unlock", 1);
    OK(anellm_ane_surface_lock(surface, 0));
    CHECK(anellm_ane_surface_unlock(surface) == ANELLM_INTERNAL, "unlock fails");
    OK(anellm_ane_surface_lock(surface, 0)); /* and stays so: freed below */
    anellm_ane_surface *none = NULL;
    static const char *const steps[] = {"create", "alloc", "base", "lock", "unlock"};
    for (int i = 0; i < 5; i++) {
        fake.shim_fail(steps[i], 1);
        const int status = anellm_ane_surface_create(device, &none, 1);
        CHECK(status == (i < 3 ? ANELLM_NOMEM : ANELLM_INTERNAL) && none == NULL, "%s: %d", steps[i], status);
    }
    CHECK(anellm_ane_surface_create(device, &none, (int64_t)1 << 60) == ANELLM_NOMEM, "too large");
    free_run(&run);
    anellm_ane_close(device);
    check_nothing_left("locks");
}

static void expect_error(anellm_ane *device, const char *domain, int64_t code, const char *words, const char *where) {
    anellm_ane_error e;
    OK(anellm_ane_get_error(device, &e));
    CHECK(strcmp(e.domain, domain) == 0 && e.code == code && strstr(e.text, words) != NULL, "%s: %s, %lld, %s", where,
          e.domain, (long long)e.code, e.text);
    CHECK(strstr(anellm_last_error(), e.text) != NULL && strstr(anellm_last_error(), e.domain) != NULL, "%s", where);
}

static const struct fault {
    const char *step;
    int status, has_error; /* whether the API has an NSError for it */
    int64_t code;
    const char *domain, *text;
} faults[N_STEPS] = {
    {"descriptor", ANELLM_COMPILE, 0, 0, "", "no NSError"},
    {"model", ANELLM_COMPILE, 0, 0, "", "no NSError"},
    {"hex", ANELLM_COMPILE, 0, 0, "", "no NSError"},
    {"compile", ANELLM_COMPILE, 1, 1, "com.apple.appleneuralengine.compiler",
     "ANECCompile() FAILED: err=(CompilationFailure)"},
    {"load", ANELLM_COMPILE, 1, 6, "com.apple.appleneuralengine", "0x20004"},
    {"surface", ANELLM_EVAL, 0, 0, "", "no NSError"},
    {"request", ANELLM_EVAL, 0, 0, "", "no NSError"},
    {"evaluate", ANELLM_EVAL, 1, 8, "com.apple.appleneuralengine", "status=0x1d"},
    {"unload", ANELLM_COMPILE, 1, 7, "com.apple.appleneuralengine", "0x5"},
};

static void test_fault(const struct fault *fault, int how) {
    struct run run;
    anellm_ane *device = open_device(0);
    fake.fail(fault->step, 0, 1, how);
    int status = make_run(&run, device);
    if (strcmp(fault->step, "evaluate") == 0) status = anellm_ane_evaluate(run.program, run.request);
    if (strcmp(fault->step, "unload") == 0) status = anellm_ane_unload(run.program);
    CHECK(status == fault->status, "%s failing %d: status %d", fault->step, how, status);
    if (how == FAKE_RAISE) {
        expect_error(device, "NSInternalInconsistencyException", 0, "cannot be reached", fault->step);
    } else if (how == FAKE_NO_ERROR || !fault->has_error) {
        expect_error(device, "", 0, "no NSError", fault->step);
    } else {
        expect_error(device, fault->domain, fault->code, fault->text, fault->step);
    }
    fake.fail(fault->step, 0, 0, 0);
    if (run.request != NULL) {
        OK(anellm_ane_load(run.program));
        evaluate_and_check(&run, 2);
    }
    free_run(&run);
    anellm_ane_close(device);
    check_nothing_left(fault->step);
}

static void test_faults(void) {
    for (int i = 0; i < N_STEPS; i++) {
        for (int how = FAKE_ERROR; how <= FAKE_RAISE; how++) test_fault(&faults[i], how);
    }
    struct run run; /* a program that is never unloaded: the rest goes all the same */
    anellm_ane *device = open_device(0);
    anellm_ane_counters c;
    OK(make_run(&run, device));
    fake.fail("unload", 0, 9, FAKE_ERROR);
    free_run(&run);
    OK(anellm_ane_get_counters(device, &c));
    CHECK(c.loaded == 0, "%lld loaded", (long long)c.loaded);
    fake.fail("unload", 0, 0, 0);
    anellm_ane_close(device);
    check_nothing_left("an unload that always fails");
}

/* The folder of the program, by its name while it is there. */
static void find_folder(char *out, size_t size) {
    anellm_ane *device = open_device(0);
    anellm_ane_program *program = NULL;
    struct dirent *entry;
    char top[2048] = "";
    OK(compile(device, &program));
    for (int level = 0; level < 2; level++) {
        snprintf(out, size, "%s", level == 0 ? getenv("TMP") : top);
        DIR *folder = opendir(out);
        CHECK(folder != NULL, "%s", out);
        while ((entry = readdir(folder)) != NULL && entry->d_name[0] == '.') {}
        CHECK(entry != NULL, "%s is empty", out);
        snprintf(top, sizeof top, "%.1000s/%s", out, entry->d_name);
        closedir(folder);
    }
    snprintf(out, size, "%s", top);
    anellm_ane_program_free(program);
    anellm_ane_close(device);
    check_nothing_left("the name of a folder");
}

/* Something stands where a file or folder of the program must be. */
static void test_files(void) {
    char folder[2048], path[2100];
    anellm_ane_program *program = NULL;
    find_folder(folder, sizeof folder);
    for (int blocked = 0; blocked < 2; blocked++) {
        anellm_ane *device = open_device(0);
        if (blocked == 0) {
            FILE *file = fopen(folder, "w");
            CHECK(file != NULL && fclose(file) == 0, "%s", folder);
        } else {
            static const char *const parts[] = {"", "/weights", "/weights/w.bin"};
            for (int i = 0; i < 3; i++) {
                snprintf(path, sizeof path, "%s%s", folder, parts[i]);
                CHECK(mkdir(path, 0700) == 0, "%s", path);
            }
        }
        const int before = fake.count("compile");
        CHECK(compile(device, &program) == ANELLM_COMPILE && fake.count("compile") == before, "blocked %d", blocked);
        /* GNUstep makes a folder where a file is, and says it did. */
        CHECK(strstr(anellm_last_error(), "cannot write") != NULL || strstr(anellm_last_error(), "no folder") != NULL,
              "text");
        CHECK(strstr(anellm_last_error(), folder) != NULL, "it names the path");
        anellm_ane_close(device);
        check_nothing_left("blocked files");
    }
}

/* Another process uses the folder: its lock is one of another open file, as ours is here. */
static void test_other_processes(void) {
    char folder[2048];
    anellm_ane_program *program = NULL;
    anellm_ane *device = open_device(0);
    find_folder(folder, sizeof folder);
    OK(compile(device, &program));
    const int theirs = open(folder, O_RDONLY | O_CLOEXEC);
    CHECK(theirs >= 0 && flock(theirs, LOCK_EX | LOCK_NB) != 0, "we use %s", folder);
    CHECK(flock(theirs, LOCK_SH | LOCK_NB) == 0, "and so may they");
    anellm_ane_program_free(program);
    CHECK(count_folders() == 1, "it is theirs now");
    CHECK(flock(theirs, LOCK_EX | LOCK_NB) == 0, "theirs alone");
    CHECK(flock(theirs, LOCK_SH | LOCK_NB) == 0, "not alone");
    OK(compile(device, &program));
    close(theirs);
    anellm_ane_program_free(program);
    anellm_ane_close(device);
    check_nothing_left("other processes");
}

static void test_backoff(void) {
    anellm_ane *device = open_device(0);
    anellm_ane_program *program = NULL;
    for (int failing = 0; failing < 2; failing++) {
        OK(compile(device, &program));
        anellm_ane_program_free(program);
        if (failing) fake.fail("compile", 0, 1, FAKE_ERROR);
        CHECK(compile(device, &program) == (failing ? ANELLM_COMPILE : ANELLM_OK), "compile");
        anellm_ane_program_free(program);
        OK(compile(device, &program));
        CHECK(!failing || fake.last_gap() >= 0.05, "compiled again after %g s", fake.last_gap());
        anellm_ane_program_free(program);
    }
    anellm_ane_close(device);
    check_nothing_left("back-off");
}

static void *run_in_thread(void *device) {
    struct run run;
    for (int i = 0; i < 3; i++) {
        OK(make_run(&run, device));
        for (int k = 0; k < 5; k++) evaluate_and_check(&run, 2);
        free_run(&run);
    }
    return NULL;
}

/* One device and one text, so one folder as well; threads that Foundation did not make. */
static void test_threads(void) {
    enum { THREADS = 4 };
    pthread_t threads[THREADS];
    anellm_ane *device = open_device(0);
    for (int i = 0; i < THREADS; i++) CHECK(pthread_create(&threads[i], NULL, run_in_thread, device) == 0, "thread");
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    anellm_ane_close(device);
    check_nothing_left("threads");
}

/* What does not reach the framework. */
static void test_refused(void) {
    anellm_ane *device = open_device(1); /* this process has compiled more */
    anellm_ane_program *program = NULL;
    const int compiles = fake.count("compile");
    CHECK(compile(device, &program) == ANELLM_COMPILE, "Q15");
    CHECK(strstr(anellm_last_error(), "Q15") != NULL, "text");
    CHECK(fake.count("compile") == compiles, "the service was asked");
    anellm_ane_close(device);
    check_nothing_left("one too many");
    const int before = fake.count("descriptor");
    device = open_device(0);
    CHECK(anellm_ane_compile(device, &program, "program(", 8, NULL, 0) == ANELLM_COMPILE, "no program");
    CHECK(strstr(anellm_last_error(), "1:") != NULL, "text");
    static const char *const paths[] = {"w.bin", "@model_path/", "@model_path//x", "@model_path/weights/../../../x"};
    for (int i = 0; i < 4; i++) {
        const anellm_ane_file file = {paths[i], &blob, sizeof blob};
        CHECK(anellm_ane_compile(device, &program, text, (int64_t)strlen(text), &file, 1) == ANELLM_INVALID, "%s",
              paths[i]);
    }
    CHECK(fake.count("descriptor") == before, "the framework was asked");
    int64_t n = 0;
    anellm_ane_port port;
    OK(compile(device, &program));
    OK(anellm_ane_count_ports(program, 0, 1, &n));
    CHECK(n == 2 && anellm_ane_count_ports(program, 1, 1, &n) == ANELLM_RANGE, "procedures");
    CHECK(anellm_ane_get_port(program, 0, 0, 2, &port) == ANELLM_RANGE, "ports");
    anellm_ane_program_free(program);
    /* The real compiler's refusal. */
    const char *bad = HEADER "    func main<ios18>(tensor<fp16, [1, 2, 1, 32]> a) {\n"
                      "        tensor<fp16, [1, 2, 1, 32]> y = gather_nd(x = a, indices = a)[name = string(\"y\")];\n"
                      "    } -> (y);\n}\n";
    CHECK(anellm_ane_compile(device, &program, bad, (int64_t)strlen(bad), NULL, 0) == ANELLM_COMPILE, "refused");
    expect_error(device, "com.apple.appleneuralengine.compiler", 1, "ANECCompile() FAILED", "refused");
    anellm_ane_close(device);
    check_nothing_left("refusals");
}

static void test_information(void) {
    anellm_ane *device = open_device(0);
    anellm_ane_info info;
    OK(anellm_ane_get_info(device, &info));
    CHECK(strcmp(info.device, "ane") == 0 && strcmp(info.architecture, "h16g") == 0, "%s", info.architecture);
    CHECK(strcmp(info.chip, "Apple M4") == 0 && strcmp(info.system, "macOS 15.1") == 0, "%s, %s", info.chip,
          info.system);
    CHECK(info.n_engines == 1 && info.n_cores == 16, "%d %d", info.n_engines, info.n_cores);
    anellm_ane_close(device);
    check_nothing_left("information");
}

/* Make, evaluate and free a program, which is compiled `compiles` times and found `hits` times. */
static void expect_compiles(int64_t max_compiles, int compiles, int hits, const char *where) {
    struct run run;
    anellm_ane_counters c;
    const int before = fake.count("compile");
    anellm_ane *device = open_device(max_compiles);
    OK(make_run(&run, device));
    evaluate_and_check(&run, 2);
    OK(anellm_ane_unload(run.program));
    OK(anellm_ane_load(run.program));
    const anellm_ane_file file = {"@model_path/weights/w.bin", &blob, sizeof blob};
    OK(anellm_ane_reload(run.program, &file, 1));
    evaluate_and_check(&run, 2);
    OK(anellm_ane_get_counters(device, &c));
    CHECK(fake.count("compile") - before == compiles, "%s: %d compiles", where, fake.count("compile") - before);
    CHECK(c.compiles == compiles && c.cache_hits == hits && c.compile_failures == 0, "%s: %lld, %lld, %lld", where,
          (long long)c.compiles, (long long)c.cache_hits, (long long)c.compile_failures);
    free_run(&run);
    anellm_ane_close(device);
    check_nothing_left(where);
}

/* Without compiledModelExists everything is compiled. */
static void test_no_cache(void) {
    fake.keep(1);
    expect_compiles(0, 1, 0, "the first");
    expect_compiles(0, 1, 0, "another");
    fake.keep(0);
}

static void test_cache(void) {
    struct run run;
    anellm_ane_counters c;
    fake.keep(1);
    expect_compiles(0, 1, 0, "the first");
    expect_compiles(0, 0, 1, "what is known");
    expect_compiles(1, 0, 1, "what is known, when no more may be compiled");
    fake.fail("load", 0, 1, FAKE_ERROR);
    expect_compiles(0, 1, 1, "what is known but does not load");
    fake.fail("load", 0, 1, FAKE_RAISE);
    anellm_ane *device = open_device(0);
    CHECK(make_run(&run, device) == ANELLM_COMPILE, "an exception is no refusal");
    free_run(&run);
    for (int i = 0; i < 2; i++) {
        fake.fail("load", 0, i == 0 ? 2 : 1, FAKE_ERROR);
        fake.fail("compile", 0, i, FAKE_ERROR);
        CHECK(make_run(&run, device) == ANELLM_COMPILE, "it does not load, and then");
        expect_error(device, faults[i == 0 ? 4 : 3].domain, i == 0 ? 6 : 1, faults[i == 0 ? 4 : 3].text, "a bad load");
        free_run(&run);
        OK(anellm_ane_get_counters(device, &c));
        CHECK(c.compiles == i + 1 && c.compile_failures == i && c.cache_hits == i + 2, "%lld, %lld, %lld",
              (long long)c.compiles, (long long)c.compile_failures, (long long)c.cache_hits);
    }
    anellm_ane_close(device);
    check_nothing_left("bad loads");
    fake.keep(1);
    fake.fail("exists", 0, 1, FAKE_ERROR);
    expect_compiles(0, 1, 1, "what is known and gone");
    fake.fail("exists", 0, 1, FAKE_RAISE);
    expect_compiles(0, 1, 0, "what cannot be asked for");
    setenv("ANELLM_ANE_CACHE", "off", 1);
    const int asked = fake.count("exists");
    expect_compiles(0, 1, 0, "what is not to be asked for");
    CHECK(fake.count("exists") == asked, "it was asked for");
    setenv("ANELLM_ANE_CACHE", "yes", 1);
    CHECK(anellm_ane_open(&device, getenv("ANELLM_ANE_DEVICE"), &profile, NULL) == ANELLM_INVALID, "cache");
    CHECK(strstr(anellm_last_error(), "ANELLM_ANE_CACHE: expected on or off, found \"yes\"") != NULL, "text");
    setenv("ANELLM_ANE_CACHE", "on", 1);
    expect_compiles(0, 0, 1, "on");
    unsetenv("ANELLM_ANE_CACHE");
    fake.keep(0);
}

/* An unload that takes the folder with it, also that of a twin. */
static void test_unload_that_cleans(void) {
    struct run run, twin;
    anellm_ane_error e;
    fake.unload_cleans(1);
    expect_compiles(0, 1, 0, "an unload that cleans");
    anellm_ane *device = open_device(0);
    OK(make_run(&run, device));
    OK(make_run(&twin, device));
    free_run(&run);
    CHECK(count_folders() == 0, "%d folders", count_folders());
    evaluate_and_check(&twin, 2);
    OK(make_run(&run, device));
    free_run(&twin);
    evaluate_and_check(&run, 2);
    free_run(&run);
    OK(anellm_ane_get_error(device, &e));
    CHECK(e.detail[0] == '\0', "what is gone is no failure: %s", e.detail);
    anellm_ane_close(device);
    check_nothing_left("unloads that clean");
    fake.unload_cleans(0);
}

/* All calls of a program that is compiled now have this QoS; so do those of the programs that were there before. */
static void run_under(anellm_ane *device, int qos, const struct run *before) {
    struct run run;
    anellm_ane_qos found;
    OK(anellm_ane_get_qos(device, &found));
    CHECK(found.value == qos, "%d, expected %d", found.value, qos);
    fake.expect_qos(qos);
    OK(make_run(&run, device));
    evaluate_and_check(&run, 2);
    free_run(&run);
    fake.expect_qos(-1);
    if (before != NULL) evaluate_and_check(before, 2);
}

static void test_qos_that_is_set(void) {
    struct run run;
    anellm_ane_qos found;
    setenv("ANELLM_ANE_QOS", "9", 1);
    anellm_ane *device = open_device(0);
    const int compiles = fake.count("compile");
    run_under(device, 9, NULL);
    OK(make_run(&run, device));
    OK(anellm_ane_set_qos(device, ANELLM_ANE_QOS_USER_INTERACTIVE));
    run_under(device, 33, &run);
    OK(anellm_ane_get_qos(device, &found));
    CHECK(!found.measured && found.us[0] <= 0.0 && fake.count("compile") == compiles + 3, "nothing is measured");
    CHECK(anellm_ane_set_qos(device, 64) == ANELLM_INVALID && anellm_ane_set_qos(device, -2) == ANELLM_INVALID, "QoS");
    CHECK(anellm_ane_get_qos(device, NULL) == ANELLM_INVALID, "NULL");
    run_under(device, 33, &run);
    free_run(&run);
    anellm_ane_close(device);
    setenv("ANELLM_ANE_QOS", "64", 1);
    CHECK(anellm_ane_open(&device, getenv("ANELLM_ANE_DEVICE"), &profile, NULL) == ANELLM_INVALID, "QoS");
    CHECK(device == NULL, "QoS");
    setenv("ANELLM_ANE_QOS", "21", 1);
    check_nothing_left("QoS");
}

/* Measured once in a process, on first use: a driver of its own for each way that it can end. */
static void *get_in_thread(void *device) {
    anellm_ane_qos qos;
    OK(anellm_ane_get_qos(device, &qos));
    return NULL;
}

static void test_measured_qos(const char *how) {
    anellm_ane_counters c;
    anellm_ane_qos qos;
    int expected = ANELLM_ANE_QOS_DEFAULT, compiles = 5;
    unsetenv("ANELLM_ANE_QOS");
    anellm_ane *device = open_device(0), *other = open_device(0);
    CHECK(fake.count("compile") == 0, "opening measures nothing");
    fake.slow_down(atoi(how), 2000);
    if (atoi(how) != 0) expected = atoi(how);
    if (strcmp(how, "compile") == 0) {
        fake.fail("compile", 0, 1, FAKE_ERROR); /* it gives up: each one more would wait for the service */
        compiles = 1;
    } else if (atoi(how) == 0) {
        fake.fail(how, 0, 99, FAKE_ERROR);
    }
    pthread_t threads[2];
    CHECK(pthread_create(&threads[0], NULL, get_in_thread, device) == 0, "thread");
    CHECK(pthread_create(&threads[1], NULL, get_in_thread, other) == 0, "thread");
    for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
    CHECK(fake.count("compile") == compiles, "%d compiles", fake.count("compile"));
    if (atoi(how) == 0) fake.fail(how, 0, 0, 0);
    OK(anellm_ane_get_qos(device, &qos));
    CHECK(qos.value == expected && qos.measured, "%d", qos.value);
    for (int i = 0; i < ANELLM_ANE_N_QOS; i++) {
        static const int values[] = {9, 17, 21, 25, 33};
        CHECK(qos.values[i] == values[i] && (qos.us[i] > 0.0) == (atoi(how) != 0), "%d: %g", i, qos.us[i]);
        CHECK(atoi(how) == 0 || values[i] == expected || qos.us[i] > 2000.0, "%d: %g", i, qos.us[i]);
    }
    OK(anellm_ane_get_counters(device, &c));
    CHECK(c.compiles == 0 && c.loads == 0 && c.evaluations == 0 && c.compile_failures == 0, "it counts for nobody");
    check_nothing_left("measuring");
    run_under(device, expected, NULL);
    run_under(other, expected, NULL);
    OK(anellm_ane_set_qos(other, 17));
    run_under(other, 17, NULL);
    OK(anellm_ane_set_qos(other, ANELLM_ANE_QOS_AUTO));
    run_under(other, expected, NULL);
    CHECK(fake.count("compile") == compiles + 4, "%d compiles", fake.count("compile"));
    anellm_ane_close(other);
    other = open_device(0);
    struct run run;
    fake.expect_qos(expected);
    OK(make_run(&run, other)); /* whoever asks for nothing gets it too */
    free_run(&run);
    fake.expect_qos(-1);
    anellm_ane_close(other);
    anellm_ane_close(device);
    check_nothing_left("a measured QoS");
}

int main(int argc, char **argv) {
    make_blob(2);
    find_fake();
    if (argc == 2) { /* driver QOS: the one that is fast, or the step that fails; driver no-cache */
        if (strcmp(argv[1], "no-cache") == 0) {
            test_no_cache();
        } else {
            test_measured_qos(argv[1]);
        }
        fake.close();
        puts("ok");
        return 0;
    }
    setenv("ANELLM_ANE_QOS", "21", 1);
    fake.expect_qos(21);
    test_a_program();
    test_any_order();
    test_locks();
    test_faults();
    test_files();
    test_other_processes();
    test_backoff();
    test_threads();
    test_refused();
    test_information();
    test_cache();
    test_unload_that_cleans();
    test_qos_that_is_set();
    fake.close();
    puts("ok");
    return 0;
}
