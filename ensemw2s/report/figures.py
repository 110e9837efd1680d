"""Figures of reports, as SVG for inlining in a page that decides on colours, or as files of their own."""

from __future__ import annotations

import functools
import html
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ensemw2s.report.arms import arm_name
from ensemw2s.report.records import TEST_SPLITS, Run, find, measured_arms, of_kind
from ensemw2s.report.statistics import Interval, wilson_interval
from ensemw2s.report.tables import difference_interval
from ensemw2s.runtime.files import new_file

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
FILE_INK, FILE_MUTED, FILE_RULE = "#000000", "#5a5a5a", "#d4d4d4"
FILE_FORMATS = ("svg", "png")
FILE_DPI = 200


def _figure_style(ink: str, muted: str, rule: str) -> dict[Any, Any]:
    return {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 8.5,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": muted,
        "axes.titlecolor": ink,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": rule,
        "grid.linewidth": 0.6,
        "xtick.color": muted,
        "ytick.color": muted,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "lines.markersize": 5,
    }


FIGURE_STYLE = _figure_style(INK, MUTED, RULE)
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
def arms_figure(runs: Sequence[Run]) -> str:
    """Accuracies of all arms, ID and OOD side by side, with 95% intervals; one colour and marker per run."""
    arms = measured_arms(record for run in runs for record in run.records)
    figure = Figure(
        figsize=(FIGURE_WIDTH, max(1.6, 0.75 + (0.17 + 0.13 * len(runs)) * len(arms))), layout="constrained"
    )
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (split, name) in zip(panels, TEST_SPLITS.items(), strict=True):
        for i, run in enumerate(runs):
            _draw_arms(axes, run, arms, split, i, len(runs))
        axes.set_title(f"{name}: {'easy' if split == 'id' else 'hard'} test questions")
        axes.set_xlim(0, 100)
        axes.set_xlabel("right answers, %")
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0, pad=8)
    panels[0].set_yticks(range(len(arms)), [arm_name(arm) for arm in arms])
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
        if (record := find(run.records, "arm", arm=arm, split=split, metric="accuracy")) is not None
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
    baseline = find(run.records, "arm", arm="single_expert", split=split, metric="accuracy")
    if count == 1 and baseline is not None:
        axes.axvline(100 * baseline["value"], color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)), zorder=0)
        for height, value in zip(heights, values, strict=True):
            axes.annotate(
                f"{100 * value:.0f}", (1.0, height), xycoords=("axes fraction", "data"), xytext=(6, 0),
                textcoords="offset points", va="center", fontsize=8,
            )  # fmt: skip


@_styled
def rounds_figure(records: Sequence[Mapping[str, Any]]) -> str:
    """Validation accuracy, and weighted training error beside the prior error, per round."""
    rounds = of_kind(records, "round", accepted=True)
    numbers = [record["round"] for record in rounds]
    figure = Figure(figsize=(FIGURE_WIDTH, 2.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    validation = [record["validation"] or {} for record in rounds]
    _line(left, numbers, [_in_percent(v.get("expert")) for v in validation], "this round's expert", 0)
    _line(left, numbers, [_in_percent(v.get("ensemble")) for v in validation], "ensemble so far", 1)
    baseline = find(records, "arm", arm="single_expert", split="validation", metric="accuracy")
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
def weights_figure(records: Sequence[Mapping[str, Any]]) -> str:
    """Quantiles of the weights after each round (log scale), and the effective sample size."""
    rounds = of_kind(records, "round", accepted=True)
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
# Differences over many runs


@dataclass(frozen=True)
class ForestRow:
    """One line of a forest plot: differences by split ("id", "ood"), as shares; `pooled` over tasks, or of one."""

    label: str
    pooled: bool
    by_split: Mapping[str, Interval]


@_styled
def forest_figure(rows: Sequence[ForestRow]) -> str:
    """Differences with 95% intervals, ID and OOD side by side: pooled ones large, those of tasks small below them."""
    return _svg(_forest(rows, INK, MUTED), "forest", "Differences between arms with 95% intervals, pooled and by task")


def save_forest_figure(rows: Sequence[ForestRow], path: str | os.PathLike[str]) -> None:
    """Write the figure to a file of its own, atomically: the same rows give the same bytes.

    Raises:
        ValueError: a suffix other than .svg and .png.
    """
    suffix = Path(path).suffix.removeprefix(".")
    if suffix not in FILE_FORMATS:
        raise ValueError(f"cannot draw to {path}: its name must end in .{' or .'.join(FILE_FORMATS)}")
    # Letters as outlines: a file of its own cannot know its reader's fonts. No date and no version, which would change.
    fixed = {"svg.hashsalt": "forest", "svg.fonttype": "path"}
    with matplotlib.rc_context(_figure_style(FILE_INK, FILE_MUTED, FILE_RULE) | fixed), new_file(path) as aside:
        metadata = {"Date": None} if suffix == "svg" else {"Software": None}
        figure = _forest(rows, FILE_INK, FILE_MUTED)
        figure.savefig(aside, format=suffix, dpi=FILE_DPI, facecolor="white", metadata=metadata)


def _forest(rows: Sequence[ForestRow], ink: str, muted: str) -> Figure:
    heights = _forest_heights(rows)
    figure = Figure(figsize=(FIGURE_WIDTH, 0.8 + 0.2 * (heights[-1] + 1)), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, (split, name) in zip(panels, TEST_SPLITS.items(), strict=True):
        axes.axvline(0, color=muted, linewidth=0.9, zorder=0)
        for row, height in zip(rows, heights, strict=True):
            if split in row.by_split:
                _draw_difference(axes, row.by_split[split], height, ink if row.pooled else muted, row.pooled)
        axes.set_title(f"{name}: {'easy' if split == 'id' else 'hard'} test questions")
        axes.set_xlabel("difference in right answers, points")
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0, pad=8)
        axes.spines["left"].set_visible(False)
    panels[0].set_yticks(heights, [row.label for row in rows])
    panels[0].set_ylim(heights[-1] + 0.8, heights[0] - 0.8)
    for row, label in zip(rows, panels[0].get_yticklabels(), strict=True):
        label.set(fontweight="bold" if row.pooled else "normal", fontsize=8.5 if row.pooled else 7.5)
    return figure


def _forest_heights(rows: Sequence[ForestRow]) -> list[float]:
    """Return where each row stands; pooled rows have two lines of text and some room above."""
    heights, height = [], 0.0
    for i, row in enumerate(rows):
        height += 0.0 if i == 0 else 1.9 if row.pooled else 1.45 if rows[i - 1].pooled else 0.85
        heights.append(height)
    return heights


def _draw_difference(axes: Axes, difference: Interval, height: float, colour: str, pooled: bool) -> None:
    value, low, high = (100 * share for share in difference)
    axes.errorbar(
        [value], [height], xerr=[[value - low], [high - value]], fmt="D" if pooled else "o", color=colour,
        markersize=6.5 if pooled else 3.5, elinewidth=2.2 if pooled else 1.0, clip_on=False,
    )  # fmt: skip
    axes.annotate(
        difference_interval(difference), (1.0, height), xycoords=("axes fraction", "data"),
        xytext=(6, 0), textcoords="offset points", va="center", fontsize=7.5, color=colour,
        fontweight="bold" if pooled else "normal",
    )  # fmt: skip
