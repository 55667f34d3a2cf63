/* image.c on the machine at hand, with sanitizers: files that are cut off or damaged. Nothing of an image is run, and
 * every import is bound to one address.
 *
 *     check FILE...          a line each: "ok REBASES BINDS", or why it is refused
 *     check --sweep FILE     cut off everywhere, and with each bit of the load commands and the fixups turned: how many
 *                            are refused, "CUT of CUT, DAMAGED of DAMAGED" */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "image.h"

static char target[16];

static void *resolve(const char *library, const char *symbol) {
    return strlen(library) + strlen(symbol) > 0 ? target : NULL;
}

static unsigned char *read_file(const char *path, size_t *bytes) {
    FILE *file = fopen(path, "rb");
    if (file == NULL || fseek(file, 0, SEEK_END) != 0) exit(2);
    *bytes = (size_t)ftell(file);
    unsigned char *content = malloc(*bytes + 1);
    rewind(file);
    if (content == NULL || fread(content, 1, *bytes, file) != *bytes) exit(2);
    fclose(file);
    return content;
}

/* Whether it is refused. The copy has the file's size exactly, so that a read behind it is seen. */
static int refused(const unsigned char *content, size_t bytes, int say) {
    char error[512] = "";
    unsigned char *copy = malloc(bytes > 0 ? bytes : 1);
    if (copy == NULL) exit(2);
    memcpy(copy, content, bytes);
    struct image *image = image_load(copy, bytes, resolve, error, sizeof error);
    free(copy);
    if (image != NULL) image_symbol(image, "no such function");
    if (say && image != NULL) {
        const struct image_counts counts = image_counts(image);
        printf("ok %lld %lld\n", (long long)counts.rebases, (long long)counts.binds);
    }
    if (say && image == NULL) printf("%s\n", error);
    if (image == NULL && error[0] == '\0') exit(3);
    image_free(image);
    return image == NULL;
}

/* Where the fixups are: from the first to the exports, which nothing reads. */
static void find_fixups(const unsigned char *content, size_t end, unsigned *from, unsigned *to) {
    unsigned command[11]; /* LC_DYLD_INFO_ONLY: kind, size, then an offset and a size of five parts */
    for (size_t at = 32; at + sizeof command <= end; at += command[1]) {
        memcpy(command, content + at, sizeof command);
        *from = command[2];
        *to = command[10];
        if (command[0] == 0x80000022 || command[1] == 0) return;
    }
}

static void sweep(const char *path) {
    size_t bytes;
    unsigned char *content = read_file(path, &bytes);
    unsigned commands, from = 0, to = 0;
    if (bytes < 32) exit(2);
    memcpy(&commands, content + 20, sizeof commands);
    find_fixups(content, 32 + commands, &from, &to);
    int cuts = 0, cut = 0, damages = 0, damaged = 0;
    for (size_t size = 0; size < bytes; size += size < 4096 ? 1 : 61) {
        cuts++;
        cut += refused(content, size, 0);
    }
    for (size_t at = 0; at < bytes; at++) {
        if (at >= 32 + commands && (at < from || at >= to)) continue;
        for (int bit = 0; bit < 8; bit++) {
            content[at] ^= (unsigned char)(1 << bit);
            damages++;
            damaged += refused(content, bytes, 0);
            content[at] ^= (unsigned char)(1 << bit);
        }
    }
    printf("%d of %d, %d of %d\n", cut, cuts, damaged, damages);
    free(content);
}

int main(int n, char **arguments) {
    if (n == 3 && strcmp(arguments[1], "--sweep") == 0) {
        sweep(arguments[2]);
        return 0;
    }
    for (int i = 1; i < n; i++) {
        size_t bytes;
        unsigned char *content = read_file(arguments[i], &bytes);
        refused(content, bytes, 1);
        free(content);
    }
    return 0;
}
