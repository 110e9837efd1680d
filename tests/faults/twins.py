"""Two processes on one folder, file or store: one works and the other says so; what is left is what one would leave."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from ensemw2s import BoostingConfig, BoostingTrainer, StudentConfig, StudentTrainer, TokenEnsemble
from ensemw2s.cli import main
from ensemw2s.experiments.config import build_config
from ensemw2s.experiments.experiment import Experiment
from ensemw2s.experiments.folder import PHASES
from ensemw2s.runtime.files import read_json_lines
from tests.boosting.test_trainer import kept
from tests.experiments.test_study import write_study
from tests.faults import runs
from tests.faults.battery import Case
from tests.running import fork, wait
from tests.tiny import FORMAT, llama, lora, questions, saved_adapters, tokenizer

_TRAINED: dict[str, Any] = {
    "max_steps": 2, "disable_tqdm": True, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1,
}  # fmt: skip
_LONGEST = 120.0
_MOMENTS = 6

Work = Callable[[], int | None]


def cases(long: bool, seed: int) -> Iterator[Case]:
    """Pairs of processes; in the long pass of all phases, at several moments."""
    yield Case("two scripts on one output_dir", two_trainers)
    yield Case("two scripts on one file of labels", two_labellings)
    if not long:
        return
    generator = random.Random(f"twins {seed}")
    yield Case("two students in one folder of checkpoints", two_students)
    yield Case("two runs of one store", one_store)
    yield Case("two studies with one file of records", two_studies)
    for phase in ("run", "boost", *PHASES[2:-1]):
        yield Case(f"two of {phase}", _two_commands(phase, generator))


def twins(first: Work, second: Work, folder: Path, lock: Path, names: Path, moment: float = 0.0) -> int:
    """Stop `first` while it holds a lock, let `second` be refused, and let `first` end; return how many tries it was.

    Args:
        first: what the one does.
        second: what the other does, which must end with our sentence and exit code 2.
        folder: where what they say is kept.
        lock: the file that the first one locks.
        names: what the second one must say is in use.
        moment: how long the first one lives with its lock, in seconds.
    """
    said = [folder / "first.txt", folder / "second.txt"]
    one = fork(first, said[0])
    end = time.monotonic() + _LONGEST
    while not (lock.exists() and lock.read_text().endswith("\n")):
        _require(os.waitpid(one, os.WNOHANG)[0] == 0 and time.monotonic() < end, "the first took no lock", said[0])
        time.sleep(0.002)
    time.sleep(moment)
    os.kill(one, signal.SIGSTOP)
    if os.waitpid(one, os.WNOHANG)[0]:
        return 0
    if not lock.exists():  # it lives on, but is done with the folder
        os.kill(one, signal.SIGCONT)
        _require(wait(one) == 0, "the first did not end well", said[0])
        return 0
    status = wait(fork(second, said[1]))
    os.kill(one, signal.SIGCONT)
    _require(status == 2, f"the second ended with {status}", said[1])
    _require(f"{names} is in use by process {one} on " in said[1].read_text(), "no sentence", said[1])
    status = wait(one)
    _require(status == 0, f"the first ended with {status}", said[0])
    return 1


def _require(held: bool, what: str, said: Path) -> None:
    if not held:
        raise AssertionError(f"{what}\n{said.read_text()[-3000:]}")


def refused(work: Callable[[], Any]) -> Work:
    """Let a script end as the command line does: an error in words and exit code 2."""

    def script() -> int:
        try:
            work()
        except RuntimeError as error:
            print(f"error: {error}")
            return 2
        return 0

    return script


# Scripts


def boosting(folder: Path, **settings: Any) -> BoostingTrainer:
    """Return a trainer of two rounds."""
    args = BoostingConfig(output_dir=str(folder), num_rounds=2, prior=0.99, **(_TRAINED | settings))
    options: dict[str, Any] = {"processing_class": tokenizer(), "peft_config": lora(), "question_format": FORMAT}
    return BoostingTrainer(llama(0), args=args, train_dataset=questions(8), **options)


def two_trainers(folder: Path) -> int:
    """Train in one folder, with the same settings and with others that would overwrite."""
    boosting(folder / "reference").train()
    tried = 0
    for name, settings in (("same", {}), ("other", {"seed": 3, "overwrite": True})):
        own = folder / name
        lock = own / "ensemw2s.boosting.lock"
        work = refused(lambda own=own: boosting(own).train())
        twin = refused(lambda own=own, settings=settings: boosting(own, **settings).train())
        tried += twins(work, twin, folder, lock, own)
        assert kept(own) == kept(folder / "reference"), name
    return tried


def two_labellings(folder: Path) -> int:
    """Label into one file."""
    adapters = saved_adapters(folder, count=2)

    def label(file: Path) -> None:
        ensemble = TokenEnsemble.from_adapters(llama(0), adapters, [1.0, 0.5])
        options: dict[str, Any] = {"max_new_tokens": 4, "batch_size": 1, "description": None}
        ensemble.label(questions(24), tokenizer(), question_format=FORMAT, output_file=file, **options)

    label(folder / "reference.jsonl")
    file = folder / "labels.jsonl"
    work = refused(lambda: label(file))
    tried = twins(work, work, folder, file.with_name(".labels.jsonl.lock"), file)
    assert read_json_lines(file) == read_json_lines(folder / "reference.jsonl")
    return tried


def two_students(folder: Path) -> int:
    """Train students whose checkpoints would lie in one folder."""

    def train(name: str) -> None:
        options: dict[str, Any] = {"processing_class": tokenizer(), "question_format": FORMAT}
        args = StudentConfig(output_dir=str(folder / "both"), **(_TRAINED | {"max_steps": 40}))
        trainer = StudentTrainer(llama(0), args, questions(8), **options)
        trainer.train()
        trainer.save_model(folder / name)

    train("reference")
    checkpoints = folder / "both" / "checkpoints"
    lock = checkpoints / "ensemw2s.checkpoints.lock"
    tried = twins(refused(lambda: train("one")), refused(lambda: train("two")), folder, lock, checkpoints)
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("one", "reference")]
    assert weights[0] == weights[1]
    return tried


# Commands


def _two_commands(phase: str, generator: random.Random) -> Callable[[Path], int]:
    def pair(folder: Path) -> int:
        models = runs.sources(folder)
        earlier = () if phase == "run" else PHASES[: max(PHASES.index(phase), 0) if phase != "boost" else 0]
        Experiment(build_config(runs.settings(models, folder / "reference"))).run()
        reference = runs.results(folder / "reference" / "small")
        tried = 0
        for moment in range(_MOMENTS):
            values = runs.settings(models, folder / str(moment))
            config = runs.write_config(folder / f"{moment}.json", values)
            run = folder / str(moment) / "small"
            if earlier:
                Experiment(build_config(values)).run(tuple(earlier))
            for lock in run.glob("ensemw2s.run.lock"):
                lock.unlink()
            # The same again, another phase, and one that would delete the run.
            words = generator.choice(
                [("run", config), ("label", config), (phase, config), ("run", config, "--overwrite", "seed=9")]
            )
            work, twin = _command(phase, config), _command(*words)
            lives = generator.choice([0.0, generator.uniform(0, 2)])
            tried += twins(work, twin, folder, run / "ensemw2s.run.lock", run, lives)
            status = runs.command("run", config, said=folder / "last.txt")
            _require(status == 0, f"it does not go on after {words}", folder / "last.txt")
            runs.require_same(run, reference, f"{phase} beside {words}")
        return tried

    return pair


def _command(*words: object) -> Work:
    return lambda: main([str(word) for word in words])


def one_store(folder: Path) -> int:
    """Run twice at once with one store: both work, and end as alone."""
    models = runs.sources(folder)
    Experiment(build_config(runs.settings(models, folder / "reference"))).run()
    reference = _but_costs(runs.results(folder / "reference" / "small"))
    for attempt in range(_MOMENTS):
        store = {"store": str(folder / f"store-{attempt}")}
        configs = [
            runs.write_config(folder / f"{attempt}-{i}.json", runs.settings(models, folder / f"{attempt}-{i}") | store)
            for i in (0, 1)
        ]
        said = [folder / f"said-{i}.txt" for i in (0, 1)]
        pids = [fork(_command("run", config), file) for config, file in zip(configs, said, strict=True)]
        for pid, file in zip(pids, said, strict=True):
            status = wait(pid)
            _require(status == 0, f"a run with a shared store ended with {status}", file)
        for i in (0, 1):
            found = _but_costs(runs.results(folder / f"{attempt}-{i}" / "small"))
            assert found == reference, f"{attempt}-{i} differs from a run alone"
    return _MOMENTS


def _but_costs(found: dict[str, Any]) -> dict[str, Any]:
    """Leave out what finding an expert in the store makes cheaper, and the store itself."""
    shown = {name: content for name, content in found.items() if not name.startswith(("store/", "records/"))}
    shown["results.jsonl"] = [row for row in found["results.jsonl"] if row["kind"] not in ("cost", "phase", "round")]
    return shown


def two_studies(folder: Path) -> int:
    """Add to one file of records from two studies, one of them with several jobs."""
    file = write_study(folder, seeds=1)
    values = yaml.safe_load(file.read_text())
    values["boosting"] |= {"num_train_epochs": 1}
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    command, records = ["study", str(file), "--records"], folder / "kept.jsonl"
    status = runs.command(
        *command, folder / "reference.jsonl", "output_dir=" + str(folder / "alone"), said=folder / "x.txt"
    )
    _require(status == 0, "the study alone", folder / "x.txt")
    work, twin = _command(*command, records), _command(*command, records, "--jobs", "2")
    tried = twins(work, twin, folder, folder / ".kept.jsonl.lock", records)
    left = [_answers(path) for path in (records, folder / "reference.jsonl")]
    assert left[0] == left[1] and left[0]
    return tried


def _answers(file: Path) -> list[dict[str, Any]]:
    return [row for row in read_json_lines(file) if row["kind"] in ("answers", "arm")]
