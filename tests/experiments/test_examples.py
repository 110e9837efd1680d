"""Everything in examples/ runs."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from ensemw2s.cli import main
from ensemw2s.experiments.config import load_config, read_settings
from ensemw2s.experiments.experiment import Experiment
from ensemw2s.experiments.study import load_study
from ensemw2s.models.loading import load_tokenizer
from tests.running import fork, wait

EXAMPLES = Path(__file__).parents[2] / "examples"


FILES = sorted(EXAMPLES.glob("*.yaml"))
# A study's file is no configuration by itself.
STUDIES = [path for path in FILES if "tasks" in read_settings(path)]
CONFIGURATIONS = [path for path in FILES if path not in STUDIES]


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.name)
def test_every_configuration_is_valid(path: Path) -> None:
    assert load_config(path).name == path.stem


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_every_study_is_valid(path: Path) -> None:
    study = load_study(path)
    assert study.name == path.stem
    assert study.comparisons


def test_the_example_with_choices_has_one_token_answers_and_enough_questions(tmp_path: Path) -> None:
    config = load_config(EXAMPLES / "syllogisms.yaml", [f"output_dir={tmp_path}"])
    Experiment(config).run(("data",))
    tokens = load_tokenizer(config.weak.source)
    rows = [json.loads(line) for line in (config.folder / "data" / "train.jsonl").read_text().splitlines()]
    assert {len(config.data.format.answer_ids(choice, tokens)) for row in rows for choice in row["choices"]} == {1}
    assert 60 < [row["answer"] for row in rows].count("Yes") < 140


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_script_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), str(tmp_path / "out")])
    said = tmp_path / "said.txt"
    status = wait(fork(lambda: runpy.run_path(str(path), run_name="__main__") and None, said))
    assert status == 0 and "student: " in said.read_text(), said.read_text()


def test_the_quick_demo_runs_from_nothing_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(EXAMPLES / "insert_letters.yaml")
    assert main(["run", config, "--quick", f"output_dir={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    assert "round 3/3" in shown
    assert "ceiling" in shown
    (run,) = tmp_path.iterdir()
    assert (run / "report.html").stat().st_size > 10_000
