/* What Python calls, with ctypes (loader.py), and what main.c does. Images stay until the process ends. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "image.h"
#include "machorun.h"

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
