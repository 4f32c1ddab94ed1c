#!/usr/bin/env bash
# tools/slurm_train.sh PARTITION JOB CONFIG WORK_DIR [ARGS of tools/train.py]
#
# Submits a batch job, one task per GPU, and returns; its output goes to WORK_DIR/slurm-<job>.out.
# Before the time limit Slurm sends a signal: the run saves a checkpoint, ends, and is queued again
# with the same arguments. The same holds for a preemption that requeues. --resume is always given,
# so the job goes on from its newest checkpoint, or starts where there is none. With --resume PATH
# among ARGS it goes back to that checkpoint once: queued again, it goes on with its newest.
#
# Environment:
#   GPUS (8), GPUS_PER_NODE (8, or GPUS if fewer), CPUS_PER_TASK (5)
#   SRUN_ARGS       further options of the allocation: '--time=2-00:00:00 --account=X --qos=Y'
#   SIGNAL_SECONDS  how long before the limit to save and stop (300)
#   SUBMIT          sbatch (default), or srun: run in the foreground, as inside of an salloc
#   DRY_RUN=1       print what would be submitted, without Slurm
set -euo pipefail

if (($# < 4)); then
    echo "$0: usage: [GPUS=8] [SRUN_ARGS=...] $0 PARTITION JOB CONFIG WORK_DIR [ARGS]" >&2
    exit 2
fi
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$ROOT/tools/slurm_allocation.sh" "$1" "$2" "$3"
CONFIG=$3
WORK_DIR=$4
shift 4
SUBMIT=${SUBMIT:-sbatch}
[[ $SUBMIT == sbatch || $SUBMIT == srun ]] || fail "SUBMIT is sbatch or srun, not $SUBMIT"

RESUME=(--resume)
for word in "$@"; do
    [[ $word != --resume && $word != --resume=* ]] || RESUME=()
done
TRAIN=("${PYTHON:-python}" -u "$ROOT/tools/train.py" "$CONFIG" "${RESUME[@]}"
    --work-dir "$WORK_DIR" --launcher slurm "$@")

if [[ $SUBMIT == srun ]]; then
    COMMAND=(srun "${ALLOCATION[@]}" --kill-on-bad-exit=1 "${EXTRA[@]}" "${TRAIN[@]}")
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        printf '%q ' "${COMMAND[@]}"
        echo
        exit 0
    fi
    exec "${COMMAND[@]}"
fi

batch_script() {
    echo '#!/usr/bin/env bash'
    printf '#SBATCH %s\n' "${ALLOCATION[@]}" "--output=\"$WORK_DIR/slurm-%j.out\"" \
        --open-mode=append --requeue "--signal=B:USR1@${SIGNAL_SECONDS:-300}" "${EXTRA[@]}"
    printf '\nexport PYTHONPATH=%q\n' "$PYTHONPATH"
    # Slurm gives a step the CPUs per task of its job only if it is told.
    printf 'srun --kill-on-bad-exit=1 --cpus-per-task=%q' "$CPUS_PER_TASK"
    printf ' %q' "${TRAIN[@]}"
    echo ' &'
    cat <<'EOF'
STEP=$!
REQUEUE=0
# The limit is near: the step saves and ends, the job is queued again.
trap 'REQUEUE=1; kill -USR1 "$STEP"' USR1
# Preempted, and then queued again by Slurm itself; or cancelled.
trap 'kill -USR1 "$STEP"' TERM
wait "$STEP" && STATUS=0 || STATUS=$?
# A signal ends the wait, not the step.
while kill -0 "$STEP" 2>/dev/null; do
    wait "$STEP" && STATUS=0 || STATUS=$?
done
if ((REQUEUE && STATUS == 0)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$STATUS"
EOF
}

if [[ ${DRY_RUN:-0} == 1 ]]; then
    batch_script
    exit 0
fi
mkdir -p "$WORK_DIR"
batch_script | sbatch
