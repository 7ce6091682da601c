#!/usr/bin/env bash
# Gathers, for a GPU machine without network, the packages that its image may lack: wheels for
# CPython 3.12 on x86-64 Linux into .carry/, which git ignores. bench/on_gpu.sh installs what it
# finds there, offline, before anything else.
#
#   bash bench/carry.sh               what the library and its tests need
#   bash bench/carry.sh xformers==0.0.35     and a peer to be timed against
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
NEEDED=(tyro typeguard docstring-parser simplejpeg)
PLATFORMS=(manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64)
mkdir -p .carry
for package in "${NEEDED[@]}" "$@"; do
    "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --python-version 3.12 --implementation cp "${PLATFORMS[@]/#/--platform=}" -d .carry "$package"
done
ls -1 .carry
