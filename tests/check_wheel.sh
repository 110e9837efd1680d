#!/usr/bin/env bash
# Builds sdist and wheel, installs the wheel into a fresh environment that borrows this one's packages, and uses it
# from another folder. The wheel is built from the unpacked sdist, so the sdist is checked to be complete as well; so are
# its tests, all of which are collected there, and the quick ones run. twine looks at the page that PyPI would show.
# Usage: tests/check_wheel.sh [python]
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
# As a whole path: the steps below work in other folders.
python=$(realpath --no-symlinks "${1:-$root/.venv/bin/python}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cd "$root"
"$python" -m build --no-isolation --outdir "$work/dist" . > "$work/build.log" 2>&1 || { tail -40 "$work/build.log"; exit 1; }
ls "$work/dist"
"$python" -m twine check --strict "$work"/dist/*

"$python" -m venv --without-pip "$work/venv"
site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -m pip --python "$work/venv/bin/python" install --quiet --no-deps "$work"/dist/*.whl
# Borrowed packages come last on the path, and not through .pth files of their own: an editable install of ensemw2s
# there stays unseen.
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/borrowed.pth"

cd "$work"
"$work/venv/bin/python" - "$root" <<'PY'
import sys
from pathlib import Path

import torch

import ensemw2s
import ensemw2s.kernels.mixture_sample
from ensemw2s.ops import available_backends, build_info, draw_seeds, mixture_sample

home = Path(ensemw2s.__file__).parent
assert Path(sys.argv[1]) not in home.parents, f"imported from the source tree: {home}"
assert available_backends("cpu")["mixture_sample"][0] == "cpp", build_info()
keys = {"seeds": draw_seeds(4), "positions": torch.arange(4)}
logits = torch.randn(3, 4, 1000)
compiled = mixture_sample(logits, [0.5, 0.3, 0.2], top_p=0.9, impl="cpp", **keys)
plain = mixture_sample(logits, [0.5, 0.3, 0.2], top_p=0.9, impl="reference", **keys)
assert torch.equal(compiled.tokens, plain.tokens), (compiled, plain)
print("wheel works:", build_info())
PY
"$work/venv/bin/python" -m ensemw2s --help > /dev/null
"$work/venv/bin/ensemw2s" --help > /dev/null
"$work/venv/bin/ensemw2s" report "$root/docs/results/real_ablation.jsonl" --output "$work/page.html"
grep -q "Declared comparisons" "$work/page.html"

# The sdist's own tests, with the libraries of the wheel, which were compiled from it.
tar -xzf "$work"/dist/*.tar.gz -C "$work"
cd "$work"/ensemw2s-*/
cp "$site"/ensemw2s/*.so ensemw2s/
export OMP_NUM_THREADS=1
tests=("$python" -m pytest --quiet -p no:cacheprovider)
"${tests[@]}" --collect-only > "$work/collected.log" || { tail -40 "$work/collected.log"; exit 1; }
"${tests[@]}" tests/data/test_shapes.py tests/ops/test_scores.py tests/test_release.py
"${tests[@]}" tests/test_documentation.py -k "metadata or from_top_to_bottom"
