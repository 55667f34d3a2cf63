#!/usr/bin/env bash
# Checks of the C core beyond the Python suite: warnings as errors, the C drivers of this folder under ASan+UBSan and
# TSan, and the Python kernel and API tests over extensions built with sanitizers.
#
#   PYTHON=python3 BUILD=/tmp/anellm-native bash tests/native/check.sh
#
# PYTHON needs cffi, setuptools, numpy, safetensors, rich, pytest, hypothesis. BUILD is a scratch folder.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
BUILD=${BUILD:-$(mktemp -d)}
CC=${CC:-gcc}
mkdir -p "$BUILD"

COMMON=(-std=gnu11 -D_GNU_SOURCE -Icsrc -pthread)
mapfile -t SOURCES < <(find csrc -name '*.c' | sort)

echo "-- warnings as errors: ${#SOURCES[@]} files"
for file in "${SOURCES[@]}"; do
    "$CC" "${COMMON[@]}" -O2 -Wall -Wextra -Wshadow -Wvla -Wconversion -Werror -c "$file" -o "$BUILD/object.o"
done

ASAN=(-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1)
TSAN=(-fsanitize=thread -fno-omit-frame-pointer -g -O1)
export UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1

for driver in tests/native/test_*.c; do
    name=$(basename "$driver" .c)
    echo "-- $name under ASan+UBSan, then TSan"
    "$CC" "${COMMON[@]}" "${ASAN[@]}" "$driver" "${SOURCES[@]}" -o "$BUILD/$name.asan" -lm
    "$BUILD/$name.asan"
    "$CC" "${COMMON[@]}" "${TSAN[@]}" "$driver" "${SOURCES[@]}" -o "$BUILD/$name.tsan" -lm
    "$BUILD/$name.tsan"
done

# build_with NAME FLAGS...: the package with an extension built with these flags, in $BUILD/NAME/lib
build_with() {
    local name=$1
    shift
    ANELLM_CFLAGS="$*" "$PYTHON" setup.py -q build --build-base "$BUILD/$name" --build-lib "$BUILD/$name/lib" \
        > "$BUILD/$name.log" 2>&1 || { cat "$BUILD/$name.log"; exit 1; }
}

echo "-- kernel and model tests over an ASan+UBSan extension, with AMX emulated where the CPU has AVX512_BF16"
build_with asan "${ASAN[@]}" -DANELLM_AMX_EMULATED
# Leaks are the C drivers' business: CPython keeps memory until exit on purpose.
LD_PRELOAD="$("$CC" -print-file-name=libasan.so) $("$CC" -print-file-name=libubsan.so)" \
    ASAN_OPTIONS=detect_leaks=0 PYTHONPATH="$BUILD/asan/lib" \
    "$PYTHON" -m pytest -q -p no:cacheprovider tests/kernels tests/model \
    --deselect tests/kernels/test_cpu.py::test_features_agree_with_the_kernel  # what is emulated is no feature

echo "-- API tests over a TSan extension"
build_with tsan "${TSAN[@]}"
LD_PRELOAD="$("$CC" -print-file-name=libtsan.so)" PYTHONPATH="$BUILD/tsan/lib" \
    "$PYTHON" -m pytest -q -p no:cacheprovider tests/api
