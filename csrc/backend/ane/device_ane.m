/* The Neural Engine of this machine, through Apple's private framework: a device (device.h) whose calls are those of
 * ANE.md 3.1, in that order, with those arguments. macOS 15 or newer, Apple silicon.
 *
 * The same file is compiled by Apple's clang for macOS and by clang for GNUstep, where a strict model of the framework
 * stands in for Apple's (tests/apple). That decides the language: manual retain and release, @autoreleasepool, object
 * literals, @try; no ARC, subscripts, blocks or objc_msgSend. The framework has no headers: its classes are seen
 * through the protocols below, which makes each send a typed one on every runtime and a misspelt selector a compile
 * error.
 *
 * Every function of the table takes the lock it needs, then does all its sends inside guarded(): one autorelease pool,
 * and no exception ever crosses into C. */
#import <CoreFoundation/CoreFoundation.h>
#import <Foundation/Foundation.h>
#import <IOSurface/IOSurface.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/sysctl.h>
#include <time.h>
#include <unistd.h>

#include "backend/ane/device.h"
#include "backend/ane/signature.h"
#include "core/status.h"

#if __has_feature(objc_arc)
#error "device_ane.m retains and releases by hand: compile it with -fno-objc-arc"
#endif

#define FRAMEWORK "/System/Library/PrivateFrameworks/AppleNeuralEngine.framework/AppleNeuralEngine"

enum {
    OLDEST_MACOS = 15,     /* the first that compiles main<ios18> */
    PAGE_BYTES = 16384,    /* the kernel maps surfaces in these (ANE.md 3.6) */
    BACKOFF_SECONDS = 15   /* the compile service restarts after a failure (Q57) */
};
static const int64_t MAX_SURFACE_BYTES = (int64_t)1 << 40;

/* ---- the framework's classes ------------------------------------------------------------------------------------- */

@protocol AneDescriptorClass
- (id)modelWithMILText:(NSData *)text weights:(NSDictionary *)weights optionsPlist:(NSData *)options;
@end
@protocol AneModelClass
- (id)inMemoryModelWithDescriptor:(id)descriptor;
@end
@protocol AneModel
- (NSString *)hexStringIdentifier;
- (BOOL)compiledModelExists;
- (BOOL)compileWithQoS:(unsigned int)qos options:(NSDictionary *)options error:(NSError **)error;
- (BOOL)loadWithQoS:(unsigned int)qos options:(NSDictionary *)options error:(NSError **)error;
- (BOOL)unloadWithQoS:(unsigned int)qos error:(NSError **)error;
- (BOOL)evaluateWithQoS:(unsigned int)qos options:(NSDictionary *)options request:(id)request error:(NSError **)error;
@end
@protocol AneSurfaceClass
- (id)objectWithIOSurface:(IOSurfaceRef)surface;
@end
@protocol AneRequestClass
- (id)requestWithInputs:(NSArray *)inputs
           inputIndices:(NSArray *)inputIndices
                outputs:(NSArray *)outputs
          outputIndices:(NSArray *)outputIndices
          weightsBuffer:(id)weightsBuffer
              perfStats:(id)perfStats
         procedureIndex:(NSNumber *)procedure;
@end
@protocol AneDeviceInfoClass
- (NSString *)aneArchitectureType;
- (unsigned int)numANEs;
- (unsigned int)numANECores;
@end
@protocol AneRaised /* what an NSException answers */
- (NSString *)name;
- (NSString *)reason;
@end

static struct {
    pthread_mutex_t mutex;
    int ready; /* all of the following are set, for as long as the process lives */
    id<AneDescriptorClass> descriptor;
    id<AneModelClass> model;
    id<AneSurfaceClass> surface;
    id<AneRequestClass> request;
    id<AneDeviceInfoClass> info; /* nil: this framework has none */
    int has_cache;               /* models answer compiledModelExists */
    anellm_ane_info known;       /* of this machine */
} framework = {.mutex = PTHREAD_MUTEX_INITIALIZER};

/* What counts for the process, because the compile service and its limits do (Q15, Q57). */
static struct {
    pthread_mutex_t mutex;
    int64_t compiles;
    int has_failed;
    double failed_at; /* seconds */
} service = {.mutex = PTHREAD_MUTEX_INITIALIZER};

/* What the process measured (choose_qos), once. */
static struct {
    pthread_mutex_t mutex;
    anellm_ane_qos qos;
} measured = {.mutex = PTHREAD_MUTEX_INITIALIZER};

/* ---- objects ----------------------------------------------------------------------------------------------------- */

struct ane_device {
    struct anellm_ane ane;
    _Atomic int64_t references; /* the handle and each object */
    pthread_mutex_t mutex;      /* one command in flight (Q67) */
    int qos;                    /* of programs to come; ANELLM_ANE_QOS_AUTO until it is measured */
    int qos_measured;
    double backoff;             /* seconds */
    int64_t max_compiles;       /* 0: none known */
    int use_cache;              /* of programs that macOS compiled before */
    anellm_ane_counters counters;
    anellm_ane_error error;
};

/* A folder of a program's files. Programs of one text and weights have one name (ANE.md 3.1), so they share it: within
 * the process by a count, with other processes by a shared lock on the folder. */
struct ane_folder {
    NSString *path;
    int64_t users;
    int lock; /* a descriptor; negative: there is none */
    struct ane_folder *next;
};
static struct {
    pthread_mutex_t mutex;
    struct ane_folder *first;
} folders = {.mutex = PTHREAD_MUTEX_INITIALIZER};

struct ane_program {
    struct anellm_ane_program ane;
    struct ane_device *device;
    _Atomic int64_t references; /* the handle and its requests */
    int loaded;
    unsigned int qos; /* of all calls: which of them it matters for is not known */
    int from_cache;   /* it was not compiled here */
    NSData *text;     /* what it is made of, which the framework keeps as well */
    NSDictionary *weights;
    id<AneModel> model;
    struct ane_folder *folder;
    struct anellm_ane_signature *signature;
};

struct ane_surface {
    struct anellm_ane_surface ane;
    struct ane_device *device;
    _Atomic int64_t references; /* the handle and requests */
    pthread_mutex_t mutex;      /* of what follows; the device's is held while it computes */
    int64_t locks, bytes;
    IOSurfaceLockOptions options; /* of the first lock */
    void *base;                   /* NULL unless locked */
    IOSurfaceRef surface;
    id object;                    /* the framework's, around it */
};

struct ane_request {
    struct anellm_ane_request ane;
    struct ane_program *program;
    int64_t n_inputs, n_surfaces; /* inputs come first */
    struct ane_surface **surfaces;
    id request;
};

static const struct anellm_ane_table ane_table;
static void settle_qos(struct ane_device *device);

static struct ane_device *as_device(anellm_ane *device) { return (struct ane_device *)(void *)device; }
static struct ane_program *as_program(anellm_ane_program *program) { return (struct ane_program *)(void *)program; }
static struct ane_surface *as_surface(anellm_ane_surface *surface) { return (struct ane_surface *)(void *)surface; }

/* ---- failures ---------------------------------------------------------------------------------------------------- */

static void copy_text(char *out, size_t size, NSString *text) {
    const char *utf8 = text != nil ? [text UTF8String] : NULL;
    snprintf(out, size, "%s", utf8 != NULL ? utf8 : "");
}

/* Keep a failure in the device's record and this thread's message; returns status. `text` is the system's word. */
static int record(struct ane_device *device, int status, const char *domain, int64_t code, const char *text,
                  const char *detail) {
    anellm_ane_error *e = &device->error;
    snprintf(e->domain, sizeof e->domain, "%s", domain);
    e->code = code;
    snprintf(e->text, sizeof e->text, "%s", text);
    snprintf(e->detail, sizeof e->detail, "%s", detail);
    return anellm_fail(status, "%s (%s code %lld: %s)", e->detail, e->domain, (long long)code, e->text);
}

/* Ours: nothing came from the system. */
static int refuse(struct ane_device *device, int status, const char *detail) {
    return record(device, status, "anellm", 0, "the framework was not called", detail);
}

/* A send answered NO or nil. */
static int failed(struct ane_device *device, int status, const char *step, NSError *error) {
    char domain[sizeof device->error.domain] = "", text[sizeof device->error.text] = "";
    if (error == nil) return record(device, status, "", 0, "no NSError", step);
    copy_text(domain, sizeof domain, [error domain]);
    copy_text(text, sizeof text, [error localizedDescription]);
    return record(device, status, domain, (int64_t)[error code], text, step);
}

static int raised(struct ane_device *device, int status, const char *step, id exception) {
    char name[sizeof device->error.domain] = "exception", reason[sizeof device->error.text] = "", detail[96];
    if ([exception respondsToSelector:@selector(name)] && [exception respondsToSelector:@selector(reason)]) {
        copy_text(name, sizeof name, [(id<AneRaised>)exception name]);
        copy_text(reason, sizeof reason, [(id<AneRaised>)exception reason]);
    }
    snprintf(detail, sizeof detail, "%s raised an exception", step);
    return record(device, status, name, 0, reason, detail);
}

/* Run `body` in a pool of its own; an exception becomes `status`. */
typedef int ane_body(void *call);
static int guarded(struct ane_device *device, int status, const char *step, ane_body *body, void *call) {
    int result;
    @autoreleasepool {
        @try {
            result = body(call);
        } @catch (id exception) {
            result = raised(device, status, step, exception);
        }
    }
    return result;
}

/* ---- lifetimes --------------------------------------------------------------------------------------------------- */

static void release_device(struct ane_device *device) {
    if (atomic_fetch_sub(&device->references, 1) > 1) return;
    pthread_mutex_destroy(&device->mutex);
    free(device);
}

static int unload_body(void *call) {
    struct ane_program *program = call;
    NSError *error = nil;
    if (![program->model unloadWithQoS:program->qos error:&error])
        return failed(program->device, ANELLM_COMPILE, "unloadWithQoS", error);
    program->loaded = 0;
    program->device->counters.loaded--;
    return ANELLM_OK;
}

static int unload_locked(struct ane_program *program) {
    if (!program->loaded) return ANELLM_OK;
    return guarded(program->device, ANELLM_COMPILE, "unloadWithQoS", unload_body, program);
}

/* While it is held, no other process makes or removes a folder; negative where there is nothing to hold. */
static int close_gate(void) {
    const int gate = open([NSTemporaryDirectory() fileSystemRepresentation], O_RDONLY | O_CLOEXEC);
    if (gate >= 0) flock(gate, LOCK_EX);
    return gate;
}

static void open_gate(int gate) {
    if (gate >= 0) close(gate);
}

/* Make the folder, and keep other processes from removing it. Without locks it is as if there were no others. */
static int hold_folder(NSString *path) {
    const int gate = close_gate();
    mkdir([path fileSystemRepresentation], 0700); /* is there, or fails: then the files in it will say so */
    const int lock = open([path fileSystemRepresentation], O_RDONLY | O_CLOEXEC);
    if (lock >= 0) flock(lock, LOCK_SH | LOCK_NB);
    open_gate(gate);
    return lock;
}

/* The last of the processes that use it removes it. */
static int remove_folder(struct ane_device *device, const struct ane_folder *folder) {
    NSError *error = nil;
    int status = ANELLM_OK;
    const int gate = close_gate(), others = folder->lock >= 0 && flock(folder->lock, LOCK_EX | LOCK_NB) != 0;
    /* Disassemblies of the framework show that its own unload may remove it. */
    if (!others && [[NSFileManager defaultManager] fileExistsAtPath:folder->path] &&
        ![[NSFileManager defaultManager] removeItemAtPath:folder->path error:&error])
        status = failed(device, ANELLM_COMPILE, "a program's folder cannot be removed", error);
    if (folder->lock >= 0) close(folder->lock);
    open_gate(gate);
    return status;
}

static int leave_folder(void *call) {
    struct ane_program *program = call;
    struct ane_folder *folder = program->folder;
    int status = ANELLM_OK;
    program->folder = NULL;
    pthread_mutex_lock(&folders.mutex);
    if (--folder->users == 0) {
        struct ane_folder **at = &folders.first;
        while (*at != folder) at = &(*at)->next;
        *at = folder->next;
        status = remove_folder(program->device, folder);
        [folder->path release];
        free(folder);
    }
    pthread_mutex_unlock(&folders.mutex);
    return status;
}

static int release_model(void *call) {
    struct ane_program *program = call;
    id<AneModel> model = program->model;
    program->model = nil;
    [(id)model release];
    [program->text release];
    [program->weights release];
    return ANELLM_OK;
}

/* Unload first, then the object, then its files. The last words on a failure are in the device's record. */
static void destroy_program(struct ane_program *program) {
    struct ane_device *device = program->device;
    pthread_mutex_lock(&device->mutex);
    if (unload_locked(program) != ANELLM_OK && unload_locked(program) != ANELLM_OK) device->counters.loaded--;
    guarded(device, ANELLM_COMPILE, "release of a program", release_model, program);
    if (program->folder != NULL)
        guarded(device, ANELLM_COMPILE, "removal of a program's folder", leave_folder, program);
    pthread_mutex_unlock(&device->mutex);
    anellm_ane_signature_free(program->signature);
    free(program);
    release_device(device);
}

static void release_program(struct ane_program *program) {
    if (atomic_fetch_sub(&program->references, 1) == 1) destroy_program(program);
}

static int release_surface_body(void *call) {
    struct ane_surface *surface = call;
    while (surface->locks > 0) { /* the owner forgot; the system minds */
        IOSurfaceUnlock(surface->surface, surface->options, NULL);
        surface->locks = 0;
    }
    [surface->object release];
    if (surface->surface != NULL) CFRelease(surface->surface);
    return ANELLM_OK;
}

static void release_surface(struct ane_surface *surface) {
    if (atomic_fetch_sub(&surface->references, 1) > 1) return;
    struct ane_device *device = surface->device;
    pthread_mutex_lock(&device->mutex);
    guarded(device, ANELLM_INTERNAL, "release of a surface", release_surface_body, surface);
    pthread_mutex_unlock(&device->mutex);
    pthread_mutex_destroy(&surface->mutex);
    free(surface);
    release_device(device);
}

static void ane_close(anellm_ane *device) { release_device(as_device(device)); }

/* ---- counters, errors, information ------------------------------------------------------------------------------- */

static int ane_counters(anellm_ane *ane, anellm_ane_counters *counters) {
    struct ane_device *device = as_device(ane);
    pthread_mutex_lock(&device->mutex);
    *counters = device->counters;
    pthread_mutex_unlock(&device->mutex);
    return ANELLM_OK;
}

static int ane_error(anellm_ane *ane, anellm_ane_error *error) {
    struct ane_device *device = as_device(ane);
    pthread_mutex_lock(&device->mutex);
    *error = device->error;
    pthread_mutex_unlock(&device->mutex);
    return ANELLM_OK;
}

static int ane_info(anellm_ane *ane, anellm_ane_info *info) {
    (void)ane;
    *info = framework.known;
    return ANELLM_OK;
}

/* ---- compiling --------------------------------------------------------------------------------------------------- */

static double now_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Count a compile, or refuse it: behind the limit of a process the framework fails without saying so (Q15). */
static int begin_compile(struct ane_device *device) {
    double wait = 0.0;
    char detail[128];
    pthread_mutex_lock(&service.mutex);
    const int64_t number = service.compiles + 1;
    const int refused = device->max_compiles > 0 && number > device->max_compiles;
    if (!refused) service.compiles = number;
    if (!refused && service.has_failed) wait = service.failed_at + device->backoff - now_seconds();
    pthread_mutex_unlock(&service.mutex);
    if (refused) {
        snprintf(detail, sizeof detail, "Q15: compile number %lld of this process; the limit is %lld",
                 (long long)number, (long long)device->max_compiles);
        return refuse(device, ANELLM_COMPILE, detail);
    }
    if (wait > 0.0) {
        const struct timespec t = {(time_t)wait, (long)(1e9 * (wait - (double)(time_t)wait))};
        nanosleep(&t, NULL);
    }
    device->counters.compiles++;
    return ANELLM_OK;
}

/* Whether the compile service took it: after a refusal it restarts, and the next compile waits for it (Q57). */
static void end_compile(int ok) {
    pthread_mutex_lock(&service.mutex);
    service.has_failed = !ok;
    service.failed_at = now_seconds();
    pthread_mutex_unlock(&service.mutex);
}

static const char MODEL_PATH[] = "@model_path/";

/* A path below the program's folder: it must not lead out of it. */
static int check_paths(const anellm_ane_file *files, int64_t n_files) {
    for (int64_t i = 0; i < n_files; i++) {
        const char *path = files[i].path;
        const size_t prefix = sizeof MODEL_PATH - 1;
        if (strncmp(path, MODEL_PATH, prefix) != 0 || path[prefix] == '\0' || path[prefix] == '/' ||
            strstr(path, "..") != NULL)
            return anellm_fail(ANELLM_INVALID, "files[%lld]: path \"%.100s\", expected %s... without ..",
                               (long long)i, path, MODEL_PATH);
    }
    return ANELLM_OK;
}

static NSDictionary *weights_of(const anellm_ane_file *files, int64_t n_files) {
    NSMutableDictionary *weights = [NSMutableDictionary dictionary]; /* empty, never nil (Q14) */
    for (int64_t i = 0; i < n_files; i++) {
        NSData *data = [NSData dataWithBytes:files[i].data length:(NSUInteger)files[i].bytes];
        [weights setObject:@{@"offset" : @0, @"data" : data} forKey:[NSString stringWithUTF8String:files[i].path]];
    }
    return weights;
}

/* The identifier names a folder that will be removed with all that is in it. */
static int is_plain_name(const char *name) {
    if (name == NULL || name[0] == '\0' || name[0] == '.') return 0;
    for (const char *c = name; *c != '\0'; c++) {
        const int plain = (*c >= '0' && *c <= '9') || (*c >= 'a' && *c <= 'z') || (*c >= 'A' && *c <= 'Z') ||
                          *c == '_' || *c == '-' || *c == '.';
        if (!plain) return 0;
    }
    return 1;
}

static int enter_folder(struct ane_program *program) {
    NSString *name = [program->model hexStringIdentifier];
    if (!is_plain_name([name UTF8String]))
        return failed(program->device, ANELLM_COMPILE, "hexStringIdentifier gave no name for a folder", nil);
    NSString *path = [NSTemporaryDirectory() stringByAppendingPathComponent:name];
    struct ane_folder *fresh = calloc(1, sizeof *fresh), *folder;
    if (fresh == NULL) return anellm_fail(ANELLM_NOMEM, "no memory for the name of a folder");
    pthread_mutex_lock(&folders.mutex);
    for (folder = folders.first; folder != NULL && ![folder->path isEqual:path]; folder = folder->next) {}
    if (folder == NULL) {
        folder = fresh;
        fresh = NULL;
        folder->path = [path copy];
        folder->lock = hold_folder(path);
        folder->next = folders.first;
        folders.first = folder;
    }
    folder->users++;
    program->folder = folder;
    pthread_mutex_unlock(&folders.mutex);
    free(fresh);
    return ANELLM_OK;
}

static int write_file(struct ane_program *program, NSData *data, NSString *path) {
    NSError *error = nil;
    char detail[256], name[200];
    copy_text(name, sizeof name, path);
    if (![[NSFileManager defaultManager] createDirectoryAtPath:[path stringByDeletingLastPathComponent]
                                   withIntermediateDirectories:YES
                                                    attributes:nil
                                                         error:&error]) {
        snprintf(detail, sizeof detail, "no folder can be made for %s", name);
        return failed(program->device, ANELLM_COMPILE, detail, error);
    }
    if ([data writeToFile:path atomically:YES]) return ANELLM_OK;
    snprintf(detail, sizeof detail, "cannot write %s", name);
    return failed(program->device, ANELLM_COMPILE, detail, nil);
}

static int write_weights(struct ane_program *program, NSDictionary *weights) {
    for (NSString *key in weights) {
        NSString *path =
            [program->folder->path stringByAppendingPathComponent:[key substringFromIndex:sizeof MODEL_PATH - 1]];
        ANELLM_TRY(write_file(program, [[weights objectForKey:key] objectForKey:@"data"], path));
    }
    return ANELLM_OK;
}

struct compile_call {
    struct ane_program *program;
    const char *mil;
    int64_t mil_bytes, n_files;
    const anellm_ane_file *files;
};

/* Whether macOS has it compiled. It keeps what it compiled, beyond the process, by the hash of text, weights and
 * options that hexStringIdentifier is, and loadWithQoS: looks there first (Q62). */
static int is_compiled(const struct ane_program *program) {
    if (!framework.has_cache || !program->device->use_cache) return 0;
    @try {
        return [program->model compiledModelExists] ? 1 : 0;
    } @catch (id exception) {
        (void)exception; /* what cannot be asked for is not there */
        return 0;
    }
}

static int compile_model(struct ane_program *program) {
    struct ane_device *device = program->device;
    NSError *error = nil;
    ANELLM_TRY(begin_compile(device));
    NSString *folder = program->folder->path; /* the service reads from there (Q58) */
    ANELLM_TRY(write_file(program, program->text, [folder stringByAppendingPathComponent:@"model.mil"]));
    ANELLM_TRY(write_weights(program, program->weights));
    const BOOL ok = [program->model compileWithQoS:program->qos options:@{} error:&error];
    end_compile(ok);
    program->from_cache = 0;
    return ok ? ANELLM_OK : failed(device, ANELLM_COMPILE, "compileWithQoS", error);
}

static int compile_body(void *argument) {
    const struct compile_call *call = argument;
    struct ane_program *program = call->program;
    struct ane_device *device = program->device;
    NSData *text = [NSData dataWithBytes:call->mil length:(NSUInteger)call->mil_bytes]; /* never a string (Q13) */
    NSDictionary *weights = weights_of(call->files, call->n_files);
    program->text = [text retain];
    program->weights = [weights retain];
    id descriptor = [framework.descriptor modelWithMILText:text weights:weights optionsPlist:nil];
    if (descriptor == nil) return failed(device, ANELLM_COMPILE, "modelWithMILText answered nil", nil);
    program->model = [[framework.model inMemoryModelWithDescriptor:descriptor] retain];
    if (program->model == nil) return failed(device, ANELLM_COMPILE, "inMemoryModelWithDescriptor answered nil", nil);
    ANELLM_TRY(enter_folder(program));
    program->from_cache = is_compiled(program);
    if (!program->from_cache) return compile_model(program);
    device->counters.cache_hits++;
    return ANELLM_OK;
}

static int compile_locked(struct compile_call *call) {
    struct ane_program *program = call->program;
    struct ane_device *device = program->device;
    char why[sizeof device->error.detail];
    /* What we cannot read is not worth the restart of the service. */
    const int status = anellm_ane_signature_read(&program->signature, why, sizeof why, call->mil, call->mil_bytes);
    if (status == ANELLM_COMPILE) return refuse(device, status, why);
    ANELLM_TRY(status);
    return guarded(device, ANELLM_COMPILE, "compile", compile_body, call);
}

static int ane_compile(anellm_ane *ane, anellm_ane_program **out, const char *mil, int64_t mil_bytes,
                       const anellm_ane_file *files, int64_t n_files) {
    struct ane_device *device = as_device(ane);
    ANELLM_TRY(check_paths(files, n_files));
    settle_qos(device);
    struct ane_program *program = calloc(1, sizeof *program);
    if (program == NULL) return anellm_fail(ANELLM_NOMEM, "no memory for a program");
    struct compile_call call = {program, mil, mil_bytes, n_files, files};
    program->ane.table = &ane_table;
    program->device = device;
    program->references = 1;
    atomic_fetch_add(&device->references, 1);
    pthread_mutex_lock(&device->mutex);
    program->qos = (unsigned int)device->qos;
    const int status = compile_locked(&call);
    if (status == ANELLM_COMPILE) device->counters.compile_failures++;
    pthread_mutex_unlock(&device->mutex);
    if (status != ANELLM_OK) {
        destroy_program(program);
        return status;
    }
    *out = &program->ane;
    return ANELLM_OK;
}

/* ---- loading ----------------------------------------------------------------------------------------------------- */

static int load_model(struct ane_program *program) {
    NSError *error = nil;
    if ([program->model loadWithQoS:program->qos options:@{} error:&error]) return ANELLM_OK;
    return failed(program->device, ANELLM_COMPILE, "loadWithQoS", error);
}

static int load_body(void *call) {
    struct ane_program *program = call;
    int status = load_model(program);
    if (status != ANELLM_OK && program->from_cache) { /* macOS has given it up, or what it has is damaged */
        status = compile_model(program);
        if (status == ANELLM_COMPILE) program->device->counters.compile_failures++;
        if (status == ANELLM_OK) status = load_model(program);
    }
    ANELLM_TRY(status);
    program->loaded = 1;
    program->device->counters.loaded++;
    program->device->counters.loads++;
    return ANELLM_OK;
}

static int load_locked(struct ane_program *program) {
    if (program->loaded) return ANELLM_OK;
    return guarded(program->device, ANELLM_COMPILE, "loadWithQoS", load_body, program);
}

static int ane_load(anellm_ane_program *ane) {
    struct ane_program *program = as_program(ane);
    pthread_mutex_lock(&program->device->mutex);
    const int status = load_locked(program);
    pthread_mutex_unlock(&program->device->mutex);
    return status;
}

static int ane_unload(anellm_ane_program *ane) {
    struct ane_program *program = as_program(ane);
    pthread_mutex_lock(&program->device->mutex);
    const int status = unload_locked(program);
    pthread_mutex_unlock(&program->device->mutex);
    return status;
}

static void ane_program_free(anellm_ane_program *ane) {
    ane_unload(ane); /* now, though requests may keep the object: slots are few (Q56) */
    release_program(as_program(ane));
}

static int write_body(void *argument) {
    const struct compile_call *call = argument;
    return write_weights(call->program, weights_of(call->files, call->n_files));
}

static int ane_reload(anellm_ane_program *ane, const anellm_ane_file *files, int64_t n_files) {
    struct ane_program *program = as_program(ane);
    ANELLM_TRY(check_paths(files, n_files));
    struct compile_call call = {program, NULL, 0, n_files, files};
    pthread_mutex_lock(&program->device->mutex);
    int status = unload_locked(program);
    if (status == ANELLM_OK) status = guarded(program->device, ANELLM_COMPILE, "reload", write_body, &call);
    if (status == ANELLM_OK) status = load_locked(program);
    pthread_mutex_unlock(&program->device->mutex);
    return status;
}

static int ane_count_ports(anellm_ane_program *ane, int procedure, int output, int64_t *n) {
    return anellm_ane_signature_count(as_program(ane)->signature, procedure, output, n);
}

static int ane_get_port(anellm_ane_program *ane, int procedure, int output, int64_t index, anellm_ane_port *port) {
    return anellm_ane_signature_port(as_program(ane)->signature, procedure, output, index, port);
}

/* ---- surfaces ---------------------------------------------------------------------------------------------------- */

static int surface_body(void *call) {
    struct ane_surface *surface = call;
    struct ane_device *device = surface->device;
    NSNumber *bytes = @(surface->bytes);
    NSDictionary *properties = @{
        (id)kIOSurfaceWidth : bytes, /* one row of bytes: programs see packed tensors (ANE.md 3.6) */
        (id)kIOSurfaceHeight : @1,
        (id)kIOSurfaceBytesPerElement : @1,
        (id)kIOSurfaceBytesPerRow : bytes,
        (id)kIOSurfaceAllocSize : bytes,
        (id)kIOSurfacePixelFormat : @0,
    };
    surface->surface = IOSurfaceCreate((CFDictionaryRef)properties);
    if (surface->surface == NULL)
        return anellm_fail(ANELLM_NOMEM, "no IOSurface of %lld bytes", (long long)surface->bytes);
    if ((int64_t)IOSurfaceGetAllocSize(surface->surface) < surface->bytes)
        return anellm_fail(ANELLM_NOMEM, "an IOSurface of %lld bytes has %lld", (long long)surface->bytes,
                           (long long)IOSurfaceGetAllocSize(surface->surface));
    surface->object = [[framework.surface objectWithIOSurface:surface->surface] retain];
    if (surface->object == nil) return failed(device, ANELLM_EVAL, "objectWithIOSurface answered nil", nil);
    return ANELLM_OK;
}

static int ane_surface_unlock(anellm_ane_surface *ane) {
    struct ane_surface *surface = as_surface(ane);
    int status = ANELLM_OK;
    pthread_mutex_lock(&surface->mutex);
    if (surface->locks == 0) {
        status = anellm_fail(ANELLM_INVALID, "the surface is not locked");
    } else if (surface->locks > 1) {
        surface->locks--;
    } else {
        const int code = (int)IOSurfaceUnlock(surface->surface, surface->options, NULL);
        if (code != 0)
            status = anellm_fail(ANELLM_INTERNAL, "IOSurfaceUnlock failed with code 0x%x", (unsigned int)code);
        surface->locks = 0;
        surface->base = NULL;
    }
    pthread_mutex_unlock(&surface->mutex);
    return status;
}

/* The system's lock is taken by the first of ours and given back by the last. */
static int ane_surface_lock(anellm_ane_surface *ane, int read_only) {
    struct ane_surface *surface = as_surface(ane);
    const IOSurfaceLockOptions options = read_only ? kIOSurfaceLockReadOnly : (IOSurfaceLockOptions)0;
    int status = ANELLM_OK;
    pthread_mutex_lock(&surface->mutex);
    if (surface->locks == 0) {
        const int code = (int)IOSurfaceLock(surface->surface, options, NULL);
        if (code == 0) {
            surface->base = IOSurfaceGetBaseAddress(surface->surface);
            surface->options = options;
            surface->locks = 1;
        } else {
            status = anellm_fail(ANELLM_INTERNAL, "IOSurfaceLock failed with code 0x%x", (unsigned int)code);
        }
    } else if (!read_only && surface->options == kIOSurfaceLockReadOnly) {
        status = anellm_fail(ANELLM_BUSY, "the surface is locked for reading");
    } else {
        surface->locks++;
    }
    pthread_mutex_unlock(&surface->mutex);
    return status;
}

/* Callers count on zeros; the system promises none. */
static int clear_surface(struct ane_surface *surface) {
    ANELLM_TRY(ane_surface_lock(&surface->ane, 0));
    if (surface->base != NULL) memset(surface->base, 0, (size_t)surface->bytes);
    const int has_memory = surface->base != NULL;
    ANELLM_TRY(ane_surface_unlock(&surface->ane));
    return has_memory ? ANELLM_OK : anellm_fail(ANELLM_NOMEM, "an IOSurface has no memory");
}

static int ane_surface_create(anellm_ane *ane, anellm_ane_surface **out, int64_t bytes) {
    struct ane_device *device = as_device(ane);
    struct ane_surface *surface = bytes <= MAX_SURFACE_BYTES ? calloc(1, sizeof *surface) : NULL;
    if (surface == NULL || pthread_mutex_init(&surface->mutex, NULL) != 0) {
        free(surface);
        return anellm_fail(ANELLM_NOMEM, "no memory for a surface of %lld bytes", (long long)bytes);
    }
    surface->ane.table = &ane_table;
    surface->device = device;
    surface->references = 1;
    surface->bytes = (bytes + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
    atomic_fetch_add(&device->references, 1);
    pthread_mutex_lock(&device->mutex);
    int status = guarded(device, ANELLM_EVAL, "objectWithIOSurface", surface_body, surface);
    pthread_mutex_unlock(&device->mutex);
    if (status == ANELLM_OK) status = clear_surface(surface);
    if (status != ANELLM_OK) {
        release_surface(surface);
        return status;
    }
    *out = &surface->ane;
    return ANELLM_OK;
}

static void *ane_surface_base(anellm_ane_surface *ane) {
    struct ane_surface *surface = as_surface(ane);
    pthread_mutex_lock(&surface->mutex);
    void *base = surface->base;
    pthread_mutex_unlock(&surface->mutex);
    return base;
}

static int64_t ane_surface_bytes(const anellm_ane_surface *ane) {
    return ((const struct ane_surface *)(const void *)ane)->bytes;
}

static void ane_surface_free(anellm_ane_surface *ane) { release_surface(as_surface(ane)); }

/* ---- requests ---------------------------------------------------------------------------------------------------- */

struct request_call {
    struct ane_request *request;
    int procedure;
    const int32_t *input_indices, *output_indices;
};

static int request_body(void *argument) {
    const struct request_call *call = argument;
    struct ane_request *request = call->request;
    NSMutableArray *objects[2], *indices[2];
    for (int side = 0; side < 2; side++) {
        objects[side] = [NSMutableArray array];
        indices[side] = [NSMutableArray array];
    }
    for (int64_t i = 0; i < request->n_surfaces; i++) {
        const int side = i >= request->n_inputs;
        const int32_t index = side ? call->output_indices[i - request->n_inputs] : call->input_indices[i];
        [objects[side] addObject:request->surfaces[i]->object];
        [indices[side] addObject:@(index)];
    }
    request->request = [[framework.request requestWithInputs:objects[0]
                                                inputIndices:indices[0]
                                                     outputs:objects[1]
                                               outputIndices:indices[1]
                                               weightsBuffer:nil
                                                   perfStats:nil
                                              procedureIndex:@(call->procedure)] retain];
    if (request->request != nil) return ANELLM_OK;
    return failed(request->program->device, ANELLM_EVAL, "requestWithInputs answered nil", nil);
}

static int release_request_body(void *call) {
    struct ane_request *request = call;
    [request->request release];
    return ANELLM_OK;
}

static void ane_request_free(anellm_ane_request *ane) {
    struct ane_request *request = (struct ane_request *)(void *)ane;
    struct ane_device *device = request->program->device;
    pthread_mutex_lock(&device->mutex);
    guarded(device, ANELLM_INTERNAL, "release of a request", release_request_body, request);
    pthread_mutex_unlock(&device->mutex);
    for (int64_t i = 0; i < request->n_surfaces; i++) release_surface(request->surfaces[i]);
    release_program(request->program);
    free(request->surfaces);
    free(request);
}

static int ane_request_create(anellm_ane_program *ane, anellm_ane_request **out, int procedure,
                              anellm_ane_surface *const *inputs, const int32_t *input_indices, int64_t n_inputs,
                              anellm_ane_surface *const *outputs, const int32_t *output_indices, int64_t n_outputs) {
    struct ane_program *program = as_program(ane);
    const int64_t n = n_inputs + n_outputs;
    for (int64_t i = 0; i < n; i++) {
        const anellm_ane_surface *surface = i < n_inputs ? inputs[i] : outputs[i - n_inputs];
        if (surface->table != &ane_table) return anellm_fail(ANELLM_INVALID, "a surface of another device");
    }
    struct ane_request *request = calloc(1, sizeof *request);
    struct ane_surface **surfaces = calloc((size_t)n + 1, sizeof *surfaces);
    if (request == NULL || surfaces == NULL) {
        free(request);
        free(surfaces);
        return anellm_fail(ANELLM_NOMEM, "no memory for a request");
    }
    *request = (struct ane_request){{&ane_table}, program, n_inputs, n, surfaces, nil};
    for (int64_t i = 0; i < n; i++) {
        surfaces[i] = as_surface(i < n_inputs ? inputs[i] : outputs[i - n_inputs]);
        atomic_fetch_add(&surfaces[i]->references, 1);
    }
    atomic_fetch_add(&program->references, 1);
    struct request_call call = {request, procedure, input_indices, output_indices};
    pthread_mutex_lock(&program->device->mutex);
    const int status = guarded(program->device, ANELLM_EVAL, "requestWithInputs", request_body, &call);
    pthread_mutex_unlock(&program->device->mutex);
    if (status != ANELLM_OK) {
        ane_request_free(&request->ane);
        return status;
    }
    *out = &request->ane;
    return ANELLM_OK;
}

static int evaluate_body(void *call) {
    const struct ane_request *request = call;
    const struct ane_program *program = request->program;
    NSError *error = nil;
    if ([program->model evaluateWithQoS:program->qos options:@{} request:request->request error:&error])
        return ANELLM_OK;
    return failed(program->device, ANELLM_EVAL, "evaluateWithQoS", error);
}

static int is_locked(struct ane_surface *surface) {
    pthread_mutex_lock(&surface->mutex);
    const int locked = surface->locks > 0;
    pthread_mutex_unlock(&surface->mutex);
    return locked;
}

static int evaluate_locked(struct ane_program *program, struct ane_request *request) {
    struct ane_device *device = program->device;
    if (request->program != program)
        return refuse(device, ANELLM_EVAL, "Q59: the request was made for another program");
    if (!program->loaded) return refuse(device, ANELLM_EVAL, "Q59: the program is not loaded");
    for (int64_t i = 0; i < request->n_surfaces; i++) {
        if (is_locked(request->surfaces[i])) return refuse(device, ANELLM_EVAL, "a surface of the request is locked");
    }
    return guarded(device, ANELLM_EVAL, "evaluateWithQoS", evaluate_body, request);
}

static int ane_evaluate(anellm_ane_program *ane, anellm_ane_request *request) {
    struct ane_program *program = as_program(ane);
    struct ane_device *device = program->device;
    if (request->table != &ane_table) return anellm_fail(ANELLM_INVALID, "a request of another device");
    pthread_mutex_lock(&device->mutex); /* one command in flight (Q67) */
    device->counters.evaluations++;
    const int status = evaluate_locked(program, (struct ane_request *)(void *)request);
    if (status != ANELLM_OK) device->counters.evaluation_failures++;
    pthread_mutex_unlock(&device->mutex);
    return status;
}

/* ---- quality of service ------------------------------------------------------------------------------------------ */

/* A product of the input with itself; surfaces of the least size (Q09). */
static const char probe_text[] =
    "program(1.3)\n"
    "[buildInfo = dict<string, string>({{\"coremlc-component-MIL\", \"3510.2.1\"}, "
    "{\"coremlc-version\", \"3505.4.1\"}, {\"coremltools-component-milinternal\", \"\"}, "
    "{\"coremltools-version\", \"9.0\"}})]\n"
    "{\n"
    "    func main<ios18>(tensor<fp16, [1, 64, 1, 64]> a_input0) {\n"
    "        tensor<fp16, [1, 64, 1, 64]> z_output0 = mul(x = a_input0, y = a_input0)[name = string(\"z_output0\")];\n"
    "    } -> (z_output0);\n"
    "}\n";
enum { PROBE_BYTES = 49152, PROBE_WARM_UP = 5, PROBE_TIMED = 31 };
static const double PROBE_MARGIN = 0.9;

static struct ane_device *new_device(int qos, double backoff, int64_t max_compiles, int use_cache) {
    struct ane_device *device = calloc(1, sizeof *device);
    if (device == NULL || pthread_mutex_init(&device->mutex, NULL) != 0) {
        free(device);
        return NULL;
    }
    device->ane.table = &ane_table;
    device->references = 1;
    device->qos = qos;
    device->backoff = backoff;
    device->max_compiles = max_compiles;
    device->use_cache = use_cache;
    return device;
}

static int compare_times(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The first calls are slow (Q61). */
static int time_evaluations(anellm_ane_program *program, anellm_ane_request *request, double *us) {
    double times[PROBE_TIMED];
    for (int i = 0; i < PROBE_WARM_UP; i++) ANELLM_TRY(ane_evaluate(program, request));
    for (int i = 0; i < PROBE_TIMED; i++) {
        const double start = now_seconds();
        ANELLM_TRY(ane_evaluate(program, request));
        times[i] = 1e6 * (now_seconds() - start);
    }
    qsort(times, PROBE_TIMED, sizeof *times, compare_times);
    *us = times[PROBE_TIMED / 2];
    return ANELLM_OK;
}

/* Time one class on a device of its own, whose counters and errors are nobody's. Whether it is worth going on: a
 * compile that is refused is not tried again, because the service restarts (Q57). */
static int probe_qos(const struct ane_device *model, int qos, double *us) {
    const int32_t index = 0;
    anellm_ane_program *program = NULL;
    anellm_ane_surface *surfaces[2] = {NULL, NULL};
    anellm_ane_request *request = NULL;
    struct ane_device *device = new_device(qos, model->backoff, model->max_compiles, model->use_cache);
    if (device == NULL) return 0;
    const int compiled = ane_compile(&device->ane, &program, probe_text, (int64_t)sizeof probe_text - 1, NULL, 0);
    int status = compiled;
    if (status == ANELLM_OK) status = ane_load(program);
    for (int i = 0; i < 2 && status == ANELLM_OK; i++)
        status = ane_surface_create(&device->ane, &surfaces[i], PROBE_BYTES);
    if (surfaces[0] != NULL && surfaces[1] != NULL)
        ane_request_create(program, &request, 0, surfaces, &index, 1, surfaces + 1, &index, 1);
    if (request != NULL) time_evaluations(program, request, us);
    if (request != NULL) ane_request_free(request);
    for (int i = 0; i < 2; i++) {
        if (surfaces[i] != NULL) ane_surface_free(surfaces[i]);
    }
    if (program != NULL) ane_program_free(program);
    release_device(device);
    return compiled == ANELLM_OK;
}

/* The default, which every published use passes, unless another is faster by a tenth at least, so that noise decides
 * nothing: one M3 Pro took 42 % less under 9, M4 and M5 do not mind (ANE.md 3.2). Of several the fastest. */
static int32_t choose_qos(const anellm_ane_qos *qos) {
    double limit = 0.0;
    int32_t best = ANELLM_ANE_QOS_DEFAULT;
    for (int i = 0; i < ANELLM_ANE_N_QOS; i++) {
        if (qos->values[i] == ANELLM_ANE_QOS_DEFAULT) limit = PROBE_MARGIN * qos->us[i];
    }
    for (int i = 0; i < ANELLM_ANE_N_QOS; i++) {
        if (qos->us[i] <= 0.0 || qos->us[i] >= limit) continue;
        limit = qos->us[i];
        best = qos->values[i];
    }
    return best;
}

static void measure_qos(const struct ane_device *device, anellm_ane_qos *qos) {
    static const int32_t values[ANELLM_ANE_N_QOS] = {ANELLM_ANE_QOS_BACKGROUND, ANELLM_ANE_QOS_UTILITY,
                                                     ANELLM_ANE_QOS_DEFAULT, ANELLM_ANE_QOS_USER_INITIATED,
                                                     ANELLM_ANE_QOS_USER_INTERACTIVE};
    memcpy(qos->values, values, sizeof values);
    for (int i = 0; i < ANELLM_ANE_N_QOS; i++) {
        if (!probe_qos(device, values[i], &qos->us[i])) break;
    }
    qos->value = choose_qos(qos);
    qos->measured = 1;
}

/* Measure what is to be measured, on first use. */
static void settle_qos(struct ane_device *device) {
    pthread_mutex_lock(&device->mutex);
    const int settled = device->qos != ANELLM_ANE_QOS_AUTO;
    pthread_mutex_unlock(&device->mutex);
    if (settled) return;
    pthread_mutex_lock(&measured.mutex);
    if (!measured.qos.measured) measure_qos(device, &measured.qos);
    pthread_mutex_unlock(&measured.mutex);
    pthread_mutex_lock(&device->mutex);
    if (device->qos == ANELLM_ANE_QOS_AUTO) {
        device->qos = measured.qos.value;
        device->qos_measured = 1;
    }
    pthread_mutex_unlock(&device->mutex);
}

static int ane_set_qos(anellm_ane *ane, int qos) {
    struct ane_device *device = as_device(ane);
    pthread_mutex_lock(&device->mutex);
    device->qos = qos;
    device->qos_measured = 0;
    pthread_mutex_unlock(&device->mutex);
    return ANELLM_OK;
}

static int ane_get_qos(anellm_ane *ane, anellm_ane_qos *qos) {
    struct ane_device *device = as_device(ane);
    settle_qos(device);
    pthread_mutex_lock(&device->mutex);
    if (device->qos_measured) *qos = measured.qos; /* does not change any more */
    qos->value = device->qos;
    pthread_mutex_unlock(&device->mutex);
    return ANELLM_OK;
}

static const struct anellm_ane_table ane_table = {
    .name = "ane",
    .close = ane_close,
    .counters = ane_counters,
    .error = ane_error,
    .compile = ane_compile,
    .program_free = ane_program_free,
    .load = ane_load,
    .unload = ane_unload,
    .reload = ane_reload,
    .count_ports = ane_count_ports,
    .get_port = ane_get_port,
    .surface_create = ane_surface_create,
    .surface_lock = ane_surface_lock,
    .surface_unlock = ane_surface_unlock,
    .surface_base = ane_surface_base,
    .surface_bytes = ane_surface_bytes,
    .surface_free = ane_surface_free,
    .request_create = ane_request_create,
    .evaluate = ane_evaluate,
    .request_free = ane_request_free,
    .info = ane_info,
    .set_qos = ane_set_qos,
    .get_qos = ane_get_qos,
};

/* ---- opening ----------------------------------------------------------------------------------------------------- */

static void read_sysctl(char *out, size_t size, const char *name) {
    size_t n = size - 1;
    memset(out, 0, size);
    if (sysctlbyname(name, out, &n, NULL, 0) != 0) out[0] = '\0';
}

/* "on macOS 15.1, Apple M4", whatever is known. */
static int unavailable(const char *what) {
    const anellm_ane_info *known = &framework.known;
    return anellm_fail(ANELLM_UNAVAILABLE, "the Apple Neural Engine: %s, on %s, %s", what, known->system,
                       known->chip[0] != '\0' ? known->chip : "an unknown chip");
}

static int check_system(void) {
    char version[24];
    anellm_ane_info *known = &framework.known;
    memset(known, 0, sizeof *known);
    snprintf(known->device, sizeof known->device, "%s", "ane");
    read_sysctl(known->chip, sizeof known->chip, "machdep.cpu.brand_string");
    read_sysctl(version, sizeof version, "kern.osproductversion");
    snprintf(known->system, sizeof known->system, "macOS %s", version[0] != '\0' ? version : "of unknown version");
    char what[80];
    snprintf(what, sizeof what, "its programs need macOS %d or newer", OLDEST_MACOS);
    return strtol(version, NULL, 10) >= OLDEST_MACOS ? ANELLM_OK : unavailable(what);
}

/* A class with what we send to it and to its instances; each selector list ends with NULL. */
static id find_class(NSString *name, SEL of_class, const SEL *of_instances) {
    Class found = NSClassFromString(name);
    char what[128], text[64];
    copy_text(text, sizeof text, name);
    if (found == Nil) {
        snprintf(what, sizeof what, "the framework has no class %s", text);
        unavailable(what);
        return nil;
    }
    int complete = [(id)found respondsToSelector:of_class];
    for (const SEL *s = of_instances; s != NULL && *s != NULL; s++) complete &= [found instancesRespondToSelector:*s];
    if (complete) return (id)found;
    snprintf(what, sizeof what, "the framework's class %s lacks a method that it had", text);
    unavailable(what);
    return nil;
}

static int find_classes(void *unused) {
    (void)unused;
    const SEL of_model[] = {@selector(hexStringIdentifier), @selector(compileWithQoS:options:error:),
                            @selector(loadWithQoS:options:error:), @selector(unloadWithQoS:error:),
                            @selector(evaluateWithQoS:options:request:error:), NULL};
    framework.descriptor =
        find_class(@"_ANEInMemoryModelDescriptor", @selector(modelWithMILText:weights:optionsPlist:), NULL);
    if (framework.descriptor == nil) return ANELLM_UNAVAILABLE;
    framework.model = find_class(@"_ANEInMemoryModel", @selector(inMemoryModelWithDescriptor:), of_model);
    if (framework.model == nil) return ANELLM_UNAVAILABLE;
    framework.surface = find_class(@"_ANEIOSurfaceObject", @selector(objectWithIOSurface:), NULL);
    if (framework.surface == nil) return ANELLM_UNAVAILABLE;
    framework.has_cache =
        [(Class)(id)framework.model instancesRespondToSelector:@selector(compiledModelExists)] ? 1 : 0;
    framework.request = find_class(@"_ANERequest",
                                   @selector(requestWithInputs:inputIndices:outputs:outputIndices:weightsBuffer:
                                                     perfStats:procedureIndex:),
                                   NULL);
    return framework.request != nil ? ANELLM_OK : ANELLM_UNAVAILABLE;
}

static int32_t small_count(unsigned int n) { return n <= 4096 ? (int32_t)n : 0; }

/* What the framework tells about the machine, where it tells. A virtual machine has Apple silicon and no engine. */
static int read_device_info(void *unused) {
    (void)unused;
    anellm_ane_info *known = &framework.known;
    id info = (id)NSClassFromString(@"_ANEDeviceInfo");
    if (info == nil) return ANELLM_OK;
    framework.info = info;
    if ([info respondsToSelector:@selector(aneArchitectureType)])
        copy_text(known->architecture, sizeof known->architecture, [framework.info aneArchitectureType]);
    if ([info respondsToSelector:@selector(numANECores)]) known->n_cores = small_count([framework.info numANECores]);
    if ([info respondsToSelector:@selector(numANEs)]) {
        const unsigned int n = [framework.info numANEs];
        if (n == 0) return unavailable("this machine has none");
        known->n_engines = small_count(n);
    }
    return ANELLM_OK;
}

/* dlopen once; what fails may be tried again. */
static int resolve_framework(struct ane_device *device) {
    const char *path = getenv("ANELLM_ANE_FRAMEWORK");
    ANELLM_TRY(check_system());
    if (path == NULL || path[0] == '\0') path = FRAMEWORK;
    if (dlopen(path, RTLD_NOW | RTLD_GLOBAL) == NULL) {
        char what[256];
        snprintf(what, sizeof what, "%.200s", dlerror());
        return unavailable(what);
    }
    ANELLM_TRY(guarded(device, ANELLM_UNAVAILABLE, "looking for classes", find_classes, NULL));
    ANELLM_TRY(guarded(device, ANELLM_UNAVAILABLE, "_ANEDeviceInfo", read_device_info, NULL));
    framework.ready = 1;
    return ANELLM_OK;
}

/* A number from the environment, or `missing`. */
static int read_number(double *out, const char *name, double missing, double low, double high) {
    const char *text = getenv(name);
    char *end = NULL;
    *out = missing;
    if (text == NULL || text[0] == '\0') return ANELLM_OK;
    *out = strtod(text, &end);
    if (*end == '\0' && *out >= low && *out <= high) return ANELLM_OK;
    return anellm_fail(ANELLM_INVALID, "environment variable %s: expected a number from %g to %g, found \"%.40s\"",
                       name, low, high, text);
}

/* "on" or "off" from the environment, or `missing`. */
static int read_switch(int *out, const char *name, int missing) {
    const char *text = getenv(name);
    *out = missing;
    if (text == NULL || text[0] == '\0') return ANELLM_OK;
    *out = strcmp(text, "on") == 0;
    if (*out || strcmp(text, "off") == 0) return ANELLM_OK;
    return anellm_fail(ANELLM_INVALID, "environment variable %s: expected on or off, found \"%.40s\"", name, text);
}

int anellm_ane_apple_open(anellm_ane **out, const anellm_ane_profile *profile) {
    double qos, backoff;
    int use_cache;
    *out = NULL;
    ANELLM_TRY(read_number(&qos, "ANELLM_ANE_QOS", ANELLM_ANE_QOS_AUTO, 0, 63));
    ANELLM_TRY(read_number(&backoff, "ANELLM_ANE_BACKOFF", BACKOFF_SECONDS, 0, 600));
    ANELLM_TRY(read_switch(&use_cache, "ANELLM_ANE_CACHE", 1));
    struct ane_device *device = new_device((int)qos, backoff, profile->max_compiles, use_cache);
    if (device == NULL) return anellm_fail(ANELLM_NOMEM, "no memory for a device");
    pthread_mutex_lock(&framework.mutex);
    const int status = framework.ready ? ANELLM_OK : resolve_framework(device);
    pthread_mutex_unlock(&framework.mutex);
    if (status != ANELLM_OK) {
        release_device(device);
        return status;
    }
    *out = &device->ane;
    return ANELLM_OK;
}
