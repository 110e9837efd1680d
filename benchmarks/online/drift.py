"""Expert weights that learn, where an expert is damaged in mid-stream and a better one joins later.

    python -m benchmarks.online.drift [--output drift.svg] [--questions 450] [--seed 0]

Three experts of the pair of character-level models answer a stream of questions. After a third of it, the leading
one's weights get noise; after two thirds, an expert joins that was trained for three times as long. Each question's
right answer becomes known after it was answered. Compared are `OnlineWeights` with and without a share, the weights
that the stream began with, equal ones, and the best single expert of each third, which is known in hindsight alone.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from typing import Any

import numpy as np
import torch

RULES = ("online, share 1%", "online, no share", "as at the start", "equal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output")
    parser.add_argument("--questions", type=int, default=450)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    ensembles, questions, tokenizer, form = stream(options.questions, options.seed)
    weights, losses, right, alone = follow(ensembles, questions, tokenizer, form)
    thirds = np.array_split(np.arange(len(losses)), 3)
    print("| third | " + " | ".join(f"{rule}: nats an answer, % right" for rule in RULES) + " | best expert, nats |")
    print("|---|" + "---|" * (len(RULES) + 1))
    for number, third in enumerate(thirds, start=1):
        cells = [f"{losses[third, i].mean():.2f}, {100 * right[third, i].mean():.0f}" for i in range(len(RULES))]
        print(f"| {number} | " + " | ".join(cells) + f" | {alone[third].mean(0).min():.2f} |")
    for name, third in (("damage", thirds[1]), ("joining", thirds[2])):
        best = int(alone[third].mean(0).argmin())
        distance = 1 - weights[third, best]
        near = np.flatnonzero(distance < 0.05)
        print(f"{name}: expert {best + 1} is best; within 0.05 of all the weight after "
              f"{near[0] if len(near) else 'more than ' + str(len(third))} answers")  # fmt: skip
    if options.output:
        draw(weights, right, options.output)


def stream(count: int, seed: int) -> tuple[list[Any], Any, Any, Any]:
    """Return the ensembles of the three thirds, the questions, the tokenizer and the question format."""
    from ensemw2s import BoostingConfig, BoostingTrainer, QuestionFormat, TokenEnsemble, load_questions, split_questions

    form = QuestionFormat(prompt_template="{prompt}=", answer_prefix="")
    source = {"characters": "reverse", "min_length": 3, "max_length": 4, "size": 250 + count, "seed": seed}
    split = split_questions(load_questions(source), {"train": 200, "asked": count})

    def trained(epochs: int, rounds: int, at: int) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            args = BoostingConfig(
                output_dir=folder, recipe="deep_ensemble", num_rounds=rounds, num_train_epochs=epochs, seed=at,
                learning_rate=1e-3, per_device_train_batch_size=16, validate_rounds=False, disable_tqdm=True,
            )  # fmt: skip
            trainer = BoostingTrainer(
                "scratch:char-weak", args=args, train_dataset=split["train"], question_format=form
            )
            return trainer.train(), trainer.processing_class

    ensemble, tokenizer = trained(3, 3, seed)
    models = [ensemble.experts.carrier(t) for t in range(3)]
    better = trained(9, 1, seed + 1)[0].experts.carrier(0)
    damaged = copy.deepcopy(models[0])
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in damaged.parameters():
            weight += weight.std() * torch.randn_like(weight)
    later = [damaged, *models[1:]]
    members = (models, later, [*later, better])
    return [TokenEnsemble.from_models(each, [1.0] * len(each)) for each in members], split["asked"], tokenizer, form


def follow(ensembles: list[Any], questions: Any, tokenizer: Any, form: Any) -> tuple[np.ndarray, ...]:
    """Return the first rule's weights [N, 4], losses and right answers [N, rules], and the experts' losses [N, 4]."""
    from ensemw2s import OnlineWeights, answer_log_probs, score_answers

    count = len(questions)
    start = [0.5, 0.25, 0.25]
    rules = [OnlineWeights(start, share=0.01), OnlineWeights(start)]
    weights, alone = np.zeros((count, 4)), np.full((count, 4), np.inf)
    losses, right = np.zeros((count, len(RULES))), np.zeros((count, len(RULES)))
    for ensemble, third in zip(ensembles, np.array_split(np.arange(count), 3), strict=True):
        part = questions.select(third.tolist())
        experts = len(ensemble)
        if experts == 4:
            for rule in rules:
                rule.join(0.05)
        log_probs = answer_log_probs(ensemble, part, tokenizer, question_format=form)
        alone[third, :experts] = -log_probs
        for number, index in enumerate(third.tolist()):
            weights[index, :experts] = rules[0].expert_weights
            fixed = [*start, 0.0][:experts]
            for column, own in enumerate((*[rule.expert_weights for rule in rules], fixed, [1.0] * experts)):
                own = np.maximum(own, 1e-30)
                mixture = ensemble.reweighted(own.tolist())
                scores = score_answers(mixture, part.select([number]), tokenizer, question_format=form)
                right[index, column] = scores.accuracy
                # Of the whole answer, as the weights are learned.
                losses[index, column] = -np.logaddexp.reduce(np.log(own / own.sum()) + log_probs[number])
            for rule in rules:
                rule.learn_answer(log_probs[number])
    return weights, losses, right, alone


def draw(weights: np.ndarray, right: np.ndarray, path: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    names = ("expert 1, damaged after a third", "expert 2", "expert 3", "expert 4, joins after two thirds")
    for index, name in enumerate(names):
        above.plot(weights[:, index], label=name)
    above.set_ylabel("weight (online, share 1%)")
    window = np.ones(30) / 30
    for index, rule in enumerate(RULES):
        below.plot(np.convolve(right[:, index], window, mode="same") * 100, label=rule)
    below.set_ylabel("% right, mean of 30 answers")
    below.set_xlabel("answers")
    for axis in (above, below):
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
