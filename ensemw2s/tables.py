"""Tables of one run, as rows of text: for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ensemw2s.evaluate import Interval, paired_difference
from ensemw2s.records import (
    COMPARISONS,
    TEST_SPLITS,
    answers_array,
    arm_name,
    find,
    lower_first,
    measured_arms,
    of_kind,
)

if TYPE_CHECKING:
    from rich.table import Table

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
