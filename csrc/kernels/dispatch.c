#include "kernels/dispatch.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/cpu.h"
#include "core/status.h"

static const struct {
    const char *name;
    unsigned needs; /* what every machine of the tier has; single variants may need more */
} tiers[] = {
    [ANELLM_RANK_portable] = {"portable", 0},
    [ANELLM_RANK_neon] = {"neon", ANELLM_CPU_NEON},
    [ANELLM_RANK_vdsp] = {"vdsp", ANELLM_CPU_VDSP},
    [ANELLM_RANK_avx2] = {"avx2", ANELLM_CPU_AVX2},
    [ANELLM_RANK_avx512] = {"avx512", ANELLM_CPU_AVX512},
    [ANELLM_RANK_avx512bf16] = {"avx512bf16", ANELLM_CPU_AVX512BF16},
    [ANELLM_RANK_amx] = {"amx", ANELLM_CPU_AMX_PERMITTED},
    [ANELLM_RANK_naive] = {"naive", 0},
};
/* The last tier is naive, which is never chosen by itself nor listed. */
enum { N_TIERS = (int)(sizeof tiers / sizeof tiers[0]), N_LISTED = N_TIERS - 1 };

static pthread_once_t once = PTHREAD_ONCE_INIT;
static struct anellm_kernels tables[N_TIERS];
static int built[N_TIERS];     /* this build has at least one variant of the tier */
static int available[N_TIERS]; /* and this machine can run at least one */
static char available_names[64];
static int environment_status; /* what came of reading ANELLM_CPU */
static char environment_message[256];
static atomic_int current; /* the tier in force: an index of tables */

static void build_table(struct anellm_kernels *table, int tier, unsigned features) {
    int best = -1;
#define ANELLM_KERNEL(kernel) best = -1;
#define ANELLM_VARIANT(kernel, variant, needs)                                                                         \
    if (ANELLM_RANK_##variant == tier) built[tier] = 1;                                                                \
    if (ANELLM_RANK_##variant <= tier && ANELLM_RANK_##variant > best && ((unsigned)(needs) & ~features) == 0) {       \
        table->kernel = kernel##__##variant;                                                                           \
        best = ANELLM_RANK_##variant;                                                                                  \
        if (best == tier) available[tier] = 1;                                                                         \
    }
#include "kernels/table.inc"
#undef ANELLM_KERNEL
#undef ANELLM_VARIANT
    (void)best;
}

/* The tiers from the best to the last. A tier stands for both products: in avx512bf16 and amx the kernels are those of
 * avx512 and only the bf16 product has an engine of its own. On CPUs that have AMX a bf16 dot product of 512 bits runs
 * at half the rate of fp32 (measured on Sapphire Rapids), so there avx512bf16 comes after avx512. */
static void order_tiers(int order[N_LISTED]) {
    const int slow_bf16 = (anellm_cpu_feature_bits() & ANELLM_CPU_AMX_BF16) != 0;
    for (int i = 0; i < N_LISTED; i++) order[i] = N_LISTED - 1 - i;
    for (int i = 0; i + 1 < N_LISTED && slow_bf16; i++) {
        if (order[i] != ANELLM_RANK_avx512bf16) continue;
        order[i] = ANELLM_RANK_avx512;
        order[i + 1] = ANELLM_RANK_avx512bf16;
        break;
    }
}

static int best_tier(void) {
    int order[N_LISTED], i = 0;
    order_tiers(order);
    while (i < N_LISTED - 1 && !available[order[i]]) i++;
    return order[i];
}

/* Find the tier of a name ("auto" is the best one here), or say in `message` why there is none. */
static int find_tier(int *tier, const char *name, char *message, size_t size) {
    if (strcmp(name, "auto") == 0) {
        *tier = best_tier();
        return ANELLM_OK;
    }
    for (int i = 0; i < N_TIERS; i++) {
        if (strcmp(name, tiers[i].name) != 0) continue;
        if (available[i]) {
            *tier = i;
            return ANELLM_OK;
        }
        if (i == ANELLM_RANK_amx && (anellm_cpu_feature_bits() & ANELLM_CPU_AMX_BF16) != 0) {
            snprintf(message, size,
                     "CPU variant \"amx\": this machine has the CPU feature, but the system does not let programs use "
                     "its tile registers");
        } else if ((tiers[i].needs & ~anellm_cpu_feature_bits()) != 0) {
            snprintf(message, size, "CPU variant \"%s\" needs the CPU feature %s, which this machine lacks; it has: %s",
                     name, tiers[i].name, anellm_cpu_features());
        } else if (!built[i]) {
            snprintf(message, size, "CPU variant \"%s\": this build has no kernels for it; variants here: %s", name,
                     available_names);
        } else {
            snprintf(message, size, "CPU variant \"%s\": none of its kernels can run with this machine's features: %s",
                     name, anellm_cpu_features());
        }
        return ANELLM_UNAVAILABLE;
    }
    int used = snprintf(message, size, "CPU variant \"%.64s\" is unknown; known: auto", name);
    for (int i = 0; i < N_TIERS && used > 0 && (size_t)used < size; i++) {
        used += snprintf(message + used, size - (size_t)used, ", %s", tiers[i].name);
    }
    return ANELLM_INVALID;
}

static void initialise(void) {
    const unsigned features = anellm_cpu_feature_bits();
    size_t used = 0;
    for (int i = 0; i < N_TIERS; i++) build_table(&tables[i], i, i == ANELLM_RANK_naive ? 0 : features);
    int order[N_LISTED];
    order_tiers(order);
    for (int i = 0; i < N_LISTED; i++) {
        if (!available[order[i]]) continue;
        used += (size_t)snprintf(available_names + used, sizeof available_names - used, "%s%s", used > 0 ? "," : "",
                                 tiers[order[i]].name);
    }
    int tier = best_tier();
    const char *wanted = getenv("ANELLM_CPU");
    if (wanted != NULL && wanted[0] != '\0') {
        environment_status = find_tier(&tier, wanted, environment_message, sizeof environment_message);
    }
    atomic_store(&current, tier);
}

const struct anellm_kernels *anellm_kernels(void) {
    pthread_once(&once, initialise);
    return &tables[atomic_load_explicit(&current, memory_order_relaxed)]; /* the tables never change after `once` */
}

int anellm_cpu_init(void) {
    pthread_once(&once, initialise);
    if (environment_status == ANELLM_OK) return ANELLM_OK;
    return anellm_fail(environment_status, "environment variable ANELLM_CPU: %s", environment_message);
}

const char *anellm_cpu_variant(void) {
    pthread_once(&once, initialise);
    return tiers[atomic_load(&current)].name;
}

const char *anellm_cpu_variants(void) {
    pthread_once(&once, initialise);
    return available_names;
}

int anellm_cpu_set_variant(const char *name) {
    char message[256];
    int tier = ANELLM_RANK_portable;
    pthread_once(&once, initialise);
    ANELLM_REQUIRE(name != NULL, "name is NULL");
    const int status = find_tier(&tier, name, message, sizeof message);
    if (status != ANELLM_OK) return anellm_fail_in(__func__, status, "%s", message);
    atomic_store(&current, tier);
    return ANELLM_OK;
}
