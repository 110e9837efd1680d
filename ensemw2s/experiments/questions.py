"""The questions of an experiment: from their sources to its splits, and what level each of them has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ensemw2s.data.levels import with_levels
from ensemw2s.data.questions import check_disjoint, exclude_questions, load_questions, split_questions
from ensemw2s.experiments.config import SPLITS, DataConfig
from ensemw2s.runtime.records import TEST_SPLITS, LevelsRecord, questions_digest

if TYPE_CHECKING:
    from datasets import Dataset

# The names of splits in records, and those of their files.
MEASURED_SPLITS = {"validation": "validation", "id": "test_id", "ood": "test_ood"}
# Those whose levels are recorded: what was trained on, and what is asked.
_LEVELLED = {"train": "train"} | {split: MEASURED_SPLITS[split] for split in TEST_SPLITS}


def easy_and_hard(data: DataConfig) -> tuple[Dataset, Dataset]:
    """Return the questions of the two sources `data.easy` and `data.hard`, none of them twice."""
    assert data.easy is not None and data.hard is not None
    easy = load_questions(data.easy)
    return easy, exclude_questions(load_questions(data.hard), [easy])


def splits_of(data: DataConfig, easy: Dataset, hard: Dataset, seed: int) -> dict[str, Dataset]:
    """Return the splits of an experiment, by `SPLITS`, with a column `level` where the configuration says what it is.

    Raises:
        ValueError: fewer questions than the splits take, or no level where there should be one.
    """
    if data.level is not None:
        settings = {"count": data.level.count, "column": data.level.column}
        easy, hard = (
            with_levels(questions, f"data.level: {kind} questions", **settings)
            for kind, questions in (("easy", easy), ("hard", hard))
        )
    splits = dict(split_questions(easy, {name: data.sizes[name] for name in SPLITS[:3]}, seed))
    splits |= split_questions(hard, {name: data.sizes[name] for name in SPLITS[3:]}, seed)
    check_disjoint(splits)
    return splits


def levels_records(data: DataConfig, splits: Mapping[str, Dataset]) -> list[dict[str, Any]]:
    """Return the records of the levels of a run's questions; none where the configuration knows no levels."""
    if data.level is None:
        return []
    return [
        LevelsRecord(
            split=split, levels=splits[name]["level"][:], questions=questions_digest(splits[name]["id"]),
            rule=data.level.rule,
        ).to_json()
        for split, name in _LEVELLED.items()
    ]  # fmt: skip
