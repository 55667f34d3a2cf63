/* libFuzzer entry of the MIL parser, the weight file reader and the interpreter: any bytes are a program, and its weight
 * file as well. What compiles is evaluated once, on the same bytes; a hash of them chooses the arithmetic and the rules.
 *
 *   clang -g -O1 -std=gnu11 -D_GNU_SOURCE -Icsrc -pthread -fsanitize=fuzzer,address,undefined \
 *       $(find csrc -name '*.c') -lm -o fuzz_mil
 *   ./fuzz_mil -dict=csrc/fuzz/mil.dict -max_len=8192 -timeout=10 corpus tests/backend/corpus
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "anellm.h"

enum { MAX_SURFACE_BYTES = 1 << 20, MAX_PORTS = 16, MAX_PROCEDURES = 4 };

static const anellm_ane_profile usual = {
    .name = "fuzz", .architecture = "none", .max_rank = 5, .max_width = 65536, .max_height = 65536,
    .max_channels = 65536, .max_batch = 65536, .round_half_even = 0, .narrow_reduce = 1, .slice_limit = 4094,
    .concat_slices_wrong = 1, .sigmoid_low = -8.0, .sigmoid_high = 8.0,
};

/* A surface that holds the bytes over and over. */
static int make_surface(anellm_ane *device, anellm_ane_surface **surface, int64_t bytes, const uint8_t *data, size_t size) {
    if (anellm_ane_surface_create(device, surface, bytes) != ANELLM_OK) return 0;
    anellm_ane_surface_lock(*surface, 0);
    uint8_t *base = anellm_ane_surface_base(*surface);
    for (int64_t i = 0; i < bytes && size > 0; i++) base[i] = data[(size_t)i % size];
    anellm_ane_surface_unlock(*surface);
    return 1;
}

/* Surfaces for all ports of one direction; how many there are, or -1. */
static int64_t make_surfaces(anellm_ane *device, anellm_ane_program *program, int procedure, int output,
                             anellm_ane_surface **surfaces, int32_t *symbols, const uint8_t *data, size_t size) {
    int64_t n;
    if (anellm_ane_count_ports(program, procedure, output, &n) != ANELLM_OK || n > MAX_PORTS) return -1;
    for (int64_t i = 0; i < n; i++) {
        anellm_ane_port port;
        if (anellm_ane_get_port(program, procedure, output, i, &port) != ANELLM_OK) return -1;
        if (port.bytes > MAX_SURFACE_BYTES) return -1;
        symbols[i] = port.symbol;
        if (!make_surface(device, &surfaces[i], port.bytes > 0 ? port.bytes : 1, data, size)) return -1;
    }
    return n;
}

static void evaluate(anellm_ane *device, anellm_ane_program *program, int procedure, const uint8_t *data, size_t size) {
    anellm_ane_surface *in[MAX_PORTS] = {0}, *out[MAX_PORTS] = {0};
    int32_t in_symbols[MAX_PORTS] = {0}, out_symbols[MAX_PORTS] = {0};
    const int64_t n_in = make_surfaces(device, program, procedure, 0, in, in_symbols, data, size);
    const int64_t n_out = make_surfaces(device, program, procedure, 1, out, out_symbols, data, size);
    anellm_ane_request *request = NULL;
    if (n_in >= 0 && n_out >= 0 &&
        anellm_ane_request_create(program, &request, procedure, in, in_symbols, n_in, out, out_symbols, n_out) == ANELLM_OK) {
        anellm_ane_evaluate(program, request);
    }
    anellm_ane_request_free(request);
    for (int i = 0; i < MAX_PORTS; i++) {
        anellm_ane_surface_free(in[i]);
        anellm_ane_surface_free(out[i]);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    anellm_sim_options options = {.rows = ANELLM_SIM_ROWS_ANY, .max_memory_bytes = 1 << 22};
    anellm_ane *device;
    anellm_ane_program *program;
    const anellm_ane_file file = {"@model_path/weights/w.bin", data, (int64_t)size};
    anellm_ane_profile profile = usual;
    uint32_t choice = 2166136261u; /* FNV-1a */
    for (size_t i = 0; i < size; i++) choice = (choice ^ data[i]) * 16777619u;
    choice >>= 16;
    options.numerics = (int)(choice & 1);
    options.mac = (int)(choice >> 1 & 1);
    options.strict = (choice >> 2 & 3) == 3;
    if ((choice >> 4 & 1) != 0) profile.mac_tile = 4, profile.round_half_even = 1;
    if ((choice >> 6 & 3) == 0) options.rows = ANELLM_SIM_ROWS_TRUNCATE, profile.row_multiple = 16;
    if (anellm_ane_open(&device, "sim", &profile, &options) != ANELLM_OK) return 0;
    if (anellm_ane_compile(device, &program, (const char *)data, (int64_t)size, &file, 1) == ANELLM_OK) {
        anellm_ane_load(program);
        for (int procedure = 0; procedure < MAX_PROCEDURES; procedure++) evaluate(device, program, procedure, data, size);
        anellm_ane_program_free(program);
    }
    anellm_ane_close(device);
    return 0;
}

#if defined(ANELLM_FUZZ_REPLAY) /* without libFuzzer: run the files named on the command line */
#include <stdlib.h>

int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        FILE *f = fopen(argv[i], "rb");
        if (f == NULL) return 1;
        uint8_t *data = malloc(1 << 24);
        const size_t n = data == NULL ? 0 : fread(data, 1, 1 << 24, f);
        fclose(f);
        LLVMFuzzerTestOneInput(data, n);
        free(data);
    }
    printf("%d files\n", argc - 1);
    return 0;
}
#endif
