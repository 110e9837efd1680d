"""What setup.py does with ENSEMW2S_BUILD, and that the folder kernels/ hides nobody else's package."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILED_MODULES = (
    "import setuptools\n"
    "found = {}\n"
    "setuptools.setup = lambda **arguments: found.update(arguments)\n"
    "exec(compile(open('setup.py').read(), 'setup.py', 'exec'), {'__file__': 'setup.py', '__name__': 'setup'})\n"
    "print(*[m.name for m in found.get('ext_modules', [])])\n"
)


def compiled_modules(**environment: str) -> subprocess.CompletedProcess[str]:
    """What setup.py asks setuptools to compile, found out without compiling."""
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", COMPILED_MODULES],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def without_compiler(tmp_path: Path) -> dict[str, str]:
    return {"PATH": str(tmp_path), "CXX": str(tmp_path / "no-compiler")}


def test_none_compiles_nothing():
    run = compiled_modules(ENSEMW2S_BUILD="none")
    assert run.returncode == 0 and run.stdout.split() == []


@pytest.mark.parametrize("mode", ["auto", "cpu"])
def test_a_compiler_gives_both_modules(mode):
    run = compiled_modules(ENSEMW2S_BUILD=mode)
    assert run.stdout.split() == ["ensemw2s._C", "ensemw2s._host"], run.stderr


def test_auto_without_compiler_warns_and_goes_on(tmp_path):
    run = compiled_modules(ENSEMW2S_BUILD="auto", **without_compiler(tmp_path))
    assert run.returncode == 0 and run.stdout.split() == []
    assert "no C++ compiler was found" in run.stderr and "ENSEMW2S_BUILD=none" in run.stderr


def test_cpu_without_compiler_stops(tmp_path):
    run = compiled_modules(ENSEMW2S_BUILD="cpu", **without_compiler(tmp_path))
    assert run.returncode != 0 and "no C++ compiler was found" in run.stderr


def test_cuda_without_toolkit_stops(tmp_path):
    run = compiled_modules(ENSEMW2S_BUILD="cuda", CUDA_HOME=str(tmp_path), CUDA_PATH="")
    assert run.returncode != 0 and "no CUDA toolkit was found" in run.stderr and "CUDA_HOME" in run.stderr


def test_unknown_mode_is_named():
    run = compiled_modules(ENSEMW2S_BUILD="gpu")
    assert run.returncode != 0 and "ENSEMW2S_BUILD='gpu' is not one of auto, cpu, cuda, none" in run.stderr


def test_kernels_folder_hides_nothing():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    # An unpacked sdist has copies where a clone has a link.
    assert (ROOT / "ensemw2s" / "kernels").is_symlink() == (ROOT / ".git").exists()
    inner, outer = (sorted(folder.glob("*.py")) for folder in (ROOT / "ensemw2s" / "kernels", ROOT / "kernels"))
    assert [path.read_text() for path in inner] == [path.read_text() for path in outer] != []
    code = "import transformers, importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "None"  # a namespace at most: any regular package of that name would win
    assert find_spec("ensemw2s.kernels") is not None


def test_ops_need_neither_datasets_nor_transformers():
    code = (
        "import sys; sys.modules['datasets'] = sys.modules['transformers'] = None\n"
        "import ensemw2s.ops, ensemw2s.boosting"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_kernel_sources_include_no_torch_header():
    for source in [*ROOT.glob("csrc/include/*"), *ROOT.glob("csrc/cpu/*")]:
        assert "#include <torch" not in source.read_text(), source
