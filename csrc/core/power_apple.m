/* Energy and heat on macOS, without root (power.h):
 *
 *   energy of the machine   the channels of IOReport's group "Energy Model", which powermetrics shows as well. The
 *                           library has no headers; its functions are looked up by name. What they take and give, and
 *                           which channels are whole units and not parts of others, is known from the open-source
 *                           monitors that read them (macmon, https://github.com/vladkens/macmon, and others)
 *   else of this process    proc_pid_rusage(): the kernel's estimate for its CPU time
 *   heat                    NSProcessInfo's thermalState
 *
 * What is missing or fails is unknown, never an error. The language is that of device_ane.m. */
#import <CoreFoundation/CoreFoundation.h>
#import <Foundation/Foundation.h>
#include <dlfcn.h>
#include <libproc.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/power.h"

#if __has_feature(objc_arc)
#error "power_apple.m retains and releases by hand: compile it with -fno-objc-arc"
#endif

#define IOREPORT "/usr/lib/libIOReport.dylib"

@protocol PowerProcessInfo
- (NSInteger)thermalState;
@end

typedef CFDictionaryRef copy_group_fn(CFStringRef group, CFStringRef subgroup, uint64_t, uint64_t, uint64_t);
typedef CFTypeRef create_subscription_fn(void *, CFDictionaryRef channels, CFDictionaryRef *subscribed, uint64_t,
                                         CFTypeRef);
typedef CFDictionaryRef create_samples_fn(CFTypeRef subscription, CFDictionaryRef subscribed, CFTypeRef);
typedef CFDictionaryRef create_delta_fn(CFDictionaryRef before, CFDictionaryRef after, CFTypeRef);
typedef CFStringRef get_text_fn(CFDictionaryRef channel);
typedef int64_t get_integer_fn(CFDictionaryRef channel, int32_t index);

enum { CPU, GPU, ANE, DRAM, N_UNITS };

/* Subscribed once, for as long as the process lives: which of these are ours to release is not documented. */
static struct {
    pthread_mutex_t mutex; /* of all that is below, and of calls into the library */
    int tried;
    NSDictionary *channels;
    CFTypeRef subscription; /* NULL: there is none to be had */
    CFDictionaryRef subscribed;
    create_samples_fn *create_samples;
    create_delta_fn *create_delta;
    get_text_fn *get_name, *get_unit;
    get_integer_fn *get_integer;
} ioreport = {.mutex = PTHREAD_MUTEX_INITIALIZER};

struct power {
    struct anellm_power power;
    CFDictionaryRef sample; /* NULL: IOReport is not used */
    double joules[N_UNITS]; /* negative: no channel */
    int has_process;
    uint64_t process_start; /* nJ */
};

/* ---- IOReport ---------------------------------------------------------------------------------------------------- */

static int find(void *out, void *library, const char *name) {
    void *symbol = dlsym(library, name);
    memcpy(out, &symbol, sizeof symbol);
    return symbol != NULL;
}

static void subscribe(void) {
    const char *path = getenv("ANELLM_IOREPORT");
    copy_group_fn *copy_group;
    create_subscription_fn *create_subscription;
    void *library = dlopen(path != NULL && path[0] != '\0' ? path : IOREPORT, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL || !find(&copy_group, library, "IOReportCopyChannelsInGroup") ||
        !find(&create_subscription, library, "IOReportCreateSubscription") ||
        !find(&ioreport.create_samples, library, "IOReportCreateSamples") ||
        !find(&ioreport.create_delta, library, "IOReportCreateSamplesDelta") ||
        !find(&ioreport.get_name, library, "IOReportChannelGetChannelName") ||
        !find(&ioreport.get_unit, library, "IOReportChannelGetUnitLabel") ||
        !find(&ioreport.get_integer, library, "IOReportSimpleGetIntegerValue"))
        return;
    CFDictionaryRef channels = copy_group((CFStringRef)@"Energy Model", NULL, 0, 0, 0);
    if (channels == NULL) return;
    ioreport.channels = [(NSDictionary *)channels mutableCopy]; /* the subscription may want to change it */
    CFRelease(channels);
    ioreport.subscription =
        create_subscription(NULL, (CFDictionaryRef)ioreport.channels, &ioreport.subscribed, 0, NULL);
    if (ioreport.subscribed == NULL) ioreport.subscription = NULL;
}

/* The unit that a channel counts whole; -1 for parts ("ECPU", "PACC0_CPU", ...), which would be counted twice. Chips of
 * several dies prefix "DIE_1_" or count the engines: "ANE0_1". */
static int unit_of(NSString *name) {
    if ([name hasSuffix:@"CPU Energy"]) return CPU;
    if ([name hasSuffix:@"GPU Energy"]) return GPU;
    if ([name hasPrefix:@"ANE"]) return ANE;
    return [name hasPrefix:@"DRAM"] ? DRAM : -1;
}

/* Joules that a count is worth; 0 for what is no energy. The label differs between channels and chips. */
static double joules_of(NSString *label) {
    static const struct {
        const char *name;
        double joules;
    } units[] = {{"mJ", 1e-3}, {"uJ", 1e-6}, {"nJ", 1e-9}};
    const char *text = [label UTF8String];
    if (text == NULL) return 0.0;
    text += strspn(text, " ");
    for (size_t i = 0; i < sizeof units / sizeof *units; i++) {
        if (strncmp(text, units[i].name, 2) == 0) return units[i].joules;
    }
    return 0.0;
}

/* Add what a difference of samples holds. A count that went back, as after sleep, is none. */
static void add_delta(struct power *power, CFDictionaryRef delta) {
    NSArray *channels = [(NSDictionary *)delta objectForKey:@"IOReportChannels"];
    for (NSUInteger i = 0; i < [channels count]; i++) {
        CFDictionaryRef channel = (CFDictionaryRef)[channels objectAtIndex:i];
        const int unit = unit_of((NSString *)ioreport.get_name(channel));
        if (unit < 0) continue;
        const double scale = joules_of((NSString *)ioreport.get_unit(channel));
        if (scale <= 0.0) continue;
        const int64_t count = ioreport.get_integer(channel, 0);
        if (power->joules[unit] < 0.0) power->joules[unit] = 0.0;
        if (count > 0) power->joules[unit] += scale * (double)count;
    }
}

static CFDictionaryRef take_sample(void) {
    return ioreport.create_samples(ioreport.subscription, ioreport.subscribed, NULL);
}

/* Count on to now. What fails leaves the last sample, so that the next one makes up for it. */
static void count_on(struct power *power) {
    CFDictionaryRef now = take_sample();
    if (now == NULL) return;
    CFDictionaryRef delta = ioreport.create_delta(power->sample, now, NULL);
    if (delta == NULL) {
        CFRelease(now);
        return;
    }
    add_delta(power, delta);
    CFRelease(delta);
    CFRelease(power->sample);
    power->sample = now;
}

/* Begin at 0 with the units that there are; whether there is one. */
static int begin_count(struct power *power) {
    int known = 0;
    for (int i = 0; i < N_UNITS; i++) {
        if (power->joules[i] < 0.0) continue;
        power->joules[i] = 0.0;
        known = 1;
    }
    return known;
}

static void start_ioreport(struct power *power) {
    if (!ioreport.tried) {
        ioreport.tried = 1;
        subscribe();
    }
    if (ioreport.subscription == NULL) return;
    power->sample = take_sample();
    if (power->sample == NULL) return;
    count_on(power); /* tells which units there are */
    if (begin_count(power)) return;
    CFRelease(power->sample);
    power->sample = NULL;
}

/* ---- the process, the heat --------------------------------------------------------------------------------------- */

static int read_process(uint64_t *nanojoules) {
    struct rusage_info_v6 usage;
    memset(&usage, 0, sizeof usage);
    if (proc_pid_rusage(getpid(), RUSAGE_INFO_V6, (rusage_info_t *)(void *)&usage) != 0) return 0;
    *nanojoules = usage.ri_energy_nj;
    return usage.ri_energy_nj > 0; /* chips that count none say 0 */
}

static int read_thermal(void) {
    id info = [NSProcessInfo processInfo];
    if (![info respondsToSelector:@selector(thermalState)]) return ANELLM_THERMAL_UNKNOWN;
    const NSInteger state = [(id<PowerProcessInfo>)info thermalState];
    return state >= ANELLM_THERMAL_NOMINAL && state <= ANELLM_THERMAL_CRITICAL ? (int)state : ANELLM_THERMAL_UNKNOWN;
}

/* ---- the table --------------------------------------------------------------------------------------------------- */

static void read_energy(struct power *power, anellm_power_reading *reading) {
    uint64_t now = 0;
    if (power->sample != NULL) {
        count_on(power);
        snprintf(reading->source, sizeof reading->source, "%s", "ioreport");
        reading->cpu = power->joules[CPU];
        reading->gpu = power->joules[GPU];
        reading->ane = power->joules[ANE];
        reading->dram = power->joules[DRAM];
    } else if (power->has_process && read_process(&now)) {
        snprintf(reading->source, sizeof reading->source, "%s", "process");
        reading->cpu = now > power->process_start ? 1e-9 * (double)(now - power->process_start) : 0.0;
    }
}

static int power_read(anellm_power *object, anellm_power_reading *reading) {
    struct power *power = (struct power *)(void *)object;
    pthread_mutex_lock(&ioreport.mutex);
    @autoreleasepool {
        @try {
            read_energy(power, reading);
            reading->thermal = read_thermal();
        } @catch (id exception) {
            (void)exception; /* what was read so far stands */
        }
    }
    pthread_mutex_unlock(&ioreport.mutex);
    return ANELLM_OK;
}

static void power_close(anellm_power *object) {
    struct power *power = (struct power *)(void *)object;
    pthread_mutex_lock(&ioreport.mutex);
    @autoreleasepool {
        if (power->sample != NULL) CFRelease(power->sample);
    }
    pthread_mutex_unlock(&ioreport.mutex);
    free(power);
}

static const struct anellm_power_table power_table = {power_read, power_close};

int anellm_power_apple_open(anellm_power **out) {
    struct power *power = calloc(1, sizeof *power);
    if (power == NULL) return ANELLM_NOMEM;
    power->power.table = &power_table;
    for (int i = 0; i < N_UNITS; i++) power->joules[i] = -1.0;
    power->has_process = read_process(&power->process_start);
    pthread_mutex_lock(&ioreport.mutex);
    @autoreleasepool {
        @try {
            start_ioreport(power);
        } @catch (id exception) {
            (void)exception;
            power->sample = NULL;
        }
    }
    pthread_mutex_unlock(&ioreport.mutex);
    *out = &power->power;
    return ANELLM_OK;
}
