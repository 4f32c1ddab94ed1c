# Sourced by slurm_train.sh and slurm_test.sh with PARTITION JOB CONFIG: checks them and sets
# ALLOCATION and EXTRA, the options of the job, and PYTHONPATH.
fail() {
    echo "$0: $1" >&2
    exit 2
}

GPUS=${GPUS:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-$((GPUS < 8 ? GPUS : 8))}
CPUS_PER_TASK=${CPUS_PER_TASK:-5}
((GPUS > 0 && GPUS_PER_NODE > 0)) || fail "GPUS and GPUS_PER_NODE must be positive"
((GPUS % GPUS_PER_NODE == 0)) ||
    fail "GPUS=$GPUS is no multiple of GPUS_PER_NODE=$GPUS_PER_NODE: nodes must be alike"
[[ -f $3 ]] || fail "there is no config $3"

ALLOCATION=("--partition=$1" "--job-name=$2" "--nodes=$((GPUS / GPUS_PER_NODE))"
    "--ntasks=$GPUS" "--ntasks-per-node=$GPUS_PER_NODE" "--gres=gpu:$GPUS_PER_NODE"
    "--cpus-per-task=$CPUS_PER_TASK")
# SRUN_ARGS is a list of words on purpose.
# shellcheck disable=SC2206
EXTRA=(${SRUN_ARGS:-})
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
