"""Whole runs of the tiny models that end within seconds, each in a process of its own, and what they leave."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from ensemw2s.cli import main
from ensemw2s.runtime.files import read_json
from tests.running import fork, wait
from tests.tiny import FORMAT, questions, saved_model

# Adapters whose training keeps checkpoints, students of caches; a rating before; whole models and live teachers.
VARIANTS = ("adapters", "rated", "whole")
_FREE = ("seconds", "peak_memory", "mark", "blake2b", "bytes")


def sources(folder: Path) -> Path:
    """Write the models and questions of all variants."""
    saved_model(folder / "weak", seed=0)
    saved_model(folder / "strong", seed=1)
    questions(24).to_json(folder / "easy.jsonl")
    questions(24, seed=8, start=24).to_json(folder / "hard.jsonl")
    return folder


def settings(models: Path, output_dir: Path, variant: str = "adapters", **changes: Any) -> dict[str, Any]:
    """Return the settings of a run called "small" that trains for a step or three at a time."""
    training = {
        "num_train_epochs": 1, "learning_rate": 2e-2, "per_device_train_batch_size": 4, "disable_tqdm": True,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    if variant != "whole":
        training |= {"save_strategy": "steps", "save_steps": 1}
    data: dict[str, Any] = {
        "format": {"prompt_template": FORMAT.prompt_template, "answer_prefix": FORMAT.answer_prefix},
        "easy": {"file": str(models / "easy.jsonl")}, "hard": {"file": str(models / "hard.jsonl")},
        "sizes": dict.fromkeys(("train", "validation", "test_id", "unlabelled", "test_ood"), 6) | {"validation": 4},
    }  # fmt: skip
    if variant == "rated":
        del data["easy"], data["hard"]
        data |= {"questions": {"file": str(models / "easy.jsonl")}, "difficulty": {"folds": 2, "resolution": 0}}
        data["sizes"] = dict.fromkeys(data["sizes"], 3)
    student = {"keep_unfinished": True, **training}
    if variant == "adapters":
        student |= {"variant": "soft", "top_logprobs": 4}
    if variant == "whole":
        student |= {"variant": "soft"}
    return {
        "name": "small", "output_dir": str(output_dir), "weak": {"source": str(models / "weak")},
        "strong": {"source": str(models / "strong")}, "data": data,
        "lora": None if variant == "whole" else {"r": 2, "target_modules": ["q_proj"]},
        "boosting": {"num_rounds": 2, "prior": 0.99, **training}, "student": student,
        "students": {"pupil": {"teacher": "ensemble"}}, "labelling": {"max_new_tokens": 3, "batch_size": 2},
        "threads": 1,
    } | changes  # fmt: skip


def write_config(file: Path, values: dict[str, Any]) -> Path:
    """Write settings as a configuration file."""
    file.write_text(json.dumps(values))
    return file


def command(*words: object, said: Path) -> int:
    """Run a command of the command line in a process of its own and return its exit status."""
    return wait(fork(lambda: main([str(word) for word in words]), said))


def results(run: Path) -> dict[str, Any]:
    """Return everything that a run left, by relative name, but clocks, memory and what is meant to differ."""
    found: dict[str, Any] = {}
    for file in sorted(run.rglob("*")):
        if not file.is_dir() and not file.name.startswith("ensemw2s.") and file.suffix != ".lock":
            found[str(file.relative_to(run))] = _content(file)
    return found


def _content(file: Path) -> Any:
    if file.name == "report.html" or file.name.endswith("costs.jsonl"):
        return None
    if file.suffix == ".jsonl":
        return [_without_clocks(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    if file.suffix == ".json":
        return _without_clocks(read_json(file))
    return file.read_bytes()


def _without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: sorted(map(str, item)) if key == "target_modules" and isinstance(item, list) else _without_clocks(item)
            for key, item in value.items()
            if key != "output_dir" and not any(name in key for name in _FREE)
        }
    return [_without_clocks(item) for item in value] if isinstance(value, list) else value


def require_same(run: Path, reference: dict[str, Any], said: str = "") -> None:
    """Raise AssertionError, naming what differs, unless a run left what the reference did."""
    found = results(run)
    missing, more = sorted(reference.keys() - found.keys()), sorted(found.keys() - reference.keys())
    differing = [name for name in sorted(reference.keys() & found.keys()) if found[name] != reference[name]]
    if missing or more or differing:
        shown = [f"{name}: {str(found[name])[:300]} != {str(reference[name])[:300]}" for name in differing[:3]]
        raise AssertionError(f"missing {missing}, more {more}, differing {differing}: {shown}\n{said}")


def silent() -> io.StringIO:
    """Return somewhere to write what nobody reads."""
    return io.StringIO()
