"""Questions whose answers are choices, answered by likelihood.

The answer is the choice `c` of the highest log-probability `sum_j log p(c_j | prompt, c_<j)` over the tokens of `c`,
its end token included where the format has one. For an ensemble with `combine="prob"` or `"logprob"`, `p` is the
mixture's next-token distribution (method, phase 2). With `combine="vote"` each expert votes for the choice that it
finds likeliest and the votes are weighted, which on one-token choices is SAMME's weighted vote [choice].

The prompt is run once per question; its choices go on from the cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from ensemw2s import ops
from ensemw2s.data.batches import by_length, pad_prompts
from ensemw2s.data.questions import check_questions, row_name, warn_of_unknown
from ensemw2s.data.tokens import QuestionFormat, answer_with_end, checked_format, fitted_prompt
from ensemw2s.inference.reading import read_prompts, reading_work, run_experts
from ensemw2s.models.mixture import Mixture, OneModel, damaged, expert_names, is_mixture, refuse_damaged
from ensemw2s.runtime import processes
from ensemw2s.runtime.meter import Work
from ensemw2s.runtime.values import check_number

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ChoiceScores:
    """How N questions were answered by likelihood, in dataset order.

    Attributes:
        log_probs: for each question float64 [K], the log-probability (nats) of each of its K choices: the sum over its
            tokens, or the mean with `length_normalised`; with `combine="vote"` the log of its share of the votes.
        chosen: int64 [N], the index of the likeliest choice, the earliest of several.
        correct: bool [N], whether that is the answer; None if the questions have no answers.
    """

    log_probs: list[np.ndarray]
    chosen: np.ndarray
    correct: np.ndarray | None

    @property
    def confidence(self) -> np.ndarray:
        """Return float64 [N], the log (nats) of the chosen one's share of the choices' probability (their softmax)."""
        return np.array([-np.log(np.exp(row - row.max()).sum()) for row in self.log_probs])


@dataclass(frozen=True)
class _Question:
    """A question in tokens: int lists, one of them for each choice; errors call it by its `name`."""

    row_id: str
    name: str
    prompt: list[int]
    choices: list[list[int]]


def tokenize_choices(
    questions: Dataset,
    processing_class: PreTrainedTokenizerBase,
    question_format: QuestionFormat,
    name: str = "questions",
) -> list[_Question]:
    """Turn checked questions with `choices` into tokens.

    Raises:
        ValueError: no such column, choices that the tokenizer changes, more tokens than allowed, or a choice whose
            tokens begin another one's (it could never be the less likely of the two); names the row.
    """
    if "choices" not in questions.column_names:
        raise ValueError(
            f"{name} has no column 'choices', which answering by likelihood needs; it has "
            f"{', '.join(questions.column_names)}"
        )
    found = []
    for index, row in enumerate(questions.select_columns(["id", "prompt", "choices"])):
        shown_row = row_name(row, index)
        place = f"{name}, {shown_row}"
        prompt = question_format.prompt(row["prompt"], processing_class)
        choices = [answer_with_end(choice, prompt, question_format, place) for choice in row["choices"]]
        _refuse_beginnings(row["choices"], choices, place)
        ids = fitted_prompt(prompt, max(map(len, choices)), question_format, place)
        found.append(_Question(row["id"], shown_row, ids, choices))
    warn_of_unknown(((row.name, ids) for row in found for ids in row.choices), processing_class, name)
    return found


def _refuse_beginnings(texts: Sequence[str], choices: Sequence[list[int]], place: str) -> None:
    for (first, text), (second, other) in itertools.permutations(zip(choices, texts, strict=True), 2):
        if second[: len(first)] == first:
            raise ValueError(
                f"{place}: in this tokenizer the choice {other!r} begins with, or is, the choice {text!r}, so the "
                "latter could never lose: reword one, or end answers with the end token (end_token: true)"
            )


@dataclass(frozen=True)
class ChoiceSettings:
    """How questions are answered by likelihood.

    Attributes:
        question_format: how a question becomes tokens.
        length_normalised: rank choices by their mean log-probability per token, not the sum. The sum is the default
            [choice]: it is the likelihood, the probability that sampling gives this choice, and so agrees with how
            answers are decoded; the mean favours long choices that end predictably. lm-eval's `acc` is the sum, its
            `acc_norm` the sum per byte.
        batch_size: the most choices in one forward pass (one question's choices are never parted).
        description: the name of a progress bar; None shows none.
    """

    question_format: QuestionFormat = field(default_factory=QuestionFormat)
    length_normalised: bool = False
    batch_size: int = 32
    description: str | None = None

    def __post_init__(self) -> None:
        checked_format(self.question_format)


def score_choices(
    model: Any,
    questions: Any,
    processing_class: PreTrainedTokenizerBase,
    settings: ChoiceSettings | None = None,
) -> ChoiceScores:
    """Answer questions by likelihood under a causal language model or a `TokenEnsemble`.

    Args:
        model: the model or ensemble, in evaluation mode.
        questions: columns `prompt`, `choices` and, for `correct`, `answer`; any shape that
            `ensemw2s.data.shapes.as_dataset` takes.
        processing_class: the model's.
        settings: see `ChoiceSettings`; None takes its defaults.

    Raises:
        FloatingPointError: the model, or an expert, gives NaN, +inf or no finite logit; names which and the question.
        TypeError, ValueError: see `check_questions` and `tokenize_choices`.
    """
    experts: Mixture = model.snapshot() if is_mixture(model) else OneModel(model)
    mixtures = {"model": list(experts.config.expert_weights)}
    return score_choice_mixtures(experts, questions, processing_class, mixtures, settings)["model"]


def score_choice_mixtures(
    ensemble: Mixture,
    questions: Any,
    processing_class: PreTrainedTokenizerBase,
    mixtures: Mapping[str, Sequence[float]],
    settings: ChoiceSettings | None = None,
    combine: Mapping[str, str] | None = None,
) -> dict[str, ChoiceScores]:
    """Answer questions under several mixtures of the same experts; see `score_choices`.

    Each expert is run once for all mixtures that combine distributions in the same way.

    Args:
        ensemble: T models.
        questions: as in `score_choices`.
        processing_class: the experts' tokenizer.
        mixtures: name -> T non-negative weights.
        settings: as in `score_choices`.
        combine: name -> how that mixture combines distributions, where it is not as the ensemble does; "vote" counts
            the experts' chosen choices.
    """
    ensemble, settings = ensemble.snapshot(), settings or ChoiceSettings()
    questions = check_questions(questions, "questions", answered=False)
    rows = tokenize_choices(questions, processing_class, settings.question_format)
    end, description = processing_class.eos_token_id, settings.description
    batches = processes.share(list(batches_of_choices(rows, settings.batch_size)))
    mine: dict[int, dict[str, np.ndarray]] = {}
    hidden = description is None or not processes.is_main()
    with tqdm(total=sum(map(len, batches)), desc=description, unit="question", leave=False, disable=hidden) as bar:
        for batch in batches:
            asked = [rows[i] for i in batch]
            scores = _score_batch(ensemble, asked, mixtures, end, settings.length_normalised, combine)
            mine |= {i: {name: scores[name][place] for name in mixtures} for place, i in enumerate(batch)}
            bar.update(len(batch))
    found = {i: values for share in processes.gather(mine) for i, values in share.items()}
    answers = questions["answer"] if "answer" in questions.column_names else None
    log_probs = {name: [found[i][name] for i in range(len(rows))] for name in mixtures}
    return {name: _chosen(values, questions["choices"], answers) for name, values in log_probs.items()}


def choose_answers(
    ensemble: Mixture,
    questions: Dataset,
    rows: Sequence[_Question],
    batch: Sequence[int],
    pad_token_id: int,
) -> Iterator[dict[str, Any]]:
    """Yield the pseudo-labels of some questions, in tokens `rows`, as `label_questions` returns them."""
    count = ensemble.num_experts
    mixtures = {"ensemble": list(ensemble.config.expert_weights)}
    mixtures |= {f"expert {t + 1}": np.eye(count)[t].tolist() for t in range(count)}
    scores = _score_batch(ensemble, [rows[i] for i in batch], mixtures, pad_token_id, False)
    chosen = {name: _chosen(values, [], None) for name, values in scores.items()}
    ours = chosen.pop("ensemble")
    agrees = np.array([own.chosen == ours.chosen for own in chosen.values()], dtype=float)
    for place, i in enumerate(batch):
        pick = int(ours.chosen[place])
        yield {
            "id": rows[i].row_id,
            "prompt": questions[i]["prompt"],
            "answer": questions[i]["choices"][pick],
            "choices": questions[i]["choices"],
            "answer_ids": np.array(rows[i].choices[pick], dtype=np.int32),
            "num_tokens": len(rows[i].choices[pick]),
            "finished": True,
            "confidence": float(ours.confidence[place]),
            "agreement": float(agrees[:, place].mean()),
            "expert_agreement": agrees[:, place].tolist(),
        }


def _chosen(log_probs: list[np.ndarray], choices: Sequence[list[str]], answers: Sequence[str] | None) -> ChoiceScores:
    picks = np.array([int(row.argmax()) for row in log_probs], dtype=np.int64)
    if answers is None:
        return ChoiceScores(log_probs, picks, None)
    texts = [row[pick] for row, pick in zip(choices, picks, strict=True)]
    return ChoiceScores(log_probs, picks, np.array([a == b for a, b in zip(texts, answers, strict=True)]))


def batches_of_choices(rows: Sequence[_Question], batch_size: int) -> Iterator[list[int]]:
    """Yield indices in batches of at most `batch_size` choices, prompts of similar length together."""
    check_number("batch_size", batch_size, whole=True)
    batch: list[int] = []
    size = 0
    for i in by_length([len(row.prompt) for row in rows]):
        if batch and size + len(rows[i].choices) > batch_size:
            yield batch
            batch, size = [], 0
        batch.append(i)
        size += len(rows[i].choices)
    if batch:
        yield batch


def choosing_work(rows: Sequence[_Question], batches: Iterable[Sequence[int]], num_experts: int) -> Work:
    """Return the work of one of so many experts that answer questions (`tokenize_choices`) in given batches."""
    total = Work()
    for batch in batches:
        prompts = [len(rows[i].prompt) for i in batch]
        total += reading_work(prompts, num_experts)
        choices = [choice for i in batch for choice in rows[i].choices]
        # A choice's last token is in no context.
        longest = max(map(len, choices)) - 1
        if longest:
            size = len(choices) * longest
            total += Work.of_pass(len(choices), longest, size, size, max(prompts))
    return total


@torch.no_grad()
def _score_batch(
    ensemble: Mixture,
    rows: Sequence[_Question],
    mixtures: Mapping[str, Sequence[float]],
    pad_token_id: int,
    length_normalised: bool,
    combine: Mapping[str, str] | None = None,
) -> dict[str, list[np.ndarray]]:
    """Return, for each mixture, float64 [K] for each question; `combine` as in `score_choice_mixtures`."""
    ways = dict.fromkeys(mixtures, ensemble.config.combine) | dict(combine or {})
    found: dict[str, list[np.ndarray]] = {}
    for way in dict.fromkeys(ways.values()):
        alike = {name: weights for name, weights in mixtures.items() if ways[name] == way}
        # What is voted on are choices, not tokens: each expert's own likelihoods come first.
        asked = {str(t): row for t, row in enumerate(np.eye(ensemble.num_experts).tolist())} if way == "vote" else alike
        tokens = _token_log_probs(ensemble, rows, asked, "prob" if way == "vote" else way, pad_token_id)
        scores = {name: _sums(values, rows, length_normalised) for name, values in tokens.items()}
        if way == "vote":
            experts = list(zip(*scores.values(), strict=True))
            scores = {name: [_votes(own, weights) for own in experts] for name, weights in alike.items()}
        found |= scores
    return found


def _votes(log_probs: Sequence[np.ndarray], expert_weights: Sequence[float]) -> np.ndarray:
    """Return the log of each choice's share of the votes, -inf for none."""
    shares = np.zeros(len(log_probs[0]))
    for own, weight in zip(log_probs, expert_weights, strict=True):
        shares[own.argmax()] += weight
    with np.errstate(divide="ignore"):
        return np.log(shares / shares.sum())


def _sums(log_probs: np.ndarray, rows: Sequence[_Question], length_normalised: bool) -> list[np.ndarray]:
    """Add up what `_token_log_probs` returns, choice by choice."""
    lengths = np.array([len(choice) for row in rows for choice in row.choices])
    sums = np.add.reduceat(log_probs, np.concatenate([[0], np.cumsum(lengths)[:-1]]))
    values = sums / lengths if length_normalised else sums
    split = np.split(values, np.cumsum([len(row.choices) for row in rows])[:-1])
    for row, own in zip(rows, split, strict=True):
        if np.isnan(own).any():
            raise FloatingPointError(
                f"the experts' mixture gives no token a probability along a choice of the question of {row.name}: "
                'every token is impossible for one of them; combine them by "prob"'
            )
    return split


def _token_log_probs(
    ensemble: Mixture,
    rows: Sequence[_Question],
    mixtures: Mapping[str, Sequence[float]],
    combine: str,
    pad_token_id: int,
) -> dict[str, np.ndarray]:
    """Return, for each mixture, float64 [n]: the log-probability of every token of every choice, in order."""
    device = ensemble.device
    weights = {name: torch.tensor(values, dtype=torch.float32, device=device) for name, values in mixtures.items()}
    used = [t for t in range(ensemble.num_experts) if any(values[t] > 0 for values in mixtures.values())]
    owners = ["the model"] if isinstance(ensemble, OneModel) else expert_names(used)
    names = [f"the question of {row.name}" for row in rows]
    owner = torch.tensor([i for i, row in enumerate(rows) for _ in row.choices], device=device)
    choices = [torch.tensor(choice) for row in rows for choice in row.choices]
    ids = pad_sequence(choices, batch_first=True, padding_value=-1).to(device)
    prompts, mask = pad_prompts([row.prompt for row in rows], pad_token_id, device)
    cache = ensemble.new_cache()
    first = [row[:, -1] for row in read_prompts(ensemble, prompts, mask, cache)]
    refuse_damaged(damaged([first[t] for t in used]), owners, names)
    log_probs = {name: torch.zeros(ids.shape, dtype=torch.float64, device=device) for name in weights}
    for name, values in weights.items():
        mixed = ops.mixture_log_probs(first, values, combine=combine)
        log_probs[name][:, 0] = mixed[owner, ids[:, 0]].double()
    if ids.shape[1] > 1:
        cache.batch_select_indices(owner)
        later = ids[:, 1:] >= 0
        # A choice's last token is in no context.
        mask = torch.cat([mask[owner], torch.ones_like(later, dtype=mask.dtype)], dim=1)
        logits = run_experts(ensemble, ids[:, :-1].clamp_min(0), mask, cache, last_only=False)
        kept = [row[later] for row in logits]
        of_tokens = [names[i] for i in owner[:, None].expand_as(later)[later].tolist()]
        refuse_damaged(damaged([kept[t] for t in used]), owners, of_tokens)
        for name, values in weights.items():
            scores = ops.mixture_scores(kept, values, ids[:, 1:][later], combine=combine)
            log_probs[name][:, 1:][later] = scores.log_probs.double()
    return {name: values[ids >= 0].cpu().numpy() for name, values in log_probs.items()}
