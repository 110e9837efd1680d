"""What students learn from: live teachers, caches of them, and the losses against plain torch in float64."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from ensemw2s import TokenEnsemble
from ensemw2s.data.batches import AnswerCollator, next_token_mask
from ensemw2s.data.tokens import tokenize_questions
from ensemw2s.inference.decoding import Sampling
from ensemw2s.inference.label_files import packed_row, read_labels, unpacked_row
from ensemw2s.inference.labelling import top_tokens
from ensemw2s.student import teacher as student_teacher
from ensemw2s.student.answers import check_same_tokenizer
from ensemw2s.student.losses import CacheCollator, confidence_alpha, confidence_loss
from ensemw2s.student.teacher import LiveTeacher, cache_teacher, linear_head, states_at
from ensemw2s.training import predictions as training_predictions
from ensemw2s.training.predictions import HiddenPredictions, LogitPredictions
from ensemw2s.training.trainer import AnswerTokens
from tests.tiny import END, FORMAT, VOCAB, gpt2, llama, lora, questions, saved_adapters, tokenizer

WEIGHTS = [2.5, 1.25, 0.5]
ROWS, WIDTH = 11, 16


def with_bias(seed: int) -> nn.Module:
    """A model whose head is no plain product."""
    model = llama(seed)
    model.lm_head = nn.Linear(32, VOCAB)
    return model.eval()


@pytest.fixture
def of_adapters(tmp_path: Path) -> TokenEnsemble:
    return TokenEnsemble.from_adapters(llama(0), saved_adapters(tmp_path), WEIGHTS)


@pytest.fixture
def of_models() -> TokenEnsemble:
    return TokenEnsemble.from_models([llama(0), gpt2(1), llama(2)], WEIGHTS)


@pytest.fixture
def of_biased_heads() -> TokenEnsemble:
    return TokenEnsemble.from_models([llama(0), with_bias(1), llama(2)], WEIGHTS)


@pytest.fixture(params=["of_adapters", "of_models", "of_biased_heads"])
def ensemble(request: pytest.FixtureRequest) -> TokenEnsemble:
    return request.getfixturevalue(request.param)


def batch_of(count: int = 5) -> tuple[dict[str, Tensor], Tensor]:
    """Ragged questions with answers, and where their answer tokens are predicted."""
    examples = tokenize_questions(questions(count), tokenizer(), FORMAT)
    batch = AnswerCollator(END)(list(examples))
    return batch, next_token_mask(batch["labels"])


def answer_tokens(batch: dict[str, Tensor], weights: Tensor) -> AnswerTokens:
    return dataclasses.replace(AnswerTokens.of(batch), token_weights=weights)


def slow_mixture(ensemble: TokenEnsemble, batch: dict[str, Tensor], mask: Tensor, temperature: float) -> Tensor:
    """Float64 log-probabilities [n, V] of the mixture, each expert by itself."""
    weights = torch.tensor(ensemble.config.expert_weights, dtype=torch.float64)
    weights = (weights / weights.sum())[:, None, None]
    log_probs = []
    for t in range(ensemble.num_experts):
        with ensemble.experts.expert(t) as model, torch.no_grad():
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        log_probs.append((logits[mask].double() / temperature).log_softmax(-1))
    stacked = torch.stack(log_probs)
    if ensemble.config.combine == "prob":
        return (weights * stacked.exp()).sum(0).log()
    return (weights * stacked).sum(0).log_softmax(-1)


def predictions(rows: int, linear: bool, seed: int = 0) -> tuple[Any, list[Tensor]]:
    """Random predictions of a student, and the tensors that get gradients."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, WIDTH, generator=generator)
    head = torch.randn(VOCAB, WIDTH, generator=generator)
    if linear:
        leaves = [states.requires_grad_(), head.requires_grad_()]
        return HiddenPredictions(*leaves), leaves
    logits = (states @ head.T).requires_grad_()
    return LogitPredictions(logits), [logits]


def doubles(leaves: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The same predictions in float64: logits, and the tensors behind them."""
    copies = [leaf.detach().double().requires_grad_() for leaf in leaves]
    return (copies[0] @ copies[1].T if len(copies) == 2 else copies[0]), copies


def assert_like(loss: Tensor, leaves: list[Tensor], expected: Tensor, copies: list[Tensor]) -> None:
    """Compare value and gradients with float64."""
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=1e-5)
    gradients, wanted = torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, copies)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient.double(), want, rtol=2e-4, atol=2e-5)


def random_weights(count: int) -> Tensor:
    weights = torch.rand(count, generator=torch.Generator().manual_seed(8))
    weights[1] = 0.0
    return weights


# Live teachers


@pytest.mark.parametrize("linear", [True, False], ids=["states", "logits"])
@pytest.mark.parametrize("combine", ["prob", "logprob"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_kl_to_a_live_teacher_is_that_of_float64(
    ensemble: TokenEnsemble, combine: str, linear: bool, temperature: float
) -> None:
    ensemble.config.combine = combine
    batch, mask = batch_of()
    student, leaves = predictions(int(mask.sum()), linear)
    weights = random_weights(int(mask.sum()))
    loss = LiveTeacher(ensemble).kl(student, answer_tokens(batch, weights), temperature)
    logits, copies = doubles(leaves)
    log_p = slow_mixture(ensemble, batch, mask, temperature)
    kl = (log_p.exp() * (log_p - (logits / temperature).log_softmax(-1))).sum(-1)
    assert_like(loss, leaves, (weights.double() * kl).sum(), copies)


def test_a_teacher_answers_with_hidden_states_where_it_can(
    of_adapters: TokenEnsemble, of_models: TokenEnsemble, of_biased_heads: TokenEnsemble
) -> None:
    teacher = LiveTeacher(of_adapters)
    assert [each.experts for each in teacher.passes] == [(0, 1, 2)]
    assert len({head.data_ptr() for head in teacher.heads}) == 1
    assert len(LiveTeacher(of_models).heads) == 3
    assert LiveTeacher(of_biased_heads).heads == []


def test_a_voting_ensemble_is_no_soft_teacher(of_models: TokenEnsemble) -> None:
    of_models.config.combine = "vote"
    with pytest.raises(ValueError, match=r'"vote" gives one token all the probability.*variant="sft"'):
        LiveTeacher(of_models)
    with pytest.raises(ValueError, match="no soft label"):
        of_models.label(questions(2), tokenizer(), question_format=FORMAT, description=None, top_logprobs=3)


# Heads


def test_only_a_head_that_is_all_there_is_counts_as_linear() -> None:
    small: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.4,
        "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
    }  # fmt: skip
    plain = llama(0)
    assert linear_head(plain) is plain.lm_head.weight
    assert linear_head(gpt2(0)) is not None
    assert linear_head(get_peft_model(llama(0), lora())) is not None
    assert linear_head(with_bias(0)) is None
    assert linear_head(get_peft_model(llama(0), LoraConfig(target_modules=["lm_head"]))) is None
    assert linear_head(GraniteForCausalLM(GraniteConfig(**small, logits_scaling=3.0))) is None
    assert linear_head(Gemma2ForCausalLM(Gemma2Config(**small, final_logit_softcapping=30.0))) is None
    assert linear_head(Gemma2ForCausalLM(Gemma2Config(**small, final_logit_softcapping=None))) is not None


def test_looking_at_a_head_leaves_the_model_and_the_random_numbers_alone() -> None:
    model = llama(0, attention_dropout=0.5).train()
    state = torch.get_rng_state()
    linear_head(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert "forward" not in vars(model.lm_head)


def test_states_are_those_in_front_of_the_head() -> None:
    batch, mask = batch_of()
    model = llama(0)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    states = states_at(model, inputs, mask)
    torch.testing.assert_close(states @ model.lm_head.weight.T, model(**inputs).logits[mask])


# Caches


@pytest.mark.parametrize("combine", ["prob", "logprob"])
def test_the_likeliest_tokens_and_the_rest_are_the_whole_mixture(ensemble: TokenEnsemble, combine: str) -> None:
    ensemble.config.combine = combine
    batch, mask = batch_of()
    ids, log_probs = LiveTeacher(ensemble).top(batch, mask, 7, 1.5)
    assert (ids.dtype, log_probs.dtype) == (torch.int32, torch.float32)
    expected = slow_mixture(ensemble, batch, mask, 1.5)
    torch.testing.assert_close(log_probs.double(), expected.topk(7).values, rtol=0, atol=2e-5)
    torch.testing.assert_close(expected.gather(-1, ids.long()), log_probs.double(), rtol=0, atol=2e-5)
    others = expected.exp().scatter(-1, ids.long(), 0.0).sum(-1)
    torch.testing.assert_close(1 - log_probs.double().exp().sum(-1), others, rtol=0, atol=2e-6)


def test_teachers_are_read_in_chunks_that_change_nothing(
    of_adapters: TokenEnsemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, mask = batch_of()
    ids, log_probs = LiveTeacher(of_adapters).top(batch, mask, 5, 1.0)
    student = predictions(int(mask.sum()), linear=True)[0]
    likeliest = student.argmax()
    monkeypatch.setattr(training_predictions, "CHUNK_ELEMENTS", 3 * VOCAB)
    monkeypatch.setattr(student_teacher, "CHUNK_ELEMENTS", 3 * VOCAB)
    again = LiveTeacher(of_adapters).top(batch, mask, 5, 1.0)
    assert torch.equal(again[0], ids)
    torch.testing.assert_close(again[1], log_probs)
    assert torch.equal(student.argmax(), likeliest)
    assert torch.equal(likeliest, student.logits.argmax(-1))


@pytest.mark.parametrize("linear", [True, False], ids=["states", "logits"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_cache_of_all_tokens_is_the_live_teacher(
    of_adapters: TokenEnsemble, linear: bool, temperature: float
) -> None:
    batch, mask = batch_of()
    student, leaves = predictions(int(mask.sum()), linear)
    weights = random_weights(int(mask.sum()))
    teacher = LiveTeacher(of_adapters)
    live = teacher.kl(student, answer_tokens(batch, weights), temperature)
    ids, log_probs = teacher.top(batch, mask, VOCAB, temperature)
    cached = student.topk_kl(ids.long(), log_probs, weights, temperature)
    torch.testing.assert_close(cached, live, rtol=1e-4, atol=1e-5)
    for one, other in zip(torch.autograd.grad(cached, leaves), torch.autograd.grad(live, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("linear", [True, False], ids=["states", "logits"])
def test_the_kl_to_a_cache_is_that_of_float64(linear: bool) -> None:
    student, leaves = predictions(ROWS, linear)
    generator = torch.Generator().manual_seed(3)
    teacher = torch.randn(ROWS, VOCAB, generator=generator).log_softmax(-1)
    log_probs, ids = teacher.topk(6)
    weights = random_weights(ROWS)
    logits, copies = doubles(leaves)
    q = (logits / 1.5).softmax(-1)
    p, kept = log_probs.double().exp(), q.gather(-1, ids)
    rest, other = 1 - p.sum(-1), 1 - kept.sum(-1)
    expected = (weights.double() * ((p * (p / kept).log()).sum(-1) + rest * (rest / other).log())).sum()
    assert_like(student.topk_kl(ids, log_probs, weights, 1.5), leaves, expected, copies)


def test_teacher_forcing_gives_the_cache_of_labelling(ensemble: TokenEnsemble) -> None:
    options: dict[str, Any] = {"question_format": FORMAT, "description": None, "top_logprobs": 6}
    labelled = ensemble.label(questions(7), tokenizer(), max_new_tokens=5, batch_size=3, top_temperature=1.5, **options)
    bare = labelled.remove_columns(["top_token_ids", "top_log_probs", "top_temperature"])
    forced = cache_teacher(ensemble, bare, tokenizer(), temperature=1.5, batch_size=2, **options)
    assert forced.column_names == [
        *bare.column_names[:3],
        *bare.column_names[4:],
        "answer_ids",
        *forced.column_names[-3:],
    ]
    assert forced["answer_ids"] == labelled["answer_ids"]
    assert forced["top_temperature"] == [1.5] * 7
    assert forced.features["top_token_ids"] == labelled.features["top_token_ids"]
    assert forced.features["top_log_probs"] == labelled.features["top_log_probs"]
    for one, other in zip(forced["top_log_probs"], labelled["top_log_probs"], strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=5e-5)


def test_answers_from_elsewhere_are_cached_with_their_end_token(of_models: TokenEnsemble) -> None:
    data = questions(4)
    cached = cache_teacher(of_models, data, tokenizer(), top_logprobs=VOCAB, question_format=FORMAT)
    examples = tokenize_questions(data, tokenizer(), FORMAT)
    batch = AnswerCollator(END)(list(examples))
    mask = next_token_mask(batch["labels"])
    expected = slow_mixture(of_models, batch, mask, 1.0).split(mask.sum(1).tolist())
    for row, example, rows in zip(cached, examples, expected, strict=True):
        assert row["answer_ids"] == example["input_ids"][example["prompt_length"] :]
        assert row["answer_ids"][-1] == END
        found = torch.tensor(row["top_log_probs"], dtype=torch.float64)
        torch.testing.assert_close(found, rows.gather(-1, torch.tensor(row["top_token_ids"])), rtol=0, atol=2e-5)


def test_labelling_with_a_cache_goes_on_where_it_was_killed(of_adapters: TokenEnsemble, tmp_path: Path) -> None:
    data = questions(9)
    options: dict[str, Any] = {
        "question_format": FORMAT, "max_new_tokens": 5, "batch_size": 4, "description": None,
        "sampling": Sampling(temperature=1.0, seed=5), "top_logprobs": 5,
    }  # fmt: skip
    whole = of_adapters.label(data, tokenizer(), output_file=tmp_path / "whole.jsonl", **options)
    assert whole["id"] == data["id"]
    plain = of_adapters.label(data, tokenizer(), **(options | {"top_logprobs": None}))
    assert plain.to_list() == whole.select_columns(plain.column_names).to_list()
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    for cut in (0, 2, 6):
        # Killed in the middle of a line's cache.
        torn = lines[cut][: lines[cut].index("top_log_probs") + 40]
        (tmp_path / "cut.jsonl").write_text("".join(lines[:cut]) + torn)
        again = of_adapters.label(data, tokenizer(), output_file=tmp_path / "cut.jsonl", **options)
        assert again.features == whole.features
        assert again.to_list() == whole.to_list()
        assert sorted((tmp_path / "cut.jsonl").read_text().splitlines(keepends=True)) == sorted(lines)
    read = {row["id"]: row for row in read_labels(tmp_path / "whole.jsonl")}
    for row in whole:
        assert read[row["id"]]["top_log_probs"].tolist() == row["top_log_probs"]


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"top_logprobs": 4}, r"top_logprobs \(5 on file, 4 now\)\."),
        ({"top_temperature": 2.0}, r"top_temperature \(1\.0 on file, 2\.0 now\)\."),
        ({"top_logprobs": None}, r"top_logprobs \(5 on file, None now\), top_temperature \(1\.0 on file, None now\)\."),
    ],
)
def test_labels_with_another_cache_are_not_mixed_in(
    of_models: TokenEnsemble, tmp_path: Path, changes: dict[str, Any], differing: str
) -> None:
    options: dict[str, Any] = {
        "question_format": FORMAT, "max_new_tokens": 3, "description": None, "top_logprobs": 5,
        "output_file": tmp_path / "labels.jsonl",
    }  # fmt: skip
    of_models.label(questions(2), tokenizer(), **options)
    with pytest.raises(ValueError, match=rf"answers of another run; differing: {differing}.*name another file"):
        of_models.label(questions(2), tokenizer(), **(options | changes))


def test_a_row_on_file_keeps_every_bit_and_little_room() -> None:
    generator = np.random.default_rng(0)
    tokens, count, vocabulary = 20, 64, 49_152
    row = {
        "id": "q",
        "answer_ids": generator.integers(0, vocabulary, tokens).astype(np.int32),
        "top_token_ids": generator.integers(0, vocabulary, (tokens, count)).astype(np.int32),
        "top_log_probs": -generator.exponential(4, (tokens, count)).astype(np.float32),
    }
    row["top_log_probs"][0, -1] = -math.inf
    packed = packed_row(row)
    again = unpacked_row(packed)
    for name in ("answer_ids", "top_token_ids", "top_log_probs"):
        assert again[name].dtype == row[name].dtype
        np.testing.assert_array_equal(again[name], row[name])
    on_file = len(packed["top_token_ids"]) + len(packed["top_log_probs"])
    assert on_file < 0.01 * tokens * vocabulary * 4


@pytest.mark.parametrize("count", [0, VOCAB + 1])
def test_more_tokens_than_there_are_cannot_be_kept(of_models: TokenEnsemble, count: int) -> None:
    message = f"top_logprobs must be (at least 1|between 1 and the vocabulary's {VOCAB} tokens), got {count}"
    with pytest.raises(ValueError, match=message):
        of_models.label(questions(1), tokenizer(), question_format=FORMAT, description=None, top_logprobs=count)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf])
def test_a_temperature_that_is_none_is_refused(of_models: TokenEnsemble, temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature of top_logprobs must be positive and finite, got {temperature}"):
        top_tokens(of_models, [torch.zeros(2, VOCAB)] * 3, 3, temperature)


def test_a_damaged_expert_is_found_while_caching(of_models: TokenEnsemble) -> None:
    options: dict[str, Any] = {"top_logprobs": 2, "question_format": FORMAT, "batch_size": 2}
    with torch.no_grad():
        # A letter that the last question alone has.
        letter = tokenizer()("9", add_special_tokens=False)["input_ids"][0]
        of_models.experts.models[2].model.embed_tokens.weight[letter] = math.nan
    with pytest.raises(FloatingPointError, match="NaN along the answers 8 to 9: its weights are damaged"):
        cache_teacher(of_models, questions(10), tokenizer(), **options)


def test_a_batch_carries_the_cache_of_its_labelled_tokens() -> None:
    features = [
        {"input_ids": [5, 6, 7, 8], "prompt_length": 2, "token_weights": [1.0, 0.0]},
        {"input_ids": [5, 6, 7], "prompt_length": 1, "token_weights": [0.0, 2.0]},
    ]
    for index, feature in enumerate(features):
        feature["top_token_ids"] = np.arange(6).reshape(2, 3) + 10 * index
        feature["top_log_probs"] = -1.0 - np.arange(6).reshape(2, 3)
    batch = CacheCollator(AnswerCollator(END), 2)(features)
    assert batch["top_token_ids"].tolist() == [[0, 1], [13, 14]]
    assert batch["top_log_probs"].tolist() == [[-1.0, -2.0], [-4.0, -5.0]]
    assert (batch["top_token_ids"].dtype, batch["top_log_probs"].dtype) == (torch.int64, torch.float32)
    assert len(batch["labels"][batch["labels"] != -100]) == 2


# The student's own certainty


@pytest.mark.parametrize("linear", [True, False], ids=["states", "logits"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_confidence_loss_is_that_of_float64(linear: bool, alpha: float) -> None:
    student, leaves = predictions(ROWS, linear)
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    # Some labels are what the student thinks itself.
    labels[:4] = student.logits[:4].argmax(-1)
    weights = random_weights(ROWS)
    answers = AnswerTokens(torch.ones(1, ROWS, dtype=torch.bool), labels, weights, {})
    logits, copies = doubles(leaves)
    log_q = logits.log_softmax(-1)
    hard = log_q.argmax(-1)
    terms = (1 - alpha) * log_q.gather(-1, labels[:, None]) + alpha * log_q.gather(-1, hard[:, None])
    expected = -(weights.double() * terms[:, 0]).sum()
    assert_like(confidence_loss(student, answers, alpha), leaves, expected, copies)


def test_certainty_rises_linearly_and_stays() -> None:
    values = [confidence_alpha(step, 20, 0.5, 0.2) for step in range(7)]
    assert values == pytest.approx([0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.5])
    assert confidence_alpha(0, 20, 0.75, 0.0) == 0.75
    assert confidence_alpha(19, 20, 0.75, 1.0) == pytest.approx(0.75 * 19 / 20)


# One tokenizer for both


def test_tokenizers_that_differ_are_refused() -> None:
    check_same_tokenizer(tokenizer(), tokenizer())
    other = tokenizer()
    other.add_tokens(["new"])
    with pytest.raises(ValueError, match=rf"teacher's tokenizer \({VOCAB} tokens\) and the student's \({VOCAB + 1}"):
        check_same_tokenizer(tokenizer(), other)
    other = tokenizer()
    other.eos_token = "<pad>"
    with pytest.raises(ValueError, match='needs one tokenizer for both; use variant="sft"'):
        check_same_tokenizer(tokenizer(), other)


def test_a_given_answer_of_tokens_is_taken_as_it_is() -> None:
    data = Dataset.from_list([{"id": "a", "prompt": "xy", "answer": "bc"}])
    example = tokenize_questions(data, tokenizer(), FORMAT, answer_ids=[[7, 8, END]])[0]
    assert example["input_ids"][example["prompt_length"] :] == [7, 8, END]
    with pytest.raises(ValueError, match="id a: the answer 'bc' has no tokens"):
        tokenize_questions(data, tokenizer(), FORMAT, answer_ids=[[]])
