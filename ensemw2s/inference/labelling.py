"""Pseudo-answers of a mixture, with what a student needs to know of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ensemw2s import ops
from ensemw2s.data.batches import PromptCollator, batches_by_length
from ensemw2s.data.tokens import QuestionFormat, end_tokens, require_readable, tokenize_prompts
from ensemw2s.inference.choices import choose_answers, tokenize_choices
from ensemw2s.inference.decoding import (
    MixtureDecoder,
    Sampling,
    require_distinct,
    require_plain,
    require_tokenizer,
    require_valid,
)
from ensemw2s.inference.label_files import TOP_COLUMNS, LabelFile, packed_row, unpacked_row
from ensemw2s.models.identity import describe_experts, digest_tokenizer
from ensemw2s.runtime import processes
from ensemw2s.runtime.claims import one_at_a_time
from ensemw2s.runtime.fingerprint import digest_columns, digest_json
from ensemw2s.runtime.meter import Work
from ensemw2s.runtime.values import check_number

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ensemw2s.models.mixture import ExpertMixture


# An expert that gives a token more than half of its probability has it as its argmax, whatever the rest is.
_AGREES = 0.5


def require_room(ensemble: ExpertMixture, prompts: Dataset, max_new_tokens: int) -> None:
    """Raise ValueError, naming the question, if a prompt and its answer do not fit the experts' context together."""
    window = ensemble.config.max_position_embeddings
    for row in prompts if window is not None else ():
        length = len(row["input_ids"])
        if length + max_new_tokens > window:
            raise ValueError(
                f"question {row['id']!r} has {length} tokens, which with max_new_tokens={max_new_tokens} is beyond the "
                f"{window} that the experts read: leave it out, or lower max_new_tokens"
            )


@one_at_a_time("output_file")
def label_questions(
    ensemble: ExpertMixture,
    questions: Dataset,
    processing_class: PreTrainedTokenizerBase,
    *,
    question_format: QuestionFormat | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 32,
    sampling: Sampling | None = None,
    seed: int = 0,
    top_logprobs: int | None = None,
    top_temperature: float = 1.0,
    output_file: str | os.PathLike[str] | None = None,
    description: str | None = "labelling",
) -> Dataset:
    """Let the ensemble answer questions; the answers are pseudo-labels for a student (method, phase 3).

    Questions are decoded in batches of similar prompt length, which several processes share out; those with a column
    `choices` are answered by likelihood (`ensemw2s.inference.choices`) with one of their choices.

    **The rule for `generate()` and `label()`.** `generate()` obeys the ensemble's `generation_config` (a copy of expert
    1's), as any transformers model does. `label()` is greedy unless `sampling` says otherwise, whatever that config
    says of sampling and of lengths. Every end token id of the config, one or several, and the tokenizer's ends an
    answer. A setting that would change the distribution (a repetition penalty, n-grams that must not come again, bad
    words, suppressed or forced tokens, a least length, beams, ...) is refused. So `label()` and greedy `generate()`
    give the same tokens, up to the first end token.

    With `output_file`, finished rows are appended to it (JSON lines) as they come, and a later call goes on behind
    them, whatever its number of processes. Each process but the main one has a file of its own beside it, until all are
    done. What decides an answer is described in `<output_file>.run.json`: experts and base (by a hash of all their
    weights, which reads each once), expert weights, `combine`, questions, format, tokenizer, and the settings below. A
    later call that differs in any of it is refused. `batch_size` is no part of it: it moves answers only where two
    tokens tie to the last bits **[choice]**.

    Args:
        ensemble: T experts with their weights.
        questions: columns `prompt`, `id` and optionally `choices`; any `answer` is ignored.
        processing_class: the experts' tokenizer.
        question_format: how a question becomes tokens; None is the default format.
        max_new_tokens: the longest pseudo-answer, its end token included.
        batch_size: questions decoded together.
        sampling: how tokens are chosen; None is greedy.
        seed: question i (in the dataset's order) draws from seed `seed + i`, whatever batch it falls in.
        top_logprobs: keep the mixture's k likeliest tokens at every answer token, for a student of
            `variant="soft"`; None keeps none.
        top_temperature: divides each expert's logits in what `top_logprobs` keeps; it chooses no token.
        output_file: where to keep finished rows; `label_files.read_labels` reads it.
        description: the name of the progress bar; None shows none.

    Returns:
        One row per question, in the order of `questions`: `id`, `prompt`, `answer` (the text that the tokens add to the
        prompt, without the format's `answer_prefix`, special tokens and the end; its own white space is kept),
        `answer_ids` (list of int32, the chosen tokens, with whichever end token came: text may become other tokens
        again **[choice]**), `num_tokens` (their number), `finished` (an end token came in time), `confidence` (mean
        log-probability per token under the mixture, nats, before temperature and filters), `agreement` (share of
        (token, expert) pairs in which the expert gives the chosen token more than half of its probability) **[choice]**
        and `expert_agreement` (T floats, the same for each expert); with `top_logprobs`, for each answer token also
        `top_token_ids` (k int32) and `top_log_probs` (k float32, nats, falling; the other tokens have
        `1 - sum(exp)` together), and `top_temperature`. With choices there is a column `choices` too, `confidence` is
        the log (nats) of the answer's share of the choices' probability, so `exp(confidence)` is their softmax, and an
        expert agrees if it would choose the same.

    Raises:
        FloatingPointError: an expert gives NaN or no finite logit; names the questions.
        ValueError: `output_file` holds rows of another run (says what differs) or damaged ones (names file and line);
            a generation config that changes the distribution; `top_logprobs` is out of range, or the ensemble votes;
            the tokenizer is not the experts', or cannot turn tokens into text; a prompt and its answer do not fit the
            experts' context; `sampling` or `top_logprobs` for questions with choices; or answers that would have no
            end, because the format has no end token and there are no choices; ids that are there twice; or a number
            outside its range.
    """
    numbers = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "top_logprobs": top_logprobs}
    for name, value in numbers.items():
        if name != "top_logprobs" or value is not None:
            check_number(name, value, whole=True)
    check_number("seed", seed, "first_seed", whole=True)
    check_number("top_temperature", top_temperature)
    if top_logprobs is None and top_temperature != 1:
        raise ValueError(
            f"top_temperature={top_temperature} does nothing without top_logprobs: set it, or leave both out"
        )
    require_tokenizer(ensemble, processing_class)
    if len(questions) == 0:
        raise ValueError("there are no questions to label: expected at least one")
    question_format = question_format or QuestionFormat()
    prompts = tokenize_prompts(questions, processing_class, question_format, "questions", max_new_tokens)
    choices = None
    decoding: dict[str, Any] = {}
    if "choices" in questions.column_names:
        if sampling not in (None, Sampling()) or top_logprobs is not None:
            raise ValueError(
                f"questions with choices are answered by likelihood, with neither sampling ({sampling}) nor "
                f"top_logprobs ({top_logprobs}): leave both out"
            )
        choices = tokenize_choices(questions, processing_class, question_format)
    elif question_format.end_token:
        require_room(ensemble, prompts, max_new_tokens)
        require_plain(ensemble.generation_config)
        require_readable(question_format.prompt(questions[0]["prompt"], processing_class))
        decoding = {
            "max_new_tokens": max_new_tokens,
            "sampling": sampling or Sampling(),
            "seed": seed,
            "top": None if top_logprobs is None else (top_logprobs, top_temperature),
            "ends": end_tokens(processing_class, ensemble.generation_config),
        }
    else:
        raise ValueError(
            "the format has end_token=False, so that decoded answers would have no end: use end_token=True, or give "
            "the questions a column `choices`"
        )

    def describe() -> dict[str, Any]:
        tokens = list(prompts["input_ids"]) if choices is None else [[row.prompt, row.choices] for row in choices]
        return _description(ensemble, questions, processing_class, question_format, tokens, decoding)

    def answer(batch: list[int]) -> Iterator[dict[str, Any]]:
        if choices is None:
            return _label_batch(ensemble, questions, prompts, batch, processing_class, question_format, decoding)
        return choose_answers(ensemble, questions, choices, batch, processing_class)

    require_distinct(prompts["id"])
    # Batches are cut before finished rows are left out, so that a continued run meets the same batches.
    batches = batches_by_length([len(ids) for ids in prompts["input_ids"]], batch_size)
    file = None if output_file is None else LabelFile(Path(output_file), describe, questions)
    rows = _answered(prompts["id"], batches, answer, file, description)
    from datasets import Dataset

    return Dataset.from_list([rows[row_id] for row_id in prompts["id"]])


def decoding_work(
    prompts: Sequence[int], answers: Sequence[int], batch_size: int, max_new_tokens: int
) -> tuple[Work, Work, int]:
    """Return one expert's work of reading prompts, that of decoding answers of given lengths, and the number of steps.

    Args:
        prompts: tokens of each prompt.
        answers: tokens of each answer, end token included; a batch goes on until its longest one ends.
        batch_size: questions decoded together.
        max_new_tokens: the most tokens of an answer.
    """
    reading, writing, steps = Work(), Work(), 0
    for batch in batches_by_length(prompts, batch_size):
        count, length = len(batch), prompts[batch[-1]]
        reading += Work.of_padded([prompts[i] for i in batch], count)
        more = min(max_new_tokens, max(answers[i] for i in batch)) - 1
        steps += more
        for past in range(length, length + more):
            writing += Work.of_pass(count, 1, count, count, past)
    return reading, writing, steps


def _description(
    ensemble: ExpertMixture,
    questions: Dataset,
    processing_class: PreTrainedTokenizerBase,
    question_format: QuestionFormat,
    tokens: list[Any],
    decoding: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what decides the answers, as plain JSON; `decoding` is empty where they are choices."""
    columns = [name for name in ("id", "prompt", "choices") if name in questions.column_names]
    found = {
        **describe_experts(ensemble.experts),
        "expert_weights": list(ensemble.config.expert_weights),
        "combine": ensemble.config.combine,
        "questions": digest_columns(questions, columns),
        "format": asdict(question_format),
        "tokenizer": digest_tokenizer(processing_class),
        "prompt_tokens": digest_json([tokens]),
    }
    if decoding:
        sampling = decoding["sampling"]
        found |= {
            "max_new_tokens": decoding["max_new_tokens"],
            "sampling": asdict(sampling),
            # Greedy answers draw nothing.
            "seed": decoding["seed"] if sampling.temperature > 0 else None,
            "top_logprobs": decoding["top"] and decoding["top"][0],
            "top_temperature": decoding["top"] and float(decoding["top"][1]),
            "end_tokens": decoding["ends"],
        }
    return found


def _answered(
    ids: Sequence[str],
    batches: list[list[int]],
    answer: Callable[[list[int]], Iterator[dict[str, Any]]],
    file: LabelFile | None,
    description: str | None,
) -> dict[str, dict[str, Any]]:
    """Return a row for every question, by its id, from `file` or made by `answer`; processes share the batches out."""
    found, digest = ([], "") if file is None else processes.on_main(file.resume)
    rows = {row["id"]: unpacked_row(row) for row in found}
    todo = processes.share([batch for batch in batches if any(ids[i] not in rows for i in batch)])
    mine: dict[str, dict[str, Any]] = {}
    bar = tqdm(
        total=len(rows) + sum(len(batch) for batch in todo),
        initial=len(rows),
        desc=description,
        unit="question",
        leave=False,
        disable=description is None or not processes.is_main(),
    )
    for batch in todo:
        fresh = [row for row in answer(batch) if row["id"] not in rows]
        mine.update((row["id"], row) for row in fresh)
        if file is not None:
            file.append(map(packed_row, fresh), digest, processes.index())
        bar.update(len(fresh))
    bar.close()
    for share in processes.gather(mine):
        rows |= share
    if file is not None and processes.count() > 1:
        order = [ids[i] for batch in batches for i in batch]
        processes.on_main(file.join, [packed_row(rows[row_id]) for row_id in order], digest)
    return rows


@torch.no_grad()
def _label_batch(
    ensemble: ExpertMixture,
    questions: Dataset,
    prompts: Dataset,
    batch: list[int],
    processing_class: PreTrainedTokenizerBase,
    question_format: QuestionFormat,
    decoding: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    device, top = ensemble.device, decoding["top"]
    pad = processing_class.eos_token_id
    ends = torch.tensor(decoding["ends"], device=device)
    inputs = PromptCollator(pad)([{"input_ids": prompts[i]["input_ids"]} for i in batch])
    seeds = torch.tensor([decoding["seed"] + i for i in batch], dtype=torch.int64, device=device)
    decoder = MixtureDecoder(
        ensemble,
        inputs["input_ids"].to(device),
        inputs["attention_mask"].to(device),
        seeds,
        decoding["sampling"],
    )
    running = torch.ones(len(batch), dtype=torch.bool, device=device)
    tokens, log_probs, agreement, counted, kept = [], [], [], [], []
    for _ in range(decoding["max_new_tokens"]):
        logits = decoder.logits()
        choice = decoder.choose(logits)
        require_valid(choice.valid | ~running, [f"question {prompts[i]['id']!r}" for i in batch], logits)
        tokens.append(choice.tokens)
        log_probs.append(choice.log_probs)
        agreement.append((choice.expert_log_probs.exp() > _AGREES).double())
        counted.append(running.clone())
        if top is not None:
            kept.append(top_tokens(ensemble, logits, *top))
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
        prompt = question_format.prompt(questions[i]["prompt"], processing_class)
        answer = ids[row, : count - finished].tolist()
        cache = {name: values[row, :count] for name, values in zip(TOP_COLUMNS, caches, strict=True)} if top else {}
        yield {
            "id": prompts[i]["id"],
            "prompt": questions[i]["prompt"],
            "answer": question_format.answer_text(answer, prompt),
            "answer_ids": ids[row, :count],
            "num_tokens": count,
            "finished": finished,
            "confidence": float(confidence[row]),
            "agreement": float(shares[:, row].mean()),
            "expert_agreement": shares[:, row].tolist(),
            **cache,
            **({"top_temperature": float(top[1])} if top else {}),
        }


def require_probabilities(ensemble: ExpertMixture) -> None:
    """Raise ValueError unless the ensemble's distribution has a loss."""
    if ensemble.config.combine == "vote":
        raise ValueError(
            'combine="vote" gives one token all the probability, which is no soft label: combine the experts by '
            '"prob" or "logprob", or train the student with variant="sft"'
        )


# The likeliest tokens of a teacher, kept


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
