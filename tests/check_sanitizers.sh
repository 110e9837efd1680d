#!/usr/bin/env bash
# Runs the op tests on a library built with AddressSanitizer and UndefinedBehaviorSanitizer. Slow (minutes).
# Usage: tests/check_sanitizers.sh [python]
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=$(realpath -s "${1:-$root/.venv/bin/python}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

bash "$root/tests/sanitized.sh" build "$python" "$work"
for capability in default avx2 avx512; do
  echo "ATEN_CPU_CAPABILITY=$capability"
  ATEN_CPU_CAPABILITY=$capability OMP_NUM_THREADS=2 bash "$root/tests/sanitized.sh" run "$work" \
    "$python" -m pytest -q -p no:cacheprovider tests/ops \
    -k "(kernel or EveryBackend or depends or many_chunks) and not compiles" -x --ignore tests/ops/test_backend.py
done
