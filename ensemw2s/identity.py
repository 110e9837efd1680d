"""What decides a result, in a form that can be compared: models and questions as hashes, settings as plain JSON."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from datasets import Dataset

# Where a model was loaded from and by which version says nothing of what it computes.
_NO_SETTINGS = {"_name_or_path", "transformers_version"}


def describe_model(model: str | os.PathLike[str] | PreTrainedModel) -> str:
    """Name a model: a source by itself, a model by a hash of its weights."""
    if not isinstance(model, PreTrainedModel):
        return str(model)
    return f"{type(model).__name__}:{digest_weights(model)}"


def digest_weights(model: nn.Module) -> str:
    """Name a model by a hash of all its weights, of which it reads every byte."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def computes(model: Any) -> dict[str, Any]:
    """Return what decides a loaded model's outputs: its weights (as a hash), settings and kind of attention."""
    settings = {name: value for name, value in model.config.to_dict().items() if name not in _NO_SETTINGS}
    return {
        "weights": digest_weights(model), "settings": settings, "attention": model.config._attn_implementation,
    }  # fmt: skip


def digest_questions(questions: Dataset) -> str:
    """Name questions by a hash of their prompts and answers, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for row in questions.select_columns(["prompt", "answer"]):
        digest.update(json.dumps([row["prompt"], row["answer"]]).encode())
    return digest.hexdigest()


def digest_examples(examples: Dataset) -> str:
    """Name tokenised questions (`data.tokenize_questions`) by a hash of all their tokens, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for row in examples.select_columns(["input_ids", "prompt_length"]):
        digest.update(json.dumps([row["input_ids"], row["prompt_length"]]).encode())
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """Turn what JSON does not know (sets, enums, paths) into what it does, sets into the same list everywhere."""
    return sorted(value) if isinstance(value, set | frozenset) else str(value)
