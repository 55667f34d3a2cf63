#!/usr/bin/env bash
# The loader of macOS libraries, for arm64 Linux: a library for Python's ctypes, and a program.
#
#   CC=aarch64-linux-gnu-gcc bash tests/apple/machorun/build.sh FOLDER
#
# Leaves FOLDER/libmachorun.so and FOLDER/machorun.
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")"
read -ra CC <<<"${CC:-aarch64-linux-gnu-gcc}"
FLAGS=(-std=gnu11 -D_GNU_SOURCE -O1 -fPIC -pthread -fno-builtin -Wall -Wextra -Wshadow -Wvla -Wconversion -Werror
    -DANELLM_ACCELERATE_SHIM -DACCELERATE_NEW_LAPACK -I../macstub/include)
SOURCES=(image.c libsystem.c python.c bindings.c variadic.S machorun.c ../accelerate/accelerate.c)

"${CC[@]}" "${FLAGS[@]}" -shared "${SOURCES[@]}" -o "$folder/libmachorun.so" -lm
"${CC[@]}" "${FLAGS[@]}" -DMACHORUN_MAIN "${SOURCES[@]}" -o "$folder/machorun" -lm
