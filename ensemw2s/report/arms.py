"""The arms of a run: their names, their order, what they are called in a report."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ensemw2s.runtime.records import ArmRecord, Record, of_kind

TRUTH = "truth"
# The ends of the gap that students close.
BASELINE, CEILING = "single_expert", "ceiling"

# In the order of tables. Experts by number stand before the best of them.
ARM_NAMES = {
    "zero_shot_weak": "Weak model, zero-shot",
    "zero_shot_strong": "Strong model, zero-shot",
    BASELINE: "Single weak expert",
    "equal_cost": "Single weak expert at equal cost",
    "best_expert": "Best expert on validation",
    "majority_vote": "Majority vote",
    "uniform_average": "Uniform average",
    "bagging": "Bagging",
    "deep_ensemble": "Deep ensemble",
    "deep_ensemble_equal_cost": "Deep ensemble at equal cost",
    "self_trained": "Single weak expert that learns its own answers",
    "paper": "Recipe as published",
    "sequence": "Boosting of whole answers",
    "co_boosted_uniform": "Co-boosting without token weights",
    "co_boosted": "Co-boosting",
    "ensemble": "Ensemble",
    "student_single": "Student of single expert",
    "student_single_longer": "Student of single expert, as many steps as with easy answers",
    "student_bagging": "Student of bagging",
    "student_ensemble": "Student of ensemble",
    "student_confidence": "Student with confidence loss",
    "cross_fitted_single": "Cross-fitted student of single expert",
    "cross_fitted_ensemble": "Cross-fitted student of ensemble",
    "single_with_easy": "Student of single expert, with easy answers",
    "ensemble_with_easy": "Student of ensemble, with easy answers",
    "cross_fitted_single_with_easy": "Cross-fitted student of single expert, with easy answers",
    "cross_fitted_with_easy": "Cross-fitted student of ensemble, with easy answers",
    CEILING: "Ceiling: taught by truth",
}
# Those of runs that belong to no study.
COMPARISONS = (
    ("ensemble", BASELINE),
    ("ensemble", "best_expert"),
    ("ensemble", "uniform_average"),
    ("student_ensemble", "student_single"),
    ("student_ensemble", "ensemble"),
)

# Arms that an ensemble cannot be called after.
TAKEN = ("single_expert", "equal_cost", "ensemble", "uniform_average", "best_expert", "majority_vote", TRUTH, CEILING)

_ORDER = {arm: position for position, arm in enumerate(ARM_NAMES)}


def arm_order(arm: str) -> tuple[tuple[float, int, str], ...]:
    """Return a sorting key: known arms as in `ARM_NAMES`, then others; parts of an ensemble stand behind it."""
    return tuple(_rank(part) for part in arm.split("."))


def _rank(part: str) -> tuple[float, int, str]:
    number = _expert_number(part)
    if number is not None:
        return (_ORDER["best_expert"] - 0.5, number, "")
    return (_ORDER[part], 0, "") if part in _ORDER else (len(_ORDER), 0, part)


def measured_arms(records: Iterable[Record]) -> list[str]:
    """Return the measured arms in the order of tables."""
    return sorted({record.arm for record in of_kind(records, ArmRecord)}, key=arm_order)


def arm_name(arm: str) -> str:
    """Return an arm's name for a reader: "paper.expert_2" is "Recipe as published: expert 2"."""
    whole, _, part = arm.partition(".")
    if part:
        return f"{arm_name(whole)}: {lower_first(arm_name(part))}"
    number = _expert_number(arm)
    text = f"expert {number}" if number is not None else ARM_NAMES.get(arm, arm.replace("_", " "))
    return text[:1].upper() + text[1:]


def _expert_number(arm: str) -> int | None:
    expert = re.fullmatch(r"expert_(\d+)", arm)
    return int(expert[1]) if expert else None


def lower_first(text: str) -> str:
    """Return a name as it stands within a sentence."""
    return text[:1].lower() + text[1:]
