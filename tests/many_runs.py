"""Records of a study as tests need them: several tasks and seeds, arms whose true accuracies are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import ndtr

from ensemw2s.report.pool import Pool, pool_runs
from ensemw2s.report.statistics import accuracy
from ensemw2s.runtime.records import answers_text, parse_records, questions_digest

# True accuracies (ID, OOD) of each arm before the task's own ease is added.
SKILL = {
    "single_expert": (0.50, 0.20), "deep_ensemble": (0.56, 0.26), "paper": (0.40, 0.12), "ensemble": (0.58, 0.30),
    "no_shrinkage": (0.52, 0.22), "student_single": (0.60, 0.30), "student_ensemble": (0.64, 0.40),
    "ceiling": (0.75, 0.70),
}  # fmt: skip
EASE = {"reversal": 0.0, "sums": 0.10, "sorting": -0.05}
COMPARISONS = (("ensemble", "deep_ensemble"), ("student_ensemble", "student_single"), ("ensemble", "paper"))
SPLITS = ("id", "ood")


def simulate(
    generator: np.random.Generator, skills: Sequence[float], seeds: int, n: int, spread: float = 0.1
) -> np.ndarray:
    """Return bool [arms, seeds, n]: right answers whose expectation over seeds and questions is about `skills`.

    Questions are as hard for all arms and seeds; each trained model has an effect of its own, normal with a standard
    deviation of `spread` on the probit scale. The expectation is exact.
    """
    hardness = np.sqrt(0.5) * generator.standard_normal(n)
    own = np.sqrt(0.5) * generator.standard_normal((len(skills), seeds, n))
    model = spread * generator.standard_normal((len(skills), seeds, 1))
    return ndtr((hardness + own + model) / np.sqrt(1 + spread**2)) < np.reshape(skills, (-1, 1, 1))


def study_records(
    *,
    skill: Mapping[str, tuple[float, float]] = SKILL,
    ease: Mapping[str, float] = EASE,
    seeds: int = 3,
    n: int = 80,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return the records of a finished study, the one of kind `study` last."""
    generator = np.random.default_rng(seed)
    records: list[dict[str, Any]] = []
    for task, easier in ease.items():
        for column, split in enumerate(SPLITS):
            correct = simulate(generator, [values[column] + easier for values in skill.values()], seeds, n)
            digest = questions_digest(f"{task}-{split}-{i}" for i in range(n))
            for arm, by_seed in zip(skill, correct, strict=True):
                for s, answers in enumerate(by_seed):
                    records += answer_records(answers, digest, task=task, seed=s, arm=arm, split=split)
        for s in range(seeds):
            records += [cost_record(arm, task=task, seed=s) for arm in skill]
            records += [pgr_record(arm, task=task, seed=s) for arm in skill if arm.startswith("student")]
    study = {
        "kind": "study",
        "name": "small_pair",
        "primary_split": "ood",
        "comparisons": [list(p) for p in COMPARISONS],
    }
    return [*records, study]


def answer_records(answers: np.ndarray, digest: str, **place: Any) -> list[dict[str, Any]]:
    """Return the records of kind `arm` and `answers` of one arm on one split; `place` is task, seed, arm, split."""
    estimate = accuracy(answers)._asdict()
    return [
        {"kind": "arm", **place, "metric": "accuracy", **estimate, "n": len(answers)},
        {"kind": "answers", **place, "correct": answers_text(answers), "questions": digest},
    ]


def with_levels(
    records: Sequence[dict[str, Any]], known: Sequence[str], trained: Sequence[str], **changes: Any
) -> list[dict[str, Any]]:
    """Return the records with the levels of the hard questions, which are the same with every seed."""
    digests = {
        (record["task"], record["seed"]): record["questions"]
        for record in records
        if record["kind"] == "answers" and record["split"] == "ood"
    }
    found: list[dict[str, Any]] = []
    for (task, seed), digest in digests.items():
        place = {"kind": "levels", "task": task, "seed": seed, "rule": "letters"}
        found.append({**place, "split": "train", "levels": list(trained), "questions": "0" * 16})
        found.append({**place, "split": "ood", "levels": list(known), "questions": digest, **changes})
    return [*records, *found]


def cost_record(arm: str, **place: Any) -> dict[str, Any]:
    """Return what an arm cost: 1 TFLOP and 10 s with seed 0, a tenth more with each seed; ensembles thrice that."""
    size = (1 + 0.1 * place["seed"]) * (3 if "ensemble" in arm else 1)
    return {
        "kind": "cost", **place, "arm": arm, "train_seconds": 10 * size, "train_tokens": 1000 * size,
        "train_flops": 1e12 * size, "inference_seconds": size, "inference_tokens": 100, "inference_flops": 1e11 * size,
    }  # fmt: skip


def pgr_record(arm: str, **place: Any) -> dict[str, Any]:
    """Return a student's share of the gap as a run leaves it, which a pool works out anew."""
    return {"kind": "pgr", **place, "arm": arm, "split": "ood", "value": None, "low": None, "high": None,
            "defined": False}  # fmt: skip


def pool_of(records: Sequence[Mapping[str, Any]]) -> Pool:
    """Return the pool of records that were read as JSON."""
    return pool_runs(parse_records(records))


def outcomes(records: Sequence[Mapping[str, Any]], arm: str, split: str) -> dict[str, np.ndarray]:
    """Return an arm's answers by task, [seeds, n], read from the records by hand."""
    found: dict[str, list[list[int]]] = {}
    for record in records:
        if record["kind"] == "answers" and (record["arm"], record["split"]) == (arm, split):
            found.setdefault(record["task"], []).append([int(bit) for bit in record["correct"]])
    return {task: np.array(rows) for task, rows in found.items()}
