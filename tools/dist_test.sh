#!/usr/bin/env bash
# Test in several processes of one machine, or of each of several: torchrun of test.py.
#   [NNODES=1 NODE_RANK=0 MASTER_ADDR=127.0.0.1 PORT=29500] \
#       dist_test.sh CONFIG CHECKPOINT GPUS [OPTIONS of test.py]

if [[ $# -lt 3 || ! $3 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: [PORT=29500] $0 CONFIG CHECKPOINT GPUS [OPTIONS of test.py]" >&2
    exit 2
fi

exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$3" \
    "$(dirname "$0")/test.py" "$1" "$2" --launcher pytorch "${@:4}"
