"""Two runs side by side."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ensemw2s.cli import main
from ensemw2s.report.comparison import compare_runs
from ensemw2s.report.statistics import pooled_difference
from ensemw2s.runtime.files import read_json_lines, write_json, write_json_lines
from ensemw2s.runtime.records import questions_digest
from tests.many_runs import answer_records
from tests.report.test_page import CONFIG, in_run, round_records

QUESTIONS = 60


def made(folder: Path, right: dict[str, int], config: dict[str, Any], asked: str = "q") -> Path:
    """A run in which each arm answers so many questions of both splits right, the first ones."""
    digest = questions_digest(f"{asked}{i}" for i in range(QUESTIONS))
    records = [
        record
        for arm, count in right.items()
        for split in ("id", "ood")
        for record in answer_records(
            np.arange(QUESTIONS) < count, digest, task=folder.name, seed=0, arm=arm, split=split
        )
    ]
    write_json_lines(folder / "results.jsonl", records)
    write_json(folder / "config.json", CONFIG | {"name": folder.name} | config)
    return folder


def test_settings_that_differ_and_differences_of_arms_are_shown(tmp_path: Path) -> None:
    one = made(
        tmp_path / "one", {"ensemble": 20, "single_expert": 10}, {"boosting": {"recipe": "paper"}, "x": 1, "p": " "}
    )
    two = made(
        tmp_path / "two", {"ensemble": 50, "bagging": 5}, {"boosting": {"recipe": "paper", "num_rounds": 7}, "p": ""}
    )
    (headers, settings), (columns, rows) = compare_runs(one, two)
    assert headers == ["Setting", "one", "two"]
    assert sorted(settings) == [["boosting.num_rounds", "-", "7"], ["p", "' '", "''"], ["x", "1", "-"]]
    assert columns == ["Arm", "ID, one", "ID, two", "ID, points gained by two",
        "OOD, one", "OOD, two", "OOD, points gained by two",
    ]  # fmt: skip
    table = {row[0]: row[1:] for row in rows}
    answers = [{"": np.arange(QUESTIONS)[None] < count} for count in (50, 20)]
    expected = pooled_difference(*answers)
    assert table["Ensemble"][:2] == ["33.3%", "83.3%"]
    assert table["Ensemble"][2] == (
        f"+{100 * expected.value:.1f} (+{100 * expected.low:.1f} to +{100 * expected.high:.1f}): better"
    )
    assert table["Single weak expert"] == ["16.7%", "-", "", "16.7%", "-", ""]
    assert [cell for row in rows if "agging" in row[0] for cell in row[1:4]] == ["-", "8.3%", ""]


def test_runs_that_asked_other_questions_have_no_differences(tmp_path: Path) -> None:
    one = made(tmp_path / "one", {"ensemble": 20}, {})
    two = made(tmp_path / "two", {"ensemble": 50}, {}, asked="other")
    (_, settings), (_, rows) = compare_runs(one, two)
    assert settings == []
    assert rows == [["Ensemble", "33.3%", "83.3%", "", "33.3%", "83.3%", ""]]


def test_runs_that_differ_in_their_names_alone(tmp_path: Path) -> None:
    one, two = (made(tmp_path / name, {"ensemble": 20}, {"task": name}) for name in ("one", "two"))
    (_, settings), (_, rows) = compare_runs(one, two)
    assert settings == []
    same = "0.0 (0.0 to 0.0): right on the same questions"
    assert rows == [["Ensemble", "33.3%", "33.3%", same, "33.3%", "33.3%", same]]
    other = made(tmp_path / "three", {"ensemble": 20}, {"task": "sums"})
    assert compare_runs(one, other)[0][1] == [["task", "-", "sums"]]


def test_a_run_that_is_not_finished_is_named(tmp_path: Path) -> None:
    one, two = (made(tmp_path / name, {"ensemble": 20}, {}) for name in ("one", "two"))
    rows = [row for row in read_json_lines(two / "results.jsonl") if row["kind"] != "answers"]
    rounds = in_run(round_records(np.random.default_rng(0)), "two", 0)
    write_json_lines(two / "results.jsonl", [*rows, *rounds])
    with pytest.raises(ValueError, match=r"^two: no record of kind 'answers' on test questions: run evaluate first"):
        compare_runs(one, two)


def test_the_command_prints_both_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = made(tmp_path / "one", {"ensemble": 20}, {"seed": 1})
    two = made(tmp_path / "two", {"ensemble": 50}, {"seed": 2})
    assert main(["compare", str(one), str(two)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"seed +1 +2", printed)
    assert re.search(r"Ensemble +33\.3% +83\.3%", printed)
    assert main(["compare", str(one), str(tmp_path / "three")]) == 2
    assert "three" in capsys.readouterr().err
