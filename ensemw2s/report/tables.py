"""Tables of runs, as rows of text: for the terminal, the report and Markdown files.

Every table in `TABLES` takes an `ensemw2s.report.pool.Pool`, and by keyword what can be chosen about it; the others
take the records of one run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ensemw2s.report.arms import BASELINE, CEILING, arm_name, lower_first
from ensemw2s.report.calibration import (
    Confidences,
    brier_score,
    expected_calibration_error,
    mean_over_tasks,
    ranking_quality,
    right_of_the_surest,
)
from ensemw2s.report.pool import Pair, Pool, Subset, pool_runs
from ensemw2s.report.statistics import Interval, PerformanceGapRecovered
from ensemw2s.runtime.records import (
    TEST_SPLITS,
    ArmRecord,
    LabelsRecord,
    PhaseRecord,
    Record,
    RelabelRecord,
    RoundRecord,
    of_kind,
)

if TYPE_CHECKING:
    from rich.table import Table

MINUS, UNDEFINED = "−", "undefined"
# By their headers: fields of `CostRecord`, and the unit in which they are shown.
COSTS = {
    "Training, s": ("train_seconds", 1.0),
    "Training, tokens": ("train_tokens", 1.0),
    "Training, TFLOP": ("train_flops", 1e12),
    "Answers, s": ("inference_seconds", 1.0),
    "Answers, tokens": ("inference_tokens", 1.0),
    "Answers, TFLOP": ("inference_flops", 1e12),
}

# Arms can differ where the single expert's share of right answers is between these, and the ceiling so far above it
# [choice].
LEAST_SINGLE, MOST_SINGLE, LEAST_GAP = 0.1, 0.9, 0.15
# The hard questions whose level the experts were trained on, and the others.
_SEEN: dict[str, str | Subset] = {
    "OOD, levels seen": Subset("ood", seen=True),
    "OOD, levels never seen": Subset("ood", seen=False),
}

Rows = tuple[list[str], list[list[str]]]
_Record = TypeVar("_Record", bound=Record)


def accuracies(pool: Pool, *, arms: Sequence[str] | None = None) -> Rows:
    """Return each arm's mean accuracy over tasks, with its interval, and the number of tasks that measured it.

    Where levels are known, those of the hard questions whose level was seen in training, and was not, stand beside it.
    """
    subsets: list[str | Subset] = [*TEST_SPLITS, *_SEEN.values()]
    headers = ["Arm", *_by_split("{}, %"), *(f"{name}, %" for name in _SEEN), *_by_split("Exact {}, %"), "Tasks"]
    rows = [
        [
            arm_name(arm),
            *(_accuracy_text(pool.accuracy(arm, subset)) for subset in subsets),
            *(_percents(pool.exact_match(arm, split)) for split in TEST_SPLITS),
            str(len(_tasks(pool, arm))),
        ]
        for arm in _chosen(pool, arms)
    ]
    return without_empty_columns(headers, rows)


def by_task(pool: Pool, *, arms: Sequence[str] | None = None, split: str | None = None) -> Rows:
    """Return each arm's accuracy on each task: on both splits, or on one with its interval."""
    name = " / ".join(TEST_SPLITS.values()) if split is None else TEST_SPLITS[check_split(split)]
    rows = [
        [
            arm_name(arm),
            *(
                _both_splits(pool, arm, task) if split is None else _accuracy_text(pool.accuracy(arm, split, task))
                for task in pool.seeds
            ),
        ]
        for arm in _chosen(pool, arms)
    ]
    return [f"Arm, {name} in %", *pool.seeds], rows


def differences(pool: Pool, *, arms: Sequence[str] | None = None) -> Rows:
    """Return the comparisons, or those between the given arms alone: mean differences over tasks."""
    pairs = _chosen_pairs(pool, arms)
    return _difference_rows(pool, "Comparison", [(comparison_name(pair), pair) for pair in pairs])


def differences_by_level(pool: Pool, *, arms: Sequence[str] | None = None) -> Rows:
    """Return the comparisons on hard questions: all, those of levels seen in training, those of levels never seen."""
    subsets: dict[str, str | Subset] = {TEST_SPLITS["ood"]: "ood", **_SEEN}
    rows = [
        [comparison_name(pair), *(difference_text(pool.difference(pair, subset)) for subset in subsets.values())]
        for pair in _chosen_pairs(pool, arms)
    ]
    return without_empty_columns(["Comparison", *(f"{name}, points" for name in subsets)], rows)


def by_level(pool: Pool, *, arms: Sequence[str] | None = None, split: str = "ood") -> Rows:
    """Return each arm's accuracy by the level of the questions, on hard ones or on another split."""
    levels = [(task, level) for task in pool.seeds for level in pool.levels_of(task, check_split(split))]
    rows = [
        [
            arm_name(arm),
            *(_percents_of(pool.accuracy(arm, Subset(split, level), task)) for task, level in levels),
        ]
        for arm in _chosen(pool, arms)
    ]
    several = len({task for task, _ in levels}) > 1
    named = [f"{task}: {level}" if several else level for task, level in levels]
    return [f"Arm, {TEST_SPLITS[split]} in %", *named], rows if levels else []


def levels(pool: Pool, *, split: str = "ood") -> Rows:
    """Return the levels of hard questions, or of another split: how many, whether trained on, whether in the band.

    That is the band in which arms can differ: the single expert answers 10 to 90% of a level's questions, and the
    ceiling at least 15 points more [choice].
    """
    rows = []
    for task in pool.seeds:
        for level in pool.levels_of(task, check_split(split)):
            subset = Subset(split, level)
            reached = [_percents_of(pool.accuracy(arm, subset, task)) for arm in (BASELINE, CEILING)]
            seen, reason = pool.seen_share(task, level), why_outside(pool, subset, task)
            told = {0.0: "no", 1.0: "yes"}.get(seen, f"with {seen:.0%} of the seeds")
            rows.append([task, level, f"{pool.share(subset, task):.0%}", told, *reached, reason or "yes"])
    names = [f"{arm_name(arm)}, %" for arm in (BASELINE, CEILING)]
    return ["Task", "Level", f"Share of {TEST_SPLITS[split]}", "Seen in training", *names, "In the band"], rows


def calibration(pool: Pool) -> Rows:
    """Return how well teachers know which of their answers to the unlabelled hard questions are right."""
    figures: dict[str, Callable[[Confidences], float | None]] = {
        "Answered right, %": lambda x: 100 * float(x.correct.mean()),
        "Mean probability, %": lambda x: 100 * float(x.probability.mean()),
        "Calibration error, points": lambda x: 100 * expected_calibration_error(x.probability, x.correct),
        "Brier score": lambda x: brier_score(x.probability, x.correct),
        "Ranking by probability": lambda x: ranking_quality(x.probability, x.correct),
        "Ranking by agreement": lambda x: ranking_quality(x.agreement, x.correct) if np.ptp(x.agreement) else None,
        "Right of the surer half, %": lambda x: 100 * float(right_of_the_surest(x.probability, x.correct, 0.5)),
    }
    rows = [
        [arm_name(teacher), *(
            number(mean_over_tasks(figure, by_task), ".1f" if name.endswith(("%", "points")) else ".3f")
            for name, figure in figures.items()
        ), str(sum(len(found.correct) for found in by_task.values()))]
        for teacher, by_task in pool.confidences.items()
    ]  # fmt: skip
    return without_empty_columns(["Teacher", *figures, "Answers"], rows)


def why_outside(pool: Pool, subset: Subset, task: str) -> str:
    """Return why a level is outside the band of `levels`, or "" for one within."""
    single, ceiling = (pool.accuracy(arm, subset, task) for arm in (BASELINE, CEILING))
    if single is None or ceiling is None:
        return "not known"
    if single.value < LEAST_SINGLE:
        return f"no: single expert below {LEAST_SINGLE:.0%}"
    if single.value > MOST_SINGLE:
        return f"no: single expert above {MOST_SINGLE:.0%}"
    if ceiling.value - single.value < LEAST_GAP:
        return f"no: ceiling less than {100 * LEAST_GAP:.0f} points above"
    return ""


def differences_by_task(pool: Pool, *, arms: Sequence[str] | None = None, split: str | None = None) -> Rows:
    """Return the comparisons on each task: differences on the primary split, or on another."""
    split = check_split(split or pool.primary_split)
    rows = [
        [comparison_name(pair), *(difference_text(pool.difference(pair, split, task)) for task in pool.seeds)]
        for pair in _chosen_pairs(pool, arms)
    ]
    return [f"Comparison, {TEST_SPLITS[split]} in points", *pool.seeds], rows


def ablation(pool: Pool, *, arms: Sequence[str] | None = None, reference: str | None = None) -> Rows:
    """Return each arm minus the reference arm (the first of the first comparison, unless given)."""
    base = pool.reference_arm(reference)
    pairs = [(arm_name(arm), (arm, base)) for arm in _chosen(pool, arms) if arm != base]
    return _difference_rows(pool, f"Arm, minus {lower_first(arm_name(base))}", pairs)


def pgr(pool: Pool, *, arms: Sequence[str] | None = None) -> Rows:
    """Return the share of the gap that each student (or each of the given arms) recovers."""
    rows = []
    for arm in _chosen(pool, arms):
        if arms is not None or arm in pool.students:
            recovered = [pool.gap_recovered(arm, split) for split in TEST_SPLITS]
            rows.append([arm_name(arm), *map(_recovered_text, recovered), *map(_gap_text, recovered)])
    return ["Arm", *_by_split("PGR {}"), *_by_split("Gap {}, points")], rows


def cost(pool: Pool, *, arms: Sequence[str] | None = None) -> Rows:
    """Return what each arm cost per run, and its training FLOPs beyond the single expert's per point gained."""
    return cost_rows(pool, arms, [header for header in COSTS if header != "Answers, tokens"])


def cost_rows(pool: Pool, arms: Sequence[str] | None = None, columns: Iterable[str] = COSTS) -> Rows:
    """Return `cost` with the given of the columns `COSTS`."""
    split = pool.primary_split
    rows = []
    for arm in _chosen(pool, arms):
        tasks = _tasks(pool, arm)
        amounts = [_cost_text(pool, arm, tasks, header) for header in columns]
        gain = "" if arm == BASELINE else difference_text(pool.difference((arm, BASELINE), split))
        undefined = UNDEFINED if gain and pool.mean_cost(arm, "train_flops", tasks) is not None else ""
        rows.append([arm_name(arm), *amounts, gain, amount_text(pool.flops_per_point(arm), 1e12) or undefined])
    gained = f"{TEST_SPLITS[split]} over {lower_first(arm_name(BASELINE))}, points"
    return without_empty_columns(["Arm", *columns, gained, "Extra TFLOP per point"], rows)


# By the names that a Markdown file asks for.
TABLES: dict[str, Callable[..., Rows]] = {
    table.__name__: table
    for table in (
        accuracies, by_task, by_level, levels, differences, differences_by_task, differences_by_level, ablation, pgr,
        cost, calibration,
    )
}  # fmt: skip
_INTERVALS = "in brackets 95% intervals that resample seeds and questions within each task"
# What a reader of each table has to know.
NOTES = {
    "accuracies": (
        f"Right answers: means over tasks, {_INTERVALS}. Empty where some task did not measure the arm. Levels seen "
        "are those that the experts were trained on; of these and of the others, means over the tasks that have any."
    ),
    "by_task": f"Right answers: means over seeds, and {_INTERVALS} where one split is shown.",
    "calibration": (
        "Of the answers to the unlabelled hard questions: means over tasks. The probability is that of the whole "
        "answer under the teacher, the agreement the share of its tokens to which experts give more than half. "
        "Calibration error (ECE): the mean distance of right answers from probability over ten bins of equal width; "
        "Brier score: the mean of (probability − right)². Ranking: how often a right answer stands above a wrong one; "
        "0.5 says nothing."
    ),
    "by_level": "Right answers by the level of the question: means over seeds.",
    "levels": (
        "Right answers: means over seeds. In the band, where arms can differ: the single weak expert answers 10 to 90% "
        "of a level’s questions, and the ceiling at least 15 points more. Not known where one of them was not measured."
    ),
    "differences_by_level": (
        "Differences in the share of right answers to hard questions, in percentage points: means over the tasks that "
        f"have such questions, {_INTERVALS}. Levels seen are those of the questions that the experts were trained on."
    ),
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


def extent(pool: Pool) -> str:
    """Return how much was measured: "3 tasks × 5 seeds × 200 ID and 100 OOD questions"."""
    questions = " and ".join(
        f"{sizes} {name}" for split, name in TEST_SPLITS.items() if (sizes := _questions(pool, pool.seeds, split))
    )
    tasks, seeds = str(len(pool.seeds)), _span(map(len, pool.seeds.values()))
    counts = (f"{count} {noun}" + "s" * (count != "1") for count, noun in ((tasks, "task"), (seeds, "seed")))
    return " × ".join((*counts, f"{questions} questions"))


def check_split(split: str) -> str:
    """Return the split; another word than "id" or "ood" raises ValueError."""
    if split not in TEST_SPLITS:
        raise ValueError(f"split must be one of {', '.join(TEST_SPLITS)}, got {split!r}")
    return split


def without_empty_columns(headers: list[str], rows: list[list[str]]) -> Rows:
    """Return the table without the columns in which no row has text; one without rows as it is."""
    shown = [i for i in range(len(headers)) if not rows or any(row[i] for row in rows)]
    return [headers[i] for i in shown], [[row[i] for i in shown] for row in rows]


def _by_split(header: str) -> list[str]:
    return [header.format(name) for name in TEST_SPLITS.values()]


def _chosen(pool: Pool, arms: Sequence[str] | None) -> list[str]:
    return pool.arms if arms is None else [pool.check_arm(arm) for arm in arms]


def _chosen_pairs(pool: Pool, arms: Sequence[str] | None) -> list[Pair]:
    chosen = _chosen(pool, arms)
    return [pair for pair in pool.measured_comparisons() if set(pair) <= set(chosen)]


def _tasks(pool: Pool, *arms: str) -> list[str]:
    """Return the tasks that measured the arms on some split, in order."""
    return [task for task in pool.seeds if any(task in pool.shared_tasks(split, *arms) for split in TEST_SPLITS)]


def _difference_rows(pool: Pool, title: str, named: Sequence[tuple[str, Pair]]) -> Rows:
    rows = []
    for name, pair in named:
        found = [difference_text(pool.difference(pair, split)) for split in TEST_SPLITS]
        tasks = _tasks(pool, *pair)
        sizes = " / ".join(_questions(pool, tasks, split) for split in TEST_SPLITS)
        rows.append([name, *found, str(len(tasks)), _span(len(pool.seeds[task]) for task in tasks), sizes])
    return [title, *_by_split("{}, points"), "Tasks", "Seeds", "Questions"], rows


def _questions(pool: Pool, tasks: Iterable[str], split: str) -> str:
    return _span(pool.questions[task, split] for task in tasks if (task, split) in pool.questions)


def _span(counts: Iterable[int]) -> str:
    found = sorted(set(counts))
    return "–".join(map(str, dict.fromkeys((found[0], found[-1])))) if found else ""


def _both_splits(pool: Pool, arm: str, task: str) -> str:
    found = [pool.accuracy(arm, split, task) for split in TEST_SPLITS]
    return " / ".join(_percents(x.value) if x else "–" for x in found) if any(found) else ""


def results_table(records: Sequence[Record]) -> Table:
    """Return every measured arm with its accuracies ± standard error, PGR with 95% interval, and training costs."""
    pool = pool_runs(records)
    measured = {
        (record.arm, record.metric, record.split): f"{100 * record.value:.1f} ± {100 * record.standard_error:.1f}"
        for record in of_kind(records, ArmRecord)
    }
    columns = [(metric, split) for metric in ("accuracy", "exact_match") for split in TEST_SPLITS]
    recovered = {row[0]: row[1:3] for row in pgr(pool)[1]}
    rows = [
        [
            arm_name(arm),
            *(measured.get((arm, *column), "") for column in columns),
            *recovered.get(arm_name(arm), ["", ""]),
            *(_cost_text(pool, arm, list(pool.seeds), header) for header in ("Training, s", "Training, TFLOP")),
        ]
        for arm in pool.arms
    ]
    headers = [*_by_split("{}, %"), *_by_split("Exact {}, %"), *_by_split("PGR {}"), "Train s", "Train TFLOP"]
    headers, rows = without_empty_columns(["Arm", *headers], rows)
    return terminal_table("Results", (headers, rows), unbroken=3)


def terminal_table(title: str, content: Rows, unbroken: int = 0) -> Table:
    """Return headers and rows for a terminal. In a narrow one, columns after the first `unbroken` fold."""
    from rich import box
    from rich.table import Table

    headers, rows = content
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for i, header in enumerate(headers):
        # Nothing is cut off.
        table.add_column(header, justify="right" if i else "left", no_wrap=i < unbroken, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def rounds(records: Iterable[RoundRecord]) -> Rows:
    """Return every boosting round, one row per attempt."""
    return without_empty_columns(*_columns(records, {
        "Round": lambda record: str(record.round),
        "Weighted error ε": lambda record: f"{record.error:.4f}",
        "Prior error ε₀": lambda record: number(record.prior_error, ".4f"),
        "Boosting weight α": lambda record: number(record.expert_weight, ".3f"),
        "Effective sample size": _effective_sample_size,
        "Validation: expert": lambda record: number((record.validation or {}).get("expert"), ".1%"),
        "Validation: ensemble": lambda record: number((record.validation or {}).get("ensemble"), ".1%"),
        "Time, s": lambda record: f"{record.seconds:.1f}",
        "Note": _round_note,
    }))  # fmt: skip


def _columns(records: Iterable[_Record], columns: Mapping[str, Callable[[_Record], str]]) -> Rows:
    return list(columns), [[text(record) for text in columns.values()] for record in records]


def _effective_sample_size(record: RoundRecord) -> str:
    size, units = record.effective_sample_size, record.num_units
    return f"{size:.0f} of {units} ({size / units:.0%})"


def _round_note(record: RoundRecord) -> str:
    notes = {
        "not added: no better than the prior": not record.accepted,
        "error clamped": record.clamped,
        f"attempt {record.attempt}": record.attempt > 1,
    }
    return ", ".join(note for note, holds in notes.items() if holds)


def experts(shares: Sequence[float], alphas: Sequence[float], records: Sequence[Record], arm: str) -> Rows:
    """Return what each expert of an ensemble is: its share of the mixture, its α, and what it reaches alone."""

    def alone(number: int, split: str) -> str:
        name = f"expert_{number}" if arm in ("", "ensemble") else f"{arm}.expert_{number}"
        found = of_kind(records, ArmRecord, arm=name, split=split, metric="accuracy")
        return _percents(found[0].value) if found else ""

    rows = [
        [f"Expert {n}", f"{share:.3%}" if share >= 1e-5 else f"{100 * share:.1g}%",
         f"{alphas[n - 1]:.3f}" if alphas else "", *(alone(n, split) for split in TEST_SPLITS)]
        for n, share in enumerate(shares, start=1)
    ]  # fmt: skip
    return without_empty_columns(
        ["Expert", "Share of the mixture", "Boosting weight α", *_by_split("Alone {}, %")], rows
    )


def without_constant_columns(table: Rows) -> Rows:
    """Return a table without its columns of tasks, seeds and questions where they say the same in all rows."""
    headers, rows = table
    shown = [i for i, header in enumerate(headers)
             if header not in ("Tasks", "Seeds", "Questions") or len({row[i] for row in rows}) > 1]  # fmt: skip
    return [headers[i] for i in shown], [[row[i] for i in shown] for row in rows]


def phases(records: Iterable[Record]) -> Rows:
    """Return what every phase cost."""
    return without_empty_columns(*_columns(of_kind(records, PhaseRecord), {
        "Phase": lambda record: record.phase,
        "Seconds": lambda record: amount_text(record.seconds, 1),
        "Tokens": lambda record: amount_text(record.tokens, 1),
        "TFLOP": lambda record: amount_text(record.flops, 1e12),
        "Peak memory, GB": lambda record: amount_text(record.peak_memory, 1e9),
    }))  # fmt: skip


def labels(records: Iterable[Record]) -> Rows:
    """Return what each teacher's answers to the unlabelled questions are worth."""
    return _columns(of_kind(records, LabelsRecord), {
        "Teacher": lambda record: arm_name(record.teacher),
        "Hard questions": lambda record: str(record.n),
        "Answered right": lambda record: number(record.accuracy, ".1%"),
        "Mean log-probability per token, nats": lambda record: number(record.confidence, ".3f"),
        "Experts' agreement": lambda record: number(record.agreement, ".1%"),
    })  # fmt: skip


def relabelled(records: Iterable[Record]) -> Rows:
    """Return what out-of-fold students made of pseudo-answers, and what that was worth."""
    return _columns(of_kind(records, RelabelRecord), {
        "Arm": lambda record: arm_name(record.arm) + (f", generation {record.generation}" if record.generation else ""),
        "Judged": lambda record: str(record.n),
        "Agree": lambda record: f"{record.agree / record.n:.1%}",
        "Trained on": lambda record: str(record.kept),
        "of which replaced": lambda record: str(record.replaced),
        "Right before": lambda record: number(record.teacher_accuracy, ".1%"),
        "Right of those trained on": lambda record: number(record.accuracy, ".1%"),
    })  # fmt: skip


def number(value: float | None, form: str) -> str:
    """Return a formatted number; an unknown one is empty."""
    return "" if value is None else format(value, form).replace("-", MINUS)


def amount_text(value: float | None, unit: float) -> str:
    """Return a cost in multiples of `unit`, with three significant digits; an unknown one is empty."""
    # Three significant digits, whether the models are tiny or large.
    return "" if value is None else number(value / unit, ",.0f" if abs(value / unit) >= 100 else ".3g")


def interval_text(value: float, low: float, high: float, *, form: str) -> str:
    """Return a value and its interval, each as `form` says."""
    return f"{number(value, form)} ({number(low, form)} to {number(high, form)})"


def difference_text(difference: Interval | None) -> str:
    """Return a difference of shares in points, its interval, and a word on which arm is better; "" for none."""
    if difference is None:
        return ""
    verdict = "better" if difference.low > 0 else "worse" if difference.high < 0 else "not decided"
    # No seed had a question that one arm answered right and the other wrong.
    if not any(difference):
        verdict = "right on the same questions"
    return f"{difference_interval(difference)}: {verdict}"


def difference_interval(difference: Interval) -> str:
    """Return a difference of shares and its interval in percentage points."""
    value, low, high = (difference_points(x) for x in difference)
    return f"{value} ({low} to {high})"


def difference_points(share: float) -> str:
    """Return a difference of shares in percentage points, with its sign: "+1.5"."""
    # Adding 0 turns a -0 that rounding left into 0, which has no sign to show.
    points = round(100 * share, 1) + 0.0
    return number(points, "+.1f") if points else "0.0"


def _percents(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _percents_of(interval: Interval | None) -> str:
    return _percents(interval.value if interval else None)


def _accuracy_text(interval: Interval | None) -> str:
    return "" if interval is None else interval_text(*(100 * x for x in interval), form=".1f")


def _cost_text(pool: Pool, arm: str, tasks: Sequence[str], header: str) -> str:
    field, unit = COSTS[header]
    return amount_text(pool.mean_cost(arm, field, tasks), unit)


def _recovered_text(recovered: PerformanceGapRecovered | None) -> str:
    if recovered is None:
        return ""
    if recovered.value is None or recovered.low is None or recovered.high is None:
        return UNDEFINED
    return interval_text(recovered.value, recovered.low, recovered.high, form=".2f")


def _gap_text(found: PerformanceGapRecovered | None) -> str:
    return "" if found is None else difference_interval(Interval(found.gap, found.gap_low, found.gap_high))
