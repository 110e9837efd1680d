"""Cross-fitted relabelling: who is asked what, which answers are kept, and that a crash changes nothing."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn

from ensemw2s import TokenEnsemble
from ensemw2s.data.difficulty import assign_folds
from ensemw2s.data.tokens import QuestionFormat, asked_in, tokenize_questions
from ensemw2s.inference import labelling
from ensemw2s.inference.label_files import read_labels
from ensemw2s.models.loading import load_saved_model
from ensemw2s.runtime import files
from ensemw2s.runtime.files import read_json, read_json_lines
from ensemw2s.student import relabel, trainer
from ensemw2s.student.answers import usable_answers, with_gold
from ensemw2s.student.trainer import StudentConfig, StudentTrainer
from ensemw2s.training.fine_tune import fine_tune
from tests.runtime.test_processes import launch
from tests.tiny import FORMAT, VOCAB, Watch, llama, lora, questions, saved_adapters, tokenizer

IDS = torch.randint(2, VOCAB, (3, 8), generator=torch.Generator().manual_seed(0))
COUNT = 24
# Every sixth answer is one that nobody could guess.
ODD = {f"q{i}" for i in range(5, COUNT, 6)}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def config(folder: Path, **settings: Any) -> StudentConfig:
    defaults = {
        "use_cpu": True, "num_train_epochs": 1, "learning_rate": 1e-2, "disable_tqdm": True, "seed": 5,
        "per_device_train_batch_size": 6, "lr_scheduler_type": "constant", "relabel": "cross_fit",
    }  # fmt: skip
    return StudentConfig(output_dir=str(folder), **(defaults | settings))


def answers_of(count: int = COUNT, odd: str = "{}zy") -> Dataset:
    """What a teacher says: "ab" to nearly every question, and something of its own to the odd ones."""
    rows = [
        {"id": row["id"], "prompt": row["prompt"], "answer": odd.format(i) if row["id"] in ODD else "ab"}
        for i, row in enumerate(questions(count))
    ]
    return Dataset.from_list(rows)


def student(folder: Path, answers: Any = None, given: dict[str, Any] | None = None, **settings: Any) -> StudentTrainer:
    """A trainer that relabels; `given` are arguments of its own, `settings` those of its configuration."""
    arguments = {"processing_class": tokenizer(), "question_format": FORMAT} | (given or {})
    model = arguments.pop("model", None) or llama(1)
    return StudentTrainer(model, config(folder, **settings), answers_of() if answers is None else answers, **arguments)


AB = FORMAT.answer_ids("ab", tokenizer(), "x")
ANSWERS_OF_MODELS = labelling._label_batch


def says_ab(task: Any, batch: list[int]) -> Iterator[dict[str, Any]]:
    """Answer as a model that has learned what nearly all answers are; which model it is plays no part."""
    for i in batch:
        yield {
            "id": task.prompts[i]["id"], "prompt": task.questions[i]["prompt"], "answer": "ab",
            "answer_ids": np.array(AB[: task.settings.max_new_tokens]),
            "num_tokens": min(len(AB), task.settings.max_new_tokens),
            "finished": len(AB) <= task.settings.max_new_tokens, "confidence": -0.5, "agreement": 1.0,
            "expert_agreement": [1.0],
        }  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few answers are enough, and no test waits for a model to learn them."""
    monkeypatch.setattr(relabel, "LEAST_ROWS", 2)
    monkeypatch.setattr(labelling, "_label_batch", says_ab)


@pytest.fixture
def models_answer(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    monkeypatch.setattr(labelling, "_label_batch", ANSWERS_OF_MODELS)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was given to every training, in turn."""
    calls: list[dict[str, Any]] = []

    def recorded(model: Any, examples: Dataset, args: Any, **options: Any) -> Any:
        trained, cost = fine_tune(model, examples, args, **options)
        calls.append({
            "rows": [tuple(ids) for ids in examples["input_ids"]], "seed": options["seed"], "cost": cost,
            "epochs": args.num_train_epochs, "options": options,
        })  # fmt: skip
        return trained, cost

    monkeypatch.setattr(trainer, "fine_tune", recorded)
    return calls


def rows_of(answers: Dataset) -> list[tuple[int, ...]]:
    return [tuple(ids) for ids in tokenize_questions(answers, tokenizer(), FORMAT)["input_ids"]]


# Who judges, and what becomes of it


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_a_student_is_trained_on_the_answers_that_others_gave_as_well(tmp_path: Path, peft_config: Any) -> None:
    one = student(tmp_path / "one", given={"peft_config": peft_config})
    judged = one.relabel()
    assert judged["id"] == answers_of()["id"]
    assert judged["answer"] == judged["teacher_answer"] == answers_of()["answer"]
    assert judged["kept"] == judged["agrees"] == [row_id not in ODD for row_id in judged["id"]]
    trained = one.train()
    kept = answers_of().filter(lambda row: row["id"] not in ODD)
    assert one.train_dataset["id"] == kept["id"]
    assert read_json_lines(tmp_path / "one/relabel/answers.jsonl") == [
        {name: row[name] for name in ("id", "answer", "teacher_answer", "agrees", "kept")} for row in judged
    ]
    # As many steps as on all answers.
    args = config(tmp_path / "two", relabel=None, num_train_epochs=COUNT / len(kept))
    plain = StudentTrainer(llama(1), args, kept, tokenizer(), peft_config, FORMAT).train()
    assert torch.equal(logits(trained), logits(plain))


def test_no_fold_is_judged_by_a_student_that_saw_a_label_for_it(
    tmp_path: Path, trainings: list[dict[str, Any]]
) -> None:
    answers = answers_of()
    student(tmp_path, relabel_folds=3).train()
    *folds, last = trainings
    rows = rows_of(answers)
    seen = [{rows.index(row) for row in fold["rows"]} for fold in folds]
    left_out = [set(range(COUNT)) - own for own in seen]
    assert len(folds) == 3 and set.union(*left_out) == set(range(COUNT))
    assert sum(map(len, left_out)) == COUNT and max(map(len, left_out)) == 8
    for index, asked in enumerate(left_out):
        found = read_json_lines(tmp_path / f"relabel/round-1/fold-{index + 1}.jsonl")
        assert {row["id"] for row in found} == {answers["id"][place] for place in asked}
    # As many answers as a plain student sees, with seeds of their own.
    assert [fold["epochs"] for fold in folds] == [3 / 2] * 3
    assert len({fold["seed"] for fold in trainings}) == 4 and last["seed"] == 5


def test_answers_of_a_fold_do_not_reach_its_student(tmp_path: Path) -> None:
    fold = assign_folds(answers_of(), 2, _fold_seed(5))
    changed = answers_of()
    other = ["zz" if fold[i] == 0 else text for i, text in enumerate(changed["answer"])]
    changed = changed.remove_columns("answer").add_column("answer", other)
    student(tmp_path / "one").relabel()
    student(tmp_path / "two", changed).relabel()
    weights = [tmp_path / name / "relabel/round-1/fold-1/model.safetensors" for name in ("one", "two")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    second = [file.parent.with_name("fold-2") / file.name for file in weights]
    assert second[0].read_bytes() != second[1].read_bytes()


def _fold_seed(seed: int) -> int:
    return int(np.random.SeedSequence(seed, spawn_key=(1,)).generate_state(3)[0])


@pytest.mark.usefixtures("models_answer")
@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_a_fold_is_answered_by_its_own_student(tmp_path: Path, peft_config: Any) -> None:
    student(tmp_path, given={"peft_config": peft_config}).relabel()
    for name in ("fold-1", "fold-2"):
        folder = tmp_path / "relabel/round-1" / name
        if peft_config is None:
            ensemble = TokenEnsemble.from_models([load_saved_model(folder, name)], [1.0])
        else:
            ensemble = TokenEnsemble.from_adapters(llama(1), [folder], [1.0])
        found = read_labels(folder.with_suffix(".jsonl"))
        asked = [{"id": row["id"], "prompt": row["prompt"]} for row in found]
        expected = ensemble.label(asked, tokenizer(), question_format=FORMAT, max_new_tokens=2 * 6, description=None)
        assert {row["id"]: row["answer"] for row in found} == dict(zip(expected["id"], expected["answer"], strict=True))
        assert len({row["answer"] for row in found}) > 1


def test_a_question_asked_twice_is_in_one_fold(tmp_path: Path, trainings: list[dict[str, Any]]) -> None:
    twice = answers_of(12).remove_columns("id")
    twice = concatenate_datasets([twice, twice])
    student(tmp_path, twice).relabel()
    for fold in trainings:
        assert all(fold["rows"].count(row) == 2 for row in fold["rows"])


def test_folds_do_not_depend_on_the_order_of_the_rows(tmp_path: Path, trainings: list[dict[str, Any]]) -> None:
    student(tmp_path / "one").relabel()
    student(tmp_path / "two", answers_of().select(range(COUNT - 1, -1, -1))).relabel()
    assert [sorted(fold["rows"]) for fold in trainings[:2]] == [sorted(fold["rows"]) for fold in trainings[2:]]


def test_unusable_answers_are_neither_taught_nor_asked(tmp_path: Path, trainings: list[dict[str, Any]]) -> None:
    answers = answers_of().add_column("finished", [i != 0 for i in range(COUNT)])
    answers = answers.add_column("confidence", [-5.0 if i == 1 else -0.1 for i in range(COUNT)])
    judged = student(tmp_path, answers, min_confidence=-1.0).relabel()
    assert judged["id"] == answers["id"][2:]
    taught = {row for fold in trainings for row in fold["rows"]}
    assert taught == set(rows_of(answers.select(range(2, COUNT))))


def test_with_all_an_answer_gives_way_to_that_of_its_folds_student(tmp_path: Path) -> None:
    answers = answers_of().add_column("finished", [True] * COUNT).add_column("agreement", [1.0] * COUNT)
    one = student(tmp_path, answers, relabel_keep="all")
    judged = one.relabel()
    assert judged["kept"] == [True] * COUNT
    assert judged["teacher_answer"] == answers["answer"]
    assert judged["answer"] == ["ab"] * COUNT
    assert judged["agrees"] == [row_id not in ODD for row_id in judged["id"]]
    # It was the teacher's.
    assert "agreement" not in judged.column_names
    trained = one.train()
    plain = StudentTrainer(
        llama(1), config(tmp_path / "plain", relabel=None), judged.select_columns(["id", "prompt", "answer"]),
        tokenizer(), question_format=FORMAT,
    ).train()  # fmt: skip
    assert torch.equal(logits(trained), logits(plain))


def test_answers_that_do_not_end_replace_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "longest_answer", lambda examples, window: 2)
    judged = student(tmp_path / "all", relabel_keep="all").relabel()
    assert judged["answer"] == judged["teacher_answer"] and not any(judged["agrees"])


def test_a_folds_student_may_say_twice_as_much_as_the_teacher_but_not_beyond_its_context() -> None:
    examples = tokenize_questions(answers_of(), tokenizer(), FORMAT)
    longest = max(len(ids) - start for ids, start in zip(examples["input_ids"], examples["prompt_length"], strict=True))
    assert relabel.longest_answer(examples, None) == relabel.longest_answer(examples, 128) == 2 * longest
    assert relabel.longest_answer(examples, max(examples["prompt_length"]) + 3) == 3


@pytest.mark.parametrize(("name", "value"), [("LEAST_ROWS", COUNT), ("LEAST_SHARE", 0.9)])
def test_too_little_agreement_falls_back_to_all_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: float
) -> None:
    monkeypatch.setattr(relabel, name, value)
    one = student(tmp_path)
    with pytest.warns(UserWarning, match=r"training student: 20 of 24 answers agree .* at least \d+ and \d+%: all"):
        judged = one.relabel()
    assert judged["kept"] == [True] * COUNT and set(judged["answer"]) == {"ab"}


def test_a_second_round_begins_with_what_the_first_left(tmp_path: Path, trainings: list[dict[str, Any]]) -> None:
    judged = student(tmp_path / "agree", relabel_rounds=2).relabel()
    assert [len(fold["rows"]) for fold in trainings] == [12, 12, 10, 10]
    assert [fold["epochs"] for fold in trainings] == pytest.approx([2, 2, 2.4, 2.4])
    taught = {row for fold in trainings[2:] for row in fold["rows"]}
    assert taught == set(rows_of(answers_of().filter(lambda row: row["id"] not in ODD)))
    assert judged["kept"] == [row_id not in ODD for row_id in judged["id"]]
    trainings.clear()
    judged = student(tmp_path / "all", relabel_rounds=2, relabel_keep="all").relabel()
    assert {row for fold in trainings[2:] for row in fold["rows"]} == set(rows_of(judged))
    assert judged["agrees"] == [True] * COUNT and judged["teacher_answer"] == answers_of()["answer"]


def test_choices_are_judged_by_the_choice(tmp_path: Path) -> None:
    answers = answers_of().add_column("choices", [["ab", text] if text != "ab" else ["ab", "k"] for text in
                                                  answers_of()["answer"]])  # fmt: skip
    judged = student(tmp_path, answers).relabel()
    found = {
        row["id"]: row["answer"] for i in (1, 2) for row in read_labels(tmp_path / f"relabel/round-1/fold-{i}.jsonl")
    }
    assert all(found[row["id"]] in row["choices"] for row in answers)
    assert judged["agrees"] == [found[row["id"]] == row["teacher_answer"] for row in judged]


# Ground truth beside the answers


def test_gold_answers_are_taught_to_all_and_asked_of_none(tmp_path: Path, trainings: list[dict[str, Any]]) -> None:
    easy = questions(6, seed=9, start=50)
    taught = with_gold(answers_of(), easy)
    assert taught["id"] == list(answers_of()["id"]) + [f"gold {row_id}" for row_id in easy["id"]]
    one = student(tmp_path, taught, min_confidence=None)
    one.train()
    gold = set(rows_of(easy))
    assert all(gold <= set(training["rows"]) for training in trainings)
    # 24 answers are to be seen, whatever is beside them.
    assert [t["epochs"] for t in trainings] == pytest.approx([24 / 18, 24 / 18, 24 / 26])
    asked = [row["id"] for i in (1, 2) for row in read_json_lines(tmp_path / f"relabel/round-1/fold-{i}.jsonl")]
    assert sorted(asked) == sorted(answers_of()["id"])
    assert one.train_dataset["gold"] == [False] * 20 + [True] * 6


def test_with_gold_answers_a_student_keeps_to_the_format_of_its_teachers(tmp_path: Path) -> None:
    odd = QuestionFormat(prompt_template="{prompt}=", answer_prefix="")
    for answers, asked in ((asked_in(answers_of(), odd), odd), (answers_of(), QuestionFormat())):
        taught = with_gold(answers, questions(6, seed=9, start=50))
        args = StudentConfig(output_dir=str(tmp_path), use_cpu=True)
        assert StudentTrainer(llama(1), args, taught, processing_class=tokenizer()).question_format == asked


def test_gold_answers_take_no_steps_of_their_own_without_relabelling(
    tmp_path: Path, trainings: list[dict[str, Any]]
) -> None:
    taught = with_gold(answers_of(), questions(8, seed=9, start=50))
    student(tmp_path, taught, relabel=None).train()
    assert trainings[0]["epochs"] == 24 / 32 and len(trainings[0]["rows"]) == 32


def test_no_filter_leaves_gold_answers_out() -> None:
    answers = answers_of(4).add_column("finished", [True, True, False, True])
    answers = answers.add_column("confidence", [-0.1, -3.0, -0.1, -0.2])
    taught = with_gold(answers, questions(3, seed=9, start=50))
    gold = ["gold q50", "gold q51", "gold q52"]
    assert usable_answers(taught, min_confidence=-1.0)["id"] == ["q0", "q3", *gold]
    assert usable_answers(taught, keep_fraction=0.25)["id"] == ["q0", *gold]
    assert usable_answers(taught)["finished"] == [True] * 6
    with pytest.raises(ValueError, match="row 0: gold is 'yes', expected true"):
        usable_answers([{"prompt": "a", "answer": "b", "gold": "yes"}])


# Interruptions


def results(folder: Path, trained: StudentTrainer) -> tuple[Any, ...]:
    assert trained.cost is not None
    weights = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*.safetensors"))}
    return weights, trained.train_dataset["id"], trained.cost.tokens, trained.cost.flops


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_a_crash_anywhere_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peft_config: Any) -> None:
    given = {"peft_config": peft_config}
    monkeypatch.setattr(labelling, "_label_batch", ANSWERS_OF_MODELS)
    whole = student(tmp_path / "whole", given=given, per_device_eval_batch_size=4)
    whole.train()
    steps: list[str] = []
    deaths = iter((2, 5, 9, 14))
    next_death = [next(deaths)]

    def step(name: str) -> None:
        steps.append(name)
        if len(steps) == next_death[0]:
            next_death[0] = next(deaths, 0)
            raise KeyboardInterrupt

    for module, name in ((trainer, "fine_tune"), (labelling, "_label_batch"), (files, "keep")):
        own = getattr(module, name)

        def dying(*args: Any, own: Any = own, name: str = name, **options: Any) -> Any:
            step(name)
            return own(*args, **options)

        monkeypatch.setattr(module, name, dying)
    crashes = 0
    while True:
        try:
            resumed = student(tmp_path / "cut", given=given, per_device_eval_batch_size=4)
            resumed.train()
            break
        except KeyboardInterrupt:
            crashes += 1
    assert crashes == 4 and {"fine_tune", "_label_batch", "keep"} <= set(steps)
    assert results(tmp_path / "cut", resumed) == results(tmp_path / "whole", whole)


def test_what_was_made_is_not_made_again(tmp_path: Path, trainings: list[dict[str, Any]]) -> None:
    first = student(tmp_path).relabel()
    again = student(tmp_path)
    assert again.relabel().to_list() == first.to_list() and len(trainings) == 2
    again.train()
    assert len(trainings) == 3
    with pytest.raises(RuntimeError, match="this student is trained already"):
        student_of = student(tmp_path / "plain", relabel_keep="all")
        student_of.train()
        student_of._relabelled = None
        student_of.relabel()


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"num_train_epochs": 5}, "num_train_epochs"), ({"seed": 6}, "seed"), ({"relabel_folds": 3}, "relabel_folds"),
        ({"given": {"model": "other"}}, "model"), ({"answers": "other"}, "answers"),
        ({"given": {"peft_config": lora()}}, "peft_config"),
    ],
)  # fmt: skip
def test_what_another_configuration_left_is_refused(tmp_path: Path, changes: dict[str, Any], differing: str) -> None:
    student(tmp_path).relabel()
    changes = dict(changes)
    if changes.get("given", {}).get("model") == "other":
        changes["given"] = {"model": llama(2)}
    if changes.get("answers") == "other":
        changes["answers"] = answers_of(odd="{}xy")
    with pytest.raises(ValueError, match=rf"relabel holds a relabelling of another .*differing: .*\b{differing}\b"):
        student(tmp_path, **changes).relabel()


def test_a_damaged_student_or_answer_is_named(tmp_path: Path) -> None:
    student(tmp_path).relabel()
    file = tmp_path / "relabel/round-1/fold-2.jsonl"
    file.write_text(file.read_text().replace('"ab"', '"ac"', 1))
    with pytest.raises(ValueError, match=r"fold-2\.jsonl is damaged"):
        student(tmp_path).relabel()
    weights = tmp_path / "relabel/round-1/fold-1/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"fold-1/model\.safetensors is damaged"):
        student(tmp_path).relabel()


def test_checkpoints_are_gone_when_a_student_is_kept(tmp_path: Path) -> None:
    one = student(tmp_path / "steps", save_strategy="steps", save_steps=3)
    other = student(tmp_path / "plain")
    assert torch.equal(logits(one.train()), logits(other.train()))
    assert not list((tmp_path / "steps").rglob("checkpoint*"))


# Costs


@pytest.mark.usefixtures("models_answer")
def test_a_student_costs_what_its_folds_and_their_answers_do(tmp_path: Path, trainings: list[dict[str, Any]]) -> None:
    one = student(tmp_path)
    one.train()
    answering = [read_json(tmp_path / f"relabel/round-1/fold-{i}.json") for i in (1, 2)]
    parts = [asdict_of(training["cost"]) for training in trainings] + answering
    assert len(parts) == 5 and all(part["flops"] > 0 and part["tokens"] > 0 for part in parts)
    assert one.cost is not None
    for name in ("seconds", "tokens", "flops"):
        assert getattr(one.cost, name) == pytest.approx(sum(part[name] for part in parts))
    assert read_json(tmp_path / "cost.json") == asdict_of(one.cost)


def asdict_of(cost: Any) -> dict[str, Any]:
    return {name: getattr(cost, name) for name in ("seconds", "tokens", "flops")}


# Variants, and settings


def test_the_confidence_loss_goes_with_it(tmp_path: Path, trainings: list[dict[str, Any]]) -> None:
    student(tmp_path, variant="confidence").train()
    assert all(training["options"]["trainer_class"].__name__ == "ConfidenceTrainer" for training in trainings)


@pytest.fixture
def teacher(tmp_path: Path) -> TokenEnsemble:
    return TokenEnsemble.from_adapters(llama(0), saved_adapters(tmp_path / "experts"), [2.5, 1.25, 0.5])


def soft_answers(teacher: TokenEnsemble, **settings: Any) -> Dataset:
    options: dict[str, Any] = {"question_format": FORMAT, "max_new_tokens": 3, "description": None}
    return teacher.label(questions(12), tokenizer(), **(options | settings))


@pytest.mark.usefixtures("models_answer")
def test_soft_students_keep_the_cache_of_the_answers_that_are_kept(tmp_path: Path, teacher: TokenEnsemble) -> None:
    answers = soft_answers(teacher, top_logprobs=4)
    one = student(tmp_path / "s", answers, variant="soft", keep_unfinished=True)
    with pytest.warns(
        UserWarning, match=r"\d of 12 answers agree .*: all answers are used, the teacher's, as they are"
    ):
        one.train()
    # None could be replaced, since the cache goes along the teacher's.
    assert one.train_dataset["answer"] == answers["answer"]
    assert one.train_dataset["top_log_probs"] == answers["top_log_probs"]
    with pytest.raises(
        ValueError, match=r'relabel_keep="all" replaces answers, and the cache .* use relabel_keep="agree"'
    ):
        student(tmp_path / "t", answers, variant="soft", keep_unfinished=True, relabel_keep="all")


@pytest.mark.parametrize("top_logprobs", [None, 4])
def test_a_running_teacher_judges_any_answer(tmp_path: Path, teacher: TokenEnsemble, top_logprobs: int | None) -> None:
    answers = answers_of()
    settings = {"variant": "soft", "relabel_keep": "all", "top_logprobs": top_logprobs, "soft_weight": 0.5}
    one = student(tmp_path / "s", answers, {"teacher": teacher}, **settings)
    trained = one.train()
    assert one.train_dataset["answer"] == ["ab"] * COUNT
    plain = settings | {"relabel": None, "relabel_keep": "agree"}
    judged = one.train_dataset.select_columns(["id", "prompt", "answer"])
    assert torch.equal(logits(trained), logits(student(tmp_path / "t", judged, {"teacher": teacher}, **plain).train()))


def test_callbacks_see_every_training(tmp_path: Path) -> None:
    watch = Watch()
    student(tmp_path, given={"callbacks": [watch]}).train()
    assert watch.trainings == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"relabel": None, "relabel_folds": 3}, r'relabel_folds=3 does nothing without relabel="cross_fit"'),
        ({"relabel": None, "relabel_keep": "all"}, r"relabel_keep='all' does nothing without relabel"),
        ({"relabel": None, "relabel_rounds": 2}, r"relabel_rounds=2 does nothing without relabel"),
        ({"relabel": "in_sample"}, "relabel must be one of cross_fit, got 'in_sample'"),
        ({"relabel_folds": 1}, "relabel_folds must be at least 2, got 1"),
        ({"relabel_rounds": 3}, "relabel_rounds must be from 1 to 2, got 3"),
        ({"relabel_keep": "most"}, "relabel_keep must be one of agree, all, got 'most'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


def test_truth_is_not_relabelled(tmp_path: Path) -> None:
    assert config(tmp_path).on_truth["relabel"] is None


def test_what_cannot_be_relabelled_is_refused_before_any_training(tmp_path: Path, teacher: TokenEnsemble) -> None:
    with pytest.raises(ValueError, match="relabel_folds=13 leaves folds without a question: 12 answers to 12"):
        student(tmp_path, answers_of(12), relabel_folds=13)
    model = llama(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizers holds an optimizer of one model's weights, and with relabel"):
        student(tmp_path, given={"model": model, "optimizers": (optimizer, None)})
    endless = {"question_format": type(FORMAT)(FORMAT.prompt_template, FORMAT.answer_prefix, end_token=False)}
    with pytest.raises(ValueError, match="relabel lets students answer, and the format has end_token=False"):
        student(tmp_path, given=endless)
    gold = with_gold(answers_of(), questions(2, seed=9, start=50))
    with pytest.raises(ValueError, match='variant="soft" learns distributions, which gold answers do not have'):
        student(tmp_path, gold, {"teacher": teacher}, variant="soft")
    with pytest.raises(ValueError, match="relabel is None: make the trainer with"):
        student(tmp_path, relabel=None).relabel()
    assert not list(tmp_path.glob("relabel"))


# Several processes

WORKER = """
import sys
from pathlib import Path
from ensemw2s.runtime import processes
from ensemw2s.inference import labelling
from ensemw2s.student import relabel
from tests.student.test_relabel import says_ab, student

processes.start()
relabel.LEAST_ROWS, labelling._label_batch = 2, says_ab
trainer = student(Path(sys.argv[1]), per_device_train_batch_size=3)
trainer.train()
said = repr((trainer.train_dataset["id"][:], trainer.cost.tokens))
(Path(sys.argv[1]) / f"process-{processes.index()}").write_text(said)
processes.end()
"""


@pytest.mark.slow
def test_two_processes_relabel_like_one(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    run = launch(tmp_path / "worker.py", tmp_path / "two")
    assert run.returncode == 0, run.stderr
    one = student(tmp_path / "one")
    one.train()
    (said,) = {(tmp_path / "two" / f"process-{index}").read_text() for index in range(2)}
    ids, tokens = ast.literal_eval(said)
    # Some answers are seen twice, so that all processes take part in every step.
    assert one.cost is not None and one.cost.tokens <= tokens <= 1.2 * one.cost.tokens
    assert ids == one.train_dataset["id"]
    names = [sorted(re.sub(r".*relabel/", "", str(f)) for f in (tmp_path / n / "relabel").rglob("*.json*"))
             for n in ("one", "two")]  # fmt: skip
    assert names[0] == names[1] and json.dumps(names).count("process-") == 0
