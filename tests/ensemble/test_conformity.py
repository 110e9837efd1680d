"""An ensemble beside a plain Llama: every behaviour that transformers tests of a model is shared, or refused.

An ensemble of one expert says what that expert says, so that each call in `SHARED` has to give both ways the same. The
names are those of the behaviours that transformers' common tests of models and of generation go through.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    StoppingCriteriaList,
    Trainer,
    TrainingArguments,
    WatermarkingConfig,
)

from ensemw2s import TokenEnsemble
from ensemw2s.models.loading import CACHE
from tests.reference import ragged_prompts
from tests.tiny import PAD, VOCAB, llama, lora, saved_adapters, tokenizer

PADDED, MASK = ragged_prompts(3)
IDS = PADDED.clamp_min(2)
LONE = IDS[:1]
ROWS = [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in IDS.tolist()]


def ensemble_of_one(kind: str, folder: Path) -> tuple[TokenEnsemble, Any]:
    """Return an ensemble of one expert, and that expert as a plain Llama of its own."""
    if kind == "models":
        return TokenEnsemble.from_models([llama(0)], [0.7]), llama(0)
    adapters = saved_adapters(folder, 1)
    plain = PeftModel.from_pretrained(llama(0), adapters[0]).merge_and_unload()
    return TokenEnsemble.from_adapters(llama(0), adapters, [0.7]), plain


def forward(model: Any, ids: torch.Tensor = IDS, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **inputs).logits


def generate(model: Any, ids: torch.Tensor = IDS, **settings: Any) -> Any:
    return model.generate(ids, **{"max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD} | settings)


def loaded(model: Any, folder: Path, auto: bool = False, saving: Mapping[str, Any] = {}, **options: Any) -> Any:
    model.save_pretrained(folder, **saving)
    return (AutoModelForCausalLM if auto else type(model)).from_pretrained(folder, **options)


def described(model: Any) -> tuple[Any, ...]:
    """Return how a model computes, as its configuration and as its weights and layers say."""
    configs = {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}
    return model.dtype, model.config.dtype, model.config._attn_implementation, configs


def trainer(model: Any, folder: Path) -> Trainer:
    settings = TrainingArguments(str(folder / "run"), report_to=[], use_cpu=True, per_device_eval_batch_size=2)
    data = Dataset.from_list(ROWS)
    return Trainer(model, settings, train_dataset=data, eval_dataset=data, processing_class=tokenizer())


def saved_by_trainer(model: Any, folder: Path) -> Any:
    own = trainer(model, folder)
    # The second time, it replaces its own.
    for _ in range(2):
        own.save_model(str(folder / "saved"))
    return forward(type(model).from_pretrained(folder / "saved"))


def trained(model: Any, folder: Path) -> bool:
    model.requires_grad_(True)
    before = [weight.clone() for weight in model.parameters()]
    trainer(model, folder).train()
    return all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def gradients(model: Any) -> bool:
    model.requires_grad_(True).train()
    assert all(module.training for module in model.modules())
    model(IDS, labels=IDS).loss.backward()
    return all(weight.grad is not None and bool(weight.grad.any()) for weight in model.parameters())


def with_cache(model: Any) -> torch.Tensor:
    with torch.no_grad():
        first = model(IDS[:, :4], use_cache=True)
        return model(IDS[:, 4:], use_cache=True, **{CACHE: first[CACHE]}).logits


def continued(model: Any) -> torch.Tensor:
    first = generate(model, return_dict_in_generate=True, max_new_tokens=2)
    return generate(model, first.sequences, max_new_tokens=3, **{CACHE: first[CACHE]})


def dict_outputs(model: Any, **settings: Any) -> Any:
    out = generate(model, return_dict_in_generate=True, output_scores=True, output_logits=True, **settings)
    scores = model.compute_transition_scores(out.sequences, out.scores, getattr(out, "beam_indices", None),
                                             normalize_logits=True)  # fmt: skip
    return out.sequences, out.logits, scores


def without_input_ids(model: Any) -> torch.Tensor:
    model.generation_config.bos_token_id = 5
    return model.generate(max_new_tokens=3, do_sample=False)


def causal_mask() -> torch.Tensor:
    return torch.ones(9, 9, dtype=torch.bool).tril().expand(3, 1, 9, 9)


def attention_set_later(model: Any) -> Any:
    model.set_attn_implementation("eager")
    return described(model)[2:], forward(model)


def in_a_device_context(model: Any, folder: Path) -> torch.Tensor:
    with torch.device("cpu"):
        return forward(loaded(model, folder))


def as_tuple(model: Any) -> Any:
    with torch.no_grad():
        out = model(IDS, labels=IDS, use_cache=False, return_dict=False)
    assert type(out) is tuple
    return out


# What is called with a model and a folder of its own, by the name of the behaviour.
SHARED: dict[str, Callable[[Any, Path], Any]] = {
    # A model.
    "determinism": lambda model, _: [forward(model), forward(model)],
    "batching_equivalence": lambda model, _: [forward(model, row[None]) for row in IDS],
    "left_padding": lambda model, _: forward(
        model, PADDED, attention_mask=MASK, position_ids=(MASK.cumsum(1) - 1).clamp_min(0)
    )[:, -1],
    "position_ids": lambda model, _: forward(model, position_ids=torch.arange(3, 12)[None]),
    "custom_4d_attention_mask": lambda model, _: forward(model, attention_mask=causal_mask()),
    "forward_signature": lambda model, _: list(inspect.signature(model.forward).parameters)[:3],
    "main_input_name": lambda model, _: model.main_input_name,
    "model_outputs_equivalence": lambda model, _: as_tuple(model),
    "loss": lambda model, _: model(IDS, labels=torch.where(MASK.bool(), IDS, -100)).loss,
    "loss_of_num_items_in_batch": lambda model, _: model(IDS, labels=IDS, num_items_in_batch=3).loss,
    "loss_of_shift_labels": lambda model, _: model(IDS, labels=IDS, shift_labels=IDS.flip(1)).loss,
    "loss_of_ignore_index": lambda model, _: model(IDS, labels=IDS, ignore_index=int(IDS[0, 3])).loss,
    "logits_to_keep": lambda model, _: [
        forward(model, logits_to_keep=kept, attention_mask=torch.ones_like(IDS))
        for kept in (0, 1, 2, -2, torch.tensor([4, 0]), torch.tensor([-1]))
    ],
    "past_key_values_format": lambda model, _: with_cache(model),
    "training": lambda model, _: gradients(model),
    "tie_model_weights": lambda model, _: (model.tie_weights(), forward(model)),
    "base_model_prefix": lambda model, _: getattr(model, model.base_model_prefix) is model.base_model,
    "accepts_loss_kwargs": lambda model, _: getattr(model, "accepts_loss_kwargs", True),
    "deepcopy": lambda model, _: forward(copy.deepcopy(model)),
    "can_generate": lambda model, _: model.can_generate(),
    # Saved and loaded.
    "save_load": lambda model, folder: forward(loaded(model, folder)),
    "save_options": lambda model, folder: forward(
        loaded(model, folder, saving={"is_main_process": True, "state_dict": None, "safe_serialization": True})
    ),
    "sharded": lambda model, folder: forward(loaded(model, folder, saving={"max_shard_size": "20KB"})),
    "architectures": lambda model, folder: loaded(model, folder).config.architectures == [type(model).__name__],
    "output_loading_info": lambda model, folder: loaded(model, folder, output_loading_info=True)[1],
    "output_loading_info_auto": lambda model, folder: loaded(model, folder, auto=True, output_loading_info=True)[1],
    "dtype": lambda model, folder: described(loaded(model, folder, dtype=torch.bfloat16)),
    "dtype_auto_class": lambda model, folder: described(loaded(model, folder, auto=True, dtype="bfloat16")),
    "bc_torch_dtype": lambda model, folder: described(loaded(model, folder, torch_dtype=torch.bfloat16)),
    "bc_torch_dtype_auto_class": lambda model, folder: described(loaded(model, folder, auto=True, torch_dtype="auto")),
    "attn_implementation": lambda model, folder: described(loaded(model, folder, attn_implementation="eager")),
    "attn_implementation_auto_class": lambda model, folder: described(
        loaded(model, folder, auto=True, attn_implementation="eager")
    ),
    "set_attention_dynamically": lambda model, _: attention_set_later(model),
    "load_with_device_context_manager": in_a_device_context,
    # Generation. What is drawn at random has the same shape only.
    "greedy_generate": lambda model, _: generate(model, PADDED, attention_mask=MASK),
    "greedy_generate_dict_outputs": lambda model, _: dict_outputs(model),
    "greedy_generate_without_cache": lambda model, _: generate(model, use_cache=False),
    "sample_generate": lambda model, _: generate(model, do_sample=True, num_return_sequences=2, min_new_tokens=5).shape,
    "beam_search_generate": lambda model, _: generate(model, num_beams=3, num_return_sequences=2),
    "beam_search_generate_dict_output": lambda model, _: dict_outputs(model, num_beams=2)[0],
    "beam_sample_generate": lambda model, _: generate(model, num_beams=2, do_sample=True, min_new_tokens=5).shape,
    "generate_without_input_ids": lambda model, _: without_input_ids(model),
    "assisted_decoding_matches_greedy_search": lambda model, _: generate(model, LONE, assistant_model=llama(1)),
    "prompt_lookup_decoding_matches_greedy_search": lambda model, _: generate(
        model, LONE.repeat(1, 2), prompt_lookup_num_tokens=2
    ),
    "generate_continue_from_past_key_values": lambda model, _: continued(model),
    "generate_with_dynamic_cache": lambda model, _: generate(model, cache_implementation="dynamic"),
    "generate_from_an_empty_cache": lambda model, _: generate(model, **{CACHE: DynamicCache()}),
    "generate_methods_with_logits_to_keep": lambda model, _: generate(model, logits_to_keep=1),
    "logits_processors": lambda model, _: generate(
        model, logits_processor=LogitsProcessorList([MinLengthLogitsProcessor(12, 1)]), no_repeat_ngram_size=2
    ),
    "stopping_criteria": lambda model, _: generate(
        model, stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(11)])
    ),
    "stop_strings": lambda model, _: generate(model, stop_strings=["a", "e"], tokenizer=tokenizer()),
    "classifier_free_guidance": lambda model, _: generate(model, guidance_scale=1.5),
    "watermarking": lambda model, _: generate(model, watermarking_config=WatermarkingConfig()),
    "prefill_in_chunks": lambda model, _: generate(model, prefill_chunk_size=2),
    # Under transformers' Trainer.
    "trainer_evaluate": lambda model, folder: trainer(model, folder).evaluate()["eval_loss"],
    "trainer_predict": lambda model, folder: torch.from_numpy(
        trainer(model, folder).predict(Dataset.from_list(ROWS)).predictions
    ),
    "trainer_save_model": saved_by_trainer,
    "trainer_train_unfrozen": trained,
}


def assert_same(got: Any, expected: Any) -> None:
    """Check two results, of which logits count as log-probabilities."""
    if isinstance(expected, torch.Tensor):
        if expected.is_floating_point():
            if expected.shape[-1:] == (VOCAB,):
                expected, got = expected.log_softmax(-1), got.log_softmax(-1)
            torch.testing.assert_close(got.float(), expected.float(), rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(got, expected)
    elif isinstance(expected, list | tuple) and not isinstance(expected, torch.Size):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float):
        assert got == pytest.approx(expected, abs=1e-4)
    else:
        assert got == expected


@pytest.mark.parametrize("kind", ["models", "adapters"])
@pytest.mark.parametrize("name", SHARED)
def test_an_ensemble_of_one_behaves_as_the_plain_model(name: str, kind: str, tmp_path: Path) -> None:
    ensemble, plain = ensemble_of_one(kind, tmp_path)
    expected = SHARED[name](plain, tmp_path / "plain")
    assert_same(SHARED[name](ensemble, tmp_path / "ensemble"), expected)


def asked_by_config(model: Any, name: str) -> Any:
    setattr(model.config, name, True)
    return model(IDS)


def batch(model: Any) -> Any:
    return model.generate_batch([[3, 4, 5]], generation_config=GenerationConfig(max_new_tokens=3))


WHOLE = "cannot be honoured: an ensemble writes the weights that its experts hold"
EMBEDDING = "experts of an ensemble share no embedding"
# The call, the error, and what it says.
REFUSED: dict[str, tuple[Callable[[Any, Path], Any], type[Exception], str]] = {
    "hidden_states_output": (
        lambda model, _: model(IDS, output_hidden_states=True),
        TypeError,
        r"output_hidden_states: each expert has its own.*experts\.expert\(0\)",
    ),
    "attention_outputs": (
        lambda model, _: model(IDS, output_attentions=True), TypeError, "output_attentions: each expert has its own"
    ),
    "hidden_states_by_config": (
        lambda model, _: asked_by_config(model, "output_hidden_states"), TypeError, "each expert has its own"
    ),
    "generate_hidden_states": (
        lambda model, _: generate(model, return_dict_in_generate=True, output_hidden_states=True),
        TypeError,
        "each expert has its own",
    ),
    "inputs_embeds": (
        lambda model, _: model(inputs_embeds=torch.zeros(1, 2, 32)), TypeError, "does not know inputs_embeds"
    ),
    "generate_from_inputs_embeds": (
        lambda model, _: model.generate(inputs_embeds=torch.zeros(1, 2, 32)), TypeError, EMBEDDING
    ),
    "no_input": (lambda model, _: model(), TypeError, "input_ids is missing"),
    # A plain Llama drops what it does not know.
    "num_logits_to_keep": (lambda model, _: model(IDS, num_logits_to_keep=1), TypeError, "not know num_logits_to_keep"),
    "token_type_ids": (lambda model, _: model(IDS, token_type_ids=IDS), TypeError, "not know token_type_ids"),
    "loss_of_kept_logits": (
        lambda model, _: model(IDS, labels=IDS, logits_to_keep=IDS[0]), ValueError, "leave logits_to_keep out"
    ),
    "model_get_embeddings": (lambda model, _: model.get_input_embeddings(), NotImplementedError, EMBEDDING),
    "model_set_embeddings": (
        lambda model, _: model.set_input_embeddings(torch.nn.Embedding(3, 3)), NotImplementedError, EMBEDDING
    ),
    "resize_tokens_embeddings": (lambda model, _: model.resize_token_embeddings(99), NotImplementedError, EMBEDDING),
    "base_model_forward": (
        lambda model, _: model.base_model(IDS), TypeError, "no common body to run: call.*works with GKDTrainer"
    ),
    "gradient_checkpointing": (
        lambda model, _: model.gradient_checkpointing_enable(), ValueError,
        "does not support (activation|gradient) checkpointing",
    ),
    "initialization": (lambda model, _: type(model)(model.config), TypeError, "configuration alone makes no ensemble"),
    "from_config": (
        lambda model, _: AutoModelForCausalLM.from_config(model.config, attn_implementation="eager"),
        TypeError,
        r"use TokenEnsemble\.from_pretrained, from_adapters or from_models",
    ),
    "add_adapter": (lambda model, _: model.add_adapter(lora()), NotImplementedError, r"append it .* with add_expert"),
    "load_adapter": (lambda model, folder: model.load_adapter(folder), NotImplementedError, "change every expert"),
    "load_unknown_attention": (
        lambda model, folder: loaded(model, folder, attn_implementation="psychic"), ValueError, "psychic"
    ),
    "generate_with_static_cache": (
        lambda model, _: generate(model, cache_implementation="static"), ValueError, "one dynamic cache per expert"
    ),
    "generate_batch": (lambda model, _: batch(model), NotImplementedError, "call generate with a batch that is padded"),
    "init_continuous_batching": (
        lambda model, _: model.init_continuous_batching(), NotImplementedError, "paged cache for one model"
    ),
    "trainer_train": (
        lambda model, folder: trainer(model, folder).train(), ValueError, r"train experts with BoostingTrainer"
    ),
    "save_unknown": (
        lambda model, folder: model.save_pretrained(folder, bogus=1), TypeError, "does not know bogus: leave it out"
    ),
} | {
    f"save_{name}": (
        lambda model, folder, name=name, value=value: model.save_pretrained(folder, **{name: value}),
        ValueError,
        f"^{name}=.*{WHOLE}",
    )
    for name, value in {
        "state_dict": {}, "push_to_hub": True, "variant": "fp16", "token": "secret", "safe_serialization": False,
        "save_peft_format": False, "save_original_format": False, "distributed_checkpoint": True,
    }.items()
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_ensemble_does_not_share_is_refused(name: str, of_models: TokenEnsemble, tmp_path: Path) -> None:
    call, error, sentence = REFUSED[name]
    before = forward(of_models)
    with pytest.raises(error, match=sentence):
        call(of_models, tmp_path / "folder")
    assert not (tmp_path / "folder").exists() or not name.startswith("save_")
    of_models.config.output_hidden_states = False
    assert torch.equal(forward(of_models), before)


def test_a_configuration_may_ask_for_tuples(ensemble: TokenEnsemble) -> None:
    ensemble.config.return_dict = False
    expected = forward(ensemble, return_dict=True)
    assert torch.equal(ensemble(IDS)[0], expected)
    assert generate(ensemble, num_beams=2).shape[0] == len(IDS)


@pytest.mark.parametrize("kind", [pytest.param("of_models", marks=pytest.mark.slow), "of_adapters"])
def test_it_compiles_for_texts_of_any_length(
    kind: str, request: pytest.FixtureRequest, recwarn: pytest.WarningsRecorder
) -> None:
    ensemble = request.getfixturevalue(kind)[: 2 if kind == "of_models" else 1]
    torch.compiler.reset()
    # Adapters are made the active ones between two graphs.
    compiled = torch.compile(ensemble, dynamic=True, backend="eager", fullgraph=kind == "of_models")
    for inputs in ({"ids": IDS}, {"ids": IDS[:2, :5], "attention_mask": torch.ones(2, 5, dtype=torch.int64)}):
        assert_same(forward(compiled, **inputs), forward(ensemble, **inputs))
    assert not [warning for warning in recwarn if "lru_cache" in str(warning.message)]


def test_only_the_main_process_saves(ensemble: TokenEnsemble, tmp_path: Path) -> None:
    ensemble.save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not (tmp_path / "saved").exists()


def test_frozen_experts_stay_in_evaluation_mode(ensemble: TokenEnsemble) -> None:
    ensemble.train()
    assert ensemble.training
    assert not any(module.training for module in ensemble.experts.modules())
    # Without gradients, or without labels, it may be a part of what trains.
    with torch.no_grad():
        assert ensemble(IDS, labels=IDS).loss > 0
    assert not ensemble(IDS).logits.requires_grad
    assert not ensemble.eval().training


def test_a_loss_of_the_users_own_is_taken(ensemble: TokenEnsemble) -> None:
    ensemble.loss_function = lambda logits, labels, vocab_size, **_: logits.sum() * 0 + vocab_size
    assert ensemble(IDS, labels=IDS).loss == VOCAB


def test_an_ensemble_leaves_the_weights_of_its_experts_as_they_are() -> None:
    model = llama(3)
    # As in a model that was not loaded by transformers.
    for module in model.modules():
        module._is_hf_initialized = False
    before = forward(model)
    assert_same(forward(TokenEnsemble.from_models([model], [1.0])), before)
    assert torch.equal(forward(model), before)


def test_weights_of_other_shapes_are_refused_even_where_transformers_may_draw_them(
    of_models: TokenEnsemble, tmp_path: Path
) -> None:
    of_models.save_pretrained(tmp_path / "saved")
    llama(0, intermediate_size=52).save_pretrained(tmp_path / "other")
    weights = (tmp_path / "other" / "model.safetensors").read_bytes()
    (tmp_path / "saved" / "experts" / "1" / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"expert 1 of 3 has no weights for .*mlp"):
        TokenEnsemble.from_pretrained(tmp_path / "saved", ignore_mismatched_sizes=True)
