"""A tiny character-level pair of models, weak and strong, and questions for them: a whole experiment in a minute.

Both models are trained from scratch on lines such as `<dig=gid` and `dig=dig`: letters behind a `<` are reversed,
others copied, and every second line has some clutter in front. They can thus reverse, but were never asked for it
in words (`reverse dig`), which looks to them like clutter: fine-tuning has to draw the skill out, which is what
weak-to-strong experiments are about.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ensemw2s.data.batches import AnswerCollator
from ensemw2s.data.characters import TASKS, draw_letters
from ensemw2s.models.model_cache import cached_model
from ensemw2s.runtime.fingerprint import digest_json

_CLUTTER = "aceopqrstvwxyz "
_LONGEST_CLUTTER = 8
_LONGEST_TRAINED = 6
_BATCH_SIZE = 48
# Padding is the end token, as in many real tokenizers: whoever masks by token id loses the end of every answer.
_END, _UNKNOWN = "<end>", "<unknown>"
_MAX_TOKENS = 128


@dataclass(frozen=True)
class _Recipe:
    """How a model is made. All that decides its weights is here or in `_VERSION`, and so in its folder's name."""

    num_layers: int
    hidden_size: int
    num_steps: int
    learning_rate: float
    seed: int = 0


# Raise it when the training text or loop changes, so that models made the old way are not mistaken for new ones.
_VERSION = 1
# Both are stopped before they are perfect: fine-tuned, the weak one must err on easy questions and fail on most hard
# ones, the strong one must do clearly better.
_RECIPES = {
    "char-weak": _Recipe(num_layers=2, hidden_size=96, num_steps=500, learning_rate=3e-3, seed=2),
    "char-strong": _Recipe(num_layers=3, hidden_size=96, num_steps=700, learning_rate=3e-3),
}


def scratch_folder(name: str) -> Path:
    """Return the folder of a character-level model, which is trained and saved there on first use.

    The folder is in `files.cache_folder()` and holds `model.safetensors`, `config.json` and the tokenizer's files.
    Training takes 15 to 30 seconds on one core and leaves torch's random state and threads as they were; on
    one machine it always ends with the same weights.

    Args:
        name: "char-weak" (2 layers) or "char-strong" (3 layers, trained longer).

    Raises:
        ValueError: no model of that name.
        DiskFullError: the disk of the cache folder is full.
        OSError: the model is not there yet and the cache folder cannot be written.
    """
    recipe = _recipe(name)

    def make(folder: Path) -> None:
        tokenizer = _make_tokenizer()
        model = _train(recipe, tokenizer, f"making scratch:{name}, once")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return cached_model(f"scratch-{name}-{digest_json([_VERSION, asdict(recipe)], 4)}", make)


def scratch_layers(name: str) -> int:
    """Return the number of decoder layers of a model that `scratch_folder` makes; raises ValueError as it does."""
    return _recipe(name).num_layers


def _recipe(name: str) -> _Recipe:
    if name not in _RECIPES:
        raise ValueError(f"there is no scratch model {name!r}: expected {' or '.join(_RECIPES)}")
    return _RECIPES[name]


def _make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character; others become the unknown token."""
    characters = [*string.printable[:95], "\n"]
    vocabulary = {token: index for index, token in enumerate((_END, _UNKNOWN, *characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=_END,
        pad_token=_END,
        unk_token=_UNKNOWN,
        model_max_length=_MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def _train(recipe: _Recipe, tokenizer: PreTrainedTokenizerFast, description: str) -> LlamaForCausalLM:
    generator = np.random.default_rng(recipe.seed)
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden_size,
            intermediate_size=2 * recipe.hidden_size,
            num_hidden_layers=recipe.num_layers,
            num_attention_heads=recipe.hidden_size // 32,
            max_position_embeddings=_MAX_TOKENS,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = LlamaForCausalLM(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, recipe.learning_rate, total_steps=recipe.num_steps, pct_start=0.1
        )
        for _ in tqdm(range(recipe.num_steps), desc=description, unit="step", leave=False):
            input_ids, labels = _training_batch(generator, tokenizer)
            optimizer.zero_grad()
            model(input_ids=input_ids, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and on a busy machine threads that wait cost a factor of ten."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _training_batch(
    generator: np.random.Generator, tokenizer: PreTrainedTokenizerFast
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `input_ids` and `labels`, int64 [B, L], padded on the right."""
    lines = [_training_line(generator) for _ in range(_BATCH_SIZE)]
    # The loss is on what follows the equals sign: the letters before it are random, there is nothing to learn in them.
    rows = [{"input_ids": tokenizer(line + _END)["input_ids"], "prompt_length": line.index("=") + 1} for line in lines]
    batch = AnswerCollator(tokenizer.pad_token_id)(rows)
    return batch["input_ids"], batch["labels"]


def _training_line(generator: np.random.Generator) -> str:
    symbol, answer = list(TASKS.values())[generator.integers(len(TASKS))]
    letters = draw_letters(generator, 1, _LONGEST_TRAINED)
    length = max(0, int(generator.integers(-_LONGEST_CLUTTER, _LONGEST_CLUTTER, endpoint=True)))
    clutter = "".join(_CLUTTER[index] for index in generator.integers(len(_CLUTTER), size=length))
    return f"{clutter}{symbol}{letters}={answer(letters)}"
