"""The results page says what its records say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from docs.refresh_tables import refresh_tables
from ensemw2s.experiments.study import load_study
from ensemw2s.runtime.records import CellRecord, of_kind, read_records

ROOT = Path(__file__).parents[2]
RECORDS = sorted((ROOT / "docs" / "results").glob("*.jsonl"))


def test_the_tables_of_the_results_page_are_those_of_the_committed_records(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs" / "results", tmp_path / "results")
    page = Path(shutil.copy(ROOT / "docs" / "results.md", tmp_path))
    assert refresh_tables(page) > 5
    assert page.read_text() == (ROOT / "docs" / "results.md").read_text()


@pytest.mark.parametrize("file", RECORDS, ids=lambda file: file.stem)
def test_committed_records_are_those_of_the_study_as_it_is(file: Path) -> None:
    """A study whose settings or recipe have changed has to be measured again."""
    keys = {(cell.task, cell.seed): cell.key for cell in load_study(ROOT / "examples" / f"{file.stem}.yaml").cells()}
    measured = {(cell.task, cell.seed): cell.key for cell in of_kind(read_records(file), CellRecord)}
    assert measured
    assert measured.items() <= keys.items()
