"""Packed rows against padded ones: what models read, and what training makes of it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPTNeoXConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from ensemw2s.data.tokens import tokenize_questions
from ensemw2s.training.arguments import AnswerTrainingArguments
from ensemw2s.training.fine_tune import fine_tune
from ensemw2s.training.packing import keeps_rows_apart, lines_of, pack_rows, wants_one_line, width_of
from ensemw2s.training.trainer import AnswerTrainer
from tests.tiny import END, FORMAT, VOCAB, gpt2, llama, lora, questions, tokenizer

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(lengths=LENGTHS, one_line=st.booleans())
@settings(deadline=None)
def test_every_row_is_in_one_line_and_lines_are_of_like_lengths(lengths: list[int], one_line: bool) -> None:
    lines = lines_of(lengths, one_line=one_line)
    assert sorted(row for line in lines for row in line) == list(range(len(lengths)))
    # An empty line would be all padding.
    assert all(lines)
    assert len(lines) == 1 or not one_line
    # No line is longer than the mean by more than a row.
    assert width_of(lines, lengths) <= sum(lengths) / len(lines) + max(lengths)
    assert one_line or width_of(lines, lengths) <= 7 * max(lengths)


@given(lengths=LENGTHS, seed=st.integers(0, 2**16))
@settings(deadline=None)
def test_every_token_and_its_position_is_found_at_its_place(lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, 1000, mask.shape, generator=generator) * mask
    packed = pack_rows(ids, mask)
    places = packed.places[mask.bool()]
    assert len(set(places.tolist())) == sum(lengths) == int(packed.mask.sum())
    assert (packed.places[mask == 0] == -1).all()
    assert torch.equal(packed.input_ids.flatten()[places], ids[mask.bool()])
    within = torch.arange(max(lengths)).expand_as(mask)
    assert torch.equal(packed.position_ids.flatten()[places], within[mask.bool()])
    assert packed.mask.flatten()[places].all()


def test_little_of_a_packed_batch_is_padding() -> None:
    generator = np.random.default_rng(0)
    padded = packed = real = 0
    for _ in range(50):
        lengths = generator.integers(15, 36, size=16).tolist()
        lines = lines_of(lengths)
        real += sum(lengths)
        packed += len(lines) * width_of(lines, lengths)
        padded += len(lengths) * max(lengths)
    assert real / padded < 0.8
    assert real / packed > 0.95


def small(config: Any, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.4,
    }  # fmt: skip
    return AutoModelForCausalLM.from_config(config(**(shape | settings)))


MODELS = {
    "llama": lambda: llama(0),
    "gpt2": lambda: gpt2(0),
    "mistral, windows of 3": lambda: small(MistralConfig, sliding_window=3),
    "qwen2": lambda: small(Qwen2Config),
    "qwen3": lambda: small(Qwen3Config, head_dim=8),
    "gpt-neox": lambda: small(GPTNeoXConfig),
    "gemma2, windows of 3": lambda: small(Gemma2Config, head_dim=8, sliding_window=3),
    "llama, eager attention": lambda: llama(0, attn_implementation="eager"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_know_positions_keep_packed_rows_apart(name: str) -> None:
    model = MODELS[name]()
    assert keeps_rows_apart(model, model)


class Leaky(nn.Module):
    """A model whose rows see whatever stands before them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama(0)
        self.config = self.inner.config

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.lm_head

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **inputs: Any) -> Any:
        return self.inner(input_ids=input_ids, **inputs)


@pytest.mark.parametrize("name", ["leaky", "bloom", "mamba"])
def test_models_that_would_mix_rows_are_found_out(name: str) -> None:
    if name == "leaky":
        model: Any = Leaky()
    elif name == "bloom":
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4))
    else:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
        )
    model.train()
    assert not keeps_rows_apart(model, model)
    assert model.training


def test_flash_attention_wants_one_line() -> None:
    model = llama(0)
    assert not wants_one_line(model)
    model.config._attn_implementation = "flash_attention_2"
    assert wants_one_line(model)


# Training


def train(folder: Path, model: nn.Module, weights: list[np.ndarray] | None = None, **options: Any) -> Any:
    examples = tokenize_questions(questions(14), tokenizer(), FORMAT)
    settings = {"learning_rate": 0.05, "optim": "sgd", "num_train_epochs": 2, "per_device_train_batch_size": 7}
    args = AnswerTrainingArguments(output_dir=str(folder), disable_tqdm=True, **(settings | options.pop("args", {})))
    return fine_tune(
        model, examples, args, pad_token_id=END, seed=3, description="training", token_weights=weights, **options
    )


def trained_weights(model: nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten() for name, weight in model.named_parameters() if weight.requires_grad])


def random_weights(seed: int) -> list[np.ndarray]:
    examples = tokenize_questions(questions(14), tokenizer(), FORMAT)
    generator = np.random.default_rng(seed)
    lengths = [len(ids) - start for ids, start in zip(examples["input_ids"], examples["prompt_length"], strict=True)]
    return [generator.exponential(size=length) * generator.integers(0, 2, size=length) for length in lengths]


@pytest.mark.parametrize(
    ("build", "adapter"),
    [(llama, False), (llama, True), (lambda _: small(GPTNeoXConfig), False)],
    ids=["llama", "llama-lora", "gpt-neox"],
)
def test_training_on_packed_rows_is_training_on_padded_ones(tmp_path: Path, build: Any, adapter: bool) -> None:
    before = trained_weights(build(0))
    ends = []
    for packed in (True, False):
        trained, cost = train(
            tmp_path, build(0), random_weights(5), args={"padding_free": packed},
            peft_config=lora() if adapter else None,
        )  # fmt: skip
        ends.append((trained_weights(trained), cost.tokens))
    (packed_end, packed_tokens), (padded_end, padded_tokens) = ends
    assert packed_tokens == padded_tokens
    moved = (padded_end - before).abs().max() if not adapter else padded_end.abs().max()
    assert (packed_end - padded_end).abs().max() < 1e-4 * moved


def test_packed_rows_are_what_the_model_reads(tmp_path: Path) -> None:
    model, seen = llama(0), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((tuple(kwargs["input_ids"].shape), "position_ids" in kwargs)),
        with_kwargs=True,
    )
    train(tmp_path, model)
    steps = [shape for shape, packed in seen if packed]
    assert len([shape for shape in steps if shape[0] < 7]) >= 4


def test_a_model_that_mixes_rows_is_trained_on_padded_batches_with_one_warning(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, _ = train(tmp_path, build())
    texts = [str(warning.message) for warning in caught if "packed rows" in str(warning.message)]
    assert len(texts) == 1
    assert texts[0].startswith("BloomForCausalLM is trained on padded batches")
    second, _ = train(tmp_path, build(), args={"padding_free": False})
    assert torch.equal(trained_weights(first), trained_weights(second))


def test_packed_outputs_come_in_the_order_of_the_labels(tmp_path: Path) -> None:
    examples = tokenize_questions(questions(6), tokenizer(), FORMAT)
    from ensemw2s.data.batches import AnswerCollator

    batch = AnswerCollator(END)(list(examples))
    found = []
    for packed in (True, False):
        args = AnswerTrainingArguments(output_dir=str(tmp_path), padding_free=packed)
        trainer = AnswerTrainer(model=llama(0), args=args, train_dataset=examples, data_collator=AnswerCollator(END))
        with torch.no_grad():
            found.append(trainer.compute_loss(trainer.model.eval(), dict(batch), return_outputs=True))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1].logits, found[1][1].logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_mixed_precision_does_not_hide_that_rows_are_kept_apart(tmp_path: Path, strategy: str) -> None:
    examples = tokenize_questions(questions(12), tokenizer(), FORMAT)
    args = AnswerTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, bf16=True, max_steps=2, disable_tqdm=True, learning_rate=1e-2,
        train_sampling_strategy=strategy,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is trained on padded batches")
        fine_tune(llama(0), examples, args, pad_token_id=END, seed=1, description="x")
