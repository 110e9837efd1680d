"""Teacher-forced scores of given answers: which tokens a model or an ensemble would have got wrong.

With a fixed tokenisation, greedy decoding produces an answer exactly when every teacher-forced argmax along it is
right, so exact match needs no decoding. That holds for a single model and for an ensemble alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ensemw2s import ops
from ensemw2s.cost import count
from ensemw2s.data import AnswerCollator, answer_lengths
from ensemw2s.ensemble import TokenEnsemble
from ensemw2s.training import next_token_mask, only_positions

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class AnswerScores:
    """Per-token scores of N answers with n tokens in all, in dataset order.

    Attributes:
        lengths: int64 [N], tokens of each answer.
        token_wrong: bool [n], whether the argmax differs from the answer's token.
        token_log_probs: float32 [n], log-probability of the answer's token (nats).
    """

    lengths: np.ndarray
    token_wrong: np.ndarray
    token_log_probs: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """Return bool [N]: no token of the answer is wrong (greedy exact match)."""
        starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]])
        return ~np.logical_or.reduceat(self.token_wrong, starts)

    @property
    def accuracy(self) -> float:
        """Return the share of answers that are right in every token."""
        return float(self.correct.mean())

    @property
    def token_error(self) -> float:
        """Return the share of answer tokens that are wrong."""
        return float(self.token_wrong.mean())


def score_answers(
    model: torch.nn.Module,
    examples: Dataset,
    *,
    pad_token_id: int,
    batch_size: int = 32,
    description: str | None = None,
) -> AnswerScores:
    """Score the answers of `examples` under a causal language model or a `TokenEnsemble`.

    Args:
        model: anything with `.logits` of shape [batch, length, V]; a `TokenEnsemble` is scored by its mixture.
        examples: columns `input_ids` and `prompt_length` (`data.tokenize_questions`).
        pad_token_id: fills short rows.
        batch_size: examples per forward pass.
        description: the name of a progress bar; None shows none.

    Raises:
        FloatingPointError: the model gives NaN; names the row.
        ValueError: no examples, or one whose answer has no tokens.
    """
    if isinstance(model, TokenEnsemble):
        weights = {"ensemble": list(model.config.expert_weights)}
        return score_mixtures(
            model,
            examples,
            weights,
            pad_token_id=pad_token_id,
            batch_size=batch_size,
            description=description,
        )["ensemble"]

    def log_probs(batch: dict[str, torch.Tensor], mask: torch.Tensor) -> dict[str, torch.Tensor]:
        with only_positions(model, mask):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        count(model, batch["input_ids"], batch["attention_mask"], logits.shape[0])
        return {"model": logits.float().log_softmax(-1)}

    return _score(log_probs, examples, _device(model), pad_token_id, batch_size, description)["model"]


def score_mixtures(
    ensemble: TokenEnsemble,
    examples: Dataset,
    mixtures: Mapping[str, Sequence[float]],
    *,
    pad_token_id: int,
    batch_size: int = 32,
    description: str | None = None,
) -> dict[str, AnswerScores]:
    """Score answers under several mixtures of the same experts, each expert being run once.

    Args:
        ensemble: the experts, and how they are combined.
        examples: columns `input_ids` and `prompt_length`.
        mixtures: name -> T non-negative weights (a one-hot row scores that expert alone).
        pad_token_id: fills short rows.
        batch_size: examples per forward pass.
        description: the name of a progress bar; None shows none.

    Raises:
        FloatingPointError: an expert of positive weight gives NaN; names the mixture and the row.
        ValueError: no mixture, or one without T non-negative and finite weights, not all 0; no examples, or one whose
            answer has no tokens.
    """
    _check_mixtures(mixtures, ensemble.num_experts)
    rows = {name: torch.tensor(weights, dtype=torch.float32) for name, weights in mixtures.items()}
    # An expert that no mixture uses is not run.
    used = [t for t in range(ensemble.num_experts) if any(float(weights[t]) > 0 for weights in rows.values())]

    def log_probs(batch: dict[str, torch.Tensor], mask: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = ensemble.expert_logits(used, batch["input_ids"], batch["attention_mask"], positions=mask)
        return {
            name: ops.mixture_log_probs(logits, weights[used].to(logits[0].device), combine=ensemble.config.combine)
            for name, weights in rows.items()
        }

    return _score(log_probs, examples, _device(ensemble), pad_token_id, batch_size, description)


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def _score(log_probs, examples, device, pad_token_id, batch_size, description):  # type: ignore[no-untyped-def]
    lengths = answer_lengths(examples)
    if lengths.min(initial=1) < 1 or not len(lengths):
        raise ValueError(f"{len(lengths)} examples to score: expected at least one, each with answer tokens")
    starts = np.concatenate([[0], np.cumsum(lengths)])
    # Rows of similar length share a batch, so that little is spent on padding; results go back by position.
    order = np.argsort([len(ids) for ids in examples["input_ids"]], kind="stable")
    loader = DataLoader(examples.select(order), batch_size=batch_size, collate_fn=AnswerCollator(pad_token_id))
    wrong: dict[str, np.ndarray] = {}
    gold: dict[str, np.ndarray] = {}
    done = 0
    for batch in tqdm(loader, desc=description, unit="batch", leave=False, disable=description is None):
        batch = {key: value.to(device) for key, value in batch.items()}
        mask = next_token_mask(batch["labels"])
        labels = batch["labels"][:, 1:][mask[:, :-1]]
        rows = order[done : done + len(batch["labels"])]
        done += len(rows)
        places = np.concatenate([np.arange(starts[row], starts[row + 1]) for row in rows])
        for name, values in log_probs(batch, mask).items():
            if name not in wrong:
                wrong[name] = np.empty(starts[-1], dtype=bool)
                gold[name] = np.empty(starts[-1], dtype=np.float32)
            wrong[name][places] = (values.argmax(-1) != labels).cpu().numpy()
            gold[name][places] = values.gather(-1, labels[:, None])[:, 0].float().cpu().numpy()
    for name, values in gold.items():
        _check_scores(name, values, starts)
    return {name: AnswerScores(lengths, wrong[name], gold[name]) for name in wrong}


def _check_mixtures(mixtures: Mapping[str, Sequence[float]], num_experts: int) -> None:
    if not mixtures:
        raise ValueError("mixtures is empty: name at least one")
    for name, weights in mixtures.items():
        if len(weights) != num_experts or not all(0 <= w < float("inf") for w in weights) or not any(weights):
            raise ValueError(
                f"mixture {name!r} is {list(weights)}: expected {num_experts} weights, one per expert, finite, at "
                "least 0 and not all 0"
            )


def _check_scores(name: str, log_probs: np.ndarray, starts: np.ndarray) -> None:
    broken = np.isnan(log_probs)
    if broken.any():
        row = int(np.searchsorted(starts, broken.argmax(), side="right")) - 1
        raise FloatingPointError(
            f"{name}: NaN for the answer in row {row} of the examples. A model's weights are damaged or overflow in "
            "their dtype: load it in float32, or train it again"
        )
