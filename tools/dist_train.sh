#!/usr/bin/env bash
# Train in several processes of one machine, or of each of several: torchrun of train.py.
#   [NNODES=1 NODE_RANK=0 MASTER_ADDR=127.0.0.1 PORT=29500] \
#       dist_train.sh CONFIG GPUS [OPTIONS of train.py]

if [[ $# -lt 2 || ! $2 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: [PORT=29500] $0 CONFIG GPUS [OPTIONS of train.py]" >&2
    exit 2
fi

exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$2" \
    "$(dirname "$0")/train.py" "$1" --launcher pytorch "${@:3}"
