#!/usr/bin/env bash
# A copy of the tree whose compiled library has AddressSanitizer and UndefinedBehaviorSanitizer in it.
# Usage: tests/sanitized.sh build PYTHON FOLDER          makes the copy in FOLDER, which takes minutes
#        tests/sanitized.sh run FOLDER COMMAND...        runs a command in it
set -euo pipefail

build() {
  local python=$1 folder=$2
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  cp -r --parents csrc ensemw2s kernels tests setup.py pyproject.toml LICENSE README.md "$folder"
  cd "$folder"
  rm -f ensemw2s/*.so
  local flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1"
  ENSEMW2S_BUILD=cpu ENSEMW2S_CXXFLAGS="$flags" ENSEMW2S_LDFLAGS="-fsanitize=address,undefined" \
    "$python" setup.py -q build_ext --inplace > build.log 2>&1 || { tail -40 build.log; exit 1; }
}

run() {
  cd "$1"
  shift
  # The interpreter itself is not instrumented: its allocations are not ours to judge.
  LD_PRELOAD="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 exec "$@"
}

"$@"
