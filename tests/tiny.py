"""Tiny random models over the letters, for tests that need a model but no language."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from ensemw2s.data.tokens import QuestionFormat

if TYPE_CHECKING:
    from datasets import Dataset

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 :"
PAD, END = 0, 1
VOCAB = len(LETTERS) + 2
FORMAT = QuestionFormat(prompt_template="{prompt}:", answer_prefix=" ")


def llama(seed: int = 0, vocab_size: int = VOCAB, **settings: object) -> LlamaForCausalLM:
    """Two layers, 32 wide, with weights large enough that predictions are far from uniform."""
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.4,
    }  # fmt: skip
    tokens = {"pad_token_id": PAD, "eos_token_id": END, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **(shape | tokens | settings))).eval()


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Another architecture over the same vocabulary."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=END, eos_token_id=END,
        pad_token_id=PAD, initializer_range=0.4,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter."""
    vocabulary = {"<pad>": PAD, "<end>": END, **{letter: i + 2 for i, letter in enumerate(LETTERS)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")


def saved_model(folder: Path, seed: int = 0, **settings: object) -> Path:
    """Write `llama(seed)` and its tokenizer to `folder`, as a user's own model would lie there."""
    llama(seed, **settings).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def lora() -> LoraConfig:
    """Return a small adapter's configuration."""
    return LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])


def saved_adapters(folder: Path, count: int = 3, **settings: object) -> list[Path]:
    """Write `count` LoRA adapters of `llama(0, **settings)` with random weights."""
    paths = []
    for t in range(count):
        model = get_peft_model(llama(0, **settings), lora())
        # Only now: making a model sets the seed too.
        torch.manual_seed(100 + t)
        for name, weight in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.5)
        model.save_pretrained(folder / f"adapter-{t}")
        paths.append(folder / f"adapter-{t}")
    return paths


def dora_adapters(folder: Path, count: int) -> list[Path]:
    """Write adapters that cannot be stacked."""
    paths = [folder / f"dora-{t}" for t in range(count)]
    for seed, path in enumerate(paths):
        base = llama(0)
        torch.manual_seed(seed + 50)
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True, init_lora_weights=False)
        get_peft_model(base, config).save_pretrained(path)
    return paths


def random_word(generator: torch.Generator, length: int) -> str:
    """Return `length` random letters."""
    return "".join(LETTERS[i] for i in torch.randint(0, 26, (length,), generator=generator))


def questions(count: int, seed: int = 4, start: int = 0) -> Dataset:
    """Distinct questions: a random word and a number; the answer is the word's first two letters."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
    words = [random_word(generator, length) for length in lengths]
    return Dataset.from_list(
        [{"id": f"q{start + i}", "prompt": f"{word}{start + i}", "answer": word[:2]} for i, word in enumerate(words)]
    )


class Watch(TrainerCallback):
    """Keeps what trainings told: how many there were, the loss of each evaluation by its step, the best checkpoint."""

    def __init__(self) -> None:
        self.trainings = 0
        self.losses: list[tuple[int, float]] = []
        self.best: str | None = None

    def on_log(self, args: object, state: Any, control: object, logs: Any = None, **kwargs: object) -> None:
        self.losses += [(state.global_step, logs["eval_loss"])] if "eval_loss" in logs else []

    def on_train_end(self, args: object, state: Any, control: object, **kwargs: object) -> None:
        self.trainings += 1
        self.best = state.best_model_checkpoint
