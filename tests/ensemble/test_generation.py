"""`generate` as users of transformers call it, on adapters and on whole models of two architectures."""

from __future__ import annotations

import copy
import itertools
import math
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from tokenizers import decoders
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessorList,
    MaxTimeCriteria,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TextStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    pipeline,
)

from ensemw2s import TokenEnsemble, ops
from ensemw2s.models.loading import CACHE
from ensemw2s.ops import products
from tests.reference import assert_greedy, ragged_prompts, slow_mixture, slow_mixtures
from tests.tiny import END, PAD, VOCAB, llama, questions, saved_adapters, tokenizer

WIDTH = 9


def full_prompt(seed: int = 0) -> torch.Tensor:
    """One prompt of nine tokens without padding."""
    return ragged_prompts(1, seed)[0].clamp_min(2)


def greedy(ensemble: TokenEnsemble, ids: torch.Tensor, **kwargs: Any) -> list[list[int]]:
    return ensemble.generate(input_ids=ids, do_sample=False, **kwargs)[:, ids.shape[1] :].tolist()


def slow_greedy(ensemble: TokenEnsemble, prompt: list[int], length: int) -> list[int]:
    """The greedy answer, end token included, one uncached float64 mixture a token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + length and ids[-1] != END:
        ids.append(int(slow_mixture(ensemble, ids).argmax()))
    return ids[len(prompt) :]


# Greedy decoding


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("combine", ["prob", "logprob", "vote"])
def test_greedy_text_equals_the_slow_loop_without_caches(ensemble: TokenEnsemble, combine: str, fused: bool) -> None:
    ensemble.config.combine = combine
    ids, mask = ragged_prompts(50)
    # Nothing ends a text but its length, so that all 64 places are compared.
    out = ensemble.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=64, do_sample=False, fused=fused, eos_token_id=-1
    )
    assert out.shape[1] == WIDTH + 64
    for row in range(len(ids)):
        assert_greedy(ensemble, ids[row][mask[row].bool()].tolist(), out[row, WIDTH:].tolist(), end=None)


@pytest.mark.parametrize("fused", [True, False])
def test_a_row_that_has_ended_is_padded(ensemble: TokenEnsemble, fused: bool) -> None:
    ids, mask = ragged_prompts(50)
    out = ensemble.generate(input_ids=ids, attention_mask=mask, max_new_tokens=40, do_sample=False, fused=fused)
    ended = 0
    for row in range(len(ids)):
        answer = out[row, WIDTH:].tolist()
        length = answer.index(END) + 1 if END in answer else len(answer)
        ended += length < len(answer)
        assert set(answer[length:]) <= {PAD}
        assert_greedy(ensemble, ids[row][mask[row].bool()].tolist(), answer[:length])
    assert 0 < ended < len(ids)


@pytest.mark.parametrize("option", [{"use_cache": False}, {"generation_config": GenerationConfig(use_cache=False)}])
def test_without_a_cache_the_text_is_the_same(ensemble: TokenEnsemble, option: dict[str, Any]) -> None:
    ids = full_prompt()
    calls = []
    ensemble.register_forward_hook(lambda module, args, kwargs, out: calls.append(out.get(CACHE)), with_kwargs=True)
    assert greedy(ensemble, ids, max_new_tokens=10, **option)[0] == slow_greedy(ensemble, ids[0].tolist(), 10)
    assert calls and all(cache is None for cache in calls)


def test_one_new_token_and_none(ensemble: TokenEnsemble) -> None:
    ids = full_prompt()
    assert greedy(ensemble, ids, max_new_tokens=1) == [slow_greedy(ensemble, ids[0].tolist(), 1)]
    with pytest.raises(ValueError, match="`max_new_tokens` must be greater than 0"):
        ensemble.generate(input_ids=ids, max_new_tokens=0)


@pytest.mark.parametrize("fused", [True, False])
def test_inference_mode(ensemble: TokenEnsemble, fused: bool) -> None:
    ids = full_prompt()
    with torch.inference_mode():
        assert greedy(ensemble, ids, max_new_tokens=8, fused=fused)[0] == slow_greedy(ensemble, ids[0].tolist(), 8)


def test_scores_and_logits_that_are_returned_are_the_mixtures(ensemble: TokenEnsemble) -> None:
    ids, mask = ragged_prompts(3)
    out = ensemble.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, return_dict_in_generate=True,
        output_scores=True, output_logits=True,
    )  # fmt: skip
    assert out[CACHE].get_seq_length() == out.sequences.shape[1] - 1
    for row in range(3):
        start = ids[row][mask[row].bool()].tolist()
        expected = slow_mixtures(ensemble, start + out.sequences[row, WIDTH:].tolist())[len(start) - 1 : -1]
        for place in range(len(out.scores)):
            torch.testing.assert_close(out.scores[place][row].double(), expected[place], rtol=0, atol=5e-5)
            torch.testing.assert_close(out.logits[place][row].double(), expected[place], rtol=0, atol=5e-5)
            if out.sequences[row, WIDTH + place] == END:
                break
    assert not out.scores[0].requires_grad


# Sampling

WARPERS = {
    "temperature": ({"temperature": 1.7}, [TemperatureLogitsWarper(1.7)]),
    "top_k": ({"top_k": 6}, [TopKLogitsWarper(6)]),
    "top_p": ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
    "min_p": ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
    "typical_p": ({"typical_p": 0.6}, [TypicalLogitsWarper(0.6)]),
    "epsilon_cutoff": ({"epsilon_cutoff": 0.05}, [EpsilonLogitsWarper(0.05)]),
    "eta_cutoff": ({"eta_cutoff": 0.02}, [EtaLogitsWarper(0.02, device="cpu")]),
    "repetition_penalty": ({"repetition_penalty": 3.0}, [RepetitionPenaltyLogitsProcessor(3.0)]),
    "no_repeat_ngram": ({"no_repeat_ngram_size": 1}, [NoRepeatNGramLogitsProcessor(1)]),
    "all_four_of_the_fused_op": (
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
        [TemperatureLogitsWarper(1.3), TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)],
    ),
}


def assert_follows(counts: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Check counts [V] against probabilities [V] with a chi-square test, rare tokens pooled."""
    expected = probabilities * counts.sum()
    kept = expected > 0
    assert counts[~kept].sum() == 0
    rare = kept & (expected < 5)
    observed = torch.cat([counts[kept & ~rare], counts[rare].sum()[None]])
    wanted = torch.cat([expected[kept & ~rare], expected[rare].sum()[None]])
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    if len(wanted) > 1:
        assert scipy.stats.chisquare(observed.numpy(), wanted.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", WARPERS)
def test_every_warper_acts_on_the_mixture(ensemble: TokenEnsemble, name: str, fused: bool) -> None:
    options, warpers = WARPERS[name]
    ids = full_prompt(3)
    torch.manual_seed(1)
    # Without these, what the generation configuration names as defaults would act as well.
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    out = ensemble.generate(
        input_ids=ids.repeat(3000, 1), max_new_tokens=1, do_sample=True, fused=fused, **(off | options)
    )
    counts = torch.bincount(out[:, -1], minlength=VOCAB).double()
    scores = slow_mixture(ensemble, ids[0].tolist())[None]
    changed = LogitsProcessorList(warpers)(ids, scores.clone()).softmax(-1)[0]
    assert not torch.allclose(changed, scores.softmax(-1)[0], atol=1e-3)
    assert_follows(counts, changed)


@pytest.mark.parametrize("fused", [True, False])
def test_several_samples_of_one_prompt_differ_and_follow_it(ensemble: TokenEnsemble, fused: bool) -> None:
    ids, mask = ragged_prompts(2)
    torch.manual_seed(0)
    out = ensemble.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, num_return_sequences=1500, max_new_tokens=2,
        fused=fused,
    )  # fmt: skip
    assert out.shape[0] == 3000
    for row in range(2):
        counts = torch.bincount(out[row * 1500 : (row + 1) * 1500, WIDTH], minlength=VOCAB).double()
        assert_follows(counts, slow_mixture(ensemble, ids[row][mask[row].bool()].tolist()).exp())


def test_a_logits_processor_acts_on_the_mixture(ensemble: TokenEnsemble) -> None:
    ids = full_prompt()
    first = slow_greedy(ensemble, ids[0].tolist(), 1)[0]

    def forbid(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, torch.tensor([first]), -math.inf)

    (answer,) = greedy(ensemble, ids, max_new_tokens=6, logits_processor=LogitsProcessorList([forbid]))
    text = ids[0].tolist()
    for token in answer:
        log_probs = slow_mixture(ensemble, text)
        log_probs[first] = -math.inf
        assert token == log_probs.argmax()
        text.append(token)


# Beams


def slow_beam_search(ensemble: TokenEnsemble, prompt: list[int], beams: int, length: int) -> list[tuple[float, list]]:
    """Beam search as its definition has it, best first: finished texts keep their score, without a length penalty."""
    running: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    for _ in range(length):
        candidates = []
        for score, answer in running:
            log_probs = slow_mixture(ensemble, prompt + answer)
            candidates += [(score + float(log_probs[token]), [*answer, token]) for token in range(VOCAB)]
        candidates.sort(key=lambda item: -item[0])
        finished += [item for item in candidates[:beams] if item[1][-1] == END]
        finished = sorted(finished, key=lambda item: -item[0])[:beams]
        running = [item for item in candidates[: 2 * beams] if item[1][-1] != END][:beams]
    return sorted(finished + running, key=lambda item: -item[0])[:beams]


@pytest.mark.parametrize("combine", ["prob", "logprob"])
def test_beam_search_equals_its_definition(ensemble: TokenEnsemble, combine: str) -> None:
    ensemble.config.combine = combine
    ids, mask = ragged_prompts(4, seed=2)
    out = ensemble.generate(
        input_ids=ids, attention_mask=mask, num_beams=4, num_return_sequences=3, max_new_tokens=7, do_sample=False,
        length_penalty=0.0, early_stopping="never", return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    for row in range(4):
        expected = slow_beam_search(ensemble, ids[row][mask[row].bool()].tolist(), 4, 7)[:3]
        for place, (score, answer) in enumerate(expected):
            found = out.sequences[row * 3 + place, WIDTH:].tolist()
            assert found[: len(answer)] == answer
            # transformers fills up with the end token where the padding token is number 0.
            assert set(found[len(answer) :]) <= {PAD, END}
            assert float(out.sequences_scores[row * 3 + place]) == pytest.approx(score, abs=1e-4)


def test_beam_search_with_every_beam_is_exhaustive(ensemble: TokenEnsemble) -> None:
    # With as many beams as there are tokens, two steps of beam search are exhaustive.
    ids = full_prompt()
    out = ensemble.generate(
        input_ids=ids, num_beams=VOCAB, max_new_tokens=2, do_sample=False, length_penalty=0.0, early_stopping=False
    )
    first = slow_mixture(ensemble, ids[0].tolist())
    scores = {(END,): float(first[END])}
    for a, b in itertools.product(range(VOCAB), range(VOCAB)):
        if a != END:
            scores[a, b] = float(first[a])
    for a in set(range(VOCAB)) - {END}:
        second = slow_mixture(ensemble, [*ids[0].tolist(), a])
        for b in range(VOCAB):
            scores[a, b] += float(second[b])
    expected = list(max(scores, key=scores.__getitem__))
    assert out[0, WIDTH : WIDTH + len(expected)].tolist() == expected


def test_beam_sampling_draws_likely_texts(ensemble: TokenEnsemble) -> None:
    ids, mask = ragged_prompts(3)
    torch.manual_seed(2)
    out = ensemble.generate(
        input_ids=ids, attention_mask=mask, num_beams=4, do_sample=True, top_k=0, max_new_tokens=6,
        length_penalty=0.0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    for row in range(3):
        start = ids[row][mask[row].bool()].tolist()
        answer = out.sequences[row, WIDTH:].tolist()
        answer = answer[: answer.index(END) + 1] if END in answer else answer
        log_probs = slow_mixtures(ensemble, start + answer)[len(start) - 1 : -1]
        expected = float(log_probs.gather(1, torch.tensor(answer)[:, None]).sum())
        assert float(out.sequences_scores[row]) == pytest.approx(expected, abs=1e-4)


# Stopping and streaming


@pytest.mark.parametrize("fused", [True, False])
def test_stop_strings_end_the_text(ensemble: TokenEnsemble, fused: bool) -> None:
    ids = full_prompt()
    answer = slow_greedy(ensemble, ids[0].tolist(), 20)
    stop = next(token for token in answer[3:] if token > END)
    expected = answer[: answer.index(stop) + 1]
    assert expected != answer
    # Stop strings are looked for in what the tokens write without spaces between them.
    letters = tokenizer()
    letters.backend_tokenizer.decoder = decoders.Fuse()
    options = {"max_new_tokens": 20, "stop_strings": [letters.decode([stop])], "tokenizer": letters}
    assert greedy(ensemble, ids, fused=fused, **options) == [expected]


@pytest.mark.parametrize("fused", [True, False])
def test_stopping_criteria_see_every_row(ensemble: TokenEnsemble, fused: bool) -> None:
    ids, mask = ragged_prompts(4)

    def enough(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Row i stops after i + 2 tokens."""
        return torch.tensor([input_ids.shape[1] - WIDTH >= row + 2 for row in range(len(input_ids))])

    out = greedy(
        ensemble, ids, attention_mask=mask, max_new_tokens=30, stopping_criteria=StoppingCriteriaList([enough]),
        fused=fused,
    )  # fmt: skip
    for row, answer in enumerate(out):
        expected = slow_greedy(ensemble, ids[row][mask[row].bool()].tolist(), row + 2)
        assert answer == expected + [PAD] * (len(answer) - len(expected))


def test_time_runs_out(of_models: TokenEnsemble) -> None:
    criteria = StoppingCriteriaList([MaxTimeCriteria(max_time=0.0)])
    assert len(greedy(of_models, full_prompt(), max_new_tokens=50, stopping_criteria=criteria)[0]) == 1


@pytest.mark.parametrize("fused", [True, False])
def test_text_streamers_write_the_text(
    ensemble: TokenEnsemble, fused: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = full_prompt()
    text = tokenizer().decode(slow_greedy(ensemble, ids[0].tolist(), 12), skip_special_tokens=True)
    options = {"input_ids": ids, "max_new_tokens": 12, "do_sample": False, "fused": fused}
    capsys.readouterr()
    ensemble.generate(**options, streamer=TextStreamer(tokenizer(), skip_prompt=True, skip_special_tokens=True))
    assert capsys.readouterr().out.split() == text.split()
    streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=60, skip_special_tokens=True)
    thread = threading.Thread(target=ensemble.generate, kwargs=options | {"streamer": streamer})
    thread.start()
    assert "".join(streamer).split() == text.split()
    thread.join()


# Assisted decoding


def forwards(model: torch.nn.Module) -> list[int]:
    """A list that grows by the number of new tokens whenever `model` runs."""
    seen: list[int] = []
    model.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("same", [True, False])
def test_an_assistant_model_leaves_the_text_as_it_is(ensemble: TokenEnsemble, same: bool) -> None:
    # An assistant whose guesses are often right, and one whose guesses are mostly wrong.
    assistant = llama(0 if same else 9)
    plain = {seed: greedy(ensemble, full_prompt(seed), max_new_tokens=30) for seed in range(4)}
    seen, drafted = forwards(ensemble), forwards(assistant)
    for seed, expected in plain.items():
        assert greedy(ensemble, full_prompt(seed), max_new_tokens=30, assistant_model=assistant) == expected
    assert drafted and max(seen[1:]) > 1


def test_prompt_lookup_leaves_the_text_as_it_is(ensemble: TokenEnsemble) -> None:
    prompts = [torch.cat([full_prompt(seed), full_prompt(seed)], 1) for seed in range(4)]
    plain = [greedy(ensemble, ids, max_new_tokens=30) for ids in prompts]
    seen = forwards(ensemble)
    for ids, expected in zip(prompts, plain, strict=True):
        found = greedy(ensemble, ids, max_new_tokens=30, prompt_lookup_num_tokens=4)
        # transformers 5.12 at times writes one token too many, with plain models too.
        assert [row[: len(expected[0])] for row in found] == expected and len(found[0]) <= len(expected[0]) + 1
    # Drafts were read, several tokens at once.
    assert len([count for count in seen if 1 < count < 18]) > 3


def test_an_ensemble_assists_another_model(ensemble: TokenEnsemble) -> None:
    model = llama(0)
    for seed in range(4):
        ids = full_prompt(seed)
        options = {"input_ids": ids, "max_new_tokens": 30, "do_sample": False}
        plain = model.generate(**options)
        seen = forwards(ensemble)
        assert model.generate(**options, assistant_model=ensemble).tolist() == plain.tolist()
        assert seen


def test_assisted_sampling_follows_the_mixture(ensemble: TokenEnsemble) -> None:
    ids = full_prompt(3)
    torch.manual_seed(5)
    assistant = llama(0)
    draws = [
        ensemble.generate(input_ids=ids, max_new_tokens=3, do_sample=True, top_k=0, assistant_model=assistant)[0, WIDTH]
        for _ in range(120)
    ]
    counts = torch.bincount(torch.stack(draws), minlength=VOCAB).double()
    assert_follows(counts, slow_mixture(ensemble, ids[0].tolist()).exp())


# Caches


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_a_cache_that_was_returned_goes_on(ensemble: TokenEnsemble, fused: bool, whole: bool) -> None:
    ids, mask = ragged_prompts(3)
    first = ensemble.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, return_dict_in_generate=True,
        eos_token_id=-1,
    )  # fmt: skip
    more = torch.cat([first.sequences, torch.full((3, 2), 7)], 1)
    mask = torch.cat([mask, torch.ones(3, 7, dtype=torch.int64)], 1)
    # The last token was chosen, and read by no expert yet.
    seen = first[CACHE].get_seq_length()
    assert seen == WIDTH + 4
    sizes = forwards(ensemble)
    out = ensemble.generate(
        input_ids=more if whole else more[:, seen:], attention_mask=mask, max_new_tokens=6, do_sample=False,
        fused=fused, eos_token_id=-1, **{CACHE: first[CACHE]},
    )  # fmt: skip
    assert not sizes or sizes[0] == 3
    for row in range(3):
        assert_greedy(ensemble, more[row][mask[row].bool()].tolist(), out[row, -6:].tolist(), end=None)


@pytest.mark.parametrize("fused", [True, False])
def test_a_cache_that_holds_the_whole_prompt_is_refused(ensemble: TokenEnsemble, fused: bool) -> None:
    ids = full_prompt()
    cache = ensemble.new_cache()
    with torch.no_grad():
        ensemble(input_ids=ids, use_cache=True, **{CACHE: cache})
    with pytest.raises(ValueError, match=r"cache holds 9 tokens and the prompt 9.*cache\.crop\(-1\)"):
        ensemble.generate(input_ids=ids, fused=fused, **{CACHE: cache})
    cache.crop(-1)
    assert greedy(ensemble, ids, max_new_tokens=5, **{CACHE: cache})[0] == slow_greedy(ensemble, ids[0].tolist(), 5)


@pytest.mark.parametrize("name", ["static", "quantized", "offloaded"])
@pytest.mark.parametrize("where", ["argument", "configuration"])
def test_other_kinds_of_caches_are_refused(of_models: TokenEnsemble, name: str, where: str) -> None:
    ids = full_prompt()
    option: dict[str, Any] = {"cache_implementation": name}
    if where == "configuration":
        option = {"generation_config": GenerationConfig(**option)}
    with pytest.raises(ValueError, match=f"cache_implementation='{name}' does not work.*leave it out"):
        of_models.generate(input_ids=ids, max_new_tokens=2, **option)


@pytest.mark.parametrize("where", ["argument", "configuration"])
def test_the_dynamic_cache_may_be_named(of_models: TokenEnsemble, where: str) -> None:
    ids = full_prompt()
    option: dict[str, Any] = {"cache_implementation": "dynamic"}
    if where == "configuration":
        option = {"generation_config": GenerationConfig(**option)}
    assert greedy(of_models, ids, max_new_tokens=5, **option)[0] == slow_greedy(of_models, ids[0].tolist(), 5)


# The end of the context


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("option", [{"max_new_tokens": 40}, {"max_length": 300}])
def test_generation_stops_at_the_end_of_the_context(
    ensemble: TokenEnsemble, fused: bool, option: dict[str, int]
) -> None:
    ids = torch.randint(2, VOCAB, (1, 120), generator=torch.Generator().manual_seed(3))
    with pytest.warns(UserWarning, match="beyond the 128 tokens that expert 1 reads.*at most 8 new tokens"):
        (answer,) = greedy(ensemble, ids, fused=fused, eos_token_id=-1, **option)
    assert len(answer) == 8
    assert_greedy(ensemble, ids[0].tolist(), answer, end=None)


def test_padding_takes_no_room(of_models: TokenEnsemble) -> None:
    ids, mask = ragged_prompts(2)
    ids = torch.nn.functional.pad(ids, (125, 0), value=PAD)
    mask = torch.nn.functional.pad(mask, (125, 0))
    out = of_models.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=-1
    )  # fmt: skip
    for row in range(2):
        assert_greedy(of_models, ids[row][mask[row].bool()].tolist(), out[row, -5:].tolist(), end=None)


# Number formats and devices


def test_autocast_gives_normalised_float32(ensemble: TokenEnsemble) -> None:
    ids, mask = ragged_prompts(4)
    with torch.no_grad():
        exact = ensemble(input_ids=ids, attention_mask=mask).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = ensemble(input_ids=ids, attention_mask=mask).logits
            out = ensemble.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert rough.dtype == torch.float32
    assert torch.isfinite(rough).all()
    torch.testing.assert_close(rough.exp().sum(-1), torch.ones(rough.shape[:2]), rtol=0, atol=1e-5)
    assert not torch.equal(rough, exact)
    kept = mask.bool()
    assert (rough - exact).abs()[kept].mean() < 0.2
    assert out.shape[1] > WIDTH


@pytest.mark.parametrize("kind", ["of_adapters", "of_models"])
@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_device_maps(kind: str, device_map: Any, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    ensemble = request.getfixturevalue(kind)
    ensemble.save_pretrained(tmp_path / "saved")
    loaded = TokenEnsemble.from_pretrained(tmp_path / "saved", device_map=device_map)
    ids, mask = ragged_prompts(4)
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert loaded.generate(**options).tolist() == ensemble.generate(**options).tolist()
    assert loaded.device.type == "cpu"


@pytest.mark.parametrize("kind", ["of_adapters", "of_models"])
def test_bfloat16(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    ensemble = request.getfixturevalue(kind)
    ensemble.save_pretrained(tmp_path / "saved")
    loaded = TokenEnsemble.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    ids, mask = ragged_prompts(4)
    with torch.no_grad():
        log_probs = loaded(input_ids=ids, attention_mask=mask).logits
        logits = loaded.expert_logits(range(3), ids, mask)
    assert log_probs.dtype == torch.float32
    assert all(row.dtype == torch.bfloat16 for row in logits)
    expected = ops.mixture_log_probs([row.double() for row in logits], loaded.mixture_weights(), impl="reference")
    torch.testing.assert_close(log_probs, expected.float(), rtol=0, atol=1e-5)
    fused = loaded.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert fused.shape[0] == 4


# The pipeline


def test_the_text_generation_pipeline(ensemble: TokenEnsemble, caplog: pytest.LogCaptureFixture) -> None:
    writer = pipeline("text-generation", model=ensemble, tokenizer=tokenizer())
    prompts = ["abc:", "hello world:"]
    found = writer(prompts, max_new_tokens=10, do_sample=False, return_full_text=False)
    assert not [record for record in caplog.records if "not supported" in record.getMessage()]
    for prompt, answer in zip(prompts, found, strict=True):
        ids = tokenizer()(prompt)["input_ids"]
        expected = tokenizer().decode(slow_greedy(ensemble, ids, 10), skip_special_tokens=True)
        assert answer[0]["generated_text"].split() == expected.split()


def test_the_pipeline_in_batches(of_models: TokenEnsemble) -> None:
    letters = tokenizer()
    letters.padding_side = "left"
    writer = pipeline("text-generation", model=of_models, tokenizer=letters, batch_size=3)
    prompts = ["abc:", "hello world:", "x:", "number 12:"]
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    together = writer(prompts, **options)
    assert together == [writer(prompt, **options) for prompt in prompts]


# One name for a cache, whatever transformers calls it


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_filled_cache_is_read_under_either_name(ensemble: TokenEnsemble, name: str, fused: bool) -> None:
    ids = full_prompt()
    cache = ensemble.new_cache()
    with torch.no_grad():
        ensemble(input_ids=ids[:, :6], use_cache=True, **{name: cache})
    assert cache.get_seq_length() == 6
    more = {"attention_mask": torch.ones_like(ids), name: cache}
    assert greedy(ensemble, ids[:, 6:], max_new_tokens=5, fused=fused, **more)[0] == slow_greedy(
        ensemble, ids[0].tolist(), 5
    )


def test_a_cache_under_both_names_or_of_another_kind_is_refused(ensemble: TokenEnsemble) -> None:
    ids = full_prompt()
    calls = (ensemble, partial(ensemble.generate, max_new_tokens=1))
    for call in calls:
        with pytest.raises(TypeError, match="cache and past_key_values are two names of one argument: give one"):
            call(input_ids=ids, cache=ensemble.new_cache(), past_key_values=ensemble.new_cache())
        with pytest.raises(TypeError, match="past_key_values is a tuple: expected an EnsembleCache"):
            call(input_ids=ids, past_key_values=((torch.zeros(1),),))
        foreign = llama(0)(ids, use_cache=True)[CACHE]
        with pytest.raises(ValueError, match="past_key_values is a filled DynamicCache"):
            call(input_ids=ids, past_key_values=foreign)


def test_a_cache_of_other_experts_or_rows_is_refused(ensemble: TokenEnsemble, tmp_path: Path) -> None:
    ids = full_prompt()
    calls = (ensemble, partial(ensemble.generate, max_new_tokens=1))
    filled = ensemble.new_cache()
    with torch.no_grad():
        ensemble(input_ids=ids, cache=filled)
    more = torch.cat([ids, ids[:, :1]], 1)
    for call in calls:
        with pytest.raises(ValueError, match="made for 2 experts that are not the 3 of this ensemble"):
            call(input_ids=more, cache=ensemble[1:].new_cache())
        with pytest.raises(ValueError, match="made for 3 experts that are not the 3"):
            call(input_ids=more, cache=ensemble.reweighted([1.0] * 3, [2, 1, 0]).new_cache())
        with pytest.raises(ValueError, match=r"holds 1 rows and the input has 2: .*batch_repeat_interleave"):
            call(input_ids=more.repeat(2, 1), cache=filled)
    # Other weights are no other experts.
    ensemble.reweighted([1.0, 1.0, 1.0]).generate(input_ids=more, cache=filled, max_new_tokens=1)


def test_a_copied_cache_goes_on_by_itself_and_copies_no_model(ensemble: TokenEnsemble) -> None:
    ids = full_prompt()
    cache = ensemble.new_cache()
    with torch.no_grad():
        ensemble(input_ids=ids[:, :6], cache=cache)
    copied = copy.deepcopy(cache)
    assert copied.passes is cache.passes
    assert all(mine is theirs for mine, theirs in zip(copied.members, cache.members, strict=True))
    more = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5}
    expected = slow_greedy(ensemble, ids[0].tolist(), 5)
    assert greedy(ensemble, ids[:, 6:], cache=copied, **more)[0] == expected
    assert cache.get_seq_length() == 6
    assert greedy(ensemble, ids[:, 6:], cache=cache, **more)[0] == expected


# What comes with expert 1


def with_settings(**settings: Any) -> TokenEnsemble:
    """Two models, the first of which comes with a generation configuration of its own."""
    first = llama(0)
    first.generation_config.update(**settings)
    return TokenEnsemble.from_models([first, llama(2)], [1.0, 1.5])


def test_the_settings_of_expert_1_are_the_ensembles_as_a_copy() -> None:
    ensemble = with_settings(repetition_penalty=1.6)
    ids = full_prompt()
    plain = TokenEnsemble.from_models([llama(0), llama(2)], [1.0, 1.5])
    penalised = greedy(plain, ids, max_new_tokens=12, repetition_penalty=1.6)
    assert greedy(ensemble, ids, max_new_tokens=12) == penalised != greedy(plain, ids, max_new_tokens=12)
    for way_out in (None, 1.0):
        ensemble.generation_config.repetition_penalty = way_out
        assert greedy(ensemble, ids, max_new_tokens=12) == greedy(plain, ids, max_new_tokens=12)
    assert ensemble.experts.carrier(0).generation_config.repetition_penalty == 1.6


def test_sampling_of_expert_1_is_the_ensembles() -> None:
    ensemble = with_settings(do_sample=True, top_k=3, temperature=1.5)
    plain = TokenEnsemble.from_models([llama(0), llama(2)], [1.0, 1.5])
    ids = full_prompt()
    torch.manual_seed(1)
    drawn = ensemble.generate(input_ids=ids, max_new_tokens=12)
    torch.manual_seed(1)
    assert torch.equal(
        drawn, plain.generate(input_ids=ids, max_new_tokens=12, do_sample=True, top_k=3, temperature=1.5)
    )


@pytest.mark.parametrize(
    "way",
    [{}, {"fused": False}, {"repetition_penalty": 1.0001}, {"return_dict_in_generate": True}, {"do_sample": True}],
    ids=["fused", "general", "penalty", "dict", "sampling"],
)
@pytest.mark.parametrize("pad", [PAD, None])
def test_every_end_token_of_expert_1_ends_a_text(way: dict[str, Any], pad: int | None) -> None:
    plain = TokenEnsemble.from_models([llama(0), llama(2)], [1.0, 1.5])
    ids, mask = ragged_prompts(12)
    free = plain.generate(input_ids=ids, attention_mask=mask, max_new_tokens=10, do_sample=False, eos_token_id=-1)
    # Tokens that greedy texts come by in their middle.
    ends = [int(free[0, WIDTH + 3]), int(free[1, WIDTH + 5])]
    ensemble = with_settings(eos_token_id=ends, pad_token_id=pad)
    ensemble.config.pad_token_id = pad
    torch.manual_seed(0)
    out = ensemble.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=10, **({"do_sample": False, "top_k": 1} | way)
    )
    out = getattr(out, "sequences", out)[:, WIDTH:]
    met = set()
    for row in out.tolist():
        stops = [place for place, token in enumerate(row) if token in ends]
        if stops:
            met.add(row[stops[0]])
            assert set(row[stops[0] + 1 :]) <= {ends[0] if pad is None else pad}
    assert met == set(ends)


# Experts that give no numbers


DAMAGE = {"nan": math.nan, "inf": math.inf, "nothing": -math.inf}
WAYS: dict[str, dict[str, Any]] = {
    "fused": {},
    "general": {"fused": False},
    "sampling": {"do_sample": True, "top_p": 0.9},
    "penalty": {"repetition_penalty": 1.3},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "dict": {"return_dict_in_generate": True, "output_scores": True},
    "no cache": {"use_cache": False},
    "lookup": {"prompt_lookup_num_tokens": 2},
    "several": {"num_return_sequences": 3, "do_sample": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", DAMAGE)
def test_an_expert_without_numbers_is_named_on_every_path(of_models: TokenEnsemble, what: str, way: str) -> None:
    def damage(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        # One token for +inf, all of them for the others.
        output[..., 3 : 4 if what == "inf" else None] = DAMAGE[what]
        if what == "nothing":
            output[:] = DAMAGE[what]
        return output

    of_models.experts.carrier(1).get_output_embeddings().register_forward_hook(damage)  # type: ignore[operator]
    with pytest.raises(FloatingPointError, match=r"^expert 2 gave NaN, infinity or no finite logit for row 0 of the"):
        of_models.generate(input_ids=full_prompt(), max_new_tokens=4, **({"do_sample": False} | WAYS[way]))


@pytest.mark.parametrize("way", ["fused", "general", "beams", "several"])
def test_the_row_without_numbers_is_the_prompts(of_models: TokenEnsemble, way: str) -> None:
    if way in ("fused", "general"):
        of_models = TokenEnsemble.from_models([llama(0), llama(1)], [1.0, 1.0])
    else:
        of_models = TokenEnsemble.from_models([llama(0), llama(1), llama(2)], [1.0, 1.0, 1.0])
    ids = full_prompt().clamp(10, 20).repeat(3, 1)
    ids[1, 4] = 30
    with torch.no_grad():
        of_models.experts.carrier(1).model.embed_tokens.weight[30] = math.nan  # type: ignore[index,union-attr]
    with pytest.raises(FloatingPointError, match=r"^expert 2 gave NaN, .* for row 1 of the batch: the weights"):
        of_models.generate(input_ids=ids, max_new_tokens=2, **({"do_sample": False} | WAYS[way]))


@pytest.mark.parametrize("fused", [True, False])
def test_adapters_without_numbers_are_named(of_adapters: TokenEnsemble, fused: bool) -> None:
    base = of_adapters.experts.carrier(0)
    with torch.no_grad():
        for name, weight in base.named_parameters():
            if "lora_B.expert_3" in name:
                weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"^expert 3 gave NaN"):
        of_adapters.generate(input_ids=full_prompt(), max_new_tokens=4, do_sample=False, fused=fused)
    with pytest.raises(FloatingPointError, match=r"^expert 3 gave NaN.* row 0 of the batch"):
        of_adapters(input_ids=full_prompt())
    assert of_adapters[:2].generate(input_ids=full_prompt(), max_new_tokens=1) is not None


def test_what_padding_gives_is_no_matter(of_models: TokenEnsemble) -> None:
    ids, mask = ragged_prompts(6)
    with torch.no_grad():
        expected = of_models(input_ids=ids, attention_mask=mask).logits

    def damage(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((mask == 0)[..., None], math.nan)

    of_models.experts.carrier(1).get_output_embeddings().register_forward_hook(damage)  # type: ignore[operator]
    with torch.no_grad():
        found = of_models(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(found[mask.bool()], expected[mask.bool()])


def test_experts_that_rule_out_every_token_together_are_no_damage() -> None:
    ensemble = TokenEnsemble.from_models([llama(0), llama(1)], [1.0, 1.0], combine="logprob")
    for index, part in enumerate((slice(0, 20), slice(20, None))):
        ensemble.experts.carrier(index).get_output_embeddings().register_forward_hook(  # type: ignore[operator]
            lambda module, inputs, output, part=part: output.index_fill_(
                -1, torch.arange(output.shape[-1])[part], -math.inf
            )
        )
    for fused in (True, False):
        with pytest.raises(FloatingPointError, match=r"mixture gives no token a probability for row 0 of the batch"):
            ensemble.generate(input_ids=full_prompt(), max_new_tokens=1, do_sample=False, fused=fused)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 1, got -1"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number, got True"),
        ({"top_logprobs": 2.5}, "top_logprobs must be a whole number, got 2.5"),
        ({"top_temperature": 2.0}, "top_temperature=2.0 does nothing without top_logprobs"),
    ],
)
def test_options_of_labelling_are_honoured_or_refused(
    of_models: TokenEnsemble, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        of_models.label(questions(3), tokenizer(), **options)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN")
@pytest.mark.parametrize("kind", ["adapters", "models"])
def test_either_library_of_products_gives_the_same_texts(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 320}
    if kind == "adapters":
        ensemble = TokenEnsemble.from_adapters(llama(**wide), saved_adapters(tmp_path, **wide), [0.5, 0.3, 0.2])
    else:
        ensemble = TokenEnsemble.from_models([llama(1, **wide), llama(2, **wide)], [1.0, 2.0])
    ids, mask = ragged_prompts(4)
    texts = {}
    products._copies.clear()
    for library in ("torch", "onednn"):
        monkeypatch.setenv(products.VARIABLE, library)
        texts[library] = ensemble.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        assert bool(len(products._copies)) == (library == "onednn")
    assert torch.equal(texts["torch"], texts["onednn"])


def test_a_copied_cache_shares_what_is_kept_of_the_weights(of_models: TokenEnsemble) -> None:
    cache = of_models.new_cache()
    assert copy.deepcopy(cache).frozen is cache.frozen
