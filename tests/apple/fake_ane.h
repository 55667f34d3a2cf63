/* A strict model of the part of AppleNeuralEngine.framework that device_ane.m uses (ANE.md 3.1 to 3.6): the same class
 * names and selectors, over the simulator. What would crash Apple's, or corrupt silently, aborts with a sentence. */
#ifndef FAKE_ANE_H
#define FAKE_ANE_H

#include "backend/ane/device.h"

/* Compute with a new simulator of this profile from now on. */
int fake_ane_use(const struct anellm_ane_host *host, const anellm_ane_profile *profile);
void fake_ane_close(void); /* gives the simulator back */

enum fake_how { FAKE_ERROR = 0, FAKE_NO_ERROR = 1, FAKE_RAISE = 2 }; /* NO and an NSError; NO alone; an exception */
/* After `after` more of them, the next `times` of a step fail: "descriptor", "model", "hex", "compile", "load",
 * "unload", "surface", "request", "evaluate", "exists" (it says so of what does not). */
void fake_ane_fail(const char *step, int after, int times, int how);
int fake_ane_count(const char *step); /* how often it was reached */
int fake_ane_live(void);              /* objects of the four classes, and surfaces */
void fake_ane_expect_qos(int qos); /* negative: any, but the same for all calls of a model */
void fake_ane_slow_down(int qos, int us); /* evaluations under any other QoS take this much longer */
void fake_ane_keep(int on); /* whether compiled programs are found again; either way those so far are forgotten */
void fake_ane_unload_cleans(int on); /* whether an unload removes the program's folder */
double fake_ane_last_gap(void);       /* seconds between the last two compiles */

#endif
