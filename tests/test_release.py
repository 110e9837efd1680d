"""What is published: a README whose links lead somewhere on PyPI, and nothing that lacks what a release needs."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ADDRESS = "https://example.org/ours"
PROJECT = {"version": "1.2.0", "urls": {"Repository": ADDRESS}}


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run setup.py without building anything; return its names, and as `told` what it told setuptools."""
    told: dict[str, Any] = {}
    monkeypatch.setenv("ENSEMW2S_BUILD", "none")
    monkeypatch.setattr("setuptools.setup", lambda **arguments: told.update(arguments))
    return {**runpy.run_path(str(ROOT / "setup.py")), "told": told}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project that may be published."""
    (tmp_path / "pyproject.toml").write_text(f'[project]\nversion = "1.2.0"\nurls.Repository = "{ADDRESS}"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.0 (2026-01-31)\n\nNews.\n\n## 1.1.0 (2025-12-01)\n")
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "ours-1.2.0.tar.gz").touch()
    return tmp_path


@pytest.fixture
def missing() -> Callable[[Path], list[str]]:
    return runpy.run_path(str(ROOT / ".ci" / "release.py"))["missing"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("[how](docs/how.md)", f"[how]({ADDRESS}/blob/v1.2.0/docs/how.md)"),
        ("[how](docs/how.md#part)", f"[how]({ADDRESS}/blob/v1.2.0/docs/how.md#part)"),
        ("![a picture](docs/a.png)", f"![a picture]({ADDRESS}/raw/v1.2.0/docs/a.png)"),
        ("[paper](https://a.org/b)", "[paper](https://a.org/b)"),
        ("[mail](mailto:a@b.org), [below](#below)", "[mail](mailto:a@b.org), [below](#below)"),
    ],
)
def test_a_relative_link_leads_to_the_file_of_the_versions_tag(setup: dict[str, Any], text: str, shown: str) -> None:
    assert setup["long_description"](text, PROJECT) == shown


def test_without_an_address_the_readme_stays_as_it_is(setup: dict[str, Any]) -> None:
    assert setup["long_description"]("[how](docs/how.md)", {"version": "1.2.0"}) == "[how](docs/how.md)"


def test_the_readme_with_an_address_has_no_relative_link(setup: dict[str, Any]) -> None:
    page = setup["long_description"]((ROOT / "README.md").read_text(), PROJECT)
    linked = re.findall(rf"\]\({re.escape(ADDRESS)}/(?:blob|raw)/v1\.2\.0/([^)#]+)", page)
    assert len(linked) > 15 and all((ROOT / path).exists() for path in linked)
    assert re.findall(r"\]\((?!https://)[^)]+\)", page) == []


def test_the_readme_is_the_page(setup: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert setup["told"]["long_description"] == setup["long_description"]((ROOT / "README.md").read_text(), project)
    assert setup["told"]["long_description_content_type"] == "text/markdown"


def test_a_project_that_lacks_nothing_may_be_published(project: Path, missing: Callable[[Path], list[str]]) -> None:
    assert missing(project) == []


def test_a_release_without_an_address_is_refused(project: Path, missing: Callable[[Path], list[str]]) -> None:
    (project / "pyproject.toml").write_text('[project]\nversion = "1.2.0"\n')
    (said,) = missing(project)
    assert "put Repository = " in said and "[project.urls]" in said


@pytest.mark.parametrize("title", ["1.2.0 (unreleased)", "1.1.0 (2026-01-31)", "1.2.01 (2026-01-31)"])
def test_a_release_without_its_day_is_refused(project: Path, missing: Callable[[Path], list[str]], title: str) -> None:
    (project / "CHANGELOG.md").write_text(f"# Changelog\n\n## {title}\n")
    (said,) = missing(project)
    assert f"CHANGELOG.md begins with {title!r}: expected 1.2.0" in said


def test_files_of_another_version_are_not_published_along(project: Path, missing: Callable[[Path], list[str]]) -> None:
    (project / "dist" / "ours-1.1.0.tar.gz").touch()
    (said,) = missing(project)
    assert "other versions (ours-1.1.0.tar.gz)" in said


def wheels(*pythons: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [ROOT / ".ci" / "wheels.sh", sys.executable, *pythons]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_pythons_that_are_not_here_are_named() -> None:
    run = wheels("python9.8", "python9.9")
    assert run.returncode == 1
    assert "python9.8 is not here: no wheel is built for it" in run.stderr
    assert "none of these Pythons is here: python9.8 python9.9" in run.stderr


def test_wheels_without_kernels_are_refused() -> None:
    run = wheels(sys.executable, ENSEMW2S_BUILD="none")
    assert run.returncode == 1 and "these wheels are for kernels" in run.stderr
