#!/usr/bin/env bash
# tools/dist_train.sh CONFIG GPUS [ARGS of tools/train.py]
#
# GPUS processes on this machine: one per GPU, or gloo ranks on the CPU where there are no GPUs.
# GPUS=0 is one process on the CPU. Several machines: see tools/dist_launch.sh.
set -euo pipefail

if (($# < 2)); then
    echo "usage: $0 CONFIG GPUS [ARGS of tools/train.py]" >&2
    exit 2
fi
exec bash "$(dirname "${BASH_SOURCE[0]}")/dist_launch.sh" train.py "$@"
