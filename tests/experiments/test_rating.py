"""Difficulty: ratings that no question's own answer has touched, and cuts that fall between values."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from scipy.stats import spearmanr

from ensemw2s.data import difficulty
from ensemw2s.data.difficulty import assign_folds, split_by_difficulty
from ensemw2s.data.questions import load_questions
from ensemw2s.data.tokens import QuestionFormat, tokenize_questions
from ensemw2s.experiments import rating
from ensemw2s.experiments.config import build_config
from ensemw2s.experiments.experiment import Experiment
from ensemw2s.experiments.rating import answer_difficulty, rate_difficulty
from ensemw2s.inference.scoring import AnswerScores, score_examples
from ensemw2s.runtime.files import read_complete_lines, read_json
from ensemw2s.training.arguments import AnswerTrainingArguments
from ensemw2s.training.fine_tune import fine_tune
from tests.experiments import test_experiment
from tests.runtime.test_processes import launch
from tests.tiny import END, FORMAT, llama, lora, questions, random_word, saved_model, tokenizer


def arguments(folder: Path, **changes: Any) -> AnswerTrainingArguments:
    values = {
        "num_train_epochs": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "disable_tqdm": True,
        "lr_scheduler_type": "constant", "seed": 5,
    }  # fmt: skip
    return AnswerTrainingArguments(output_dir=str(folder), **(values | changes))


def rated(folder: Path, rows: Dataset, folds: int = 2, model: Any = None, **changes: Any) -> Dataset:
    options = {name: changes.pop(name) for name in ("peft_config", "model_init_kwargs") if name in changes}
    return rate_difficulty(
        model or llama(0), rows, arguments(folder, **changes), folds=folds, processing_class=tokenizer(),
        question_format=FORMAT, **options,
    )  # fmt: skip


def of(values: list[Any]) -> Dataset:
    prompts = [f"question {i}" for i in range(len(values))]
    return Dataset.from_dict({"prompt": prompts, "answer": ["a"] * len(values), "difficulty": values})


def by_prompt(dataset: Dataset, column: str) -> dict[str, Any]:
    return dict(zip(dataset["prompt"], dataset[column], strict=True))


# Rating


def test_a_question_is_rated_by_a_model_that_never_saw_its_answer(tmp_path: Path) -> None:
    """Random answers can be memorised but not foreseen."""
    generator = torch.Generator().manual_seed(0)
    words = [(random_word(generator, 4), random_word(generator, 4)) for _ in range(16)]
    rows = Dataset.from_list([{"prompt": prompt, "answer": answer} for prompt, answer in words])
    training = {"num_train_epochs": 60, "learning_rate": 1e-2}
    found = rated(tmp_path / "rating", rows, **training)
    # Of the 6 tokens, 4 are random; prefix and end are the same in all answers.
    assert np.mean(found["difficulty"]) > 0.9 * 4 / 6
    examples = tokenize_questions(rows, tokenizer(), FORMAT)
    args = arguments(tmp_path, **training)
    model, _ = fine_tune(llama(0), examples, args, pad_token_id=END, seed=5, description="all of them")
    assert answer_difficulty(score_examples(model, examples, pad_token_id=END)).mean() < 0.05


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["all weights", "adapters"])
def test_a_rating_is_the_mean_chance_of_missing_a_token(tmp_path: Path, peft_config: LoraConfig | None) -> None:
    rows = questions(20)
    found = rated(tmp_path / "rating", rows, folds=3, peft_config=peft_config)
    folds, examples = np.array(found["fold"]), tokenize_questions(rows, tokenizer(), FORMAT)
    assert np.array_equal(folds, assign_folds(rows, 3, seed=5))
    # By hand, with the examples in the rating's own order, which decides the batches.
    order = sorted(range(20), key=lambda i: difficulty.random_rank(5, rows[i]["prompt"], rows[i]["answer"]))
    for number in range(3):
        others = examples.select([i for i in order if folds[i] != number])
        model, _ = fine_tune(
            llama(0), others, arguments(tmp_path), pad_token_id=END, seed=5, description="x", peft_config=peft_config
        )
        model = model.double()
        for i in np.flatnonzero(folds == number).tolist():
            ids, start = torch.tensor([examples[i]["input_ids"]]), examples[i]["prompt_length"]
            with torch.no_grad():
                p = model(input_ids=ids).logits[0, start - 1 : -1].softmax(-1).gather(1, ids[0, start:, None])
            assert found["difficulty"][i] == pytest.approx(float((1 - p).mean()), abs=1e-4)


def test_longer_words_are_harder_to_reverse(tmp_path: Path) -> None:
    rows = load_questions({"characters": "reverse", "size": 240, "seed": 3, "min_length": 2, "max_length": 6})
    found = rate_difficulty(
        "scratch:char-weak", rows, arguments(tmp_path, learning_rate=1e-3, num_train_epochs=3), folds=2,
        question_format=QuestionFormat(prompt_template="{prompt}=", answer_prefix=""),
    )  # fmt: skip
    lengths, ratings = np.array([len(answer) for answer in found["answer"]]), np.array(found["difficulty"])
    assert spearmanr(lengths, ratings).statistic > 0.6
    means = [ratings[lengths == length].mean() for length in range(2, 7)]
    assert means == sorted(means)
    # What follows is a split that means something.
    parts = split_by_difficulty(found, 0.4, 0.4, min_values=2)
    average = {name: np.mean([len(a) for a in getattr(parts, name)["answer"]]) for name in ("easy", "hard")}
    assert average["hard"] > average["easy"] + 1


def test_the_order_of_the_rows_plays_no_part(tmp_path: Path) -> None:
    rows = questions(24)
    first = rated(tmp_path / "first", rows)
    second = rated(tmp_path / "second", rows.shuffle(seed=3))
    for column in ("difficulty", "fold"):
        assert by_prompt(first, column) == by_prompt(second, column)
    assert first["id"] == rows["id"]


def test_earlier_ratings_are_replaced_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    rows, model = questions(12), llama(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    again = rows.add_column("difficulty", [9.0] * 12).add_column("fold", [7] * 12)
    found = rated(tmp_path / "again", again, model=model)
    assert set(found["fold"]) == {0, 1} and max(found["difficulty"]) <= 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found["difficulty"] == rated(tmp_path / "fresh", rows)["difficulty"]


def test_a_source_is_loaded_as_asked(tmp_path: Path) -> None:
    source, rows = str(saved_model(tmp_path / "model")), questions(12)
    whole, thin = (
        rated(tmp_path / str(kept), rows, model=source, model_init_kwargs={"keep_layers": kept}) for kept in (None, "0")
    )
    assert whole["difficulty"] == rated(tmp_path / "given", rows)["difficulty"]
    assert whole["difficulty"] != thin["difficulty"]


def test_a_rating_that_was_cut_off_goes_on_behind_its_last_fold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, trained = questions(18), []

    def counted(*args: Any, **options: Any) -> Any:
        trained.append(options["description"])
        if len(trained) == 2:
            raise KeyboardInterrupt
        return fine_tune(*args, **options)

    whole = rated(tmp_path / "whole", rows, folds=3)
    monkeypatch.setattr(rating, "fine_tune", counted)
    with pytest.raises(KeyboardInterrupt):
        rated(tmp_path / "cut", rows, folds=3)
    found = rated(tmp_path / "cut", rows, folds=3)
    numbers = [name.split("fold ")[1] for name in trained]
    assert numbers == ["1 of 3", "2 of 3", "2 of 3", "3 of 3"]
    assert found["difficulty"] == whole["difficulty"]
    assert rated(tmp_path / "cut", rows, folds=3)["difficulty"] == whole["difficulty"] and len(trained) == 4


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"learning_rate": 1e-3}, "learning_rate"),
        ({"folds": 3}, "folds"),
        ({"rows": questions(12, seed=9)}, "questions"),
        ({"model": llama(1), "peft_config": lora()}, "model, peft_config"),
        ({"model_init_kwargs": {"keep_layers": "0"}}, "model_init_kwargs.keep_layers"),
    ],
)
def test_the_folder_of_another_rating_is_refused(tmp_path: Path, changes: dict[str, Any], differing: str) -> None:
    rated(tmp_path, questions(12))
    message = f"a rating of difficulty of another configuration; differing: {differing}. Choose another output_dir, or"
    with pytest.raises(ValueError, match=message):
        rated(tmp_path, **({"rows": questions(12)} | changes))
    # How it is shown does not matter.
    rated(tmp_path, questions(12), logging_steps=3)


def test_another_tokenizer_makes_another_rating(tmp_path: Path) -> None:
    rated(tmp_path, questions(12))
    other = tokenizer()
    other.eos_token = "z"
    with pytest.raises(ValueError, match=r"differing: tokenizer\."):
        rate_difficulty(
            llama(0), questions(12), arguments(tmp_path), folds=2, processing_class=other, question_format=FORMAT
        )


def test_a_model_is_known_by_what_is_in_its_folder(tmp_path: Path) -> None:
    source = saved_model(tmp_path / "model")
    before = rated(tmp_path / "rating", questions(12), model=str(source))
    source.rename(tmp_path / "moved")
    again = rated(tmp_path / "rating", questions(12), model=str(tmp_path / "moved"))
    assert again["difficulty"] == before["difficulty"]
    saved_model(tmp_path / "moved", seed=7)
    with pytest.raises(ValueError, match=r"differing: model\. Choose another output_dir"):
        rated(tmp_path / "rating", questions(12), model=str(tmp_path / "moved"))


def spoiled(values: list[float], change: str) -> Any:
    return {
        "one value": values[:1], "text": ["a", *values[1:]], "NaN": [math.nan, *values[1:]],
        "above 1": [1.5, *values[1:]], "true": [True, *values[1:]], "none": None,
    }[change]  # fmt: skip


@pytest.mark.parametrize("change", ["one value", "text", "NaN", "above 1", "true", "none"])
def test_a_damaged_fold_is_named(tmp_path: Path, change: str) -> None:
    rated(tmp_path, questions(12))
    file = tmp_path / "fold-1.json"
    kept = read_json(file)
    file.write_text(json.dumps(kept | {"difficulty": spoiled(kept["difficulty"], change)}))
    with pytest.raises(ValueError, match=r"fold-1\.json is damaged: .*Delete .*fold-1\.json"):
        rated(tmp_path, questions(12))


def test_folds_of_another_rating_are_not_taken_for_these(tmp_path: Path) -> None:
    rated(tmp_path / "one", questions(12))
    found = rated(tmp_path / "two", questions(12), learning_rate=1e-3)
    (tmp_path / "two" / "fold-0.json").write_bytes((tmp_path / "one" / "fold-0.json").read_bytes())
    with pytest.raises(ValueError, match=r"fold-0\.json is damaged: "):
        rated(tmp_path / "two", questions(12), learning_rate=1e-3)
    (tmp_path / "two" / "fold-0.json").unlink()
    assert rated(tmp_path / "two", questions(12), learning_rate=1e-3)["difficulty"] == found["difficulty"]


def test_checkpoints_are_gone_when_a_fold_is_kept(tmp_path: Path) -> None:
    found = rated(tmp_path / "steps", questions(16), save_strategy="steps", save_steps=1)
    left = {path.name for path in (tmp_path / "steps").iterdir() if not path.name.startswith("ensemw2s.")}
    assert left == {"fold-0.json", "fold-1.json"}
    assert found["difficulty"] == rated(tmp_path / "plain", questions(16))["difficulty"]
    costs = [read_json(tmp_path / "steps" / f"fold-{i}.json")["cost"] for i in range(2)]
    assert all(cost["tokens"] > 0 and cost["flops"] > 0 for cost in costs)


WORKER = """
import sys
from pathlib import Path
from ensemw2s.runtime import processes
from tests.experiments.test_rating import rated
from tests.tiny import questions

processes.start()
found = rated(Path(sys.argv[1]), questions(22), per_device_train_batch_size=4)
(Path(sys.argv[1]) / f"process-{processes.index()}").write_text(repr(found["difficulty"][:]))
processes.end()
"""


@pytest.mark.slow
def test_two_processes_rate_like_one(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    run = launch(tmp_path / "worker.py", tmp_path / "two")
    assert run.returncode == 0, run.stderr
    one = rated(tmp_path / "one", questions(22))["difficulty"]
    for index in range(2):
        two = json.loads((tmp_path / "two" / f"process-{index}").read_text())
        # Sums of gradients are rounded otherwise, and the steps of Adam carry that on.
        np.testing.assert_allclose(two, one, atol=2e-3)


@given(
    st.lists(st.integers(0, 10**6), min_size=4, max_size=60, unique=True),
    st.integers(2, 4), st.integers(0, 9), st.data(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_folds_are_balanced_and_follow_from_seed_and_prompt(
    numbers: list[int], folds: int, seed: int, data: st.DataObject
) -> None:
    prompts = [f"Question {n}" for n in numbers]
    found = assign_folds(Dataset.from_dict({"prompt": prompts}), folds, seed)
    counts = np.bincount(found, minlength=folds)
    assert counts.max() - counts.min() <= 1
    order = data.draw(st.permutations(range(len(prompts))))
    shuffled = assign_folds(Dataset.from_dict({"prompt": [prompts[i] for i in order]}), folds, seed)
    assert np.array_equal(shuffled, found[order])
    # A question that comes again, in other letters and spaces, must not be in the fold that its rater learns from.
    twice = assign_folds(Dataset.from_dict({"prompt": prompts + [f" question  {n}" for n in numbers]}), folds, seed)
    assert np.array_equal(twice, np.tile(found, 2))


def test_another_seed_gives_other_folds() -> None:
    rows = questions(40)
    assert not np.array_equal(assign_folds(rows, 4, 0), assign_folds(rows, 4, 1))


@pytest.mark.parametrize("folds", [1, 13])
def test_too_few_or_too_many_folds_are_refused(tmp_path: Path, folds: int) -> None:
    message = f"folds must be (at least 2|between 2 and the number of distinct questions, 12)[,;] got {folds}"
    with pytest.raises(ValueError, match=message):
        rated(tmp_path, questions(12), folds=folds)


@given(st.lists(st.lists(st.floats(-200, 1e-6), min_size=1, max_size=5), min_size=1, max_size=8))
@settings(deadline=None)
def test_difficulty_is_a_mean_of_probabilities(log_probs: list[list[float]]) -> None:
    flat = np.array([value for answer in log_probs for value in answer], dtype=np.float32)
    lengths = np.array([len(answer) for answer in log_probs])
    found = answer_difficulty(AnswerScores(lengths, np.zeros(len(flat), dtype=bool), flat))
    assert found.min() >= 0 and found.max() <= 1
    expected = [math.fsum(1 - min(math.exp(np.float32(v)), 1) for v in answer) / len(answer) for answer in log_probs]
    np.testing.assert_allclose(found, expected, atol=1e-12)


# Splitting


@given(
    st.lists(st.one_of(st.integers(0, 6), st.floats(-3, 3, width=32)), min_size=2, max_size=60),
    st.floats(0.05, 0.95), st.floats(0.05, 1), st.sampled_from([0.0, 0.01, 0.5]),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_every_easy_question_is_easier_than_every_hard_one(
    values: list[float], easy: float, rest: float, resolution: float
) -> None:
    hard = (1 - easy) * rest
    rows = of([float(value) for value in values])
    try:
        parts = split_by_difficulty(rows, easy, hard, resolution=resolution)
    except ValueError as error:
        advice = re.search(r"Set easy=(\S+) and hard=(\S+),", str(error))
        assert "distinct values" in str(error) or advice
        if advice:
            split_by_difficulty(rows, *map(float, advice.groups()), resolution=resolution)
        return
    record, size = parts.record, len(values)
    assert max(parts.easy["difficulty"]) == record["easy_up_to"] < record["hard_from"] == min(parts.hard["difficulty"])
    assert not set(parts.easy["prompt"]) & set(parts.hard["prompt"])
    for part, wanted, share in ((parts.easy, easy, "easy_share"), (parts.hard, hard, "hard_share")):
        assert record[share] == len(part) / size
        assert abs(len(part) - min(max(wanted * size, 1), size - 1)) <= 0.1 * size + 0.5 + 1e-9
        indices = [int(prompt.split()[1]) for prompt in part["prompt"]]
        assert indices == sorted(indices)
    if rest == 1:
        assert len(parts.easy) + len(parts.hard) == size


@given(st.integers(2, 300), st.integers(1, 99), st.integers(1, 99), st.integers(0, 99))
# Halfway between two places, where 1 - 0.7 is a little more than 0.3; half a question off, which no tolerance covers.
@example(size=5, easy=30, hard=70, seed=0)
@example(size=3, easy=50, hard=50, seed=0)
@settings(max_examples=150, deadline=None)
def test_different_values_are_cut_at_the_quantiles(size: int, easy: int, hard: int, seed: int) -> None:
    if easy + hard > 100:
        easy, hard = 100 - easy, 100 - hard
    values = np.random.default_rng(seed).permutation(size) + 1.0
    parts = split_by_difficulty(of(values.tolist()), easy / 100, hard / 100)
    for part, share in ((parts.easy, easy), (parts.hard, hard)):
        assert abs(len(part) - min(max(size * share / 100, 1), size - 1)) <= 0.5 + 1e-9
    assert max(parts.easy["difficulty"]) == len(parts.easy)
    assert min(parts.hard["difficulty"]) == size - len(parts.hard) + 1
    if easy + hard == 100:
        assert len(parts.easy) + len(parts.hard) == size


def test_a_scale_of_few_values_is_cut_between_them() -> None:
    # Grades of 100 questions: 10, 20, 25, 25, 20 of them.
    grades = np.repeat([1, 2, 3, 4, 5], [10, 20, 25, 25, 20])
    parts = split_by_difficulty(of(grades.tolist()))
    assert set(parts.easy["difficulty"]) == {1, 2, 3} and set(parts.hard["difficulty"]) == {4, 5}
    assert (parts.record["easy_share"], parts.record["hard_share"]) == (0.55, 0.45)
    assert (parts.record["easy_up_to"], parts.record["hard_from"]) == (3, 4)
    assert parts.record["quantiles"]["0.0"] == 1 and parts.record["quantiles"]["1.0"] == 5
    apart = split_by_difficulty(of(grades.tolist()), 0.3, 0.2)
    assert set(apart.easy["difficulty"]) == {1, 2} and set(apart.hard["difficulty"]) == {5}
    as_text = split_by_difficulty(of([str(grade) for grade in grades]))
    assert as_text.record == parts.record and as_text.easy["difficulty"] == [str(g) for g in grades if g <= 3]


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([0.02] * 12 + [0.5] * 78 + [0.9] * 10, {},
         r"78% of 100 questions have a difficulty of 0\.5 \(to within 0\.01\), and the easy part would have to end "
         r"among them\. No cut between two values is within tolerance=0\.1 of the wanted share\. Set easy=0\.12 and "
         r"hard=0\.88, which fits, with splits of such sizes\. If the scale is your own, use a finer one; if models "),
        ([0.1] * 30 + [0.5] * 70, {"easy": 0.3, "hard": 0.3},
         r"70% of 100 .* hard part .* Set easy=0\.30 and hard=0\.70"),
        ([3] * 10, {}, "the difficulties of 10 questions have 1 distinct values .* expected at least 2. If the scale"),
        ([0.0, 1.0] * 10, {"min_values": 5}, "20 questions have 2 distinct values .* expected at least 5"),
        ([1.0, float("nan"), 2.0], {}, "difficulty is nan, expected a finite number. Fill it in, or leave the row out"),
        ([1.0, None, 2.0], {}, "difficulty is None, expected a finite number"),
        ([1.0, float("inf"), 2.0], {}, "difficulty is inf, expected a finite number"),
        (["1", "hard"], {}, "difficulty is 'hard', expected a finite number"),
        ([1, 2], {"easy": 0.7}, "easy and hard must be shares above 0, at most 1 together; got easy=0.7 and hard=0.5"),
        ([1, 2], {"hard": 0.0}, r"hard must be in \(0, 1\], got 0\.0"),
        ([1, 2], {"easy": float("nan")}, r"easy must be in \(0, 1\], got nan"),
        ([1, 2], {"tolerance": -0.1}, r"tolerance must be in \[0, 1\], got -0\.1"),
        ([1, 2], {"resolution": -1}, "resolution must be at least 0, got -1"),
    ],
)  # fmt: skip
def test_a_difficulty_that_cannot_be_cut_is_refused(values: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_by_difficulty(of(values), **options)


def test_a_bad_difficulty_is_named_by_its_row() -> None:
    rows = of([1.0, float("nan")]).add_column("id", ["first", "second"])
    with pytest.raises(ValueError, match="questions, id second: difficulty is nan"):
        split_by_difficulty(rows)


def test_questions_without_difficulty_are_told_where_it_comes_from() -> None:
    with pytest.raises(
        ValueError, match=r"no column 'difficulty', only .*prompt.*rate_difficulty .*folds=5.*check_questions"
    ):
        split_by_difficulty(questions(6))


def test_a_nearly_binary_rating_is_refused_unless_small_differences_are_said_to_count() -> None:
    # What raters give that have seen every answer: next to nothing, and a few misses.
    values = [*np.linspace(0, 0.004, 80).tolist(), *np.linspace(0.9, 1, 20).tolist()]
    with pytest.raises(ValueError, match=r"80% of 100 questions have a difficulty of 0\.002 \(to within 0\.01\)"):
        split_by_difficulty(of(values))
    assert len(split_by_difficulty(of(values), resolution=0).easy) == 50
    assert len(split_by_difficulty(of(values), 0.8, 0.2).easy) == 80


def test_a_wider_tolerance_takes_a_cut_that_is_further_off() -> None:
    rows = of([1] * 7 + [2] * 3)
    with pytest.raises(ValueError, match="degenerate"):
        split_by_difficulty(rows, tolerance=0.1)
    assert len(split_by_difficulty(rows, tolerance=0.2).easy) == 7


def test_one_question_with_two_difficulties_is_refused() -> None:
    rows = Dataset.from_list(
        [{"prompt": p, "answer": a, "difficulty": d} for p, a, d in [("x", "a", 1), ("y", "b", 2), ("X ", "c", 3)]]
    )
    with pytest.raises(ValueError, match="is in both easy and hard"):
        split_by_difficulty(rows, 0.34, 0.34)


# In an experiment


def experiment_settings(folder: Path, rows: Dataset, **of_difficulty: Any) -> dict[str, Any]:
    """The small experiment with one source of questions in place of two."""
    values = test_experiment.settings(folder)
    rows.to_json(folder / "all.jsonl")
    del values["data"]["easy"], values["data"]["hard"]
    return values | {
        "data": values["data"] | {"questions": {"file": str(folder / "all.jsonl")}, "difficulty": of_difficulty},
        "boosting": values["boosting"] | {"num_train_epochs": 3},
    }


def difficulties_of(experiment: Experiment) -> dict[str, list[float]]:
    splits = ("train", "validation", "test_id", "unlabelled", "test_ood")
    return {split: experiment.files.questions(split)["difficulty"] for split in splits}


def test_an_experiment_splits_one_source_by_its_own_difficulty(tmp_path: Path) -> None:
    rows = questions(130)
    # The number of letters, 1 to 8.
    lengths = [sum(letter.isalpha() for letter in prompt) for prompt in rows["prompt"]]
    values = experiment_settings(tmp_path, rows.add_column("letters", lengths), easy=0.5, hard=0.5)
    values["data"]["questions"]["columns"] = {"difficulty": "letters"}
    said: list[str] = []
    experiment = Experiment(build_config(values), say=said.append)
    records = experiment.run(("data",))
    found = difficulties_of(experiment)
    (record,) = [record for record in records if record["kind"] == "difficulty"]
    cut = record["easy_up_to"]
    assert record["folds"] is None and record["num_questions"] == 130
    assert record["easy_share"] == np.mean(np.array(lengths) <= cut)
    assert {split: len(values) for split, values in found.items()} == values["data"]["sizes"]
    assert all(max(found[split]) <= cut for split in ("train", "validation", "test_id"))
    assert all(min(found[split]) >= record["hard_from"] > cut for split in ("unlabelled", "test_ood"))
    share = record["easy_share"]
    assert said[0] == f"difficulty: {share:.0%} are easy, up to {cut:g}; {1 - share:.0%} are hard, from {cut + 1:g}"
    assert not (experiment.folder / "difficulty").exists()


def test_an_experiment_rates_questions_by_its_weak_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = experiment_settings(tmp_path, questions(130), folds=2)
    experiment = Experiment(build_config(values))
    records = experiment.run(("data",))
    found = difficulties_of(experiment)
    (record,) = [record for record in records if record["kind"] == "difficulty"]
    assert record["folds"] == 2
    assert max(max(found[s]) for s in ("train", "validation", "test_id")) <= record["easy_up_to"]
    assert min(min(found[s]) for s in ("unlabelled", "test_ood")) >= record["hard_from"] > record["easy_up_to"]
    by_hand = rate_difficulty(
        values["weak"]["source"], load_questions(tmp_path / "all.jsonl"),
        arguments(tmp_path / "by_hand", num_train_epochs=3, learning_rate=2e-2, seed=0), folds=2,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **values["lora"]), question_format=FORMAT,
    )  # fmt: skip
    ratings = by_prompt(by_hand, "difficulty")
    for split, numbers in found.items():
        assert numbers == [ratings[prompt] for prompt in experiment.files.questions(split)["prompt"]]
    (phase,) = [record for record in records if record["kind"] == "phase"]
    assert phase["tokens"] > 0 and phase["flops"] > 0
    # Killed before its records were written, the phase goes on without training again.
    (experiment.folder / "records" / "data.jsonl").unlink()
    monkeypatch.setattr(rating, "fine_tune", lambda *args, **options: pytest.fail("trained again"))
    Experiment(build_config(values)).run(("data",))
    assert record in read_complete_lines(experiment.folder / "records" / "data.jsonl")


def test_an_experiment_refuses_a_rating_that_says_nothing(tmp_path: Path) -> None:
    rows = questions(130).add_column("difficulty", [1] * 100 + [2] * 30)
    experiment = Experiment(build_config(experiment_settings(tmp_path, rows)))
    with pytest.raises(ValueError, match=r"77% of 130 questions .* difficulty of 1 .* Set easy=0\.77 and hard=0\.23"):
        experiment.run(("data",))
    assert not (experiment.folder / "data").exists()
