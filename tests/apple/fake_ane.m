#import <Foundation/Foundation.h>
#import <IOSurface/IOSurface.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "fake_ane.h"

#ifndef FAKE_REQUEST /* tests build frameworks that lack a class, a method, an engine */
#define FAKE_REQUEST _ANERequest
#endif
#ifndef FAKE_KEYWORD
#define FAKE_KEYWORD procedureIndex
#endif
#ifndef FAKE_EXISTS
#define FAKE_EXISTS compiledModelExists
#endif
#ifndef FAKE_ENGINES
#define FAKE_ENGINES 1
#endif

#define DOMAIN @"com.apple.appleneuralengine"
#define COMPILER_DOMAIN @"com.apple.appleneuralengine.compiler"

#define REQUIRE(condition, ...)                                                                                        \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "fake framework: contract violated: " __VA_ARGS__);                                        \
            fputc('\n', stderr);                                                                                       \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

/* ---- state and faults -------------------------------------------------------------------------------------------- */

static anellm_ane *simulator;
static _Atomic int live;
static int expected_qos = -1; /* any, but the same for all calls of a model */
static int fast_qos, slow_us;
static double compiled_at, last_gap;

static const char *const steps[] = {"descriptor", "model",   "hex",     "compile",  "load",
                                    "unload",     "surface", "request", "evaluate", "exists"};
enum { DESCRIPTOR, MODEL, HEX, COMPILE, LOAD, UNLOAD, SURFACE, REQUEST, EVALUATE, EXISTS, N_STEPS };
static struct {
    int count, after, times, how;
} faults[N_STEPS];

static int step_named(const char *name) {
    for (int i = 0; i < N_STEPS; i++) {
        if (strcmp(steps[i], name) == 0) return i;
    }
    REQUIRE(0, "no step \"%s\"", name);
    return -1;
}

void fake_ane_fail(const char *step, int after, int times, int how) {
    const int i = step_named(step);
    faults[i].after = after;
    faults[i].times = times;
    faults[i].how = how;
}

int fake_ane_count(const char *step) { return faults[step_named(step)].count; }

int fake_ane_live(void) { return live + shim_surfaces(); }

void fake_ane_expect_qos(int qos) { expected_qos = qos; }

/* Names of compiled models, by which macOS keeps them. */
static NSMutableSet *kept;
static int keeps, unload_cleans;

void fake_ane_keep(int on) {
    keeps = on;
    [kept release];
    kept = on ? [NSMutableSet new] : nil;
}

void fake_ane_unload_cleans(int on) { unload_cleans = on; }

void fake_ane_slow_down(int qos, int us) {
    fast_qos = qos;
    slow_us = us;
}

double fake_ane_last_gap(void) { return last_gap; }

static BOOL answer(NSError **error, NSString *domain, NSInteger code, NSString *text) {
    *error = [NSError errorWithDomain:domain code:code userInfo:@{NSLocalizedDescriptionKey : text}];
    return NO;
}

/* Whether the step fails now. The error is that of ANE.md 3.4; error == NULL where the API has none: it answers nil. */
static int fails(int step, NSError **error) {
    static const struct {
        NSInteger code;
        const char *text;
    } errors[N_STEPS] = {
        [COMPILE] = {1, "_ANECompiler : ANECCompile() FAILED: err=(CompilationFailure)"},
        [LOAD] = {6, "Program load failure (0x20004)"},
        [UNLOAD] = {7, "Program unload failure (0x5)"},
        [EVALUATE] = {8, "ANEProgramProcessRequestDirect() Failed with status=0x1d : statusType=0x9: Program Inference "
                         "error"},
    };
    faults[step].count++;
    if (faults[step].after > 0) {
        faults[step].after--;
        return 0;
    }
    if (faults[step].times == 0) return 0;
    faults[step].times--;
    if (faults[step].how == FAKE_RAISE) {
        [NSException raise:@"NSInternalInconsistencyException" format:@"%s cannot be reached", steps[step]];
    }
    if (error != NULL && faults[step].how == FAKE_ERROR)
        answer(error, step == COMPILE ? COMPILER_DOMAIN : DOMAIN, errors[step].code,
               [NSString stringWithUTF8String:errors[step].text]);
    return 1;
}

/* The simulator's failure as an NSError. */
static BOOL answer_simulator(NSError **error, int status) {
    anellm_ane_error e;
    REQUIRE(status == ANELLM_COMPILE || status == ANELLM_EVAL, "the simulator answered status %d", status);
    simulator->table->error(simulator, &e);
    return answer(error, [NSString stringWithUTF8String:e.domain], (NSInteger)e.code,
                  [NSString stringWithUTF8String:e.text]);
}

int fake_ane_use(const struct anellm_ane_host *host, const anellm_ane_profile *profile) {
    const anellm_sim_options options = {.numerics = ANELLM_SIM_FAST}; /* as anellm.device.AneOptions */
    fake_ane_close();
    return host->open(&simulator, "sim", profile, &options);
}

void fake_ane_close(void) {
    if (simulator != NULL) simulator->table->close(simulator);
    simulator = NULL;
}

static void check_common(unsigned int qos, NSError **error) {
    REQUIRE(expected_qos < 0 || qos == (unsigned int)expected_qos, "QoS is %u, expected %d", qos, expected_qos);
    REQUIRE(qos <= 63, "QoS is %u", qos);
    REQUIRE(error != NULL && *error == nil, "an NSError is asked for, and starts as nil");
}

static void check_options(NSDictionary *options) {
    REQUIRE([options isKindOfClass:[NSDictionary class]] && [options count] == 0, "options are an empty dictionary");
}

/* ---- the descriptor ---------------------------------------------------------------------------------------------- */

@interface _ANEInMemoryModelDescriptor : NSObject {
  @public
    NSData *text;
    NSDictionary *weights;
}
@end

@implementation _ANEInMemoryModelDescriptor
+ (id)modelWithMILText:(NSData *)text weights:(NSDictionary *)weights optionsPlist:(NSData *)options {
    REQUIRE([text isKindOfClass:[NSData class]], "the text is NSData (Q13)");
    REQUIRE([weights isKindOfClass:[NSDictionary class]], "weights are a dictionary, if an empty one (Q14)");
    REQUIRE(options == nil, "no options");
    for (NSString *key in weights) {
        NSDictionary *entry = [weights objectForKey:key];
        REQUIRE([key isKindOfClass:[NSString class]] && [key hasPrefix:@"@model_path/weights/"], "a weight file's key");
        REQUIRE([entry isKindOfClass:[NSDictionary class]] && [entry count] == 2, "a weight file's entry");
        REQUIRE([[entry objectForKey:@"offset"] isKindOfClass:[NSNumber class]] &&
                    [[entry objectForKey:@"offset"] intValue] == 0,
                "a weight file's offset");
        REQUIRE([[entry objectForKey:@"data"] isKindOfClass:[NSData class]], "a weight file's data");
    }
    if (fails(DESCRIPTOR, NULL)) return nil;
    _ANEInMemoryModelDescriptor *made = [[self new] autorelease];
    live++;
    made->text = [text copy];
    made->weights = [weights copy];
    return made;
}
- (void)dealloc {
    [text release];
    [weights release];
    live--;
    [super dealloc];
}
@end

/* ---- surfaces and requests --------------------------------------------------------------------------------------- */

@interface _ANEIOSurfaceObject : NSObject {
  @public
    IOSurfaceRef surface;
}
@end

@implementation _ANEIOSurfaceObject
+ (id)objectWithIOSurface:(IOSurfaceRef)surface {
    REQUIRE(surface != NULL, "objectWithIOSurface:NULL");
    if (fails(SURFACE, NULL)) return nil;
    _ANEIOSurfaceObject *made = [[self new] autorelease];
    live++;
    made->surface = (IOSurfaceRef)CFRetain(surface);
    return made;
}
- (void)dealloc {
    CFRelease(surface);
    live--;
    [super dealloc];
}
@end

@interface FAKE_REQUEST : NSObject {
  @public
    NSArray *surfaces[2], *indices[2]; /* inputs, outputs */
    int procedure;
    anellm_ane_program *bound_to; /* the simulator's objects of the last program it was evaluated with */
    anellm_ane_request *bound;
    anellm_ane_surface **copies;
}
@end

static void check_side(NSArray *surfaces, NSArray *indices) {
    long last = -1;
    REQUIRE([surfaces isKindOfClass:[NSArray class]] && [indices isKindOfClass:[NSArray class]], "arrays");
    REQUIRE([surfaces count] > 0 && [surfaces count] == [indices count], "there are as many indices as surfaces");
    for (id surface in surfaces) REQUIRE([surface isKindOfClass:[_ANEIOSurfaceObject class]], "a request's surface");
    for (id index in indices) {
        REQUIRE([index isKindOfClass:[NSNumber class]], "a request's index");
        REQUIRE([index longValue] == last + 1, "indices count up from 0, in the alphabetical order of the ports");
        last = [index longValue];
    }
}

@implementation FAKE_REQUEST
+ (id)requestWithInputs:(NSArray *)inputs
           inputIndices:(NSArray *)inputIndices
                outputs:(NSArray *)outputs
          outputIndices:(NSArray *)outputIndices
          weightsBuffer:(id)weightsBuffer
              perfStats:(id)perfStats
           FAKE_KEYWORD:(NSNumber *)procedureIndex {
    check_side(inputs, inputIndices);
    check_side(outputs, outputIndices);
    REQUIRE(weightsBuffer == nil && perfStats == nil, "no weights buffer, no statistics");
    REQUIRE([procedureIndex isKindOfClass:[NSNumber class]], "the procedure's index");
    if (fails(REQUEST, NULL)) return nil;
    FAKE_REQUEST *made = [[self new] autorelease];
    live++;
    made->surfaces[0] = [inputs copy];
    made->surfaces[1] = [outputs copy];
    made->indices[0] = [inputIndices copy];
    made->indices[1] = [outputIndices copy];
    made->procedure = [procedureIndex intValue];
    return made;
}
- (NSUInteger)count {
    return [surfaces[0] count] + [surfaces[1] count];
}
- (IOSurfaceRef)surfaceAt:(NSUInteger)i {
    const NSUInteger n = [surfaces[0] count];
    return ((_ANEIOSurfaceObject *)[surfaces[i >= n] objectAtIndex:i < n ? i : i - n])->surface;
}
- (void)unbind {
    if (bound != NULL) bound->table->request_free(bound);
    for (NSUInteger i = 0; copies != NULL && i < [self count]; i++) {
        if (copies[i] != NULL) copies[i]->table->surface_free(copies[i]);
    }
    free(copies);
    bound = NULL;
    copies = NULL;
    bound_to = NULL;
}
/* The simulator has surfaces of its own: the same sizes, filled before and read after. */
- (void)bindTo:(anellm_ane_program *)program {
    const NSUInteger n = [self count], n_inputs = [surfaces[0] count];
    if (bound_to == program) return;
    [self unbind];
    copies = calloc(n, sizeof *copies);
    int32_t *symbols = calloc(n, sizeof *symbols);
    REQUIRE(copies != NULL && symbols != NULL, "no memory");
    for (NSUInteger i = 0; i < n; i++) {
        const int64_t bytes = (int64_t)IOSurfaceGetAllocSize([self surfaceAt:i]);
        REQUIRE(simulator->table->surface_create(simulator, &copies[i], bytes) == ANELLM_OK, "no memory");
        symbols[i] = [[indices[i >= n_inputs] objectAtIndex:i < n_inputs ? i : i - n_inputs] intValue];
    }
    REQUIRE(program->table->request_create(program, &bound, procedure, copies, symbols, (int64_t)n_inputs,
                                           copies + n_inputs, symbols + n_inputs, (int64_t)(n - n_inputs)) == ANELLM_OK,
            "no memory");
    free(symbols);
    bound_to = program;
}
- (void)copySide:(int)output back:(int)back {
    const NSUInteger n_inputs = [surfaces[0] count];
    for (NSUInteger i = output ? n_inputs : 0; i < (output ? [self count] : n_inputs); i++) {
        anellm_ane_surface *copy = copies[i];
        copy->table->surface_lock(copy, 0);
        void *theirs = copy->table->surface_base(copy), *ours = shim_memory([self surfaceAt:i]);
        memcpy(back ? ours : theirs, back ? theirs : ours, (size_t)copy->table->surface_bytes(copy));
        copy->table->surface_unlock(copy);
    }
}
- (void)dealloc {
    [self unbind];
    for (int side = 0; side < 2; side++) {
        [surfaces[side] release];
        [indices[side] release];
    }
    live--;
    [super dealloc];
}
@end

/* ---- the model --------------------------------------------------------------------------------------------------- */

enum { NEW, COMPILED, LOADED, STUCK }; /* STUCK: loaded still, after an unload that failed */

@interface _ANEInMemoryModel : NSObject {
    _ANEInMemoryModelDescriptor *descriptor;
    NSString *name;
    anellm_ane_program *program;
    int state, is_kept;
    unsigned int compiled_qos;
}
@end

static uint64_t hash_data(uint64_t hash, NSData *data) {
    const unsigned char *at = [data bytes];
    for (NSUInteger i = 0; i < [data length]; i++) hash = (hash ^ at[i]) * 1099511628211u;
    return hash;
}

@implementation _ANEInMemoryModel
+ (id)inMemoryModelWithDescriptor:(id)given {
    REQUIRE([given isKindOfClass:[_ANEInMemoryModelDescriptor class]], "a model is made of a descriptor");
    if (fails(MODEL, NULL)) return nil;
    _ANEInMemoryModel *made = [[self new] autorelease];
    live++;
    made->descriptor = [given retain];
    uint64_t hash = hash_data(14695981039346656037u, made->descriptor->text);
    NSArray *keys = [[made->descriptor->weights allKeys] sortedArrayUsingSelector:@selector(compare:)];
    for (NSString *key in keys) {
        hash = hash_data(hash, [key dataUsingEncoding:NSUTF8StringEncoding]);
        hash = hash_data(hash, [[made->descriptor->weights objectForKey:key] objectForKey:@"data"]);
    }
    made->name = [[NSString alloc] initWithFormat:@"%016llX_FAKE", (unsigned long long)hash];
    return made;
}
- (void)dealloc {
    REQUIRE(state == NEW || state == COMPILED || state == STUCK, "a model is released while it is loaded");
    if (program != NULL) program->table->program_free(program);
    [descriptor release];
    [name release];
    live--;
    [super dealloc];
}
- (NSString *)hexStringIdentifier {
    return fails(HEX, NULL) ? @"../outside" : name;
}
- (void)checkQoS:(unsigned int)qos {
    REQUIRE(qos == compiled_qos, "QoS is %u, was %u when the model was compiled", qos, compiled_qos);
}
- (NSData *)fileAt:(NSString *)relative {
    NSString *folder = [NSTemporaryDirectory() stringByAppendingPathComponent:name];
    return [NSData dataWithContentsOfFile:[folder stringByAppendingPathComponent:relative]];
}
/* Failing it says that there is one where there is none, which the load finds out. */
- (BOOL)FAKE_EXISTS {
    is_kept = fails(EXISTS, NULL) || [kept containsObject:name];
    return is_kept ? YES : NO;
}
/* What macOS has compiled before, from its own files. */
- (BOOL)takeKept:(unsigned int)qos error:(NSError **)error {
    if (![kept containsObject:name]) return answer(error, DOMAIN, 6, @"Program load failure (0x20004)");
    const NSUInteger n = [descriptor->weights count];
    anellm_ane_file *files = calloc(n + 1, sizeof *files);
    NSUInteger i = 0;
    for (NSString *key in descriptor->weights) {
        NSData *data = [[descriptor->weights objectForKey:key] objectForKey:@"data"];
        files[i++] = (anellm_ane_file){[key UTF8String], [data bytes], (int64_t)[data length]};
    }
    const int status = simulator->table->compile(simulator, &program, [descriptor->text bytes],
                                                 (int64_t)[descriptor->text length], files, (int64_t)n);
    free(files);
    REQUIRE(status == ANELLM_OK, "what was compiled once compiles again");
    compiled_qos = qos;
    state = COMPILED;
    return YES;
}
- (BOOL)compileWithQoS:(unsigned int)qos options:(NSDictionary *)options error:(NSError **)error {
    struct timespec t;
    check_common(qos, error);
    check_options(options);
    REQUIRE(state == NEW, "a model is compiled once");
    clock_gettime(CLOCK_MONOTONIC, &t);
    last_gap = (double)t.tv_sec + 1e-9 * (double)t.tv_nsec - compiled_at;
    compiled_at += last_gap;
    NSData *text = [self fileAt:@"model.mil"];
    REQUIRE([text isEqual:descriptor->text], "model.mil is in the folder of the model before it is compiled (Q58)");
    compiled_qos = qos;
    if (fails(COMPILE, error)) return NO;
    const NSUInteger n = [descriptor->weights count];
    anellm_ane_file *files = calloc(n + 1, sizeof *files);
    NSUInteger i = 0;
    for (NSString *key in descriptor->weights) {
        NSData *file = [self fileAt:[key substringFromIndex:strlen("@model_path/")]];
        REQUIRE([file isEqual:[[descriptor->weights objectForKey:key] objectForKey:@"data"]],
                "%s is in the folder of the model before it is compiled (Q58)", [key UTF8String]);
        files[i++] = (anellm_ane_file){[key UTF8String], [file bytes], (int64_t)[file length]};
    }
    const int status = simulator->table->compile(simulator, &program, [text bytes], (int64_t)[text length], files,
                                                 (int64_t)n);
    free(files);
    if (status != ANELLM_OK) return answer_simulator(error, status);
    state = COMPILED;
    if (keeps) [kept addObject:name];
    return YES;
}
- (BOOL)loadWithQoS:(unsigned int)qos options:(NSDictionary *)options error:(NSError **)error {
    check_common(qos, error);
    check_options(options);
    REQUIRE(state == COMPILED || (state == NEW && is_kept), "a model is loaded after it was compiled, and once");
    if (fails(LOAD, error)) return NO;
    if (state == NEW && ![self takeKept:qos error:error]) return NO;
    [self checkQoS:qos];
    const int status = program->table->load(program);
    if (status != ANELLM_OK) return answer_simulator(error, status);
    state = LOADED;
    return YES;
}
- (BOOL)unloadWithQoS:(unsigned int)qos error:(NSError **)error {
    check_common(qos, error);
    [self checkQoS:qos];
    REQUIRE(state == LOADED || state == STUCK, "only what is loaded is unloaded");
    if (fails(UNLOAD, error)) {
        state = STUCK;
        return NO;
    }
    program->table->unload(program);
    state = COMPILED;
    if (unload_cleans) {
        NSString *folder = [NSTemporaryDirectory() stringByAppendingPathComponent:name];
        [[NSFileManager defaultManager] removeItemAtPath:folder error:NULL];
    }
    return YES;
}
- (BOOL)evaluateWithQoS:(unsigned int)qos options:(NSDictionary *)options request:(id)given error:(NSError **)error {
    FAKE_REQUEST *request = given;
    check_common(qos, error);
    [self checkQoS:qos];
    check_options(options);
    REQUIRE([given isKindOfClass:[FAKE_REQUEST class]], "a model evaluates a request");
    REQUIRE(state == LOADED || state == STUCK, "a model is evaluated while it is loaded");
    for (NSUInteger i = 0; i < [request count]; i++)
        REQUIRE(shim_locks([request surfaceAt:i]) == 0, "a surface is locked while the engine computes");
    if (fails(EVALUATE, error)) return NO;
    if (slow_us > 0 && qos != (unsigned int)fast_qos) usleep((useconds_t)slow_us);
    [request bindTo:program];
    [request copySide:0 back:0];
    const int status = program->table->evaluate(program, request->bound);
    if (status != ANELLM_OK) return answer_simulator(error, status);
    [request copySide:1 back:1];
    return YES;
}
@end

/* ---- the machine ------------------------------------------------------------------------------------------------- */

@interface _ANEDeviceInfo : NSObject
@end

@implementation _ANEDeviceInfo
+ (NSString *)aneArchitectureType {
    return @"h16g";
}
+ (unsigned int)numANEs {
    return FAKE_ENGINES;
}
+ (unsigned int)numANECores {
    return 16;
}
@end
