#!/usr/bin/env bash
# tools/slurm_train.sh PARTITION JOB CONFIG WORK_DIR [ARGS of tools/train.py]
#
# Environment: GPUS (8), GPUS_PER_NODE (8 or GPUS), CPUS_PER_TASK (5), SRUN_ARGS.
# One task per GPU. Preempted jobs: SRUN_ARGS='--signal=TERM@120' saves a checkpoint in time, and
# ARGS with --resume goes on from the newest one, or starts when there is none.
set -euo pipefail

if (($# < 4)); then
    echo "usage: [GPUS=8] [SRUN_ARGS=...] $0 PARTITION JOB CONFIG WORK_DIR [ARGS]" >&2
    exit 2
fi
PARTITION=$1
JOB=$2
CONFIG=$3
WORK_DIR=$4
shift 4
GPUS=${GPUS:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-$((GPUS < 8 ? GPUS : 8))}
CPUS_PER_TASK=${CPUS_PER_TASK:-5}
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

# SRUN_ARGS is a list of words on purpose.
# shellcheck disable=SC2086
exec srun --partition="$PARTITION" --job-name="$JOB" --gres="gpu:$GPUS_PER_NODE" \
    --ntasks="$GPUS" --ntasks-per-node="$GPUS_PER_NODE" --cpus-per-task="$CPUS_PER_TASK" \
    --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "$ROOT/tools/train.py" "$CONFIG" --work-dir "$WORK_DIR" \
    --launcher slurm "$@"
