"""Figures of reports, as SVG for inlining in a page that decides on colours, or as files of their own."""

from __future__ import annotations

import html
import io
import itertools
import math
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ensemw2s.report.arms import BASELINE, arm_name, measured_arms
from ensemw2s.report.calibration import Confidences, right_of_the_surest
from ensemw2s.report.statistics import Interval
from ensemw2s.report.tables import difference_interval
from ensemw2s.runtime.files import SIGNATURE, new_page
from ensemw2s.runtime.records import TEST_SPLITS, ArmRecord, RoundRecord, Run, of_kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Matplotlib draws in these stand-in colours; each becomes a CSS variable, so that the page decides how it looks.
INK, MUTED, RULE, PAPER = "#010203", "#010204", "#010205", "#010206"
# Okabe and Ito's palette, which colour-blind readers can tell apart; every series also has its own marker.
SERIES = ("#010211", "#010212", "#010213", "#010214", "#010215", "#010216")
MARKERS = ("o", "s", "D", "^", "v", "P")
CSS_VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper"} | {
    colour: f"series-{i}" for i, colour in enumerate(SERIES, start=1)
}
# A figure that is a file of its own is printed and shown on white: black and greys.
FILE_COLOURS = {INK: "#000000", MUTED: "#5a5a5a", RULE: "#d4d4d4"}
FILE_FORMATS = ("svg", "png")
FILE_DPI = 200
FIGURE_WIDTH = 8.4  # inches
# A page sets panels of this width side by side, or below one another where it is narrow.
PANEL_WIDTH = 4.2
# Shares of the questions that are answered, on the curves of selective answering.
_COVERAGES = tuple(tenth / 10 for tenth in range(1, 11))
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), MUTED),
    # A dollar in a name begins no formula.
    "text.parse_math": False, "svg.fonttype": "none", "font.family": "sans-serif", "font.sans-serif": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": RULE, "grid.linewidth": 0.6,
    "legend.frameon": False, "lines.linewidth": 1.6, "lines.markersize": 5,
}  # fmt: skip
DOTTED: dict[str, Any] = {"color": MUTED, "linestyle": (0, (2, 2)), "linewidth": 1.1}
# The reader's own matplotlib settings are left alone.
_styled = matplotlib.rc_context(STYLE)


def _svg(figure: Figure, name: str, title: str, values: Sequence[str]) -> str:
    """Return the figure as SVG for inlining: its title and values as a label, CSS colours, no outside reference."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    for size in ("width", "height"):
        text = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", text, count=1)
    for colour, variable in CSS_VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    label = html.escape(f"{title}: {'; '.join(values)}")
    start = text.index(">") + 1
    opened = text[: start - 1].replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return f"{opened}><title>{html.escape(title)}</title>{text[start:]}"


def _panel(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(PANEL_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


@_styled
def arms_figure(runs: Sequence[Run]) -> list[str]:
    """Accuracies of all arms, a panel for each split, with 95% intervals; one colour and marker per run."""
    arms = measured_arms(record for run in runs for record in run.records)
    height = max(1.6, 0.75 + (0.17 + 0.13 * len(runs)) * len(arms) + (0.2 * len(runs) if len(runs) > 1 else 0))
    panels = []
    for split in TEST_SPLITS:
        figure, axes = _panel(height)
        _dress(axes, split, "right answers, %")
        values = [value for i, run in enumerate(runs) for value in _draw_arms(axes, run, arms, split, i, len(runs))]
        axes.set(xlim=(0, 100), ylim=(len(arms) - 0.4, -0.6))
        axes.set_yticks(range(len(arms)), [_short(arm_name(arm)) for arm in arms])
        if len(runs) > 1:
            figure.legend(loc="outside upper left")
        panels.append(_svg(figure, f"arms-{split}", f"Accuracy of every arm, {_split_title(split)}", values))
    return panels


def _split_title(split: str) -> str:
    return f"{TEST_SPLITS[split]}: {'easy' if split == 'id' else 'hard'} test questions"


def _short(name: str) -> str:
    """Return a name of any length as a label of at most two lines."""
    return "\n".join(textwrap.wrap(name, 30, max_lines=2, placeholder="…"))


def _panels_by_split(figure: Figure, label: str, sharex: bool) -> dict[str, Axes]:
    panels = dict(zip(TEST_SPLITS, figure.subplots(1, 2, sharex=sharex, sharey=True), strict=True))
    for split, axes in panels.items():
        _dress(axes, split, label)
    return panels


def _dress(axes: Axes, split: str, label: str) -> None:
    axes.set(title=_split_title(split), xlabel=label)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0, pad=8)


def _draw_arms(axes: Axes, run: Run, arms: Sequence[str], split: str, index: int, count: int) -> list[str]:
    """Draw one run's arms and return their values in words."""
    measured = {record.arm: record for record in of_kind(run.records, ArmRecord, split=split, metric="accuracy")}
    heights = {arm: height + 0.22 * (index - (count - 1) / 2) for height, arm in enumerate(arms) if arm in measured}
    values = [100 * measured[arm].value for arm in heights]
    low, high = zip(*(_wilson_interval(measured[arm]) for arm in heights), strict=True) if heights else ((), ())
    axes.errorbar(
        values, list(heights.values()), xerr=[np.subtract(values, low), np.subtract(high, values)],
        fmt=MARKERS[index % 6], color=SERIES[index % 6], markersize=5.5, elinewidth=1.3, label=run.name, clip_on=False,
    )  # fmt: skip
    if count == 1 and BASELINE in heights:
        axes.axvline(100 * measured[BASELINE].value, **DOTTED | {"linewidth": 0.9}, zorder=0)
        for height, value in zip(heights.values(), values, strict=True):
            _beside(axes, height, f"{value:.0f}", fontsize=8)
    own = "" if count == 1 else f"{run.name}, "
    return [
        f"{own}{arm_name(arm)} {value:.0f}% ({start:.0f} to {end:.0f})"
        for arm, value, start, end in zip(heights, values, low, high, strict=True)
    ]


def _wilson_interval(record: ArmRecord) -> tuple[float, float]:
    """Return the ends of an accuracy's 95% interval, in percent; it holds near 0 and 100 as well."""
    from scipy.stats import binomtest

    n = int(record.n)
    low, high = binomtest(min(round(record.value * n), n), n).proportion_ci(method="wilson")
    return 100 * low, 100 * high


def _beside(axes: Axes, height: float, text: str, **style: Any) -> None:
    """Write at the right edge of a panel."""
    axes.annotate(text, (1.0, height), xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points",
                  va="center", **style)  # fmt: skip


@_styled
def rounds_figure(rounds: Sequence[RoundRecord], baseline: float | None) -> list[str]:
    """Validation accuracy (beside that of the single expert), and weighted training error beside the prior error."""
    numbers = [record.round for record in rounds]
    reached, left = _panel(2.9)
    said = []
    for index, (name, label) in enumerate((("expert", "this round's expert"), ("ensemble", "ensemble so far"))):
        values = [100 * (record.validation or {}).get(name, math.nan) for record in rounds]
        _line(left, numbers, values, label, index)
        said.append(_by_round(label, numbers, values))
    if baseline is not None:
        left.axhline(100 * baseline, **DOTTED, label="single weak expert")
        said.append(f"single weak expert {100 * baseline:.0f}%")
    titles = ("Accuracy on validation questions", "Weighted error on the training answers")
    left.set(title=titles[0], ylabel="right answers, %")
    failed, right = _panel(2.9)
    errors = [100 * record.error for record in rounds]
    _line(right, numbers, errors, "expert's weighted error ε", 0)
    if rounds[0].prior_error is not None:
        right.axhline(100 * rounds[0].prior_error, **DOTTED, label="prior error ε₀ to beat")
    right.set(title=titles[1], ylabel="weight of the wrong units, %")
    for axes in (left, right):
        axes.set_ylim(0, 100)
        _round_axis(axes, numbers, "round")
        _legend_below(axes, handlelength=1.8)
    return [_svg(reached, "rounds-left", titles[0], said),
            _svg(failed, "rounds-right", titles[1], [_by_round("error", numbers, errors)])]  # fmt: skip


@_styled
def weights_figure(rounds: Sequence[RoundRecord]) -> list[str]:
    """Quantiles of the weights after each round (log scale), and the effective sample size."""
    numbers = [0, *(r.round for r in rounds)]
    spread, left = _panel(2.9)

    def curve(quantile: float) -> list[float]:
        # Before round 1 every unit has weight 1/N.
        return [1.0, *(record.weight_quantiles[str(quantile)] for record in rounds)]

    left.fill_between(numbers, curve(0.01), curve(0.99), color=SERIES[0], alpha=0.18, linewidth=0, label="middle 98%")
    left.fill_between(numbers, curve(0.25), curve(0.75), color=SERIES[0], alpha=0.4, linewidth=0, label="middle half")
    _line(left, numbers, curve(0.5), "median", 0)
    left.plot(numbers, curve(1.0), color=SERIES[1], marker="s", markersize=4, linewidth=1.1, label="largest")
    titles = ("Weight of a unit after each round", "Effective sample size")
    left.set(title=titles[0], ylabel="N · D (1 = uniform)", yscale="log")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.yaxis.set_minor_formatter(NullFormatter())
    _legend_below(left, handlelength=1.6)
    size, right = _panel(2.9)
    shares = [100.0, *(100 * record.effective_sample_size / record.num_units for record in rounds)]
    _line(right, numbers, shares, "effective sample size", 2)
    right.set(title=titles[1], ylabel="% of N units", ylim=(0, 105))
    for axes in (left, right):
        _round_axis(axes, numbers, "after round (0: at the start)")
    said = [_by_round(name, numbers, curve(level), "") for name, level in (("median", 0.5), ("largest", 1.0))]
    return [_svg(spread, "weights-left", titles[0], said),
            _svg(size, "weights-right", titles[1], [_by_round("share of N", numbers, shares)])]  # fmt: skip


@_styled
def selective_figure(confidences: Mapping[str, Mapping[str, Confidences]]) -> list[str]:
    """Right answers among the surest, by probability and by the experts' agreement; a line for each teacher.

    Means over tasks. A teacher whose agreement is the same everywhere has no line there.
    """
    panels = []
    for score in ("probability", "agreement"):
        figure, axes = _panel(2.9)
        said = []
        for index, (teacher, by_task) in enumerate(confidences.items()):
            if any(np.ptp(getattr(found, score)) == 0 for found in by_task.values()):
                continue
            curves = [right_of_the_surest(getattr(x, score), x.correct, _COVERAGES) for x in by_task.values()]
            reached = (100 * np.mean(curves, axis=0)).tolist()
            _line(axes, [100 * share for share in _COVERAGES], reached, arm_name(teacher), index % len(SERIES))
            values = ", ".join(f"{y:.0f}% of {x:.0%}" for x, y in zip(_COVERAGES, reached, strict=True))
            said.append(f"{arm_name(teacher)} {values}")
        title = f"Surest by {'probability' if score == 'probability' else 'the experts’ agreement'}"
        axes.set(title=title, xlabel="answered, % of the questions", ylabel="right of these, %")
        axes.set(xlim=(0, 102), ylim=(0, 102))
        if said:
            _legend_below(axes, handlelength=1.6)
            panels.append(_svg(figure, f"selective-{score}", title, said))
    return panels


def _by_round(name: str, numbers: Sequence[int], values: Sequence[float], unit: str = "%") -> str:
    return f"{name} {', '.join(f'{value:.3g}{unit} (round {n})' for n, value in zip(numbers, values, strict=True))}"


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], label: str, index: int) -> None:
    axes.plot(x, y, color=SERIES[index], marker=MARKERS[index], label=label, clip_on=False, zorder=3)


def _legend_below(axes: Axes, handlelength: float) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=2, fontsize=7.5, handlelength=handlelength,
                columnspacing=1.2)  # fmt: skip


def _round_axis(axes: Axes, numbers: Sequence[int], label: str) -> None:
    axes.set(xlabel=label, xlim=(numbers[0] - 0.2, numbers[-1] + 0.2))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    axes.grid(visible=False, axis="x")


@dataclass(frozen=True)
class ForestRow:
    """One line of a forest plot: differences by split ("id", "ood"), as shares; `pooled` over tasks, or of one."""

    label: str
    pooled: bool
    by_split: Mapping[str, Interval]


@_styled
def forest_figure(rows: Sequence[ForestRow]) -> list[str]:
    """Differences with 95% intervals, a panel for each split: pooled ones large, those of tasks small below them."""
    steps = [2.6 if row.pooled else 1.2 for row in rows[1:]]
    heights = list(itertools.accumulate(steps, initial=0.0))
    panels = []
    for split in TEST_SPLITS:
        figure, axes = _panel(1.0 + 0.2 * (heights[-1] + 2))
        _dress(axes, split, "difference in right answers, points")
        _draw_differences(axes, rows, split, heights, INK, MUTED)
        axes.set_yticks([])
        axes.set_ylim(heights[-1] + 0.8, heights[0] - 1.8)
        for row, height in zip(rows, heights, strict=True):
            # Above the line: beside it, a name would leave a narrow panel no room.
            name = " ".join(row.label.split("\n")) if row.pooled else row.label
            axes.annotate(textwrap.shorten(name, 70, placeholder="…"), (0.0, height), ha="left", va="bottom",
                          xycoords=("axes fraction", "data"), xytext=(0, 6 if row.pooled else 3),
                          textcoords="offset points", fontsize=7.5, color=INK if row.pooled else MUTED)  # fmt: skip
        said = [f"{' '.join(row.label.split())} {difference_interval(row.by_split[split])}"
                for row in rows if split in row.by_split]  # fmt: skip
        panels.append(_svg(figure, f"forest-{split}", f"Differences between arms, {_split_title(split)}", said))
    return panels


def save_forest_figure(rows: Sequence[ForestRow], path: str | os.PathLike[str]) -> None:
    """Write the figure to a file of its own, atomically: the same rows give the same bytes.

    A suffix other than .svg and .png, or a file at `path` that is not ours, raises ValueError.
    """
    suffix = Path(path).suffix.removeprefix(".")
    if suffix not in FILE_FORMATS:
        raise ValueError(f"cannot draw to {path}: its name must end in .{' or .'.join(FILE_FORMATS)}")
    style = {name: FILE_COLOURS.get(value, value) for name, value in STYLE.items()}
    # Letters as outlines: a file of its own cannot know its reader's fonts. No date and no version, which would change.
    fixed = {"svg.hashsalt": "forest", "svg.fonttype": "path"}
    with matplotlib.rc_context(style | fixed), new_page(path) as aside:
        figure = _forest(rows, FILE_COLOURS[INK], FILE_COLOURS[MUTED])
        metadata = {"Date": None, "Creator": SIGNATURE} if suffix == "svg" else {"Software": SIGNATURE}
        figure.savefig(aside, format=suffix, dpi=FILE_DPI, facecolor="white", metadata=metadata)


def _forest(rows: Sequence[ForestRow], ink: str, muted: str) -> Figure:
    # Pooled rows have two lines of text and some room above.
    steps = [1.9 if row.pooled else 1.45 if above.pooled else 0.85 for above, row in itertools.pairwise(rows)]
    heights = list(itertools.accumulate(steps, initial=0.0))
    figure = Figure(figsize=(FIGURE_WIDTH, 0.8 + 0.2 * (heights[-1] + 1)), layout="constrained")
    panels = _panels_by_split(figure, "difference in right answers, points", sharex=True)
    for split, axes in panels.items():
        _draw_differences(axes, rows, split, heights, ink, muted)
    labels = panels["id"]
    labels.set_yticks(heights, [row.label for row in rows])
    labels.set_ylim(heights[-1] + 0.8, heights[0] - 0.8)
    for row, label in zip(rows, labels.get_yticklabels(), strict=True):
        label.set(fontweight="bold" if row.pooled else "normal", fontsize=8.5 if row.pooled else 7.5)
    return figure


def _draw_differences(
    axes: Axes, rows: Sequence[ForestRow], split: str, heights: Sequence[float], ink: str, muted: str
) -> None:
    axes.axvline(0, color=muted, linewidth=0.9, zorder=0)
    for row, height in zip(rows, heights, strict=True):
        if split in row.by_split:
            _draw_difference(axes, row.by_split[split], height, ink if row.pooled else muted, row.pooled)
    axes.spines["left"].set_visible(False)


def _draw_difference(axes: Axes, difference: Interval, height: float, colour: str, pooled: bool) -> None:
    value, low, high = (100 * share for share in difference)
    axes.errorbar(
        [value], [height], xerr=[[value - low], [high - value]], fmt="D" if pooled else "o", color=colour,
        markersize=6.5 if pooled else 3.5, elinewidth=2.2 if pooled else 1.0, clip_on=False,
    )  # fmt: skip
    weight = "bold" if pooled else "normal"
    _beside(axes, height, difference_interval(difference), fontsize=7.5, color=colour, fontweight=weight)
