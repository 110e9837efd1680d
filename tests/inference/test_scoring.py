"""Teacher-forced scores against a float64 loop with one forward pass per prefix, and against greedy decoding."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn

from ensemw2s import TokenEnsemble
from ensemw2s.data.tokens import tokenize_questions
from ensemw2s.ensemble.experts import AdapterExperts
from ensemw2s.inference.scoring import AnswerScores, score_examples, score_mixtures
from ensemw2s.models.heads import output_head
from ensemw2s.training.arguments import AnswerTrainingArguments
from ensemw2s.training.fine_tune import fine_tune
from tests.models.test_heads import THROUGH_LOGITS, build
from tests.tiny import END, FORMAT, PAD, VOCAB, gpt2, llama, questions, saved_adapters, tokenizer

WEIGHTS = [2.5, 1.25, 0.5]
MIXTURES = {"boosted": WEIGHTS, "uniform": [1.0, 1.0, 1.0], "second": [0.0, 3.0, 0.0], "two": [0.5, 0.0, 1.5]}


@pytest.fixture(params=["adapters", "models"])
def ensemble(request: pytest.FixtureRequest, tmp_path: Path) -> TokenEnsemble:
    if request.param == "adapters":
        return TokenEnsemble.from_adapters(llama(0), saved_adapters(tmp_path), WEIGHTS)
    return TokenEnsemble.from_models([llama(0), gpt2(1), llama(2)], WEIGHTS)


def random_examples(count: int, seed: int) -> Dataset:
    """Prompts of 1 to 8 and answers of 1 to 6 random tokens, padding and end tokens among them."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        prompt, answer = rng.integers(1, 9), rng.integers(1, 7)
        rows.append({"input_ids": rng.integers(0, VOCAB, prompt + answer).tolist(), "prompt_length": int(prompt)})
    return Dataset.from_list(rows)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, True])
def test_a_batch_size_that_is_none_is_refused(batch_size: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"batch_size must be (at least 1|a whole number), got"):
        score_examples(llama(0), random_examples(3, 0), pad_token_id=PAD, batch_size=batch_size)


def greedy_examples(ensemble: TokenEnsemble, count: int, seed: int) -> Dataset:
    """Questions with the ensemble's own answers, every third one spoilt in a random token."""
    rng = np.random.default_rng(seed)
    rows = []
    for row in random_examples(count, seed):
        prompt = row["input_ids"][: row["prompt_length"]]
        answer = decoded(ensemble, prompt, int(rng.integers(1, 7)))
        if len(rows) % 3 == 0:
            answer[rng.integers(len(answer))] = int(rng.integers(2, VOCAB))
        rows.append({"input_ids": prompt + answer, "prompt_length": len(prompt)})
    return Dataset.from_list(rows)


def decoded(ensemble: TokenEnsemble, prompt: list[int], length: int) -> list[int]:
    """Greedy decoding of up to `length` tokens; nothing follows an end token."""
    ids = torch.tensor([prompt])
    options: dict[str, Any] = {"max_new_tokens": length, "do_sample": False}
    out = ensemble.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
    return out[: out.index(END) + 1] if END in out else out


def combined(log_probs: torch.Tensor, weights: torch.Tensor, combine: str) -> torch.Tensor:
    """[T, V] float64 log-probabilities to those of the mixture, term by term as the method states them."""
    weights = weights / weights.sum()
    if combine == "prob":
        return (weights @ log_probs.exp()).log()
    if combine == "logprob":
        return (weights @ log_probs).log_softmax(-1)
    votes = torch.zeros(VOCAB, dtype=torch.float64)
    for weight, row in zip(weights, log_probs, strict=True):
        votes[row.argmax()] += weight
    return votes.log()


def slow_scores(
    experts: list[nn.Module], weights: list[float], examples: Dataset, combine: str = "prob"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return wrong, log-probability and the gap of the top two, per answer token: a forward pass for every prefix."""
    wrong, gold, gap = [], [], []
    for row in examples:
        ids = torch.tensor(row["input_ids"])
        for place in range(row["prompt_length"], len(ids)):
            with torch.no_grad():
                logits = torch.stack([model(ids[None, :place], use_cache=False).logits[0, -1] for model in experts])
            values = combined(logits.log_softmax(-1), torch.tensor(weights, dtype=torch.float64), combine)
            best = values.topk(2).values
            wrong.append(bool(values.argmax() != ids[place]))
            gold.append(float(values[ids[place]]))
            gap.append(float(best[0] - best[1]) if combine != "vote" else 1.0)
    return np.array(wrong), np.array(gold), np.array(gap)


@contextmanager
def experts_in_float64(ensemble: TokenEnsemble) -> Iterator[list[nn.Module]]:
    """Every expert by itself, with its own copy of all weights."""
    experts = []
    for t in range(ensemble.num_experts):
        with ensemble.experts.expert(t) as model:
            experts.append(copy.deepcopy(model).double())
    yield experts


def assert_scores(scores: AnswerScores, examples: Dataset, slow: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    wrong, gold, gap = slow
    clear = gap > 1e-5
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(scores.token_wrong[clear], wrong[clear])
    # -inf where nobody voted for the answer's token.
    np.testing.assert_allclose(scores.token_log_probs, gold, rtol=1e-5, atol=2e-5)
    lengths = [len(row["input_ids"]) - row["prompt_length"] for row in examples]
    assert scores.lengths.tolist() == lengths
    assert scores.lengths.dtype == np.int64
    assert scores.token_log_probs.dtype == np.float32


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "gemma2", "cohere"])
def test_a_models_scores_equal_the_slow_float64_loop(name: str) -> None:
    # A plain head, a tied one, one with a bias, and two whose logits are changed behind it.
    model = {"llama": llama, "gpt2": gpt2}[name](5) if name in ("llama", "gpt2") else build(THROUGH_LOGITS[name][0], 5)
    examples = random_examples(20, seed=0)
    slow = slow_scores([copy.deepcopy(model).double()], [1.0], examples)
    assert_scores(score_examples(model, examples, pad_token_id=PAD, batch_size=6), examples, slow)


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["v_proj", "lm_head"], "use_dora": True}],
    ids=["stacked", "one-after-the-other"],
)
def test_adapters_of_the_head_are_scored_each_with_its_own(tmp_path: Path, settings: dict[str, Any]) -> None:
    for t in range(3):
        torch.manual_seed(t)
        adapted = get_peft_model(llama(0), LoraConfig(r=4, init_lora_weights=False, **settings))
        adapted.save_pretrained(tmp_path / str(t))
    ensemble = TokenEnsemble.from_adapters(llama(0), [tmp_path / str(t) for t in range(3)], WEIGHTS)
    assert len(ensemble.experts.passes()) == (3 if "use_dora" in settings else 1)
    examples = greedy_examples(ensemble, 10, seed=13)
    with experts_in_float64(ensemble) as experts:
        slow = slow_scores(experts, WEIGHTS, examples)
    assert_scores(score_examples(ensemble, examples, pad_token_id=PAD, batch_size=5), examples, slow)


@pytest.mark.parametrize("rows", [1, 5])
def test_no_more_logits_are_made_at_a_time_than_a_chunk_holds(
    ensemble: TokenEnsemble, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    examples = random_examples(16, seed=11)
    whole = score_mixtures(ensemble, examples, MIXTURES, pad_token_id=PAD)
    made: list[int] = []
    models = [ensemble.experts.base] if isinstance(ensemble.experts, AdapterExperts) else ensemble.experts.models
    for model in models:
        output_head(model).register_forward_hook(
            lambda module, inputs, output: made.append(output[..., 0].numel() if output.shape[-1] == VOCAB else 0)
        )
    monkeypatch.setattr("ensemw2s.inference.scoring.CHUNK_ELEMENTS", rows * 3 * VOCAB)
    parts = score_mixtures(ensemble, examples, MIXTURES, pad_token_id=PAD)
    # An adapter's rows of all experts are made together.
    assert max(made) == rows * (3 if len(models) == 1 else 1)
    for name in MIXTURES:
        np.testing.assert_array_equal(parts[name].token_wrong, whole[name].token_wrong)
        np.testing.assert_allclose(parts[name].token_log_probs, whole[name].token_log_probs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("combine", ["prob", "logprob", "vote"])
def test_an_ensembles_scores_equal_the_slow_float64_loop(ensemble: TokenEnsemble, combine: str) -> None:
    ensemble.config.combine = combine
    examples = greedy_examples(ensemble, 12, seed=1)
    with experts_in_float64(ensemble) as experts:
        slow = slow_scores(experts, WEIGHTS, examples, combine)
    scores = score_examples(ensemble, examples, pad_token_id=END, batch_size=5)
    assert_scores(scores, examples, slow)
    # The examples are there to be both right and wrong.
    assert 0 < scores.accuracy < 1


def test_the_summaries_are_shares_of_answers_and_of_tokens() -> None:
    wrong = np.array([False, False, True, False, False, False, True, True])
    scores = AnswerScores(np.array([2, 1, 3, 2]), wrong, np.zeros(8, dtype=np.float32))
    assert scores.correct.tolist() == [True, False, True, False]
    assert scores.accuracy == 0.5
    assert scores.token_error == 3 / 8


def test_neither_order_nor_batch_size_nor_padding_matter(ensemble: TokenEnsemble) -> None:
    examples = random_examples(17, seed=2)
    one = score_examples(ensemble, examples, pad_token_id=PAD, batch_size=1)
    starts = np.concatenate([[0], np.cumsum(one.lengths)])
    shuffled = np.random.default_rng(0).permutation(17)
    for batch_size, pad in [(4, PAD), (17, END), (64, 7)]:
        other = score_examples(ensemble, examples.select(shuffled), pad_token_id=pad, batch_size=batch_size)
        assert other.lengths.tolist() == one.lengths[shuffled].tolist()
        places = np.concatenate([np.arange(starts[row], starts[row + 1]) for row in shuffled])
        np.testing.assert_allclose(other.token_log_probs, one.token_log_probs[places], rtol=1e-5, atol=2e-5)
        np.testing.assert_array_equal(other.token_wrong, one.token_wrong[places])
        np.testing.assert_array_equal(other.correct, one.correct[shuffled])


@pytest.mark.parametrize("combine", ["prob", "logprob", "vote"])
def test_mixtures_equal_what_separate_runs_give(ensemble: TokenEnsemble, combine: str) -> None:
    ensemble.config.combine = combine
    examples = random_examples(9, seed=3)
    together = score_mixtures(ensemble, examples, MIXTURES, pad_token_id=PAD, batch_size=4)
    assert list(together) == list(MIXTURES)
    for name, weights in MIXTURES.items():
        used = [t for t, weight in enumerate(weights) if weight]
        alone = ensemble.reweighted([weights[t] for t in used], used)
        apart = score_examples(alone, examples, pad_token_id=PAD, batch_size=4)
        np.testing.assert_allclose(together[name].token_log_probs, apart.token_log_probs, rtol=1e-5, atol=2e-5)
        np.testing.assert_array_equal(together[name].token_wrong, apart.token_wrong)


def test_a_mixture_of_one_expert_is_that_expert(ensemble: TokenEnsemble) -> None:
    examples = random_examples(9, seed=4)
    one_hot = {str(t): np.eye(3)[t].tolist() for t in range(3)}
    scores = score_mixtures(ensemble, examples, one_hot, pad_token_id=PAD)
    for t in range(3):
        with ensemble.experts.expert(t) as model:
            alone = score_examples(model, examples, pad_token_id=PAD)
        np.testing.assert_allclose(scores[str(t)].token_log_probs, alone.token_log_probs, rtol=1e-5, atol=2e-5)
        np.testing.assert_array_equal(scores[str(t)].token_wrong, alone.token_wrong)


def test_each_expert_runs_once_and_unused_ones_never(ensemble: TokenEnsemble) -> None:
    rows: Counter[int] = Counter()
    count = rows.update

    def counts(t: int) -> Any:
        return lambda module, inputs, output: count({t: len(output[0])})

    if isinstance(ensemble.experts, AdapterExperts):
        # Both used experts in one pass, and each time with the rows of both.
        ensemble.experts.base.get_base_model().model.register_forward_hook(counts(0))
        expected = {0: 2 * 8}
    else:
        for t, model in enumerate(ensemble.experts.models):
            model.get_decoder().register_forward_hook(counts(t))
        expected = {0: 8, 2: 8}
    examples = random_examples(8, seed=5)
    # One token more per expert or pass, which shows how the model ends.
    expected = {t: number + (2 if len(expected) == 1 else 1) for t, number in expected.items()}
    score_mixtures(ensemble, examples, {"a": [1, 0, 2], "b": [0, 0, 1], "c": [5, 0, 0]}, pad_token_id=PAD, batch_size=4)
    assert rows == expected


@pytest.mark.parametrize("combine", ["prob", "logprob", "vote"])
def test_correct_means_that_greedy_decoding_gives_the_answer(ensemble: TokenEnsemble, combine: str) -> None:
    ensemble.config.combine = combine
    examples = greedy_examples(ensemble, 30, seed=6)
    correct = score_examples(ensemble, examples, pad_token_id=END, batch_size=8).correct
    exact = []
    for row in examples:
        prompt, answer = row["input_ids"][: row["prompt_length"]], row["input_ids"][row["prompt_length"] :]
        exact.append(decoded(ensemble, prompt, len(answer)) == answer)
    assert correct.tolist() == exact
    assert 15 <= sum(exact) < 30


def test_scoring_leaves_no_gradient_and_no_hook_behind(ensemble: TokenEnsemble) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = ensemble(input_ids=ids).logits
    score_examples(ensemble, random_examples(3, seed=7), pad_token_id=PAD)
    with torch.no_grad():
        assert torch.equal(ensemble(input_ids=ids).logits, before)
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in ensemble.parameters())


def test_a_progress_bar_only_if_it_has_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    examples = random_examples(4, seed=8)
    score_examples(llama(0), examples, pad_token_id=PAD)
    assert capsys.readouterr().err == ""
    score_examples(llama(0), examples, pad_token_id=PAD, batch_size=2, description="zero shot: ood")
    assert "zero shot: ood" in capsys.readouterr().err


# Bad input


@pytest.mark.parametrize(
    ("mixtures", "message"),
    [
        ({}, "mixtures is empty"),
        ({"short": [1.0, 2.0]}, r"mixture 'short' is \[1.0, 2.0\]: expected 3 weights"),
        ({"long": [1.0] * 4}, "mixture 'long'"),
        ({"fine": [1.0] * 3, "below": [1.0, -0.5, 1.0]}, "mixture 'below' .*at least 0"),
        ({"zero": [0.0] * 3}, "not all 0"),
        ({"nan": [1.0, float("nan"), 1.0]}, "finite"),
        ({"infinite": [1.0, float("inf"), 1.0]}, "finite"),
    ],
)
def test_mixtures_that_cannot_be_meant_are_refused(tmp_path: Path, mixtures: Any, message: str) -> None:
    ensemble = TokenEnsemble.from_models([llama(0), gpt2(1), llama(2)], WEIGHTS)
    with pytest.raises(ValueError, match=message):
        score_mixtures(ensemble, random_examples(3, seed=9), mixtures, pad_token_id=PAD)


def test_nothing_to_score_is_an_error() -> None:
    examples = random_examples(3, seed=10)
    with pytest.raises(ValueError, match="the answers to score: 0 examples, expected at least one"):
        score_examples(llama(0), examples.select([]), pad_token_id=PAD)
    empty = Dataset.from_list([{"input_ids": [4, 5], "prompt_length": 1}, {"input_ids": [4, 5], "prompt_length": 2}])
    with pytest.raises(ValueError, match="the answers to score, row 1: the answer has no tokens"):
        score_examples(llama(0), empty, pad_token_id=PAD)


def test_nan_from_an_expert_is_an_error_that_names_expert_and_row() -> None:
    damaged = llama(2)
    # Token 9 occurs in one example only.
    with torch.no_grad():
        damaged.model.embed_tokens.weight[9] = torch.nan
    ids = [[4, 5, 6], [7, 5, 6, 5, 8], [4, 9, 7, 6]]
    examples = Dataset.from_list([{"input_ids": row, "prompt_length": 1} for row in ids])
    with pytest.raises(
        FloatingPointError, match="the model gave NaN, infinity or no finite logit for the answer in row 2 of"
    ):
        score_examples(damaged, examples, pad_token_id=PAD)
    ensemble = TokenEnsemble.from_models([llama(0), damaged], [1.0, 1.0])
    with pytest.raises(FloatingPointError, match=r"^expert 2 gave NaN.* for the answer in row 2 of .*float32"):
        score_mixtures(ensemble, examples, {"first": [1, 0], "both": [1, 1]}, pad_token_id=PAD)
    # One that is not used does no harm.
    first = score_mixtures(ensemble, examples, {"first": [1, 0]}, pad_token_id=PAD)["first"]
    assert np.isfinite(first.token_log_probs).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_expert_without_numbers_is_named_where_answers_are_scored(of_models: TokenEnsemble, value: float) -> None:
    examples = Dataset.from_list([{"input_ids": [4, 5, 6, 7], "prompt_length": 2}] * 3)

    def damage(module: Any, inputs: Any, output: Any) -> None:
        # Where the head is not run, there is one column.
        if output.shape[-1] > 1:
            output[..., slice(None) if value == -np.inf else 3] = value

    of_models.experts.carrier(1).get_output_embeddings().register_forward_hook(damage)  # type: ignore[operator]
    with pytest.raises(FloatingPointError, match=r"^expert 2 gave NaN, .* the answer in row 0 of the examples, "):
        score_examples(of_models, examples, pad_token_id=PAD)


def test_an_adapter_without_numbers_is_named_where_answers_are_scored(of_adapters: TokenEnsemble) -> None:
    examples = Dataset.from_list([{"input_ids": [4, 5, 6, 7], "prompt_length": 2}] * 3)
    with torch.no_grad():
        for name, weight in of_adapters.experts.carrier(0).named_parameters():
            if "lora_B.expert_3" in name:
                weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"^expert 3 gave NaN, .* the answer in row 0 of the examples, "):
        score_examples(of_adapters, examples, pad_token_id=PAD)


def test_answers_in_tokens_that_the_model_does_not_know_are_refused() -> None:
    examples = tokenize_questions(questions(4), tokenizer(), FORMAT)
    small = llama(vocab_size=20)
    with pytest.raises(ValueError, match=r"q\d.*: token id \d+, but the model's vocabulary has 20 tokens"):
        score_examples(small, examples, pad_token_id=PAD)
    with pytest.raises(ValueError, match="use the tokenizer that belongs to the model, or resize the model first"):
        score_examples(TokenEnsemble.from_models([small], [1.0]), examples, pad_token_id=PAD)
    args = AnswerTrainingArguments(output_dir="unused", use_cpu=True)
    with pytest.raises(ValueError, match=r"expert, id q\d.*: token id"):
        fine_tune(small, examples, args, pad_token_id=PAD, seed=0, description="expert")
