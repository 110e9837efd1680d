"""Tables for the terminal and one self-contained HTML page, from the records that runs leave in `results.jsonl`.

The page needs nothing but itself: figures are inline SVG whose colours follow the reader's light or dark mode, and
it prints in light colours. The same records always give the same bytes.
"""

from __future__ import annotations

import functools
import html
import io
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import matplotlib
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ensemw2s.evaluate import Interval, paired_difference, wilson_interval
from ensemw2s.files import new_file, read_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

RESULTS_FILE = "results.jsonl"
CONFIG_FILE = "config.json"
TEST_SPLITS = {"id": "ID", "ood": "OOD"}
MINUS = "−"
ARM_NAMES = {
    "zero_shot_weak": "Weak model, zero-shot",
    "zero_shot_strong": "Strong model, zero-shot",
    "single_expert": "Single weak expert",
    "uniform_average": "Uniform average",
    "ensemble": "Ensemble",
    "student_single": "Student of single expert",
    "student_ensemble": "Student of ensemble",
    "ceiling": "Ceiling: taught by truth",
}
ARMS_BEFORE_EXPERTS = ("zero_shot_weak", "zero_shot_strong", "single_expert")
COMPARISONS = (
    ("ensemble", "single_expert"),
    ("ensemble", "uniform_average"),
    ("student_ensemble", "student_single"),
    ("student_ensemble", "ensemble"),
)
# The two invariants that a run checks on its own files: expert's error after the update, and the sum of weights.
IDENTITY_TOLERANCE, SUM_TOLERANCE = 1e-12, 1e-9


@dataclass(frozen=True)
class Run:
    """What a report shows of one run: its name, its records and its configuration (None if it has none)."""

    name: str
    records: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any] | None


# ----------------------------------------------------------------------------------------------------------------------
# Records

QUANTILE_LEVELS = (0.01, 0.25, 0.5, 0.75, 0.99, 1.0)


def _is_number(value: Any) -> bool:
    # A JSON reader turns 1e999 into infinity.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_quantiles(value: Any) -> bool:
    if not isinstance(value, dict) or not all(_is_number(number) for number in value.values()):
        return False
    return all(str(level) in value for level in QUANTILE_LEVELS)


def _is_validation(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(_is_share(value.get(m)) for m in ("expert", "ensemble")))


# The forms that a field may have, by the words in which an error asks for them.
FORMS: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "true or false": lambda value: isinstance(value, bool),
    "a number": _is_number,
    "a number or null": lambda value: value is None or _is_number(value),
    "a number from 0 to 1": _is_share,
    "a number from 0 to 1 or null": lambda value: value is None or _is_share(value),
    "a whole number above 0": lambda value: _is_number(value) and value > 0 and value == int(value),
    "a list of 0 and 1": lambda value: isinstance(value, list) and bool(value) and all(x in (0, 1) for x in value),
    "a list": lambda value: isinstance(value, list),
    f"an object of numbers by level ({', '.join(map(str, QUANTILE_LEVELS))})": _is_quantiles,
    "null or an object with shares expert and ensemble": _is_validation,
}
(TEXT, BOOLEAN, NUMBER, NUMBER_OR_NULL, SHARE, SHARE_OR_NULL, COUNT, OUTCOMES, LIST, QUANTILES, VALIDATION) = FORMS
# What a record of each kind must hold to be shown, and what it may; other kinds and other fields pass unread.
REQUIRED_FIELDS: dict[str, dict[str, str]] = {
    "round": {"round": COUNT, "error": SHARE, "prior_error": SHARE_OR_NULL, "expert_weight": NUMBER,
              "accepted": BOOLEAN, "effective_sample_size": NUMBER, "num_units": COUNT, "validation": VALIDATION,
              "weight_quantiles": QUANTILES, "seconds": NUMBER},
    "arm": {"arm": TEXT, "split": TEXT, "metric": TEXT, "value": SHARE, "standard_error": NUMBER, "n": COUNT},
    "answers": {"arm": TEXT, "split": TEXT, "correct": OUTCOMES, "ids": LIST},
    "pgr": {"arm": TEXT, "split": TEXT, "value": NUMBER_OR_NULL, "low": NUMBER_OR_NULL, "high": NUMBER_OR_NULL,
            "defined": BOOLEAN},
    "cost": {"arm": TEXT},
    "phase": {"phase": TEXT, "seconds": NUMBER},
    "identity": {"round": COUNT, "identity_gap": NUMBER_OR_NULL, "sum_gap": NUMBER},
    "labels": {"teacher": TEXT, "accuracy": SHARE, "n": COUNT},
    "questions": {"split": TEXT, "n": COUNT},
}  # fmt: skip
OPTIONAL_FIELDS: dict[str, dict[str, str]] = {
    "round": {"attempt": COUNT, "clamped": BOOLEAN},
    "cost": {
        **{f"train_{name}": NUMBER_OR_NULL for name in ("seconds", "tokens", "flops")},
        **{f"inference_{name}": NUMBER_OR_NULL for name in ("seconds", "tokens", "flops")},
    },
    "phase": dict.fromkeys(("tokens", "flops", "peak_memory"), NUMBER_OR_NULL),
    "labels": {"confidence": NUMBER_OR_NULL, "agreement": SHARE_OR_NULL},
}
# The fields that say which figure a record gives; of other kinds a run may hold several alike.
KEY_FIELDS: dict[str, tuple[str, ...]] = {
    "arm": ("arm", "split", "metric"), "answers": ("arm", "split"), "pgr": ("arm", "split"), "cost": ("arm",),
}  # fmt: skip


def read_records(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the records of a run from `results.jsonl` in its folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no JSON object, lacks a field, holds a field of another form or NaN, or repeats a figure;
            names file and line.
    """
    file = Path(folder) / RESULTS_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: give the folder of a run (`ensemw2s run` makes one)")
    records: list[dict[str, Any]] = []
    first_lines: dict[tuple[Any, ...], int] = {}
    # Bytes break at newlines only; text also breaks at U+2028 and the like, which a question's id may hold.
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            record = _parse_record(line)
            first = first_lines.setdefault(_figure_key(record, number), number)
            if first != number:
                raise ValueError(f"gives the same figure as line {first}; a folder holds one run")
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
        records.append(record)
    if not any(record["kind"] in ("arm", "round") for record in records):
        raise ValueError(f"{file} holds neither rounds nor measured arms: run boost or evaluate first")
    return records


def _parse_record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise ValueError('expected a JSON object with a text field "kind"')
    _check_fields(record)
    return record


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that a record may hold")


def _check_fields(record: Mapping[str, Any]) -> None:
    kind = record["kind"]
    required, optional = REQUIRED_FIELDS.get(kind, {}), OPTIONAL_FIELDS.get(kind, {})
    missing = [name for name in required if name not in record]
    if missing:
        raise ValueError(f"a record of kind {kind!r} lacks {', '.join(missing)}")
    for name, form in (required | optional).items():
        if name in record and not FORMS[form](record[name]):
            raise ValueError(f"{name} of a record of kind {kind!r} must be {form}, got {json.dumps(record[name]):.60}")
    if kind == "answers" and len(record["correct"]) != len(record["ids"]):
        raise ValueError(f"{len(record['correct'])} outcomes but {len(record['ids'])} question ids")
    if kind == "pgr" and record["defined"] and None in (record["value"], record["low"], record["high"]):
        raise ValueError("a defined pgr needs numbers for value, low and high")


def _figure_key(record: Mapping[str, Any], line: int) -> tuple[Any, ...]:
    """Say which figure a record gives; records that may repeat are told apart by their line."""
    if record["kind"] not in KEY_FIELDS:
        return (line,)
    return (record["kind"], *(record[name] for name in KEY_FIELDS[record["kind"]]))


def _of_kind(records: Iterable[Mapping[str, Any]], kind: str, **fields: Any) -> list[Mapping[str, Any]]:
    return [
        record
        for record in records
        if record["kind"] == kind and all(record.get(name) == value for name, value in fields.items())
    ]


def _find(records: Iterable[Mapping[str, Any]], kind: str, **fields: Any) -> Mapping[str, Any] | None:
    return next(iter(_of_kind(records, kind, **fields)), None)


def _arms(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the measured arms in table order: the experts stand between their baseline and their mixtures."""
    present = {record["arm"] for record in _of_kind(records, "arm")}
    experts = sorted((arm for arm in present if re.fullmatch(r"expert_\d+", arm)), key=lambda arm: int(arm[7:]))
    known = [*ARMS_BEFORE_EXPERTS, *experts, *(arm for arm in ARM_NAMES if arm not in ARMS_BEFORE_EXPERTS)]
    return [arm for arm in known if arm in present] + sorted(present - set(known))


def _arm_name(arm: str) -> str:
    expert = re.fullmatch(r"expert_(\d+)", arm)
    return f"Expert {expert[1]}" if expert else ARM_NAMES.get(arm, arm)


# ----------------------------------------------------------------------------------------------------------------------
# Tables

Rows = tuple[list[str], list[list[str]]]


def results_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Return every measured arm with its accuracies ± standard error, PGR with 95% interval, and costs."""
    return _rich_table("Results", _result_rows(records), never_wrapped=3)


def rounds_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Return every boosting round with its errors, expert weight, effective sample size and validation accuracy."""
    return _rich_table("Boosting rounds", _round_rows(records), never_wrapped=1)


def _result_rows(records: Sequence[Mapping[str, Any]]) -> Rows:
    columns = {
        "ID, %": lambda arm: _accuracy_text(records, arm, "id"),
        "OOD, %": lambda arm: _accuracy_text(records, arm, "ood"),
        "Exact ID, %": lambda arm: _accuracy_text(records, arm, "id", "exact_match"),
        "Exact OOD, %": lambda arm: _accuracy_text(records, arm, "ood", "exact_match"),
        "PGR ID": lambda arm: _pgr_text(_find(records, "pgr", arm=arm, split="id")),
        "PGR OOD": lambda arm: _pgr_text(_find(records, "pgr", arm=arm, split="ood")),
        "Train s": lambda arm: _cost_text(records, arm, "train_seconds", 1),
        "Train TFLOP": lambda arm: _cost_text(records, arm, "train_flops", 1e12),
    }
    rows = [[_arm_name(arm), *(cell(arm) for cell in columns.values())] for arm in _arms(records)]
    return _without_empty_columns(["Arm", *columns], rows)


def _arm_cost_rows(records: Sequence[Mapping[str, Any]]) -> Rows:
    columns = {
        "Training, s": ("train_seconds", 1),
        "Training, tokens": ("train_tokens", 1),
        "Training, TFLOP": ("train_flops", 1e12),
        "Answers, s": ("inference_seconds", 1),
        "Answers, tokens": ("inference_tokens", 1),
        "Answers, TFLOP": ("inference_flops", 1e12),
    }
    rows = [
        [_arm_name(arm), *(_cost_text(records, arm, name, unit) for name, unit in columns.values())]
        for arm in _arms(records)
    ]
    return _without_empty_columns(["Arm", *columns], [row for row in rows if any(row[1:])])


def _phase_cost_rows(records: Sequence[Mapping[str, Any]]) -> Rows:
    columns = {"Seconds": ("seconds", 1), "Tokens": ("tokens", 1), "TFLOP": ("flops", 1e12),
               "Peak memory, GB": ("peak_memory", 1e9)}  # fmt: skip
    rows = [
        [record["phase"], *(_amount_text(record.get(name), unit) for name, unit in columns.values())]
        for record in _of_kind(records, "phase")
    ]
    return _without_empty_columns(["Phase", *columns], rows)


def _without_empty_columns(headers: list[str], rows: list[list[str]]) -> Rows:
    shown = [i for i in range(len(headers)) if any(row[i] for row in rows)]
    return [headers[i] for i in shown], [[row[i] for i in shown] for row in rows]


def _round_rows(records: Sequence[Mapping[str, Any]]) -> Rows:
    headers = ["Round", "Weighted error ε", "Prior error ε₀", "Expert weight α", "Effective sample size",
               "Validation: expert", "Validation: ensemble", "Time, s", "Note"]  # fmt: skip
    return _without_empty_columns(headers, [_round_row(record) for record in _of_kind(records, "round")])


def _round_row(record: Mapping[str, Any]) -> list[str]:
    validation = record["validation"] or {}
    share = record["effective_sample_size"] / record["num_units"]
    notes = ["" if record["accepted"] else "not added: no better than the prior"]
    notes += ["error clamped"] if record.get("clamped") else []
    notes += [f"attempt {record['attempt']}"] if record.get("attempt", 1) > 1 else []
    return [
        str(record["round"]),
        f"{record['error']:.4f}",
        _number(record["prior_error"], ".4f"),
        f"{record['expert_weight']:.3f}",
        f"{record['effective_sample_size']:.0f} of {record['num_units']} ({share:.0%})",
        _percent(validation.get("expert")),
        _percent(validation.get("ensemble")),
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
    record = _find(records, "arm", arm=arm, split=split, metric=metric)
    return "" if record is None else f"{100 * record['value']:.1f} ± {100 * record['standard_error']:.1f}"


def _pgr_text(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return ""
    if not record["defined"]:
        return "undefined"
    text = f"{record['value']:.2f} ({record['low']:.2f} to {record['high']:.2f})"
    return text.replace("-", MINUS)


def _cost_text(records: Sequence[Mapping[str, Any]], arm: str, name: str, unit: float) -> str:
    record = _find(records, "cost", arm=arm)
    return "" if record is None else _amount_text(record.get(name), unit)


def _amount_text(value: float | None, unit: float) -> str:
    if value is None:
        return ""
    value /= unit
    # Three significant digits, whether the models are tiny or large.
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


# ----------------------------------------------------------------------------------------------------------------------
# Comparisons in words


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
            a, b = (_find(records, "answers", arm=arm, split=split) for arm in (first, second))
            if a is None or b is None:
                continue
            if a["ids"] != b["ids"]:
                raise ValueError(f"{first} and {second} answered different questions in split {split!r}")
            by_split[split] = paired_difference(a["correct"], b["correct"])
        if by_split:
            found.append((first, second, by_split))
    return found


def _best_expert(records: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the expert with the best validation accuracy: chosen on a test set it would be flattered."""
    measured = {
        arm: record["value"]
        for arm in _arms(records)
        if arm.startswith("expert_")
        and (record := _find(records, "arm", arm=arm, split="validation", metric="accuracy")) is not None
    }
    return max(measured, key=lambda arm: measured[arm]) if len(measured) > 1 else None


def _difference_text(difference: Interval) -> str:
    value, low, high = (_signed_points(x) for x in difference)
    return f"{value} ({low} to {high}): {_verdict(difference)}"


def _signed_points(share: float) -> str:
    # Adding 0 turns a -0 that rounding left into 0, which has no sign to show.
    points = round(100 * share, 1) + 0.0
    return f"{points:+.1f}".replace("-", MINUS) if points else "0.0"


def _verdict(difference: Interval) -> str:
    if difference.low > 0:
        return "better"
    return "worse" if difference.high < 0 else "not decided"


def _comparison_rows(records: Sequence[Mapping[str, Any]]) -> Rows:
    best = _best_expert(records)
    rows = []
    for first, second, by_split in _comparisons(records):
        chosen = " (best on validation)" if second == best else ""
        texts = [_difference_text(by_split[split]) if split in by_split else "" for split in TEST_SPLITS]
        rows.append([f"{_arm_name(first)} against {_lower_first(_arm_name(second))}{chosen}", *texts])
    return ["Comparison", *(f"{name}, points" for name in TEST_SPLITS.values())], rows


def _lower_first(text: str) -> str:
    return text[0].lower() + text[1:]


# ----------------------------------------------------------------------------------------------------------------------
# Figures

# Matplotlib draws in these stand-in colours; each becomes a CSS variable, so that the page decides how it looks.
INK, MUTED, RULE, PAPER = "#010203", "#010204", "#010205", "#010206"
# Okabe and Ito's palette, which colour-blind readers can tell apart; every series also has its own marker.
SERIES = ("#010211", "#010212", "#010213", "#010214", "#010215", "#010216")
MARKERS = ("o", "s", "D", "^", "v", "P")
CSS_VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper"} | {
    colour: f"series-{i}" for i, colour in enumerate(SERIES, start=1)
}
FIGURE_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
}
FIGURE_WIDTH = 8.4  # inches; the page scales figures to its own width


def _svg(figure: Figure, name: str, description: str) -> str:
    """Return the figure as SVG for inlining: accessible, with CSS colours and no outside reference."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(
        r'(<svg)( [^>]*?) width="[^"]*"', r"\1\2", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    )
    for colour, variable in CSS_VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)


def _styled(draw: Any) -> Any:
    """Run a drawing function under the report's style, which leaves the reader's own matplotlib settings alone."""

    @functools.wraps(draw)
    def styled(*args: Any) -> str:
        with matplotlib.rc_context(FIGURE_STYLE):
            result: str = draw(*args)
        return result

    return styled


@_styled
def _arms_figure(runs: Sequence[Run]) -> str:
    """Accuracies of all arms, ID and OOD side by side, with 95% intervals; one colour and marker per run."""
    arms = list(dict.fromkeys(arm for run in runs for arm in _arms(run.records)))
    arms = _arms([{"kind": "arm", "arm": arm} for arm in arms])
    figure = Figure(figsize=(FIGURE_WIDTH, 0.75 + (0.17 + 0.13 * len(runs)) * len(arms)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (split, name) in zip(panels, TEST_SPLITS.items(), strict=True):
        for i, run in enumerate(runs):
            _draw_arms(axes, run, arms, split, i, len(runs))
        axes.set_title(f"{name}: {'easy' if split == 'id' else 'hard'} test questions")
        axes.set_xlim(0, 100)
        axes.set_xlabel("right answers, %")
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0, pad=8)
    panels[0].set_yticks(range(len(arms)), [_arm_name(arm) for arm in arms])
    panels[0].set_ylim(len(arms) - 0.4, -0.6)
    if len(runs) > 1:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(3, len(runs)))
    return _svg(figure, "arms", "Accuracy of every arm on easy and hard test questions, with 95% intervals")


def _draw_arms(axes: Axes, run: Run, arms: Sequence[str], split: str, index: int, count: int) -> None:
    offset = 0.22 * (index - (count - 1) / 2)
    points = [
        (position + offset, record["value"], wilson_interval(record["value"], record["n"]))
        for position, arm in enumerate(arms)
        if (record := _find(run.records, "arm", arm=arm, split=split, metric="accuracy")) is not None
    ]
    heights, values, intervals = zip(*points, strict=True) if points else ((), (), ())
    whiskers = [
        [100 * (value - low) for value, (low, _) in zip(values, intervals, strict=True)],
        [100 * (high - value) for value, (_, high) in zip(values, intervals, strict=True)],
    ]
    axes.errorbar(
        [100 * value for value in values], heights, xerr=whiskers, fmt=MARKERS[index % 6], color=SERIES[index % 6],
        markersize=5.5, elinewidth=1.3, label=run.name, clip_on=False,
    )  # fmt: skip
    baseline = _find(run.records, "arm", arm="single_expert", split=split, metric="accuracy")
    if count == 1 and baseline is not None:
        axes.axvline(100 * baseline["value"], color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)), zorder=0)
        for height, value in zip(heights, values, strict=True):
            axes.annotate(
                f"{100 * value:.0f}", (1.0, height), xycoords=("axes fraction", "data"), xytext=(6, 0),
                textcoords="offset points", va="center", fontsize=8,
            )  # fmt: skip


@_styled
def _rounds_figure(records: Sequence[Mapping[str, Any]]) -> str:
    """Validation accuracy, and weighted training error beside the prior error, per round."""
    rounds = _of_kind(records, "round", accepted=True)
    numbers = [record["round"] for record in rounds]
    figure = Figure(figsize=(FIGURE_WIDTH, 2.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    validation = [record["validation"] or {} for record in rounds]
    _line(left, numbers, [_in_percent(v.get("expert")) for v in validation], "this round's expert", 0)
    _line(left, numbers, [_in_percent(v.get("ensemble")) for v in validation], "ensemble so far", 1)
    baseline = _find(records, "arm", arm="single_expert", split="validation", metric="accuracy")
    if baseline is not None:
        left.axhline(
            100 * baseline["value"], color=MUTED, linestyle=(0, (2, 2)), linewidth=1.1, label="single weak expert"
        )
    left.set_title("Accuracy on validation questions")
    left.set_ylabel("right answers, %")
    left.set_ylim(0, 100)
    _line(right, numbers, [_in_percent(record["error"]) for record in rounds], "expert's weighted error ε", 0)
    if all(record["prior_error"] is not None for record in rounds):
        prior = 100 * rounds[0]["prior_error"]
        right.axhline(prior, color=MUTED, linestyle=(0, (2, 2)), linewidth=1.1, label="prior error ε₀ to beat")
    right.set_title("Weighted error on the training answers")
    right.set_ylabel("weight of the wrong units, %")
    right.set_ylim(0, 100)
    for axes in (left, right):
        _round_axis(axes, numbers)
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, fontsize=7.5, handlelength=1.8, columnspacing=1.2
        )
    return _svg(figure, "rounds", "Validation accuracy and weighted training error in each boosting round")


@_styled
def _weights_figure(records: Sequence[Mapping[str, Any]]) -> str:
    """Quantiles of the weights after each round (log scale), and the effective sample size."""
    rounds = _of_kind(records, "round", accepted=True)
    numbers = [0, *(record["round"] for record in rounds)]
    figure = Figure(figsize=(FIGURE_WIDTH, 2.7), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))

    def curve(quantile: float) -> list[float]:
        # Before round 1 every unit has weight 1/N.
        return [1.0, *(record["weight_quantiles"][str(quantile)] for record in rounds)]

    left.fill_between(numbers, curve(0.01), curve(0.99), color=SERIES[0], alpha=0.18, linewidth=0, label="middle 98%")
    left.fill_between(numbers, curve(0.25), curve(0.75), color=SERIES[0], alpha=0.4, linewidth=0, label="middle half")
    _line(left, numbers, curve(0.5), "median", 0)
    left.plot(numbers, curve(1.0), color=SERIES[1], marker="s", markersize=4, linewidth=1.1, label="largest")
    left.set_yscale("log")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.yaxis.set_minor_formatter(NullFormatter())
    left.set_title("Weight of a unit after each round")
    left.set_ylabel("N · D (1 = uniform)")
    left.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4, fontsize=7.5, handlelength=1.6, columnspacing=1.2
    )
    shares = [100.0, *(100 * record["effective_sample_size"] / record["num_units"] for record in rounds)]
    _line(right, numbers, shares, "effective sample size", 2)
    right.set_title("Effective sample size")
    right.set_ylabel("% of N units")
    right.set_ylim(0, 105)
    for axes in (left, right):
        _round_axis(axes, numbers)
    left.set_xlabel("after round (0: at the start)")
    right.set_xlabel("after round (0: at the start)")
    return _svg(figure, "weights", "Distribution of the units' weights and effective sample size after each round")


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], label: str, index: int) -> None:
    axes.plot(x, y, color=SERIES[index], marker=MARKERS[index], label=label, clip_on=False, zorder=3)


def _round_axis(axes: Axes, numbers: Sequence[int]) -> None:
    axes.set_xlabel("round")
    axes.set_xlim(numbers[0] - 0.2, numbers[-1] + 0.2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    axes.grid(visible=False, axis="x")


def _in_percent(share: float | None) -> float:
    return math.nan if share is None else 100 * share


# ----------------------------------------------------------------------------------------------------------------------
# The page


def write_report(folders: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]) -> None:
    """Write one HTML page on one or several runs, atomically.

    Args:
        folders: of runs, each with `results.jsonl` and, if it has one, `config.json`. With several, the page opens
            with all of them in one figure.
        path: the page.

    Raises:
        FileNotFoundError: a folder without results.
        ValueError: no folder, or a corrupt record (names file and line).
    """
    if not folders:
        raise ValueError("folders is empty: give at least one folder of a run")
    runs = [_load_run(Path(folder)) for folder in folders]
    text = _page(_with_distinct_names(runs, folders))
    with new_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def _load_run(folder: Path) -> Run:
    records = read_records(folder)
    config_file = folder / CONFIG_FILE
    return Run(folder.resolve().name, records, read_json(config_file) if config_file.exists() else None)


def _with_distinct_names(runs: Sequence[Run], folders: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """Name each run by its folder, and by the folder's whole path where names repeat."""
    names = [run.name for run in runs]
    return [
        Run(run.name if names.count(run.name) == 1 else os.fspath(folder), run.records, run.config)
        for run, folder in zip(runs, folders, strict=True)
    ]


def _page(runs: Sequence[Run]) -> str:
    title = "EnsemW2S report: " + ", ".join(run.name for run in runs)
    measured = [run for run in runs if _arms(run.records)]
    overview = ""
    if len(measured) > 1:
        overview = f"<section><h2>All runs side by side</h2>{_arms_section(measured)}</section>"
    sections = "".join(_run_section(run, alone=len(runs) == 1) for run in runs)
    return _with_unique_ids(
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{html.escape(title)}</h1>\n"
        f"{overview}{sections}<section>{READING_GUIDE}</section>\n</main>\n</body>\n</html>\n"
    )


def _with_unique_ids(page: str) -> str:
    """Number the ids of each figure, since matplotlib gives the same ones to all; drop those nothing refers to."""
    numbers = itertools.count(1)

    def rename(match: re.Match[str]) -> str:
        figure, number = match[0], next(numbers)
        used = set(re.findall(r'(?:href="|url\()#([\w.-]+)', figure))
        figure = re.sub(
            r' id="([^"]*)"', lambda found: f' id="f{number}-{found[1]}"' if found[1] in used else "", figure
        )
        return re.sub(r'(href="|url\()#', rf"\g<1>#f{number}-", figure)

    return re.sub(r"<svg.*?</svg>", rename, page, flags=re.DOTALL)


def _run_section(run: Run, *, alone: bool) -> str:
    heading = "" if alone else f"<h2>Run {html.escape(run.name)}</h2>"
    parts = [_summary(run), _in_short(run.records)]
    if _arms(run.records):
        parts += [_arms_section([run]) if alone else "", _results_section(run.records)]
    if _of_kind(run.records, "round"):
        parts.append(_rounds_section(run.records))
    if _of_kind(run.records, "cost") or _of_kind(run.records, "phase"):
        parts.append(_cost_section(run.records))
    parts += [_labels_section(run.records), _configuration_section(run)]
    return f"<section>{heading}{''.join(parts)}</section>\n"


def _summary(run: Run) -> str:
    facts = []
    if run.config is not None:
        facts += [
            ("Weak model", _model_text(run.config.get("weak"))),
            ("Strong model", _model_text(run.config.get("strong"))),
        ]
        boosting = run.config.get("boosting") or {}
        facts += [("Recipe", str(boosting.get("recipe", "default"))), ("Seed", str(run.config.get("seed", "")))]
    rounds = _of_kind(run.records, "round", accepted=True)
    if rounds:
        facts.append(("Experts", f"{len(rounds)} over {rounds[0]['num_units']:,} units"))
    sizes = [f"{record['split']} {record['n']}" for record in _of_kind(run.records, "questions")]
    if sizes:
        facts.append(("Questions", ", ".join(sizes)))
    seconds = sum(record["seconds"] for record in _of_kind(run.records, "phase"))
    if seconds:
        facts.append(("Time", f"{seconds:,.0f} s"))
    return _definitions(facts)


def _model_text(model: Mapping[str, Any] | None) -> str:
    if model is None:
        return ""
    layers = f", layers {model['keep_layers']}" if model.get("keep_layers") else ""
    return f"{model.get('source', '')}{layers}"


def _in_short(records: Sequence[Mapping[str, Any]]) -> str:
    rows = _comparison_rows(records)
    if not rows[1]:
        return ""
    note = (
        "Differences in the share of right answers, in percentage points, with 95% paired bootstrap interval over "
        "questions. “Not decided” means that the interval includes 0. Intervals are not corrected for looking at "
        "several comparisons."
    )
    return f"<h3>In short</h3>{_html_table(rows, note)}"


def _arms_section(runs: Sequence[Run]) -> str:
    dotted = (
        " The dotted line is the single weak expert; figures at the right are percentages." if len(runs) == 1 else ""
    )
    return "<h3>Accuracy of every arm</h3>" + _figure(
        _arms_figure(runs),
        f"Share of test questions answered right. Whiskers: 95% interval (Wilson) over questions.{dotted}",
    )


def _results_section(records: Sequence[Mapping[str, Any]]) -> str:
    return "<h3>Results</h3>" + _html_table(
        _result_rows(records),
        "ID, OOD: right answers ± standard error over questions. PGR: share of the gap from the single weak expert to "
        "the ceiling that a student closes, with 95% interval; undefined where the gap itself is not shown to be above "
        "0. Costs are those of training an arm itself: the ensemble's are the sum over its experts, a student's leave "
        "out its teacher's.",
    )


def _cost_section(records: Sequence[Mapping[str, Any]]) -> str:
    arms = _html_table(
        _arm_cost_rows(records),
        "Training as above. Answers: all test questions once; the experts are run once for all their mixtures, and one "
        "expert is given its share. FLOPs are counted, padding included: matrix products and attention.",
    )
    phases = _html_table(
        _phase_cost_rows(records),
        "Of the session that finished the phase. Tokens are those of training and answers, without padding.",
    )
    return f"<h3>Cost</h3>{arms}{phases}"


def _rounds_section(records: Sequence[Mapping[str, Any]]) -> str:
    figures = ""
    if _of_kind(records, "round", accepted=True):
        figures = _figure(
            _rounds_figure(records),
            "Left: on validation questions, which no expert was trained on. Right: the error that sets the expert's "
            "weight. It is measured on the training answers and is therefore optimistic.",
        ) + _figure(
            _weights_figure(records),
            "Left: how the weights spread over units (log scale). Right: effective sample size 1/ΣD²; a small one "
            "means that the next expert sees little but a few hard units.",
        )
    table = _html_table(
        _round_rows(records), "ε and ε₀ are shares of weight. An expert is added only if ε is below ε₀ (α above 0)."
    )
    return f"<h3>Boosting rounds</h3>{figures}{table}{_identity_check(records)}"


def _identity_check(records: Sequence[Mapping[str, Any]]) -> str:
    checks = _of_kind(records, "identity")
    if not checks:
        return ""
    gaps = [record["identity_gap"] for record in checks if record["identity_gap"] is not None]
    sum_gap = max(record["sum_gap"] for record in checks)
    largest = max(gaps, default=0.0)
    holds = largest <= IDENTITY_TOLERANCE and sum_gap <= SUM_TOLERANCE
    verdict = "<strong>Holds.</strong>" if holds else "<strong>FAILS: do not trust this run.</strong>"
    identity = (
        "After each update the new expert has exactly the error that the method demands (closing identity: largest "
        f"deviation {largest:.1e} over {len(gaps)} rounds, limit {IDENTITY_TOLERANCE:g}), and the weights"
        if gaps
        else "The closing identity says nothing here: no round had an update with an error that was not clamped. The "
        "weights"
    )
    return (
        f'<p class="check">Check on the saved files: {verdict} {identity} sum to 1 (largest deviation {sum_gap:.1e}, '
        f"limit {SUM_TOLERANCE:g}).</p>"
    )


def _labels_section(records: Sequence[Mapping[str, Any]]) -> str:
    labels = _of_kind(records, "labels")
    if not labels:
        return ""
    rows = [
        [_arm_name(r["teacher"]), str(r["n"]), _percent(r["accuracy"]),
         _number(r.get("confidence"), ".3f").replace("-", MINUS), _percent(r.get("agreement"))]
        for r in labels
    ]  # fmt: skip
    headers = [
        "Teacher",
        "Hard questions",
        "Answered right",
        "Mean log-probability per token, nats",
        "Experts' agreement",
    ]
    return "<h3>Pseudo-answers the students learned from</h3>" + _html_table(
        (headers, rows),
        "The share that is right is known here only because the test bed has the truth; no student saw it.",
    )


def _configuration_section(run: Run) -> str:
    text = ""
    if run.config is not None:
        dumped = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True)
        text += f"<h3>Configuration</h3><pre>{html.escape(dumped)}</pre>"
    environment = _find(run.records, "environment")
    if environment is not None:
        facts = {key: value for key, value in environment.items() if key != "kind"}
        text += f"<h3>Environment</h3>{_definitions(_flatten(facts))}"
    phases = _of_kind(run.records, "phase")
    if phases:
        rows = [[record["phase"], f"{record['seconds']:,.1f}"] for record in phases]
        text += "<h3>Time by phase</h3>" + _html_table((["Phase", "Seconds"], rows), "Wall clock.")
    return text


def _flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    for key, item in value.items():
        facts += _flatten(item, f"{prefix}{key}.") if isinstance(item, Mapping) else [(f"{prefix}{key}", str(item))]
    return facts


def _definitions(facts: Iterable[tuple[str, str]]) -> str:
    items = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts if value
    )
    return f"<dl>{items}</dl>" if items else ""


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _html_table(content: Rows, note: str) -> str:
    headers, rows = content
    head = "".join(f'<th scope="col">{html.escape(header)}</th>' for header in headers)
    body = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div><p class="note">{html.escape(note)}</p>'


READING_GUIDE = """<h2>What these figures show, and what they do not</h2>
<ul>
<li><strong>Right</strong> means that the whole answer is exact: at every answer token the most probable token is the
true one. There is no credit for a nearly right answer.</li>
<li><strong>ID</strong> questions are as easy as those the experts were trained on; <strong>OOD</strong> questions are
harder. The truth about hard questions was used to score, and to train the ceiling, and for nothing else.</li>
<li><strong>Intervals</strong> cover the choice of test questions only. Another training seed would move every figure by
an amount that a single run cannot show. An arm that is right on none of 100 questions may still be right on up to
about 3.7% of such questions, although its standard error reads 0.</li>
<li><strong>Compare arms by their paired differences</strong>, not by whether whiskers overlap: all arms answered the
same questions. With several comparisons, one in twenty intervals misses the truth by chance.</li>
<li><strong>An ensemble costs as many models as it has experts</strong>, in training and for every answer. The fair
opponents are the uniform average of the same experts and the best of them; beating the single baseline alone may
only show that several models average out their mistakes.</li>
<li><strong>PGR</strong> is a ratio, and unstable when the gap is small. It can be negative (the student is worse than
its weak baseline) or above 1.</li>
<li><strong>Errors on training answers</strong> decide the weights but say little about new questions; the validation
curve does.</li>
<li>This is one task with one pair of models. It says nothing about other tasks, other sizes, or other gaps between
easy and hard.</li>
</ul>"""

_LIGHT = """--paper:#ffffff; --ink:#1c2126; --muted:#5c6670; --rule:#d9dee3; --band:#f4f6f8; --series-1:#0072b2;
--series-2:#d55e00; --series-3:#00805d; --series-4:#b3588f; --series-5:#a87400; --series-6:#2f86bd;
color-scheme:light;"""
_DARK = """--paper:#14171a; --ink:#e7eaed; --muted:#9ea8b2; --rule:#343b42; --band:#1e2328; --series-1:#5ab4ea;
--series-2:#f58a4b; --series-3:#3fc79f; --series-4:#e2a3c7; --series-5:#e8b64a; --series-6:#93cdf2;
color-scheme:dark;"""
STYLE = f"""
:root {{ {_LIGHT} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
body {{ margin:0; background:var(--paper); color:var(--ink);
font:16px/1.55 system-ui,"Segoe UI","DejaVu Sans",sans-serif; }}
main {{ max-width:60rem; margin:0 auto; padding:1.5rem 1.25rem 4rem; }}
h1 {{ font-size:1.6rem; line-height:1.25; margin:.5rem 0 1rem; }}
h2 {{ font-size:1.25rem; margin:2.5rem 0 .75rem; padding-top:1rem; border-top:1px solid var(--rule); }}
h3 {{ font-size:1.05rem; margin:2rem 0 .5rem; }}
dl {{ display:grid; grid-template-columns:repeat(auto-fill,minmax(13rem,1fr)); gap:.5rem 1.5rem; margin:0; }}
dt {{ color:var(--muted); font-size:.8rem; }} dd {{ margin:0; overflow-wrap:anywhere; font-size:.92rem; }}
figure {{ margin:.75rem 0 1.5rem; }} figure svg {{ display:block; width:100%; height:auto; }}
figcaption, .note {{ color:var(--muted); font-size:.85rem; margin:.4rem 0 0; max-width:48rem; }}
.wide {{ overflow-x:auto; }}
table {{ border-collapse:collapse; width:100%; font-size:.88rem; font-variant-numeric:tabular-nums; }}
th, td {{ padding:.35rem .5rem; text-align:right; white-space:nowrap; vertical-align:top;
border-bottom:1px solid var(--rule); }}
th:first-child {{ text-align:left; padding-left:0; }} tbody th {{ font-weight:500; }}
thead th {{ white-space:normal; color:var(--muted); font-weight:600; vertical-align:bottom;
border-bottom:2px solid var(--rule); }}
pre {{ background:var(--band); padding:.75rem 1rem; border-radius:6px; font-size:.82rem; white-space:pre-wrap; }}
.check {{ background:var(--band); padding:.6rem .9rem; border-radius:6px; font-size:.9rem; }}
ul {{ padding-left:1.2rem; }} li {{ margin:.3rem 0; max-width:50rem; }}
@media print {{ main {{ max-width:none; padding:0; }} figure, tr, .check {{ break-inside:avoid; }}
h2, h3 {{ break-after:avoid; }}
body {{ font-size:10.5pt; }} .wide {{ overflow:visible; }} }}
"""
