#!/usr/bin/env bash
# Train under Slurm, one process for each GPU: srun of train.py.
#   [GPUS=8 GPUS_PER_NODE=8 CPUS_PER_TASK=5 SRUN_ARGS=...] \
#       slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [OPTIONS of train.py]

if [[ $# -lt 4 ]]; then
    echo "usage: [GPUS=8 GPUS_PER_NODE=8 CPUS_PER_TASK=5 SRUN_ARGS=...]" \
        "$0 PARTITION JOB_NAME CONFIG WORK_DIR [OPTIONS of train.py]" >&2
    exit 2
fi

# SRUN_ARGS is split into words: it holds several arguments
exec srun -p "$1" \
    --job-name="$2" \
    --gres="gpu:${GPUS_PER_NODE:-8}" \
    --ntasks="${GPUS:-8}" \
    --ntasks-per-node="${GPUS_PER_NODE:-8}" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    ${SRUN_ARGS:-} \
    python -u "$(dirname "$0")/train.py" "$3" --work-dir="$4" --launcher=slurm "${@:5}"
