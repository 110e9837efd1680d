"""Reports: what is read, what is shown, and that a page stands alone."""

import io
import json
import re
import subprocess
import sys
from hashlib import blake2b
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from rich.console import Console

from ensemw2s.boosting import algorithm
from ensemw2s.report.arms import arm_name, arm_order
from ensemw2s.report.page import write_forest_plot, write_report
from ensemw2s.report.statistics import accuracy, pooled_difference, pooled_gap_recovered
from ensemw2s.report.tables import differences, results_table, rounds
from ensemw2s.runtime.files import write_json, write_json_lines
from ensemw2s.runtime.records import (
    POOLED_KINDS,
    answers_array,
    answers_text,
    parse_records,
    questions_digest,
    read_records,
)
from tests.many_runs import COMPARISONS, EASE, answer_records, pool_of, study_records, with_levels

N_QUESTIONS = 100
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
SKILL = {
    "zero_shot_weak": (0.0, 0.0), "zero_shot_strong": (0.02, 0.0), "single_expert": (0.5, 0.15),
    "expert_1": (0.48, 0.14), "expert_2": (0.44, 0.12), "expert_3": (0.4, 0.13), "uniform_average": (0.55, 0.18),
    "ensemble": (0.56, 0.19), "student_single": (0.6, 0.2), "student_ensemble": (0.66, 0.27), "ceiling": (0.9, 0.92),
}  # fmt: skip


def make_records(seed: int = 0) -> list[dict]:
    """Records as an experiment leaves them: three rounds on simulated experts, arms on simulated questions."""
    generator = np.random.default_rng(seed)
    records = [
        *({"kind": "questions", "split": s, "n": n} for s, n in (("train", 200), ("test_id", 100), ("test_ood", 100))),
        *round_records(generator),
        {"kind": "cost", "arm": "ensemble", "train_seconds": 183.25, "train_tokens": 16200, "train_flops": 3.21e13},
        *(
            {"kind": "labels", "teacher": teacher, "accuracy": right, "n": 200, "confidence": -0.41, "agreement": 0.83,
             "seconds": 31.0}
            for teacher, right in (("single_expert", 0.16), ("ensemble", 0.2))
        ),
        *arm_records(generator),
        {"kind": "cost", "arm": "single_expert", "train_seconds": 60.5, "train_tokens": 5400, "train_flops": 1.07e13},
        {"kind": "cost", "arm": "ceiling", "train_seconds": 91.0, "train_tokens": 6400, "train_flops": 1.9e13},
        {"kind": "phase", "phase": "boost", "seconds": 250.0},
        {"kind": "phase", "phase": "student", "seconds": 270.0},
        {"kind": "environment", "versions": {"torch": "2.13.0"}, "backends": {"mixture_sample": "cpp"}},
    ]  # fmt: skip
    return in_run(records, "demo", 0)


def in_run(records: list[dict], task: str, seed: int) -> list[dict]:
    """The records with their task and seed, where they have them."""
    return [record | ({"task": task, "seed": seed} if record["kind"] in POOLED_KINDS else {}) for record in records]


def round_records(generator: np.random.Generator) -> list[dict]:
    units, prior = 2000, 0.78
    weights = algorithm.initial_weights(units)
    hardness = generator.random(units)
    records = []
    for number in (1, 2, 3):
        wrong = hardness + 0.25 * generator.random(units) > 1.0
        error = algorithm.weighted_error(weights, wrong)
        expert_weight = algorithm.expert_weight(error, prior)
        weights = algorithm.update_weights(weights, wrong, expert_weight, 0.3)
        levels = np.quantile(weights * units, QUANTILES)
        records.append({
            "kind": "round", "round": number, "attempt": 1, "error": error, "prior_error": prior,
            "expert_weight": expert_weight, "clamped": False, "accepted": True, "shrinkage": 0.3, "num_processes": 1,
            "train_seconds": 60.0, "train_tokens": 5400, "train_flops": 1.07e13,
            "effective_sample_size": algorithm.effective_sample_size(weights), "num_units": units,
            "validation": {"expert": 0.5 - 0.03 * number, "ensemble": 0.46 + 0.03 * number, "token_error": 0.2},
            "weight_quantiles": {str(q): float(v) for q, v in zip(QUANTILES, levels, strict=True)}, "seconds": 61.1,
        })  # fmt: skip
    return records + [
        {"kind": "identity", "round": number, "identity_gap": 2.2e-16, "sum_gap": 1.1e-16} for number in (1, 2, 3)
    ]


def arm_records(generator: np.random.Generator) -> list[dict]:
    records, answers = [], {}
    for column, split in enumerate(("id", "ood")):
        hardness = generator.random(N_QUESTIONS)
        for arm, skill in SKILL.items():
            correct = hardness + 0.3 * (generator.random(N_QUESTIONS) - 0.5) < skill[column]
            answers[arm, split] = correct.astype(int)
            records.append(arm_record(arm, split, correct))
            questions = questions_digest(f"{split}-{i}" for i in range(N_QUESTIONS))
            records.append({
                "kind": "answers", "arm": arm, "split": split, "correct": answers_text(correct), "questions": questions,
            })  # fmt: skip
            if split == "id":
                records.append(arm_record(arm, "validation", generator.random(50) < skill[0]))
        for arm in ("student_single", "student_ensemble"):
            arms = ({"demo": answers[name, split]} for name in ("single_expert", arm, "ceiling"))
            recovered = pooled_gap_recovered(*arms)
            fields = {name: getattr(recovered, name) for name in ("value", "low", "high", "defined")}
            records.append({"kind": "pgr", "arm": arm, "split": split, **fields})
    return records


def measured(arm: str) -> list[dict]:
    """An arm's records of two test questions."""
    return answer_records(np.array([0, 1]), questions_digest("ab"), task="demo", seed=0, arm=arm, split="id")


def arm_record(arm: str, split: str, correct: np.ndarray) -> dict:
    value, standard_error = accuracy(correct)
    return {"kind": "arm", "arm": arm, "split": split, "metric": "accuracy", "value": value,
            "standard_error": standard_error, "n": correct.size}  # fmt: skip


CONFIG = {
    "name": "demo", "seed": 7, "weak": {"source": "scratch:char-weak", "keep_layers": "0-3"},
    "strong": {"source": "scratch:char-strong"}, "boosting": {"recipe": "stabilised", "num_rounds": 3},
}  # fmt: skip


def make_run(folder: Path, records: list[dict]) -> Path:
    write_json_lines(folder / "results.jsonl", records)
    write_json(folder / "config.json", CONFIG | {"name": folder.name})
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "demo", make_records())


def page_of(folders, tmp_path) -> str:
    write_report(folders, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def cells(table) -> dict[str, list[str]]:
    """The columns of a rich table by their header."""
    return {column.header: list(column.cells) for column in table.columns}


def change(records: list[dict], kind: str, **fields) -> list[dict]:
    """The records with `fields` set in all of a kind."""
    return [record | fields if record["kind"] == kind else record for record in records]


class Page(HTMLParser):
    """Collects what a page refers to, its ids, its text, and tags that were never closed."""

    VOID = ("meta", "br", "link", "img", "hr", "path", "use", "rect")

    def __init__(self, text: str):
        super().__init__()
        self.references, self.ids, self.words, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        values = dict(attrs)
        self.references += [values[name] for name in ("src", "href", "xlink:href", "action") if name in values]
        self.references += re.findall(r"url\(([^)]*)\)", " ".join(v or "" for v in values.values()))
        self.ids += [values["id"]] if "id" in values else []

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


# Records


def test_records_come_back_as_they_were_written(run):
    assert [record.to_json() for record in read_records(run)] == make_records()


def test_kinds_and_fields_that_are_not_declared_pass_unread(tmp_path):
    records = make_records()
    more = [*(record | {"colour": "green"} for record in records), {"kind": "round_summary", "round": "one"}]
    assert read_records(make_run(tmp_path, more)) == parse_records(records)


def test_a_folder_without_results_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"results\.jsonl does not exist: give the folder of a run"):
        read_records(tmp_path)


def test_a_file_that_holds_no_records_is_refused_before_it_is_read(tmp_path):
    (tmp_path / "report.html").write_text("<html>")
    with pytest.raises(ValueError, match=r"report\.html is no file of records: give the folder of a run"):
        read_records(tmp_path / "report.html")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind": "arm", "arm"', "line 3 is not valid JSON"),
        ("", "line 3 is not valid JSON"),
        ("[1, 2]", 'line 3: expected a JSON object with a text field "kind"'),
        ('{"arm": "ensemble"}', "line 3: expected a JSON object"),
        ('{"kind": "arm", "arm": "x", "split": "id", "metric": "accuracy"}', "lacks value, standard_error, n"),
        (
            '{"kind": "phase", "phase": "boost", "seconds": NaN}',
            "line 3 holds a number that cannot be read: NaN is no JSON",
        ),
        ('{"kind": "cost", "arm": "ceiling", "task": "demo", "seed": 0}', "line 3: gives the same figure as line 1"),
        ('{"kind": "cost", "arm": "ceiling"}', "line 3: a record of kind 'cost' lacks task, seed"),
        ("\xff", "line 3 is not UTF-8 text ('utf-8' codec can't decode"),
    ],
)
def test_a_corrupt_record_is_named_by_file_and_line(tmp_path, line, message):
    file = tmp_path / "results.jsonl"
    file.write_text(
        "".join(
            json.dumps(record) + "\n"
            for record in in_run(
                [{"kind": "cost", "arm": "ceiling"}, round_records(np.random.default_rng(0))[0]], "demo", 0
            )
        )
        + f"{line}\n",
        encoding="latin-1",
    )
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_records(tmp_path)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "field", "value", "form"),
    [
        ("round", "error", "0.1", "a number from 0 to 1, got"), ("round", "accepted", 1, "true or false"),
        ("round", "num_units", 0, "a whole number above 0"), ("round", "attempt", 1.5, "a whole number above 0"),
        ("round", "weight_quantiles", {"0.5": 1.0}, "an object of numbers by level (0.01, 0.25, 0.5, 0.75, 0.99, 1.0)"),
        ("round", "validation", {"expert": 0.5}, "null or an object with shares expert and ensemble"),
        ("arm", "value", 45.0, "a number from 0 to 1"), ("arm", "standard_error", None, "a number"),
        ("arm", "arm", ["ensemble"], "text of at most 200"), ("answers", "correct", "012", 'text of "0" and "1"'),
        ("answers", "correct", [0, 1], 'text of "0" and "1"'), ("answers", "questions", "xyz", "16 hex digits"),
        ("answers", "seed", -1, "a whole number, 0 or above"), ("round", "task", 7, "text of at most 200"),
        ("cost", "train_flops", True, "a number or null"),
        ("labels", "agreement", 2, "a number from 0 to 1 or null"), ("phase", "seconds", "long", "a number"),
        ("identity", "sum_gap", None, "a number"),
    ],
)  # fmt: skip
def test_a_field_of_another_form_is_named_by_file_and_line(tmp_path, kind, field, value, form):
    records = make_records()
    position = next(i for i, record in enumerate(records) if record["kind"] == kind)
    records[position][field] = value
    run = make_run(tmp_path, records)
    message = f"results.jsonl, line {position + 1}: {field} of a record of kind {kind!r} must be {form}"
    with pytest.raises(ValueError, match=re.escape(message)):
        read_records(run)


def test_a_number_too_large_to_read_is_refused(run):
    file = run / "results.jsonl"
    file.write_text(file.read_text().replace('"seconds": 250.0', '"seconds": 1e999'))
    with pytest.raises(ValueError, match="holds a number that cannot be read: 1e999 is beyond the largest float"):
        read_records(run)


def test_a_defined_pgr_has_its_numbers(tmp_path):
    with pytest.raises(ValueError, match="a defined pgr needs numbers for value, low and high"):
        read_records(make_run(tmp_path, change(make_records(), "pgr", low=None)))


def test_answers_and_their_questions_as_text():
    correct = np.random.default_rng(0).random(50) < 0.5
    text = answers_text(correct.astype(int))
    assert set(text) == {"0", "1"}
    np.testing.assert_array_equal(answers_array(text), correct)
    ids = ["a", "b,c", "é"]
    expected = blake2b(b'["a", "b,c", "\\u00e9"]', digest_size=8).hexdigest()
    assert questions_digest(ids) == expected
    assert len({questions_digest(x) for x in (ids, ids[::-1], ["a", "b", "c", "é"], ['a", "b'])}) == 4


@pytest.mark.parametrize(
    ("arm", "name"),
    [
        ("deep_ensemble", "Deep ensemble"), ("no_shrinkage", "No shrinkage"), ("expert_12", "Expert 12"),
        ("paper.expert_2", "Recipe as published: expert 2"), ("no_mix.majority_vote", "No mix: majority vote"),
    ],
)  # fmt: skip
def test_arms_have_names_for_readers(arm, name):
    assert arm_name(arm) == name


def test_arms_stand_in_the_order_of_tables():
    arms = [
        "single_expert", "expert_2", "expert_10", "best_expert", "paper", "paper.expert_1", "paper.majority_vote",
        "ensemble", "student_ensemble", "ceiling", "a_new_arm", "a_new_arm.uniform_average", "b",
    ]  # fmt: skip
    shuffled = np.random.default_rng(0).permutation(arms).tolist()
    assert sorted(shuffled, key=arm_order) == arms


def test_a_study_is_read_from_its_file_and_checked(tmp_path):
    records = study_records(seeds=1, n=10)
    write_json_lines(tmp_path / "pair.jsonl", records)
    assert read_records(tmp_path / "pair.jsonl") == parse_records(records)
    for field, value, form in (
        ("primary_split", "validation", "one of id, ood"), ("comparisons", [["a"]], "a list of pairs of arms"),
    ):  # fmt: skip
        write_json_lines(tmp_path / "bad.jsonl", change(records, "study", **{field: value}))
        with pytest.raises(ValueError, match=f"{field} of a record of kind 'study' must be {form}"):
            read_records(tmp_path / "bad.jsonl")
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl does not exist: .* or a study's \.jsonl file"):
        read_records(tmp_path / "gone.jsonl")


def test_a_line_separator_inside_a_name_ends_no_line(tmp_path):
    records = in_run(make_records(), "a\u2028b\x85c", 0)
    assert read_records(make_run(tmp_path, records)) == parse_records(records)


def test_a_run_that_measured_nothing_yet_is_refused(tmp_path):
    make_run(tmp_path, [{"kind": "phase", "phase": "data", "seconds": 1.0}])
    with pytest.raises(ValueError, match="neither rounds nor measured arms: run boost or evaluate first"):
        read_records(tmp_path)


# Tables


def test_results_table_lists_arms_in_order_with_their_figures():
    records = make_records()
    table = cells(results_table(parse_records(reversed(records))))
    names = table["Arm"]
    assert names == [
        "Weak model, zero-shot", "Strong model, zero-shot", "Single weak expert", "Expert 1", "Expert 2",
        "Expert 3", "Uniform average", "Ensemble", "Student of single expert",
        "Student of ensemble", "Ceiling: taught by truth",
    ]  # fmt: skip
    ensemble = names.index("Ensemble")
    record = next(r for r in records if (r["kind"], r.get("arm"), r.get("split")) == ("arm", "ensemble", "ood"))
    assert table["OOD, %"][ensemble] == f"{100 * record['value']:.1f} ± {100 * record['standard_error']:.1f}"
    assert table["Train s"][ensemble] == "183"
    assert table["Train s"][names.index("Single weak expert")] == "60.5"
    assert table["Train TFLOP"][ensemble] == "32.1"
    student = names.index("Student of ensemble")
    pgr = next(r for r in records if (r["kind"], r.get("arm"), r.get("split")) == ("pgr", "student_ensemble", "id"))
    assert table["PGR ID"][student] == f"{pgr['value']:.2f} ({pgr['low']:.2f} to {pgr['high']:.2f})"
    assert table["PGR ID"][ensemble] == ""


@pytest.mark.parametrize(("flops", "shown"), [(3.456e9, "0.00346"), (1e12, "1"), (9.996e13, "100"), (1.2e16, "12,000")])
def test_costs_can_be_read_at_any_size(flops, shown):
    cost = {"kind": "cost", "arm": "ensemble", "train_flops": flops, "task": "demo", "seed": 0}
    table = cells(results_table(parse_records([*measured("ensemble"), cost])))
    assert table["Train TFLOP"] == [shown]


def test_the_page_shows_what_arms_and_phases_cost(tmp_path):
    records = [
        *measured("ensemble"), *measured("ceiling"),
        {"kind": "cost", "arm": "ensemble", "train_tokens": 16200, "inference_seconds": 12.5,
         "inference_flops": 7.5e12},
        {"kind": "phase", "phase": "boost", "seconds": 250.0, "tokens": 4711, "flops": None, "peak_memory": 2.5e9},
    ]  # fmt: skip
    run = make_run(tmp_path / "costly", in_run(records, "costly", 0))
    text = " ".join(Page(page_of([run], tmp_path)).text.split())
    assert "Arm Training, tokens Answers, s Answers, TFLOP Ensemble 16,200 12.5 7.5 Ceiling: taught by truth" in text
    assert "Phase Seconds Tokens Peak memory, GB boost 250 4,711 2.5" in text


def test_the_page_shows_levels_where_they_are_known(tmp_path):
    records = study_records(seeds=2, n=40)
    for name, given in (("without", records), ("with", with_levels(records, ["4", "5"] * 20, ["4"]))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in given))
    page = page_of([tmp_path / "with.jsonl"], tmp_path)
    assert "Accuracy by level of the questions" in page and "A question’s level: letters." in page
    assert "OOD, levels never seen, points" in page and "sums: 5" in page
    assert "level" not in page_of([tmp_path / "without.jsonl"], tmp_path)


def test_a_difference_of_nothing_has_no_sign(tmp_path):
    answers = {"kind": "answers", "split": "id", "correct": "01" * 20, "questions": questions_digest(range(40))}
    records = [arm_record("ensemble", "id", np.array([0, 1]))]
    records += [answers | {"arm": arm} for arm in ("ensemble", "single_expert")]
    text = Page(page_of([make_run(tmp_path / "same", in_run(records, "same", 0))], tmp_path)).text
    assert "0.0 (0.0 to 0.0): right on the same questions" in text
    assert not re.search(r"[+−]0\.0\b", text)


def test_ten_experts_stand_in_the_order_of_their_numbers():
    records = [record for t in (10, 2, 1) for record in measured(f"expert_{t}")]
    assert cells(results_table(parse_records(records)))["Arm"] == ["Expert 1", "Expert 2", "Expert 10"]


def test_an_undefined_pgr_is_never_a_number():
    taught = next(
        r for r in make_records() if (r["kind"], r.get("arm"), r.get("split")) == ("answers", "ceiling", "ood")
    )
    records = [
        record | ({"correct": taught["correct"]} if record["kind"] == "answers" and record["split"] == "ood" else {})
        for record in make_records()
    ]
    shown = [cell for cell in cells(results_table(parse_records(records)))["PGR OOD"] if cell]
    assert shown == ["undefined", "undefined"]


def test_rounds_show_every_attempt_and_why_it_was_not_added():
    first, second, *_ = in_run(round_records(np.random.default_rng(0)), "demo", 0)
    failed = second | {"accepted": False, "validation": None, "expert_weight": -0.2, "clamped": True, "attempt": 2}
    headers, rows = rounds(parse_records([first, failed]))
    table = dict(zip(headers, zip(*rows, strict=True), strict=True))
    assert table["Round"] == ("1", "2")
    assert table["Boosting weight α"] == (f"{first['expert_weight']:.3f}", "−0.200")
    assert table["Validation: ensemble"] == ("49.0%", "")
    assert table["Note"] == ("", "not added: no better than the prior, error clamped, attempt 2")


def test_tables_print_in_a_narrow_terminal():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(results_table(parse_records(make_records())))
    text = console.export_text()
    for arm in SKILL:
        value = next(
            r["value"] for r in make_records() if (r["kind"], r.get("arm"), r.get("split")) == ("arm", arm, "ood")
        )
        assert re.search(rf"(?m)^ *\S.* {100 * value:.1f} ±", text), arm
    assert "Uniform average" in text


# The page


def test_a_report_needs_no_torch():
    code = "import sys, ensemw2s.report; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False False\n"


def test_the_page_stands_alone(run, tmp_path):
    text = page_of([run], tmp_path)
    page = Page(text)
    assert not page.open, "tags left open"
    assert page.references, "markers are drawn by reference"
    assert all(reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "http" not in text
    assert text.count("<script") == 1, "only the page's own"
    assert "@import" not in text


def test_the_page_shows_results_configuration_environment_and_the_check(run, tmp_path):
    text = Page(page_of([run], tmp_path)).text
    for expected in ("Ensemble against single weak expert", "PGR OOD", "keep_layers: 0-3", "backends.mixture_sample",
                     "Holds.", "scratch:char-strong", "What these figures show, and what they do not"):  # fmt: skip
        assert expected in text
    answers = {(r["arm"], r["split"]): answers_array(r["correct"]) for r in make_records() if r["kind"] == "answers"}
    difference = pooled_difference(*({"demo": answers[arm, "ood"]} for arm in ("ensemble", "single_expert")))
    assert f"{100 * difference.value:+.1f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})" in text


def test_every_arm_is_drawn_at_its_accuracy(run, tmp_path, monkeypatch):
    drawn, errorbar = [], matplotlib.axes.Axes.errorbar

    def spy(self, x, y, *, xerr, **style):
        drawn.append((list(x), [list(ends) for ends in xerr]))
        return errorbar(self, x, y, xerr=xerr, **style)

    monkeypatch.setattr(matplotlib.axes.Axes, "errorbar", spy)
    page_of([run], tmp_path)
    for split in ("id", "ood"):
        values = [100 * r["value"] for r in make_records() if (r["kind"], r.get("split")) == ("arm", split)]
        ((down, up),) = (ends for shown, ends in drawn if shown == values)
        share, z2 = np.array(values) / 100, 1.9599639845**2 / N_QUESTIONS
        # Wilson's score interval, which leaves room for what 0 of 100 right answers do not show.
        centre = (share + z2 / 2) / (1 + z2)
        half = np.sqrt(z2 * (share * (1 - share) + z2 / 4)) / (1 + z2)
        np.testing.assert_allclose(down, 100 * (share - centre + half), atol=1e-8)
        np.testing.assert_allclose(up, 100 * (centre + half - share), atol=1e-8)


def test_colours_follow_the_readers_mode(run, tmp_path):
    text = page_of([run], tmp_path)
    figures = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", figures)) <= {"#ffffff"}, "a colour that no mode controls"
    used = set(re.findall(r"var\(--([\w-]+)\)", text))
    light, dark = (
        set(re.findall(r"--([\w-]+):", text[start : text.index("color-scheme", start)]))
        for start in (text.index(":root"), text.index(":root", text.index("prefers-color-scheme")))
    )
    assert used <= light == dark
    assert "@media screen and (prefers-color-scheme: dark)" in text, "paper is always light"


def test_a_failed_check_is_said_aloud(tmp_path):
    run = make_run(tmp_path / "bad", change(make_records(), "identity", identity_gap=1e-9))
    assert "FAILS: do not trust this run." in Page(page_of([run], tmp_path)).text


def test_clamped_rounds_are_exempt_from_the_identity(tmp_path):
    run = make_run(tmp_path / "clamped", change(make_records(), "identity", identity_gap=None))
    text = Page(page_of([run], tmp_path)).text
    assert "Holds." in text
    assert "The closing identity says nothing here" in text
    assert "sum to 1 (largest deviation 1.1e-16" in text


def test_several_runs_share_a_figure_and_keep_their_names(tmp_path):
    runs = [make_run(tmp_path / part / "same", make_records(seed)) for seed, part in enumerate("ab")]
    text = page_of(runs, tmp_path)
    page = Page(text)
    assert not page.open
    assert len(page.ids) == len(set(page.ids))
    assert "All runs side by side" in page.text
    for run in runs:
        assert f"Run {run}" in page.text


def test_same_records_same_bytes(run, tmp_path):
    assert page_of([run], tmp_path) == page_of([run], tmp_path)


@pytest.mark.parametrize("kinds", [("round", "identity"), ("arm", "answers"), ("arm",)])
def test_a_run_that_stopped_half_way_still_has_a_report(tmp_path, kinds):
    records = [record for record in make_records() if record["kind"] in kinds]
    page = Page(page_of([make_run(tmp_path / "partial", records)], tmp_path))
    assert ("Boosting rounds" in page.text) == ("round" in kinds)
    assert ("Accuracy of every arm" in page.text) == ("arm" in kinds)
    assert ("Comparisons" in page.text.replace("Comparisons that", "")) == ("answers" in kinds)


def test_bagging_has_no_prior_and_unaccepted_rounds_have_no_figure(tmp_path):
    bagging = change(make_records(), "round", prior_error=None)
    assert "Prior error" not in Page(page_of([make_run(tmp_path / "bagging", bagging)], tmp_path)).text
    failed = change(make_records(), "round", accepted=False, validation=None)
    text = Page(page_of([make_run(tmp_path / "failed", failed)], tmp_path)).text
    assert "how the weights spread" not in text
    assert "not added: no better than the prior" in text


def test_names_and_settings_are_escaped(tmp_path):
    run = make_run(tmp_path / "a&b", make_records())
    write_json(run / "config.json", CONFIG | {"name": "<script>alert(1)</script>"})
    text = page_of([run], tmp_path)
    assert "<script>alert" not in text
    assert "a&amp;b" in text
    assert not Page(text).open


def test_arms_that_answered_different_questions_are_not_compared(tmp_path):
    records = [
        record | ({"questions": "0" * 16} if (record["kind"], record.get("arm")) == ("answers", "ensemble") else {})
        for record in make_records()
    ]
    with pytest.raises(ValueError, match="split id: zero_shot_weak and ensemble answered different questions"):
        write_report([make_run(tmp_path / "mixed", records)], tmp_path / "report.html")


def test_a_failure_leaves_the_old_page(run, tmp_path):
    before = page_of([run], tmp_path)
    (run / "results.jsonl").write_text("{")
    with pytest.raises(ValueError, match="line 1"):
        write_report([run], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before


def test_no_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no path: give at least one folder of a run"):
        write_report([], tmp_path / "report.html")


def test_the_readers_own_matplotlib_settings_are_left_alone(run, tmp_path):
    before = dict(matplotlib.rcParams)
    page_of([run], tmp_path)
    assert dict(matplotlib.rcParams) == before


# Many runs


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    file = tmp_path_factory.mktemp("study") / "small_pair.jsonl"
    write_json_lines(file, study_records(n=30))
    return file


def drawn_intervals(monkeypatch):
    """Collects (split's panel, value, low, high, height, marker) of every difference that is drawn."""
    drawn, errorbar = [], matplotlib.axes.Axes.errorbar

    def spy(self, x, y, *, xerr, fmt, **style):
        (value,), (height,), ((down,), (up,)) = x, y, xerr
        drawn.append((self.get_subplotspec().colspan.start, value, value - down, value + up, height, fmt))
        return errorbar(self, x, y, xerr=xerr, fmt=fmt, **style)

    monkeypatch.setattr(matplotlib.axes.Axes, "errorbar", spy)
    return drawn


def test_the_page_of_a_study_opens_with_its_declared_comparisons(study, tmp_path):
    text = page_of([study], tmp_path)
    page = Page(text)
    assert not page.open
    assert len(page.ids) == len(set(page.ids))
    assert all(reference.startswith("#") for reference in page.references)
    assert "http" not in text
    words = " ".join(page.text.split())
    headings = ["Declared comparisons", "Accuracy of every arm", "Accuracy by task", "Every arm minus the ensemble",
                "Performance gap recovered", "Cost", "What these figures show"]  # fmt: skip
    assert sorted(headings, key=words.index) == headings
    for row in differences(pool_of(study_records(n=30)))[1]:
        # Columns that say the same in all rows are left out.
        assert " ".join(row[:3]) in words
    for said in ("Tasks are fixed", "3 tasks × 3 seeds × 30 ID and 30 OOD questions", "small_pair"):
        assert said in words
    assert "Boosting rounds" not in words, "nine runs are too many to show each"
    assert page_of([study], tmp_path) == text


def test_the_forest_plot_shows_each_difference_pooled_and_by_task(study, tmp_path, monkeypatch):
    drawn = drawn_intervals(monkeypatch)
    write_forest_plot([study], tmp_path / "plot.svg")
    pool = pool_of(study_records(n=30))
    expected = [
        (panel, *(100 * x for x in pool.difference(pair, split, task)), "o" if task else "D")
        for panel, split in enumerate(("id", "ood"))
        for pair in COMPARISONS
        for task in (None, *sorted(EASE))
    ]
    assert [(panel, *figures, fmt) for panel, *figures, _, fmt in drawn] == [pytest.approx(row) for row in expected]
    heights = [row[4] for row in drawn]
    assert heights[:12] == sorted(heights[:12]) == heights[12:], "one row each, from top to bottom, in both panels"


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_plot_of_its_own_is_grey_on_white_and_the_same_each_time(study, tmp_path, suffix):
    files = [tmp_path / f"{name}.{suffix}" for name in "ab"]
    for file in files:
        write_forest_plot([study], file)
    assert files[0].read_bytes() == files[1].read_bytes()
    image = files[0].read_bytes()
    if suffix == "svg":
        for colour in re.findall(rb"#([0-9a-f]{6})\b", image):
            assert colour[:2] == colour[2:4] == colour[4:], "a colour that is no grey"
        assert b"#ffffff" in image
    else:
        pixels = matplotlib.image.imread(io.BytesIO(image))[..., :3]
        np.testing.assert_array_equal(pixels[..., 0], pixels[..., 1])
        np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])
        assert pixels[0, 0, 0] == 1.0 and pixels.min() == 0.0


def test_one_task_is_drawn_once(tmp_path, monkeypatch):
    write_json_lines(tmp_path / "one.jsonl", study_records(ease={"sums": 0.0}, n=30))
    drawn = drawn_intervals(monkeypatch)
    write_forest_plot([tmp_path / "one.jsonl"], tmp_path / "plot.svg")
    assert [row[5] for row in drawn] == ["D"] * 2 * len(COMPARISONS)


def test_a_plot_needs_a_known_suffix_and_something_to_draw(study, tmp_path):
    with pytest.raises(ValueError, match=r"plot\.pdf: its name must end in \.svg or \.png"):
        write_forest_plot([study], tmp_path / "plot.pdf")
    write_json_lines(tmp_path / "none.jsonl", change(study_records(n=10), "study", comparisons=[]))
    with pytest.raises(ValueError, match="nothing to draw: no run measured both arms of a comparison"):
        write_forest_plot([tmp_path / "none.jsonl"], tmp_path / "plot.svg")


def test_runs_that_differ_in_seed_or_task_are_pooled(tmp_path):
    places = (("sums", 0), ("sums", 1), ("sorting", 0))
    runs = [make_run(tmp_path / f"{t}_{s}", in_run(make_records(i), t, s)) for i, (t, s) in enumerate(places)]
    page = Page(page_of(runs, tmp_path))
    words = " ".join(page.text.split())
    assert "2 tasks × 1–2 seeds × 100 ID and 100 OOD questions" in words
    assert "All runs side by side" not in words
    assert "Primary split OOD Comparisons Differences in the share" in words, "no study declared them"
    for name in ("sums_0", "sums_1", "sorting_0"):
        assert f"Run {name}" in words, "few runs are shown one by one as well"
    assert "One seed in task sorting: intervals there cover the choice of questions" in words
    assert len(page.ids) == len(set(page.ids))


def test_few_runs_of_a_study_are_shown_one_by_one(tmp_path):
    records = [
        *in_run(make_records(0), "sums", 0),
        *in_run(make_records(1), "sums", 1),
        study_records(seeds=1, n=5)[-1],
    ]
    write_json_lines(tmp_path / "pair.jsonl", records)
    words = " ".join(Page(page_of([tmp_path / "pair.jsonl"], tmp_path)).text.split())
    for seed in (0, 1):
        assert f"Run sums, seed {seed}" in words
    assert words.count("Boosting rounds") == 2
    assert "Holds." in words


@pytest.mark.parametrize(
    ("changed", "pooled"), [({"boosting": {"recipe": "paper"}}, False), ({"seed": 8, "task": "b", "data": {}}, True)]
)
def test_runs_of_other_settings_stand_side_by_side(tmp_path, changed, pooled):
    runs = [make_run(tmp_path / task, in_run(make_records(), task, 0)) for task in "ab"]
    write_json(runs[1] / "config.json", CONFIG | {"name": "b"} | changed)
    assert ("All runs side by side" not in Page(page_of(runs, tmp_path)).text) == pooled
    if pooled:
        write_forest_plot(runs, tmp_path / "plot.svg")
    else:
        with pytest.raises(ValueError, match="a, b cannot be drawn as one: runs that are pooled share arms"):
            write_forest_plot(runs, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").exists() == pooled


def test_a_run_keeps_the_dots_in_its_name(tmp_path):
    runs = [make_run(tmp_path / f"lr_0.{i}", make_records(i)) for i in (1, 2)]
    for run in runs:
        assert f"Run {run.name}" in Page(page_of(runs, tmp_path)).text


def test_runs_without_a_common_arm_stand_side_by_side(tmp_path):
    records = [in_run(make_records(), task, 0) for task in ("sums", "sorting")]
    records[0] = [record for record in records[0] if record.get("arm") in (None, "ensemble")]
    records[1] = [record for record in records[1] if record.get("arm") in (None, "ceiling")]
    runs = [make_run(tmp_path / name, rows) for name, rows in zip("ab", records, strict=True)]
    assert "All runs side by side" in Page(page_of(runs, tmp_path)).text


def test_several_ensembles_of_one_run_have_rounds_of_their_own(tmp_path):
    rounds = [r for r in make_records() if r["kind"] == "round"]
    others = [r for r in make_records() if r["kind"] != "round"]
    named = [record | {"arm": arm} for arm in ("ensemble", "paper") for record in rounds]
    words = " ".join(Page(page_of([make_run(tmp_path / "two", named + others)], tmp_path)).text.split())
    assert "Boosting rounds: ensemble" in words and "Boosting rounds: recipe as published" in words
    assert words.index("Boosting rounds: recipe") < words.index("Boosting rounds: ensemble")
    assert "3 over 2,000 units" not in words


def test_no_page_or_picture_of_somebody_else_is_replaced(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "pair.jsonl", study_records(seeds=2, n=10))
    for name, write in {"a.html": write_report, "b.svg": write_forest_plot, "c.png": write_forest_plot}.items():
        file = tmp_path / name
        write([tmp_path / "pair.jsonl"], file)
        ours = file.read_bytes()
        write([tmp_path / "pair.jsonl"], file)
        assert file.read_bytes() == ours
        file.write_bytes(b"only copy")
        with pytest.raises(
            ValueError, match=f"{name} was not made by ensemw2s and is left as it is: name another file"
        ):
            write([tmp_path / "pair.jsonl"], file)
        assert file.read_bytes() == b"only copy"
