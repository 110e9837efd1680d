"""The loss taken in place of the logits, against float64, and for which architectures it can be."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from ensemw2s.data.batches import AnswerCollator
from ensemw2s.models.heads import gives_the_logits, linear_of, output_head, replaced_head
from ensemw2s.training.trainer import AnswerTrainer
from tests.tiny import END, PAD, VOCAB, llama
from tests.training.test_trainer import arguments, features, ragged, slow_loss

SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.4, "pad_token_id": PAD, "eos_token_id": END,
    "bos_token_id": END,
}  # fmt: skip
GROUPED = SHAPE | {"num_key_value_heads": 2, "head_dim": 8}
GPT = {
    "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.4,
    "bos_token_id": END, "eos_token_id": END, "pad_token_id": PAD,
}  # fmt: skip

FROM_HIDDEN_STATES: dict[str, Any] = {
    "llama": LlamaConfig(**GROUPED),
    "llama-tied": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SHAPE, num_key_value_heads=2),
    "qwen3": Qwen3Config(**GROUPED),
    "mistral": MistralConfig(**GROUPED),
    "gpt2": GPT2Config(**GPT),
    "gpt_neox": GPTNeoXConfig(**SHAPE),
    "opt": OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32),
    "gemma": GemmaConfig(**GROUPED),
    "gemma2-uncapped": Gemma2Config(**GROUPED, final_logit_softcapping=None),
    # A scale of 1 changes nothing.
    "granite-unscaled": GraniteConfig(**SHAPE, num_key_value_heads=2, attention_multiplier=0.35, logits_scaling=1.0),
}
BIAS, AFTERWARDS = "its output head has a bias", "it changes what its output head gives"
THROUGH_LOGITS: dict[str, tuple[Any, str]] = {
    "gemma2": (Gemma2Config(**GROUPED, final_logit_softcapping=2.0), AFTERWARDS),
    "gemma2-mild-cap": (Gemma2Config(**GROUPED, final_logit_softcapping=30.0), AFTERWARDS),
    "granite": (
        GraniteConfig(**SHAPE, num_key_value_heads=2, attention_multiplier=0.35, logits_scaling=8.0),
        AFTERWARDS,
    ),
    "cohere": (CohereConfig(**SHAPE, num_key_value_heads=2, logit_scale=0.25), AFTERWARDS),
    "phi": (PhiConfig(**SHAPE), BIAS),
    "gptj": (GPTJConfig(**GPT, rotary_dim=4), BIAS),
}


def build(config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    head = model.get_output_embeddings()
    if head.bias is not None:
        nn.init.normal_(head.bias)
    return model


def assert_loss_and_gradients(model: Any, folder: Path, seed: int = 0) -> AnswerTrainer:
    """Compare with float64, one row at a time; returns the trainer, which has decided by then."""
    trainer = AnswerTrainer(model=model, args=arguments(folder))
    examples, weights = ragged(6, seed)
    # Every other token's weight is 0.
    weights = [row * (torch.arange(len(row)) % 2 == 0).numpy() for row in weights]
    reference = copy.deepcopy(model).double()
    loss = trainer.compute_loss(model, AnswerCollator(PAD)(features(examples, weights)))
    loss.backward()
    expected = slow_loss(reference, examples, weights)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=5e-6)
    slow = dict(reference.named_parameters())
    largest = max(p.grad.abs().max().item() for p in slow.values() if p.grad is not None)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None, name
            assert (weight.grad - slow[name].grad).abs().max() < 3e-5 * largest, name
    return trainer


def logits_made(model: Any, run: Callable[[], Any]) -> int:
    """Return how many rows of logits the head makes while `run` runs."""
    made = []
    handle = output_head(model).register_forward_hook(lambda module, inputs, output: made.append(output.shape))
    run()
    handle.remove()
    return sum(shape[:-1].numel() for shape in made if shape[-1] == VOCAB)


@pytest.mark.parametrize("name", FROM_HIDDEN_STATES)
def test_a_plain_linear_head_gives_loss_and_gradients_without_logits(tmp_path: Path, name: str) -> None:
    model = build(FROM_HIDDEN_STATES[name])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*through its logits")
        trainer = assert_loss_and_gradients(model, tmp_path)
    examples, weights = ragged(4, 1)
    batch = AnswerCollator(PAD)(features(examples, weights))
    assert logits_made(model, lambda: trainer.compute_loss(model, batch)) == 0


@pytest.mark.parametrize("name", THROUGH_LOGITS)
def test_any_other_head_goes_through_the_logits_of_counted_tokens_and_says_why(tmp_path: Path, name: str) -> None:
    config, why = THROUGH_LOGITS[name]
    model = build(config)
    with pytest.warns(UserWarning, match=f"{type(model).__name__} is trained through its logits.*{why}") as caught:
        trainer = assert_loss_and_gradients(model, tmp_path)
    examples, weights = ragged(4, 1)
    batch = AnswerCollator(PAD)(features(examples, weights))
    rows = logits_made(model, lambda: trainer.compute_loss(model, batch))
    assert rows == sum(int((row != 0).sum()) for row in weights)
    assert len([warning for warning in caught if "through its logits" in str(warning.message)]) == 1


ADAPTERS: dict[str, tuple[dict[str, Any], str | None]] = {
    "lora-in-the-body": ({"target_modules": ["q_proj", "down_proj"]}, None),
    "head-trained-whole": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, None),
    "lora-on-the-head": ({"target_modules": ["q_proj", "lm_head"]}, "LlamaForCausalLM .* its output head is a Linear"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(tmp_path: Path, name: str) -> None:
    settings, why = ADAPTERS[name]
    torch.manual_seed(0)
    model = get_peft_model(llama(0), LoraConfig(r=4, init_lora_weights=False, **settings)).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_loss_and_gradients(model, tmp_path)
    messages = [str(warning.message) for warning in caught if "through its logits" in str(warning.message)]
    if why is None:
        assert not messages
    else:
        (message,) = messages
        assert re.search(why, message)


@pytest.mark.parametrize("count", [0, 1])
def test_a_batch_in_which_nothing_counts_has_loss_zero_and_gradients_of_zero(tmp_path: Path, count: int) -> None:
    model = build(FROM_HIDDEN_STATES["llama"])
    trainer = AnswerTrainer(model=model, args=arguments(tmp_path))
    examples, weights = ragged(3, 2)
    batch = AnswerCollator(PAD)(features(examples, [row * count for row in weights]))
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    total = sum(p.grad.abs().sum().item() for p in model.parameters())
    assert (loss.item() > 0, total > 0) == (bool(count), bool(count))


def test_evaluation_still_sees_logits_of_the_answer_tokens(tmp_path: Path) -> None:
    model = build(FROM_HIDDEN_STATES["llama"])
    trainer = AnswerTrainer(model=model, args=arguments(tmp_path))
    examples, weights = ragged(3, 3)
    batch = AnswerCollator(PAD)(features(examples, weights))
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    assert outputs.logits.shape == (int((batch["labels"] != -100).sum()), VOCAB)
    torch.testing.assert_close(loss, trainer.compute_loss(model, batch), rtol=1e-6, atol=0)


# The decision


def test_the_probe_draws_no_random_numbers_and_leaves_the_mode_as_it_was() -> None:
    model = build(LlamaConfig(**GROUPED, attention_dropout=0.5))
    model.train()
    before = torch.get_rng_state()
    assert gives_the_logits(output_head(model), model, {"input_ids": torch.tensor([[5]]), "use_cache": False})
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())


def test_a_hook_that_bends_the_logits_is_found() -> None:
    model = build(FROM_HIDDEN_STATES["llama"])
    inputs = {"input_ids": torch.tensor([[5]]), "use_cache": False}
    handle = output_head(model).register_forward_hook(lambda module, args, output: output * 1.001)
    assert not gives_the_logits(output_head(model), model, inputs)
    handle.remove()
    assert gives_the_logits(output_head(model), model, inputs)


def test_a_head_whose_forward_somebody_else_replaced_is_not_a_plain_layer() -> None:
    head = nn.Linear(4, 6, bias=False)
    assert linear_of(head) is head
    own = head.forward
    head.forward = lambda hidden: own(hidden) * 2  # type: ignore[method-assign]
    assert linear_of(head) is None
    ones = torch.ones(1, 4)
    doubled = head(ones)
    # Ours goes, theirs stays.
    with replaced_head(head, lambda hidden: hidden.sum()):
        assert head(ones) == 4
    assert torch.equal(head(ones), doubled)


def test_the_head_is_itself_again_after_an_exception() -> None:
    head = nn.Linear(4, 6, bias=False)
    with pytest.raises(RuntimeError, match="out of memory"), replaced_head(head, lambda hidden: hidden):
        raise RuntimeError("out of memory")
    assert linear_of(head) is head
    assert head(torch.ones(1, 4)).shape == (1, 6)
