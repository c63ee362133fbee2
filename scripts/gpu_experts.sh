#!/usr/bin/env bash
# Experts on this machine's GPU, a Hopper with 40 GB or more: their tests, tiles, where the time goes, and the comparison
# with the frozen layer and PEFT. About 15 minutes; STEPS="tests tune" runs some of the steps.
# Uses an existing environment ($PYTHON, default python3), needs no network, writes to $OUT.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-gpu-experts}
STEPS=${STEPS:-tests sanitize tune profile compare}
mkdir -p "$OUT"
make build PYTHON="$PYTHON" || exit 1
failed=0

run() { # name, seconds that it may take, command
    local name=$1 limit=$2
    shift 2
    [[ " $STEPS " == *" $name "* ]] || return 0
    timeout "$limit" "$@" >"$OUT/$name.log" 2>&1 || { failed=1; echo "$name failed: $?"; }
    echo "=== $name"
    tail -n 70 "$OUT/$name.log"
}

# Threads of torch's CPU operations would take the workers' cores from each other.
export OMP_NUM_THREADS=1
"$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n 8) || parallel=()
run tests 400 "$PYTHON" -m pytest -q -p no:cacheprovider "${parallel[@]}" tests/test_experts*.py \
    --ignore tests/test_experts_distributed.py
command -v compute-sanitizer >/dev/null && run sanitize 300 compute-sanitizer --tool memcheck --error-exitcode 9 \
    "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_experts_function.py -k "triton or sort or few_rows"
run tune 300 "$PYTHON" benchmarks/tune_experts.py
make build PYTHON="$PYTHON" || exit 1
run profile 200 "$PYTHON" benchmarks/profile_experts.py
run compare 400 "$PYTHON" benchmarks/compare_experts.py --decoding 1 8 64 --repeats 10 --backends default grouped_mm \
    --out "$OUT/compare_experts.json"
cp torch-ext/lora_fused/backends/configs/*.json "$OUT"
exit $failed
