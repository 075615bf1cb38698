#!/usr/bin/env bash
# Everything that only a GPU shows, in one go: correct first, then timed. Run in the project's root on a CUDA machine
# that has the project's packages installed. $1: a folder for logs and rows (default: ./gpu-out).
set -uo pipefail
out=${1:-gpu-out}
mkdir -p "$out"
python3 -m pytest -m gpu -q -x --maxfail=20 packages plugins tests -p no:cacheprovider 2>&1 | tee "$out/pytest-gpu.log" | tail -40
for op in elementwise nf4 linear_cross_entropy attention; do
  timeout 150 python3 "benchmarks/op_$op.py" > "$out/op_$op.jsonl" 2> "$out/op_$op.err" || tail -5 "$out/op_$op.err"
done
