#!/bin/sh
# Of `make gpu-bundle`: ./run.sh [--output FOLDER] [--stages NAMES]
cd "$(dirname "$0")" || exit
test -d site || python3 -m pip install --quiet --no-index --no-deps --target site fused_resnet-*.whl || exit
PYTHONPATH="$PWD/site" exec python3 benchmarks/first_light.py "$@"
