"""Pseudo-answers: the rule for `label` and `generate`, and the files that `label` goes on with."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from transformers import GenerationConfig

from ensemw2s import StudentConfig, StudentTrainer, TokenEnsemble
from ensemw2s.data.tokens import QuestionFormat, format_of_answers, tokenize_questions
from ensemw2s.experiments.config import build_config
from ensemw2s.experiments.experiment import Experiment
from ensemw2s.inference import decoding, labelling
from ensemw2s.inference.decoding import Sampling
from ensemw2s.inference.label_files import read_labels
from ensemw2s.models.identity import describe_experts, digest_tokenizer
from ensemw2s.student.teacher import cache_teacher
from tests.experiments.test_experiment import settings
from tests.reference import WEIGHTS
from tests.tiny import END, FORMAT, gpt2, llama, questions, saved_adapters, tokenizer
from tests.tokenizers import FAITHFUL, letters

OPTIONS: dict[str, Any] = {"question_format": FORMAT, "max_new_tokens": 6, "description": None}


def labelled(ensemble: TokenEnsemble, rows: Dataset | None = None, **changes: Any) -> Dataset:
    return ensemble.label(questions(4) if rows is None else rows, tokenizer(), **(OPTIONS | changes))


def with_choices(rows: Dataset) -> Dataset:
    return rows.remove_columns("answer").add_column("choices", [["ab", "ba"]] * len(rows))


def generated(ensemble: TokenEnsemble, rows: Dataset, length: int, ends: set[int]) -> list[list[int]]:
    """What greedy `generate` says to each question, up to its first end token."""
    found = []
    for prompt in rows["prompt"]:
        ids = torch.tensor([FORMAT.prompt(prompt, tokenizer()).ids])
        new = ensemble.generate(input_ids=ids, do_sample=False, max_new_tokens=length)[0, ids.shape[1] :].tolist()
        places = [i for i, token in enumerate(new) if token in ends]
        found.append(new[: places[0] + 1] if places else new)
    return found


# One rule for `label` and `generate`


@pytest.mark.parametrize("ends", [END, [END], [END, 5, 9, 17], [7]], ids=str)
@pytest.mark.parametrize(("kind", "seed"), [("adapters", 0), ("models", 0), ("models", 1), ("models", 2)])
def test_labels_are_what_greedy_generate_says(tmp_path: Path, kind: str, ends: Any, seed: int) -> None:
    if kind == "models":
        ensemble = TokenEnsemble.from_models([llama(seed), gpt2(seed + 1)], [1.0, 0.5 + seed])
    else:
        ensemble = TokenEnsemble.from_adapters(llama(seed), saved_adapters(tmp_path), WEIGHTS)
    ensemble.generation_config.eos_token_id = ends
    # How it samples and how long its texts are is said to `label` itself.
    ensemble.generation_config.update(do_sample=True, temperature=0.3, top_k=3, top_p=0.5, max_new_tokens=2)
    rows, every = questions(12, seed=seed), {END, *([ends] if isinstance(ends, int) else ends)}
    labels = labelled(ensemble, rows, max_new_tokens=12, batch_size=5)
    assert labels["answer_ids"] == generated(ensemble, rows, 12, every)
    for row in labels:
        assert row["finished"] == (row["answer_ids"][-1] in every)
        text = row["answer_ids"][:-1] if row["finished"] else row["answer_ids"]
        assert row["answer"] == tokenizer().decode(text, skip_special_tokens=True).removeprefix(" ")
        assert not every & set(text)
    if len(every) > 2:
        assert {row["answer_ids"][-1] for row in labels if row["finished"]} - {END}


REFUSED = {
    "repetition_penalty": (1.1, "1.0"), "no_repeat_ngram_size": (2, "None"), "bad_words_ids": ([[4]], "None"),
    "suppress_tokens": ([4], "None"), "begin_suppress_tokens": ([4], "None"), "forced_bos_token_id": (0, "None"),
    "forced_eos_token_id": (3, "None"), "min_length": (5, "None"), "min_new_tokens": (2, "None"),
    "sequence_bias": ([[[4], 2.0]], "None"), "num_beams": (3, "1.0"), "num_return_sequences": (2, "1.0"),
    "encoder_repetition_penalty": (1.2, "1.0"), "encoder_no_repeat_ngram_size": (2, "None"),
    "exponential_decay_length_penalty": ((2, 1.5), "None"), "guidance_scale": (1.5, "1.0"),
    "stop_strings": (["a"], "None"), "max_time": (0.0, "None"), "penalty_alpha": (0.6, "None"),
    "dola_layers": ("low", "None"), "token_healing": (True, "None"), "remove_invalid_values": (True, "None"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_distribution_is_refused_with_the_way_out(of_models: TokenEnsemble, name: str) -> None:
    value, nothing = REFUSED[name]
    setattr(of_models.generation_config, name, value)
    message = rf"ensemble\.generation_config\.{name} is .*set ensemble\.generation_config\.{name} = {nothing}"
    with pytest.raises(ValueError, match=message):
        labelled(of_models)
    setattr(of_models.generation_config, name, None if nothing == "None" else float(nothing))
    decoding.require_plain(of_models.generation_config)


def test_answers_that_are_choices_are_not_generated(of_models: TokenEnsemble) -> None:
    of_models.generation_config.repetition_penalty = 1.2
    assert set(labelled(of_models, with_choices(questions(3)))["answer"]) <= {"ab", "ba"}


def test_every_setting_that_transformers_makes_a_processor_of_is_refused(of_models: TokenEnsemble) -> None:
    """Whatever `generate` would do to greedy scores, `label` must have a word about."""
    for name in vars(GenerationConfig()):
        for value in (2, 0.5, [3], [[3]], "low", True):
            config = copy.deepcopy(of_models.generation_config)
            setattr(config, name, value)
            config.do_sample = False
            try:
                made = of_models._get_logits_processor(config, 3, torch.ones(1, 3, dtype=torch.int64), None, [])
            except (AttributeError, TypeError, ValueError):
                continue
            if len(made) and name not in ("renormalize_logits",):
                with pytest.raises(ValueError, match=name):
                    decoding.require_plain(config)


def test_settings_that_do_nothing_and_names_that_transformers_does_not_know_are_no_matter(
    of_models: TokenEnsemble,
) -> None:
    before = labelled(of_models)["answer_ids"]
    of_models.generation_config.update(
        repetition_penalty=1.0, no_repeat_ngram_size=0, num_beams=1, min_length=0, suppress_tokens=[],
        bad_words_ids=None, length_penalty=2.0, early_stopping=True, use_cache=False, prompt_lookup_num_tokens=3,
    )  # fmt: skip
    of_models.generation_config.chat_format = "chatml"
    assert labelled(of_models)["answer_ids"] == before


def test_an_experiment_asks_for_the_mixture_itself(of_models: TokenEnsemble, tmp_path: Path) -> None:
    trial = Experiment(build_config(settings(tmp_path)))
    of_models.generation_config.update(repetition_penalty=1.1, do_sample=True, top_p=0.8, eos_token_id=[END, 5])
    of_models.save_pretrained(trial.files.ensemble("ensemble"))
    teacher = trial.files.teacher("ensemble")
    of_models.generation_config.repetition_penalty = None
    assert labelled(teacher)["answer_ids"] == labelled(of_models)["answer_ids"]


def test_a_seed_is_any_whole_number() -> None:
    assert Sampling(seed=np.int64(3)) == Sampling(seed=3)  # type: ignore[arg-type]
    assert type(Sampling(seed=np.uint8(3)).seed) is int  # type: ignore[arg-type]
    for wrong in (True, np.True_, 3.0, np.float64(3)):
        with pytest.raises(TypeError, match="seed must be int, got"):
            Sampling(seed=wrong)  # type: ignore[arg-type]


def test_sampling_is_what_is_asked_for(of_models: TokenEnsemble) -> None:
    plain = labelled(of_models, sampling=Sampling(temperature=1.0, seed=3))["answer_ids"]
    of_models.generation_config.update(do_sample=False, temperature=5.0, top_k=1)
    assert labelled(of_models, sampling=Sampling(temperature=1.0, seed=3))["answer_ids"] == plain
    assert labelled(of_models)["answer_ids"] != plain


class Scripted:
    """Takes the place of the decoder: says given tokens, whatever the experts think."""

    answers: list[list[int]]

    def __init__(self, ensemble: TokenEnsemble, input_ids: torch.Tensor, *rest: Any) -> None:
        self.vocabulary, self.step, self.ensemble = ensemble.config.vocab_size, 0, ensemble

    def logits(self) -> list[torch.Tensor]:
        return [torch.nn.functional.one_hot(torch.tensor([ids[min(self.step, len(ids) - 1)] for ids in self.answers]),
                                            self.vocabulary).float() * 50]  # fmt: skip

    def choose(self, logits: list[torch.Tensor]) -> Any:
        rows = torch.zeros(len(self.answers), dtype=torch.int64)
        return decoding.ops.mixture_sample(logits, torch.ones(1), temperature=0.0, seeds=rows, positions=rows)

    def append(self, tokens: torch.Tensor) -> None:
        self.step += 1


@pytest.mark.parametrize("name", FAITHFUL)
def test_a_label_is_the_text_with_all_its_white_space(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = FAITHFUL[name]()
    texts = ["42", "  return a + b\n", "\tindented", "two  words ", "def f(x):\n    return x\n\n", "é漢"]
    rows = Dataset.from_list([{"id": str(i), "prompt": "Say", "answer": text} for i, text in enumerate(texts)])
    ensemble = TokenEnsemble.from_models([llama(0, vocab_size=len(tokens) + 1)], [1.0])
    for form in (QuestionFormat(), QuestionFormat("{prompt}:", ""), QuestionFormat("{prompt}: ", "")):
        examples = tokenize_questions(rows, tokens, form)
        monkeypatch.setattr(labelling, "MixtureDecoder", Scripted)
        Scripted.answers = [row["input_ids"][row["prompt_length"] :] for row in examples]
        labels = ensemble.label(rows, tokens, question_format=form, max_new_tokens=40, description=None)
        assert labels["answer"] == texts
        assert labels["answer_ids"] == Scripted.answers and all(labels["finished"])
        # A student of the same tokenizer learns the same tokens.
        assert tokenize_questions(labels, tokens, form)["input_ids"] == examples["input_ids"]


def test_a_tokenizer_that_cannot_write_is_refused(of_models: TokenEnsemble) -> None:
    spaced = letters()
    ensemble = TokenEnsemble.from_models([llama(0, vocab_size=len(spaced))], [1.0])
    with pytest.raises(ValueError, match="this tokenizer cannot turn tokens into text"):
        ensemble.label(questions(2), spaced, question_format=FORMAT, description=None)
    with pytest.raises(ValueError, match="questions is empty"):
        labelled(of_models, questions(2).select([]))


# Which end a student learns


def two_ends() -> TokenEnsemble:
    """A teacher whose answers end in several ways."""
    ensemble = TokenEnsemble.from_models([llama(0), gpt2(1)], [1.0, 1.0])
    ensemble.generation_config.eos_token_id = [END, 5, 9, 17]
    return ensemble


def test_a_student_ends_its_answers_in_its_own_way(tmp_path: Path) -> None:
    teacher = two_ends()
    answers = labelled(teacher, questions(12), max_new_tokens=12, top_logprobs=6).filter(
        lambda row: row["finished"] and row["answer"].strip()
    )
    assert len({ids[-1] for ids in answers["answer_ids"]}) > 1
    assert format_of_answers(answers, answers.column_names) == FORMAT
    with pytest.warns(UserWarning, match="no longer say in which format they were asked for.* pass question_format"):
        assert format_of_answers(answers.to_list(), answers.column_names) == QuestionFormat()
    student = llama(3)
    student.generation_config.eos_token_id = [END, 5, 9, 17]
    for variant in ("soft", "sft"):
        args = StudentConfig(output_dir=str(tmp_path), disable_tqdm=True, variant=variant)
        trainer = StudentTrainer(student, args, answers, tokenizer(), question_format=FORMAT)
        learned = [row["input_ids"][row["prompt_length"] :] for row in trainer._examples]
        assert {ids[-1] for ids in learned} == {END}
        if variant == "soft":
            assert [ids[:-1] for ids in learned] == [ids[:-1] for ids in answers["answer_ids"]]
    forced = cache_teacher(teacher, answers, tokenizer(), top_logprobs=6, question_format=FORMAT)
    assert forced["answer_ids"] == answers["answer_ids"]
    # Ends that are none to the student.
    with pytest.raises(
        ValueError,
        match=r"the student's tokenizer reads the teacher's tokens as .*, the teacher meant .* and an end token",
    ):
        args = StudentConfig(output_dir=str(tmp_path), variant="soft", disable_tqdm=True)
        StudentTrainer(llama(3), args, answers, tokenizer(), question_format=FORMAT)


def test_a_cache_and_a_teacher_are_one_too_many(tmp_path: Path) -> None:
    teacher = two_ends()
    answers = labelled(teacher, top_logprobs=6)
    args = StudentConfig(output_dir=str(tmp_path), variant="soft", top_logprobs=6, keep_unfinished=True)
    with pytest.raises(ValueError, match=r"has a cache .*another teacher's: leave out teacher"):
        StudentTrainer(llama(3), args, answers, tokenizer(), question_format=FORMAT, teacher=teacher[:1])


def test_tokens_of_another_answer_are_not_kept_for_a_teacher() -> None:
    teacher = two_ends()
    answers = labelled(teacher)
    edited = answers.remove_columns("answer").add_column("answer", ["another"] * 4)
    with pytest.raises(ValueError, match=r"id q0: this tokenizer reads the teacher's tokens as .*meant 'another'"):
        cache_teacher(teacher, edited, tokenizer(), top_logprobs=3, question_format=FORMAT)


@pytest.mark.parametrize("value", [math.nan, 0.5])
def test_a_cache_of_no_probabilities_is_refused(tmp_path: Path, value: float) -> None:
    answers = labelled(two_ends(), top_logprobs=3)
    rows = [[[value, -2.0, -3.0], *row[1:]] for row in answers["top_log_probs"]]
    spoiled = answers.remove_columns("top_log_probs").add_column("top_log_probs", rows)
    args = StudentConfig(output_dir=str(tmp_path), variant="soft", keep_unfinished=True)
    with pytest.raises(ValueError, match="row 0: top_log_probs are no log-probabilities"):
        StudentTrainer(llama(3), args, spoiled, tokenizer(), question_format=FORMAT)


# Files: what decides an answer


def edited(rows: Dataset, column: str, index: int, value: Any) -> Dataset:
    changed = [row | ({column: value} if i == index else {}) for i, row in enumerate(rows)]
    return Dataset.from_list(changed)


def changed_weight() -> TokenEnsemble:
    model = llama(2)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] += 1e-3
    return TokenEnsemble.from_models([llama(0), model], [1.0, 0.5])


def another(**changes: Any) -> Callable[[TokenEnsemble], TokenEnsemble]:
    def make(ensemble: TokenEnsemble) -> TokenEnsemble:
        for name, value in changes.items():
            setattr(ensemble.config, name, value)
        return ensemble

    return make


def with_ends(ensemble: TokenEnsemble) -> TokenEnsemble:
    ensemble.generation_config.eos_token_id = [END, 5]
    return ensemble


ROWS = questions(4)
MORE = concatenate_datasets([ROWS, questions(1, seed=9, start=4)])
CHANGES: dict[str, tuple[Callable[[TokenEnsemble], TokenEnsemble], dict[str, Any], str]] = {
    "a weight": (lambda _: changed_weight(), {}, r"experts\."),
    "fewer experts": (lambda found: found[:1], {}, r"expert_weights \(.*0\.5\] on file, \[1\.0\] now\), experts\."),
    "expert weights": (another(expert_weights=[1.0, 0.6]), {}, r"expert_weights \(.*0\.5\] on file, .*0\.6\] now"),
    "combine": (another(combine="logprob"), {}, r"combine \('prob' on file, 'logprob' now\)\."),
    "ends": (with_ends, {}, r"end_tokens \(\[1\] on file, \[1, 5\] now\)\."),
    "length": (lambda found: found, {"max_new_tokens": 7}, r"max_new_tokens \(6 on file, 7 now\)\."),
    "sampling": (
        lambda found: found, {"sampling": Sampling(temperature=0.5, seed=3)}, r"sampling \(.*ature': 0\.9.* now\)"
    ),
    "seed": (lambda found: found, {"sampling": Sampling(temperature=0.9, seed=4)}, r"seed \(3 on file, 4 now\)\."),
    "format": (
        lambda found: found, {"question_format": QuestionFormat("{prompt}::", " ")}, r"format \(.*\), prompt_tokens\."
    ),
    "prompt": (
        lambda found: found, {"rows": edited(ROWS, "prompt", 2, "another")},
        r"prompt_tokens, questions, the prompt of id 'q2' was 'c?\w+2'\.",
    ),
    "order": (lambda found: found, {"rows": ROWS.select([1, 0, 2, 3])}, r"prompt_tokens, questions\."),
    "one question more": (lambda found: found, {"rows": MORE}, r"prompt_tokens, questions\."),
    "another id": (
        lambda found: found, {"rows": edited(ROWS, "id", 1, "new")},
        r"questions, there is no question with the id 'q1' any more\.",
    ),
    "top": (lambda found: found, {"top_logprobs": 3}, r"top_logprobs \(None on file, 3 now\), top_temperature"),
    "choices": (
        lambda found: found, {"rows": with_choices(ROWS), "sampling": None},
        "end_tokens .*, max_new_tokens .*, questions, .*, the choices of id 'q",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_answers_of_another_run_are_refused_by_what_differs(tmp_path: Path, name: str) -> None:
    make, changes, differing = CHANGES[name]
    options = {"output_file": tmp_path / "labels.jsonl", "sampling": Sampling(temperature=0.9, seed=3)}
    ensemble = TokenEnsemble.from_models([llama(0), llama(2)], [1.0, 0.5])
    first = labelled(ensemble, **options)
    assert labelled(ensemble, **options).to_list() == first.to_list()
    before = {file.name: file.read_bytes() for file in tmp_path.glob("labels*")}
    rows = changes.get("rows", ROWS)
    changes = {name: value for name, value in changes.items() if name != "rows"}
    with pytest.raises(ValueError, match=rf"labels\.jsonl holds answers of another run; differing: .*{differing}"):
        labelled(make(ensemble), rows, **(options | changes))
    assert {file.name: file.read_bytes() for file in tmp_path.glob("labels*")} == before
    # Without rows there is nothing to refuse.
    (tmp_path / "labels.jsonl").write_text("")
    assert len(labelled(make(ensemble), rows, **(options | changes))) == len(rows)


def test_another_tokenizer_is_refused(of_models: TokenEnsemble, tmp_path: Path) -> None:
    labelled(of_models, output_file=tmp_path / "labels.jsonl")
    other = tokenizer()
    other.eos_token = "z"
    with pytest.raises(ValueError, match=r"differing: end_tokens .*, tokenizer"):
        of_models.label(ROWS, other, **(OPTIONS | {"output_file": tmp_path / "labels.jsonl"}))


def test_what_decides_no_answer_may_change(of_models: TokenEnsemble, tmp_path: Path) -> None:
    options: dict[str, Any] = {"output_file": tmp_path / "labels.jsonl"}
    first = labelled(of_models, **options, batch_size=2, sampling=Sampling(seed=1))
    # Greedy answers draw nothing; what a batch is cut into moves none; answers and names are no part of a question.
    rows = edited(ROWS, "answer", 0, "else")
    assert labelled(of_models, rows, **options, batch_size=3, sampling=Sampling(seed=2)).to_list() == first.to_list()
    of_models.generation_config.update(do_sample=True, temperature=0.3)
    assert labelled(of_models, **options).to_list() == first.to_list()


@pytest.mark.parametrize("kind", ["of_adapters", "of_models"])
def test_an_ensemble_is_the_same_after_it_was_saved(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    ensemble = request.getfixturevalue(kind)
    options: dict[str, Any] = {"output_file": tmp_path / "labels.jsonl"}
    first = labelled(ensemble, **options)
    before = describe_experts(ensemble.experts)
    ensemble.save_pretrained(tmp_path / "saved", processing_class=tokenizer())
    loaded = TokenEnsemble.from_pretrained(tmp_path / "saved")
    assert describe_experts(ensemble.experts) == describe_experts(loaded.experts) == before
    assert labelled(loaded, **options).to_list() == first.to_list()
    # Experts are known one by one, whatever stands beside them.
    assert describe_experts(ensemble[1:].experts) == before | {"experts": before["experts"][1:]}
    assert len(set(before["experts"])) == 3
    half = TokenEnsemble.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert not set(describe_experts(half.experts)["experts"]) & set(before["experts"])


def test_a_tokenizer_is_the_same_after_it_was_saved_and_used(tmp_path: Path) -> None:
    for name, make in FAITHFUL.items():
        one = make()
        before = digest_tokenizer(one)
        one(["a", "b c d"], padding=True, truncation=True, max_length=2)
        assert digest_tokenizer(one) == before, name
    assert len({digest_tokenizer(make()) for make in FAITHFUL.values()}) > 3
    tokenizer().save_pretrained(tmp_path)
    assert digest_tokenizer(type(tokenizer()).from_pretrained(tmp_path)) == digest_tokenizer(tokenizer())


# Files: kills and damage


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenEnsemble, Path, list[dict[str, Any]]]:
    """An ensemble, the file of its labels, and the labels."""
    folder = tmp_path_factory.mktemp("kept")
    ensemble = TokenEnsemble.from_models([llama(0), llama(2)], [1.0, 0.5])
    rows = labelled(ensemble, output_file=folder / "labels.jsonl", max_new_tokens=3, top_logprobs=2, batch_size=1)
    return ensemble, folder / "labels.jsonl", rows.to_list()


def again(kept: Any, folder: Path, content: bytes, description: bytes | None) -> list[dict[str, Any]]:
    """Label once more, with a file of that content and description."""
    (folder / "labels.jsonl").write_bytes(content)
    beside = folder / "labels.jsonl.run.json"
    beside.unlink(missing_ok=True)
    if description is not None:
        beside.write_bytes(description)
    file = folder / "labels.jsonl"
    return labelled(kept[0], output_file=file, max_new_tokens=3, top_logprobs=2, batch_size=1).to_list()


def on_file(kept: Any) -> tuple[bytes, bytes]:
    return kept[1].read_bytes(), kept[1].with_name("labels.jsonl.run.json").read_bytes()


def test_labels_go_on_from_a_kill_at_any_byte(kept: Any, tmp_path: Path) -> None:
    content, description = on_file(kept)
    places = [*range(0, len(content), 97), *(i + step for i in range(len(content)) if content[i : i + 1] == b"\n"
                                             for step in (0, 1, 9))]  # fmt: skip
    for place in places:
        assert again(kept, tmp_path, content[:place], description) == kept[2]
        assert sorted((tmp_path / "labels.jsonl").read_bytes().splitlines()) == sorted(content.splitlines())


def test_rows_are_known_without_what_stands_beside_them(kept: Any, tmp_path: Path) -> None:
    content, description = on_file(kept)
    half = content[: len(content) // 2]
    assert again(kept, tmp_path, half, None) == kept[2]
    assert (tmp_path / "labels.jsonl.run.json").read_bytes() == description
    # Another run's description beside them, and theirs beside other rows.
    other = labelled(kept[0], output_file=tmp_path / "other.jsonl", max_new_tokens=2, top_logprobs=2)
    assert len(other) == 4
    theirs = (tmp_path / "other.jsonl").read_bytes(), (tmp_path / "other.jsonl.run.json").read_bytes()
    with pytest.raises(ValueError, match="differing: max_new_tokens"):
        again(kept, tmp_path, content, theirs[1])
    for beside in (description, None):
        with pytest.raises(ValueError, match=r"labels\.jsonl, line 1: .* belongs to another run"):
            again(kept, tmp_path, theirs[0], beside)
    with pytest.raises(ValueError, match=r"labels\.jsonl, line 3: .* belongs to another run"):
        again(kept, tmp_path, b"".join(content.splitlines(keepends=True)[:2]) + theirs[0], description)
    for damaged in (b"", b"[]", b"{}", b'{"kind": "something"}', b"\xff"):
        with pytest.raises(ValueError, match=r"labels\.jsonl\.run\.json"):
            again(kept, tmp_path, content, damaged)


def test_an_interrupted_call_leaves_a_description_and_whole_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensemble = TokenEnsemble.from_models([llama(0)], [1.0])
    options: dict[str, Any] = {"output_file": tmp_path / "labels.jsonl", "batch_size": 2}
    plain, calls = labelling._label_batch, []

    def killed(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(labelling, "_label_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        labelled(ensemble, **options)
    assert len(read_labels(tmp_path / "labels.jsonl")) == 2
    with pytest.raises(ValueError, match="differing: max_new_tokens"):
        labelled(ensemble, **options, max_new_tokens=9)
    assert labelled(ensemble, **options).to_list() == labelled(ensemble, batch_size=2).to_list()
    assert len(calls) == 2 + 1 + 2


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda row: {key: value for key, value in row.items() if key != name}


def with_value(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda row: row | {name: value}


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "torn": (lambda row: json.dumps(row)[:40], "no JSON object"),
    "empty": (lambda row: "", "no JSON object"),
    "list": (lambda row: "[1]", "no JSON object"),
    "deep": (lambda row: "[" * 100_000, "no JSON object"),
    "NaN": (with_value("confidence", math.nan), "no JSON object .*NaN"),
    "no UTF-8": (lambda row: '{"id": "\udcff"}', "no JSON object"),
    "no answer": (without("answer"), "it has no 'answer'"),
    "no check": (without("check"), "it has no 'check'"),
    "half a cache": (without("top_log_probs"), "it has no 'top_log_probs'"),
    "more": (with_value("extra", 1), "it has 'extra', which no row"),
    "id": (with_value("id", [3]), r"id is \[3\], expected text or a whole number"),
    "another number": (with_value("id", 3), "answers the question 3, which is not in this dataset"),
    "stranger": (with_value("id", "nobody"), "answers the question 'nobody', which is not in this dataset"),
    "answer": (with_value("answer", ["a"]), r"answer is \['a'\], expected text"),
    "ids as text": (with_value("answer_ids", "abc"), "answer_ids is 'abc', expected a list of token ids"),
    "no ids": (with_value("answer_ids", []), "answer_ids is .*at least one"),
    "floats": (with_value("answer_ids", [1.5]), "answer_ids is .*list of token ids"),
    "large ids": (with_value("answer_ids", [2**40]), "answer_ids is .*list of token ids"),
    "negative ids": (with_value("answer_ids", [-1]), "answer_ids is .*list of token ids"),
    "number": (with_value("num_tokens", 99), r"answer_ids has \d+ tokens, num_tokens says 99"),
    "finished": (with_value("finished", 1), "finished is 1, expected true or false"),
    "confidence": (with_value("confidence", 0.7), "confidence is 0.7, expected a finite log-probability, at most 0"),
    "infinite": (with_value("confidence", -(10**400)), "confidence is -1000.*expected a finite log-probability"),
    "share": (with_value("agreement", 1.5), r"agreement is 1.5, expected a share in \[0, 1\]"),
    "experts": (with_value("expert_agreement", [0.5]), "expert_agreement has 1 values, that of the first row 2"),
    "base64": (with_value("top_log_probs", "!?"), "top_log_probs is no base64 text"),
    "bytes": (with_value("top_log_probs", "AAAA"), "top_log_probs has 3 bytes, no multiple of 4 for each of"),
    "temperature": (with_value("top_temperature", 0), "top_temperature is 0, expected a positive number"),
    "by hand": (with_value("answer", "made up"), "it was changed after it was written, or belongs to another run"),
    "one bit": (lambda row: row | {"confidence": row["confidence"] * (1 + 1e-15)}, "it was changed after it was"),
    "prompt": (with_value("prompt", "another"), "it was changed after it was written"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_row_is_named_by_file_and_line(kept: Any, tmp_path: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    content, description = on_file(kept)
    lines = content.decode().splitlines()
    changed = damage(json.loads(lines[2]))
    lines[2] = changed if isinstance(changed, str) else json.dumps(changed)
    spoiled = "\n".join([*lines, ""]).encode(errors="surrogateescape")
    with pytest.raises(ValueError, match=rf"labels\.jsonl, line 3: .*{message}.*Delete that line") as error:
        again(kept, tmp_path, spoiled, description)
    assert len(str(error.value)) < 600 + len(str(tmp_path))
    assert (tmp_path / "labels.jsonl").read_bytes() == spoiled
    if name not in ("stranger", "another number"):
        with pytest.raises(ValueError, match=rf"labels\.jsonl, line 3: .*{message}"):
            read_labels(tmp_path / "labels.jsonl")
    # The way out.
    assert again(kept, tmp_path, "\n".join([*lines[:2], *lines[3:], ""]).encode(), description) == kept[2]


def test_a_row_without_an_id_does_not_hide_what_differs(kept: Any, tmp_path: Path) -> None:
    content, _ = on_file(kept)
    labelled(kept[0], output_file=tmp_path / "other.jsonl", max_new_tokens=3, top_logprobs=2, rows=MORE)
    theirs = (tmp_path / "other.jsonl.run.json").read_bytes()
    with pytest.raises(ValueError, match=r"questions, there is no question with the id \[\] any more"):
        again(kept, tmp_path, b'{"id": []}\n' + content, theirs)


def test_ids_may_be_numbers_and_are_there_once(of_models: TokenEnsemble, tmp_path: Path) -> None:
    rows = ROWS.remove_columns("id").add_column("id", [4, 3, 2, 1])
    first = labelled(of_models, rows, output_file=tmp_path / "labels.jsonl")
    content = (tmp_path / "labels.jsonl").read_bytes()
    (tmp_path / "labels.jsonl").write_bytes(content[:-30])
    assert labelled(of_models, rows, output_file=tmp_path / "labels.jsonl", batch_size=4).to_list() == first.to_list()
    with pytest.raises(ValueError, match="questions has the id 'q1' more than once"):
        labelled(of_models, edited(ROWS, "id", 0, "q1"))
    with pytest.raises(ValueError, match="questions, row 2: prompt is None, expected text"):
        labelled(of_models, edited(ROWS, "prompt", 2, None))


def test_a_row_that_is_there_twice_is_named(kept: Any, tmp_path: Path) -> None:
    content, description = on_file(kept)
    first = content.splitlines(keepends=True)[0]
    with pytest.raises(ValueError, match=r"labels\.jsonl, line 5: the id 'q\d' is in line 1 already"):
        again(kept, tmp_path, content + first, description)


@pytest.mark.parametrize(
    "content", ["id,answer\nq0,a\n", "a note without an end", '{"id": "mine", "answer": "b"}', "{}\n"]
)
def test_a_file_of_something_else_is_left_alone(kept: Any, tmp_path: Path, content: str) -> None:
    with pytest.raises(ValueError, match=r"labels\.jsonl, line 1: "):
        again(kept, tmp_path, content.encode(), None)
    assert (tmp_path / "labels.jsonl").read_text() == content
    assert not (tmp_path / "labels.jsonl.run.json").exists()


def test_files_of_other_processes_are_looked_through_too(kept: Any, tmp_path: Path) -> None:
    content, description = on_file(kept)
    lines = content.splitlines(keepends=True)
    own = tmp_path / "labels.jsonl.process-1"
    # Killed between leaving all rows in one file and removing the others.
    own.write_bytes(lines[1] + lines[3])
    assert again(kept, tmp_path, content, description) == kept[2]
    assert not own.exists() and (tmp_path / "labels.jsonl").read_bytes() == content
    own.write_bytes(lines[1].replace(b'"finished": false', b'"finished": true'))
    with pytest.raises(ValueError, match=r"process-1, line 1: it was changed"):
        again(kept, tmp_path, content, description)
    assert own.exists()
    own.write_bytes(lines[1][:40])
    assert again(kept, tmp_path, lines[0], description) == kept[2] and not own.exists()


def test_reading_labels_changes_nothing(kept: Any, tmp_path: Path) -> None:
    content, description = on_file(kept)
    torn = content[:-20]
    (tmp_path / "labels.jsonl").write_bytes(torn)
    rows = read_labels(tmp_path / "labels.jsonl")
    # Another process may be writing the rest of that line.
    assert (tmp_path / "labels.jsonl").read_bytes() == torn and len(rows) == 3
    assert read_labels(tmp_path / "missing.jsonl") == []
    # A file of the user's own making has no description: what is in it is checked, and whose it is is not asked.
    changed = json.loads(content.splitlines()[0]) | {"answer": "by hand"}
    (tmp_path / "labels.jsonl").write_text(json.dumps(changed) + "\n")
    assert read_labels(tmp_path / "labels.jsonl")[0]["answer"] == "by hand"
    (tmp_path / "labels.jsonl.run.json").write_bytes(description)
    with pytest.raises(ValueError, match="line 1: it was changed"):
        read_labels(tmp_path / "labels.jsonl")


def test_pandas_and_datasets_read_the_file(kept: Any, tmp_path: Path) -> None:
    frame = pandas.read_json(kept[1], lines=True)
    table = Dataset.from_json(str(kept[1]), cache_dir=str(tmp_path))
    by_id = {row["id"]: row for row in kept[2]}
    assert len(frame) == len(table) == 4
    for row in [*frame.to_dict("records"), *table]:
        for name in ("prompt", "answer", "answer_ids", "finished", "confidence"):
            assert row[name] == (
                pytest.approx(by_id[row["id"]][name]) if name == "confidence" else by_id[row["id"]][name]
            )
    for row in read_labels(kept[1]):
        np.testing.assert_array_equal(row["top_log_probs"], np.float32(by_id[row["id"]]["top_log_probs"]))


def test_a_long_setting_is_shown_in_short(of_models: TokenEnsemble) -> None:
    of_models.generation_config.bad_words_ids = [[number] for number in range(10_000)]
    with pytest.raises(ValueError, match=r"bad_words_ids is \[\[0\], ") as error:
        labelled(of_models)
    assert len(str(error.value)) < 500


def test_a_folder_is_no_file(of_models: TokenEnsemble, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder: name a file in it"):
        labelled(of_models, output_file=tmp_path)


# Questions as people have them


def test_questions_without_ids_are_labelled_and_gone_on_with(of_models: TokenEnsemble, tmp_path: Path) -> None:
    bare = questions(4).select_columns(["prompt"])
    found = labelled(of_models, bare, output_file=tmp_path / "labels.jsonl")
    assert len(set(found["id"])) == 4
    lines = (tmp_path / "labels.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "labels.jsonl").write_text("".join(lines[:2]))
    for again in (bare.to_list(), bare.with_format("numpy"), bare.to_pandas()):
        assert labelled(of_models, again, output_file=tmp_path / "labels.jsonl").to_list() == found.to_list()
    assert len((tmp_path / "labels.jsonl").read_text().splitlines()) == 4


def test_conversations_are_labelled_kept_and_learned_from(of_models: TokenEnsemble, tmp_path: Path) -> None:
    chatty = tokenizer()
    chatty.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }} {% endfor %}a:"
    form = QuestionFormat("{prompt}", "", use_chat_template=True)
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in questions(4)]
    options = OPTIONS | {"question_format": form, "output_file": tmp_path / "labels.jsonl"}
    found = of_models.label(rows, chatty, **options)
    assert found["prompt"] == [row["prompt"] for row in rows]
    assert of_models.label(rows, chatty, **options).to_list() == found.to_list()
    texts = of_models.label([{"prompt": f"u:{row['prompt']} a:"} for row in questions(4)], tokenizer(),
                            **(OPTIONS | {"question_format": QuestionFormat("{prompt}", "")}))  # fmt: skip
    assert texts["answer_ids"] == found["answer_ids"]
    args = StudentConfig(output_dir=str(tmp_path / "student"), max_steps=1, disable_tqdm=True, keep_unfinished=True)
    for answers in (found, read_labels(tmp_path / "labels.jsonl"), found.to_pandas()):
        trainer = StudentTrainer(llama(3), args, answers, chatty, question_format=form)
        trainer.train()
        assert set(trainer.train_dataset["id"]) == set(found["id"])


def test_sampling_that_is_no_sampling_is_refused(of_models: TokenEnsemble) -> None:
    with pytest.raises(TypeError, match=r"sampling must be an ensemw2s.Sampling, got \{'temperature': 0.7\}"):
        of_models.label(questions(2), tokenizer(), sampling={"temperature": 0.7})


@pytest.mark.parametrize("idle", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_a_filter_of_greedy_answers_is_refused(idle: dict[str, Any]) -> None:
    (name,) = idle
    with pytest.raises(
        ValueError, match=f"{name}=.* does nothing without a temperature above 0 .*: set that, or leave it out"
    ):
        Sampling(seed=4, **idle)
    assert getattr(Sampling(temperature=0.5, **idle), name) == idle[name]
