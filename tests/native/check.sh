#!/usr/bin/env bash
# Checks of the C core beyond the Python suite: warnings as errors, the C drivers of this folder under ASan+UBSan and
# TSan, and the Python kernel, model, backend and API tests over extensions built with sanitizers.
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

COMMON=(-std=gnu11 -D_GNU_SOURCE -Icsrc -pthread -fPIC -fno-math-errno -fno-trapping-math -ffp-contract=fast)
mapfile -t SOURCES < <(find csrc -name '*.c' -not -path 'csrc/fuzz/*' | sort)
JOBS=$(nproc)

# compile NAME FLAGS...: every source with these flags, into $BUILD/NAME.a
compile() {
    local name=$1
    shift
    rm -rf "${BUILD:?}/$name.objects" "$BUILD/$name.a"
    mkdir -p "$BUILD/$name.objects"
    printf '%s\n' "${SOURCES[@]}" | BUILD="$BUILD/$name.objects" xargs -P "$JOBS" -I{} sh -c '
        source=$1
        shift
        exec "$@" -c "$source" -o "$BUILD/$(echo "$source" | tr / -).o"' sh {} "$CC" "${COMMON[@]}" "$@"
    ar rcs "$BUILD/$name.a" "$BUILD/$name.objects"/*.o
}

echo "-- warnings as errors: ${#SOURCES[@]} files, and the fuzzing entries"
compile warnings -O2 -Wall -Wextra -Wshadow -Wvla -Wconversion -Werror
for file in csrc/fuzz/*.c; do
    "$CC" "${COMMON[@]}" -O2 -Wall -Wextra -Wshadow -Wvla -Wconversion -Werror -c "$file" -o "$BUILD/object.o"
done

ASAN=(-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1 -DANELLM_AMX_EMULATED)
TSAN=(-fsanitize=thread -fno-omit-frame-pointer -g -O1)
export UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1

compile asan "${ASAN[@]}"
compile tsan "${TSAN[@]}"
for driver in tests/native/test_*.c; do
    name=$(basename "$driver" .c)
    echo "-- $name under ASan+UBSan, then TSan"
    "$CC" "${COMMON[@]}" "${ASAN[@]}" "$driver" "$BUILD/asan.a" -o "$BUILD/$name.asan" -lm -ldl
    "$BUILD/$name.asan"
    "$CC" "${COMMON[@]}" "${TSAN[@]}" "$driver" "$BUILD/tsan.a" -o "$BUILD/$name.tsan" -lm -ldl
    "$BUILD/$name.tsan"
done

# extension NAME FLAGS...: the package with an extension of $BUILD/NAME.a, in $BUILD/NAME/lib
extension() {
    local name=$1 to=$BUILD/$1/lib/anellm
    shift
    mkdir -p "$BUILD/$name/lib"
    rm -rf "$to"
    cp -r python/anellm "$to"
    rm -f "$to"/_anellm*.so
    "$PYTHON" -c 'import sys; from build_ext import ffibuilder; ffibuilder.emit_c_code(sys.argv[1])' "$BUILD/_anellm.c"
    "$CC" "${COMMON[@]}" "$@" -DPy_LIMITED_API=0x030b0000 -w \
        "-I$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')" \
        -shared "$BUILD/_anellm.c" -Wl,--whole-archive "$BUILD/$name.a" -Wl,--no-whole-archive \
        -o "$to/_anellm.abi3.so" -lm -ldl
}

echo "-- kernel, model and backend tests over an ASan+UBSan extension, with AMX emulated where the CPU has AVX512_BF16"
extension asan "${ASAN[@]}"
# Leaks are the C drivers' business: CPython keeps memory until exit on purpose.
LD_PRELOAD="$("$CC" -print-file-name=libasan.so) $("$CC" -print-file-name=libubsan.so)" \
    ASAN_OPTIONS=detect_leaks=0 PYTHONPATH="$BUILD/asan/lib" \
    "$PYTHON" -m pytest -q -p no:cacheprovider -n "$JOBS" --dist worksteal tests/kernels tests/model tests/backend \
    --deselect tests/kernels/test_cpu.py::test_features_agree_with_the_kernel  # what is emulated is no feature

echo "-- API tests over a TSan extension"
extension tsan "${TSAN[@]}"
LD_PRELOAD="$("$CC" -print-file-name=libtsan.so)" PYTHONPATH="$BUILD/tsan/lib" \
    "$PYTHON" -m pytest -q -p no:cacheprovider tests/api
