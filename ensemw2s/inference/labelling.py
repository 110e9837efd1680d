"""Pseudo-answers of a mixture, with what a student needs to know of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ensemw2s import ops
from ensemw2s.data.batches import batches_by_length, pad_prompts
from ensemw2s.data.questions import check_questions, row_name
from ensemw2s.data.shapes import dataset_of
from ensemw2s.data.tokens import (
    QuestionFormat,
    asked_in,
    checked_format,
    end_tokens,
    require_readable,
    tokenize_prompts,
)
from ensemw2s.inference.choices import choose_answers, tokenize_choices
from ensemw2s.inference.decoding import MixtureDecoder, Sampling, require_plain, require_tokenizer, require_valid
from ensemw2s.inference.label_files import TOP_COLUMNS, LabelFile
from ensemw2s.inference.reading import reading_work
from ensemw2s.models.identity import describe_experts, digest_tokenizer
from ensemw2s.runtime import processes
from ensemw2s.runtime.claims import held_file
from ensemw2s.runtime.fingerprint import digest_columns, digest_json
from ensemw2s.runtime.meter import Work
from ensemw2s.runtime.values import check_number, shown

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ensemw2s.models.mixture import ExpertMixture


# An expert that gives a token more than half of its probability has it as its argmax, whatever the rest is.
_AGREES = 0.5


def require_room(ensemble: ExpertMixture, prompts: Dataset, max_new_tokens: int) -> None:
    """Raise ValueError, naming the question, if a prompt and its answer do not fit the experts' context together."""
    window = ensemble.config.max_position_embeddings
    for index, row in enumerate(prompts if window is not None else ()):
        length = len(row["input_ids"])
        if length + max_new_tokens > window:
            raise ValueError(
                f"questions, {row_name(row, index)}: it has {length} tokens, which with "
                f"max_new_tokens={max_new_tokens} is beyond the {window} that the experts read: leave it out, or lower "
                "max_new_tokens (in a configuration, labelling.max_new_tokens)"
            )


@dataclass(frozen=True)
class LabelSettings:
    """How a mixture answers questions; `TokenEnsemble.label` says what each setting is and what is refused."""

    question_format: QuestionFormat = field(default_factory=QuestionFormat)
    max_new_tokens: int = 32
    batch_size: int = 32
    sampling: Sampling = field(default_factory=Sampling)
    top_logprobs: int | None = None
    top_temperature: float = 1.0

    def __post_init__(self) -> None:
        checked_format(self.question_format)
        check_number("max_new_tokens", self.max_new_tokens, whole=True)
        check_number("batch_size", self.batch_size, whole=True)
        if self.top_logprobs is not None:
            check_number("top_logprobs", self.top_logprobs, whole=True)
        check_number("top_temperature", self.top_temperature)
        if not isinstance(self.sampling, Sampling):
            raise TypeError(
                f"sampling must be an ensemw2s.Sampling, got {shown(self.sampling)}: give Sampling(temperature=0.7), "
                "for example"
            )
        if self.top_logprobs is None and self.top_temperature != 1:
            raise ValueError(
                f"top_temperature={self.top_temperature} does nothing without top_logprobs: set it, or leave both out"
            )


@dataclass(frozen=True)
class _Task:
    """Who answers what, and how: with one of the `choices` in tokens, or with tokens up to one of `ends`."""

    ensemble: ExpertMixture
    questions: Dataset
    processing_class: PreTrainedTokenizerBase
    settings: LabelSettings
    prompts: Dataset
    choices: list[Any] | None
    ends: list[int] | None


def label_questions(
    ensemble: ExpertMixture,
    questions: Any,
    processing_class: PreTrainedTokenizerBase,
    settings: LabelSettings,
    *,
    output_file: str | os.PathLike[str] | None = None,
    description: str | None = "labelling",
) -> Dataset:
    """Let a mixture answer questions; see `TokenEnsemble.label`."""
    require_tokenizer(processing_class, ensemble.config.vocab_size)
    questions = check_questions(questions, "questions", answered=False)
    prompts = tokenize_prompts(
        questions, processing_class, settings.question_format, "questions", settings.max_new_tokens
    )
    choices, ends = None, None
    if "choices" in questions.column_names:
        if replace(settings.sampling, seed=0) != Sampling() or settings.top_logprobs is not None:
            raise ValueError(
                f"questions with choices are answered by likelihood, with neither sampling ({settings.sampling}) nor "
                f"top_logprobs ({settings.top_logprobs}): leave both out"
            )
        choices = tokenize_choices(questions, processing_class, settings.question_format)
    else:
        if not settings.question_format.end_token:
            raise ValueError(
                "the format has end_token=False, so that decoded answers would have no end: use end_token=True, or "
                "give the questions a column `choices`"
            )
        require_room(ensemble, prompts, settings.max_new_tokens)
        require_plain(ensemble.generation_config)
        require_readable(settings.question_format.prompt(questions[0]["prompt"], processing_class))
        ends = end_tokens(processing_class, ensemble.generation_config)
    task = _Task(ensemble, questions, processing_class, settings, prompts, choices, ends)
    with held_file(output_file):
        file = None if output_file is None else LabelFile(Path(output_file), partial(_description, task), questions)
        rows = _answered(task, file, description)
    answers = dataset_of([rows[row_id] for row_id in prompts["id"]], "labels")
    return asked_in(answers, settings.question_format)


def decoding_work(
    prompts: Sequence[int], answers: Sequence[int], batch_size: int, max_new_tokens: int, num_experts: int = 1
) -> tuple[Work, Work, int]:
    """Return one expert's work of reading prompts, that of decoding answers of given lengths, and the number of steps.

    Args:
        prompts: tokens of each prompt.
        answers: tokens of each answer, end token included; a batch goes on until its longest one ends.
        batch_size: questions decoded together.
        max_new_tokens: the most tokens of an answer.
        num_experts: T, all of which read a prompt together.
    """
    reading, writing, steps = Work(), Work(), 0
    for batch in batches_by_length(prompts, batch_size):
        count, length = len(batch), prompts[batch[-1]]
        reading += reading_work([prompts[i] for i in batch], num_experts)
        more = min(max_new_tokens, max(answers[i] for i in batch)) - 1
        steps += more
        for past in range(length, length + more):
            writing += Work.of_pass(count, 1, count, count, past)
    return reading, writing, steps


def _description(task: _Task) -> dict[str, Any]:
    """Return what decides the answers, as plain JSON."""
    tokens = list(task.prompts["input_ids"])
    if task.choices is not None:
        tokens = [[row.prompt, row.choices] for row in task.choices]
    settings, sampling = task.settings, asdict(task.settings.sampling)
    seed = sampling.pop("seed")
    columns = [name for name in ("id", "prompt", "choices") if name in task.questions.column_names]
    found = {
        **describe_experts(task.ensemble.experts),
        "expert_weights": list(task.ensemble.config.expert_weights),
        "combine": task.ensemble.config.combine,
        "questions": digest_columns(task.questions, columns),
        "format": settings.question_format.describe(),
        "tokenizer": digest_tokenizer(task.processing_class),
        "prompt_tokens": digest_json([tokens]),
    }
    if task.ends is not None:
        found |= {
            "max_new_tokens": settings.max_new_tokens,
            "sampling": sampling,
            # Greedy answers draw nothing.
            "seed": seed if settings.sampling.temperature > 0 else None,
            "top_logprobs": settings.top_logprobs,
            "top_temperature": None if settings.top_logprobs is None else float(settings.top_temperature),
            "end_tokens": task.ends,
        }
    return found


def _answered(task: _Task, file: LabelFile | None, description: str | None) -> dict[str, dict[str, Any]]:
    """Return a row for every question, by its id, from `file` or made anew; processes share the batches out."""
    ids = task.prompts["id"]
    # Batches are cut before finished rows are left out, so that a continued run meets the same batches.
    batches = batches_by_length([len(prompt) for prompt in task.prompts["input_ids"]], task.settings.batch_size)
    found, digest = ([], "") if file is None else processes.on_main(file.resume)
    rows = {row["id"]: row for row in found}
    todo = processes.share([batch for batch in batches if any(ids[i] not in rows for i in batch)])
    mine: dict[str, dict[str, Any]] = {}
    total, hidden = len(rows) + sum(map(len, todo)), description is None or not processes.is_main()
    with tqdm(total=total, initial=len(rows), desc=description, unit="question", leave=False, disable=hidden) as bar:
        for batch in todo:
            if task.choices is None:
                answers = _label_batch(task, batch)
            else:
                pad = task.processing_class.eos_token_id
                answers = choose_answers(task.ensemble, task.questions, task.choices, batch, pad)
            fresh = [row for row in answers if row["id"] not in rows]
            mine |= {row["id"]: row for row in fresh}
            if file is not None:
                file.append(fresh, digest, processes.index())
            bar.update(len(fresh))
    for share in processes.gather(mine):
        rows |= share
    if file is not None and processes.count() > 1:
        processes.on_main(file.join, [rows[ids[i]] for batch in batches for i in batch], digest)
    return rows


@torch.no_grad()
def _label_batch(task: _Task, batch: list[int]) -> Iterator[dict[str, Any]]:
    ensemble, settings, prompts = task.ensemble, task.settings, task.prompts
    device, question_format = ensemble.device, settings.question_format
    pad = task.processing_class.eos_token_id
    ends = torch.tensor(task.ends, device=device)
    seeds = torch.tensor([settings.sampling.seed + i for i in batch], dtype=torch.int64, device=device)
    inputs = pad_prompts([prompts[i]["input_ids"] for i in batch], pad, device)
    decoder = MixtureDecoder(ensemble, *inputs, seeds, settings.sampling)
    running = torch.ones(len(batch), dtype=torch.bool, device=device)
    tokens, log_probs, agreement, counted, kept = [], [], [], [], []
    for _ in range(settings.max_new_tokens):
        logits = decoder.logits()
        choice = decoder.choose(logits)
        require_valid(choice.valid | ~running, [f"the question of {row_name(prompts[i], i)}" for i in batch], logits)
        tokens.append(choice.tokens)
        log_probs.append(choice.log_probs)
        agreement.append((choice.expert_log_probs.exp() > _AGREES).double())
        counted.append(running.clone())
        if settings.top_logprobs is not None:
            kept.append(top_tokens(ensemble, logits, settings.top_logprobs, settings.top_temperature))
        running &= ~torch.isin(choice.tokens, ends)
        if not bool(running.any()):
            break
        # Rows that are done repeat an end token: it is in no other row's context.
        decoder.append(torch.where(running, choice.tokens, pad))
    mask = torch.stack(counted, 1)
    length = mask.sum(1)
    confidence = (torch.stack(log_probs, 1).double() * mask).sum(1) / length
    shares = (torch.stack(agreement, 2) * mask).sum(2) / length
    ids = torch.stack(tokens, 1).int().cpu().numpy()
    caches = [torch.stack(parts, 1).cpu().numpy() for parts in zip(*kept, strict=True)]
    for row, i in enumerate(batch):
        count, finished = int(length[row]), not bool(running[row])
        text = task.questions[i]["prompt"]
        prompt = question_format.prompt(text, task.processing_class)
        answer = ids[row, : count - finished].tolist()
        cache: dict[str, Any] = {}
        if kept:
            cache = {name: values[row, :count] for name, values in zip(TOP_COLUMNS, caches, strict=True)}
            cache["top_temperature"] = float(settings.top_temperature)
        yield {
            "id": prompts[i]["id"],
            "prompt": text,
            "answer": question_format.answer_text(answer, prompt),
            "answer_ids": ids[row, :count],
            "num_tokens": count,
            "finished": finished,
            "confidence": float(confidence[row]),
            "agreement": float(shares[:, row].mean()),
            "expert_agreement": shares[:, row].tolist(),
            **cache,
        }


def require_probabilities(ensemble: ExpertMixture) -> None:
    """Raise ValueError unless the ensemble's distribution has a loss."""
    if ensemble.config.combine == "vote":
        raise ValueError(
            'combine="vote" gives one token all the probability, which is no soft label: combine the experts by '
            '"prob" or "logprob", or train the student with variant="sft"'
        )


def top_tokens(
    ensemble: ExpertMixture, expert_logits: Sequence[Tensor], count: int, temperature: float = 1.0
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
