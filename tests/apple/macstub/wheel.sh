#!/usr/bin/env bash
# The macOS arm64 wheel, cross-built on Linux with zig (pip install ziglang), the stub headers of this folder, and its
# .tbd files, which list the symbols of Apple's libraries that may be linked. It is for tests: what is released is built
# on a Mac.
#
#   PYTHON=python3 bash tests/apple/macstub/wheel.sh FOLDER
#
# PYTHON has ziglang, setuptools and cffi. Leaves the wheel in FOLDER.
set -euo pipefail
mkdir -p "$1"
folder=$(cd "$1" && pwd)
stubs=$(cd "$(dirname "$0")" && pwd)
cd "$stubs/../../.."
PYTHON=${PYTHON:-python3}
ZIG="$PYTHON -m ziglang cc -target aarch64-macos.14.0 -I$stubs/include -F$stubs/Frameworks -L$stubs/lib"

# A copy, so that objects and metadata of this build stay out of the tree.
rm -rf "$folder/source"
mkdir -p "$folder/source/python"
cp -r csrc build_ext.py setup.py pyproject.toml MANIFEST.in README.md LICENSE NOTICE "$folder/source"
cp -r python/anellm "$folder/source/python"
rm -rf "$folder"/source/python/anellm/*.so
cd "$folder/source"
# setuptools takes flags for Linux from this Python's own configuration, unless it is told otherwise.
env -u CFLAGS -u LDFLAGS -u CPPFLAGS ANELLM_TARGET=darwin ANELLM_CFLAGS=-Werror \
    CC="$ZIG" LDSHARED="$ZIG -shared -undefined dynamic_lookup" _PYTHON_HOST_PLATFORM=macosx-14.0-arm64 \
    "$PYTHON" setup.py -q bdist_wheel -d "$folder"
