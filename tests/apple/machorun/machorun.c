/* What Python calls, with ctypes (loader.py), and with -DMACHORUN_MAIN a program that calls one function of an image:
 *
 *     machorun IMAGE FUNCTION      its result, an int, is the exit code; 125 if the image was refused
 *     machorun                     the bindings, a line "library symbol kind" each
 *
 * Images stay until the process ends. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "image.h"
#include "machorun.h"

/* Load the image at `path`, run its initialisers, and return a function of it; NULL with the reason in `error`. */
void *machorun_open(const char *path, const char *function, char *error, size_t error_bytes);
void *machorun_open(const char *path, const char *function, char *error, size_t error_bytes) {
    struct stat status;
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0 || fstat(file, &status) != 0) {
        snprintf(error, error_bytes, "%s: %s", path, strerror(errno));
        if (file >= 0) close(file);
        return NULL;
    }
    const size_t bytes = (size_t)status.st_size;
    void *content = bytes > 0 ? mmap(NULL, bytes, PROT_READ, MAP_PRIVATE, file, 0) : MAP_FAILED;
    close(file);
    const struct image *image = NULL;
    if (content == MAP_FAILED) {
        snprintf(error, error_bytes, "cannot read %zu bytes", bytes);
    } else {
        image = image_load(content, bytes, machorun_resolve, error, error_bytes);
        munmap(content, bytes);
    }
    if (image == NULL) return NULL;
    image_initialise(image);
    void *found = image_symbol(image, function);
    if (found == NULL) snprintf(error, error_bytes, "the image does not export %s", function);
    return found;
}

#if defined(MACHORUN_MAIN)
static void list(const struct binding *binding) {
    static const char *const kinds[] = {"same", "adapted", "shim", "refused"};
    for (; binding->symbol != NULL; binding++)
        printf("%s %s %s\n", binding->library, binding->symbol, kinds[binding->kind]);
}

int main(int n, char **arguments) {
    char error[512] = "";
    if (n == 1) {
        list(machorun_libsystem);
        list(machorun_python);
        list(machorun_frameworks);
        return 0;
    }
    int (*function)(void) = NULL;
    if (n == 3) *(void **)&function = machorun_open(arguments[1], arguments[2], error, sizeof error);
    if (function != NULL) return function();
    fprintf(stderr, "%s\n", n == 3 ? error : "usage: machorun [IMAGE FUNCTION]");
    return 125;
}
#endif
