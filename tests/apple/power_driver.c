/* power_apple.m without Python, for leak checkers and mutants: power_driver STEP. Needs POWER_LIBRARY, the library that
 * has it, and ANELLM_IOREPORT, the fake one. What is subscribed is so for the whole process, so each way of failing to
 * is a process of its own. Prints what is wrong and exits with 1, or prints "ok". */
#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"

static struct {
    void (*fail)(const char *, int, int), (*skip)(int), (*process)(uint64_t), (*shim_fail)(const char *, int);
    int (*live)(void);
} fake;

static void find_fake(void) {
    void *library = dlopen(getenv("ANELLM_IOREPORT"), RTLD_NOW | RTLD_LOCAL), *shim = dlopen(NULL, RTLD_NOW);
    CHECK(library != NULL, "%s", dlerror());
    find(&fake.fail, library, "fake_ioreport_fail");
    find(&fake.skip, library, "fake_ioreport_skip");
    find(&fake.live, library, "fake_ioreport_live");
    find(&fake.process, shim, "shim_process_energy");
    find(&fake.shim_fail, shim, "shim_fail");
}

static anellm_power *open_it(void) {
    anellm_power *power = NULL;
    OK(anellm_power_open(&power, getenv("POWER_LIBRARY")));
    return power;
}

static int near(double a, double b) { return fabs(a - b) < 1e-9; }

/* Seconds of the fake machine since the object was made. */
static void expect(anellm_power *power, const char *source, double seconds) {
    anellm_power_reading r;
    OK(anellm_power_read(power, &r));
    CHECK(strcmp(r.source, source) == 0, "%s", r.source);
    CHECK(near(r.cpu, seconds) && near(r.gpu, 0.5 * seconds) && near(r.ane, 0.25 * seconds) &&
              near(r.dram, 0.125 * seconds), "%g s: %g %g %g %g", seconds, r.cpu, r.gpu, r.ane, r.dram);
    CHECK(r.thermal == ANELLM_THERMAL_NOMINAL, "%d", r.thermal);
}

/* Nothing but what the process takes. */
static void expect_process(anellm_power *power, double joules) {
    anellm_power_reading r;
    OK(anellm_power_read(power, &r));
    CHECK(strcmp(r.source, joules < 0.0 ? "" : "process") == 0, "%s", r.source);
    CHECK(near(r.cpu, joules) && near(r.gpu, -1.0) && near(r.ane, -1.0) && near(r.dram, -1.0), "%g %g %g %g", r.cpu,
          r.gpu, r.ane, r.dram);
    CHECK(r.thermal == ANELLM_THERMAL_NOMINAL, "%d", r.thermal);
}

static void *read_in_thread(void *power) {
    anellm_power_reading r;
    for (int i = 0; i < 50; i++) OK(anellm_power_read(power, &r));
    return NULL;
}

static void test_ioreport(void) {
    anellm_power *power = open_it(), *other = open_it();
    expect(power, "ioreport", 6.0); /* from sample 1 to 4 */
    expect(other, "ioreport", 4.0); /* from sample 3 to 5 */
    fake.skip(10);
    expect(power, "ioreport", 30.0);
    fake.fail("samples", 0, 1);
    expect(power, "ioreport", 30.0); /* made up for by the next */
    expect(power, "ioreport", 32.0);
    fake.fail("delta", 0, 1);
    expect(power, "ioreport", 32.0);
    expect(power, "ioreport", 36.0);
    fake.fail("back", 0, 1);
    expect(power, "ioreport", 36.0);
    fake.fail("empty", 0, 2);
    expect(power, "ioreport", 36.0);
    pthread_t threads[3];
    for (int i = 0; i < 3; i++) CHECK(pthread_create(&threads[i], NULL, read_in_thread, power) == 0, "thread");
    for (int i = 0; i < 3; i++) pthread_join(threads[i], NULL);
    CHECK(fake.live() == 2, "%d samples are kept", fake.live());
    anellm_power_close(power);
    anellm_power_close(other);
    CHECK(fake.live() == 0, "%d samples are left", fake.live());
    fake.fail("raise", 0, 1);
    power = open_it(); /* this one has to do without */
    fake.process(5000000000u);
    expect_process(power, 4.0);
    anellm_power_close(power);
    power = open_it();
    fake.fail("raise", 0, 1);
    anellm_power_reading r;
    OK(anellm_power_read(power, &r)); /* an exception does not get out */
    anellm_power_close(power);
    CHECK(fake.live() == 0, "%d samples are left", fake.live());
}

static void test_without(const char *step) {
    fake.fail(step, 0, 99);
    anellm_power *power = open_it();
    expect_process(power, 0.0);
    fake.process(3500000000u);
    expect_process(power, 2.5);
    fake.process(500000000u); /* another count than at the start */
    expect_process(power, 0.0);
    fake.shim_fail("rusage", 1);
    expect_process(power, -1.0);
    anellm_power_close(power);
    CHECK(fake.live() == 0, "%d samples are left", fake.live());
    fake.process(0);
    power = open_it();
    expect_process(power, -1.0);
    anellm_power_close(power);
}

static void test_thermal(void) {
    static const struct {
        const char *text;
        int state;
    } states[] = {{"1", ANELLM_THERMAL_FAIR},     {"2", ANELLM_THERMAL_SERIOUS}, {"3", ANELLM_THERMAL_CRITICAL},
                  {"4", ANELLM_THERMAL_UNKNOWN}, {"-1", ANELLM_THERMAL_UNKNOWN}};
    anellm_power *power = open_it();
    for (int i = 0; i < 5; i++) {
        anellm_power_reading r;
        setenv("SHIM_THERMAL", states[i].text, 1);
        OK(anellm_power_read(power, &r));
        CHECK(r.thermal == states[i].state, "%s: %d", states[i].text, r.thermal);
    }
    unsetenv("SHIM_THERMAL");
    anellm_power_close(power);
}

int main(int argc, char **argv) {
    const char *step = argc == 2 ? argv[1] : "";
    CHECK(step[0] != '\0', "power_driver STEP");
    find_fake();
    fake.process(1000000000u);
    if (strcmp(step, "none") == 0) {
        test_ioreport();
        test_thermal();
    } else {
        test_without(step);
    }
    puts("ok");
    return 0;
}
