"""What a student learns from beside plain labels: a teacher's distributions, live or kept, and its own certainty.

The losses of method, phase 3: "soft" (KL from the ensemble's distribution to the student's at every answer token) and
"confidence" (Burns et al. 2023, "Weak-to-strong generalization", appendix A.4). Both run on hidden states at answer
tokens, so that logits `[tokens, V]` are never held where a model's head is a plain linear layer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ensemw2s import ops
from ensemw2s.cost import count
from ensemw2s.data import IGNORED, AnswerCollator, QuestionFormat, tokenize_questions
from ensemw2s.experts import repeat_rows
from ensemw2s.heads import CHUNK_ELEMENTS, for_product, linear_of, obstacle, output_head, own_head, states_before
from ensemw2s.ops.topk_kl import reference as topk_kl_reference
from ensemw2s.tokens import end_tokens
from ensemw2s.training import AnswerTokens, AnswerTrainer, next_token_mask
from ensemw2s.values import check_number

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ensemw2s.ensemble import TokenEnsemble

# One row per answer token, k wide.
TOP_COLUMNS = ("top_token_ids", "top_log_probs")
CACHE_COLUMNS = ("answer_ids", *TOP_COLUMNS, "top_temperature")


# Predictions at answer tokens: hidden states in front of a linear head, or logits where the head is something else


@torch.no_grad()
def linear_head(model: Any) -> Tensor | None:
    """Return the weight [V, d] of a causal language model's head, or None if its logits are not `states @ weight.T`."""
    token = torch.zeros((1, 1), dtype=torch.int64, device=model.get_input_embeddings().weight.device)
    with own_head(model) as mine:
        head = output_head(mine)
        if obstacle(head, mine, {"input_ids": token, "use_cache": False}) is not None:
            return None
        linear: Any = linear_of(head)
        return linear.weight


@torch.no_grad()
def states_at(model: Any, inputs: Mapping[str, Any], positions: Tensor) -> Tensor:
    """Return the hidden states [n, d] in front of a model's head at `positions` (bool [B, L]); the head is not run."""
    with own_head(model) as mine:
        return states_before(output_head(mine), mine, inputs, lambda hidden: hidden[positions.to(hidden.device)])


@dataclass
class HiddenPredictions:
    """A student's predictions for n tokens, as hidden states and the head behind them.

    Attributes:
        states: floating point [n, d].
        head: [V, d], of the states' dtype.
    """

    states: Tensor
    head: Tensor

    @property
    def device(self) -> torch.device:
        """Where the predictions lie."""
        return self.states.device

    @property
    def logits(self) -> Tensor:
        """Return [n, V]."""
        return self.states @ self.head.T

    def cross_entropy(self, labels: Tensor, token_weights: Tensor) -> Tensor:
        """Return `sum_i w_i CE_i` for int64 labels [n]."""
        return ops.linear_weighted_cross_entropy(self.states, self.head, labels, token_weights)

    @torch.no_grad()
    def argmax(self) -> Tensor:
        """Return int64 [n], the likeliest tokens, some rows at a time."""
        rows = self.states.split(max(1, CHUNK_ELEMENTS // len(self.head)))
        return torch.cat([(some @ self.head.T).argmax(-1) for some in rows])

    def topk_kl(self, token_ids: Tensor, log_probs: Tensor, token_weights: Tensor, temperature: float) -> Tensor:
        """Return `sum_i w_i KL_i` from a cached top-k; see `ops.topk_kl`."""
        return ops.topk_kl(self.states, self.head, token_ids, log_probs, token_weights, temperature)


@dataclass
class LogitPredictions:
    """A student's predictions for n tokens, as logits [n, V]: for heads that are no plain linear layer."""

    logits: Tensor

    @property
    def device(self) -> torch.device:
        """Where the predictions lie."""
        return self.logits.device

    def cross_entropy(self, labels: Tensor, token_weights: Tensor) -> Tensor:
        """Return `sum_i w_i CE_i` for int64 labels [n]."""
        return ops.weighted_cross_entropy(self.logits, labels, token_weights)

    @torch.no_grad()
    def argmax(self) -> Tensor:
        """Return int64 [n], the likeliest tokens."""
        return self.logits.argmax(-1)

    def topk_kl(self, token_ids: Tensor, log_probs: Tensor, token_weights: Tensor, temperature: float) -> Tensor:
        """Return `sum_i w_i KL_i` from a cached top-k; see `ops.topk_kl`."""
        return topk_kl_reference(self.logits / temperature, token_ids, log_probs, token_weights).sum()


Predictions = HiddenPredictions | LogitPredictions


# Teachers


class LiveTeacher:
    """An ensemble that is asked for its distribution at given positions of given texts.

    LoRA experts on one base run in one forward pass. Experts whose heads are plain linear layers answer with hidden
    states, others with logits.

    Args:
        ensemble: T experts with their weights, combined by "prob" or "logprob".

    Raises:
        ValueError: `combine="vote"`, which has no loss.
    """

    def __init__(self, ensemble: TokenEnsemble) -> None:
        require_probabilities(ensemble)
        self.ensemble = ensemble = ensemble.snapshot()
        self.stacked = ensemble.experts.stacked()
        self.heads: list[Tensor] = []
        for index in range(ensemble.num_experts):
            with ensemble.experts.expert(index) as model:
                head = linear_head(model)
            if head is None:
                self.heads = []
                break
            self.heads.append(head)

    def parameters(self) -> Iterator[Tensor]:
        """Yield what its distributions depend on: the experts' weights, and those of the mixture."""
        yield from self.ensemble.parameters()
        yield self.ensemble.mixture_weights()

    @torch.no_grad()
    def states(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> list[Tensor]:
        """Return T hidden states [n, d_t] at `positions` (bool [B, L]); only for experts with linear heads."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.stacked is not None:
            copies = self.stacked.count
            repeated = repeat_rows(inputs, copies)
            with self.stacked.model() as model:
                states = states_at(model, repeated, positions.repeat(copies, 1))
            count(self.stacked.base, repeated["input_ids"], repeated["attention_mask"], len(states))
            return list(states.chunk(copies))

        def run(model: Any, index: int) -> Tensor:
            states = states_at(model, inputs, positions)
            count(self.ensemble.experts.carrier(index), input_ids, attention_mask, len(states))
            return states

        return self.ensemble.experts.map(run, range(self.ensemble.num_experts))

    @torch.no_grad()
    def logits(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> list[Tensor]:
        """Return T logits [n, V] at `positions`."""
        if self.heads:
            states = self.states(input_ids, attention_mask, positions)
            return [rows @ head.T for rows, head in zip(states, self.heads, strict=True)]
        every = range(self.ensemble.num_experts)
        return self.ensemble.expert_logits(every, input_ids, attention_mask, positions=positions)

    def kl(self, student: Predictions, answers: AnswerTokens, temperature: float) -> Tensor:
        """Return `sum_i w_i KL(ensemble_i || student_i)` over n answer tokens, as a scalar.

        Args:
            student: the student's predictions for the tokens.
            answers: the tokens, their weights, and the texts that they stand in.
            temperature: divides the student's and each expert's logits.
        """
        weights, device = answers.weights, self.ensemble.device
        texts = (answers.inputs["input_ids"].to(device), answers.inputs["attention_mask"].to(device), answers.mask)
        mixture = self.ensemble.mixture_weights(student.device)
        if self.ensemble.config.combine == "prob" and self.heads and isinstance(student, HiddenPredictions):
            like = student.states
            hiddens = [states.to(like) for states in self.states(*texts)]
            # `to` returns the same tensor where nothing changes, so that experts on one base keep one head.
            heads = [head.to(like) for head in self.heads]
            return ops.linear_mixture_kl(student.states, student.head, hiddens, heads, mixture, weights, temperature)
        experts = [logits.to(student.logits) for logits in self.logits(*texts)]
        if self.ensemble.config.combine == "prob":
            return ops.mixture_kl(student.logits, experts, mixture, weights, temperature)
        scaled = [logits / temperature for logits in experts]
        combined = ops.mixture_log_probs(scaled, mixture, combine=self.ensemble.config.combine).to(student.logits)
        return ops.mixture_kl(student.logits / temperature, [combined], [1.0], weights)

    @torch.no_grad()
    def top(
        self, inputs: Mapping[str, Tensor], positions: Tensor, count: int, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Return `top_tokens` of the n tokens at `positions`, making logits for some of them at a time."""
        if not self.heads:
            logits = self.logits(inputs["input_ids"], inputs["attention_mask"], positions)
            return top_tokens(self.ensemble, logits, count, temperature)
        states = self.states(inputs["input_ids"], inputs["attention_mask"], positions)
        size = max(1, CHUNK_ELEMENTS // len(self.heads[0]))
        found = []
        for some in zip(*(rows.split(size) for rows in states), strict=True):
            logits = [rows @ head.T for rows, head in zip(some, self.heads, strict=True)]
            found.append(top_tokens(self.ensemble, logits, count, temperature))
        ids, log_probs = zip(*found, strict=True)
        return torch.cat(ids), torch.cat(log_probs)


def require_probabilities(ensemble: TokenEnsemble) -> None:
    """Raise ValueError unless the ensemble's distribution has a loss."""
    if ensemble.config.combine == "vote":
        raise ValueError(
            'combine="vote" gives one token all the probability, which is no soft label: combine the experts by '
            '"prob" or "logprob", or train the student with variant="sft"'
        )


# The likeliest tokens of a teacher, kept


def top_tokens(
    ensemble: TokenEnsemble, expert_logits: Sequence[Tensor], count: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the mixture's likeliest tokens: ids int32 [..., count], log-probabilities float32 [..., count], falling.

    What the other tokens have together is `1 - exp(log_probs).sum(-1)`. Float32, because of that difference: float16
    would be off by 1e-4 where the kept tokens hold nearly everything, which is the size of what is left, and a third
    of a cache that is 0.3% of the logits is little to save [choice].

    Args:
        ensemble: how the experts are combined.
        expert_logits: T tensors [..., V].
        count: tokens kept, 1 to V.
        temperature: divides each expert's logits.

    Raises:
        ValueError: `count` or `temperature` is out of range, or the ensemble votes.
    """
    require_probabilities(ensemble)
    vocabulary = expert_logits[0].shape[-1]
    if not 1 <= count <= vocabulary:
        raise ValueError(f"top_logprobs must be between 1 and the vocabulary's {vocabulary} tokens, got {count}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"the temperature of top_logprobs must be positive and finite, got {temperature}")
    if temperature != 1:
        expert_logits = [logits / temperature for logits in expert_logits]
    weights = ensemble.mixture_weights(expert_logits[0].device)
    log_probs, ids = ops.mixture_log_probs(expert_logits, weights, combine=ensemble.config.combine).topk(count)
    return ids.int(), log_probs


def cache_teacher(
    ensemble: TokenEnsemble,
    answers: Dataset,
    processing_class: PreTrainedTokenizerBase,
    *,
    top_logprobs: int,
    temperature: float = 1.0,
    question_format: QuestionFormat | None = None,
    batch_size: int = 32,
    description: str | None = None,
) -> Dataset:
    """Keep the ensemble's likeliest tokens along given answers, by teacher forcing.

    `TokenEnsemble.label(..., top_logprobs=k)` keeps the same while it answers; this is for answers from elsewhere.

    Args:
        ensemble: T experts, combined by "prob" or "logprob".
        answers: columns `prompt` and `answer`; answers with `answer_ids` are read by these tokens, others are tokenised
            and end with the end token.
        processing_class: the experts' tokenizer.
        top_logprobs: tokens kept per answer token.
        temperature: divides each expert's logits.
        question_format: how a question becomes tokens; None is the default format.
        batch_size: answers per forward pass.
        description: the name of a progress bar; None shows none.

    Returns:
        `answers` with the columns `answer_ids` (list of n int32), `top_token_ids` (n lists of int32), `top_log_probs`
        (n lists of float32, nats) and `top_temperature` (float), replaced where they were.

    Raises:
        ValueError: see `data.tokenize_questions`, `check_answer_ids` and `top_tokens`.
        FloatingPointError: an expert gives NaN.
    """
    question_format = question_format or QuestionFormat()
    check_number("batch_size", batch_size, whole=True)
    known = answers["answer_ids"] if "answer_ids" in answers.column_names else None
    if known is not None:
        ends = end_tokens(processing_class, ensemble.generation_config)
        check_answer_ids(answers, processing_class, question_format, ends)
    examples = tokenize_questions(answers, processing_class, question_format, "answers", answer_ids=known)
    top = top_columns(
        LiveTeacher(ensemble),
        examples,
        pad_token_id=processing_class.eos_token_id,
        top_logprobs=top_logprobs,
        temperature=temperature,
        batch_size=batch_size,
        description=description,
    )
    starts = zip(examples["input_ids"], examples["prompt_length"], strict=True)
    columns: dict[str, Any] = {
        "answer_ids": [np.array(ids[start:], dtype=np.int32) for ids, start in starts],
        **top,
        "top_temperature": [float(temperature)] * len(answers),
    }
    return with_columns(answers, columns)


def with_columns(dataset: Dataset, columns: Mapping[str, Sequence[Any]]) -> Dataset:
    """Return `dataset` with columns added or replaced; a value may be an array of any number of dimensions."""
    from datasets import Dataset, concatenate_datasets

    kept = dataset.remove_columns([name for name in columns if name in dataset.column_names])
    # Not `Dataset.add_column`, which takes no arrays with two dimensions.
    return concatenate_datasets([kept, Dataset.from_dict(dict(columns))], axis=1)


def top_columns(
    teacher: LiveTeacher,
    examples: Dataset,
    *,
    pad_token_id: int,
    top_logprobs: int,
    temperature: float,
    batch_size: int,
    description: str | None,
) -> dict[str, list[np.ndarray]]:
    """Return the columns `top_token_ids` and `top_log_probs` for tokenised `examples`; see `cache_teacher`."""
    device = teacher.ensemble.device
    found: dict[str, list[np.ndarray]] = {name: [] for name in TOP_COLUMNS}
    # Without token weights: a cache has a row for every answer token, also for those that carry no loss.
    texts = examples.select_columns(["input_ids", "prompt_length"])
    loader = DataLoader(texts, batch_size=batch_size, collate_fn=AnswerCollator(pad_token_id))
    done = 0
    for batch in tqdm(loader, desc=description, unit="batch", leave=False, disable=description is None):
        batch = {name: values.to(device) for name, values in batch.items()}
        mask = next_token_mask(batch["labels"])
        top = teacher.top(batch, mask, top_logprobs, temperature)
        if bool(top[1].isnan().any()):
            raise FloatingPointError(
                f"an expert gives NaN along the answers {done} to {done + len(mask) - 1}: its weights are damaged or "
                "overflow in their dtype; load the experts in float32, or train that expert again"
            )
        done += len(mask)
        for name, values in zip(TOP_COLUMNS, top, strict=True):
            found[name] += [rows.numpy() for rows in values.cpu().split(mask.sum(1).tolist())]
    return found


# Checks of what a student is given


def check_same_tokenizer(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless every token id means the same to both tokenizers, the end token included."""
    if teacher.get_vocab() != student.get_vocab() or teacher.eos_token_id != student.eos_token_id:
        raise ValueError(
            f"the teacher's tokenizer ({len(teacher.get_vocab())} tokens) and the student's "
            f'({len(student.get_vocab())} tokens) differ: variant="soft" compares distributions token by token and '
            'needs one tokenizer for both; use variant="sft"'
        )


def check_answer_ids(
    answers: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    question_format: QuestionFormat,
    ends: Sequence[int],
    name: str = "this tokenizer",
) -> None:
    """Check that a tokenizer reads the tokens `answer_ids` as the teacher did who chose them.

    Args:
        answers: columns `prompt`, `answer`, `answer_ids` and optionally `id` and `finished` (all are, without it).
        tokenizer: of the model that is to be trained on them, or to be asked about them.
        question_format: how a question becomes tokens.
        ends: the ids that end an answer of that model.
        name: what errors call the tokenizer.

    Raises:
        ValueError: tokens that are another text than `answer`, or do not end as the model's answers do; names the row.
    """
    names = [name for name in ("id", "prompt", "answer", "answer_ids", "finished") if name in answers.column_names]
    for index, row in enumerate(answers.select_columns(names)):
        ids = [int(token) for token in row["answer_ids"]]
        ended = bool(ids) and ids[-1] in ends
        prompt = question_format.prompt(row["prompt"], tokenizer)
        text = question_format.answer_text(ids[:-1] if ended else ids, prompt).strip()
        wanted = question_format.end_token and row.get("finished", True)
        if text != row["answer"].strip() or ended is not wanted:
            raise ValueError(
                f"the answers, id {row.get('id', index)}: {name} reads the teacher's tokens as {text!r}"
                f"{' and an end token' if ended else ''}, the teacher meant {row['answer']!r}"
                f"{' and an end token' if wanted else ''}: "
                'variant="soft" needs a student with the teacher\'s tokenizer (use variant="sft" with another one), '
                "and answers whose `answer` was not changed without their `answer_ids`"
            )


def with_own_end(answers: Dataset, end: int, ends: Sequence[int]) -> list[list[int]]:
    """Return `answer_ids` in which each of the tokens `ends` that ends an answer is `end`, the student's own."""
    rows = [list(ids) for ids in answers["answer_ids"]]
    return [[*ids[:-1], end] if ids[-1] in ends else ids for ids in rows]


def check_cache(answers: Dataset, temperature: float, top_logprobs: int | None) -> None:
    """Check that a cache has a row for each token, the temperature asked for, and enough tokens.

    Raises:
        ValueError: names the column, and the row where it is one.
    """
    missing = [name for name in CACHE_COLUMNS if name not in answers.column_names]
    if missing:
        raise ValueError(
            f"train_dataset has no column {missing[0]!r}: a cache of a teacher has {', '.join(CACHE_COLUMNS)}; "
            "write it with TokenEnsemble.label(..., top_logprobs=k) or distillation.cache_teacher"
        )
    found = set(answers["top_temperature"])
    if found != {temperature}:
        raise ValueError(
            f"the cache in train_dataset was written at temperature {', '.join(map(str, sorted(found)))}, the student "
            f"is to learn at {temperature}: a mixture cannot be brought to another temperature later; write it again"
        )
    width = None
    rows = answers.select_columns(list(CACHE_COLUMNS)).with_format("numpy")
    for index, row in enumerate(rows):
        shapes = [row[name].shape for name in TOP_COLUMNS]
        width = width or shapes[0][-1]
        if shapes != [(len(row["answer_ids"]), width)] * 2:
            raise ValueError(
                f"train_dataset, row {index}: top_token_ids and top_log_probs have shapes {shapes[0]} and {shapes[1]}, "
                f"expected {(len(row['answer_ids']), width)}: one row per answer token, as many tokens in every row"
            )
        log_probs = np.asarray(row["top_log_probs"], dtype=np.float64)
        # NaN is at most 0 in no way; rounding may lift a logarithm or a sum a little.
        if not (bool((log_probs <= 1e-3).all()) and bool((np.exp(log_probs).sum(-1) <= 1 + 1e-3).all())):
            raise ValueError(
                f"train_dataset, row {index}: top_log_probs are no log-probabilities (each at most 0, and those of a "
                "token at most 1 together as probabilities): the cache is damaged; write it again"
            )
    if top_logprobs is not None and (width or 0) < top_logprobs:
        raise ValueError(
            f"top_logprobs={top_logprobs}, but the cache in train_dataset keeps {width} tokens: label with more, or "
            "ask for fewer"
        )


# Training


class CacheCollator:
    """Collate a cache along with the answers.

    Args:
        collate: makes the batch of answers, as `data.AnswerCollator`.
        count: tokens of the cache that are used, the likeliest ones; None takes all.
    """

    def __init__(self, collate: Any, count: int | None = None) -> None:
        self.collate = collate
        self.count = count

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the batch with `top_token_ids` int64 and `top_log_probs` float32 [n, k].

        They belong to the n tokens with a label, row after row.
        """
        batch: dict[str, Tensor] = self.collate(features)
        for name, dtype in (("top_token_ids", torch.int64), ("top_log_probs", torch.float32)):
            rows = []
            for feature, labels in zip(features, batch["labels"], strict=True):
                start = int(feature["prompt_length"])
                values = torch.as_tensor(np.asarray(feature[name])[:, : self.count], dtype=dtype)
                rows.append(values[labels[start : start + len(values)] != IGNORED])
            batch[name] = torch.cat(rows)
        return batch


class StudentAnswerTrainer(AnswerTrainer):
    """`AnswerTrainer` with a loss that is made of the student's predictions at the answer tokens."""

    def hidden_loss(self, hidden: Tensor, linear: nn.Linear, answers: AnswerTokens) -> Tensor:
        """Return `sum_i w_i loss_i`; see `AnswerTrainer.hidden_loss`."""
        return self.prediction_loss(HiddenPredictions(*for_product(hidden, linear)), answers)

    def logits_loss(self, logits: Tensor, answers: AnswerTokens) -> Tensor:
        """Return `sum_i w_i loss_i`; see `AnswerTrainer.logits_loss`."""
        return self.prediction_loss(LogitPredictions(logits), answers)

    @abstractmethod
    def prediction_loss(self, predictions: Predictions, answers: AnswerTokens) -> Tensor:
        """Return `sum_i w_i loss_i` of the student's predictions for the n answer tokens."""


class SoftTrainer(StudentAnswerTrainer):
    """Train on the teacher's distributions: `loss_i = s T^2 KL(teacher_i || student_i) + (1-s) CE_i`.

    `T^2` keeps the gradient's size the same at any temperature T (Hinton et al. 2015), so that one learning rate and
    one `soft_weight` s serve all [choice].

    Args:
        teacher: a live teacher; None reads the columns `top_token_ids` and `top_log_probs`.
        temperature: T; a cache was written at the same one.
        soft_weight: s in (0, 1].
        top_logprobs: tokens of a cache that are used; None takes all.
        options: as for `AnswerTrainer`.
    """

    def __init__(
        self,
        *,
        teacher: LiveTeacher | None = None,
        temperature: float = 1.0,
        soft_weight: float = 1.0,
        top_logprobs: int | None = None,
        **options: Any,
    ) -> None:
        if teacher is None:
            options["data_collator"] = CacheCollator(options["data_collator"], top_logprobs)
            options["train_dataset"] = options["train_dataset"].with_format("numpy")
        super().__init__(**options)
        self.teacher = teacher
        self.temperature = temperature
        self.soft_weight = soft_weight

    def prediction_loss(self, predictions: Predictions, answers: AnswerTokens) -> Tensor:
        """Return `sum_i w_i loss_i`; see `StudentAnswerTrainer.prediction_loss`."""
        if self.teacher is None:
            ids, log_probs = (answers.inputs[name].to(predictions.device) for name in TOP_COLUMNS)
            soft = predictions.topk_kl(ids, log_probs, answers.weights, self.temperature)
        else:
            soft = self.teacher.kl(predictions, answers, self.temperature)
        loss = self.soft_weight * self.temperature**2 * soft
        if self.soft_weight < 1:
            loss = loss + (1 - self.soft_weight) * predictions.cross_entropy(answers.labels, answers.weights)
        return loss


class ConfidenceTrainer(StudentAnswerTrainer):
    """Train on labels and on the student's own certainty (Burns et al. 2023, appendix A.4).

    `loss_i = (1-a) CE(student_i, label_i) + a CE(student_i, f_i)`, where `f_i` is the student's own likeliest token at
    this step, taken as given (no gradient), and a rises linearly from 0 to `alpha` over the first `warmup` of the
    steps. Burns et al. harden binary predictions at a threshold that keeps the classes balanced; tokens have no such
    threshold, the argmax takes its place [choice].

    Args:
        alpha: the largest a, in [0, 1].
        warmup: the share of all steps in which a rises, in [0, 1].
        options: as for `AnswerTrainer`.
    """

    def __init__(self, *, alpha: float, warmup: float, **options: Any) -> None:
        super().__init__(**options)
        self.alpha = alpha
        self.warmup = warmup

    def prediction_loss(self, predictions: Predictions, answers: AnswerTokens) -> Tensor:
        """Return `sum_i w_i loss_i`; see `StudentAnswerTrainer.prediction_loss`."""
        alpha = confidence_alpha(self.state.global_step, self.state.max_steps, self.alpha, self.warmup)
        return confidence_loss(predictions, answers, alpha)


def confidence_alpha(step: int, max_steps: int, alpha: float, warmup: float) -> float:
    """Return the weight a of the student's own predictions at a step, counted from 0: linear from 0 up to `alpha`."""
    rising = warmup * max_steps
    return alpha if step >= rising else alpha * step / rising


def confidence_loss(predictions: Predictions, answers: AnswerTokens, alpha: float) -> Tensor:
    """Return `sum_i w_i ((1-alpha) CE(student_i, label_i) + alpha CE(student_i, argmax student_i))`.

    Args:
        predictions: the student's, for n answer tokens.
        answers: their labels and weights.
        alpha: in [0, 1].
    """
    labels, weights = answers.labels, answers.weights
    if alpha == 0:
        return predictions.cross_entropy(labels, weights)
    own = predictions.argmax()
    # Where the student agrees with the label both terms are one, and the second costs nothing.
    doubted = alpha * weights * (own != labels)
    return predictions.cross_entropy(labels, weights - doubted) + predictions.cross_entropy(own, doubted)
