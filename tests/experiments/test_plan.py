"""Estimates against the run that follows: counted work, memory, disk; and the command."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from ensemw2s.cli import main
from ensemw2s.experiments.config import ExperimentConfig, build_config
from ensemw2s.experiments.experiment import Experiment
from ensemw2s.experiments.plan import PhaseEstimate, decoding_work, plan, plan_table, training_work
from ensemw2s.inference.inspection import inspect_answer
from ensemw2s.training.arguments import AnswerTrainingArguments
from tests.experiments.test_experiment import settings
from tests.tiny import questions, random_word


def with_choices(folder: Path, **changes: Any) -> ExperimentConfig:
    """Choices of one length: how many tokens a pseudo-answer has is known before."""
    import torch

    values = settings(folder, **changes)
    for name, seed in (("easy", 1), ("hard", 2)):
        generator = torch.Generator().manual_seed(seed)
        words = [random_word(generator, 3 + i % 9) for i in range(60)]
        rows = [
            {"prompt": f"{w}{seed}{i}", "answer": w[:2], "choices": [w[:2], "1" + w[0]]} for i, w in enumerate(words)
        ]
        Dataset.from_list(rows).to_json(folder / f"{name}.jsonl")
    return build_config(values)


@pytest.fixture(scope="module", params=["adapters", "whole models"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The estimate of an experiment with choices, and its run: by phase, and the run's folder."""
    folder = tmp_path_factory.mktemp("plan")
    config = with_choices(folder, **({"lora": None} if request.param == "whole models" else {}))
    estimates = {estimate.phase: estimate for estimate in plan(config)}
    assert not config.folder.exists(), "an estimate leaves nothing behind"
    shown: list[int] = []

    def counted(ensemble: Any, ids: list[int], start: int) -> Any:
        shown.append(ensemble.num_experts * len(ids))
        return inspect_answer(ensemble, ids, start)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ensemw2s.experiments.samples.inspect_answer", counted)
        records = Experiment(config).run()
    taken = {record["phase"]: record for record in records if record["kind"] == "phase"}
    # Which answers are looked at token by token is not known before they are measured.
    taken["evaluate"]["tokens"] -= sum(shown)
    return estimates, taken, config.folder


def test_the_estimated_tokens_and_flops_are_those_of_the_run(both: Any) -> None:
    estimates, taken, _ = both
    assert list(estimates) == list(taken)
    for phase, estimate in estimates.items():
        assert estimate.tokens == taken[phase]["tokens"], phase
        # Which questions share a training batch is drawn, and with it the padding.
        assert estimate.flops == pytest.approx(taken[phase]["flops"], rel=0.05), phase
    assert estimates["label"].flops == pytest.approx(taken["label"]["flops"], rel=1e-9)


def test_the_estimated_memory_and_disk_are_those_of_the_run(both: Any) -> None:
    estimates, taken, folder = both
    for phase, estimate in estimates.items():
        assert estimate.peak_memory == pytest.approx(taken[phase]["peak_memory"], rel=0.25)
        assert estimate.seconds > 0
    # Experts that arms share are links to one file.
    files = [f.stat() for f in folder.rglob("*") if f.is_file() and f.suffix in (".safetensors", ".json")]
    models = sum({file.st_ino: file.st_size for file in files}.values())
    assert estimates["boost"].disk + estimates["student"].disk == pytest.approx(models, rel=0.25)


def test_decoded_answers_are_estimated_by_the_true_ones(tmp_path: Path) -> None:
    config = build_config(settings(tmp_path))
    estimates = {estimate.phase: estimate for estimate in plan(config)}
    records = Experiment(config).run(("data", "boost", "label"))
    taken = {record["phase"]: record for record in records if record["kind"] == "phase"}
    assert estimates["boost"].tokens == taken["boost"]["tokens"]
    assert estimates["label"].tokens == pytest.approx(taken["label"]["tokens"], rel=0.35)
    assert estimates["label"].flops == pytest.approx(taken["label"]["flops"], rel=0.35)


def test_a_rating_is_estimated_without_being_made(tmp_path: Path) -> None:
    values = settings(tmp_path)
    del values["data"]["easy"], values["data"]["hard"]
    questions(130).to_json(tmp_path / "all.jsonl")
    values["data"] |= {"questions": {"file": str(tmp_path / "all.jsonl")}, "difficulty": {"folds": 3}}
    config = build_config(values)
    trained = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ensemw2s.experiments.rating.fine_tune", lambda *args, **options: trained.append(args))
        estimate = plan(config)[0]
    assert estimate.phase == "data" and not trained
    taken = Experiment(config).run(("data",))[-1]
    assert estimate.tokens == taken["tokens"]
    assert estimate.flops == pytest.approx(taken["flops"], rel=0.05)
    assert estimate.peak_memory == pytest.approx(taken["peak_memory"], rel=0.25)


@pytest.mark.parametrize(
    ("changes", "passes"),
    [({"num_train_epochs": 3}, 3.0), ({"num_train_epochs": 1.5}, 1.5), ({"max_steps": 5}, 5 / 4),
     ({"num_train_epochs": 2, "gradient_accumulation_steps": 3}, 2.0)],
)  # fmt: skip
def test_training_work_follows_epochs_and_steps(changes: dict[str, Any], passes: float, tmp_path: Path) -> None:
    args = AnswerTrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=4, **changes)
    work = training_work([10] * 16, [3] * 16, args)
    assert (work.tokens, work.padded, work.head, work.pairs) == tuple(16 * passes * n for n in (10, 10, 3, 100))


def test_padding_is_counted_in_training_and_decoding(tmp_path: Path) -> None:
    args = AnswerTrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=8, num_train_epochs=1)
    work = training_work([3, 9], [1, 2], args)
    assert (work.tokens, work.padded, work.head, work.pairs) == (12, 12, 3, 144)
    args.padding_free = False
    work = training_work([3, 9], [1, 2], args)
    assert (work.tokens, work.padded, work.head, work.pairs) == (12, 18, 3, 2 * 81)
    reading, writing, steps = decoding_work([4, 2, 5], [2, 9, 3], batch_size=2, max_new_tokens=6)
    # Batches of prompts (2, 4) and (5): the first goes on to the limit, the second for 3 tokens.
    assert (reading.tokens, reading.padded, reading.head, reading.pairs) == (11, 13, 3, 2 * 16 + 25)
    assert steps == 5 + 2
    assert writing.padded == writing.head == 2 * 5 + 2
    assert writing.pairs == 2 * sum(range(5, 10)) + 6 + 7


def test_the_command_shows_every_phase_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings(tmp_path)))
    assert main(["plan", str(config), "boosting.num_rounds=1"]) == 0
    shown = capsys.readouterr().out
    for words in ("Phase", "Tokens", "TFLOP", "Time", "Peak memory, GB", "Disk, MB"):
        assert words in shown
    first = [line.split()[0] for line in shown.splitlines() if line.strip()]
    assert [word for word in first if word in ("data", "boost", "label", "student", "evaluate", "all")] == [
        "data", "boost", "label", "student", "evaluate", "all",
    ]  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_a_bad_plan_is_refused_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    values = settings(tmp_path)
    values["data"]["sizes"] = values["data"]["sizes"] | {"train": 500}
    config.write_text(yaml.safe_dump(values))
    assert main(["plan", str(config)]) == 2
    assert "distinct questions, the dataset has 60" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", str(config), "--overwrite"])


def test_the_last_row_of_the_table_is_the_whole() -> None:
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    parts = [PhaseEstimate("boost", 1000, 2e12, 90, 3 * 10**9, 10**6), PhaseEstimate("label", 5, 1e12, 130, 10**9, 0)]
    console.print(plan_table(parts))
    rows = [line.split() for line in console.export_text().splitlines() if line.strip()]
    assert rows[-1] == ["all", "1,005", "3", "4", "min", "3.00", "1.0"]
    assert rows[-3] == ["boost", "1,000", "2", "90", "s", "3.00", "1.0"]
    assert rows[-2] == ["label", "5", "1", "2", "min", "1.00", "0.0"]
