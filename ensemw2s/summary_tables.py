"""Tables of many runs, as rows of text: for the report and for Markdown files.

Every table takes a `summary.Pool`, and by keyword what can be chosen about it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from ensemw2s.evaluate import Interval, PerformanceGapRecovered
from ensemw2s.records import TEST_SPLITS, arm_name, lower_first
from ensemw2s.summary import (
    BASELINE,
    Pair,
    Pool,
    accuracy,
    check_arm,
    difference,
    flops_per_point,
    gap_recovered,
    mean_cost,
    measured_comparisons,
    reference_arm,
    shared_tasks,
)
from ensemw2s.tables import (
    Rows,
    amount_text,
    difference_interval,
    difference_text,
    interval_text,
    without_empty_columns,
)

UNDEFINED = "undefined"
_Figure = TypeVar("_Figure")


def accuracies(pool: Pool, *, arms: Sequence[str] | None = None) -> Rows:
    """Return each arm's mean accuracy over tasks, with its interval, and the number of tasks that measured it."""
    headers = ["Arm", *(f"{name}, %" for name in TEST_SPLITS.values()), "Tasks"]
    rows = [
        [
            arm_name(arm),
            *(_accuracy_text(accuracy(pool, arm, split)) for split in TEST_SPLITS),
            str(len(_tasks(pool, arm))),
        ]
        for arm in _chosen(pool, arms)
    ]
    return headers, rows


def by_task(pool: Pool, *, arms: Sequence[str] | None = None, split: str | None = None) -> Rows:
    """Return each arm's accuracy on each task: on both splits, or on one with its interval."""
    if split is not None:
        name = TEST_SPLITS[check_split(split)]
        rows = [
            [arm_name(arm), *(_accuracy_text(accuracy(pool, arm, split, task)) for task in pool.seeds)]
            for arm in _chosen(pool, arms)
        ]
        return [f"Arm, {name} in %", *pool.seeds], rows
    rows = [[arm_name(arm), *(_both_splits(pool, arm, task) for task in pool.seeds)] for arm in _chosen(pool, arms)]
    return [f"Arm, {' / '.join(TEST_SPLITS.values())} in %", *pool.seeds], rows


def differences(pool: Pool, *, arms: Sequence[str] | None = None) -> Rows:
    """Return the comparisons, or those between the given arms alone: mean differences over tasks."""
    chosen = _chosen(pool, arms)
    pairs = [pair for pair in measured_comparisons(pool) if set(pair) <= set(chosen)]
    return _difference_rows(pool, "Comparison", [(comparison_name(pair), pair) for pair in pairs])


def differences_by_task(pool: Pool, *, arms: Sequence[str] | None = None, split: str | None = None) -> Rows:
    """Return the comparisons on each task: differences on the primary split, or on another."""
    split = check_split(split or pool.primary_split)
    chosen = _chosen(pool, arms)
    rows = [
        [comparison_name(pair), *(_optional(difference_text, difference(pool, pair, split, t)) for t in pool.seeds)]
        for pair in measured_comparisons(pool)
        if set(pair) <= set(chosen)
    ]
    return [f"Comparison, {TEST_SPLITS[split]} in points", *pool.seeds], rows


def ablation(pool: Pool, *, arms: Sequence[str] | None = None, reference: str | None = None) -> Rows:
    """Return each arm minus the reference arm (the first of the first comparison, unless given)."""
    base = reference_arm(pool, reference)
    pairs = [(arm_name(arm), (arm, base)) for arm in _chosen(pool, arms) if arm != base]
    return _difference_rows(pool, f"Arm, minus {lower_first(arm_name(base))}", pairs)


def pgr(pool: Pool, *, arms: Sequence[str] | None = None) -> Rows:
    """Return the share of the gap that each student (or each of the given arms) recovers."""
    chosen = [arm for arm in _chosen(pool, arms) if arms is not None or arm.startswith("student")]
    rows = []
    for arm in chosen:
        recovered = [gap_recovered(pool, arm, split) for split in TEST_SPLITS]
        gaps = [_optional(_gap_text, found) for found in recovered]
        rows.append([arm_name(arm), *(_optional(_recovered_text, found) for found in recovered), *gaps])
    names = list(TEST_SPLITS.values())
    return ["Arm", *(f"PGR {name}" for name in names), *(f"Gap {name}, points" for name in names)], rows


def cost(pool: Pool, *, arms: Sequence[str] | None = None) -> Rows:
    """Return what each arm cost per run, and its training FLOPs beyond the single expert's per point gained."""
    columns = {
        "Training, s": ("train_seconds", 1.0),
        "Training, tokens": ("train_tokens", 1.0),
        "Training, TFLOP": ("train_flops", 1e12),
        "Answers, s": ("inference_seconds", 1.0),
        "Answers, TFLOP": ("inference_flops", 1e12),
    }
    split = pool.primary_split
    rows = []
    for arm in _chosen(pool, arms):
        tasks = _tasks(pool, arm)
        amounts = [amount_text(mean_cost(pool, arm, field, tasks), unit) for field, unit in columns.values()]
        gain = "" if arm == BASELINE else _optional(difference_text, difference(pool, (arm, BASELINE), split))
        undefined = UNDEFINED if gain and mean_cost(pool, arm, "train_flops", tasks) is not None else ""
        rows.append([arm_name(arm), *amounts, gain, amount_text(flops_per_point(pool, arm), 1e12) or undefined])
    gained = f"{TEST_SPLITS[split]} over {lower_first(arm_name(BASELINE))}, points"
    return without_empty_columns(["Arm", *columns, gained, "Extra TFLOP per point"], rows)


# By the names that a Markdown file asks for.
TABLES: dict[str, Callable[..., Rows]] = {
    "accuracies": accuracies,
    "by_task": by_task,
    "differences": differences,
    "differences_by_task": differences_by_task,
    "ablation": ablation,
    "pgr": pgr,
    "cost": cost,
}
_INTERVALS = "in brackets 95% intervals that resample seeds and questions within each task"
# What a reader of each table has to know.
NOTES = {
    "accuracies": f"Right answers: means over tasks, {_INTERVALS}. Empty where some task did not measure the arm.",
    "by_task": f"Right answers: means over seeds, and {_INTERVALS} where one split is shown.",
    "differences": (
        f"Differences in the share of right answers, in percentage points: means over tasks, {_INTERVALS}. “Not "
        "decided” means that the interval includes 0. Intervals are not corrected for looking at several comparisons."
    ),
    "differences_by_task": f"Differences in the share of right answers, in percentage points; {_INTERVALS}.",
    "ablation": (
        "Differences to the reference in the share of right answers, in percentage points: means over the tasks that "
        f"measured both arms, {_INTERVALS}. “Worse” is worse than the reference."
    ),
    "pgr": (
        "Mean gain over tasks divided by the mean gap from the single weak expert to the ceiling, "
        f"{_INTERVALS}; undefined where the gap itself is not shown to be above 0."
    ),
    "cost": (
        "Per run: means over tasks of the means over seeds. Costs are those of training an arm itself: an ensemble's "
        "are the sum over its experts, a student's leave out its teacher's. Extra TFLOP per point: training FLOPs "
        "beyond the single weak expert's, per point gained over it; undefined unless there are such, and the gain's "
        "interval is above 0."
    ),
}


def comparison_name(pair: Pair) -> str:
    """Return a comparison for a reader: "Ensemble against bagging"."""
    return f"{arm_name(pair[0])} against {lower_first(arm_name(pair[1]))}"


def extent(pool: Pool, tasks: Iterable[str] | None = None) -> str:
    """Return how much was measured: "3 tasks × 5 seeds × 200 ID and 100 OOD questions"."""
    shown = list(pool.seeds if tasks is None else tasks)
    questions = " and ".join(
        f"{sizes} {name}" for split, name in TEST_SPLITS.items() if (sizes := _questions(pool, shown, split))
    )
    seeds = _span(len(pool.seeds[task]) for task in shown)
    return f"{_counted(str(len(shown)), 'task')} × {_counted(seeds, 'seed')} × {questions} questions"


def check_split(split: str) -> str:
    """Return the split; another word than "id" or "ood" raises ValueError."""
    if split not in TEST_SPLITS:
        raise ValueError(f"split must be one of {', '.join(TEST_SPLITS)}, got {split!r}")
    return split


def _chosen(pool: Pool, arms: Sequence[str] | None) -> list[str]:
    return pool.arms if arms is None else [check_arm(pool, arm) for arm in arms]


def _tasks(pool: Pool, *arms: str) -> list[str]:
    """Return the tasks that measured the arms on some split, in order."""
    return [task for task in pool.seeds if any(task in shared_tasks(pool, split, *arms) for split in TEST_SPLITS)]


def _difference_rows(pool: Pool, title: str, named: Sequence[tuple[str, Pair]]) -> Rows:
    headers = [title, *(f"{name}, points" for name in TEST_SPLITS.values()), "Tasks", "Seeds", "Questions"]
    rows = []
    for name, pair in named:
        found = [_optional(difference_text, difference(pool, pair, split)) for split in TEST_SPLITS]
        tasks = _tasks(pool, *pair)
        sizes = " / ".join(_questions(pool, tasks, split) for split in TEST_SPLITS)
        rows.append([name, *found, str(len(tasks)), _span(len(pool.seeds[task]) for task in tasks), sizes])
    return headers, rows


def _questions(pool: Pool, tasks: Iterable[str], split: str) -> str:
    return _span(pool.questions[task, split] for task in tasks if (task, split) in pool.questions)


def _span(counts: Iterable[int]) -> str:
    found = sorted(set(counts))
    return "–".join(map(str, dict.fromkeys((found[0], found[-1])))) if found else ""


def _counted(number: str, noun: str) -> str:
    return f"{number} {noun}" if number == "1" else f"{number} {noun}s"


def _both_splits(pool: Pool, arm: str, task: str) -> str:
    found = [accuracy(pool, arm, split, task) for split in TEST_SPLITS]
    texts = [f"{100 * interval.value:.1f}" if interval else "" for interval in found]
    return " / ".join(text or "–" for text in texts) if any(texts) else ""


def _accuracy_text(interval: Interval | None) -> str:
    return "" if interval is None else interval_text(*(100 * x for x in interval), form=".1f")


def _recovered_text(recovered: PerformanceGapRecovered) -> str:
    if recovered.value is None or recovered.low is None or recovered.high is None:
        return UNDEFINED
    return interval_text(recovered.value, recovered.low, recovered.high, form=".2f")


def _gap_text(recovered: PerformanceGapRecovered) -> str:
    return difference_interval(Interval(recovered.gap, recovered.gap_low, recovered.gap_high))


def _optional(text: Callable[[_Figure], str], figure: _Figure | None) -> str:
    return "" if figure is None else text(figure)
