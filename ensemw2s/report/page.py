"""One self-contained HTML page from the records of runs and studies.

The page needs nothing but itself: figures are inline SVG whose colours follow the reader's light or dark mode, and
it prints in light colours. The same records always give the same bytes.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from ensemw2s.report import figures, tables
from ensemw2s.report.arms import BASELINE, arm_name, arm_order, lower_first, measured_arms
from ensemw2s.report.figures import ForestRow
from ensemw2s.report.findings import (
    QUESTIONS,
    boosting_weights,
    headline,
    levels_outside,
    mixture_sentences,
    mixtures_of_runs,
    opposite_moves,
    other_comparisons,
    share_text,
    shares_of,
)
from ensemw2s.report.pool import Pool, pool_runs
from ensemw2s.report.runs import flatten, load_runs
from ensemw2s.runtime.files import SIGNATURE, new_page
from ensemw2s.runtime.records import (
    TEST_SPLITS,
    AnswersRecord,
    ArmRecord,
    BestExpertRecord,
    IdentityRecord,
    MixtureRecord,
    PhaseRecord,
    QuestionsRecord,
    Record,
    RoundRecord,
    Run,
    RunRecord,
    SampleRecord,
    StudyRecord,
    of_kind,
    run_keys,
)

# The two invariants that a run checks on its own files: expert's error after the update, and the sum of weights.
IDENTITY_TOLERANCE, SUM_TOLERANCE = 1e-12, 1e-9
# The settings in which runs that are pooled may differ.
POOLED_OVER = ("name", "output_dir", "task", "seed", "data", "threads")
# A page on more runs than these leaves out what each did by itself.
MOST_RUNS_IN_DETAIL = 4


def write_report(paths: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]) -> None:
    """Write one HTML page on one or several runs, or on studies, atomically.

    Runs that share arms and settings, and differ in task or seed, are pooled: the page opens with what they say
    together. Other runs stand side by side. `paths` are folders of runs, each with `results.jsonl` and, if it has one,
    `config.json`, or `.jsonl` files of studies; `path` is the page.

    Raises:
        FileNotFoundError: a folder without results, or no such file.
        ValueError: no path, a corrupt record (names file and line), runs that cannot be pooled, or a page at `path`
            that is not ours.
    """
    runs = load_runs(paths)
    if pooled := _are_pooled(runs):
        alone = [single for run in runs for single in _single_runs(run)]
        parts = [Part([record for run in runs for record in run.records])]
        parts += [Part(run.records, run, f"Run {run.name}") for run in alone if len(alone) <= MOST_RUNS_IN_DETAIL]
    else:
        parts = [Part(run.records, run, f"Run {run.name}" if len(runs) > 1 else "") for run in runs]
    measured = [run for run in runs if measured_arms(run.records)]
    title = (parts[0].pool.name if pooled and parts[0].pool else "") or ", ".join(run.name for run in runs)
    text = _rendered(
        title=title,
        side_by_side=measured if len(measured) > 1 and not pooled else [],
        pooled=pooled,
        parts=parts,
    )
    with new_page(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_forest_plot(paths: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]) -> None:
    """Draw the comparisons of runs or studies, pooled and by task, to an `.svg` or `.png` file, atomically.

    Raises:
        FileNotFoundError: a folder without results, or no such file.
        ValueError: another suffix, a corrupt record, runs that cannot be pooled, or no measured comparison.
    """
    runs = load_runs(paths)
    if len(runs) > 1 and not _are_pooled(runs):
        raise ValueError(
            f"{', '.join(run.name for run in runs)} cannot be drawn as one: runs that are pooled share arms and "
            "settings, and differ in task or seed; draw them one by one, or set `task` to what their seeds share"
        )
    rows = forest_rows(pool_runs(record for run in runs for record in run.records))
    if not rows:
        raise ValueError("nothing to draw: no run measured both arms of a comparison")
    figures.save_forest_figure(rows, path)


def forest_rows(pool: Pool) -> list[ForestRow]:
    """Return the lines of a forest plot: each measured comparison, and below it its tasks if there are several."""
    rows = []
    for pair in pool.measured_comparisons():
        first, _, second = tables.comparison_name(pair).partition(" against ")
        labels: dict[str | None, str] = {None: f"{first}\nagainst {second}"}
        labels |= {task: task for task in pool.seeds if len(pool.seeds) > 1}
        for task, label in labels.items():
            found = {split: pool.difference(pair, split, task) for split in TEST_SPLITS}
            measured = {split: value for split, value in found.items() if value is not None}
            rows.append(ForestRow(label, task is None, measured))
    return [row for row in rows if row.by_split]


def _are_pooled(runs: Sequence[Run]) -> bool:
    """Say whether the page is on all of them together.

    A study is, and so are runs of several tasks or seeds that have an arm in common and the same settings [choice]: two
    recipes under two names are no two tasks.
    """
    if any(of_kind(run.records, StudyRecord) for run in runs):
        return True
    keys = [run_keys(run.records) for run in runs]
    apart = len(set().union(*keys)) == sum(map(len, keys)) > 1
    configs = [run.config or {} for run in runs]
    settings = [{key: value for key, value in config.items() if key not in POOLED_OVER} for config in configs]
    alike = all(own == settings[0] for own in settings)
    arms = [{record.arm for record in of_kind(run.records, AnswersRecord)} for run in runs]
    return apart and alike and bool(set.intersection(*arms))


def _single_runs(run: Run) -> list[Run]:
    """Return the runs that a study's records are of, each with what names its task and seed."""
    if not of_kind(run.records, StudyRecord):
        return [run]
    return [
        Run(f"{task}, seed {seed}", of_kind(run.records, RunRecord, task=task, seed=seed))
        for task, seed in sorted(run_keys(run.records))
    ]


@dataclass(frozen=True)
class Part:
    """What a page shows of `run` alone, or of the records of several that are pooled (None)."""

    records: Sequence[Record]
    run: Run | None = None
    heading: str = ""

    @functools.cached_property
    def pool(self) -> Pool | None:
        """Return what the answers to test questions say, if there are any yet."""
        answers = of_kind(self.records, AnswersRecord)
        return pool_runs(self.records) if any(record.split in TEST_SPLITS for record in answers) else None

    @property
    def level(self) -> int:
        """Return the level of the headings within the part."""
        return 3 if self.heading else 2

    @property
    def findings(self) -> list[str]:
        """Return sentences: what was found first, then what else a reader has to know."""
        said = [headline(self.pool)]
        if self.pool is not None:
            said += [other_comparisons(self.pool), levels_outside(self.pool), *opposite_moves(self.pool)]
        # What one run's ensemble is made of is said beside its experts.
        said += [] if self.run else [mixtures_of_runs(self.records)]
        return [sentence for sentence in said if sentence]

    @property
    def ensembles(self) -> list[dict[str, Any]]:
        """Return sentences and a table for each ensemble of one run that has several experts."""
        if self.run is None:
            return []
        rounds, found = of_kind(self.run.records, RoundRecord), of_kind(self.run.records, MixtureRecord)
        several = [mixture for mixture in found if len(mixture.expert_weights) > 1]
        return [
            {
                "sentences": mixture_sentences(mixture, rounds),
                "rows": tables.experts(
                    shares_of(mixture.expert_weights),
                    boosting_weights(mixture, rounds),
                    self.run.records,
                    mixture.arm,
                ),
            }
            for mixture in sorted(several, key=lambda mixture: arm_order(mixture.arm))
        ]

    @property
    def samples(self) -> list[tuple[str, list[SampleRecord]]]:
        """Return the answers of one run that are shown token by token, by the kind of their questions."""
        found = of_kind(self.run.records, SampleRecord) if self.run else []
        by_split = [(split, [record for record in found if record.split == split]) for split in TEST_SPLITS]
        return [(QUESTIONS[split].capitalize(), records) for split, records in by_split if records]

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Return names and values; a value may be empty."""
        facts = _run_facts(self.run) if self.run else []
        if self.pool is None:
            return facts
        seeds = {", ".join(map(str, seeds)) for seeds in self.pool.seeds.values()}
        return [
            *facts,
            ("Tasks", ", ".join(self.pool.seeds)),
            ("Seeds", seeds.pop() if len(seeds) == 1 else "differ between tasks"),
            ("Measured", tables.extent(self.pool)),
            ("Primary split", TEST_SPLITS[self.pool.primary_split]),
        ]

    @property
    def level_rule(self) -> str:
        """Return what the levels of questions are; "" where there are none."""
        rules = self.pool.level_rules if self.pool else {}
        if len(set(rules.values())) <= 1:
            return "".join(f"A question’s level: {rule}." for rule in set(rules.values()))
        return "A question’s level: " + "; ".join(f"{rule} ({task})" for task, rule in rules.items()) + "."

    @property
    def rounds(self) -> list[tuple[str, list[RoundRecord]]]:
        """Return the rounds of each boosted ensemble of one run, which names its arm if it boosts several."""
        rounds = of_kind(self.run.records, RoundRecord) if self.run else []
        arms = sorted({record.arm for record in rounds}, key=arm_order)
        return [(arm, [record for record in rounds if record.arm == arm]) for arm in arms]

    @property
    def baseline(self) -> float | None:
        """Return the single expert's accuracy on validation questions."""
        found = of_kind(self.records, ArmRecord, arm=BASELINE, split="validation", metric="accuracy")
        return found[0].value if found else None

    @property
    def check(self) -> dict[str, Any] | None:
        """Return how far the saved files are from the invariants, and whether that is near enough."""
        checks = of_kind(self.records, IdentityRecord)
        if not checks:
            return None
        gaps = [record.identity_gap for record in checks if record.identity_gap is not None]
        gap, sum_gap = max(gaps, default=0.0), max(record.sum_gap for record in checks)
        holds = gap <= IDENTITY_TOLERANCE and sum_gap <= SUM_TOLERANCE
        return {"holds": holds, "rounds": len(gaps), "identity_gap": gap, "sum_gap": sum_gap}


def _run_facts(run: Run) -> list[tuple[str, str]]:
    config = run.config or {}
    boosting = {"recipe": "default"} | (config.get("boosting") or {})
    facts = [("Weak model", _model_text(config.get("weak"))), ("Strong model", _model_text(config.get("strong")))]
    facts += [("Recipe", str(boosting["recipe"]))] if run.config else []
    rounds = of_kind(run.records, RoundRecord, accepted=True)
    if len({record.arm for record in rounds}) == 1:
        facts.append(("Experts", f"{len(rounds)} over {rounds[0].num_units:,} units"))
    seconds = sum(record.seconds for record in of_kind(run.records, PhaseRecord))
    return [
        *facts,
        ("Best expert", ", ".join(arm_name(record.arm) for record in of_kind(run.records, BestExpertRecord))),
        ("Questions", ", ".join(f"{record.split} {record.n}" for record in of_kind(run.records, QuestionsRecord))),
        ("Time", f"{seconds:,.0f} s" if seconds else ""),
    ]


def _model_text(model: Mapping[str, Any] | None) -> str:
    layers = f", layers {model['keep_layers']}" if model and model.get("keep_layers") else ""
    return f"{model.get('source', '')}{layers}" if model else ""


def _rendered(**values: Any) -> str:
    pages = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    known = (tables, figures, forest_rows, arm_name, lower_first, measured_arms, share_text, vars)
    pages.globals |= {thing.__name__.rpartition(".")[2]: thing for thing in known}
    pages.globals |= {"flatten": flatten, "tolerances": (IDENTITY_TOLERANCE, SUM_TOLERANCE), "signature": SIGNATURE}
    pages.filters["yaml"] = lambda config: yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    pages.filters |= {"unbroken": _unbroken, "visible": _visible}
    return _with_unique_ids(pages.get_template("page.html").render(**values))


def _unbroken(cell: str) -> Markup:
    """Return a cell that breaks, where it is narrow, between a figure, its interval and a verdict only."""
    found = re.fullmatch(r"(\S+) (\([^()]*\):?)(?: (.*))?", cell)
    if found is None:
        return escape(cell)
    value, interval, verdict = (escape(part or "") for part in found.groups())
    said = Markup(' <span class="verdict">{}</span>').format(verdict) if verdict else ""
    return Markup("<span>{}</span> <span>{}</span>{}").format(value, interval, said)


def _visible(text: str, spaces: bool = True) -> str:
    """Return a text with what cannot be seen spelt out: spaces (if wanted), new lines, and control characters."""
    signs = {" ": "␣" if spaces else " ", "\n": "⏎" if spaces else "\n", "\t": "⇥" if spaces else "\t"}
    return "".join(signs.get(c, c if c.isprintable() else ascii(c)[1:-1]) for c in text)


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
