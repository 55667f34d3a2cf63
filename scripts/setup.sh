#!/bin/sh
# Install anellm from this folder into a virtual environment, with whatever that needs on a fresh machine.
#
#   sh scripts/setup.sh [EXTRAS] [VENV]      e.g. sh scripts/setup.sh test
#
# EXTRAS: optional dependencies as in pyproject.toml ("test", "test,bench"; "" for none). VENV: where [.venv].
# System packages are installed only when something is missing, with apt-get (as root or through sudo).
set -eu
cd "$(dirname "$0")/.."
extras=${1:-}
venv=${2:-.venv}
python=${PYTHON:-python3}

fail() {
    echo "setup: $*" >&2
    exit 1
}

missing() {
    command -v cc >/dev/null 2>&1 || command -v gcc >/dev/null 2>&1 || echo gcc libc6-dev
    command -v "$python" >/dev/null 2>&1 || { echo python3 python3-dev python3-venv; return; }
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
    "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || echo python3-dev
}

# shellcheck disable=SC2046  # a list of words
set -- $(missing)
if [ $# -gt 0 ]; then
    [ "$(uname -s)" = Linux ] || fail "missing: $*; on a Mac, xcode-select --install brings a compiler"
    command -v apt-get >/dev/null 2>&1 || fail "missing: $*; install them with your system's package manager"
    as_root=
    [ "$(id -u)" = 0 ] || as_root=sudo
    $as_root apt-get update -qq
    $as_root apt-get install -y -qq --no-install-recommends "$@"
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "expected Python 3.11 or newer, found $("$python" --version 2>&1); set PYTHON=python3.x"

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install -q --disable-pip-version-check ".${extras:+[$extras]}"
