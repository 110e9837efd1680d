"""One self-contained HTML page from the records of runs and studies.

The page needs nothing but itself: figures are inline SVG whose colours follow the reader's light or dark mode, and
it prints in light colours. The same records always give the same bytes.
"""

from __future__ import annotations

import html
import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ensemw2s.report.arms import arm_name, arm_order, lower_first
from ensemw2s.report.figures import (
    ForestRow,
    arms_figure,
    forest_figure,
    rounds_figure,
    save_forest_figure,
    weights_figure,
)
from ensemw2s.report.pool import Pair, Pool, difference, measured_comparisons, pool_runs, reference_arm
from ensemw2s.report.records import TEST_SPLITS, Run, find, measured_arms, of_kind, read_records, run_keys
from ensemw2s.report.tables import (
    MINUS,
    NOTES,
    Rows,
    ablation,
    accuracies,
    arm_cost_rows,
    by_task,
    comparison_name,
    comparison_rows,
    cost,
    differences,
    extent,
    number,
    percent,
    pgr,
    phase_cost_rows,
    result_rows,
    round_rows,
)
from ensemw2s.runtime.files import new_file, read_json

GUIDE = (
    """<strong>Right</strong> means that the whole answer is exact: at every answer token the most probable
token is the true one. There is no credit for a nearly right answer.""",
    """<strong>ID</strong> questions are as easy as those the experts were trained on; <strong>OOD</strong>
questions are harder. The truth about hard questions was used to score, and to train the ceiling, and for
nothing else.""",
    """<strong>Compare arms by their paired differences</strong>, not by whether whiskers overlap: all arms
answered the same questions. With several comparisons, one in twenty intervals misses the truth by
chance.""",
    """<strong>An ensemble costs as many models as it has experts</strong>, in training and for every answer.
The fair opponents are the uniform average of the same experts and the best of them; beating the single
baseline alone may only show that several models average out their mistakes.""",
    """<strong>PGR</strong> is a ratio, and unstable when the gap is small. It can be negative (the student is
worse than its weak baseline) or above 1.""",
    """<strong>Errors on training answers</strong> decide the weights but say little about new questions; the
validation curve does.""",
)
GUIDE_RUNS = (
    """<strong>Intervals</strong> cover the choice of test questions only. Another training seed would move
every figure by an amount that a single run cannot show. An arm that is right on none of 100 questions
may still be right on up to about 3.7% of such questions, although its standard error reads 0.""",
    """This is one task with one pair of models. It says nothing about other tasks, other sizes, or other gaps
between easy and hard.""",
)
GUIDE_POOLED = (
    """<strong>Intervals</strong> cover the choice of training seeds and of test questions, which are both
resampled within each task. With few seeds they are somewhat too short: S seeds understate the spread
between seeds by about √((S − 1)/S).""",
    """<strong>Tasks are fixed</strong>, not resampled, and all weigh the same: a pooled difference is about
these tasks. It says nothing about other tasks, other sizes, or other gaps between easy and hard.""",
    """<strong>Comparisons that were declared beforehand</strong> come first. The table of every arm against one
reference looks at many arms; some of its intervals will exclude 0 by chance.""",
)

_LIGHT = """--paper:#ffffff; --ink:#1c2126; --muted:#5c6670; --rule:#d9dee3; --band:#f4f6f8; --series-1:#0072b2;
--series-2:#d55e00; --series-3:#00805d; --series-4:#b3588f; --series-5:#a87400; --series-6:#2f86bd;
color-scheme:light;"""
_DARK = """--paper:#14171a; --ink:#e7eaed; --muted:#9ea8b2; --rule:#343b42; --band:#1e2328; --series-1:#5ab4ea;
--series-2:#f58a4b; --series-3:#3fc79f; --series-4:#e2a3c7; --series-5:#e8b64a; --series-6:#93cdf2;
color-scheme:dark;"""


CONFIG_FILE = "config.json"
# The two invariants that a run checks on its own files: expert's error after the update, and the sum of weights.
IDENTITY_TOLERANCE, SUM_TOLERANCE = 1e-12, 1e-9
# The settings in which runs that are pooled may differ.
POOLED_OVER = ("name", "output_dir", "task", "seed", "data", "threads")
# A page on more runs than these leaves out what each did by itself.
MOST_RUNS_IN_DETAIL = 4


def write_report(paths: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]) -> None:
    """Write one HTML page on one or several runs, or on studies, atomically.

    Runs that share arms and settings, and differ in task or seed, are pooled: the page opens with their comparisons.
    Other runs stand side by side.

    Args:
        paths: folders of runs, each with `results.jsonl` and, if it has one, `config.json`; or `.jsonl` files of
            studies.
        path: the page.

    Raises:
        FileNotFoundError: a folder without results, or no such file.
        ValueError: no path, a corrupt record (names file and line), or studies that cannot be pooled.
    """
    runs = _load_runs(paths)
    records = [record for run in runs for record in run.records]
    text = _pooled_page(runs, pool_runs(records)) if _are_pooled(runs) else _page(runs)
    with new_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_forest_plot(paths: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]) -> None:
    """Draw the comparisons of runs or studies, pooled and by task, to an `.svg` or `.png` file, atomically.

    Raises:
        FileNotFoundError: a folder without results, or no such file.
        ValueError: another suffix, a corrupt record, runs that cannot be pooled, or no measured comparison.
    """
    runs = _load_runs(paths)
    if len(runs) > 1 and not _are_pooled(runs):
        raise ValueError(
            f"{', '.join(run.name for run in runs)} cannot be drawn as one: runs that are pooled share arms and "
            "settings, and differ in task or seed; draw them one by one, or set `task` to what their seeds share"
        )
    rows = forest_rows(pool_runs(record for run in runs for record in run.records))
    if not rows:
        raise ValueError("nothing to draw: no run measured both arms of a comparison")
    save_forest_figure(rows, path)


def _load_runs(paths: Sequence[str | os.PathLike[str]]) -> list[Run]:
    if not paths:
        raise ValueError("no path: give at least one folder of a run, or a study's .jsonl file")
    return _with_distinct_names([_load_run(Path(path)) for path in paths], paths)


def _load_run(path: Path) -> Run:
    records = read_records(path)
    config_file = path / CONFIG_FILE
    name = path.resolve().name.removesuffix(".jsonl")
    return Run(name, records, _read_config(config_file) if config_file.exists() else None)


def _read_config(file: Path) -> dict[str, Any]:
    config = read_json(file)
    mappings = (
        (config, *(config.get(key, {}) for key in ("weak", "strong", "boosting"))) if isinstance(config, dict) else ()
    )
    if not mappings or not all(isinstance(part, dict) for part in mappings):
        raise ValueError(
            f"{file} is no configuration of a run: expected an object with the objects weak, strong, boosting"
        )
    return config


def _with_distinct_names(runs: Sequence[Run], paths: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """Name each run by its folder, and by the folder's whole path where names repeat."""
    names = [run.name for run in runs]
    return [
        Run(run.name if names.count(run.name) == 1 else os.fspath(path), run.records, run.config)
        for run, path in zip(runs, paths, strict=True)
    ]


def _are_pooled(runs: Sequence[Run]) -> bool:
    """Say whether the page is on all of them together.

    A study is, and so are runs of several tasks or seeds that have an arm in common and the same settings [choice]: two
    recipes under two names are no two tasks.
    """
    if any(of_kind(run.records, "study") for run in runs):
        return True
    keys = [run_keys(run.records) for run in runs]
    apart = len(set().union(*keys)) == sum(map(len, keys)) > 1
    alike = all(_settings(run) == _settings(runs[0]) for run in runs)
    arms = [{record["arm"] for record in of_kind(run.records, "answers")} for run in runs]
    return apart and alike and bool(set.intersection(*arms))


def _settings(run: Run) -> dict[str, Any]:
    return {key: value for key, value in (run.config or {}).items() if key not in POOLED_OVER}


def _page(runs: Sequence[Run]) -> str:
    title = "EnsemW2S report: " + ", ".join(run.name for run in runs)
    measured = [run for run in runs if measured_arms(run.records)]
    overview = ""
    if len(measured) > 1:
        overview = f"<section><h2>All runs side by side</h2>{_arms_section(measured)}</section>"
    sections = "".join(_run_section(run, alone=len(runs) == 1) for run in runs)
    return document(title, f"{overview}{sections}", reading_guide(pooled=False))


# ----------------------------------------------------------------------------------------------------------------------
# Many runs together


def _pooled_page(loaded: Sequence[Run], pool: Pool) -> str:
    records = [record for run in loaded for record in run.records]
    name = pool.name or ", ".join(run.name for run in loaded)
    parts = [
        _pool_facts(pool),
        _comparisons_section(pool),
        _remarks(pool),
        _accuracies_section(pool),
        _ablation_section(pool),
        _pgr_section(pool),
        _pooled_cost_section(pool),
        _identity_check(records),
    ]
    runs = [single for run in loaded for single in _single_runs(run)]
    details = ""
    if len(runs) <= MOST_RUNS_IN_DETAIL:
        details = "".join(_run_section(run, alone=False) for run in runs)
    body = f"<section>{''.join(parts)}</section>\n{details}"
    return document(f"EnsemW2S report: {name}", body, reading_guide(pooled=True))


def _single_runs(run: Run) -> list[Run]:
    """Return the runs that a study's records are of, each with what names its task and seed."""
    if not of_kind(run.records, "study"):
        return [run]
    keys = sorted(run_keys(run.records))
    return [
        Run(f"{task}, seed {seed}", [r for r in run.records if (r.get("task"), r.get("seed")) == (task, seed)])
        for task, seed in keys
    ]


def _pool_facts(pool: Pool) -> str:
    seeds = {", ".join(map(str, seeds)) for seeds in pool.seeds.values()}
    return definitions([
        ("Tasks", ", ".join(pool.seeds)),
        ("Seeds", seeds.pop() if len(seeds) == 1 else "differ between tasks"),
        ("Measured", extent(pool)),
        ("Primary split", TEST_SPLITS[pool.primary_split]),
    ])  # fmt: skip


def _comparisons_section(pool: Pool) -> str:
    rows = differences(pool)
    if not rows[1]:
        return ""
    title = "Declared comparisons" if pool.declared else "Comparisons"
    caption = "The same differences: pooled over tasks (large), each task by itself (small). Whiskers: 95% intervals."
    table = html_table(rows, NOTES["differences"])
    return f"<h3>{title}</h3>{table}{figure(forest_figure(forest_rows(pool)), caption)}"


def forest_rows(pool: Pool) -> list[ForestRow]:
    """Return the lines of a forest plot: each measured comparison, and below it its tasks if there are several."""
    rows = []
    for pair in measured_comparisons(pool):
        first, _, second = comparison_name(pair).partition(" against ")
        rows.append(_forest_row(pool, pair, f"{first}\nagainst {second}", None))
        rows += [_forest_row(pool, pair, task, task) for task in pool.seeds if len(pool.seeds) > 1]
    return [row for row in rows if row.by_split]


def _forest_row(pool: Pool, pair: Pair, label: str, task: str | None) -> ForestRow:
    found = {split: difference(pool, pair, split, task) for split in TEST_SPLITS}
    return ForestRow(label, task is None, {split: value for split, value in found.items() if value is not None})


def _remarks(pool: Pool) -> str:
    items = "".join(f"<li>{html.escape(remark)}</li>" for remark in pool.remarks)
    return f"<h3>What was left out, and limits</h3><ul>{items}</ul>" if items else ""


def _accuracies_section(pool: Pool) -> str:
    overall = html_table(accuracies(pool), NOTES["accuracies"])
    each = html_table(by_task(pool), "Means over seeds.")
    return f"<h3>Accuracy of every arm</h3>{overall}<h3>Accuracy by task</h3>{each}"


def _ablation_section(pool: Pool) -> str:
    if not pool.comparisons or pool.comparisons[0][0] not in pool.arms:
        return ""
    reference = lower_first(arm_name(reference_arm(pool)))
    table = html_table(ablation(pool), NOTES["ablation"])
    return f"<h3>Every arm minus the {html.escape(reference)}</h3>{table}"


def _pgr_section(pool: Pool) -> str:
    rows = pgr(pool)
    return f"<h3>Performance gap recovered</h3>{html_table(rows, NOTES['pgr'])}" if rows[1] else ""


def _pooled_cost_section(pool: Pool) -> str:
    return f"<h3>Cost</h3>{html_table(cost(pool), NOTES['cost'])}" if pool.costs else ""


# ----------------------------------------------------------------------------------------------------------------------
# One run


def _run_section(run: Run, *, alone: bool) -> str:
    heading = "" if alone else f"<h2>Run {html.escape(run.name)}</h2>"
    parts = [_summary(run), _in_short(run.records)]
    if measured_arms(run.records):
        parts += [_arms_section([run]) if alone else "", _results_section(run.records)]
    if of_kind(run.records, "round"):
        parts.append(_rounds_sections(run.records))
    if of_kind(run.records, "cost") or of_kind(run.records, "phase"):
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
    rounds = of_kind(run.records, "round", accepted=True)
    if len({record.get("arm") for record in rounds}) == 1:
        facts.append(("Experts", f"{len(rounds)} over {rounds[0]['num_units']:,} units"))
    sizes = [f"{record['split']} {record['n']}" for record in of_kind(run.records, "questions")]
    if sizes:
        facts.append(("Questions", ", ".join(sizes)))
    seconds = sum(record["seconds"] for record in of_kind(run.records, "phase"))
    if seconds:
        facts.append(("Time", f"{seconds:,.0f} s"))
    return definitions(facts)


def _model_text(model: Mapping[str, Any] | None) -> str:
    if model is None:
        return ""
    layers = f", layers {model['keep_layers']}" if model.get("keep_layers") else ""
    return f"{model.get('source', '')}{layers}"


def _in_short(records: Sequence[Mapping[str, Any]]) -> str:
    rows = comparison_rows(records)
    if not rows[1]:
        return ""
    note = (
        "Differences in the share of right answers, in percentage points, with 95% paired bootstrap interval over "
        "questions. “Not decided” means that the interval includes 0. Intervals are not corrected for looking at "
        "several comparisons."
    )
    return f"<h3>In short</h3>{html_table(rows, note)}"


def _arms_section(runs: Sequence[Run]) -> str:
    dotted = (
        " The dotted line is the single weak expert; figures at the right are percentages." if len(runs) == 1 else ""
    )
    return "<h3>Accuracy of every arm</h3>" + figure(
        arms_figure(runs),
        f"Share of test questions answered right. Whiskers: 95% interval (Wilson) over questions.{dotted}",
    )


def _results_section(records: Sequence[Mapping[str, Any]]) -> str:
    return "<h3>Results</h3>" + html_table(
        result_rows(records),
        "ID, OOD: right answers ± standard error over questions. PGR: share of the gap from the single weak expert to "
        "the ceiling that a student closes, with 95% interval; undefined where the gap itself is not shown to be above "
        "0. Costs are those of training an arm itself: the ensemble's are the sum over its experts, a student's leave "
        "out its teacher's.",
    )


def _cost_section(records: Sequence[Mapping[str, Any]]) -> str:
    arms = html_table(
        arm_cost_rows(records),
        "Training as above. Answers: all test questions once; the experts are run once for all their mixtures, and one "
        "expert is given its share. FLOPs are counted, padding included: matrix products and attention.",
    )
    phases = html_table(
        phase_cost_rows(records),
        "Of the session that finished the phase. Tokens are those of training and answers, without padding.",
    )
    return f"<h3>Cost</h3>{arms}{phases}"


def _rounds_sections(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the rounds of each boosted ensemble; a run that boosts several names the arm in each record."""
    ensembles = sorted({record.get("arm", "") for record in of_kind(records, "round")}, key=arm_order)
    text = ""
    for arm in ensembles:
        title = f"Boosting rounds: {lower_first(arm_name(arm))}" if arm else "Boosting rounds"
        of_arm = [record for record in records if record["kind"] != "round" or record.get("arm", "") == arm]
        text += f"<h3>{html.escape(title)}</h3>{_rounds_section(of_arm)}"
    return text + _identity_check(records)


def _rounds_section(records: Sequence[Mapping[str, Any]]) -> str:
    figures = ""
    if of_kind(records, "round", accepted=True):
        figures = figure(
            rounds_figure(records),
            "Left: on validation questions, which no expert was trained on. Right: the error that sets the expert's "
            "weight. It is measured on the training answers and is therefore optimistic.",
        ) + figure(
            weights_figure(records),
            "Left: how the weights spread over units (log scale). Right: effective sample size 1/ΣD²; a small one "
            "means that the next expert sees little but a few hard units.",
        )
    table = html_table(
        round_rows(records), "ε and ε₀ are shares of weight. An expert is added only if ε is below ε₀ (α above 0)."
    )
    return figures + table


def _identity_check(records: Sequence[Mapping[str, Any]]) -> str:
    checks = of_kind(records, "identity")
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
    labels = of_kind(records, "labels")
    if not labels:
        return ""
    rows = [
        [arm_name(r["teacher"]), str(r["n"]), percent(r["accuracy"]),
         number(r.get("confidence"), ".3f").replace("-", MINUS), percent(r.get("agreement"))]
        for r in labels
    ]  # fmt: skip
    headers = [
        "Teacher",
        "Hard questions",
        "Answered right",
        "Mean log-probability per token, nats",
        "Experts' agreement",
    ]
    return "<h3>Pseudo-answers the students learned from</h3>" + html_table(
        (headers, rows),
        "The share that is right is known here only because the test bed has the truth; no student saw it.",
    )


def _configuration_section(run: Run) -> str:
    text = ""
    if run.config is not None:
        dumped = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True)
        text += f"<h3>Configuration</h3><pre>{html.escape(dumped)}</pre>"
    environment = find(run.records, "environment")
    if environment is not None:
        facts = {key: value for key, value in environment.items() if key != "kind"}
        text += f"<h3>Environment</h3>{definitions(_flatten(facts))}"
    phases = of_kind(run.records, "phase")
    if phases:
        rows = [[record["phase"], f"{record['seconds']:,.1f}"] for record in phases]
        text += "<h3>Time by phase</h3>" + html_table((["Phase", "Seconds"], rows), "Wall clock.")
    return text


def _flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    for key, item in value.items():
        facts += _flatten(item, f"{prefix}{key}.") if isinstance(item, Mapping) else [(f"{prefix}{key}", str(item))]
    return facts


def document(title: str, body: str, guide: str) -> str:
    """Return a whole page that needs nothing but itself, with `guide` as its last section."""
    return _with_unique_ids(
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{html.escape(title)}</h1>\n"
        f"{body}<section>{guide}</section>\n</main>\n</body>\n</html>\n"
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


def definitions(facts: Iterable[tuple[str, str]]) -> str:
    """Return (name, value) facts as a list of definitions; those without a value are left out."""
    items = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts if value
    )
    return f"<dl>{items}</dl>" if items else ""


def figure(svg: str, caption: str) -> str:
    """Return an inline figure with its caption."""
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def html_table(content: Rows, note: str) -> str:
    """Return a table with a note for its reader; cells are escaped."""
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


def reading_guide(*, pooled: bool) -> str:
    """Return what a reader should know about the figures: of single runs, or `pooled` over tasks and seeds."""
    points = [*GUIDE, *(GUIDE_POOLED if pooled else GUIDE_RUNS)]
    items = "\n".join(f"<li>{point}</li>" for point in points)
    return f"<h2>What these figures show, and what they do not</h2>\n<ul>\n{items}\n</ul>"


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
th:first-child {{ text-align:left; padding-left:0; }}
tbody th {{ font-weight:500; white-space:normal; min-width:8rem; }}
thead th {{ white-space:normal; color:var(--muted); font-weight:600; vertical-align:bottom;
border-bottom:2px solid var(--rule); }}
pre {{ background:var(--band); padding:.75rem 1rem; border-radius:6px; font-size:.82rem; white-space:pre-wrap; }}
.check {{ background:var(--band); padding:.6rem .9rem; border-radius:6px; font-size:.9rem; }}
ul {{ padding-left:1.2rem; }} li {{ margin:.3rem 0; max-width:50rem; }}
@media print {{ main {{ max-width:none; padding:0; }} figure, tr, .check {{ break-inside:avoid; }}
h2, h3 {{ break-after:avoid; }}
body {{ font-size:10.5pt; }} .wide {{ overflow:visible; }} }}
"""
