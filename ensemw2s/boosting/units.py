"""Which answer tokens carry a boosting weight, and which of them share one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ensemw2s.boosting import algorithm
from ensemw2s.data.tokens import answer_lengths

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


class AnswerUnits:
    """The units of boosting over the n answer tokens of a dataset, and how weights and losses go to and fro.

    Args:
        examples: columns `input_ids` and `prompt_length` (`ensemw2s.tokenize_questions`).
        boosted: bool [n], the tokens that carry a weight, at least one per answer; None means all.
        unit: see `ensemw2s.boosting.algorithm.unit_index`; a window is one of boosted tokens.
        window: boosted tokens in a window, for unit="window".
    """

    def __init__(
        self, examples: Dataset, boosted: np.ndarray | None, unit: algorithm.Unit, window: int | None = None
    ) -> None:
        self.lengths = answer_lengths(examples)
        self._boosted = boosted
        self._unit, self._window = unit, window

    def index(self) -> np.ndarray:
        """Return int64, the unit of every boosted token."""
        lengths = self.lengths
        if self._boosted is not None:
            lengths = np.add.reduceat(self._boosted.astype(np.int64), np.cumsum(lengths) - lengths)
        return algorithm.unit_index(lengths, self._unit, self._window)

    def token_weights(self, unit_weights: np.ndarray, index: np.ndarray) -> list[np.ndarray]:
        """Return the weight of each answer's tokens, float32: views of one array. Tokens that are not boosted weigh 1.

        Args:
            unit_weights: float64 [N], may be mapped into memory.
            index: of `index()`, may be mapped into memory.
        """
        boosted = np.empty(index.size, dtype=np.float32)
        for start in range(0, index.size, algorithm.BLOCK):
            boosted[start : start + algorithm.BLOCK] = unit_weights[index[start : start + algorithm.BLOCK]]
        tokens = boosted
        if self._boosted is not None:
            tokens = np.ones(self._boosted.size, dtype=np.float32)
            tokens[self._boosted] = boosted
        return np.split(tokens, np.cumsum(self.lengths)[:-1])

    def losses(self, token_losses: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return each unit's loss [N] from those of all n answer tokens; see `algorithm.unit_losses`."""
        boosted = token_losses if self._boosted is None else token_losses[self._boosted]
        return algorithm.unit_losses(boosted, index)


def informative_tokens(examples: Dataset, processing_class: PreTrainedTokenizerBase) -> np.ndarray:
    """Return bool [n]: the answer tokens that are neither the end token nor white space.

    An answer of nothing else (white space that is to be written) keeps all its tokens.
    """
    answers = [row["input_ids"][row["prompt_length"] :] for row in examples]
    trivial = {
        token for token in {token for answer in answers for token in answer}
        if token == processing_class.eos_token_id or not processing_class.decode([token]).strip()
    }  # fmt: skip
    informative = [np.array([token not in trivial for token in answer]) for answer in answers]
    return np.concatenate([mask if mask.any() else np.ones_like(mask) for mask in informative])
