"""Teacher-forced scores of given answers: which tokens a model or an ensemble would have got wrong.

With a fixed tokenisation, greedy decoding produces an answer exactly when every teacher-forced argmax along it is
right, so exact match needs no decoding. That holds for a single model and for an ensemble alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ensemw2s import ops
from ensemw2s.data.batches import AnswerCollator, batches_by_length, next_token_mask
from ensemw2s.data.tokens import answer_lengths, check_examples
from ensemw2s.models.heads import gives_the_logits, only_positions, output_head, own_head, states_before
from ensemw2s.models.mixture import ExpertMixture, damaged, expert_names, is_mixture, refuse_damaged, repeat_rows
from ensemw2s.ops import TokenScores
from ensemw2s.ops.products import faster_linear_layers
from ensemw2s.ops.row_losses import CHUNK_ELEMENTS
from ensemw2s.runtime import processes
from ensemw2s.runtime.meter import Work, count
from ensemw2s.runtime.values import check_number

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class AnswerScores:
    """Per-token scores of N answers with n tokens in all, in dataset order.

    Attributes:
        lengths: int64 [N], tokens of each answer.
        token_wrong: bool [n], whether the argmax differs from the answer's token.
        token_log_probs: float32 [n], log-probability of the answer's token (nats).
        chosen_right: bool [N], whether the likeliest of a question's `choices` is its answer; None where the choices
            were not compared.
    """

    lengths: np.ndarray
    token_wrong: np.ndarray
    token_log_probs: np.ndarray
    chosen_right: np.ndarray | None = None

    def __repr__(self) -> str:
        return f"AnswerScores({len(self.lengths)} answers, {self.accuracy:.1%} of them right)"

    @property
    def correct(self) -> np.ndarray:
        """Return bool [N]: the likeliest choice is the answer; without choices, no token is wrong (greedy match)."""
        if self.chosen_right is not None:
            return self.chosen_right
        starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]])
        return ~np.logical_or.reduceat(self.token_wrong, starts)

    @property
    def accuracy(self) -> float:
        """Return the share of answers that are `correct`."""
        return float(self.correct.mean())

    @property
    def token_error(self) -> float:
        """Return the share of answer tokens that are wrong."""
        return float(self.token_wrong.mean())


def score_examples(
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
        examples: columns `input_ids` and `prompt_length` (`ensemw2s.tokenize_questions`).
        pad_token_id: fills short rows.
        batch_size: examples per forward pass.
        description: the name of a progress bar; None shows none.

    Raises:
        FloatingPointError: the model, or an expert, gives NaN, +inf or no finite logit for a token of an answer; names
            which and the row.
        ValueError: no examples, a missing column, or an answer without tokens; names the row.
    """
    if is_mixture(model):
        weights = {"ensemble": list(model.config.expert_weights)}
        options: dict[str, Any] = {"pad_token_id": pad_token_id, "batch_size": batch_size, "description": description}
        return score_mixtures(model, examples, weights, **options)["ensemble"]

    def judge(logits: list[Tensor], labels: Tensor) -> dict[str, TokenScores]:
        return {"model": ops.token_scores(logits[0], labels)}

    run = _ModelRun(partial(nullcontext, model), model)
    return _score([run], ["the model"], judge, examples, pad_token_id, batch_size, description)["model"]


def score_mixtures(
    ensemble: ExpertMixture,
    examples: Dataset,
    mixtures: Mapping[str, Sequence[float]],
    *,
    pad_token_id: int,
    batch_size: int = 32,
    description: str | None = None,
    combine: Mapping[str, str] | None = None,
) -> dict[str, AnswerScores]:
    """Score answers under several mixtures of the same experts, each expert being run once.

    LoRA experts on one base run together, as one batch of T x `batch_size` rows.

    Args:
        ensemble: the experts, and how they are combined.
        examples: columns `input_ids` and `prompt_length`.
        mixtures: name -> T non-negative weights (a one-hot row scores that expert alone).
        pad_token_id: fills short rows.
        batch_size: examples per forward pass.
        description: the name of a progress bar; None shows none.
        combine: name -> how that mixture combines distributions ("prob", "logprob" or "vote"), where it is not as the
            ensemble does.

    Raises:
        FloatingPointError: an expert that a mixture gives a positive weight gives NaN, +inf or no finite logit for a
            token of an answer; names the expert and the row.
        ValueError: no mixture, or one without T non-negative and finite weights, not all 0; no examples, a
            missing column, or an answer without tokens.
    """
    ensemble = ensemble.snapshot()
    _check_mixtures(mixtures, ensemble.num_experts)
    # An expert that no mixture uses is not run.
    used = [t for t in range(ensemble.num_experts) if any(weights[t] > 0 for weights in mixtures.values())]
    selected = ensemble.experts.selected(used)
    passes = selected.passes()
    # In the order of the rows that the passes give.
    used = [used[place] for each in passes for place in each.experts]
    parts = {name: [place for place, t in enumerate(used) if weights[t] > 0] for name, weights in mixtures.items()}
    positive = {
        name: torch.tensor([float(weights[t]) for t in used if weights[t] > 0]) for name, weights in mixtures.items()
    }
    ways = dict.fromkeys(mixtures, ensemble.config.combine) | dict(combine or {})

    def judge(logits: list[Tensor], labels: Tensor) -> dict[str, TokenScores]:
        return {
            name: ops.mixture_scores([logits[t] for t in parts[name]], weights.to(labels.device), labels, ways[name])
            for name, weights in positive.items()
        }

    runs = [
        _ModelRun(partial(selected.expert, each.experts[0]), selected.carrier(each.experts[0]))
        if each.stacked is None
        else _ModelRun(each.stacked.model, each.stacked.base, each.stacked.count)
        for each in passes
    ]
    return _score(runs, expert_names(used), judge, examples, pad_token_id, batch_size, description)


def scoring_work(lengths: Sequence[int], answers: Sequence[int], batch_size: int) -> Work:
    """Return the work of scoring examples of these lengths, with so many answer tokens each, by one model."""
    batches = batches_by_length(lengths, batch_size)
    works = (Work.of_padded([lengths[i] for i in rows], sum(answers[i] for i in rows)) for rows in batches)
    return sum(works, Work())


class _ModelRun:
    """The model that `context` gives, run up to the output head; the head then takes some rows at a time.

    Logits of all answer tokens of a batch would take tokens x V numbers: more than everything else together. The cost
    is that of `carrier`. Of `copies` experts that are stacked in one model, the rows follow one another.
    """

    def __init__(
        self, context: Callable[[], AbstractContextManager[Any]], carrier: torch.nn.Module, copies: int = 1
    ) -> None:
        self.context, self.carrier, self.copies = context, carrier, copies
        with self._model() as model:
            self.device = next(model.parameters()).device
            self.vocabulary = int(model.config.get_text_config().vocab_size)
            # A model that changes its logits behind the head has to make them in its own forward pass.
            token = torch.zeros(copies, 1, dtype=torch.int64, device=self.device)
            self.ends_in_head = gives_the_logits(output_head(model), model, {"input_ids": token, "use_cache": False})

    @contextmanager
    def _model(self) -> Iterator[Any]:
        with self.context() as model, own_head(model) as mine:
            yield mine

    def answer_rows(self, batch: Mapping[str, Tensor], mask: Tensor) -> Tensor:
        """Return, per copy, the hidden states [copies, n, d] at the true entries of `mask`, or else the logits."""
        inputs = repeat_rows({key: batch[key] for key in ("input_ids", "attention_mask")}, self.copies)

        def select(hidden: Tensor) -> Tensor:
            return hidden.unflatten(0, (self.copies, -1))[:, mask.to(hidden.device)]

        with self._model() as model, faster_linear_layers(model, inputs["input_ids"].numel()):
            if self.ends_in_head:
                rows = states_before(output_head(model), model, inputs, select)
            else:
                with only_positions(model, mask.repeat(self.copies, 1)):
                    rows = model(**inputs, use_cache=False).logits.unflatten(0, (self.copies, -1))
        count(self.carrier, inputs["input_ids"], inputs["attention_mask"], rows.shape[:-1].numel())
        return rows

    def logits(self, rows: Tensor) -> list[Tensor]:
        """Return, per copy, the logits [n, V] of what `answer_rows` returned."""
        if not self.ends_in_head:
            return list(rows)
        with self._model() as model, faster_linear_layers(model, rows.shape[:-1].numel()):
            return list(output_head(model)(rows))


def _score(
    runs: Sequence[_ModelRun],
    owners: Sequence[str],
    judge: Callable[[list[Tensor], Tensor], dict[str, TokenScores]],
    examples: Dataset,
    pad_token_id: int,
    batch_size: int,
    description: str | None,
) -> dict[str, AnswerScores]:
    """Let `judge` score all answer tokens by all runs' logits, each process its share of the batches.

    Whole batches are shared out: a row meets the same rows (and the same padding) as in one process, so that its
    logits have the same bits.

    `owners` are what messages call those whose logits the runs give, in their order.
    """
    check_number("batch_size", batch_size, whole=True)
    vocabulary = min(run.vocabulary for run in runs)
    examples = check_examples(examples, description or "the answers to score", vocabulary)
    lengths = answer_lengths(examples)
    batches = batches_by_length([len(ids) for ids in examples["input_ids"]], batch_size)
    own = [row for batch in processes.share(batches) for row in batch]
    bar = description if processes.is_main() else None
    found = (own, *_score_share(runs, judge, examples.select(own), pad_token_id, batch_size, bar)) if own else None
    shares = [share for share in processes.gather(found) if share is not None]
    order = np.concatenate([rows for rows, _, _ in shares])
    starts, firsts = np.cumsum(lengths) - lengths, np.cumsum(lengths[order]) - lengths[order]
    damage = np.logical_or.reduceat(np.concatenate([bad for _, _, bad in shares], axis=1), firsts, axis=1)
    refuse_damaged(torch.from_numpy(damage), owners, [f"the answer in row {row} of the examples" for row in order])
    # From the order of the batches back to that of the dataset.
    back = np.argsort(np.concatenate([starts[row] + np.arange(lengths[row]) for row in order]))
    scores = {}
    for name in shares[0][1]:
        wrong, log_probs = (np.concatenate([share[name][k] for _, share, _ in shares])[back] for k in (0, 1))
        broken = np.isnan(log_probs)
        if broken.any():
            row = int(np.searchsorted(starts, broken.argmax(), side="right")) - 1
            raise FloatingPointError(
                f"{name}: the experts' mixture gives no token a probability along the answer in row {row} of the "
                'examples: every token is impossible for one of them; combine them by "prob"'
            )
        scores[name] = AnswerScores(lengths, wrong, log_probs)
    return scores


@torch.no_grad()
def _score_share(
    runs: Sequence[_ModelRun],
    judge: Callable[[list[Tensor], Tensor], dict[str, TokenScores]],
    examples: Dataset,
    pad_token_id: int,
    batch_size: int,
    description: str | None,
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """Return, in the order of `examples`, each mixture's bool and float32 [tokens]; and damage, bool [T, tokens]."""
    loader = DataLoader(examples, batch_size=batch_size, collate_fn=AnswerCollator(pad_token_id))
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
    damage: list[np.ndarray] = []
    for batch in tqdm(loader, desc=description, unit="batch", leave=False, disable=description is None):
        for scores, bad in _in_chunks(runs, judge, {key: value.to(runs[0].device) for key, value in batch.items()}):
            damage.append(bad.cpu().numpy())
            for name, values in scores.items():
                found[name].append((~values.correct.cpu().numpy(), values.log_probs.float().cpu().numpy()))
    joined = {
        name: (np.concatenate([wrong for wrong, _ in parts]), np.concatenate([log_probs for _, log_probs in parts]))
        for name, parts in found.items()
    }
    return joined, np.concatenate(damage, axis=1)


def _in_chunks(
    runs: Sequence[_ModelRun], judge: Callable[..., dict[str, TokenScores]], batch: Mapping[str, Tensor]
) -> Iterator[tuple[dict[str, TokenScores], Tensor]]:
    mask = next_token_mask(batch["labels"])
    labels = batch["labels"][:, 1:][mask[:, :-1]]
    rows = [run.answer_rows(batch, mask) for run in runs]
    size = max(1, CHUNK_ELEMENTS // sum(run.copies * run.vocabulary for run in runs))
    for start in range(0, len(labels), size):
        part = slice(start, start + size)
        logits = [each for run, hidden in zip(runs, rows, strict=True) for each in run.logits(hidden[:, part])]
        scores = judge(logits, labels[part].to(logits[0].device))
        bad = damaged(logits)
        # Or the next chunk would be made beside this one.
        del logits
        yield scores, bad


def _check_mixtures(mixtures: Mapping[str, Sequence[float]], num_experts: int) -> None:
    if not mixtures:
        raise ValueError("mixtures is empty: name at least one")
    for name, weights in mixtures.items():
        if len(weights) != num_experts or not all(0 <= w < float("inf") for w in weights) or not any(weights):
            raise ValueError(
                f"mixture {name!r} is {list(weights)}: expected {num_experts} weights, one per expert, finite, at "
                "least 0 and not all 0"
            )
