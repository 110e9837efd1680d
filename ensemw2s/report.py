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

from ensemw2s.figures import arms_figure, rounds_figure, weights_figure
from ensemw2s.files import new_file, read_json
from ensemw2s.records import Run, arm_name, find, measured_arms, of_kind, read_records
from ensemw2s.tables import (
    MINUS,
    Rows,
    arm_cost_rows,
    comparison_rows,
    number,
    percent,
    phase_cost_rows,
    result_rows,
    round_rows,
)

CONFIG_FILE = "config.json"
# The two invariants that a run checks on its own files: expert's error after the update, and the sum of weights.
IDENTITY_TOLERANCE, SUM_TOLERANCE = 1e-12, 1e-9


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
    measured = [run for run in runs if measured_arms(run.records)]
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
    if measured_arms(run.records):
        parts += [_arms_section([run]) if alone else "", _results_section(run.records)]
    if of_kind(run.records, "round"):
        parts.append(_rounds_section(run.records))
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
    if rounds:
        facts.append(("Experts", f"{len(rounds)} over {rounds[0]['num_units']:,} units"))
    sizes = [f"{record['split']} {record['n']}" for record in of_kind(run.records, "questions")]
    if sizes:
        facts.append(("Questions", ", ".join(sizes)))
    seconds = sum(record["seconds"] for record in of_kind(run.records, "phase"))
    if seconds:
        facts.append(("Time", f"{seconds:,.0f} s"))
    return _definitions(facts)


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
    return f"<h3>In short</h3>{_html_table(rows, note)}"


def _arms_section(runs: Sequence[Run]) -> str:
    dotted = (
        " The dotted line is the single weak expert; figures at the right are percentages." if len(runs) == 1 else ""
    )
    return "<h3>Accuracy of every arm</h3>" + _figure(
        arms_figure(runs),
        f"Share of test questions answered right. Whiskers: 95% interval (Wilson) over questions.{dotted}",
    )


def _results_section(records: Sequence[Mapping[str, Any]]) -> str:
    return "<h3>Results</h3>" + _html_table(
        result_rows(records),
        "ID, OOD: right answers ± standard error over questions. PGR: share of the gap from the single weak expert to "
        "the ceiling that a student closes, with 95% interval; undefined where the gap itself is not shown to be above "
        "0. Costs are those of training an arm itself: the ensemble's are the sum over its experts, a student's leave "
        "out its teacher's.",
    )


def _cost_section(records: Sequence[Mapping[str, Any]]) -> str:
    arms = _html_table(
        arm_cost_rows(records),
        "Training as above. Answers: all test questions once; the experts are run once for all their mixtures, and one "
        "expert is given its share. FLOPs are counted, padding included: matrix products and attention.",
    )
    phases = _html_table(
        phase_cost_rows(records),
        "Of the session that finished the phase. Tokens are those of training and answers, without padding.",
    )
    return f"<h3>Cost</h3>{arms}{phases}"


def _rounds_section(records: Sequence[Mapping[str, Any]]) -> str:
    figures = ""
    if of_kind(records, "round", accepted=True):
        figures = _figure(
            rounds_figure(records),
            "Left: on validation questions, which no expert was trained on. Right: the error that sets the expert's "
            "weight. It is measured on the training answers and is therefore optimistic.",
        ) + _figure(
            weights_figure(records),
            "Left: how the weights spread over units (log scale). Right: effective sample size 1/ΣD²; a small one "
            "means that the next expert sees little but a few hard units.",
        )
    table = _html_table(
        round_rows(records), "ε and ε₀ are shares of weight. An expert is added only if ε is below ε₀ (α above 0)."
    )
    return f"<h3>Boosting rounds</h3>{figures}{table}{_identity_check(records)}"


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
    return "<h3>Pseudo-answers the students learned from</h3>" + _html_table(
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
        text += f"<h3>Environment</h3>{_definitions(_flatten(facts))}"
    phases = of_kind(run.records, "phase")
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
