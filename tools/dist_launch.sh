#!/usr/bin/env bash
# tools/dist_launch.sh SCRIPT CONFIG GPUS [ARGS of SCRIPT]; what dist_train.sh and dist_test.sh stand on.
#
# GPUS processes on this machine: one per GPU, or gloo ranks on the CPU where there are no GPUs.
# GPUS=0 is one process on the CPU. The processes meet in a file and talk over the loopback
# interface. Several machines: the same command on each with NNODES, NODE_RANK, MASTER_ADDR, PORT.
set -euo pipefail

SCRIPT=$1
CONFIG=$2
GPUS=$3
shift 3
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python}
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

if ((GPUS == 0)); then
    CUDA_VISIBLE_DEVICES="" exec "$PYTHON" "$ROOT/tools/$SCRIPT" "$CONFIG" "$@"
fi

# torchrun would give each process one thread.
THREADS=$(($(getconf _NPROCESSORS_ONLN) / GPUS))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((THREADS > 0 ? THREADS : 1))}

if ((${NNODES:-1} > 1)); then
    MEETING=(--nnodes "$NNODES" --node-rank "${NODE_RANK:-0}"
        --master-addr "$MASTER_ADDR" --master-port "${PORT:-29500}")
else
    STORE=$(mktemp -u "${TMPDIR:-/tmp}/dinov3_mm_launch_XXXXXXXX")
    MEETING=(--nnodes 1 --rdzv-backend c10d --rdzv-endpoint "$STORE" --rdzv-conf store_type=file)
    # torchrun would open a store that listens to the network.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi
exec "$PYTHON" "$ROOT/tools/dist_launch.py" "${MEETING[@]}" --nproc-per-node "$GPUS" \
    "$ROOT/tools/$SCRIPT" "$CONFIG" --launcher pytorch "$@"
