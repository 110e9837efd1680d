"""Runs that are interrupted, moved, damaged or given a strange name: what they cost, where they work, what they use."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ensemw2s import BoostingConfig, StudentConfig, StudentTrainer, rate_difficulty
from ensemw2s.experiments.config import build_config, load_config
from ensemw2s.experiments.experiment import Experiment
from ensemw2s.experiments.folder import PHASES
from ensemw2s.experiments.study import Study, load_study
from ensemw2s.runtime import files
from ensemw2s.runtime.files import read_json_lines, write_json
from ensemw2s.runtime.meter import Ledger, count
from tests.experiments.test_study import fake_cells, write_study
from tests.faults import runs
from tests.tiny import FORMAT, llama, lora, questions, tokenizer

MEASURED = PHASES[:-1]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.sources(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def finished(models: Path) -> Path:
    Experiment(build_config(runs.settings(models, models / "run"))).run(MEASURED)
    return models / "run" / "small"


@pytest.fixture(scope="module")
def reference(finished: Path) -> dict[str, Any]:
    return runs.results(finished)


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "elsewhere" / "moved"))


def forget(run: Path, phase: str) -> None:
    """Let a phase, and those behind it, be done again from what it left."""
    for later in PHASES[PHASES.index(phase) :]:
        (run / "records" / f"{later}.jsonl").unlink(missing_ok=True)
    (run / "results.jsonl").unlink()


# Costs


def test_an_interrupted_phase_costs_what_an_uninterrupted_one_does(
    models: Path, reference: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build_config(runs.settings(models, tmp_path))
    append, seen = files.append_whole, []

    def interrupted(path: Path, *args: Any, **options: Any) -> None:
        if path.parent.name == "labels":
            seen.append(path)
            if len(seen) in (2, 4):
                raise KeyboardInterrupt
        append(path, *args, **options)

    monkeypatch.setattr(files, "append_whole", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            Experiment(config).run(MEASURED)
    Experiment(config).run(MEASURED)
    # The records hold tokens and FLOPs of every phase, teacher and arm.
    runs.require_same(tmp_path / "small", reference)
    (label,) = [r for r in read_json_lines(config.folder / "records/label.jsonl") if r["kind"] == "phase"]
    assert label["tokens"] > 0 and label["flops"] > 0


def test_a_ledger_counts_lost_work_once_and_adds_seconds_up(tmp_path: Path) -> None:
    model = llama(0)
    ids = torch.ones(2, 5, dtype=torch.int64)

    def work(ledger: Ledger, *steps: Callable[[], None]) -> dict[str, Any]:
        with ledger.running():
            for step in steps:
                count(model, ids, None, 10)
                step()
            return ledger.total()

    def die() -> None:
        raise KeyboardInterrupt

    def keep(name: str) -> Callable[[], None]:
        return lambda: write_json(tmp_path / name, name)

    whole = work(Ledger(tmp_path / "whole.jsonl"), keep("a"), keep("b"), lambda: None)
    assert whole["tokens"] == 30
    with pytest.raises(KeyboardInterrupt):
        work(Ledger(tmp_path / "cut.jsonl"), keep("a"), die)
    first = Ledger(tmp_path / "cut.jsonl").total()["seconds"]
    resumed = work(Ledger(tmp_path / "cut.jsonl"), keep("b"), lambda: None)
    assert (resumed["tokens"], resumed["flops"]) == (whole["tokens"], whole["flops"])
    assert resumed["seconds"] > first > 0 and resumed["peak_memory"] > 0
    # Written anew without any work, or made anew because the process died before it had a name.
    with Ledger(tmp_path / "cut.jsonl").running() as again:
        write_json(tmp_path / "a", "a")
    assert again.total()["tokens"] == 30 - 10


# Where it works


def test_a_moved_run_is_gone_on_with_where_it_is(
    copied: Path, reference: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    forget(copied, "label")
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    monkeypatch.chdir(copied.parent)
    (tmp_path / "link").symlink_to(copied)
    for given in ("moved", "./moved/", "moved/../moved", str(tmp_path / "link"), "moved/config.json"):
        config = load_config(given)
        assert config.folder.samefile(copied), given
    Experiment(load_config("moved/")).run(MEASURED)
    runs.require_same(copied, reference)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    assert [path.name for path in copied.parent.iterdir()] == ["moved"]


def test_a_name_of_its_own_makes_a_run_of_its_own(copied: Path) -> None:
    assert load_config(copied, ["name=second"]).folder == copied.parent / "second"
    assert load_config(copied, ["output_dir=/there"]).folder == Path("/there/moved")
    assert load_config(copied).task == "small"


@pytest.mark.parametrize("name", [".", "..", "a/b", "/absolute", "../up", "a\0b", ""])
def test_a_name_that_is_no_folders_name_is_refused(models: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"name (must|holds) "):
        build_config(runs.settings(models, tmp_path) | {"name": name})
    file = write_study(tmp_path, name=name.replace("\0", "/"))
    with pytest.raises(ValueError, match=r"name (must|holds) "):
        load_study(file)


def test_a_model_is_no_run_that_could_be_overwritten(models: Path, tmp_path: Path) -> None:
    precious = Path(shutil.copytree(models / "weak", tmp_path / "precious"))
    before = runs.results(precious)
    for overwrite in (True, False):
        with pytest.raises(ValueError, match=r"precious is not empty and holds no run of ours .*config\.json"):
            Experiment(build_config(runs.settings(models, tmp_path) | {"name": "precious"}), overwrite=overwrite)
    assert runs.results(precious) == before
    assert not [path for path in precious.iterdir() if path.name.startswith("ensemw2s.")]


def test_overwriting_a_run_spares_what_it_did_not_write(models: Path, copied: Path) -> None:
    config = load_config(copied, ["seed=5"])
    stranger = copied / "students" / "pupil" / "only_copy.csv"
    stranger.write_text("x")
    with pytest.raises(ValueError, match=r"among its files some that are not ours: students/pupil/only_copy\.csv"):
        Experiment(config, overwrite=True)
    assert (copied / "results.jsonl").exists()
    stranger.rename(copied / "only_copy.csv")
    Experiment(config, overwrite=True)
    left = sorted(path.name for path in copied.iterdir() if not path.name.startswith("ensemw2s."))
    assert left == ["config.json", "only_copy.csv"]


# What it uses


@pytest.mark.parametrize(
    ("phase", "name", "damage", "redone"),
    [
        ("report", "records/boost.jsonl", "emptied", []),
        ("evaluate", "records/boost.jsonl", "halved", []),
        ("evaluate", "data/test_id.jsonl", "halved", []),
        ("student", "labels/ensemble.jsonl", "flipped", ["students/pupil"]),
        ("evaluate", "scores/mixtures.json", "flipped", []),
        ("evaluate", "students/pupil/cost.json", "gone", []),
        ("evaluate", "students/pupil/adapter_model.safetensors", "flipped", ["scores/pupil.json"]),
        ("label", "ensemble/experts/1/adapter_model.safetensors", "flipped", []),
        ("boost", "boosting/rounds/1/attempt-1/record.json", "flipped", []),
        ("boost", "boosting/rounds/2/weights.npy", "halved", []),
        ("boost", "boosting/rounds/2/weights.npy", "gone", []),
    ],
)
def test_a_damaged_file_is_refused_and_made_anew_as_its_message_says(
    copied: Path, reference: dict[str, Any], phase: str, name: str, damage: str, redone: list[str]
) -> None:
    forget(copied, phase)
    for made in redone:
        delete(copied / made)
    file = copied / name
    content = bytearray(file.read_bytes())
    file.unlink()
    if damage != "gone":
        content[len(content) // 2] ^= 1
        file.write_bytes({"emptied": b"", "flipped": content, "halved": content[: len(content) // 2]}[damage])
    for _ in range(4):
        try:
            Experiment(load_config(copied)).run(MEASURED)
            break
        except (ValueError, FileNotFoundError) as error:
            assert re.match(rf"{re.escape(str(copied))}\S* is (damaged|gone)", str(error))
            told = re.search(r"Delete (\S+)(?: and (/\S+),)?", str(error))
            assert told is not None
            for path in filter(None, told.groups()):
                delete(Path(path))
    else:
        raise AssertionError("it does not go on")
    runs.require_same(copied, reference)


def delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def test_records_of_a_study_that_were_cut_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fake_cells(monkeypatch)
    file, kept = write_study(tmp_path, seeds=1), tmp_path / "kept.jsonl"
    Study(load_study(file), kept).run()
    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(lines[:-1]))
    with pytest.raises(
        ValueError, match=r"kept\.jsonl: the records of letters, seed 0, are not those that were measured"
    ):
        Study(load_study(file), kept).run()
    kept.write_text("".join(lines[:-2]))
    Study(load_study(file), kept).run()
    assert run == [("plain", 0), ("letters", 0), ("letters", 0)]
    kept.write_text("".join(lines) + lines[0][:20])
    with pytest.raises(ValueError, match=r"kept\.jsonl, line \d+ is not valid JSON"):
        Study(load_study(file), kept).run()


def test_a_study_overwrites_no_log_of_somebody_else(tmp_path: Path) -> None:
    file = write_study(tmp_path, seeds=1)
    log = tmp_path / "run" / "tiny" / "plain-0.log"
    log.parent.mkdir(parents=True)
    log.write_text("mine")
    with pytest.raises(ValueError, match=r"holds no study of ours .*plain-0\.log"):
        Study(load_study(file)).run()
    assert log.read_text() == "mine"


# Trainers by themselves


def test_trainers_delete_no_checkpoints_of_somebody_else(tmp_path: Path) -> None:
    theirs = tmp_path / "checkpoints" / "checkpoint-500" / "model.safetensors"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"days of training")
    options: dict[str, Any] = {"processing_class": tokenizer(), "question_format": FORMAT, "peft_config": lora()}
    steps: dict[str, Any] = {"max_steps": 1, "disable_tqdm": True}
    with pytest.raises(ValueError, match=r"checkpoints is not empty and holds no checkpoints of ours .*checkpoint-500"):
        args = BoostingConfig(output_dir=str(tmp_path), save_strategy="steps", save_steps=1, **steps)
        rate_difficulty(llama(0), questions(6), args, folds=2, **options)
    student = StudentTrainer(llama(0), StudentConfig(output_dir=str(tmp_path), **steps), questions(6), **options)
    student.train()
    student.save_model(tmp_path / "student")
    assert theirs.read_bytes() == b"days of training"
