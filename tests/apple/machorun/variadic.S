/* Apple's arm64 passes what stands for "..." on the stack, 8 bytes each, whatever its type; Linux passes it in
 * registers first. Each entry below is what an image calls in the place of a function with "..."; it passes on the
 * address of that part of the stack, as one more argument after those with names, to a function of libsystem.c or
 * python.c that reads it from there.
 * (Apple, "Writing ARM64 code for Apple platforms", Update code that passes arguments to variadic functions) */
.macro VARIADIC name, target, register
    .globl  \name
    .hidden \name
    .type   \name, %function
\name:
    mov     \register, sp
    b       \target
    .size   \name, . - \name
.endm

    .text
    .balign 4
    VARIADIC variadic_snprintf, macos_vsnprintf, x3
    VARIADIC variadic_snprintf_chk, macos_vsnprintf_chk, x5
    VARIADIC variadic_open, macos_open, x2
    VARIADIC variadic_PyArg_UnpackTuple, macos_PyArg_UnpackTuple, x4
    VARIADIC variadic_PyObject_CallMethod, macos_PyObject_CallMethod, x3

    .section .note.GNU-stack, "", %progbits
