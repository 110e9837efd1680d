from __future__ import annotations

import itertools
import math
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from ensemw2s.data import characters as data_characters
from ensemw2s.data.characters import LETTERS, character_questions
from ensemw2s.data.questions import exclude_questions, load_questions, split_questions
from ensemw2s.data.tokens import QuestionFormat, tokenize_questions
from ensemw2s.inference.scoring import AnswerScores, score_examples
from ensemw2s.models import characters as models_characters
from ensemw2s.models.characters import scratch_folder
from ensemw2s.models.loading import load_model, load_tokenizer
from ensemw2s.student.trainer import StudentConfig, StudentTrainer

FORMAT = QuestionFormat(prompt_template="{prompt}=", answer_prefix="")


@pytest.fixture
def briefly_trained(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three steps instead of hundreds, in an empty cache."""
    brief = {name: replace(recipe, num_steps=3) for name, recipe in models_characters._RECIPES.items()}
    monkeypatch.setattr(models_characters, "_RECIPES", brief)
    return empty_cache


# Questions


@given(st.sampled_from(["reverse", "copy"]), st.integers(1, 12), st.integers(0, 4), st.integers(1, 12), st.integers(0))
@settings(max_examples=60, deadline=None)
def test_questions_are_distinct_right_and_of_the_lengths_asked_for(
    task: str, size: int, extra: int, shortest: int, seed: int
) -> None:
    longest = min(shortest + extra, len(LETTERS))
    rows = character_questions(task, size=size, seed=seed, min_length=shortest, max_length=longest)
    assert len({row["prompt"] for row in rows}) == size
    for row in rows:
        name, letters = row["prompt"].split(" ")
        assert name == task and set(row) == {"prompt", "answer"}
        assert shortest <= len(letters) <= longest
        assert set(letters) <= set(LETTERS) and len(set(letters)) == len(letters)
        assert row["answer"] == ("".join(reversed(letters)) if task == "reverse" else letters)


def test_all_questions_there_are_can_be_had() -> None:
    size = len(LETTERS) + math.perm(len(LETTERS), 2)
    rows = character_questions("copy", size=size, seed=3, min_length=1, max_length=2)
    every = [*LETTERS, *map("".join, itertools.permutations(LETTERS, 2))]
    assert sorted(row["answer"] for row in rows) == sorted(every)


def test_the_seed_decides_and_every_length_turns_up() -> None:
    first, again, other = (
        character_questions("reverse", size=300, seed=seed, min_length=4, max_length=6) for seed in (5, 5, 6)
    )
    assert first == again != other
    counts = np.bincount([len(row["answer"]) for row in first], minlength=7)[4:]
    # A binomial count of mean 100 and standard deviation 8.2, five of them away.
    assert ((counts > 59) & (counts < 141)).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "revers"}, "no character task 'revers': did you mean reverse"),
        ({"task": "42"}, "no character task '42': expected reverse, copy"),
        ({"min_length": 0}, "1 <= min_length <= max_length <= 12, got 0 and 2"),
        ({"min_length": 3}, "got 3 and 2"),
        ({"max_length": 13}, "got 1 and 13"),
        ({"size": 145}, "has 144 distinct questions, 145 are wanted: ask for fewer or raise max_length"),
    ],
)
def test_bad_questions_are_refused_by_name(changes: dict[str, object], words: str) -> None:
    settings = {"task": "reverse", "size": 5, "seed": 0, "min_length": 1, "max_length": 2} | changes
    with pytest.raises(ValueError, match=words):
        character_questions(**settings)


def test_load_questions_takes_the_generator() -> None:
    source = {"characters": "reverse", "size": 20, "seed": 1, "min_length": 3, "max_length": 4}
    loaded = load_questions(source)
    assert len(set(loaded["prompt"])) == len(loaded) == 20
    assert all(row["prompt"] == f"reverse {row['answer'][::-1]}" for row in loaded)
    assert {len(answer) for answer in loaded["answer"]} == {3, 4}


def test_task_names_share_no_letter_with_their_arguments() -> None:
    assert not set("".join(data_characters.TASKS)) & set(LETTERS)


# Tokens and training text


def test_each_character_is_a_token_and_comes_back(briefly_trained: Path) -> None:
    tokenizer = load_tokenizer("scratch:char-weak")
    text = "reverse dig=\n<Gid> {~}  !"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert tokenizer("é")["input_ids"] == [tokenizer.unk_token_id]
    assert tokenizer("<end>")["input_ids"] == [tokenizer.eos_token_id] == [tokenizer.pad_token_id]


def test_the_pair_shares_one_vocabulary(briefly_trained: Path) -> None:
    weak, strong = (load_tokenizer(f"scratch:{name}").get_vocab() for name in ("char-weak", "char-strong"))
    assert weak == strong


def test_training_lines_obey_their_symbol() -> None:
    generator = np.random.default_rng(0)
    lines = [models_characters._training_line(generator) for _ in range(400)]
    reversing = 0
    for line in lines:
        asked, answer = line.split("=")
        letters = "".join(character for character in asked if character in LETTERS)
        assert asked.endswith(letters) and 1 <= len(letters) <= 6
        assert answer == (letters[::-1] if "<" in asked else letters)
        reversing += "<" in asked
    # A fair coin's 400 throws: mean 200, standard deviation 10.
    assert 150 < reversing < 250
    cluttered = sum(line[0] not in "<" + LETTERS for line in lines)
    assert 140 < cluttered < 240


def test_the_loss_is_on_answers_and_their_end() -> None:
    tokenizer = models_characters._make_tokenizer()
    input_ids, labels = models_characters._training_batch(np.random.default_rng(1), tokenizer)
    assert input_ids.shape == labels.shape
    for ids, row in zip(input_ids.tolist(), labels.tolist(), strict=True):
        text = tokenizer.decode(ids)
        line = text[: text.index("<end>")]
        answer = line.split("=")[1]
        expected = [-100] * (len(line) - len(answer)) + tokenizer(answer + "<end>")["input_ids"]
        assert row == expected + [-100] * (len(ids) - len(expected))


# Folders


def test_a_folder_is_made_once_and_loads(briefly_trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = scratch_folder("char-weak")
    assert folder.parent == briefly_trained
    files = {file.name for file in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"} <= files
    monkeypatch.setattr(models_characters, "_train", lambda *arguments: pytest.fail("trained again"))
    assert scratch_folder("char-weak") == folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("reverse dig=", return_tensors="pt")["input_ids"]
    direct, by_name = AutoModelForCausalLM.from_pretrained(folder), load_model("scratch:char-weak")
    assert torch.equal(direct(input_ids=ids).logits, by_name(input_ids=ids).logits)


def test_training_is_deterministic_and_leaves_torch_as_it_was(
    briefly_trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = scratch_folder("char-strong")
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(threads)
    torch.manual_seed(99)
    monkeypatch.setenv("ENSEMW2S_CACHE", str(tmp_path / "another"))
    second = scratch_folder("char-strong")
    assert first != second
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_another_recipe_is_another_folder(briefly_trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = scratch_folder("char-weak")
    monkeypatch.setattr(
        models_characters, "_RECIPES", {"char-weak": replace(models_characters._RECIPES["char-weak"], num_steps=4)}
    )
    assert scratch_folder("char-weak") != first


def test_a_failed_save_leaves_no_folder(briefly_trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", interrupt)
        with pytest.raises(KeyboardInterrupt):
            scratch_folder("char-weak")
    assert not [entry for entry in briefly_trained.iterdir() if entry.is_dir()]
    assert scratch_folder("char-weak").is_dir()


def test_callers_at_once_train_once(briefly_trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, started = models_characters._train, []

    def counted(*arguments: object) -> object:
        started.append(1)
        return train(*arguments)

    monkeypatch.setattr(models_characters, "_train", counted)
    folders: list[Path] = []
    callers = [threading.Thread(target=lambda: folders.append(scratch_folder("char-weak"))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(started) == 1 and len(folders) == 4 and len(set(folders)) == 1


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ValueError, match="no scratch model 'char-tiny': expected char-weak or char-strong"):
        load_model("scratch:char-tiny")


# What the pair is for


def _scores(model: torch.nn.Module, source: str, questions: object) -> AnswerScores:
    tokenizer = load_tokenizer(source)
    return score_examples(model, tokenize_questions(questions, tokenizer, FORMAT), pad_token_id=tokenizer.eos_token_id)


@pytest.mark.slow
def test_fine_tuning_draws_reversal_out_and_the_strong_model_goes_further(tmp_path: Path) -> None:
    easy = load_questions({"characters": "reverse", "size": 500, "seed": 11, "min_length": 3, "max_length": 4})
    hard = load_questions({"characters": "reverse", "size": 900, "seed": 12, "min_length": 4, "max_length": 6})
    easy_parts = split_questions(easy, {"train": 200, "test": 300})
    hard_parts = split_questions(exclude_questions(hard, [easy]), {"train": 400, "test": 300})
    accuracies = {}
    for source, parts, epochs in (("scratch:char-weak", easy_parts, 2), ("scratch:char-strong", hard_parts, 5)):
        before = _scores(load_model(source), source, parts["train"])
        assert 0.4 < before.token_error < 0.9 and before.accuracy < 0.05
        args = StudentConfig(
            output_dir=str(tmp_path), num_train_epochs=epochs, learning_rate=1e-3, disable_tqdm=True, use_cpu=True
        )
        trainer = StudentTrainer(source, args, parts["train"], question_format=FORMAT)
        model = trainer.train()
        accuracies[source] = [_scores(model, source, half["test"]).accuracy for half in (easy_parts, hard_parts)]
    weak_easy, weak_hard = accuracies["scratch:char-weak"]
    assert 0.4 < weak_easy < 0.9 and 0.05 < weak_hard < 0.6
    assert accuracies["scratch:char-strong"][1] > weak_hard + 0.25
