"""Students of an experiment whose answers are judged by out-of-fold students, or that learn easy answers too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ensemw2s.data.answers import exact_match
from ensemw2s.experiments.config import build_config, load_config
from ensemw2s.experiments.experiment import Experiment
from ensemw2s.experiments.plan import plan
from ensemw2s.report.tables import relabelled
from ensemw2s.runtime.files import read_json, read_json_lines
from ensemw2s.runtime.records import read_records
from ensemw2s.student import relabel
from tests.experiments.test_config import write
from tests.experiments.test_experiment import records_of, settings
from tests.experiments.test_plan import with_choices

CROSS_FITTED = {"teacher": "single_expert", "relabel": "cross_fit"}
STUDENTS = {
    "student_single": {"teacher": "single_expert"},
    "cross_fitted": CROSS_FITTED,
    "with_easy": {**CROSS_FITTED, "easy_answers": True},
    "ceiling": {"teacher": "truth"},
}
PHASES = ("data", "boost", "label", "student")


def few(folder: Path, **changes: Any) -> dict[str, Any]:
    values = settings(folder, students=STUDENTS, **changes)
    values["student"] = values["student"] | {"num_train_epochs": 2, "easy_answers": False}
    return values


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("relabelled")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(relabel, "LEAST_ROWS", 1)
        patched.setattr(relabel, "LEAST_SHARE", 0.0)
        Experiment(build_config(few(folder))).run((*PHASES, "evaluate"))
    return folder / "run" / "small"


def test_the_records_say_what_was_kept_and_what_it_is_worth(finished: Path) -> None:
    records = {record["arm"]: record for record in records_of(finished, "relabel")}
    assert list(records) == ["cross_fitted", "with_easy"]
    truth = {row["id"]: row["answer"] for row in read_json_lines(finished / "data/unlabelled.jsonl")}
    for arm, record in records.items():
        rows = read_json_lines(finished / "students" / arm / "relabel/answers.jsonl")
        assert sum(bool(row.get("gold")) for row in rows) == (24 if arm == "with_easy" else 0)
        rows = [row for row in rows if not row.get("gold")]
        kept = [row for row in rows if row["kept"]]
        assert (record["n"], record["agree"], record["kept"]) == (len(rows), sum(r["agrees"] for r in rows), len(kept))
        right = exact_match([row["answer"] for row in kept], [truth[row["id"]] for row in kept]).mean()
        assert record["accuracy"] == right and (record["task"], record["seed"]) == ("small", 0)
    headers, rows = relabelled(read_records(finished))
    assert [row[0] for row in rows] == ["Cross fitted", "With easy"] and headers[2] == "Agree"


def test_what_students_of_folds_took_is_part_of_the_arms_cost(finished: Path) -> None:
    costs = {record["arm"]: record for record in records_of(finished, "cost")}
    plain = costs["student_single"]["train_tokens"]
    # Two of folds and the student, as many steps each, and answers.
    assert costs["cross_fitted"]["train_tokens"] > 2.5 * plain
    for arm in ("cross_fitted", "student_single"):
        assert costs[arm]["train_flops"] == read_json(finished / "students" / arm / "cost.json")["flops"]
    (phase,) = [r for r in records_of(finished, "phase") if r["phase"] == "student"]
    parts = sum(read_json(finished / "students" / arm / "cost.json")["tokens"] for arm in STUDENTS)
    assert phase["tokens"] == parts


def test_a_student_with_easy_answers_takes_no_more_steps(finished: Path) -> None:
    cost = {arm: read_json(finished / "students" / arm / "cost.json")["tokens"] for arm in STUDENTS}
    # Easy questions are about as long.
    assert cost["with_easy"] == pytest.approx(cost["cross_fitted"], rel=0.3)


def test_a_killed_student_phase_goes_on_to_the_same_students(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relabel, "LEAST_ROWS", 1)
    monkeypatch.setattr(relabel, "LEAST_SHARE", 0.0)
    experiment = Experiment(build_config(few(tmp_path)))
    experiment.run(PHASES[:3])
    calls = []
    own = relabel._keep_student

    def dying(*args: Any) -> None:
        calls.append(args)
        if len(calls) in (2, 5):
            raise KeyboardInterrupt
        own(*args)

    monkeypatch.setattr(relabel, "_keep_student", dying)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            experiment.run(("student",))
    experiment.run(("student",))
    assert len(calls) == 6
    for arm in STUDENTS:
        name = f"students/{arm}/adapter_model.safetensors"
        assert (experiment.folder / name).read_bytes() == (finished / name).read_bytes(), arm
        costs = [read_json(run / f"students/{arm}/cost.json") for run in (finished, experiment.folder)]
        assert [cost["tokens"] for cost in costs] == [costs[0]["tokens"]] * 2


def test_a_plan_foresees_the_students_of_folds(tmp_path: Path) -> None:
    config = with_choices(tmp_path, students=STUDENTS)
    estimate = next(phase for phase in plan(config) if phase.phase == "student")
    with pytest.MonkeyPatch.context() as patched:
        # Then nothing is left out.
        patched.setattr(relabel, "LEAST_ROWS", 10**6)
        records = Experiment(config).run(PHASES)
    (taken,) = [r for r in records if r["kind"] == "phase" and r["phase"] == "student"]
    assert estimate.tokens == pytest.approx(taken["tokens"], rel=0.05)
    assert estimate.flops == pytest.approx(taken["flops"], rel=0.1)


def test_students_learn_easy_answers_unless_told_otherwise(tmp_path: Path) -> None:
    students = {"plain": {"teacher": "ensemble"}, "soft": {"teacher": "ensemble", "variant": "soft"},
                "hard": {"teacher": "ensemble", "easy_answers": False}, "ceiling": {"teacher": "truth"}}  # fmt: skip

    def learning(**student: Any) -> list[str]:
        values = settings(tmp_path, students=students)
        config = build_config(values | {"student": values["student"] | student})
        assert config.results_key()["student"] == values["student"]
        said = [arm for arm, own in config.results_key()["students"].items() if own.get("easy_answers")]
        assert said == [arm for arm in students if config.learns_easy_answers(arm)]
        return said

    assert learning() == ["plain", "ceiling"] == learning(easy_answers=True)
    assert learning(easy_answers=False) == []
    idle = {"students": {"soft": students["soft"]}, "student": {"easy_answers": True}}
    with pytest.raises(ValueError, match=r"student\.easy_answers=true does nothing, .* each student learns.*: soft"):
        build_config(settings(tmp_path) | idle)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["students.with_easy.easy_answers=1"], r"students\.with_easy\.easy_answers must be true or false, got 1"),
        (["student.easy_answers=no way"], r"student\.easy_answers must be true or false, got 'no way'"),
        (
            ["student.variant=soft"],
            r"students\.with_easy\.easy_answers: variant=soft learns distributions, which true answers do not have",
        ),
        (
            ["students.with_easy.easy_answers=false", "student={variant: soft, top_logprobs: 4}",
             "students.cross_fitted.relabel_keep=all"],
            r"students\.cross_fitted\.relabel_keep=all replaces answers, and top_logprobs keeps",
        ),
        (["students.student_single.relabel_folds=3"],
         r"students\.student_single\.relabel_folds=3 does nothing without relabel"),
    ],
)  # fmt: skip
def test_keys_that_do_not_go_together_are_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, few(tmp_path)), overrides)


def test_a_setting_that_no_student_reads_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, settings(tmp_path, students={"one": {"teacher": "ensemble"}}))
    with pytest.raises(ValueError, match=r'relabel_folds=3 does nothing, because none of one has relabel="cross_fit"'):
        load_config(path, ["student.relabel_folds=3"])


def test_all_students_may_be_cross_fitted_and_the_ceiling_is_not(tmp_path: Path) -> None:
    path = write(tmp_path, settings(tmp_path))
    config = load_config(path, ["student.relabel=cross_fit", "student.relabel_folds=3", "student.relabel_keep=all"])
    found = {arm: config.student_arm_config(arm, tmp_path) for arm in config.students}
    assert {arm: args.relabel for arm, args in found.items()} == {
        "student_single": "cross_fit", "student_ensemble": "cross_fit", "ceiling": None,
    }  # fmt: skip
    assert found["student_single"].relabel_folds == 3
