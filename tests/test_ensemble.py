"""The ensemble as a transformers model: decoding against a slow float64 loop, saving, slicing, labelling."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
)
from transformers.generation.streamers import BaseStreamer

from ensemw2s import TokenEnsemble
from ensemw2s.decoding import Sampling, label_questions
from ensemw2s.models import CACHE
from tests.reference import WEIGHTS, ragged_prompts, slow_mixture
from tests.tiny import END, FORMAT, VOCAB, llama, questions, tokenizer


def test_forward_returns_normalised_float32_log_probabilities(ensemble: TokenEnsemble) -> None:
    ids, mask = ragged_prompts(4)
    labels = torch.where(mask.bool(), ids, -100)
    with torch.no_grad():
        out = ensemble(input_ids=ids, attention_mask=mask, labels=labels)
    assert out.logits.dtype == torch.float32
    torch.testing.assert_close(out.logits.log_softmax(-1), out.logits, rtol=0, atol=2e-6)
    full = [row for row in range(4) if mask[row].all()] or [int(mask.sum(1).argmax())]
    for row in full:
        text = ids[row][mask[row].bool()].tolist()
        torch.testing.assert_close(out.logits[row, -1].double(), slow_mixture(ensemble, text), rtol=0, atol=1e-5)
    expected = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(out.loss, expected)


def test_a_cache_gives_what_a_whole_pass_gives(ensemble: TokenEnsemble) -> None:
    ids, _ = ragged_prompts(3)
    ids = ids.clamp_min(2)
    with torch.no_grad():
        whole = ensemble(input_ids=ids).logits
        first = ensemble(input_ids=ids[:, :4], use_cache=True)
        rest = ensemble(input_ids=ids[:, 4:], use_cache=True, **{CACHE: first[CACHE]})
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=0, atol=2e-5)
    assert rest[CACHE].get_seq_length() == 9


@pytest.mark.parametrize("how", ["select", "reorder", "repeat", "crop"])
@torch.no_grad()
def test_rows_of_a_cache_move_for_every_expert(ensemble: TokenEnsemble, how: str) -> None:
    ids = ragged_prompts(3)[0].clamp_min(2)
    cache = ensemble(input_ids=ids[:, :6], use_cache=True)[CACHE]
    rows, seen = torch.tensor([2, 0]), 6
    if how == "select":
        cache.batch_select_indices(rows)
    elif how == "reorder":
        cache.reorder_cache(rows)
    elif how == "repeat":
        rows = torch.tensor([0, 0, 1, 1, 2, 2])
        cache.batch_repeat_interleave(2)
    else:
        rows, seen = torch.arange(3), 4
        cache.crop(-2)
    rest = ensemble(input_ids=ids[rows, seen:], use_cache=True, **{CACHE: cache}).logits
    whole = ensemble(input_ids=ids[rows]).logits[:, seen:]
    torch.testing.assert_close(rest, whole, rtol=0, atol=2e-5)


def test_torch_manual_seed_reproduces_a_sample(ensemble: TokenEnsemble) -> None:
    ids, mask = ragged_prompts(5)
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(ensemble.generate(input_ids=ids, attention_mask=mask, do_sample=True, max_new_tokens=12).tolist())
    assert texts[0] == texts[1] != texts[2]


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_a_streamer_sees_every_token(of_adapters: TokenEnsemble) -> None:
    ids = ragged_prompts(1)[0].clamp_min(2)
    streamer = Recorder()
    out = of_adapters.generate(input_ids=ids, max_new_tokens=8, do_sample=False, streamer=streamer)
    assert streamer.tokens == out[0].tolist()
    assert streamer.ended


@pytest.mark.parametrize("kind", ["of_adapters", "of_models"])
def test_a_saved_ensemble_comes_back_exactly(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    ensemble = request.getfixturevalue(kind)
    ids, mask = ragged_prompts(3)
    ensemble.save_pretrained(tmp_path / "saved", record={"rounds": [1, 2, 3]})
    for loaded in (
        TokenEnsemble.from_pretrained(tmp_path / "saved"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved"),
    ):
        assert isinstance(loaded, TokenEnsemble)
        assert loaded.config.expert_weights == WEIGHTS
        with torch.no_grad():
            before = ensemble(input_ids=ids, attention_mask=mask).logits
            after = loaded(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(before, after)
        assert loaded.generation_config.eos_token_id == END
    assert TokenEnsemble.read_record(tmp_path / "saved") == {"rounds": [1, 2, 3]}
    assert not [file for file in (tmp_path / "saved").rglob("*") if file.suffix in (".bin", ".pt", ".pkl")]
    assert "| 1 | 2.5000 |" in (tmp_path / "saved" / "README.md").read_text()


def test_a_slice_is_the_ensemble_of_those_experts(ensemble: TokenEnsemble) -> None:
    ids, _ = ragged_prompts(2)
    ids = ids.clamp_min(2)
    two = ensemble[:2]
    assert two.num_experts == 2
    with torch.no_grad():
        log_probs = two(input_ids=ids).logits[0, -1].double()
        last = ensemble[2:](input_ids=ids).logits[0, -1].double()
    torch.testing.assert_close(log_probs, slow_mixture(two, ids[0].tolist()), rtol=0, atol=1e-5)
    with ensemble.experts.expert(2) as model, torch.no_grad():
        expected = model(ids).logits[0, -1].double().log_softmax(-1)
    torch.testing.assert_close(last, expected, rtol=0, atol=1e-5)
    with pytest.raises(TypeError, match="sliced"):
        ensemble[0]


# Pseudo-answers


def test_pseudo_answers_are_the_greedy_text_with_its_mean_log_probability(of_models: TokenEnsemble) -> None:
    data = questions(8)
    rows = of_models.label(data, tokenizer(), question_format=FORMAT, max_new_tokens=10, batch_size=3, description=None)
    assert rows["id"] == data["id"]
    for row, prompt in zip(rows, data["prompt"], strict=True):
        text = tokenizer()(f"{prompt}:", add_special_tokens=False)["input_ids"]
        total, answer = 0.0, []
        for _ in range(row["num_tokens"]):
            log_probs = slow_mixture(of_models, text)
            token = int(log_probs.argmax())
            total += float(log_probs[token])
            text = [*text, token]
            answer.append(token)
        assert row["finished"] == (answer[-1] == END)
        assert row["num_tokens"] == 10 or row["finished"]
        assert row["answer"] == tokenizer().decode([t for t in answer if t != END], skip_special_tokens=True).strip()
        assert row["confidence"] == pytest.approx(total / len(answer), abs=1e-5)
        assert 0 <= row["agreement"] <= 1


def test_labelling_goes_on_where_it_was_killed(of_models: TokenEnsemble, tmp_path: Path) -> None:
    data = questions(11)
    options = {
        "question_format": FORMAT, "max_new_tokens": 8, "batch_size": 4, "description": None,
        "sampling": Sampling(temperature=1.0), "seed": 5,
    }  # fmt: skip
    whole = label_questions(of_models, data, tokenizer(), output_file=tmp_path / "whole.jsonl", **options)
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    for cut in (0, 3, 7):
        # Killed in the middle of a line.
        (tmp_path / "cut.jsonl").write_text("".join(lines[:cut]) + lines[cut][:20])
        again = label_questions(of_models, data, tokenizer(), output_file=tmp_path / "cut.jsonl", **options)
        assert again.to_list() == whole.to_list()
        assert sorted((tmp_path / "cut.jsonl").read_text().splitlines(keepends=True)) == sorted(lines)
    assert label_questions(of_models, data, tokenizer(), **(options | {"batch_size": 1}))["answer"] == whole["answer"]


def test_labels_of_other_questions_are_not_overwritten(of_models: TokenEnsemble, tmp_path: Path) -> None:
    (tmp_path / "labels.jsonl").write_text(json.dumps({"id": "stranger", "answer": "a"}) + "\n")
    with pytest.raises(ValueError, match=r"'stranger'.*another run"):
        of_models.label(questions(2), tokenizer(), output_file=tmp_path / "labels.jsonl", description=None)


# Bad input


def test_an_ensemble_of_nothing_or_with_bad_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one expert"):
        TokenEnsemble.from_models([], [])
    with pytest.raises(ValueError, match="2 values for 1 experts"):
        TokenEnsemble.from_models([llama(0)], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"positive and finite, got -1\.0"):
        TokenEnsemble.from_models([llama(0)], [-1.0])
    with pytest.raises(ValueError, match="positive and finite, got nan"):
        TokenEnsemble.from_models([llama(0)], [math.nan])
    with pytest.raises(ValueError, match="combine must be one of prob, logprob, vote, got 'mean'"):
        TokenEnsemble.from_models([llama(0)], [1.0], combine="mean")


def test_experts_of_different_vocabularies_are_named() -> None:
    with pytest.raises(ValueError, match=f"expert 2 has a vocabulary of 99 tokens, expert 1 one of {VOCAB}"):
        TokenEnsemble.from_models([llama(0), llama(1, vocab_size=99)], [1.0, 1.0])


@pytest.mark.parametrize("kind", ["of_adapters", "of_models"])
def test_a_missing_expert_is_named(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    request.getfixturevalue(kind).save_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved" / "experts" / "2")
    with pytest.raises(FileNotFoundError, match=r"expert 2.*experts/2 holds no weights"):
        TokenEnsemble.from_pretrained(tmp_path / "saved")


def test_a_folder_that_is_no_ensemble_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"not a saved ensemble: it has no config\.json"):
        TokenEnsemble.from_pretrained(tmp_path)


def test_vote_has_no_loss_and_no_beams(of_models: TokenEnsemble) -> None:
    of_models.config.combine = "vote"
    ids = ragged_prompts(1)[0].clamp_min(2)
    with pytest.raises(ValueError, match="has no loss"):
        of_models(input_ids=ids, labels=ids)
    with pytest.raises(ValueError, match="cannot rank beams"):
        of_models.generate(input_ids=ids, num_beams=2)


def test_a_prompt_longer_than_the_context_names_the_expert(of_models: TokenEnsemble) -> None:
    with pytest.raises(ValueError, match="prompt has 129 tokens but expert 1 reads at most 128"):
        of_models.generate(input_ids=torch.full((1, 129), 3))


def test_a_damaged_expert_stops_decoding_by_name(of_models: TokenEnsemble) -> None:
    with torch.no_grad():
        of_models.experts.models[1].lm_head.weight[3] = math.nan
    with pytest.raises(FloatingPointError, match="question 'q0'"):
        of_models.label(questions(1), tokenizer(), question_format=FORMAT, description=None)


def test_a_foreign_filled_cache_is_refused(of_models: TokenEnsemble) -> None:
    ids = ragged_prompts(1)[0].clamp_min(2)
    with of_models.experts.expert(0) as model, torch.no_grad():
        foreign = model(ids, use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="filled DynamicCache"):
        of_models(input_ids=ids, **{CACHE: foreign})


def test_a_keyword_that_forward_would_drop_is_refused(of_models: TokenEnsemble) -> None:
    # A cache under a name that it does not know would be lost, and the answer wrong without a word.
    with pytest.raises(TypeError, match="does not know inputs_embeds, kv_cache"):
        of_models(input_ids=ragged_prompts(1)[0], kv_cache=of_models.new_cache(), inputs_embeds=torch.zeros(1, 2, 32))


def test_the_caches_older_name_is_read(of_models: TokenEnsemble) -> None:
    ids = ragged_prompts(1)[0].clamp_min(2)
    cache = of_models.new_cache()
    with torch.no_grad():
        of_models(input_ids=ids, past_key_values=cache)
    assert cache.get_seq_length() == ids.shape[1]
