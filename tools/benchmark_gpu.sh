#!/usr/bin/env bash
# From a bare GPU machine (torch with CUDA, a compiler, no network) to the whole table on the GPU.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: tools/benchmark_gpu.sh [--wheels DIR] [--out DIR] [--without-detectors] [--dry-run]

Makes a virtual environment over the system's torch, builds mmcv for the GPU that is there, runs
the tests that a GPU can fail, and measures everything into one folder; about 25 minutes.

  --wheels DIR         packages to install, for a machine without network. To fill it elsewhere,
                       with the same Python and system:
                         pip download -d DIR mmengine==0.10.7 mmdet==3.3.0 mmsegmentation==1.2.2 \
                             mmpretrain==1.2.0 ftfy regex ninja wheel setuptools==79.0.1 rich pytest
                         pip download -d DIR --no-deps mmcv-lite==2.1.0
                         pip download -d DIR --no-deps --no-binary mmcv mmcv==2.1.0
                       (files of torch and of nvidia in it may be deleted)
  --out DIR            where tables, figures and logs go; work_dirs/bench-gpu by default
  --without-detectors  do not build mmcv (10 minutes): backbones only, over mmcv-lite
  --dry-run            print every command; run what a CPU allows, at tiny sizes, with $PYTHON
                       (python3 by default), which must have the packages already
EOF
}

wheels='' out=work_dirs/bench-gpu detectors=true dry=false
while [ $# -gt 0 ]; do
    case $1 in
        --wheels | --out)
            [ $# -ge 2 ] || { echo "error: $1 needs a folder" >&2; exit 2; }
            if [ "$1" = --wheels ]; then wheels=$(realpath -m "$2"); else out=$(realpath -m "$2"); fi
            shift ;;
        --without-detectors) detectors=false ;;
        --dry-run) dry=true ;;
        -h | --help) usage; exit 0 ;;
        *) echo "error: there is no option $1" >&2; usage >&2; exit 2 ;;
    esac
    shift
done
if [ -n "$wheels" ] && [ ! -d "$wheels" ] && ! $dry; then
    echo "error: there is no folder $wheels" >&2; exit 2
fi

cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
venv=$out/venv
failed=()
mkdir -p "$out"

# A command of the installation: without it nothing else makes sense.
must() {
    echo "+ $*"
    $dry || "$@"
}

# A measurement or test: the others run without it, and the end names it. Its name, then the command.
try() {
    local name=$1; shift
    echo "+ $*"
    $dry && return
    local start=$SECONDS
    "$@" 2>&1 | tee "$out/$name.log" || failed+=("$name")
    echo "= $name: $((SECONDS - start)) s"
}

# A sub-command of the tool; on a dry run it is run as well, as small as it gets.
measure() {
    local name=$1; shift
    try "$name" "$python" tools/benchmark.py "$@" --out "$out"
    $dry || return 0
    local tiny=(--out "$out")
    case $1 in
        theory) ;;
        convert | optimizer) tiny+=(--rounds 1 --warmup 0) ;;
        config-step) tiny+=(--rounds 1 --warmup 0 --shape 2 3 64 64) ;;
        *) tiny+=(--rounds 1 --warmup 0 --shape 2 3 32 32 --base-channels 8) ;;
    esac
    echo "+ (tiny) $PYTHON tools/benchmark.py $* ${tiny[*]}"
    $PYTHON tools/benchmark.py "$@" "${tiny[@]}" || failed+=("$name")
}

# --- the environment ---------------------------------------------------------------
must "$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU"
print(torch.__version__, torch.cuda.get_device_name())'
must "$PYTHON" -m venv --system-site-packages "$venv"
python=$venv/bin/python
pip=("$python" -m pip install -q)
[ -z "$wheels" ] || pip+=(--no-index --find-links "$wheels")
must "${pip[@]}" setuptools==79.0.1 wheel
packages=(mmengine==0.10.7 mmpretrain==1.2.0 rich pytest)
if $detectors; then
    packages+=(ninja mmdet==3.3.0 mmsegmentation==1.2.2 ftfy regex)
else
    packages+=(mmcv-lite==2.1.0)
fi
must "${pip[@]}" "${packages[@]}"
if $detectors; then
    arch=$($dry || "$PYTHON" -c 'import torch
print("%d.%d" % torch.cuda.get_device_capability())')
    must env FORCE_CUDA=1 MMCV_WITH_OPS=1 TORCH_CUDA_ARCH_LIST="${arch:-of the device}" \
        MAX_JOBS="$(nproc)" PATH="$venv/bin:$PATH" \
        "${pip[@]}" --no-deps --no-build-isolation --no-cache-dir --no-binary mmcv mmcv==2.1.0
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

# --- the tests, the tables ---------------------------------------------------------
try tests "$python" -m pytest -q tests/layers tests/golden tests/reparam

detector=configs/faster_rcnn/faster-rcnn_orepa-r50_fpn_1x_coco.py
coco=(--shape 2 3 800 1333 --rounds 20 --warmup 5)
cityscapes=(--shape 2 3 512 1024 --rounds 20 --warmup 5)
measure theory theory
measure squeeze squeeze --rounds 30 --warmup 5 --plot
measure step step "${coco[@]}" --plot
measure step-launch-bound step --launch-bound --rounds 50 --plot
measure memory memory --shape 2 3 800 1333 --plot
measure latency latency "${coco[@]}" --plot
measure latency-launch-bound latency --launch-bound --rounds 100 --plot
if $detectors; then
    measure optimizer optimizer "$detector" --rounds 30
    measure convert convert "$detector" --rounds 3 --warmup 1
    measure faster-rcnn config-step "$detector" "${coco[@]}" --plot
    measure retinanet config-step configs/retinanet/retinanet_orepa-r50_fpn_1x_coco.py \
        "${coco[@]}" --plot
    measure pspnet config-step \
        configs/pspnet/pspnet_orepa-r50-d8_4xb2-40k_cityscapes-512x1024.py \
        "${cityscapes[@]}" --plot
    measure deeplabv3plus config-step \
        configs/deeplabv3plus/deeplabv3plus_orepa-r50-d8_4xb2-40k_cityscapes-512x1024.py \
        "${cityscapes[@]}" --plot
fi
try tables "$python" tools/benchmark.py tables "$out"
if $dry; then $PYTHON tools/benchmark.py tables "$out"; fi

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}; see $out/NAME.log" >&2
    exit 1
fi
