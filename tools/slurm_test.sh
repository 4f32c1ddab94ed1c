#!/usr/bin/env bash
# tools/slurm_test.sh PARTITION JOB CONFIG CHECKPOINT [ARGS of tools/test.py]
#
# Tests in the foreground, one task per GPU. CHECKPOINT may be - for what the config loads by itself,
# or what --weights and --head name.
#
# Environment: GPUS (8), GPUS_PER_NODE (8, or GPUS if fewer), CPUS_PER_TASK (5), SRUN_ARGS, and
# DRY_RUN=1 to print the command, without Slurm; see tools/slurm_train.sh.
set -euo pipefail

if (($# < 4)); then
    echo "$0: usage: [GPUS=8] [SRUN_ARGS=...] $0 PARTITION JOB CONFIG CHECKPOINT [ARGS]" >&2
    exit 2
fi
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$ROOT/tools/slurm_allocation.sh" "$1" "$2" "$3"
CONFIG=$3
CHECKPOINT=()
if [[ $4 != - ]]; then CHECKPOINT=("$4"); fi
shift 4

COMMAND=(srun "${ALLOCATION[@]}" --kill-on-bad-exit=1 "${EXTRA[@]}" "${PYTHON:-python}" -u
    "$ROOT/tools/test.py" "$CONFIG" "${CHECKPOINT[@]}" --launcher slurm "$@")
if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "${COMMAND[@]}"
    echo
    exit 0
fi
exec "${COMMAND[@]}"
