#!/usr/bin/env bash
# An arm64 Debian with Python, NumPy and cffi in a folder, for qemu's user-mode emulation: the packages are unpacked,
# not installed, with an apt state of their own. Needs apt-get, dpkg and a network, and a Python with pip in PYTHON.
#
#   PYTHON=python3 bash tests/apple/machorun/sysroot.sh FOLDER
#
# Leaves FOLDER/root (/lib, /usr) and FOLDER/site (for PYTHONPATH), 120 MB together; ANELLM_ARM64_ROOT=FOLDER then lets
# tests/apple/test_macos_loader.py run.
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
PYTHON=${PYTHON:-python3}

rm -rf "$folder/apt" "$folder/root" "$folder/site" "$folder/wheels"
mkdir -p "$folder"/apt/state/lists/partial "$folder"/apt/cache/archives/partial "$folder"/{root,site,wheels}
: >"$folder/apt/status"
apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Install-Recommends=false
    -o APT::Sandbox::User="$(id -un)" -o Debug::NoLocking=true -o Dir::State="$folder/apt/state"
    -o Dir::State::status="$folder/apt/status" -o Dir::Cache="$folder/apt/cache")
"${apt[@]}" update
"${apt[@]}" install -y --download-only python3-minimal libpython3-stdlib zlib1g libstdc++6 >/dev/null
for package in "$folder"/apt/cache/archives/*.deb; do dpkg -x "$package" "$folder/root"; done

version=$(basename "$(find "$folder/root/usr/bin" -name 'python3.*' | head -n 1)")
"$PYTHON" -m pip download -q --disable-pip-version-check --no-deps --only-binary :all: -d "$folder/wheels" \
    --python-version "${version#python}" --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
    --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 'numpy>=1.26' 'cffi>=2.0'
for wheel in "$folder"/wheels/*.whl; do "$PYTHON" -m zipfile -e "$wheel" "$folder/site"; done
rm -rf "$folder/apt" "$folder/wheels" "$folder"/site/numpy/*/tests "$folder"/root/usr/share
