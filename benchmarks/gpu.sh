#!/usr/bin/env bash
# Measure what matters on one GPU in about seven minutes (the parts' limits sum to ten), on an image with torch, timm,
# accelerate, pytest, numpy and tqdm.
#
#   bash benchmarks/gpu.sh [PART...]        parts: smoke ceilings tests cached online small sample (default: these), norms block
#   PUBLISHED=path/to/REG bash benchmarks/gpu.sh    the published code beside ours (a copy of 021ea2e)
#   PYTHON=python3  COMMIT=hash (of copied files: it goes into the records)  OUT=folder (default: gpu-results)
#
# After each part OUT holds log.txt, table.md (what was measured, a line each) and results.tar (the records and whole logs); a
# part that fails or takes too long leaves what it has measured, and does not stop the others. Exit status 2: nothing can be
# measured here; 1: a part failed. benchmarks/gpu-all.sh measures everything, in half an hour and more.
set -uo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
out="${OUT:-gpu-results}"
published=(); if [ -n "${PUBLISHED:-}" ]; then published=(--published "$PUBLISHED"); fi
RESULTS="$(mktemp -d)" # where the benchmarks write
export RESULTS PYTHONUNBUFFERED=1
trap 'rm -r "$RESULTS"' EXIT

gib="$("$python" -c 'import torch; print(torch.cuda.get_device_properties(0).total_memory >> 30)' 2> /dev/null)" || {
    echo "error: torch sees no CUDA device" >&2
    exit 2
}
large=128; if [ "$gib" -gt 100 ]; then large=256; fi
mkdir -p "$out"
: > "$out/log.txt"
failed=()
say() { echo "$*" | tee -a "$out/log.txt"; }
part() { # name, seconds, command...: all of its output into a log, the end of it on the screen
    local name="$1" start=$SECONDS status
    say "== $name (at most $2 s)"
    timeout -k 5 "$2" "${@:3}" > "$RESULTS/$name.log" 2>&1
    status=$?
    if [ $status -ne 0 ]; then failed+=("$name"); fi
    tail -n "$([ $status -eq 0 ] && echo 12 || echo 25)" "$RESULTS/$name.log" | cut -c 1-240 | tee -a "$out/log.txt"
    say "== $name: exit status $status, $((SECONDS - start)) s, $(nvidia-smi --query-gpu=clocks.sm,power.draw,temperature.gpu --format=csv,noheader 2> /dev/null | head -n 1)"
    keep
    return $status
}
keep() {
    "$python" -m benchmarks.ceilings --table "$RESULTS" > "$out/table.md" 2> /dev/null
    tar -cf "$out/results.part" -C "$RESULTS" . && mv "$out/results.part" "$out/results.tar"
}
step() { # name, seconds, flags...
    part "$1" "$2" "$python" -m benchmarks.train_step --device cuda --compile "${published[@]}" --warmup 3 --rounds 4 "${@:3}"
}

# Torch compiles for the first time; the graphs of 32 images are kept for the part "small". Cut off, it has not failed.
smoke() {
    step smoke 90 --model SiT-B/2 --depth 2 --batch-size 32 --label smoke
    local status=$?
    rm -f "$RESULTS"/*-smoke.json
    if [ $status -ne 0 ] && [ $status -ne 124 ] || grep -q "runs uncompiled" "$RESULTS/smoke.log"; then
        echo "error: a small step does not run here as it should: see above" >&2
        exit 2
    fi
}
ceilings() { part ceilings 20 "$python" -m benchmarks.ceilings --label gpu-ceilings; }
tests() { # a process for each file, at once: most of the time is compilation, on one core each
    # shellcheck disable=SC2016  # of the shell that runs them
    part tests 150 bash -c '
        for file in $(grep -lE "^(@|pytestmark = )pytest.mark.gpu" tests/test_*.py); do
            "$0" -m pytest -q -m gpu --durations 3 "$file" > "$RESULTS/$(basename "$file").log" 2>&1 &
            running+=("$! $file")
        done
        for one in "${running[@]}"; do
            read -r pid file <<< "$one"
            wait "$pid"; status=$?
            if [ $status -ne 0 ]; then failed=1; grep -E "^(E  |FAILED|ERROR)" "$RESULTS/$(basename "$file").log" | head -n 12; fi
            echo "$file: exit status $status, $(tail -n 1 "$RESULTS/$(basename "$file").log")"
        done
        exit "${failed:-0}"' "$python"
    if [ $? -eq 124 ]; then tail -n 3 "$RESULTS"/test_*.log | cut -c 1-240 | tee -a "$out/log.txt"; fi
}
cached() { step cached 120 --model SiT-XL/2 --batch-size "$large" --graph --profile --label gpu-xl2-cached; }
online() {
    step online 70 --model SiT-XL/2 --batch-size "$large" --encoder dinov2-vit-b --label gpu-xl2-online \
        --only "ours, compiled" ${PUBLISHED:+published}
}
small() { step small 100 --model SiT-B/2 --batch-size 32 256 --graph --label gpu-b2-cached; }
norms() { # models/norm_kernel.py beside the compiled step without it
    step norms 180 --model SiT-XL/2 --batch-size "$large" --norm-kernel --profile --label gpu-xl2-norms \
        --only "ours, compiled" "ours, compiled, norm kernel"
}
block() { part block 120 "$python" -m benchmarks.block --batch-size "$large" --norm-kernel --tune --label gpu-xl2; }
sample() {
    part sample 50 "$python" -m benchmarks.sample --device cuda --model SiT-XL/2 --batch-size 64 --steps 6 --dtypes bf16 \
        --compile --rounds 2 "${published[@]}" --label gpu-xl2
}

if [ $# -eq 0 ]; then set -- smoke ceilings tests cached online small sample; fi
for name in "$@"; do
    case "$name" in
        smoke | ceilings | tests | cached | online | small | norms | block | sample) "$name" ;;
        *) echo "error: unknown part $name; see the head of benchmarks/gpu.sh" >&2; exit 2 ;;
    esac
done
cat "$out/table.md"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed or cut off: %s\n' "${failed[@]}" >&2
    exit 1
fi
