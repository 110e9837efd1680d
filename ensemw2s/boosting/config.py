"""`BoostingConfig`: everything that a boosting run can be told, and the named recipes that fill it in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ensemw2s.boosting import algorithm
from ensemw2s.runtime.values import Uses, check_in_use, shown
from ensemw2s.training.arguments import AnswerTrainingArguments

# What a recipe decides where it is not given. The defaults are "tempered", ours: the paper's collapses on real models,
# because one full update leaves a small effective sample size.
RECIPES: dict[str, dict[str, Any]] = {
    # The paper's, to the letter.
    "paper": {"sampling": "draw", "errors": "hard", "effective_sample_size_floor": 0.0},
    "tempered": {},
    # The same in a chain, for experts that are cut short and would still gain by longer training: its rounds are one
    # long training, and later experts, which are then the better ones, may weigh more.
    "chained": {"warm_start": True, "mixture_weights": "validation"},
    # The same in several chains: each goes on while it gains, and then the next one begins.
    "branched": {"warm_start": True, "chain_gain": 0.01, "mixture_weights": "uniform"},
    # The same in generations, whose later ones also learn the hard questions that a stronger model answers alike; see
    # `experiments.co_boosting`.
    "co_boosted": {"mixture_weights": "uniform"},
    # The baselines, with equal votes: uniform draws, and every token in every round.
    "bagging": {"sampling": "bagging", "errors": "hard", "effective_sample_size_floor": 0.0},
    "deep_ensemble": {"sampling": "all", "errors": "hard", "effective_sample_size_floor": 0.0},
}
_UPDATING = 'weights that are updated (sampling="draw", "without_replacement" or "reweight")'
# Settings that act beside some others only.
_USES_OF_SETTINGS: Uses = {
    **dict.fromkeys(
        ("shrinkage", "uniform_mix", "effective_sample_size_floor", "weight_cap", "min_effective_sample_size", "prior"),
        (lambda args: not args.is_baseline, _UPDATING),
    ),
    "prior_weights": (lambda args: not args.is_baseline and args.prior == "pretrained", 'prior="pretrained"'),
    "num_classes": (lambda args: not args.is_baseline and args.prior == "uniform", 'prior="uniform"'),
    **dict.fromkeys(
        ("generations", "generation_weights"), (lambda args: args.recipe == "co_boosted", 'recipe="co_boosted"')
    ),
    "chain_gain": (lambda args: args.warm_start, "warm_start=True"),
    "draw_fraction": (lambda args: args.sampling == "without_replacement", 'sampling="without_replacement"'),
}


@dataclass(kw_only=True)
class BoostingConfig(AnswerTrainingArguments):
    """What `BoostingTrainer` does, on top of transformers' `TrainingArguments` (which train each expert).

    The settings from `effective_sample_size_floor` on are ours [choice]; they are off in the paper's recipe.

    Attributes:
        num_rounds: T, the number of experts wanted; at least 1. With "co_boosted", of each generation.
        recipe: a named set of choices: "tempered" (ours, the default), "chained" (ours in a chain) and "branched" (ours
            in several chains), which need validation questions, "co_boosted" (ours with unlabelled hard questions, for
            `CoBoostingTrainer`), "paper", or the baselines "bagging" and "deep_ensemble". It decides `sampling`,
            `errors`, `effective_sample_size_floor`, `warm_start`, `chain_gain` and `mixture_weights` where they are not
            given. Their defaults below are those of "tempered".
        sampling: "draw" (the paper), "without_replacement", "reweight", "bagging" or "all"; see
            `ensemw2s.boosting.algorithm.loss_weights`.
        shrinkage: s in (0, 1]; the update uses s * a_t, the mixture a_t.
        uniform_mix: m in [0, 1); the loss uses (1-m) D + m/n.
        errors: a unit's loss: "hard", 1 if it is wrong (the paper), or "soft", `1 - p(gold)` as in SAMME.R.
        deduplicate: a token drawn several times counts once.
        draw_fraction: the share of the units that sampling="without_replacement" draws, in (0, 1].
        prior: "pretrained" (the paper: the error of the model before fine-tuning), "uniform" (SAMME) or a number in
            (0, 1).
        num_classes: K for prior="uniform"; None takes the size of the vocabulary.
        unit: what shares one weight: "token", "window" (of as many tokens as `window` says) or "sequence".
        window: tokens in a window, at least 1, which unit="window" needs.
        combine: how the ensemble combines distributions: "prob", "logprob" or "vote".
        effective_sample_size_floor: an update goes only so far (its shrinkage is lowered) that the effective sample
            size of the weights stays at this share of the units, in (0, 1); 0 is no floor.
        weight_cap: no unit weighs more than this many times the average after an update, at least 1; None is no limit.
        min_effective_sample_size: boosting stops after a round that leaves an effective sample size below this share
            of the units, in [0, 1).
        prior_weights: the error before fine-tuning is measured under the "initial" weights (the paper), or in every
            round under the "current" ones.
        error_folds: measure an expert's errors out of fold: so many further models are trained in each round, each on
            the answers outside of its fold and with the round's weights, and judge the answers in it; at least 2. None
            measures the expert on what it was trained on (the paper).
        boosted_tokens: "all" answer tokens carry a weight (the paper), or the "informative" ones: end tokens and white
            space keep the weight 1 in every loss and have no part in errors.
        loss_tail: a in [0, 1]; experts are trained on the loss `((1/p)^a - 1) / a` of every token, p being the gold
            token's probability, which is cross entropy at 0, the default; see
            `ensemw2s.boosting.tail.polynomial_tail_loss`.
        warm_start: an expert starts from the one before instead of from the pre-trained model.
        chain_gain: with warm_start, a chain goes on only while its last expert's mean negative log-likelihood of the
            validation answers is lower than that of the one before by more than this share, in (0, 1). Otherwise the
            next expert begins a new chain, from the pre-trained model, and the ensemble has the last expert of each
            chain. None is one chain, all of whose experts are in the ensemble.
        vary_seed: every round has a seed of its own for adapters, order and dropout; with False, all rounds have the
            seed of the first.
        lora_ranks: the rank of each round's adapter, in order, at the ratio of alpha to rank that `peft_config` has;
            None uses the rank of `peft_config` in every round.
        mixture_weights: the ensemble's expert weights are "alpha" (the paper), "uniform", or fitted to the likelihood
            of the "validation" questions (`ensemw2s.boosting.algorithm.fit_mixture_weights`).
        choose_num_experts: keep the first T' experts only, T' being the number whose mixture gives the validation
            answers the highest likelihood; not with weights that are fitted to them anyway ("validation" above).
        validate_rounds: measure expert and ensemble on the validation questions after each round.
        generations: for "co_boosted", how often experts are trained anew on easy questions and on those hard ones whose
            answers, by the experts before, out-of-fold students of the strong model agree with; from 1 to 10.
        generation_weights: for "co_boosted", the token weights of these generations: "boosted" follow the soft error of
            the mixture so far, "uniform" are all 1 (the control).
        overwrite: delete what another configuration left in `output_dir`.

    Raises:
        ValueError: a value outside its range; names it.
    """

    num_rounds: int = 5
    recipe: Literal["paper", "tempered", "chained", "branched", "co_boosted", "bagging", "deep_ensemble"] = "tempered"
    sampling: algorithm.Sampling = "reweight"
    shrinkage: float = 1.0
    uniform_mix: float = 0.0
    errors: Literal["hard", "soft"] = "soft"
    deduplicate: bool = False
    draw_fraction: float = 0.5
    prior: algorithm.Prior = "pretrained"
    num_classes: int | None = None
    unit: algorithm.Unit = "token"
    window: int | None = None
    combine: Literal["prob", "logprob", "vote"] = "prob"
    effective_sample_size_floor: float = 0.7
    weight_cap: float | None = None
    min_effective_sample_size: float = 0.0
    prior_weights: Literal["initial", "current"] = "initial"
    error_folds: int | None = None
    boosted_tokens: Literal["all", "informative"] = "all"
    loss_tail: float = 0.0
    warm_start: bool = False
    chain_gain: float | None = None
    vary_seed: bool = True
    lora_ranks: list[int] | None = None
    mixture_weights: Literal["alpha", "uniform", "validation"] = "alpha"
    choose_num_experts: bool = False
    validate_rounds: bool = True
    generations: int = 1
    generation_weights: Literal["boosted", "uniform"] = "boosted"
    overwrite: bool = False

    def __new__(cls, *args: Any, **given: Any) -> BoostingConfig:
        """Note what is given, which no recipe changes: a value may be that of the default and still be meant."""
        config = super().__new__(cls, *args, **given)
        config._given = frozenset(given)
        return config

    def __post_init__(self) -> None:
        super().__post_init__()
        recipe = RECIPES[self.recipe]
        for name in recipe.keys() - self._given:
            setattr(self, name, recipe[name])
        self._check_combinations()
        # The functions that will use a value refuse it now rather than after the first expert.
        algorithm.unit_index([2], self.unit, self.window)
        algorithm.prior_error(self.prior, pretrained_error=0.5, num_classes=self.num_classes or 2, unit=self.unit)
        algorithm.loss_weights(algorithm.initial_weights(2), generator=np.random.default_rng(0), **self.loss_settings)
        check_in_use(self, _USES_OF_SETTINGS, recipe)

    @property
    def is_baseline(self) -> bool:
        """Whether tokens are drawn or weighed whatever an expert got wrong: equal votes, and nothing to update."""
        return self.sampling in ("bagging", "all")

    @property
    def needs_validation(self) -> bool:
        """Whether the ensemble cannot be made without validation questions."""
        return self.choose_num_experts or self.mixture_weights == "validation" or self.chain_gain is not None

    @property
    def loss_settings(self) -> dict[str, Any]:
        """Return how token weights enter the loss, as arguments of `ensemw2s.boosting.algorithm.loss_weights`."""
        drawn = {"draw_fraction": self.draw_fraction, "deduplicate": self.deduplicate}
        return {"sampling": self.sampling, "uniform_mix": self.uniform_mix, **drawn}

    def _check_combinations(self) -> None:
        if self.mixture_weights == "validation" and self.choose_num_experts:
            raise ValueError(
                'choose_num_experts has no use with mixture_weights="validation" (which recipe="chained" sets), since '
                'that may give an expert the weight 0: leave it out, or set mixture_weights="alpha"'
            )
        if self.mixture_weights == "validation" and self.combine != "prob":
            raise ValueError(
                'mixture_weights="validation" (which recipe="chained" sets) fits a mixture of probabilities, and '
                f'combine is {self.combine!r}: set combine="prob" or mixture_weights="alpha"'
            )
        if self.choose_num_experts and self.combine == "vote":
            raise ValueError('choose_num_experts compares likelihoods, which combine="vote" does not give')
        if self.loss_tail and self.label_smoothing_factor:
            raise ValueError(
                f"loss_tail={self.loss_tail:g} and label_smoothing_factor={self.label_smoothing_factor:g} ask for two "
                "losses in place of cross entropy: leave one out"
            )
        ranks = self.lora_ranks
        if ranks is not None and (len(ranks) != self.num_rounds or min(ranks) < 1):
            raise ValueError(
                f"lora_ranks must list a rank of at least 1 for each of {self.num_rounds} rounds, got {shown(ranks)}"
            )
        if ranks is not None and self.warm_start:
            raise ValueError(
                'lora_ranks gives every round a new adapter, and warm_start (which recipe="chained" sets) goes on with '
                "the one before: leave it out, or set warm_start to false"
            )
