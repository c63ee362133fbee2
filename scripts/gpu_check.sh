#!/usr/bin/env bash
# The GPU test run: build, every test, PEFT's own tests where $SDIST has them, compute-sanitizer on the
# CUDA ops, benchmark, loss curves.
# Uses an existing environment ($PYTHON, default python3), needs no network, writes to $OUT.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-gpu-check}
mkdir -p "$OUT"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
"$PYTHON" -c 'import kernels, peft, torch, transformers, triton
print(*(f"{m.__name__} {m.__version__}" for m in (torch, triton, kernels, peft, transformers)))' || exit 1
# What transformers kernelizes itself depends on both.
for name in transformers kernels; do
    pinned=$(sed -n "s/^$name==\([0-9.]*\).*/\1/p" requirements.txt | head -n 1)
    "$PYTHON" -c "import sys, $name; sys.exit($name.__version__ != '$pinned')" ||
        { echo "gpu_check: $name $pinned is wanted, as in requirements.txt (pip install --no-deps $name==$pinned)"; exit 1; }
done
say() { echo "gpu_check: $1, $((SECONDS / 60)) min passed"; }  # where it is

say "1 of 6, build"
make build PYTHON="$PYTHON" || exit 1

say "2 of 6, tests"
# Most of the time goes into compiling Triton kernels: in parallel where pytest-xdist is installed.
"$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n 12 --dist loadgroup) || parallel=()
"$PYTHON" -m pytest -q -p no:cacheprovider "${parallel[@]}" tests 2>&1 | tee "$OUT/tests.log" | grep --line-buffered '%\]$'
tests=${PIPESTATUS[0]}

say "3 of 6, PEFT's own tests"
if [ -n "${SDIST:-}" ]; then
    "$PYTHON" scripts/conformance.py --sdist "$SDIST" --workers 14 >"$OUT/conformance.log"  # its bars are seen
    conformance=$?
    cp .conformance/report.json "$OUT/conformance.json"
else
    conformance=0
    echo "not run: no SDIST" >"$OUT/conformance.log"
fi

say "4 of 6, compute-sanitizer"
if command -v compute-sanitizer >/dev/null; then
    compute-sanitizer --tool memcheck --error-exitcode 9 \
        "$PYTHON" scripts/check_row_norm.py --sanitize >"$OUT/sanitizer.log" 2>&1
    sanitizer=$?
    compute-sanitizer --tool memcheck --error-exitcode 9 \
        "$PYTHON" scripts/check_group.py >>"$OUT/sanitizer.log" 2>&1 || sanitizer=$?
    compute-sanitizer --tool memcheck --error-exitcode 9 --target-processes all \
        "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_native.py -k "37-200 or test_gated" \
        >>"$OUT/sanitizer.log" 2>&1 || sanitizer=$?
    compute-sanitizer --tool memcheck --error-exitcode 9 \
        "$PYTHON" scripts/check_gemm.py --sanitize >>"$OUT/sanitizer.log" 2>&1 || sanitizer=$?
    for tool in memcheck synccheck; do
        timeout 600 compute-sanitizer --tool $tool --error-exitcode 9 \
            "$PYTHON" scripts/check_gemm_group.py --sanitize >>"$OUT/sanitizer.log" 2>&1 || sanitizer=$?
    done
    compute-sanitizer --tool memcheck --error-exitcode 9 \
        "$PYTHON" scripts/check_skinny.py --sanitize >>"$OUT/sanitizer.log" 2>&1 || sanitizer=$?
    compute-sanitizer --tool memcheck --error-exitcode 9 \
        "$PYTHON" scripts/check_adapter_grads.py --sanitize >>"$OUT/sanitizer.log" 2>&1 || sanitizer=$?
    compute-sanitizer --tool memcheck --error-exitcode 9 \
        "$PYTHON" scripts/check_embedding.py native >>"$OUT/sanitizer.log" 2>&1 || sanitizer=$?
    compute-sanitizer --tool memcheck --error-exitcode 9 \
        "$PYTHON" scripts/check_dequantize.py >>"$OUT/sanitizer.log" 2>&1 || sanitizer=$?
else
    sanitizer="not installed"
fi
say "5 of 6, kernels by themselves, benchmarks"
"$PYTHON" scripts/check_row_norm.py >"$OUT/row_norm.log" 2>&1
row_norm=$?
"$PYTHON" scripts/check_gemm.py >>"$OUT/row_norm.log" 2>&1 || row_norm=$?
timeout 300 "$PYTHON" scripts/check_gemm_group.py >>"$OUT/row_norm.log" 2>&1 || row_norm=$?
"$PYTHON" scripts/check_skinny.py >>"$OUT/row_norm.log" 2>&1 || row_norm=$?
"$PYTHON" scripts/check_embedding.py >>"$OUT/row_norm.log" 2>&1 || row_norm=$?
"$PYTHON" benchmarks/compare_lora.py --out "$OUT/benchmark_lora.json" >"$OUT/benchmark.log" 2>&1
benchmark=$?
"$PYTHON" benchmarks/compare_lora.py --peers --layers 8 --out "$OUT/benchmark_peers.json" >>"$OUT/benchmark.log" 2>&1 || benchmark=$?
"$PYTHON" benchmarks/first_call.py --out "$OUT/benchmark_first_call.json" >>"$OUT/benchmark.log" 2>&1 || benchmark=$?
"$PYTHON" benchmarks/compare_embedding.py --out "$OUT/benchmark_embedding.json" >>"$OUT/benchmark.log" 2>&1 || benchmark=$?
"$PYTHON" -c 'import bitsandbytes' 2>/dev/null && {
    "$PYTHON" benchmarks/compare_qlora.py --out "$OUT/benchmark_qlora.json" >>"$OUT/benchmark.log" 2>&1 || benchmark=$?
}
say "6 of 6, loss curves"
"$PYTHON" benchmarks/train_curves.py --out "$OUT/train_curves.json" >"$OUT/curves.log" 2>&1
curves=$?
say "done"

grep -E '^(FAILED|ERROR)|passed|failed' "$OUT/tests.log" | tail -40
tail -5 "$OUT/sanitizer.log" 2>/dev/null
grep 'ERROR SUMMARY' "$OUT/sanitizer.log"
cat "$OUT/conformance.log" "$OUT/row_norm.log" "$OUT/benchmark.log" "$OUT/curves.log"
echo "exit codes: tests $tests, conformance $conformance, sanitizer $sanitizer, row_norm $row_norm, benchmark $benchmark, curves $curves"
[ "$tests" = 0 ] && [ "$conformance" = 0 ] && [ "$row_norm" = 0 ] && [ "$benchmark" = 0 ] && [ "$curves" = 0 ] && [ "$sanitizer" != 9 ]
