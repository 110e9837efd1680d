"""Tables of one run, as rows of text: for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ensemw2s.report.arms import BASELINE, COMPARISONS, arm_name, lower_first
from ensemw2s.report.pool import (
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
from ensemw2s.report.records import TEST_SPLITS, answers_array, find, measured_arms, of_kind
from ensemw2s.report.statistics import Interval, PerformanceGapRecovered, paired_difference

if TYPE_CHECKING:
    from rich.table import Table


UNDEFINED = "undefined"
_Figure = TypeVar("_Figure")

_INTERVALS = "in brackets 95% intervals that resample seeds and questions within each task"


MINUS = "−"

Rows = tuple[list[str], list[list[str]]]


def results_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Return every measured arm with its accuracies ± standard error, PGR with 95% interval, and costs."""
    return _rich_table("Results", result_rows(records), never_wrapped=3)


def rounds_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Return every boosting round with its errors, expert weight, effective sample size and validation accuracy."""
    return _rich_table("Boosting rounds", round_rows(records), never_wrapped=1)


def result_rows(records: Sequence[Mapping[str, Any]]) -> Rows:
    """Return every measured arm's accuracies, PGR and training costs."""
    columns = {
        "ID, %": lambda arm: _accuracy_text(records, arm, "id"),
        "OOD, %": lambda arm: _accuracy_text(records, arm, "ood"),
        "Exact ID, %": lambda arm: _accuracy_text(records, arm, "id", "exact_match"),
        "Exact OOD, %": lambda arm: _accuracy_text(records, arm, "ood", "exact_match"),
        "PGR ID": lambda arm: _pgr_text(find(records, "pgr", arm=arm, split="id")),
        "PGR OOD": lambda arm: _pgr_text(find(records, "pgr", arm=arm, split="ood")),
        "Train s": lambda arm: _cost_text(records, arm, "train_seconds", 1),
        "Train TFLOP": lambda arm: _cost_text(records, arm, "train_flops", 1e12),
    }
    rows = [[arm_name(arm), *(cell(arm) for cell in columns.values())] for arm in measured_arms(records)]
    return without_empty_columns(["Arm", *columns], rows)


def arm_cost_rows(records: Sequence[Mapping[str, Any]]) -> Rows:
    """Return what every arm's training and answers cost."""
    columns = {
        "Training, s": ("train_seconds", 1),
        "Training, tokens": ("train_tokens", 1),
        "Training, TFLOP": ("train_flops", 1e12),
        "Answers, s": ("inference_seconds", 1),
        "Answers, tokens": ("inference_tokens", 1),
        "Answers, TFLOP": ("inference_flops", 1e12),
    }
    rows = [
        [arm_name(arm), *(_cost_text(records, arm, name, unit) for name, unit in columns.values())]
        for arm in measured_arms(records)
    ]
    return without_empty_columns(["Arm", *columns], [row for row in rows if any(row[1:])])


def phase_cost_rows(records: Sequence[Mapping[str, Any]]) -> Rows:
    """Return what every phase cost."""
    columns = {"Seconds": ("seconds", 1), "Tokens": ("tokens", 1), "TFLOP": ("flops", 1e12),
               "Peak memory, GB": ("peak_memory", 1e9)}  # fmt: skip
    rows = [
        [record["phase"], *(amount_text(record.get(name), unit) for name, unit in columns.values())]
        for record in of_kind(records, "phase")
    ]
    return without_empty_columns(["Phase", *columns], rows)


def without_empty_columns(headers: list[str], rows: list[list[str]]) -> Rows:
    """Return the table without the columns in which no row has text."""
    shown = [i for i in range(len(headers)) if any(row[i] for row in rows)]
    return [headers[i] for i in shown], [[row[i] for i in shown] for row in rows]


def round_rows(records: Sequence[Mapping[str, Any]]) -> Rows:
    """Return every boosting round, one row per attempt."""
    headers = ["Round", "Weighted error ε", "Prior error ε₀", "Expert weight α", "Effective sample size",
               "Validation: expert", "Validation: ensemble", "Time, s", "Note"]  # fmt: skip
    return without_empty_columns(headers, [_round_row(record) for record in of_kind(records, "round")])


def _round_row(record: Mapping[str, Any]) -> list[str]:
    validation = record["validation"] or {}
    share = record["effective_sample_size"] / record["num_units"]
    notes = ["" if record["accepted"] else "not added: no better than the prior"]
    notes += ["error clamped"] if record.get("clamped") else []
    notes += [f"attempt {record['attempt']}"] if record.get("attempt", 1) > 1 else []
    return [
        str(record["round"]),
        f"{record['error']:.4f}",
        number(record["prior_error"], ".4f"),
        f"{record['expert_weight']:.3f}",
        f"{record['effective_sample_size']:.0f} of {record['num_units']} ({share:.0%})",
        percent(validation.get("expert")),
        percent(validation.get("ensemble")),
        f"{record['seconds']:.1f}",
        ", ".join(filter(None, notes)),
    ]


def _rich_table(title: str, content: Rows, never_wrapped: int) -> Table:
    from rich import box
    from rich.table import Table

    headers, rows = content
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for i, header in enumerate(headers):
        # In a narrow terminal the later columns fold; nothing is cut off.
        justify: Literal["left", "right"] = "left" if i == 0 or header == "Note" else "right"
        table.add_column(header, justify=justify, no_wrap=i < never_wrapped, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _accuracy_text(records: Sequence[Mapping[str, Any]], arm: str, split: str, metric: str = "accuracy") -> str:
    record = find(records, "arm", arm=arm, split=split, metric=metric)
    return "" if record is None else f"{100 * record['value']:.1f} ± {100 * record['standard_error']:.1f}"


def _pgr_text(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return ""
    if not record["defined"]:
        return "undefined"
    return interval_text(record["value"], record["low"], record["high"], form=".2f")


def interval_text(value: float, low: float, high: float, *, form: str) -> str:
    """Return a value and its interval, each as `form` says."""
    return f"{value:{form}} ({low:{form}} to {high:{form}})".replace("-", MINUS)


def _cost_text(records: Sequence[Mapping[str, Any]], arm: str, name: str, unit: float) -> str:
    record = find(records, "cost", arm=arm)
    return "" if record is None else amount_text(record.get(name), unit)


def amount_text(value: float | None, unit: float) -> str:
    """Return a cost in multiples of `unit`, with three significant digits; an unknown one is empty."""
    if value is None:
        return ""
    value /= unit
    # Three significant digits, whether the models are tiny or large.
    return (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}").replace("-", MINUS)


def percent(share: float | None) -> str:
    """Return a share in percent; an unknown one is empty."""
    return "" if share is None else f"{share:.1%}"


def number(value: float | None, form: str) -> str:
    """Return a formatted number; an unknown one is empty."""
    return "" if value is None else format(value, form)


def _comparisons(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, dict[str, Interval]]]:
    """Return (first arm, second arm, paired difference per test split) for the comparisons that were measured."""
    pairs = list(COMPARISONS)
    best = _best_expert(records)
    if best is not None:
        pairs.insert(1, ("ensemble", best))
    found = []
    for first, second in pairs:
        by_split = {}
        for split in TEST_SPLITS:
            a, b = (find(records, "answers", arm=arm, split=split) for arm in (first, second))
            if a is None or b is None:
                continue
            if a["questions"] != b["questions"]:
                raise ValueError(f"{first} and {second} answered different questions in split {split!r}")
            by_split[split] = paired_difference(answers_array(a["correct"]), answers_array(b["correct"]))
        if by_split:
            found.append((first, second, by_split))
    return found


def _best_expert(records: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the expert with the best validation accuracy: chosen on a test set it would be flattered."""
    measured = {
        arm: record["value"]
        for arm in measured_arms(records)
        if arm.startswith("expert_")
        and (record := find(records, "arm", arm=arm, split="validation", metric="accuracy")) is not None
    }
    return max(measured, key=lambda arm: measured[arm]) if len(measured) > 1 else None


def difference_text(difference: Interval) -> str:
    """Return a difference of shares in percentage points, its interval, and a word on which arm is better."""
    return f"{difference_interval(difference)}: {verdict(difference)}"


def difference_interval(difference: Interval) -> str:
    """Return a difference of shares and its interval in percentage points."""
    value, low, high = (signed_points(x) for x in difference)
    return f"{value} ({low} to {high})"


def signed_points(share: float) -> str:
    """Return a difference of shares in percentage points, with its sign."""
    # Adding 0 turns a -0 that rounding left into 0, which has no sign to show.
    points = round(100 * share, 1) + 0.0
    return f"{points:+.1f}".replace("-", MINUS) if points else "0.0"


def verdict(difference: Interval) -> str:
    """Return "better" or "worse" if the interval excludes 0, else "not decided"."""
    if difference.low > 0:
        return "better"
    return "worse" if difference.high < 0 else "not decided"


def comparison_rows(records: Sequence[Mapping[str, Any]]) -> Rows:
    """Return the comparisons of one run: differences in the share of right answers, with 95% intervals."""
    best = _best_expert(records)
    rows = []
    for first, second, by_split in _comparisons(records):
        chosen = " (best on validation)" if second == best else ""
        texts = [difference_text(by_split[split]) if split in by_split else "" for split in TEST_SPLITS]
        rows.append([f"{arm_name(first)} against {lower_first(arm_name(second))}{chosen}", *texts])
    return ["Comparison", *(f"{name}, points" for name in TEST_SPLITS.values())], rows


def accuracies(pool: Pool, *, arms: Sequence[str] | None = None) -> Rows:
    """Return each arm's mean accuracy over tasks, with its interval, and the number of tasks that measured it."""
    headers = ["Arm", *(f"{name}, %" for name in TEST_SPLITS.values()), "Tasks"]
    rows = [
        [
            arm_name(arm),
            *(_interval_text(accuracy(pool, arm, split)) for split in TEST_SPLITS),
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
            [arm_name(arm), *(_interval_text(accuracy(pool, arm, split, task)) for task in pool.seeds)]
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


def _interval_text(interval: Interval | None) -> str:
    return "" if interval is None else interval_text(*(100 * x for x in interval), form=".1f")


def _recovered_text(recovered: PerformanceGapRecovered) -> str:
    if recovered.value is None or recovered.low is None or recovered.high is None:
        return UNDEFINED
    return interval_text(recovered.value, recovered.low, recovered.high, form=".2f")


def _gap_text(recovered: PerformanceGapRecovered) -> str:
    return difference_interval(Interval(recovered.gap, recovered.gap_low, recovered.gap_high))


def _optional(text: Callable[[_Figure], str], figure: _Figure | None) -> str:
    return "" if figure is None else text(figure)
