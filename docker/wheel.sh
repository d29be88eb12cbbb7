#!/bin/sh
# The images' first stage, in a copy of the repository: the wheel into a folder. CI runs it too.
# Usage: docker/wheel.sh FOLDER
set -eu
python3 -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$1" .
