"""Every arm of a run on the questions that it is measured on: scores, which are kept, and records of them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ensemw2s import ops
from ensemw2s.experiments.config import ModelConfig
from ensemw2s.experiments.folder import RunFolder
from ensemw2s.experiments.questions import MEASURED_SPLITS
from ensemw2s.experiments.samples import question_samples, sample_record
from ensemw2s.inference.choices import ChoiceScores, ChoiceSettings, score_choice_mixtures, score_choices
from ensemw2s.inference.scoring import AnswerScores, score_examples, score_mixtures
from ensemw2s.report.arms import BASELINE, CEILING
from ensemw2s.report.statistics import accuracy, pooled_gap_recovered, token_error
from ensemw2s.runtime import processes
from ensemw2s.runtime.files import digest_of_files, read_json, write_json
from ensemw2s.runtime.meter import measured
from ensemw2s.runtime.records import (
    TEST_SPLITS,
    AnswersRecord,
    ArmRecord,
    BestExpertRecord,
    CostRecord,
    EnvironmentRecord,
    MixtureRecord,
    PgrRecord,
    answers_text,
    questions_digest,
)

# Per split what `_outcome` returns.
_Outcomes = Mapping[str, Mapping[str, Any]]


def evaluate(files: RunFolder) -> list[dict[str, Any]]:
    """Score all arms of a run, as far as they are not, and return the records of the phase."""
    config = files.config
    alone: dict[str, tuple[ModelConfig, Callable[[], Any]]] = {
        "zero_shot_weak": (config.weak, partial(files.untrained, config.weak)),
        "zero_shot_strong": (config.strong, partial(files.untrained, config.strong)),
        **{arm: (config.strong, partial(files.trained, arm)) for arm in config.students},
    }
    kept = [_kept(files, arm, partial(_score_one, files, arm, *own)) for arm, own in alone.items()]
    kept.append(_kept(files, "mixtures", partial(_score_mixtures, files)))
    scores = {arm: outcomes for part in kept for arm, outcomes in part["outcomes"].items()}
    inference = {arm: cost for part in kept for arm, cost in part["inference"].items()}
    samples = _kept(files, "samples", partial(_sample_answers, files, scores))["samples"]
    experts = sorted((arm for arm in scores if arm.startswith("expert_")), key=lambda arm: int(arm.split("_")[1]))
    # On the validation questions, the first of equals.
    best = max(experts, key=lambda arm: float(np.mean(scores[arm]["validation"]["correct"])))
    scores["best_expert"], inference["best_expert"] = scores[best], inference[best]
    arms = [
        "zero_shot_weak", "zero_shot_strong", *experts, "best_expert", "majority_vote", "uniform_average",
        *config.expert_arms(), *config.students,
    ]  # fmt: skip
    records = [record for arm in arms for record in _arm_records(files, arm, scores[arm])]
    records.append(BestExpertRecord(arm=best).to_json())
    records += _recovered(files, scores)
    records += [_cost(files, arm, inference[arm]) for arm in arms]
    return [*records, *samples, environment()]


def environment() -> dict[str, Any]:
    """Return what ran: versions, machine, threads, and the backend behind each op."""
    packages = ("ensemw2s", "torch", "transformers", "peft", "accelerate", "datasets", "numpy")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return EnvironmentRecord(
        python=platform.python_version(),
        platform=platform.platform(),
        versions={name: importlib.metadata.version(name) for name in packages},
        device=device,
        threads=torch.get_num_threads(),
        processes=processes.count(),
        backends={op: ops.backend_for(op, device) for op in ops.available_backends(device)},
        build=ops.build_info(),
    ).to_json()


def _kept(files: RunFolder, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `compute` does, which is kept once computed.

    Of arms that is, per arm, `outcomes` (per split what `_outcome` returns) and the cost of `inference`.
    """
    file = files.path / "scores" / f"{name}.json"
    if not processes.on_main(file.exists):
        scores = compute()
        processes.on_main(write_json, file, scores)
    return read_json(file)


def _score_one(files: RunFolder, arm: str, model: ModelConfig, load: Callable[[], Any]) -> dict[str, Any]:
    loaded = load()

    def alone(score: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
        return lambda *given, **options: {arm: score(loaded, *given, **options)}

    with measured() as spent:
        outcomes = _measured(files, [arm], model, alone(score_examples), alone(score_choices), arm)
    return {"outcomes": outcomes, "inference": {arm: spent}}


def _score_mixtures(files: RunFolder) -> dict[str, Any]:
    experts, mixtures, combine = _mixtures(files)
    ensemble = files.of_experts(experts)
    score = partial(score_mixtures, ensemble, mixtures=mixtures, combine=combine)
    choose = partial(score_choice_mixtures, ensemble, mixtures=mixtures, combine=combine)
    with measured() as spent:
        outcomes = _measured(files, list(mixtures), files.config.weak, score, choose, "experts and ensembles")
    # Each expert is run once for all mixtures; an arm alone would have taken its experts' shares.
    used = {arm: sum(weight > 0 for weight in weights) / len(experts) for arm, weights in mixtures.items()}
    inference = {
        arm: {name: None if value is None else value * share for name, value in spent.items()}
        for arm, share in used.items()
    }
    return {"outcomes": outcomes, "inference": inference}


def _sample_answers(files: RunFolder, scores: Mapping[str, _Outcomes]) -> dict[str, Any]:
    """Return the records of the test questions that a report shows token by token."""
    ensemble, weak = files.teacher("ensemble"), files.config.weak
    tokenizer = files.tokenizer(weak)
    records = []
    for split in TEST_SPLITS:
        name = MEASURED_SPLITS[split]
        questions, examples = files.questions(name), files.examples(name, weak)
        chosen = question_samples(scores, split)
        records += [sample_record(ensemble, tokenizer, questions, examples, **fields).to_json() for fields in chosen]
    return {"samples": records}


def _measured(
    files: RunFolder,
    arms: Sequence[str],
    model: ModelConfig,
    score: Callable[..., Mapping[str, AnswerScores]],
    choose: Callable[..., Mapping[str, ChoiceScores]],
    description: str,
) -> dict[str, dict[str, Any]]:
    """Return, per arm and split, what `score` finds in the answers and, where there are choices, `choose`."""
    outcomes: dict[str, dict[str, Any]] = {arm: {} for arm in arms}
    tokenizer, question_format = files.tokenizer(model), files.config.data.format
    for split, name in MEASURED_SPLITS.items():
        shown, questions = f"{description}: {split}", files.questions(name)
        answers = score(files.examples(name, model), pad_token_id=tokenizer.eos_token_id, description=shown)
        chosen: Mapping[str, ChoiceScores] = {}
        if "choices" in questions.column_names:
            chosen = choose(questions, tokenizer, settings=ChoiceSettings(question_format, description=shown))
        for arm in arms:
            outcomes[arm][split] = _outcome(answers[arm], chosen.get(arm))
    return outcomes


def _outcome(answers: AnswerScores, choices: ChoiceScores | None) -> dict[str, Any]:
    """Return what is kept of one arm on one split, as plain JSON.

    `token_wrong` (0 or 1 per answer token, a list per question) and `correct` (0 or 1 per question): whether the
    likeliest choice is right where there are choices (`by_likelihood`), else whether every token is.
    """
    pieces = np.split(answers.token_wrong.astype(int), np.cumsum(answers.lengths)[:-1])
    correct = answers.correct if choices is None else np.asarray(choices.correct)
    return {
        "token_wrong": [piece.tolist() for piece in pieces],
        "correct": correct.astype(int).tolist(),
        "by_likelihood": choices is not None,
    }


def _mixtures(files: RunFolder) -> tuple[list[Path], dict[str, list[float]], dict[str, str]]:
    """Return all experts, the arms that are mixtures of them (a weight for each expert), and how they combine."""
    found = [record for record in files.records("boost") if record["kind"] == MixtureRecord.kind]
    # Arms share experts; each is scored once.
    experts: dict[str, Path] = {}
    own: dict[str, list[int]] = {}
    for record in found:
        folders = [files.path / path for path in record["experts"]]
        names = [digest_of_files(sorted(folder.glob("*.safetensors"))) for folder in folders]
        experts |= dict(zip(names, folders, strict=True))
        own[record["arm"]] = [list(experts).index(name) for name in names]

    def weights(places: Sequence[int], values: Sequence[float]) -> list[float]:
        by_place = dict(zip(places, values, strict=True))
        return [by_place.get(place, 0.0) for place in range(len(experts))]

    mixtures: dict[str, list[float]] = {}
    combine: dict[str, str] = {}
    for record in found:
        arm, places = record["arm"], own[record["arm"]]
        mixtures[arm], combine[arm] = weights(places, record["expert_weights"]), record["combine"]
        if arm == "ensemble":
            mixtures |= {f"expert_{t}": weights([place], [1.0]) for t, place in enumerate(places, start=1)}
            mixtures["uniform_average"] = mixtures["majority_vote"] = weights(places, [1.0] * len(places))
            combine |= {"uniform_average": "prob", "majority_vote": "vote"}
    return list(experts.values()), mixtures, combine


def _arm_records(files: RunFolder, arm: str, outcomes: _Outcomes) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for split, outcome in outcomes.items():
        wrong, correct = outcome["token_wrong"], outcome["correct"]
        estimates = {"accuracy": accuracy(np.array(correct, dtype=bool)), "token_error": token_error(wrong)}
        if outcome["by_likelihood"]:
            estimates["exact_match"] = accuracy(np.array([not any(bits) for bits in wrong]))
        for metric, (value, error) in estimates.items():
            record = ArmRecord(arm=arm, split=split, metric=metric, value=value, standard_error=error, n=len(correct))
            records.append(record.to_json())
        text, digest = answers_text(correct), questions_digest(files.questions(MEASURED_SPLITS[split])["id"])
        records.append(AnswersRecord(arm=arm, split=split, correct=text, questions=digest).to_json())
    return records


def _recovered(files: RunFolder, scores: Mapping[str, _Outcomes]) -> list[dict[str, Any]]:
    config, records = files.config, []
    for arm in config.students if CEILING in config.students else ():
        for split in TEST_SPLITS:
            # A single run is a pool of one task.
            arms = [{config.name: scores[name][split]["correct"]} for name in (BASELINE, arm, CEILING)]
            gap = pooled_gap_recovered(*arms, seed=config.seed)
            records.append(PgrRecord(arm=arm, split=split, **dataclasses.asdict(gap)).to_json())
    return records


def _cost(files: RunFolder, arm: str, inference: Mapping[str, Any]) -> dict[str, Any]:
    """Return what training an arm took, where it was trained, and what answering all test questions took."""
    training: Mapping[str, Any] = {}
    trained_as = "ensemble" if arm in ("uniform_average", "majority_vote") else arm
    if arm in files.config.students:
        training = files.student_cost(arm)
    elif trained_as in files.config.expert_arms():
        training = files.boosting_cost(trained_as)
    spent = {f"train_{name}": value for name, value in training.items()}
    spent |= {f"inference_{name}": value for name, value in inference.items()}
    return CostRecord(arm=arm, **spent).to_json()
