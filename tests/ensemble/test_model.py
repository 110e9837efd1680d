"""The ensemble as a transformers model: decoding against a slow float64 loop, saving, slicing, labelling."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from ensemw2s import QuestionFormat, TokenEnsemble
from ensemw2s.inference.decoding import Sampling
from ensemw2s.models.loading import CACHE
from ensemw2s.runtime.files import read_json, write_json
from tests.reference import WEIGHTS, ragged_prompts, slow_mixture
from tests.tiny import END, FORMAT, VOCAB, gpt2, llama, lora, questions, saved_adapters, saved_model, tokenizer


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
    assert read_json(tmp_path / "saved" / "boosting.json") == {"rounds": [1, 2, 3]}
    assert not [file for file in (tmp_path / "saved").rglob("*") if file.suffix in (".bin", ".pt", ".pkl")]
    assert "| 1 | 2.5000 |" in (tmp_path / "saved" / "README.md").read_text()


def test_whole_models_and_bases_are_sharded_as_for_any_model(ensemble: TokenEnsemble, tmp_path: Path) -> None:
    ensemble.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    kind = "base" if ensemble.config.kind == "adapters" else "experts/2"
    assert len(list((tmp_path / "saved" / kind).glob("model-*.safetensors"))) > 1
    ids = ragged_prompts(2)[0].clamp_min(2)
    with torch.no_grad():
        assert torch.equal(TokenEnsemble.from_pretrained(tmp_path / "saved")(ids).logits, ensemble(ids).logits)


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
    with torch.no_grad():
        assert torch.equal(ensemble[[-1]](input_ids=ids).logits[0, -1].double(), last)
        swapped = ensemble[[2, 0]]
        assert swapped.config.expert_weights == [WEIGHTS[2], WEIGHTS[0]] and len(swapped) == 2
        expected = ensemble.reweighted([WEIGHTS[0], WEIGHTS[2]], [0, 2])(input_ids=ids).logits
        torch.testing.assert_close(swapped(input_ids=ids).logits, expected)
    for index, kind, message in (
        (0, TypeError, "sliced"), ([0, 3], IndexError, "3 experts are numbered from 0 .*is not added"),
        ([1, -2], ValueError, "twice"),
        ([], ValueError, "at least one expert"), ([True], TypeError, "sliced"),
    ):  # fmt: skip
        with pytest.raises(kind, match=message):
            ensemble[index]


def test_the_format_of_the_questions_is_kept_with_the_ensemble(of_models: TokenEnsemble, tmp_path: Path) -> None:
    data, words = questions(4), tokenizer()
    by_hand = of_models.label(data, words, question_format=FORMAT, max_new_tokens=3, description=None)
    ensemble = of_models[:]
    assert ensemble.question_format == QuestionFormat()
    ensemble.question_format = FORMAT
    assert of_models.question_format == QuestionFormat()
    ensemble[:].save_pretrained(tmp_path / "saved", processing_class=words)
    loaded = TokenEnsemble.from_pretrained(tmp_path / "saved")
    assert loaded.question_format == FORMAT
    assert loaded.label(data, words, max_new_tokens=3, description=None)["answer_ids"] == by_hand["answer_ids"]
    asked = of_models.label(data, words, max_new_tokens=3, description=None)
    assert asked["answer_ids"] != by_hand["answer_ids"]


@pytest.mark.parametrize(
    ("described", "complaint"),
    [
        ({"template": "{prompt}"}, "template"),
        ({"prompt_template": "no question"}, "must contain"),
        ({"end_token": "yes"}, "end_token"),
        (["{prompt}"], "must be a mapping or null"),
    ],
)
def test_a_format_that_is_none_is_refused(
    of_models: TokenEnsemble, tmp_path: Path, described: Any, complaint: str
) -> None:
    of_models.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    write_json(file, {**read_json(file), "question_format": described})
    with pytest.raises(ValueError, match=rf"config\.json: question_format.*{complaint}"):
        TokenEnsemble.from_pretrained(tmp_path / "saved")


# Pseudo-answers


def test_pseudo_answers_are_the_greedy_text_with_its_mean_log_probability(of_models: TokenEnsemble) -> None:
    data = questions(8)
    rows = of_models.label(data, tokenizer(), question_format=FORMAT, max_new_tokens=10, batch_size=3, description=None)
    assert rows["id"] == data["id"]
    for row, prompt in zip(rows, data["prompt"], strict=True):
        text = tokenizer()(f"{prompt}:", add_special_tokens=False)["input_ids"]
        total, answer, agrees = 0.0, [], []
        for _ in range(row["num_tokens"]):
            log_probs = slow_mixture(of_models, text)
            token = int(log_probs.argmax())
            agrees.append([float(slow_mixture(of_models[t : t + 1], text)[token]) > math.log(0.5) for t in range(3)])
            total += float(log_probs[token])
            text = [*text, token]
            answer.append(token)
        assert row["finished"] == (answer[-1] == END)
        assert row["num_tokens"] == 10 or row["finished"]
        assert row["answer"] == tokenizer().decode(answer, skip_special_tokens=True).removeprefix(" ")
        assert row["confidence"] == pytest.approx(total / len(answer), abs=1e-5)
        assert row["expert_agreement"] == pytest.approx([sum(own) / len(own) for own in zip(*agrees, strict=True)])
        assert row["agreement"] == pytest.approx(sum(row["expert_agreement"]) / 3)
    assert len({tuple(row) for row in rows["expert_agreement"]}) > 1


def test_labelling_goes_on_where_it_was_killed(of_models: TokenEnsemble, tmp_path: Path) -> None:
    data = questions(11)
    options = {
        "question_format": FORMAT, "max_new_tokens": 8, "batch_size": 4, "description": None,
        "sampling": Sampling(temperature=1.0, seed=5),
    }  # fmt: skip
    whole = of_models.label(data, tokenizer(), output_file=tmp_path / "whole.jsonl", **options)
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    for cut in (0, 3, 7):
        # Killed in the middle of a line.
        (tmp_path / "cut.jsonl").write_text("".join(lines[:cut]) + lines[cut][:20])
        again = of_models.label(data, tokenizer(), output_file=tmp_path / "cut.jsonl", **options)
        assert again.to_list() == whole.to_list()
        assert sorted((tmp_path / "cut.jsonl").read_text().splitlines(keepends=True)) == sorted(lines)
    assert of_models.label(data, tokenizer(), **(options | {"batch_size": 1}))["answer"] == whole["answer"]


def test_labels_of_other_questions_are_not_overwritten(of_models: TokenEnsemble, tmp_path: Path) -> None:
    (tmp_path / "labels.jsonl").write_text(json.dumps({"id": "stranger", "answer": "a"}) + "\n")
    with pytest.raises(ValueError, match=r"'stranger'.*another run"):
        of_models.label(questions(2), tokenizer(), output_file=tmp_path / "labels.jsonl", description=None)
    assert json.loads((tmp_path / "labels.jsonl").read_text())["id"] == "stranger"


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
    with pytest.raises(
        FloatingPointError, match="expert 2 gave NaN, infinity or no finite logit for the question of id q0"
    ):
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


# Adding and leaving out experts


def new_expert(ensemble: TokenEnsemble, folder: Path) -> Path | PreTrainedModel:
    """What `add_expert` takes for this kind of experts: a fourth adapter, or a fourth model."""
    return saved_adapters(folder, 4)[3] if ensemble.config.kind == "adapters" else llama(7)


def assert_slow_mixture(ensemble: TokenEnsemble) -> None:
    """Check both passes, with a cache (where adapters are stacked) and without."""
    ids = ragged_prompts(2)[0].clamp_min(2)
    with torch.no_grad():
        plain = ensemble(input_ids=ids).logits[:, -1]
        cached = ensemble(input_ids=ids, use_cache=True).logits[:, -1]
    for row in range(2):
        expected = slow_mixture(ensemble, ids[row].tolist())
        torch.testing.assert_close(plain[row].double(), expected, rtol=0, atol=2e-5)
        torch.testing.assert_close(cached[row].double(), expected, rtol=0, atol=2e-5)


def test_an_expert_is_added_saved_and_loaded_again(ensemble: TokenEnsemble, tmp_path: Path) -> None:
    ids = ragged_prompts(2)[0].clamp_min(2)
    before, two = ensemble(input_ids=ids).logits, ensemble[:2]
    # A cache made before must not hide the new expert.
    ensemble.generate(input_ids=ids, max_new_tokens=2)
    ensemble.add_expert(new_expert(ensemble, tmp_path / "more"), 3)
    assert ensemble.num_experts == 4
    assert ensemble.config.expert_weights == [*WEIGHTS, 3.0]
    assert_slow_mixture(ensemble)
    assert (ensemble(input_ids=ids).logits - before).abs().max() > 0.1
    # Slices made before keep their experts.
    assert two.num_experts == 2
    assert_slow_mixture(two)
    ensemble.save_pretrained(tmp_path / "saved")
    loaded = TokenEnsemble.from_pretrained(tmp_path / "saved")
    assert loaded.config.expert_weights == [*WEIGHTS, 3.0]
    assert torch.equal(loaded(input_ids=ids).logits, ensemble(input_ids=ids).logits)
    # And one more on what was loaded.
    loaded.add_expert(new_expert(loaded, tmp_path / "again"), 0.5)
    assert loaded.num_experts == 5
    assert_slow_mixture(loaded)


@pytest.mark.parametrize("index", [0, 1, -1])
def test_an_ensemble_without_one_expert(ensemble: TokenEnsemble, index: int, tmp_path: Path) -> None:
    ids = ragged_prompts(2)[0].clamp_min(2)
    ensemble.generation_config.max_new_tokens = 3
    rest = ensemble.without(index)
    kept = [t for t in range(3) if t != index % 3]
    assert rest.config.expert_weights == [WEIGHTS[t] for t in kept]
    assert rest.generation_config.max_new_tokens == 3
    assert_slow_mixture(rest)
    expected = slow_mixture(ensemble.reweighted([WEIGHTS[t] for t in kept], kept), ids[0].tolist())
    torch.testing.assert_close(rest(input_ids=ids).logits[0, -1].double(), expected, rtol=0, atol=2e-5)
    assert ensemble.num_experts == 3
    rest.save_pretrained(tmp_path / "saved")
    loaded = TokenEnsemble.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(input_ids=ids).logits, rest(input_ids=ids).logits)


def test_a_source_is_loaded_in_the_dtype_of_the_others(tmp_path: Path) -> None:
    source = saved_model(tmp_path / "model", 5)
    for dtype in (torch.float32, torch.bfloat16):
        ensemble = TokenEnsemble.from_models([llama(0).to(dtype), gpt2(1).to(dtype)], [1.0, 2.0])
        ensemble.add_expert(source, 1.0)
        assert ensemble.experts.models[2].dtype == dtype
        with pytest.raises(ValueError, match=f"expert 4 is in torch.float64, expert 1 in {dtype}: load all in one"):
            ensemble.add_expert(source, 1.0, dtype=torch.float64)
        assert ensemble.num_experts == 3
    with pytest.raises(ValueError, match=r"expert 2 is in torch\.bfloat16, expert 1 in torch\.float32"):
        TokenEnsemble.from_models([llama(0), llama(1).to(torch.bfloat16)], [1.0, 1.0])


def test_an_expert_with_a_shorter_context_shortens_the_ensembles(of_models: TokenEnsemble) -> None:
    assert of_models.config.max_position_embeddings == 128
    of_models.add_expert(llama(4, max_position_embeddings=64), 1.0)
    assert of_models.config.max_position_embeddings == 64
    with pytest.raises(ValueError, match="prompt has 64 tokens but expert 4 reads at most 64, answer included"):
        of_models.generate(input_ids=torch.full((1, 64), 3))
    assert of_models.without(3).config.max_position_embeddings == 128


def test_an_expert_that_cannot_be_added_leaves_the_ensemble_as_it_was(
    of_adapters: TokenEnsemble, of_models: TokenEnsemble, tmp_path: Path
) -> None:
    adapters = sorted(of_adapters.experts.base.peft_config)
    with pytest.raises(TypeError, match="give the folder of an adapter, not a model"):
        of_adapters.add_expert(llama(1), 1.0)
    with pytest.raises(TypeError, match="nothing is loaded that dtype could change"):
        of_models.add_expert(llama(1), 1.0, dtype=torch.float32)
    with pytest.raises(ValueError, match="positive and finite, got 0"):
        of_models.add_expert(llama(1), 0.0)
    with pytest.raises(ValueError, match="expert 4 has a vocabulary of 99 tokens"):
        of_models.add_expert(llama(1, vocab_size=99), 1.0)
    wide = get_peft_model(llama(0, hidden_size=64), lora())
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"expert 4: the adapter in .*wide does not fit the base model.*size mismatch"):
        of_adapters.add_expert(tmp_path / "wide", 1.0)
    assert sorted(of_adapters.experts.base.peft_config) == adapters
    for ensemble in (of_adapters, of_models):
        assert ensemble.config.expert_weights == WEIGHTS
        assert_slow_mixture(ensemble)


def test_leaving_out_what_is_not_there(of_models: TokenEnsemble) -> None:
    with pytest.raises(IndexError, match="no expert 3: 3 experts are numbered from 0"):
        of_models.without(3)
    with pytest.raises(ValueError, match="at least one expert"):
        of_models[:1].without(0)
    with pytest.raises(ValueError, match="at least one expert"):
        of_models[:0]


# Saved folders


def test_loading_reads_the_generation_settings_that_were_saved(ensemble: TokenEnsemble, tmp_path: Path) -> None:
    ensemble.generation_config.max_new_tokens = 3
    ensemble.save_pretrained(tmp_path / "saved")
    loaded = TokenEnsemble.from_pretrained(tmp_path / "saved")
    assert loaded.generate(input_ids=ragged_prompts(1)[0].clamp_min(2)).shape[1] <= 12
    assert loaded.generation_config.max_new_tokens == 3


def test_what_is_passed_takes_the_place_of_the_bases_own_settings(tmp_path: Path) -> None:
    # As lm-evaluation-harness calls it.
    source = saved_model(tmp_path / "base")
    base = {"source": str(source), "dtype": "float32"}
    folders = saved_adapters(tmp_path)
    ensemble = TokenEnsemble.from_adapters(llama(0), folders, WEIGHTS, base_reference=base)
    ensemble.save_pretrained(tmp_path / "outer" / "saved")
    assert not (tmp_path / "outer" / "saved" / "base").exists()
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "outer", subfolder="saved", dtype="bfloat16", revision="main", trust_remote_code=False,
        gguf_file=None, quantization_config=None, device_map={"": "cpu"},
    )  # fmt: skip
    assert loaded.dtype == torch.bfloat16


def test_a_hub_id_is_looked_up_in_the_version_asked_for(
    of_models: TokenEnsemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_models.save_pretrained(tmp_path / "saved")
    calls: list[dict[str, Any]] = []

    def download(repo_id: str, **options: Any) -> str:
        calls.append({"repo_id": repo_id, **options})
        return str(tmp_path / "saved")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    TokenEnsemble.from_pretrained("someone/ensemble", revision="v2", local_files_only=True)
    assert calls == [{"repo_id": "someone/ensemble", "revision": "v2", "local_files_only": True}]


def shard(folder: Path) -> Path:
    """Save the model in `folder` again, in several files, and return the second of them."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    return sorted(folder.glob("model-*.safetensors"))[1]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def test_an_expert_in_several_files_is_loaded_and_a_missing_one_is_named(
    of_models: TokenEnsemble, tmp_path: Path
) -> None:
    of_models.save_pretrained(tmp_path / "saved")
    part = shard(tmp_path / "saved" / "experts" / "2")
    ids = ragged_prompts(2)[0].clamp_min(2)
    loaded = TokenEnsemble.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(input_ids=ids).logits, of_models(input_ids=ids).logits)
    cut(part)
    with pytest.raises(ValueError, match=rf"expert 2 of 3: .*{part.name} is damaged"):
        TokenEnsemble.from_pretrained(tmp_path / "saved")
    part.unlink()
    with pytest.raises(FileNotFoundError, match=rf"expert 2 of 3: .*experts/2 lacks {part.name}, one of the \d+ files"):
        TokenEnsemble.from_pretrained(tmp_path / "saved")


def test_the_bases_missing_and_damaged_files_are_named(of_adapters: TokenEnsemble, tmp_path: Path) -> None:
    of_adapters.save_pretrained(tmp_path / "saved")
    part = shard(tmp_path / "saved" / "base")
    cut(part)
    with pytest.raises(ValueError, match=rf"the experts' base model: .*{part.name} is damaged"):
        TokenEnsemble.from_pretrained(tmp_path / "saved")
    part.unlink()
    with pytest.raises(FileNotFoundError, match=rf"the experts' base model: .*lacks {part.name}"):
        TokenEnsemble.from_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved" / "base")
    with pytest.raises(FileNotFoundError, match=r"the experts' base model: .*base holds no weights"):
        TokenEnsemble.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("kind", ["of_adapters", "of_models"])
def test_a_damaged_expert_is_named(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    request.getfixturevalue(kind).save_pretrained(tmp_path / "saved")
    (file,) = (tmp_path / "saved" / "experts" / "3").glob("*.safetensors")
    cut(file)
    with pytest.raises(ValueError, match=rf"expert 3.*{file.name} is damaged .*Save it again"):
        TokenEnsemble.from_pretrained(tmp_path / "saved")


def test_an_adapter_without_its_configuration_is_named(of_adapters: TokenEnsemble, tmp_path: Path) -> None:
    of_adapters.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "experts" / "2" / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"expert 2: .*experts/2 has no adapter_config\.json"):
        TokenEnsemble.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("kind", ["of_adapters", "of_models"])
def test_weights_that_do_not_match_the_saved_experts(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    request.getfixturevalue(kind).save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"expert_weights": WEIGHTS[:2]}))
    with pytest.raises(ValueError, match=r"has 2 expert_weights but experts/ holds 3 folders \(1, 2, 3\)"):
        TokenEnsemble.from_pretrained(tmp_path / "saved")
    file.write_text(json.dumps(config | {"expert_weights": [*WEIGHTS, 1.0]}))
    with pytest.raises(FileNotFoundError, match=r"expert 4.*experts/4 holds no weights"):
        TokenEnsemble.from_pretrained(tmp_path / "saved")
    file.write_text(json.dumps(config | {"expert_weights": []}))
    with pytest.raises(ValueError, match=r"has 0 expert_weights but experts/ holds 3 folders"):
        TokenEnsemble.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("kind", ["of_adapters", "of_models"])
def test_a_crash_while_saving_leaves_the_old_folder_whole(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensemble = request.getfixturevalue(kind)
    ensemble.save_pretrained(tmp_path / "saved", processing_class=tokenizer())
    before = {file: file.read_bytes() for file in (tmp_path / "saved").rglob("*") if file.is_file()}
    save, other = type(ensemble.experts).save_expert, ensemble.reweighted([1.0, 1.0, 1.0])

    def crash(experts: Any, index: int, folder: Path) -> None:
        save(experts, index, folder)
        if index == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(type(ensemble.experts), "save_expert", crash)
    with pytest.raises(KeyboardInterrupt):
        other.save_pretrained(tmp_path / "saved")
    with pytest.raises(KeyboardInterrupt):
        other.save_pretrained(tmp_path / "fresh")
    assert {file: file.read_bytes() for file in (tmp_path / "saved").rglob("*") if file.is_file()} == before
    assert not (tmp_path / "fresh").exists()
    assert TokenEnsemble.from_pretrained(tmp_path / "saved").config.expert_weights == WEIGHTS


# Adapters that hold more than their own weights


def test_an_adapter_of_a_resized_vocabulary_is_named(tmp_path: Path) -> None:
    folders = saved_adapters(tmp_path)
    model = llama(0)
    model.resize_token_embeddings(VOCAB + 5)
    resized = get_peft_model(model, lora())
    resized.save_pretrained(folders[1], save_embedding_layers=True)
    expected = (
        rf"expert 2: .*resized vocabulary, its \S+weight being \[{VOCAB + 5}, 32\] and the base model's \[{VOCAB}"
    )
    with pytest.raises(ValueError, match=expected):
        TokenEnsemble.from_adapters(llama(0), folders, WEIGHTS)


def test_an_adapter_that_would_replace_the_shared_embeddings_is_named(tmp_path: Path) -> None:
    folders = saved_adapters(tmp_path)
    model = get_peft_model(llama(0), lora())
    model.save_pretrained(tmp_path / "same", save_embedding_layers=True)
    # Those that hold the base's own embeddings change nothing.
    ensemble = TokenEnsemble.from_adapters(llama(0), [folders[0], tmp_path / "same"], [1.0, 1.0])
    assert_slow_mixture(ensemble)
    with torch.no_grad():
        model.get_input_embeddings().weight[3] += 1
    model.save_pretrained(tmp_path / "other", save_embedding_layers=True)
    with pytest.raises(ValueError, match=r"expert 2: .*brings its own model\.embed_tokens\.weight.*modules_to_save"):
        TokenEnsemble.from_adapters(llama(0), [folders[0], tmp_path / "other"], [1.0, 1.0])


def test_adapters_with_copies_of_their_own_are_taken(tmp_path: Path) -> None:
    folders = saved_adapters(tmp_path)
    config = lora()
    config.modules_to_save = ["lm_head"]
    model = get_peft_model(llama(0), config)
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.normal_()
    model.save_pretrained(tmp_path / "copy")
    ensemble = TokenEnsemble.from_adapters(llama(0), [folders[0], tmp_path / "copy"], [1.0, 1.0])
    assert_slow_mixture(ensemble)
    ids = ragged_prompts(1)[0].clamp_min(2)
    alone = TokenEnsemble.from_adapters(llama(0), folders[:1], [1.0])
    assert torch.equal(ensemble[:1](input_ids=ids).logits, alone(input_ids=ids).logits)


# Tokens and texts that the experts do not know


def larger_tokenizer() -> PreTrainedTokenizerFast:
    larger = tokenizer()
    larger.add_tokens(["<one>", "<two>"])
    return larger


def test_a_tokenizer_with_more_tokens_is_refused(of_models: TokenEnsemble, tmp_path: Path) -> None:
    expected = f"token ids up to {VOCAB + 1} .end token 1., but the model's vocabulary has {VOCAB} tokens"
    with pytest.raises(ValueError, match=expected):
        of_models.label(questions(2), larger_tokenizer(), description=None)
    with pytest.raises(ValueError, match=expected):
        of_models.save_pretrained(tmp_path / "saved", processing_class=larger_tokenizer())
    assert not (tmp_path / "saved").exists()


def test_a_tokenizer_whose_end_token_the_experts_lack_is_refused(of_models: TokenEnsemble) -> None:
    other = tokenizer()
    other.add_special_tokens({"eos_token": "<stop>"})
    with pytest.raises(ValueError, match=rf"token ids up to {VOCAB} .end token {VOCAB}."):
        of_models.label(questions(2), other, description=None)
    other = tokenizer()
    other.eos_token = None
    with pytest.raises(ValueError, match=r"no end token, so no answer could end: set processing_class\.eos_token"):
        of_models.label(questions(2), other, description=None)


@pytest.mark.parametrize("token", [VOCAB, -1])
def test_ids_outside_the_vocabulary_are_named(ensemble: TokenEnsemble, token: int) -> None:
    ids = torch.tensor([[3, token]])
    expected = rf"input_ids holds {token}, but the experts' vocabulary has {VOCAB} tokens"
    with pytest.raises(ValueError, match=expected):
        ensemble(input_ids=ids)
    with pytest.raises(ValueError, match=expected):
        ensemble.generate(input_ids=ids)


def test_a_text_beyond_the_context_is_refused(ensemble: TokenEnsemble) -> None:
    ids = torch.full((1, 129), 3)
    with pytest.raises(ValueError, match="text has 129 tokens but expert 1 reads at most 128: shorten it"):
        ensemble(input_ids=ids)
    with torch.no_grad():
        out = ensemble(input_ids=ids[:, :128], use_cache=True)
        assert torch.isfinite(out.logits).all()
        with pytest.raises(ValueError, match="text has 129 tokens"):
            ensemble(input_ids=ids[:, :1], **{CACHE: out[CACHE]})


def test_a_question_that_leaves_no_room_for_its_answer_is_named(of_models: TokenEnsemble) -> None:
    data = questions(3)
    expected = r"questions, id q0: it has \d+ tokens, which with max_new_tokens=126 is beyond the 128"
    with pytest.raises(ValueError, match=expected):
        of_models.label(data, tokenizer(), question_format=FORMAT, max_new_tokens=126, description=None)


def test_positions_of_one_row_serve_the_whole_batch(ensemble: TokenEnsemble) -> None:
    ids = ragged_prompts(3)[0].clamp_min(2)
    positions = torch.arange(9)[None]
    with torch.no_grad():
        given = ensemble(input_ids=ids, position_ids=positions, use_cache=True).logits
        plain = ensemble(input_ids=ids).logits
    torch.testing.assert_close(given, plain, rtol=0, atol=2e-5)


def test_switches_that_are_off_are_no_unknown_keywords(of_models: TokenEnsemble) -> None:
    ids = ragged_prompts(1)[0].clamp_min(2)
    with torch.no_grad():
        of_models(input_ids=ids, output_attentions=False, output_hidden_states=None)
        with pytest.raises(TypeError, match="output_attentions: each expert has its own"):
            of_models(input_ids=ids, output_attentions=True)


def test_a_saved_ensemble_is_loaded_with_another_combination_or_other_weights(tmp_path: Path) -> None:
    TokenEnsemble.from_models([llama(1), llama(2)], [1.0, 2.0]).save_pretrained(tmp_path)
    loaded = TokenEnsemble.from_pretrained(tmp_path, combine="vote", expert_weights=[3.0, 1.0])
    assert (loaded.config.combine, loaded.expert_weights) == ("vote", [3.0, 1.0])
    assert TokenEnsemble.from_pretrained(tmp_path).expert_weights == [1.0, 2.0]
    with pytest.raises(ValueError, match="combine must be one of prob, logprob, vote, got 'mean'"):
        TokenEnsemble.from_pretrained(tmp_path, combine="mean")
    with pytest.raises(ValueError, match="expert_weights has 1 values for 2 experts"):
        TokenEnsemble.from_pretrained(tmp_path, expert_weights=[1.0])
