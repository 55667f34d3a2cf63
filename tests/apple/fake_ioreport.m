/* A strict model of the part of libIOReport that power_apple.m uses, for GNUstep (apple_shim.m says how CoreFoundation
 * is there). Each sample is 2 s after the one before it, of a machine that takes 1 W in the CPU, 0.5 W in the GPU,
 * 0.25 W in the engine and 0.125 W in memory. Channels are those of a chip with two dies, with parts that must not be
 * counted. */
#import <CoreFoundation/CoreFoundation.h>
#import <Foundation/Foundation.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REQUIRE(condition, ...)                                                                                        \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "fake IOReport: contract violated: " __VA_ARGS__);                                         \
            fputc('\n', stderr);                                                                                       \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

static const struct {
    const char *name, *unit;
    long long per_sample;
} channels[] = {
    {"DIE_0_ECPU", "mJ", 500},          {"DIE_0_PACC0_CPU", "mJ", 700},   {"DIE_0_CPU Energy", "mJ", 1200},
    {"DIE_1_CPU Energy", "mJ  ", 800},  {"GPU Energy", "nJ", 1000000000}, {"GPU SRAM0", "mJ", 77},
    {"ANE0_0", "uJ", 300000},           {"ANE0_1", "uJ", 200000},         {"DRAM0", "mJ", 250},
    {"DRAM BW", "MB", 123456},          {"AMCC", "mJ", 99},
};
enum { N_CHANNELS = sizeof channels / sizeof *channels };

static _Atomic int samples, live;
static struct {
    char step[16];
    int after, times;
} fault;

void fake_ioreport_fail(const char *step, int after, int times);
int fake_ioreport_live(void);
void fake_ioreport_skip(int n);

/* After `after` more of them, the next `times`: "group", "subscription", "samples", "delta"; "empty": no channels;
 * "parts": only such as must not be counted; "back": the counts go back; "raise": sampling raises an exception. */
void fake_ioreport_fail(const char *step, int after, int times) {
    snprintf(fault.step, sizeof fault.step, "%s", step);
    fault.after = after;
    fault.times = times;
}

int fake_ioreport_live(void) { return live; } /* samples and differences */

void fake_ioreport_skip(int n) { samples += n; } /* time goes by */

static int fails(const char *step) {
    if (strcmp(fault.step, step) != 0 || fault.times == 0) return 0;
    if (fault.after > 0) {
        fault.after--;
        return 0;
    }
    fault.times--;
    return 1;
}

/* An object that is in a sample and goes with it. */
@interface FakeSampleMark : NSObject
@end

@implementation FakeSampleMark
- (id)init {
    self = [super init];
    live++;
    return self;
}
- (void)dealloc {
    live--;
    [super dealloc];
}
@end

static NSString *text_of(const char *text) { return [NSString stringWithUTF8String:text]; }

/* A retained dictionary as of sample number n. */
static CFDictionaryRef make(long long n, int marked) {
    const int parts = fails("parts"), empty = fails("empty");
    NSMutableArray *list = [NSMutableArray array];
    for (int i = 0; i < N_CHANNELS && !empty; i++) {
        const int whole = strstr(channels[i].name, "Energy") != NULL || strncmp(channels[i].name, "ANE", 3) == 0 ||
                          strncmp(channels[i].name, "DRAM", 4) == 0;
        if (parts && whole) continue;
        [list addObject:@{
            @"name" : text_of(channels[i].name),
            @"unit" : text_of(channels[i].unit),
            @"count" : @(n * channels[i].per_sample)
        }];
    }
    NSMutableDictionary *made = [NSMutableDictionary new];
    [made setObject:list forKey:@"IOReportChannels"];
    if (marked) {
        FakeSampleMark *mark = [FakeSampleMark new];
        [made setObject:mark forKey:@"mark"];
        [mark release];
    }
    [made setObject:@(n) forKey:@"sample"];
    return (CFDictionaryRef)made;
}

CFDictionaryRef IOReportCopyChannelsInGroup(CFStringRef group, CFStringRef subgroup, uint64_t a, uint64_t b,
                                            uint64_t c);
CFTypeRef IOReportCreateSubscription(void *a, CFDictionaryRef wanted, CFDictionaryRef *subscribed, uint64_t b,
                                     CFTypeRef c);
CFDictionaryRef IOReportCreateSamples(CFTypeRef subscription, CFDictionaryRef subscribed, CFTypeRef a);
CFDictionaryRef IOReportCreateSamplesDelta(CFDictionaryRef before, CFDictionaryRef after, CFTypeRef a);
CFStringRef IOReportChannelGetChannelName(CFDictionaryRef channel);
CFStringRef IOReportChannelGetUnitLabel(CFDictionaryRef channel);
int64_t IOReportSimpleGetIntegerValue(CFDictionaryRef channel, int32_t index);

CFDictionaryRef IOReportCopyChannelsInGroup(CFStringRef group, CFStringRef subgroup, uint64_t a, uint64_t b,
                                            uint64_t c) {
    REQUIRE([(NSString *)group isEqual:@"Energy Model"] && subgroup == NULL, "the group");
    REQUIRE(a == 0 && b == 0 && c == 0, "the rest is 0");
    if (fails("group")) return NULL;
    NSDictionary *made = (NSDictionary *)make(0, 0);
    NSDictionary *fixed = [[NSDictionary alloc] initWithDictionary:made];
    [made release];
    return (CFDictionaryRef)fixed;
}

static NSDictionary *given_out;

CFTypeRef IOReportCreateSubscription(void *a, CFDictionaryRef wanted, CFDictionaryRef *subscribed, uint64_t b,
                                     CFTypeRef c) {
    REQUIRE(a == NULL && b == 0 && c == NULL, "the rest is 0");
    REQUIRE([(NSDictionary *)wanted isKindOfClass:[NSMutableDictionary class]], "channels that can be changed");
    if (fails("subscription")) return NULL;
    given_out = [(NSDictionary *)wanted retain];
    *subscribed = (CFDictionaryRef)given_out;
    return (CFTypeRef)[NSObject new];
}

CFDictionaryRef IOReportCreateSamples(CFTypeRef subscription, CFDictionaryRef subscribed, CFTypeRef a) {
    REQUIRE(subscription != NULL && (NSDictionary *)subscribed == given_out && a == NULL, "sampling");
    if (fails("raise")) [NSException raise:@"NSRangeException" format:@"no sample"];
    return fails("samples") ? NULL : make(samples++, 1);
}

CFDictionaryRef IOReportCreateSamplesDelta(CFDictionaryRef before, CFDictionaryRef after, CFTypeRef a) {
    REQUIRE(before != NULL && after != NULL && a == NULL, "a difference");
    const long long from = [[(NSDictionary *)before objectForKey:@"sample"] longLongValue];
    const long long to = [[(NSDictionary *)after objectForKey:@"sample"] longLongValue];
    REQUIRE(to > from, "the samples are in order");
    if (fails("delta")) return NULL;
    return make(fails("back") ? from - to : to - from, 1);
}

/* Whether a channel is one: what is in a sample that was released would not be. */
static NSDictionary *as_channel(CFDictionaryRef channel) {
    REQUIRE([(NSDictionary *)channel objectForKey:@"count"] != nil, "a channel");
    return (NSDictionary *)channel;
}

CFStringRef IOReportChannelGetChannelName(CFDictionaryRef channel) {
    return (CFStringRef)[as_channel(channel) objectForKey:@"name"];
}

CFStringRef IOReportChannelGetUnitLabel(CFDictionaryRef channel) {
    return (CFStringRef)[as_channel(channel) objectForKey:@"unit"];
}

int64_t IOReportSimpleGetIntegerValue(CFDictionaryRef channel, int32_t index) {
    REQUIRE(index == 0, "index %d", index);
    return [[as_channel(channel) objectForKey:@"count"] longLongValue];
}
