#!/usr/bin/env bash
# The C core for arm64 Linux, warnings as errors, and its C drivers, as static programs that qemu-user can run.
#
#   CC=aarch64-linux-gnu-gcc bash tests/apple/arm64/build.sh FOLDER
#   CC="python3 -m ziglang cc -target aarch64-linux-musl" bash tests/apple/arm64/build.sh FOLDER
#
# Leaves FOLDER/variants and FOLDER/test_NAME for each tests/native/test_NAME.c.
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/../../.."
read -ra CC <<<"${CC:-aarch64-linux-gnu-gcc}"

FLAGS=(-std=gnu11 -D_GNU_SOURCE -Icsrc -pthread -O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast
    -Wall -Wextra -Wshadow -Wvla -Wconversion -Werror)
LINK=(-static -Wl,--start-group)

rm -rf "$folder/objects"
mkdir -p "$folder/objects"
find csrc -name '*.c' -not -path 'csrc/fuzz/*' | sort | xargs -P "$(nproc)" -I{} sh -c '
    source=$1
    shift
    exec "$@" -c "$source" -o "'"$folder"'/objects/$(echo "$source" | tr / -).o"' sh {} "${CC[@]}" "${FLAGS[@]}"

# dlopen in a static program works only with this very libc, which the linker says each time: none of these call it.
link() { "${CC[@]}" "${FLAGS[@]}" "$@" "${LINK[@]}" "$folder"/objects/*.o -lm -ldl -Wl,--end-group 2>&1 |
    { grep -v -e 'statically linked applications requires at runtime' -e 'in function .anellm_' || true; }; }
link tests/apple/arm64/variants*.c -o "$folder/variants"
for driver in tests/native/test_*.c; do
    link "$driver" -o "$folder/$(basename "$driver" .c)"
done
