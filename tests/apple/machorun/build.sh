#!/usr/bin/env bash
# The loader of macOS libraries, for arm64 Linux: a library for Python's ctypes, and a program.
#
#   CC=aarch64-linux-gnu-gcc bash tests/apple/machorun/build.sh FOLDER [SOURCES]
#
# Leaves FOLDER/libmachorun.so and FOLDER/machorun. With SOURCES, only the program is made anew: a file of that folder
# takes the place of the one of its name, and the others are taken as they were compiled before.
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
read -ra CC <<<"${CC:-aarch64-linux-gnu-gcc}"
FLAGS=(-std=gnu11 -D_GNU_SOURCE -O1 -fPIC -pthread -fno-builtin -Wall -Wextra -Wshadow -Wvla -Wconversion -Werror
    -DANELLM_ACCELERATE_SHIM -DACCELERATE_NEW_LAPACK -I"$here" -I"$here/../macstub/include")

if [ $# -gt 1 ]; then
    sources=("$2"/*)
else
    sources=("$here"/{image,libsystem,python,bindings,machorun,main}.c "$here/variadic.S"
        "$here/../accelerate/accelerate.c")
fi
for source in "${sources[@]}"; do
    "${CC[@]}" "${FLAGS[@]}" -c "$source" -o "$folder/$(basename "$source").o"
done
main=("$folder/main.c.o") library=()
for object in "$folder"/*.o; do [ "$object" = "${main[0]}" ] || library+=("$object"); done
"${CC[@]}" -pthread -static "${main[@]}" "${library[@]}" -o "$folder/machorun" -lm
[ $# -gt 1 ] || "${CC[@]}" -pthread -shared "${library[@]}" -o "$folder/libmachorun.so" -lm
