/* The loader as a program, for libraries that need no Python.
 *
 *     machorun IMAGE FUNCTION      call a function without arguments and print its result, an int; exit code 1
 *                                  unless it is 0
 *     machorun                     the bindings, a line "library symbol kind" each
 *
 * The exit code is 2, with the reason on standard error, if the image is refused. */
#include <stdio.h>

#include "machorun.h"

static void list(const struct binding *binding) {
    static const char *const kinds[] = {
        [BINDING_SAME] = "same", [BINDING_ADAPTED] = "adapted", [BINDING_SHIM] = "shim", [BINDING_REFUSED] = "refused"};
    for (; binding->symbol != NULL; binding++)
        printf("%s %s %s\n", binding->library, binding->symbol, kinds[binding->kind]);
}

int main(int n, char **arguments) {
    char error[512] = "";
    int (*function)(void) = NULL;
    if (n == 1) {
        list(machorun_libsystem);
        list(machorun_python);
        list(machorun_frameworks);
        return 0;
    }
    if (n == 3) *(void **)&function = machorun_open(arguments[1], arguments[2], error, sizeof error);
    if (function == NULL) {
        fprintf(stderr, "%s\n", n == 3 ? error : "usage: machorun [IMAGE FUNCTION]");
        return 2;
    }
    const int result = function();
    printf("%d\n", result);
    return result != 0;
}
