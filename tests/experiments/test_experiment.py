"""The whole experiment on a tiny model: records, determinism, resuming, phases alone."""

from __future__ import annotations

import datetime
import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ensemw2s import TokenEnsemble
from ensemw2s.boosting.config import RECIPES, BoostingConfig
from ensemw2s.boosting.trainer import round_line
from ensemw2s.data.tokens import tokenize_questions
from ensemw2s.experiments.config import build_config, load_config
from ensemw2s.experiments.experiment import Experiment
from ensemw2s.experiments.folder import PHASES
from ensemw2s.inference.label_files import read_labels
from ensemw2s.inference.scoring import score_examples
from ensemw2s.report.tables import results_table
from ensemw2s.runtime.files import read_json, read_json_lines, settle
from ensemw2s.runtime.records import POOLED_KINDS, answers_array, questions_digest, read_records
from tests.tiny import END, FORMAT, VOCAB, questions, saved_model, tokenizer


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """An experiment on a tiny random model that takes a few seconds."""
    if not (folder / "weak").exists():
        saved_model(folder / "weak", seed=0)
        saved_model(folder / "strong", seed=1, hidden_size=64)
        questions(60).to_json(folder / "easy.jsonl")
        questions(60, seed=8, start=60).to_json(folder / "hard.jsonl")
    training = {
        "num_train_epochs": 6, "learning_rate": 2e-2, "per_device_train_batch_size": 8, "disable_tqdm": True,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    return {
        "name": "small",
        "output_dir": str(folder / "run"),
        "weak": {"source": str(folder / "weak")},
        "strong": {"source": str(folder / "strong")},
        "lora": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
        "data": {
            "format": {"prompt_template": FORMAT.prompt_template, "answer_prefix": FORMAT.answer_prefix},
            "easy": {"file": str(folder / "easy.jsonl")},
            "hard": {"file": str(folder / "hard.jsonl")},
            "sizes": {"train": 24, "validation": 12, "test_id": 20, "unlabelled": 24, "test_ood": 20},
            "level": {"count": "3"},
        },
        "boosting": {"num_rounds": 2, **training},
        "student": training,
        "labelling": {"max_new_tokens": 6},
    } | changes


def stable(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without what a clock and the memory say."""
    return [{k: v for k, v in record.items() if "seconds" not in k and k != "peak_memory"} for record in records]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    Experiment(build_config(settings(folder))).run()
    return folder / "run" / "small"


def records_of(run: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def test_every_arm_is_measured_on_every_split(finished: Path) -> None:
    arms = {(r["arm"], r["split"], r["metric"]) for r in records_of(finished, "arm")}
    names = [
        "zero_shot_weak", "zero_shot_strong", "single_expert", "expert_1", "expert_2", "best_expert", "majority_vote",
        "uniform_average", "ensemble", "student_single", "student_ensemble", "ceiling",
    ]  # fmt: skip
    splits = ("validation", "id", "ood")
    assert arms == {(a, s, m) for a in names for s in splits for m in ("accuracy", "token_error")}
    for record in records_of(finished, "answers"):
        values = [
            r["value"] for r in records_of(finished, "arm")
            if (r["arm"], r["split"], r["metric"]) == (record["arm"], record["split"], "accuracy")
        ]  # fmt: skip
        assert values == [pytest.approx(answers_array(record["correct"]).mean())]


def test_records_that_are_pooled_say_their_task_and_seed(finished: Path, tmp_path: Path) -> None:
    # No arm of this run relabels answers.
    for kind in set(POOLED_KINDS) - {"relabel"}:
        assert {(r["task"], r["seed"]) for r in records_of(finished, kind)} == {("small", 0)}
    named = Experiment(build_config(settings(tmp_path, task="copying", seed=3)))
    assert named.files.of_this_run({"kind": "cost"}) == {"kind": "cost", "task": "copying", "seed": 3}
    assert named.files.of_this_run({"kind": "phase"}) == {"kind": "phase"}


def test_the_level_of_every_question_is_recorded(finished: Path) -> None:
    for record in records_of(finished, "levels"):
        name = {"train": "train", "id": "test_id", "ood": "test_ood"}[record["split"]]
        rows = read_json_lines(finished / "data" / f"{name}.jsonl")
        assert record["levels"] == [str(row["prompt"].count("3")) for row in rows]
        assert record["questions"] == questions_digest(row["id"] for row in rows)
    assert len(records_of(finished, "levels")) == 3


def test_what_teachers_thought_of_each_answer_is_recorded(finished: Path) -> None:
    truth = {row["id"]: row["answer"] for row in read_json_lines(finished / "data" / "unlabelled.jsonl")}
    found = records_of(finished, "confidences")
    assert {record["teacher"] for record in found} == {"single_expert", "ensemble"}
    for record in found:
        by_id = {row["id"]: row for row in read_json_lines(finished / "labels" / f"{record['teacher']}.jsonl")}
        rows = [by_id[question] for question in truth]
        likely = [math.exp(row["confidence"] * row["num_tokens"]) for row in rows]
        assert record["probabilities"] == pytest.approx(likely, abs=1e-4)
        assert record["agreements"] == pytest.approx([row["agreement"] for row in rows], abs=1e-4)
        right = [row["answer"].split() == truth[row["id"]].split() for row in rows]
        assert answers_array(record["correct"]).tolist() == right


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with more ensembles, an expert of equal cost, and students of other teachers."""
    folder = tmp_path_factory.mktemp("compared")
    changes = {
        "ensembles": {
            "deep_ensemble": {"recipe": "deep_ensemble"}, "paper": {"recipe": "paper"},
            "product": {"combine": "logprob"}, "mixed": {"uniform_mix": 0.5},
        },
        "equal_cost": True,
        "students": {
            "student_deep": {"teacher": "deep_ensemble"},
            "student_confidence": {"teacher": "single_expert", "variant": "confidence"},
            "ceiling": {"teacher": "truth"},
        },
    }  # fmt: skip
    Experiment(build_config(settings(folder, **changes))).run()
    return folder / "run" / "small"


def outcomes(run: Path, split: str = "ood") -> dict[str, str]:
    return {r["arm"]: r["correct"] for r in records_of(run, "answers") if r["split"] == split}


def test_all_arms_of_a_comparison_are_measured_on_the_same_questions(compared: Path) -> None:
    names = {
        "zero_shot_weak", "zero_shot_strong", "single_expert", "expert_1", "expert_2", "best_expert", "majority_vote",
        "uniform_average", "ensemble", "deep_ensemble", "paper", "product", "mixed", "equal_cost", "student_deep",
        "student_confidence", "ceiling",
    }  # fmt: skip
    answers = records_of(compared, "answers")
    assert {record["arm"] for record in answers} == names
    for split in ("validation", "id", "ood"):
        assert len({record["questions"] for record in answers if record["split"] == split}) == 1
    assert {record["arm"] for record in records_of(compared, "cost")} == names
    assert {record["teacher"] for record in records_of(compared, "labels")} == {"deep_ensemble", "single_expert"}
    assert {record["arm"] for record in records_of(compared, "pgr")} == {
        "student_deep", "student_confidence", "ceiling",
    }  # fmt: skip


def test_all_arms_share_the_tokens_of_a_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = []

    def counted(*args: Any, **options: Any) -> Any:
        splits.append(args[3])
        return tokenize_questions(*args, **options)

    monkeypatch.setattr("ensemw2s.experiments.folder.tokenize_questions", counted)
    monkeypatch.setattr("ensemw2s.boosting.trainer.tokenize_questions", None)
    config = build_config(settings(tmp_path, ensembles={"paper": {"recipe": "paper"}}))
    Experiment(config).run(("data", "boost"))
    assert sorted(splits) == ["train", "validation"]


def test_an_expert_that_arms_share_is_trained_once(compared: Path) -> None:
    experts = {
        arm: [(compared / path).resolve() / "adapter_model.safetensors" for path in record["experts"]]
        for record in records_of(compared, "mixture")
        for arm in [record["arm"]]
    }
    first = experts["ensemble"][0]
    # Uniform weights and the same seed: the single expert, that of the deep ensemble, and the first of a re-weighting.
    for arm in ("single_expert", "deep_ensemble", "product", "mixed"):
        assert experts[arm][0].samefile(first), arm
    # What a draw leaves out makes another expert, and so do other weights.
    assert not experts["paper"][0].samefile(first)
    assert not experts["deep_ensemble"][1].samefile(experts["ensemble"][1])
    assert experts["product"][1].samefile(experts["ensemble"][1])
    assert outcomes(compared)["single_expert"] == outcomes(compared)["expert_1"]


def test_one_expert_of_equal_cost_sees_as_many_tokens_as_all_of_the_ensemble(compared: Path) -> None:
    tokens = {record["arm"]: record.get("train_tokens") for record in records_of(compared, "cost")}
    assert tokens["ensemble"] == 2 * tokens["single_expert"]
    assert tokens["equal_cost"] == tokens["ensemble"] == tokens["majority_vote"] == tokens["uniform_average"]
    assert tokens["student_deep"] > 0
    assert tokens["zero_shot_weak"] is None


def test_mixtures_of_all_arms_are_those_of_their_saved_ensembles(compared: Path) -> None:
    from datasets import Dataset

    rows = [json.loads(line) for line in (compared / "data" / "test_ood.jsonl").read_text().splitlines()]
    examples = tokenize_questions(Dataset.from_list(rows), tokenizer(), FORMAT)
    for arm, correct in outcomes(compared).items():
        folder = compared / ("ensemble" if arm == "ensemble" else f"ensembles/{arm}/ensemble")
        if folder.exists():
            scores = score_examples(TokenEnsemble.from_pretrained(folder), examples, pad_token_id=END)
            assert correct == "".join(str(int(right)) for right in scores.correct), arm
    ensemble = TokenEnsemble.from_pretrained(compared / "ensemble").reweighted([1.0, 1.0])
    ensemble.config.combine = "vote"
    votes = score_examples(ensemble, examples, pad_token_id=END)
    assert outcomes(compared)["majority_vote"] == "".join(str(int(right)) for right in votes.correct)


def test_the_best_expert_is_chosen_on_validation_questions(compared: Path) -> None:
    (chosen,) = records_of(compared, "best_expert")
    validation = outcomes(compared, "validation")
    assert validation[chosen["arm"]].count("1") == max(validation[f"expert_{t}"].count("1") for t in (1, 2))
    assert outcomes(compared)["best_expert"] == outcomes(compared)[chosen["arm"]]


def test_an_ensemble_with_a_recipe_of_its_own_takes_over_only_how_models_are_trained(tmp_path: Path) -> None:
    values = settings(tmp_path, ensembles={"paper": {"recipe": "paper"}, "hard": {"errors": "hard"}})
    values["boosting"] = values["boosting"] | {"shrinkage": 0.4, "combine": "logprob", "num_rounds": 3}
    config = build_config(values)
    paper, hard = config.ensemble_config("paper", tmp_path), config.ensemble_config("hard", tmp_path)
    assert (paper.shrinkage, paper.combine, paper.num_rounds) == (1.0, "prob", 3)
    assert paper.num_train_epochs == values["boosting"]["num_train_epochs"]
    assert (hard.shrinkage, hard.combine, hard.errors) == (0.4, "logprob", "hard")
    single = config.ensemble_config("single_expert", tmp_path)
    assert (single.sampling, single.num_rounds) == ("all", 1)


def test_the_measured_ensemble_is_the_saved_one(finished: Path) -> None:
    ensemble = TokenEnsemble.from_pretrained(finished / "ensemble")
    rows = [json.loads(line) for line in (finished / "data" / "test_ood.jsonl").read_text().splitlines()]
    from datasets import Dataset

    examples = tokenize_questions(Dataset.from_list(rows), tokenizer(), FORMAT)
    scores = score_examples(ensemble, examples, pad_token_id=END)
    answers = next(r for r in records_of(finished, "answers") if (r["arm"], r["split"]) == ("ensemble", "ood"))
    np.testing.assert_array_equal(answers_array(answers["correct"]), scores.correct)
    assert answers["questions"] == questions_digest(row["id"] for row in rows)


def test_what_was_trained_is_saved_once(finished: Path) -> None:
    assert len(list(finished.rglob("boosting.json"))) == len(list(finished.rglob("boosting/rounds")))
    assert not list(finished.rglob("boosting/ensemble"))
    assert {path.name for path in (finished / "students").iterdir()} == {
        "student_single",
        "student_ensemble",
        "ceiling",
    }


def test_students_saw_their_teachers_answers_and_no_truth(finished: Path) -> None:
    labels = [json.loads(line) for line in (finished / "labels" / "ensemble.jsonl").read_text().splitlines()]
    truth = {json.loads(line)["id"] for line in (finished / "data" / "unlabelled.jsonl").read_text().splitlines()}
    assert {row["id"] for row in labels} == truth
    assert {record["teacher"] for record in records_of(finished, "labels")} == {"single_expert", "ensemble"}
    adapters = [
        (finished / "students" / arm / "adapter_model.safetensors").read_bytes()
        for arm in ("student_single", "student_ensemble", "ceiling")
    ]
    assert len(set(adapters)) == 3


def test_the_records_hold_the_invariants(finished: Path) -> None:
    checks = records_of(finished, "identity")
    assert checks
    for check in checks:
        assert check["sum_gap"] <= 1e-9
        assert check["identity_gap"] is None or check["identity_gap"] <= 1e-12


def test_results_say_which_backend_ran(finished: Path) -> None:
    (environment,) = records_of(finished, "environment")
    assert environment["backends"]["mixture_sample"] in ("cpp", "cuda", "triton", "reference")
    assert environment["versions"]["torch"]


def test_the_report_is_one_file_that_needs_nothing_else(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert "<svg" in page
    assert 'src="http' not in page and 'href="http' not in page and "<script src" not in page


def test_two_runs_with_one_seed_are_equal(finished: Path, tmp_path: Path) -> None:
    # Same models, same questions, another folder.
    for name in ("weak", "strong", "easy.jsonl", "hard.jsonl"):
        source = finished.parent.parent / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    again = Experiment(build_config(settings(tmp_path))).run()
    first = [json.loads(line) for line in (finished / "results.jsonl").read_text().splitlines()]
    assert stable(again) == stable(first)
    for name in ("labels/ensemble.jsonl", "students/student_ensemble/adapter_model.safetensors"):
        assert (finished / name).read_bytes() == (tmp_path / "run" / "small" / name).read_bytes()


def test_phases_run_alone_give_what_a_whole_run_gives(finished: Path, tmp_path: Path) -> None:
    for name in ("weak", "strong", "easy.jsonl", "hard.jsonl"):
        source = finished.parent.parent / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    config = build_config(settings(tmp_path))
    Experiment(config).run(("data", "boost"))
    # A phase finds everything in the folder, which carries its own configuration.
    for phase in PHASES[2:]:
        records = Experiment(load_config(tmp_path / "run" / "small")).run((phase,))
    first = [json.loads(line) for line in (finished / "results.jsonl").read_text().splitlines()]
    assert stable(records) == stable(first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strong": {"source": "scratch:charstrong"}}, "strong: there is no scratch model 'charstrong'"),
        ({"strong": {"source": "./nowhere"}}, r"strong: \./nowhere does not exist"),
        ({"strong": {"source": "scratch:char-strong", "keep_layers": "0-99"}}, "strong: keep_layers '0-99' must name"),
        ({"strong": {"source": "package:no_such_model"}}, "strong: the package no_such_model is not installed"),
        ({"weak": {"source": "scratch:char"}}, "weak: there is no scratch model 'char'"),
    ],
)
def test_models_that_cannot_be_loaded_are_refused_before_anything_is_trained(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = build_config({**settings(tmp_path), **changes})
    with pytest.raises((ValueError, FileNotFoundError, ImportError), match=message):
        Experiment(config)
    assert not config.folder.exists()
    # The same folder takes the run once the name is right; then the models may be gone where no phase needs them.
    Experiment(build_config(settings(tmp_path))).run(("data",))
    shutil.rmtree(tmp_path / "strong")
    again = Experiment(build_config(settings(tmp_path)))
    again.run(("data",))
    with pytest.raises(FileNotFoundError, match=r"strong: .*strong does not exist"):
        again.run()


def test_a_finished_run_is_not_run_again(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    Experiment(load_config(finished)).run()
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")} == before


def test_the_table_shows_every_arm(finished: Path) -> None:
    from rich.console import Console

    console = Console(width=160, record=True, file=io.StringIO())
    console.print(results_table(read_records(finished)))
    text = console.export_text()
    for words in ("ID", "OOD", "PGR", "ensemble", "ceiling"):
        assert words.lower() in text.lower()


def test_a_question_with_a_line_separator_in_it_stays_one_question(tmp_path: Path) -> None:
    config = build_config(settings(tmp_path))
    easy = questions(60).map(lambda row: {"prompt": row["prompt"] + "\u2028x"})
    easy.to_json(tmp_path / "easy.jsonl")
    experiment = Experiment(config)
    experiment.run(("data",))
    prompts = experiment.files.questions("train")["prompt"]
    assert len(prompts) == 24
    assert all(prompt.endswith("\u2028x") for prompt in prompts)


def of_soft_students(folder: Path, finished: Path, **student: Any) -> Path:
    """The finished run up to its experts, in a new folder, going on to students of `variant: soft`."""
    source = finished.parent.parent
    for name in ("weak", "strong"):
        shutil.copytree(source / name, folder / name)
    for name in ("easy.jsonl", "hard.jsonl"):
        shutil.copy(source / name, folder / name)
    plain = settings(folder)
    config = build_config(plain | {"student": plain["student"] | {"variant": "soft", **student}})
    experiment = Experiment(config)
    for name in ("data", "ensembles", "ensemble"):
        shutil.copytree(finished / name, experiment.folder / name)
        settle(experiment.folder / name)
    (experiment.folder / "records").mkdir()
    for name in ("data", "boost"):
        settle(shutil.copy(finished / "records" / f"{name}.jsonl", experiment.folder / "records"))
    experiment.run(("label", "student"))
    return experiment.folder


def test_both_students_learn_distributions_and_the_ceiling_the_truth(finished: Path, tmp_path: Path) -> None:
    run = of_soft_students(tmp_path / "cached", finished, top_logprobs=VOCAB, temperature=2.0)
    live = of_soft_students(tmp_path / "live", finished, temperature=2.0)
    for teacher in ("single_expert", "ensemble"):
        rows = read_labels(run / "labels" / f"{teacher}.jsonl")
        assert {row["top_temperature"] for row in rows} == {2.0}
        assert {row["top_log_probs"].shape[1] for row in rows} == {VOCAB}
        assert not any("top_log_probs" in row for row in read_labels(live / "labels" / f"{teacher}.jsonl"))
    file = "adapter_model.safetensors"
    assert (run / "students/ceiling" / file).read_bytes() == (finished / "students/ceiling" / file).read_bytes()
    for arm in ("student_single", "student_ensemble"):
        hard = load_file(finished / "students" / arm / file)
        cached, asked = (load_file(folder / "students" / arm / file) for folder in (run, live))
        for name, weight in hard.items():
            assert not torch.allclose(cached[name], weight, atol=1e-3)
        gap = max(float((cached[name] - asked[name]).abs().max()) for name in hard)
        assert gap < 0.1 * max(float((cached[name] - hard[name]).abs().max()) for name in hard)


def test_the_ceiling_has_no_confidence_to_be_filtered_by(finished: Path, tmp_path: Path) -> None:
    folder = of_soft_students(tmp_path, finished, variant="confidence", keep_fraction=0.5)
    assert (folder / "students" / "ceiling" / "cost.json").exists()
    costs = {arm: read_json(folder / "students" / arm / "cost.json")["tokens"] for arm in ("student_single", "ceiling")}
    assert costs["student_single"] < 0.75 * costs["ceiling"]


def test_soft_students_of_another_tokenizer_are_refused_at_once(tmp_path: Path) -> None:
    plain = settings(tmp_path)
    other = tokenizer()
    other.add_tokens(["new"])
    other.save_pretrained(tmp_path / "strong")
    experiment = Experiment(build_config(plain | {"student": plain["student"] | {"variant": "soft"}}))
    with pytest.raises(ValueError, match="one tokenizer for both"):
        experiment.run(("data",))


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ensembles": {"ensemble": {}}}, r"ensembles\.ensemble: the name of an arm"),
        ({"ensembles": {"expert_3": {}}}, r"ensembles\.expert_3: the name of an arm"),
        ({"ensembles": {"My arm": {}}}, "made of a-z, 0-9 and _"),
        ({"ensembles": {"deep": None}}, r"ensembles\.deep must be a mapping"),
        ({"ensembles": {"deep": {"recipy": "paper"}}}, r"unknown key ensembles\.deep\.recipy: did you mean"),
        ({"ensembles": {"deep": {"shrinkage": 2.0}}}, "shrinkage must be in"),
        (
            {"students": {"pupil": {"teacher": "bagging"}}},
            r"students\.pupil\.teacher must be one of single_expert, ensem",
        ),
        ({"students": {"pupil": {"teacher": "truth"}}}, "taught by truth is called ceiling"),
        ({"students": {"ceiling": {"teacher": "ensemble"}}}, "taught by truth is called ceiling"),
        ({"students": {"pupil": {"teacher": "equal_cost"}}}, "must be one of single_expert, ensemble, truth"),
        ({"students": {"pupil": {"teacher": "ensemble", "variant": "hard"}}}, "variant must be one of"),
    ],
)
def test_bad_arms_are_refused_in_words(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        build_config(settings(tmp_path, **changes))


def test_a_soft_student_of_voters_is_refused(tmp_path: Path) -> None:
    values = settings(tmp_path, ensembles={"voters": {"combine": "vote"}})
    students = {"pupil": {"teacher": "voters", "variant": "soft"}}
    with pytest.raises(
        ValueError, match=r"students\.pupil: variant=soft needs a teacher with a distribution, and voters"
    ):
        build_config(values | {"students": students})


def test_a_folder_of_another_configuration_names_what_differs(finished: Path) -> None:
    folder = finished.parent.parent
    changed = settings(folder, seed=3)
    changed["boosting"] = changed["boosting"] | {"num_rounds": 1}
    with pytest.raises(ValueError, match=r"differing: boosting\.num_rounds, resolved\..*, seed\. .*--overwrite"):
        Experiment(build_config(changed))
    assert (finished / "results.jsonl").exists()


def test_a_recipe_that_means_something_else_now_is_another_configuration(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "tempered", RECIPES["tempered"] | {"effective_sample_size_floor": 0.6})
    with pytest.raises(ValueError, match=r"differing: resolved\.ensemble\.effective_sample_size_floor\."):
        Experiment(build_config(settings(finished.parent.parent)))


def test_overwrite_deletes_the_other_run(tmp_path: Path) -> None:
    Experiment(build_config(settings(tmp_path))).run(("data",))
    changed = build_config(settings(tmp_path, seed=3))
    Experiment(changed, overwrite=True)
    assert read_json(changed.folder / "config.json")["seed"] == 3
    assert not (changed.folder / "data").exists()


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    config = build_config(settings(tmp_path))
    config.folder.mkdir(parents=True)
    (config.folder / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"is not empty and holds no run of ours .*, but thesis\.txt"):
        Experiment(config, overwrite=True)
    assert (config.folder / "thesis.txt").exists()


def test_a_phase_out_of_order_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"student needs what boost leaves in .*: run boost first"):
        Experiment(build_config(settings(tmp_path))).run(("student",))


def test_experts_that_learn_nothing_are_told_with_the_default_learning_rate(tmp_path: Path) -> None:
    said: list[str] = []
    given = settings(tmp_path, boosting={"num_rounds": 1, "recipe": "deep_ensemble", "max_steps": 1})
    Experiment(build_config(given), say=said.append).run(("data", "boost"))
    (told,) = [line for line in said if "no question is answered right" in line]
    assert "train longer than 1 step, or with a higher learning rate than 0.0005" in told


def test_the_line_of_a_round_says_all_that_matters() -> None:
    record = {
        "round": 2, "attempt": 1, "error": 0.25, "prior_error": 0.8, "expert_weight": 2.484, "accepted": True,
        "effective_sample_size": 750.2, "num_units": 1000, "validation": {"expert": 0.5, "ensemble": 0.6},
    }  # fmt: skip
    args = BoostingConfig(num_rounds=3, errors="hard", learning_rate=2e-4)
    line = round_line(record, args)
    assert "answered right" not in line
    nothing = round_line({**record, "validation": {"expert": 0.0, "ensemble": 0.0, "token_error": 0.7}}, args)
    assert "no question is answered right; 70% of the answers' tokens are wrong" in nothing
    assert "longer than 3 epochs, or with a higher learning rate than 0.0002" in nothing
    soft = BoostingConfig(num_rounds=3, learning_rate=2e-4)
    small = {**record, "round": 1, "error": 0.0199}
    assert "hardly an error to boost on (below 2%)" in round_line(small, soft)
    for told in (
        round_line({**small, "error": 0.02}, soft),
        round_line({**small, "round": 2}, soft),
        round_line(small, args),
        round_line(small, BoostingConfig(num_rounds=1, learning_rate=2e-4)),
        round_line(small, BoostingConfig(num_rounds=3, learning_rate=2e-4, recipe="deep_ensemble")),
    ):
        assert "to boost on" not in told
    for words in (
        "round 2/3",
        "hard ε 0.250",
        "0.800",
        "α 2.48",
        "750 of 1000 (75%)",
        "expert 50.0%",
        "ensemble 60.0%",
    ):
        assert words in line


def test_columns_that_json_cannot_hold_do_not_stop_a_run(tmp_path: Path) -> None:
    values = settings(tmp_path)
    rows = questions(60)
    dates = [datetime.date(2024, 1, 1)] * 60
    rows.add_column("when", dates).add_column("difficulty", [math.nan] * 60).to_parquet(tmp_path / "easy.parquet")
    values["data"]["easy"] = {"file": str(tmp_path / "easy.parquet")}
    experiment = Experiment(build_config(values))
    experiment.run(("data",))
    assert experiment.files.questions("train").column_names == ["id", "prompt", "answer"]
    assert set(experiment.files.questions("train")["prompt"]) <= set(rows["prompt"])


def test_a_file_of_questions_that_was_changed_is_not_gone_on_with(tmp_path: Path) -> None:
    config = build_config(settings(tmp_path, name="one"))
    Experiment(config).run(("data",))
    Experiment(config).run(("data",))
    text = (tmp_path / "easy.jsonl").read_text()
    (tmp_path / "easy.jsonl").write_text(text.replace('"answer":"', '"answer":"a', 1))
    for phase in ("data", "boost"):
        with pytest.raises(ValueError, match=r"data\.easy: .*easy\.jsonl was changed since this run .*another name"):
            Experiment(config).run((phase,))
    shutil.rmtree(config.folder)
    Experiment(config).run(("data",))
    # The run has its own copy.
    (tmp_path / "easy.jsonl").unlink()
    Experiment(config).run(("data",))


def test_teachers_without_room_for_such_answers_are_warned_of(tmp_path: Path) -> None:
    config = build_config(settings(tmp_path, labelling={"max_new_tokens": 2}))
    with pytest.warns(
        UserWarning, match=r"labelling.max_new_tokens=2: \d+ of the 24 training answers have more tokens"
    ):
        Experiment(config).run(("data",))


def test_a_student_that_cannot_be_taught_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment(build_config(settings(tmp_path)))
    experiment.run(("data",))

    def refused(*args: Any, **options: Any) -> None:
        raise ValueError("none of the 24 answers is left to train on")

    monkeypatch.setattr("ensemw2s.experiments.experiment.StudentTrainer", refused)
    with pytest.raises(ValueError, match=r"^ceiling, taught by truth: none of the 24 answers is left"):
        experiment._train_student("ceiling")
