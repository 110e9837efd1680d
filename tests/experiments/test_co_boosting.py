"""Co-boosting: what each generation is trained on, that no true answer reaches it, and that a crash changes nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from ensemw2s import BoostingConfig, BoostingTrainer, CoBoostingTrainer, StrongModel, StudentConfig, TokenEnsemble
from ensemw2s.data.answers import exact_match
from ensemw2s.data.tokens import tokenize_questions
from ensemw2s.experiments import co_boosting
from ensemw2s.experiments.config import LabellingConfig, build_config, load_config
from ensemw2s.experiments.experiment import Experiment
from ensemw2s.experiments.plan import plan
from ensemw2s.inference import labelling
from ensemw2s.inference.scoring import score_examples
from ensemw2s.report.findings import boosting_weights
from ensemw2s.runtime.files import read_json, read_json_lines
from ensemw2s.runtime.records import MixtureRecord, RoundRecord, of_kind, read_records
from ensemw2s.runtime.store import Store
from ensemw2s.student import relabel, trainer
from tests.boosting_runs import FAST, TRAIN, Trainings, base
from tests.experiments.test_config import write
from tests.experiments.test_experiment import records_of, settings
from tests.student.test_relabel import AB, ANSWERS_OF_MODELS
from tests.tiny import END, FORMAT, llama, lora, questions, tokenizer

HARD = questions(16, seed=8, start=60)
# One in four is answered by all alike.
AGREED = [row_id for place, row_id in enumerate(HARD["id"]) if place % 4 == 0]


def answers(task: Any, batch: list[int]) -> Iterator[dict[str, Any]]:
    """Answer "ab" to agreed questions, and to others "ab" or "ba" as the mixture's size says."""
    alone = len(task.ensemble.experts) == 1
    for i in batch:
        row_id = task.prompts[i]["id"]
        text, ids = ("ab", AB) if row_id in AGREED or alone else ("ba", [AB[0], AB[2], AB[1], *AB[3:]])
        yield {
            "id": row_id, "prompt": task.questions[i]["prompt"], "answer": text, "answer_ids": np.array(ids),
            "num_tokens": len(ids), "finished": True, "confidence": -0.5, "agreement": 1.0,
            "expert_agreement": [1.0] * len(task.ensemble.experts),
        }  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LEAST_ROWS", 2), ("LEAST_SHARE", 0.1)):
        monkeypatch.setattr(relabel, name, value)
    monkeypatch.setattr(labelling, "_label_batch", answers)


def strong(folder: Path, **changes: Any) -> StrongModel:
    training = {"num_train_epochs": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "disable_tqdm": True}
    args = StudentConfig(
        output_dir=str(folder / "unused"), **(training | {"relabel": "cross_fit", "seed": 3} | changes)
    )
    return StrongModel(llama(1), args, tokenizer())


def co_boost(folder: Path, hard: Any = HARD, given: dict[str, Any] | None = None, **changes: Any) -> CoBoostingTrainer:
    args = BoostingConfig(output_dir=str(folder), recipe="co_boosted", **(FAST | {"num_train_epochs": 1} | changes))
    arguments = {
        "model": base(), "strong": strong(folder), "train_dataset": TRAIN, "unlabelled": hard,
        "labelling": LabellingConfig(max_new_tokens=6), "processing_class": tokenizer(), "peft_config": lora(),
        "question_format": FORMAT,
    }  # fmt: skip
    return CoBoostingTrainer(args=args, **(arguments | (given or {})))


def rows_of(dataset: Dataset) -> list[tuple[int, ...]]:
    return [tuple(ids) for ids in tokenize_questions(dataset, tokenizer(), FORMAT)["input_ids"]]


def agreed_rows() -> list[tuple[int, ...]]:
    rows = [{"id": row["id"], "prompt": row["prompt"], "answer": "ab"} for row in HARD if row["id"] in AGREED]
    return rows_of(Dataset.from_list(rows))


def weights_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))}


# What generations are made of


def test_the_second_generation_learns_what_both_answer_alike(tmp_path: Path, trainings: Trainings) -> None:
    told: list[dict[str, Any]] = []
    one = co_boost(tmp_path, given={"on_round": told.append})
    assert one.cost is None and one.question_format == FORMAT
    assert one.processing_class.get_vocab() == tokenizer().get_vocab()
    ensemble = one.train()
    # By its own tokenizer, format and records, as another trainer's.
    assert one.evaluate(questions(4, seed=9, start=100))["eval_loss"] > 0
    assert [record["generation"] for record in told] == [record["generation"] for record in one.records] == [0, 0, 1, 1]
    easy, hard = rows_of(TRAIN), agreed_rows()
    assert [row["rows"] for row in trainings] == [easy, easy, easy + hard, easy + hard]
    assert ensemble.num_experts == 2 and list(ensemble.config.expert_weights) == [1.0, 1.0]
    assert one.expert_folders() == [tmp_path / f"generation-1/rounds/{t}/attempt-1/expert" for t in (1, 2)]
    (judged,) = one.judgements
    assert judged.used and [row["id"] for row in judged.rows if row["agrees"]] == AGREED
    assert one.stop_reason is None
    # No seed is used twice, and each begins with the pre-trained model.
    assert len({row["seed"] for row in trainings}) == 4
    assert all(row["new_adapter"] is not None for row in trainings)


def test_later_generations_take_as_many_steps(tmp_path: Path) -> None:
    validation = questions(6, seed=9, start=200)
    one = co_boost(tmp_path, num_train_epochs=3, given={"eval_dataset": validation})
    ensemble = one.train()
    scores = score_examples(ensemble, tokenize_questions(validation, tokenizer(), FORMAT), pad_token_id=END)
    assert one.evaluate()["eval_accuracy"] == scores.accuracy
    assert one._trainers[1].args.num_train_epochs == 3 * 12 / (12 + len(AGREED))
    first, second = (sum(r["train_tokens"] for r in one.records if r["generation"] == g) for g in (0, 1))
    assert second == pytest.approx(first, rel=0.25)


def test_token_weights_follow_the_soft_error_of_the_mixture_so_far(tmp_path: Path) -> None:
    one = co_boost(tmp_path)
    one.train()
    first, second = one._trainers
    examples = second._train
    folders = [*first.expert_folders(), *second.expert_folders()]
    count = int(second._units.index()[-1]) + 1
    for round_, used in ((1, folders[:2]), (2, folders[:3]), (3, folders)):
        mixture = TokenEnsemble.from_adapters(one._trainers[0]._factory._load(1), used, [1.0] * len(used))
        scores = score_examples(mixture, examples, pad_token_id=END)
        losses = np.clip(-np.expm1(scores.token_log_probs), 0, 1)
        found = np.concatenate(second.token_weights(round_)) / count
        # Uniform weights times exp(c * loss): their logarithms are on a line.
        slope, _ = np.polyfit(losses, np.log(found), 1)
        np.testing.assert_allclose(np.log(found) - np.log(found).mean(), slope * (losses - losses.mean()), atol=1e-4)
        assert slope > 0 and 1 / float((found.astype(float) ** 2).sum()) >= 0.7 * count * (1 - 1e-4)
    # Generation 0 is the default recipe's, whose first weights are uniform.
    assert len({float(w) for row in first.token_weights(1) for w in row}) == 1


def test_uniform_weights_are_the_control(tmp_path: Path, trainings: Trainings) -> None:
    one = co_boost(tmp_path, generation_weights="uniform")
    one.train()
    for training in trainings[2:]:
        assert {float(w) for row in training["weights"] for w in row} == {1.0}
    assert {float(w) for row in trainings[1]["weights"] for w in row} != {1.0}


def test_one_expert_a_generation_trains_itself(tmp_path: Path, trainings: Trainings) -> None:
    own = co_boost(tmp_path, num_rounds=1, given={"strong": strong(tmp_path, relabel_folds=3)})
    assert own.train().num_experts == 1
    assert [len(row["rows"]) for row in trainings] == [12, 12 + len(HARD)]


def test_more_generations_go_on_from_the_last(tmp_path: Path, trainings: Trainings) -> None:
    one = co_boost(tmp_path, generations=2, num_rounds=1)
    one.train()
    assert [judged.generation for judged in one.judgements] == [1, 2] and len(trainings) == 3
    assert one._trainers[2].earlier == one._trainers[1].expert_folders()  # type: ignore[attr-defined]
    assert [(r["generation"], r["round"]) for r in one.records] == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize(
    ("name", "value", "needed"), [("LEAST_ROWS", 5, "at least 5 and 10%"), ("LEAST_SHARE", 0.3, "at least 2 and 30%")]
)
def test_too_few_agreed_answers_leave_the_generation_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: float, needed: str
) -> None:
    monkeypatch.setattr(relabel, name, value)
    one = co_boost(tmp_path)
    too_few = rf"there is no generation 1: 4 of 16 answers to unlabelled questions agree .* \({needed} are needed\)"
    with pytest.warns(UserWarning, match=too_few):
        ensemble = one.train(save_to=tmp_path / "saved")
    assert one.expert_folders() == [tmp_path / f"generation-0/rounds/{t}/attempt-1/expert" for t in (1, 2)]
    assert "there is no generation 1: 4 of 16 answers" in str(one.stop_reason)
    assert "The ensemble is that of generation 0" in read_json(tmp_path / "saved/boosting.json")["stop_reason"]
    assert ensemble.num_experts == 2 and not one.judgements[0].used
    assert cost_of(one)["flops"] == pytest.approx(sum_of_parts(tmp_path, one)["flops"])


def test_answers_without_an_end_leave_nothing_to_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(task: Any, batch: list[int]) -> Iterator[dict[str, Any]]:
        return ({**row, "finished": False} for row in answers(task, batch))

    monkeypatch.setattr(labelling, "_label_batch", endless)
    one = co_boost(tmp_path)
    one.train()
    assert one.judgements[0].rows == [] and "0 of 0 answers" in str(one.stop_reason)


# Truth, crashes, costs


def test_true_answers_of_unlabelled_questions_reach_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelling, "_label_batch", ANSWERS_OF_MODELS)
    monkeypatch.setattr(relabel, "LEAST_ROWS", 0)
    monkeypatch.setattr(relabel, "LEAST_SHARE", 0.0)
    poisoned = HARD.remove_columns("answer").add_column("answer", ["poison"] * len(HARD))
    for name, hard in (("true", HARD), ("poisoned", poisoned)):
        co_boost(tmp_path / name, hard, num_rounds=1).train()
    assert weights_of(tmp_path / "true") == weights_of(tmp_path / "poisoned")
    assert len(weights_of(tmp_path / "true")) >= 4
    written = [file for file in (tmp_path / "poisoned").rglob("*.json*") if "poison" in file.read_text()]
    assert not written


def test_a_crash_anywhere_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = co_boost(tmp_path / "whole", num_rounds=1)
    whole.train()
    steps: list[str] = []
    deaths = [1, 3, 5, 8, 12, 15, 0]

    def dies(module: Any, name: str) -> None:
        own = getattr(module, name)

        def dying(*args: Any, **options: Any) -> Any:
            steps.append(name)
            if len(steps) == deaths[0]:
                del deaths[0]
                raise KeyboardInterrupt
            return own(*args, **options)

        monkeypatch.setattr(module, name, dying)

    dies(trainer, "fine_tune")
    dies(co_boosting.BoostingTrainer, "_judged")
    dies(co_boosting, "_keep_judged")
    dies(labelling, "_label_batch")
    dies(co_boosting, "write_json")
    crashes = 0
    while True:
        resumed = co_boost(tmp_path / "cut", num_rounds=1)
        try:
            resumed.train()
            break
        except KeyboardInterrupt:
            crashes += 1
    assert crashes >= 5
    assert weights_of(tmp_path / "cut") == weights_of(tmp_path / "whole")
    assert {name: cost_of(resumed)[name] for name in ("tokens", "flops")} == {
        name: cost_of(whole)[name] for name in ("tokens", "flops")
    }
    assert resumed.judgements == whole.judgements


def cost_of(one: CoBoostingTrainer) -> dict[str, float]:
    assert one.cost is not None
    return asdict(one.cost)


def sum_of_parts(folder: Path, one: CoBoostingTrainer) -> dict[str, float]:
    """Return what all that lies in the folder took: experts, students of folds, answers."""
    costs = [read_json(file) for file in folder.rglob("cost.json") if file.parent not in (folder,)]
    costs = [read_json(file) for file in folder.rglob("expert/cost.json")]
    costs += [read_json(file) for file in folder.rglob("fold-?/cost.json")]
    costs += [read_json(file) for file in folder.rglob("round-1/fold-?.json")]
    costs += [read_json(file) for file in folder.rglob("labelled.json")]
    return {name: sum(cost[name] for cost in costs) for name in ("tokens", "flops")}


def test_its_cost_holds_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelling, "_label_batch", ANSWERS_OF_MODELS)
    one = co_boost(tmp_path, num_rounds=1)
    one.train()
    parts = sum_of_parts(tmp_path, one)
    assert len(list(tmp_path.rglob("fold-?/cost.json"))) == 2 and parts["flops"] > 0
    assert {name: cost_of(one)[name] for name in parts} == pytest.approx(parts)
    assert cost_of(one)["seconds"] > 0


def test_two_arms_share_experts_and_judges(tmp_path: Path, trainings: Trainings) -> None:
    store = Store(tmp_path / "store")
    boosted = co_boost(tmp_path / "one", given={"store": store})
    boosted.train()
    uniform = co_boost(tmp_path / "two", given={"store": store}, generation_weights="uniform")
    uniform.train()
    # Generation 0 and the judges were there; the judges' cost counts for both.
    assert len(trainings) == 6 and not (tmp_path / "two/answers-1/relabel").exists()
    names = ("tokens", "flops")
    judging = [read_json(tmp_path / name / "agreed-1/cost.json") for name in ("one", "two")]
    assert judging[0] == judging[1] and all(judging[0][name] > 0 for name in names)


def test_what_is_gone_on_with_must_be_the_same(tmp_path: Path) -> None:
    co_boost(tmp_path, num_rounds=1).train()
    for changes in ({"learning_rate": 1e-3}, {"generation_weights": "uniform"}, {"num_rounds": 2}):
        with pytest.raises(
            ValueError, match=rf"holds a co-boosting run of another .*differing: .*{next(iter(changes))}"
        ):
            co_boost(tmp_path, **({"num_rounds": 1} | changes)).train()
    other = {"strong": strong(tmp_path, learning_rate=2e-2)}
    with pytest.raises(ValueError, match=r"differing: strong\.learning_rate"):
        co_boost(tmp_path, num_rounds=1, given=other).train()
    with pytest.raises(ValueError, match="differing: unlabelled"):
        co_boost(tmp_path, HARD.select(range(10)), num_rounds=1).train()
    again = co_boost(tmp_path, num_rounds=1, given=other, overwrite=True)
    again.train()
    assert again.judgements[0].used


# Refusals


def test_what_it_cannot_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r'recipe="co_boosted" needs unlabelled questions and a strong model: use CoBoo'
    ):
        args = BoostingConfig(output_dir=str(tmp_path), recipe="co_boosted")
        BoostingTrainer(base(), args, TRAIN, processing_class=tokenizer(), question_format=FORMAT)
    with pytest.raises(ValueError, match=r'args.recipe is \'tempered\', expected "co_boosted"'):
        args = BoostingConfig(output_dir=str(tmp_path))
        CoBoostingTrainer(base(), strong(tmp_path), args, TRAIN, HARD)
    with pytest.raises(ValueError, match="generations=2 does nothing without recipe="):
        BoostingConfig(output_dir=str(tmp_path), generations=2)
    with pytest.raises(ValueError, match="generations must be from 1 to 10, got 0"):
        BoostingConfig(output_dir=str(tmp_path), recipe="co_boosted", generations=0)
    with pytest.raises(ValueError, match="relabel=None, and students that judge answers need 'cross_fit'"):
        strong(tmp_path, relabel=None)
    with pytest.raises(ValueError, match="relabel_rounds=2, and students that judge answers need 1"):
        strong(tmp_path, relabel_rounds=2)
    with pytest.raises(TypeError, match="CoBoostingTrainer: args is a StudentConfig, expected a BoostingConfig"):
        CoBoostingTrainer(base(), strong(tmp_path), strong(tmp_path).args, TRAIN, HARD)  # type: ignore[arg-type]
    named = re.escape(
        "strong is 'scratch:char-strong', expected the model with how its students are trained: give "
        'StrongModel(source, StudentConfig(output_dir="unused", relabel="cross_fit"))'
    )
    with pytest.raises(TypeError, match=named):
        co_boost(tmp_path, given={"strong": "scratch:char-strong"})
    with pytest.raises(TypeError, match="StrongModel: args is a BoostingConfig, expected a StudentConfig"):
        StrongModel("scratch:char-strong", BoostingConfig(output_dir=str(tmp_path)))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"labelling is \{'max_new_tokens': 6\}, expected a LabellingConfig"):
        co_boost(tmp_path, given={"labelling": {"max_new_tokens": 6}})
    with pytest.raises(ValueError, match=r"is in both train_dataset and unlabelled: remove it from one"):
        co_boost(tmp_path, TRAIN)
    with pytest.raises(ValueError, match=r"is in both eval_dataset and unlabelled: remove it from one"):
        co_boost(tmp_path, given={"eval_dataset": HARD})
    with pytest.raises(ValueError, match="unlabelled has no column 'prompt'"):
        co_boost(tmp_path, Dataset.from_dict({"question": ["a"]}))


# In an experiment


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("co-boosted")
    changes: dict[str, Any] = {
        "ensembles": {
            "tempered": {"recipe": "tempered"},
            "uniform": {"recipe": "co_boosted", "generation_weights": "uniform"},
        },
        "equal_cost": True,
        "students": {"student_ensemble": {"teacher": "ensemble"}, "ceiling": {"teacher": "truth"}},
    }
    values = settings(folder, **changes)
    values["boosting"] = values["boosting"] | {"recipe": "co_boosted"}
    values["student"] = values["student"] | {"num_train_epochs": 2}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(relabel, "LEAST_ROWS", 0)
        patched.setattr(relabel, "LEAST_SHARE", 0.0)
        Experiment(build_config(values)).run()
    return folder / "run" / "small"


def test_an_experiment_takes_the_recipe_for_any_ensemble(finished: Path) -> None:
    rounds = [(r["arm"], r.get("generation", 0), r["round"]) for r in records_of(finished, "round")]
    for arm in ("ensemble", "uniform"):
        assert {(g, number) for a, g, number in rounds if a == arm} == {(0, 1), (0, 2), (1, 3), (1, 4)}
    mixtures = {record["arm"]: record for record in records_of(finished, "mixture")}
    assert [len(mixtures[arm]["experts"]) for arm in ("ensemble", "uniform", "tempered")] == [2, 2, 2]
    assert all("generation-1" in path for path in mixtures["ensemble"]["experts"])
    experts = {arm: (finished / mixtures[arm]["experts"][0]).resolve() for arm in ("tempered",)}
    zero = finished / "boosting/generation-0/rounds/1/attempt-1/expert/adapter_model.safetensors"
    assert zero.samefile(experts["tempered"] / "adapter_model.safetensors")
    assert {r["arm"] for r in records_of(finished, "answers")} >= {"ensemble", "uniform", "student_ensemble"}
    assert (finished / "report.html").exists()


def test_the_records_say_on_how_many_answers_was_agreed(finished: Path) -> None:
    truth = {row["id"]: row["answer"] for row in read_json_lines(finished / "data/unlabelled.jsonl")}
    found = {record["arm"]: record for record in records_of(finished, "relabel")}
    assert list(found) == ["ensemble", "uniform"] and found["ensemble"]["generation"] == 1
    rows = read_json_lines(finished / "boosting/agreed-1/answers.jsonl")
    right = exact_match([row["teacher_answer"] for row in rows], [truth[row["id"]] for row in rows]).mean()
    assert found["ensemble"]["teacher_accuracy"] == right and found["ensemble"]["n"] == len(rows)


def test_its_cost_is_that_of_the_arm_and_decides_equal_cost(finished: Path) -> None:
    costs = {record["arm"]: record for record in records_of(finished, "cost")}
    own = read_json(finished / "boosting/cost.json")
    assert costs["ensemble"]["train_flops"] == own["flops"] > costs["tempered"]["train_flops"]
    assert costs["equal_cost"]["train_flops"] == pytest.approx(own["flops"], rel=0.15)


def test_the_mixtures_weights_are_those_of_the_last_generation(finished: Path) -> None:
    records = read_records(finished)
    (mixture,) = of_kind(records, MixtureRecord, arm="ensemble")
    rounds = of_kind(records, RoundRecord, arm="ensemble")
    alphas = boosting_weights(mixture, rounds)
    assert alphas == [record.expert_weight for record in rounds if record.generation == 1]


def test_a_plan_foresees_judges_and_generations(finished: Path) -> None:
    config = load_config(finished)
    estimate = {phase.phase: phase for phase in plan(config)}["boost"]
    (taken,) = [r for r in records_of(finished, "phase") if r["phase"] == "boost"]
    # What arms share is estimated for each; how many answers agree is not known.
    assert taken["flops"] < estimate.flops < 2 * taken["flops"]


def test_figures_of_studies_before_hold(tmp_path: Path) -> None:
    path = write(tmp_path, settings(tmp_path))
    resolved = load_config(path).results_key()["resolved"]["ensemble"]
    assert not [name for name in resolved if name.startswith("generation")]
    co_boosted = load_config(path, ["boosting.recipe=co_boosted"]).results_key()["resolved"]["ensemble"]
    assert (co_boosted["generations"], co_boosted["generation_weights"]) == (1, "boosted")
