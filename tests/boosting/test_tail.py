"""The loss with a polynomial tail: its value, its gradient, and experts that are trained on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ensemw2s import BoostingConfig
from ensemw2s.boosting.tail import polynomial_tail_loss
from ensemw2s.runtime.store import Store
from tests.boosting_runs import boost


def parts(seed: int, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(7, 33, generator=generator) * scale).requires_grad_()
    return logits, torch.randint(0, 33, (7,), generator=generator), torch.rand(7, generator=generator)


@pytest.mark.parametrize("exponent", [0.05, 0.3, 1.0])
def test_value_and_gradient_are_those_of_the_formula(exponent: float) -> None:
    logits, labels, weights = parts(3)
    loss = polynomial_tail_loss(logits, labels, weights, exponent)
    (gradient,) = torch.autograd.grad(loss, logits)
    exact = logits.detach().double().requires_grad_()
    likely = exact.softmax(-1).gather(1, labels[:, None])[:, 0]
    expected = (weights.double() * (likely**-exponent - 1) / exponent).sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    (of_formula,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(gradient.double(), of_formula, rtol=1e-4, atol=1e-6)


def test_without_a_tail_it_is_cross_entropy_and_with_one_it_is_larger() -> None:
    logits, labels, weights = parts(4)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(
        polynomial_tail_loss(logits, labels, weights, 1e-4), (weights * losses).sum(), rtol=2e-3, atol=0
    )
    assert polynomial_tail_loss(logits, labels, weights, 0.3) > (weights * losses).sum()


def test_it_stays_finite_and_its_gradient_too_where_the_gold_token_is_next_to_impossible() -> None:
    logits = torch.tensor([[0.0, -200.0]], requires_grad=True)
    loss = polynomial_tail_loss(logits, torch.tensor([1]), torch.ones(1), 0.3)
    assert loss.isfinite() and torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_experts_are_trained_on_it_and_a_store_keeps_them_apart(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    folders = []
    for name, tail in (("plain", 0.0), ("tailed", 0.3), ("again", 0.3)):
        trainer = boost(tmp_path / name, given={"store": store}, loss_tail=tail, num_rounds=1, recipe="deep_ensemble")
        trainer.train()
        folders.append((trainer.expert_folders()[0] / "adapter_model.safetensors").read_bytes())
    plain, tailed, again = folders
    assert plain != tailed and tailed == again


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_tail": -0.1}, r"loss_tail must be .*\[0, 1\]"),
        ({"loss_tail": 1.5}, r"loss_tail must be .*\[0, 1\]"),
        (
            {"loss_tail": 0.3, "label_smoothing_factor": 0.1},
            "loss_tail=0.3 and label_smoothing_factor=0.1 .*leave one out",
        ),
    ],
)
def test_what_it_cannot_be_is_refused(settings: dict[str, float], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        BoostingConfig(output_dir=str(tmp_path), **settings)
