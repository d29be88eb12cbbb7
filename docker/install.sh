#!/bin/sh
# The images' second stage: a virtual environment with the wheel and some of its extras. CI runs it too.
# Usage: docker/install.sh FOLDER_OF_THE_WHEEL VIRTUAL_ENVIRONMENT EXTRAS
set -eu
wheel=$(ls -t "$1"/mgn_deploy-*.whl | head -n 1)
python3 -m venv "$2"
"$2/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir "$wheel[$3]"
