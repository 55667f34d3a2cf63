#!/usr/bin/env bash
# Build device_ane.m for GNUstep on Linux, with the fake framework and the driver:
#   build.sh OUT                       everything, into the folder OUT:
#       libaneshim.so                  IOSurface, CoreFoundation, sysctl
#       libAppleNeuralEngine.so        the fake framework: what ANELLM_ANE_FRAMEWORK names
#       libane_device.so               the device: what ANELLM_ANE_DEVICE names
#       libIOReport.so                 the fake energy counters: what ANELLM_IOREPORT names
#       libpower.so                    power_apple.m alone
#       driver, power_driver           tests/apple/*.c
#   build.sh OUT fake NAME FLAGS...    another fake framework beside it, with macros of fake_ane.m
#   build.sh OUT device NAME SOURCE    another device beside it, from another device_ane.m
#   build.sh OUT power NAME SOURCE     another libpower.so beside it, from another power_apple.m
# FLAGS adds to the flags of all but the simulator's files, for sanitizers. OBJECTS names the folder objects/ of another
# build, whose simulator is taken. Debian packages: clang libgnustep-base-dev libclang-rt-14-dev.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
what=${2:-everything}
mkdir -p "$1/objects/include"
out=$(cd "$1" && pwd)
objects=$out/objects
CLANG=${CLANG:-clang}
# Only objc/ of gcc's headers: its stdatomic.h is not for clang.
ln -sfn "$(gcc -print-file-name=include)/objc" "$objects/include/objc"

read -ra extra <<<"${FLAGS:-}"
warnings=(-Wall -Wextra -Wshadow -Wvla -Wconversion -Wno-sign-conversion -Werror)
# valgrind 3.19 does not read the DWARF 5 that clang writes by default.
plain=(-O1 -gdwarf-4 -fPIC -D_GNU_SOURCE "-I$root/csrc" "-I$here")
common=("${plain[@]}" "${warnings[@]}" "${extra[@]}")
objc=(-fobjc-runtime=gcc -fobjc-exceptions -fexceptions -fconstant-string-class=NSConstantString -DGNUSTEP
      -DGNUSTEP_BASE_LIBRARY=1 -DGNU_RUNTIME=1 -D_NATIVE_OBJC_EXCEPTIONS -isystem /usr/include/GNUstep
      "-I$here/shim/include" -idirafter "$objects/include")
runtime=("-L$out" "-Wl,-rpath,\$ORIGIN" -Wl,--no-as-needed -lgnustep-base
         "-L$(dirname "$(gcc -print-libgcc-file-name)")" -lobjc -lm -ldl -lpthread)

compile_objc() { "$CLANG" "${common[@]}" "${objc[@]}" "${@:3}" -c -x objective-c "$1" -o "$objects/$2.o"; }
compile_c() { "$CLANG" -std=gnu11 "${common[@]}" "${@:3}" -c "$1" -o "$objects/$2.o"; }
link_device() { # OBJECT LIBRARY
    "$CLANG" "${extra[@]}" -shared "$objects/$1.o" "$objects/power.o" "$objects"/host-*.o -laneshim "${runtime[@]}" \
        -o "$out/$2"
}
link_power() { # OBJECT LIBRARY
    "$CLANG" "${extra[@]}" -shared "$objects/$1.o" "$objects/host-power_library.c.o" -laneshim "${runtime[@]}" \
        -o "$out/$2"
}
link_fake() { "$CLANG" "${extra[@]}" -shared "$objects/$1.o" -laneshim "${runtime[@]}" -o "$out/$2"; }

case $what in
fake)
    compile_objc "$here/fake_ane.m" "$3" "${@:4}"
    link_fake "$3" "$3"
    exit
    ;;
device)
    compile_objc "$4" "$3" -fvisibility=hidden
    link_device "$3" "$3"
    exit
    ;;
power)
    compile_objc "$4" "$3" -fvisibility=hidden
    link_power "$3" "$3"
    exit
    ;;
esac

pids=()
background() { "$@" & pids+=($!); }
finish() { for pid in "${pids[@]}"; do wait "$pid"; done; pids=(); }
background compile_objc "$here/shim/apple_shim.m" shim
background compile_objc "$here/fake_ane.m" fake
background compile_objc "$here/fake_ioreport.m" ioreport
background compile_objc "$root/csrc/backend/ane/device_ane.m" device -fvisibility=hidden
background compile_objc "$root/csrc/core/power_apple.m" power -fvisibility=hidden
for source in tests/apple/{host,power_library}.c csrc/backend/ane/signature.c csrc/backend/sim/{mil_lex,mil_parse,pool}.c; do
    background compile_c "$root/$source" "host-$(basename "$source")" -fvisibility=hidden
done
finish
"$CLANG" "${extra[@]}" -shared "$objects/shim.o" "${runtime[@]}" -o "$out/libaneshim.so"
link_fake fake libAppleNeuralEngine.so
link_device device libane_device.so
link_power power libpower.so
link_fake ioreport libIOReport.so

# The driver has the simulator, and none of the kernels. Warnings of these files are asked for elsewhere.
core=${OBJECTS:-$objects}
background compile_c "$here/driver.c" driver
background compile_c "$here/power_driver.c" power_driver
for source in "$root"/csrc/backend/sim/*.c "$root"/csrc/core/*.c "$root"/csrc/backend/ane/{device,blob}.c; do
    [ -z "${OBJECTS:-}" ] || break
    background "$CLANG" -std=gnu11 "${plain[@]}" -w -c "$source" -o "$objects/core-$(basename "$source").o"
    [ ${#pids[@]} -lt 8 ] || finish
done
finish
# The Objective-C libraries are there from the start, so that leak checkers can name what they allocate.
"$CLANG" "${extra[@]}" "$objects/driver.o" "$core"/core-*.o -laneshim "${runtime[@]}" -o "$out/driver"
"$CLANG" "${extra[@]}" "$objects/power_driver.o" "$core"/core-{power,status}.c.o -laneshim "${runtime[@]}" \
    -o "$out/power_driver"
