#!/usr/bin/env bash
# All measurements that need a GPU, into benchmarks/results/; benchmarks/gpu.sh takes ten minutes. Needs torch, timm, numpy and tqdm; pytest for the tests.
#
#   bash benchmarks/gpu-all.sh [PART...]              parts: tests train memory overhead sample data evaluate (default: all)
#   PUBLISHED=path/to/REG bash benchmarks/gpu-all.sh  also the published code, side by side (a clone at 021ea2e)
#   PYTHON=python3  MODELS="SiT-XL/2 SiT-B/2"  BATCH=256  ROUNDS=9  RESULTS=folder (in place of benchmarks/results)
#
# A part that fails does not stop the others; the exit status says whether one did.
set -uo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
read -r -a models <<< "${MODELS:-SiT-XL/2 SiT-B/2}"
batch="${BATCH:-256}" rounds="${ROUNDS:-9}"
published=(); if [ -n "${PUBLISHED:-}" ]; then published=(--published "$PUBLISHED"); fi
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

gpu="$("$python" -c 'import torch; print(torch.cuda.get_device_name())')" || {
    echo "error: torch sees no CUDA device" >&2
    exit 2
}
slug="$(echo "$gpu" | sed 's/NVIDIA //' | tr 'A-Z ' 'a-z-')"
echo "$gpu"
failed=()
measure() { # benchmark, flags...
    echo "== $*"
    "$python" -m "benchmarks.$1" "${@:2}" || failed+=("$*")
}

tests() {
    "$python" -c 'import pytest' 2> /dev/null || { echo "tests: pytest is not installed, left out"; return; }
    "$python" -m pytest -q -m gpu $(grep -l "mark.gpu" tests/test_*.py) || failed+=("tests")
}
train() {
    for model in "${models[@]}"; do
        name="$(echo "$model" | sed 's/SiT-//' | tr -d / | tr 'A-Z' 'a-z')"
        measure train_step --device cuda --model "$model" --batch-size "$batch" --encoder dinov2-vit-b --compile --graph --stream --parts \
            --rounds "$rounds" "${published[@]}" --label "$name-$slug-online"
        measure train_step --device cuda --model "$model" --batch-size "$batch" --compile --norm-kernel --graph --rounds "$rounds" "${published[@]}" \
            --label "$name-$slug-cached"
    done
}
memory() {
    measure train_step --device cuda --model "${models[0]}" --batch-size 32 64 128 256 --compile --rounds 3 --label "memory-$slug"
    measure train_step --device cuda --model "${models[0]}" --batch-size 32 64 128 256 --compile --rounds 3 --gradient-checkpointing \
        --label "memory-$slug-recompute"
}
overhead() {
    measure overhead --device cuda --model "${models[0]}" --batch-size 64 --compile --rounds 51 --label "$slug"
}
sample() {
    measure sample --device cuda --model "${models[0]}" --batch-size 128 --compile "${published[@]}" --label "$slug"
}
data() {
    measure data "${published[@]}" --label "host-of-$slug"
}
evaluate() {
    measure evaluate --device cuda --label "$slug"
}

if [ $# -eq 0 ]; then set -- tests train memory overhead sample data evaluate; fi
for part in "$@"; do
    case "$part" in
        tests | train | memory | overhead | sample | data | evaluate) "$part" ;;
        *) echo "error: unknown part $part; see the head of benchmarks/gpu-all.sh" >&2; exit 2 ;;
    esac
done
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
