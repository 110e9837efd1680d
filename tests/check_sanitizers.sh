#!/usr/bin/env bash
# Builds the compiled library with AddressSanitizer and UndefinedBehaviorSanitizer into a copy of the tree and runs the
# op tests on it. Slow (minutes). Usage: tests/check_sanitizers.sh [python]
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=$(realpath -s "${1:-$root/.venv/bin/python}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cd "$root"
cp -r --parents csrc ensemw2s kernels tests setup.py pyproject.toml LICENSE README.md "$work"
cd "$work"
rm -f ensemw2s/*.so
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1"
ENSEMW2S_BUILD=cpu ENSEMW2S_CXXFLAGS="$flags" ENSEMW2S_LDFLAGS="-fsanitize=address,undefined" \
  "$python" setup.py -q build_ext --inplace > build.log 2>&1 || { tail -40 build.log; exit 1; }

# The interpreter itself is not instrumented: its allocations are not ours to judge.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 OMP_NUM_THREADS=2
for capability in default avx2 avx512; do
  echo "ATEN_CPU_CAPABILITY=$capability"
  ATEN_CPU_CAPABILITY=$capability "$python" -m pytest -q -p no:cacheprovider tests/ops \
    -k "(kernel or EveryBackend or depends or many_chunks) and not compiles" -x \
    --ignore tests/ops/test_backend.py
done
