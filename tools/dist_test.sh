#!/usr/bin/env bash
# tools/dist_test.sh CONFIG CHECKPOINT GPUS [ARGS of tools/test.py]
#
# GPUS processes on this machine, as in tools/dist_train.sh. CHECKPOINT may be - for what the config
# loads by itself, or what --weights and --head name.
set -euo pipefail

if (($# < 3)); then
    echo "usage: $0 CONFIG CHECKPOINT GPUS [ARGS of tools/test.py]" >&2
    exit 2
fi
CONFIG=$1
GPUS=$3
CHECKPOINT=()
if [[ $2 != - ]]; then CHECKPOINT=("$2"); fi
shift 3
exec bash "$(dirname "${BASH_SOURCE[0]}")/dist_launch.sh" test.py "$CONFIG" "$GPUS" \
    "${CHECKPOINT[@]}" "$@"
