"""What a student is shown of its teacher: live distributions, or a cache of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ensemw2s import ops
from ensemw2s.data.batches import AnswerCollator, next_token_mask
from ensemw2s.data.questions import check_questions
from ensemw2s.data.tokens import QuestionFormat, checked_format, end_tokens, tokenize_questions
from ensemw2s.inference.label_files import TOP_COLUMNS
from ensemw2s.inference.labelling import require_probabilities, top_tokens
from ensemw2s.models.heads import linear_of, obstacle, output_head, own_head, states_before
from ensemw2s.models.mixture import Pass, repeat_rows
from ensemw2s.ops.products import faster_linear_layers, linear
from ensemw2s.ops.row_losses import CHUNK_ELEMENTS
from ensemw2s.runtime.meter import count
from ensemw2s.runtime.values import check_number
from ensemw2s.student.answers import check_answer_ids
from ensemw2s.training.predictions import HiddenPredictions, Predictions
from ensemw2s.training.trainer import AnswerTokens

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ensemw2s.models.mixture import ExpertMixture


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


class LiveTeacher:
    """An ensemble that is asked for its distribution at given positions of given texts.

    LoRA experts on one base run in one forward pass. Experts whose heads are plain linear layers answer with hidden
    states, others with logits.

    Args:
        ensemble: T experts with their weights, combined by "prob" or "logprob".

    Raises:
        ValueError: `combine="vote"`, which has no loss.
    """

    def __init__(self, ensemble: ExpertMixture) -> None:
        require_probabilities(ensemble)
        self.ensemble = ensemble = ensemble.snapshot()
        self.passes = ensemble.experts.passes()
        self.heads: list[Tensor] = []
        for index in range(ensemble.num_experts):
            with ensemble.experts.expert(index) as model:
                head = linear_head(model)
            if head is None:
                self.heads.clear()
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

        def together(each: Pass) -> Sequence[Tensor]:
            stacked: Any = each.stacked
            repeated = repeat_rows(inputs, stacked.count)
            with stacked.model() as model:
                states = states_at(model, repeated, positions.repeat(stacked.count, 1))
            count(stacked.base, repeated["input_ids"], repeated["attention_mask"], len(states))
            return states.chunk(stacked.count)

        def alone(model: Any, index: int) -> Tensor:
            with faster_linear_layers(model, input_ids.numel()):
                states = states_at(model, inputs, positions)
            count(self.ensemble.experts.carrier(index), input_ids, attention_mask, len(states))
            return states

        states = self.ensemble.experts.run(self.passes, alone, together)
        return [states[index] for index in range(len(states))]

    @torch.no_grad()
    def logits(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> list[Tensor]:
        """Return T logits [n, V] at `positions`."""
        if self.heads:
            states = self.states(input_ids, attention_mask, positions)
            return [linear(rows, head) for rows, head in zip(states, self.heads, strict=True)]
        every = range(self.ensemble.num_experts)
        return self.ensemble.expert_logits(every, input_ids, attention_mask, positions=positions)

    def kl(self, student: Predictions, answers: AnswerTokens, temperature: float) -> Tensor:
        """Return `sum_i w_i KL(ensemble_i || student_i)` over n answer tokens, as a scalar.

        Args:
            student: the student's predictions for the tokens.
            answers: the tokens, their weights, and the texts that they stand in.
            temperature: divides the student's and each expert's logits.
        """
        weights, device = answers.token_weights, self.ensemble.device
        texts = (answers.inputs["input_ids"].to(device), answers.inputs["attention_mask"].to(device), answers.mask)
        mixture = self.ensemble.mixture_weights(weights.device)
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
        texts = inputs["input_ids"], inputs["attention_mask"], positions
        if not self.heads:
            return top_tokens(self.ensemble, self.logits(*texts), count, temperature)
        size = max(1, CHUNK_ELEMENTS // len(self.heads[0]))
        found = []
        for some in zip(*(rows.split(size) for rows in self.states(*texts)), strict=True):
            logits = [linear(rows, head) for rows, head in zip(some, self.heads, strict=True)]
            found.append(top_tokens(self.ensemble, logits, count, temperature))
        ids, log_probs = zip(*found, strict=True)
        return torch.cat(ids), torch.cat(log_probs)


def cache_teacher(
    ensemble: ExpertMixture,
    answers: Any,
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
        answers: questions with answers, in any shape that `ensemw2s.data.shapes.as_dataset` takes; answers with
            `answer_ids` are read by these tokens, others are tokenised and end with the end token.
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
        TypeError: a `question_format` that is none.
        ValueError: see `ensemw2s.tokenize_questions`, `check_answer_ids` and `top_tokens`.
        FloatingPointError: an expert gives NaN.
    """
    question_format = checked_format(question_format)
    check_number("batch_size", batch_size, whole=True)
    answers = check_questions(answers, "answers")
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
    answer_ids = [np.array(ids[start:], dtype=np.int32) for ids, start in starts]
    temperatures = [float(temperature)] * len(answers)
    return with_columns(answers, {"answer_ids": answer_ids, **top, "top_temperature": temperatures})


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
