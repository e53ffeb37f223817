#!/usr/bin/env bash
# What a machine with one GPU can tell in ten minutes, on an image with torch, timm, accelerate, pytest, numpy and tqdm.
#
#   bash benchmarks/gpu.sh                  parts: ceilings tests cached online small profile sample
#   PUBLISHED=path/to/REG bash benchmarks/gpu.sh    the published code beside ours (a clone at 021ea2e)
#   PYTHON=python3  COMMIT=hash (where there is no .git)  OUT=folder (default: gpu-results)
#
# After each part OUT and OUT.tar hold all results so far; a part that fails or takes too long does not stop the others. The
# last 15 lines are a table of what was measured. benchmarks/gpu-all.sh measures everything, in half an hour and more.
set -uo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
out="${OUT:-gpu-results}"
published=(); if [ -n "${PUBLISHED:-}" ]; then published=(--published "$PUBLISHED"); fi
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

gib="$("$python" -c 'import torch; print(torch.cuda.get_device_properties(0).total_memory >> 30)')" || {
    echo "error: torch sees no CUDA device" >&2
    exit 2
}
large=128; if [ "$gib" -gt 100 ]; then large=256; fi
mkdir -p "$out"
failed=()
part() { # name, seconds, command...
    local start=$SECONDS
    echo "== $1"
    timeout "$2" "${@:3}" 2>&1 | tee "$out/$1.log" || failed+=("$1")
    echo "== $1: $((SECONDS - start)) s"
    cp benchmarks/results/*-gpu-*.json "$out"/ 2> /dev/null
    tar -cf "$out.tar" "$out"
}
step() { echo "$python" -m benchmarks.train_step --device cuda --compile "${published[@]}" --rounds 5; }

part ceilings 40 "$python" -m benchmarks.ceilings --label gpu-ceilings
# shellcheck disable=SC2046  # words of a command
part tests 110 "$python" -m pytest -q -m gpu $(grep -l "mark.gpu" tests/test_*.py)
part cached 170 $(step) --model SiT-XL/2 --batch-size "$large" --profile --label gpu-xl2-cached
part online 90 $(step) --model SiT-XL/2 --batch-size "$((large / 2))" --encoder dinov2-vit-b --label gpu-xl2-online
part small 110 $(step) --model SiT-B/2 --batch-size 256 32 --label gpu-b2-cached
part sample 60 "$python" -m benchmarks.sample --device cuda --model SiT-XL/2 --batch-size 64 --compile --rounds 3 \
    "${published[@]}" --label gpu-xl2
if [ ${#failed[@]} -gt 0 ]; then printf 'failed or cut off: %s\n' "${failed[@]}" >&2; fi
"$python" -m benchmarks.ceilings --table "$out" | tee "$out/table.md"
tar -cf "$out.tar" "$out"
[ ${#failed[@]} -eq 0 ]
